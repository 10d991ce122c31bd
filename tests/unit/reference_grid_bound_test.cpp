// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// On the score grid the bound of the emulation must hold for a kernel that follows docs/numerics.md
// in float32, and break for one that takes any other step. The kernel is written here as plain
// loops over the same codes.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

#include "reference/quantization.hpp"
#include "reference_tensor.hpp"

namespace attn8::reference::testing {
namespace {

enum class Fault {
  kNone,
  kTruncate,      // codes cut off in place of rounded
  kRange,         // the largest weight one code smaller
  kNoCut,         // weights rounded in place of cut off
  kMissingBlock,  // one block of keys not visited
  kMissingKey,    // the last key not visited
  kRunningMax,    // relative to the largest score so far
  kNoResidual,    // without the mean of V
  kNormalizer,    // codes in place of weights
  kFloatScores,   // scores off the grid
  kNoFloor        // r below 2^-16
};
constexpr Fault kFaults[] = {Fault::kTruncate,     Fault::kRange,      Fault::kNoCut,
                             Fault::kMissingBlock, Fault::kMissingKey, Fault::kRunningMax,
                             Fault::kNoResidual,   Fault::kNormalizer, Fault::kFloatScores,
                             Fault::kNoFloor};

// V as the kernel reads it: one scale per block and channel beside what P and l absorb.
struct Values {
  Quantized v;
  std::vector<float> g, w;     // [seqlen_k]
  std::vector<float> scale;    // [blocks, dim]
  std::vector<float> mean;     // [blocks, dim]
  std::vector<float> v_block;  // [blocks], of beta
  float v_ref = 1;
};

Values make_values(const EmulationOptions& options, const Tensor& v, Fault fault) {
  const int64_t seqlen_k = v.shape[1], dim = v.shape[3], kv_block = options.kv_block;
  const QuantSpec spec = {options.v_granularity, options.kv_block};
  Values values;
  values.v = quantize_tokens(gather(v.view(), 0, 0, 0, seqlen_k), spec, seqlen_k);
  values.g.assign(static_cast<size_t>(seqlen_k), 0.0F);
  values.w.assign(static_cast<size_t>(seqlen_k), 256.0F);
  for (int64_t begin = 0; begin < seqlen_k; begin += kv_block) {
    const int64_t end = std::min(begin + kv_block, seqlen_k);
    float v_block = 1;
    if (spec.granularity == Granularity::kBlock) {
      v_block = static_cast<float>(values.v.scale[static_cast<size_t>(begin / kv_block)]);
    }
    if (spec.granularity == Granularity::kToken) {
      v_block = 0;
      for (int64_t j = begin; j < end; ++j) {
        v_block = std::max(v_block, static_cast<float>(values.v.scale[static_cast<size_t>(j)]));
      }
      for (int64_t j = begin; j < end; ++j) {
        const auto n = static_cast<size_t>(j);
        float r = static_cast<float>(values.v.scale[n]) / v_block;
        if (r < 0x1p-16F && fault != Fault::kNoFloor) {
          for (int64_t d = 0; d < dim; ++d) {
            float& code = values.v.codes.token(j)[d];
            code = std::nearbyint(code * (r * 0x1p16F));
          }
          r = 0x1p-16F;
        }
        values.g[n] = static_cast<float>(64 * std::log2(static_cast<double>(r)));
        values.w[n] = std::nearbyint(256 / r);
      }
    }
    values.v_block.push_back(v_block);
    for (int64_t d = 0; d < dim; ++d) {
      float sum = 0;
      for (int64_t j = begin; j < end; ++j) sum += values.v.codes.token(j)[d];
      values.mean.push_back(sum / static_cast<float>(end - begin));
      const bool scaled_later =
          spec.granularity != Granularity::kToken && spec.granularity != Granularity::kBlock;
      values.scale.push_back(
          scaled_later ? static_cast<float>(
                             values.v.scale[static_cast<size_t>(group_of(spec, dim, begin, d))])
                       : 1.0F);
    }
  }
  values.v_ref = *std::max_element(values.v_block.begin(), values.v_block.end());
  return values;
}

int64_t to_integer(float x) { return static_cast<int64_t>(std::nearbyint(x)); }
int64_t whole_octaves(int64_t steps) {
  return static_cast<int64_t>(std::floor(static_cast<double>(steps) / 64));
}
float power(int64_t exponent) {
  return exponent < -100 ? 0.0F : std::ldexp(1.0F, static_cast<int>(exponent));
}

int64_t weight(double distance, Fault fault) {
  if (distance >= 1024) return 0;
  const double range = fault == Fault::kRange ? 65024 : 65280;
  const double whole = std::floor(distance / 64);
  const double value = range * std::exp2(-(distance - 64 * whole) / 64);
  if (fault == Fault::kFloatScores) return static_cast<int64_t>(value * std::exp2(-whole));
  const double table = std::nearbyint(value) * std::exp2(-whole);
  return static_cast<int64_t>(fault == Fault::kNoCut ? std::nearbyint(table) : std::floor(table));
}

// What a kernel has of a row after some of its blocks.
struct Part {
  std::vector<float> sum;
  float l = 0;
  int64_t reference = 0;

  void move_reference(int64_t to) {
    const float factor = power((reference - to) / 64);
    for (float& x : sum) x *= factor;
    l *= factor;
    reference = to;
  }
};

Part add_up(std::vector<Part> parts) {
  int64_t top = parts[0].reference;
  for (const Part& part : parts) top = std::max(top, part.reference);
  for (Part& part : parts) part.move_reference(top);
  Part total = parts[0];
  for (size_t i = 1; i < parts.size(); ++i) {
    for (size_t d = 0; d < total.sum.size(); ++d) total.sum[d] += parts[i].sum[d];
    total.l += parts[i].l;
  }
  return total;
}

// One head, no mask: out [seqlen_q, head_dim]. The blocks of a row in parts of this many.
std::vector<float> run_kernel(const EmulationOptions& options, Fault fault, int64_t blocks_per_part,
                              const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t seqlen_q = q.shape[1], seqlen_k = k.shape[1], dim = q.shape[3];
  const int64_t kv_block = options.kv_block;
  Tokens k_tokens = gather(k.view(), 0, 0, 0, seqlen_k);
  const std::vector<float> mean = channel_mean(k_tokens);
  for (int64_t j = 0; j < seqlen_k; ++j) {
    for (int64_t d = 0; d < dim; ++d) k_tokens.token(j)[d] -= mean[static_cast<size_t>(d)];
  }
  const Quantized q8 = quantize_tokens(gather(q.view(), 0, 0, 0, seqlen_q), {}, seqlen_q);
  const Quantized k8 = quantize_tokens(k_tokens, {}, seqlen_k);
  const Values values = make_values(options, v, fault);
  const bool by_block_channel = options.v_granularity == Granularity::kBlockChannel;

  const int64_t last_key = seqlen_k - (fault == Fault::kMissingKey ? 1 : 0);
  std::vector<float> out(static_cast<size_t>(seqlen_q * dim));
  for (int64_t i = 0; i < seqlen_q; ++i) {
    const float c =
        64 * static_cast<float>(q8.scale[static_cast<size_t>(i)]) *
        static_cast<float>(static_cast<double>(*options.softmax_scale) * std::numbers::log2e);
    std::vector<Part> parts;
    int64_t largest = INT64_MIN;
    for (int64_t begin = 0; begin < last_key; begin += kv_block) {
      if (fault == Fault::kMissingBlock && begin == kv_block) continue;
      const int64_t end = std::min(begin + kv_block, last_key);
      std::vector<double> t;
      for (int64_t j = begin; j < end; ++j) {
        int32_t a = 0;
        for (int64_t d = 0; d < dim; ++d) {
          a += static_cast<int32_t>(q8.codes.token(i)[d] * k8.codes.token(j)[d]);
        }
        const auto n = static_cast<size_t>(j);
        const float x =
            std::fma(static_cast<float>(a) * static_cast<float>(k8.scale[n]), c, values.g[n]);
        t.push_back(fault == Fault::kFloatScores ? static_cast<double>(x) : std::nearbyint(x));
      }
      const double block_max = *std::max_element(t.begin(), t.end());
      const int64_t m = to_integer(static_cast<float>(block_max));
      largest = std::max(largest, m);
      const double top = fault == Fault::kRunningMax ? static_cast<double>(largest) : block_max;
      int64_t weights = 0, residual = 0;
      std::vector<int64_t> s(static_cast<size_t>(dim));
      for (int64_t j = begin; j < end; ++j) {
        const int64_t y = weight(top - t[static_cast<size_t>(j - begin)], fault);
        const int64_t code = fault == Fault::kTruncate ? y >> 8 : (y + 128) >> 8;
        weights += (fault == Fault::kNormalizer ? 128 * code : (y + 1) >> 1) *
                   static_cast<int64_t>(values.w[static_cast<size_t>(j)]);
        residual += y - 256 * code;
        for (int64_t d = 0; d < dim; ++d) {
          s[static_cast<size_t>(d)] += code * static_cast<int64_t>(values.v.codes.token(j)[d]);
        }
      }
      if (fault == Fault::kNoResidual || !options.residual_mean) residual = 0;

      if (begin / kv_block % blocks_per_part == 0) {
        parts.push_back({std::vector<float>(static_cast<size_t>(dim)), 0, 64 * whole_octaves(m)});
      }
      auto& [sum, l, reference] = parts.back();
      if (m > reference + 60 * 64) parts.back().move_reference(64 * whole_octaves(m));
      const int64_t steps = (fault == Fault::kRunningMax ? largest : m) - reference;
      const int64_t whole = whole_octaves(steps);
      const auto fraction =
          static_cast<float>(std::exp2(static_cast<double>(steps - 64 * whole) / 64));
      const float beta = fraction * power(whole);
      const auto block = static_cast<size_t>(begin / kv_block);
      const float bv = beta * (values.v_block[block] / values.v_ref);
      const float rho = static_cast<float>(residual) / 256;
      for (size_t d = 0; d < sum.size(); ++d) {
        const size_t at = block * sum.size() + d;
        float x = std::fma(rho, values.mean[at], static_cast<float>(s[d]));
        if (by_block_channel) x *= values.scale[at];
        sum[d] = std::fma(bv, x, sum[d]);
      }
      l = std::fma(beta, static_cast<float>(weights), l);
    }
    const auto [sum, l, reference] = add_up(std::move(parts));
    for (size_t d = 0; d < sum.size(); ++d) {
      const float scale = by_block_channel ? 1.0F : values.scale[d];
      out[static_cast<size_t>(i * dim) + d] = sum[d] / (l / 0x1p15F) * values.v_ref * scale;
    }
  }
  return out;
}

struct Case {
  std::string name;
  EmulationOptions options;
  Tensor q, k, v;
};

std::vector<Case> cases() {
  std::vector<Case> list;
  const int64_t dim = 32, seqlen_q = 12, seqlen_k = 1000;
  for (const float softmax_scale : {0.18F, 1.5F, 60.0F}) {
    for (const int32_t kv_block : {64, 512}) {
      for (const Granularity granularity :
           {Granularity::kToken, Granularity::kTensor, Granularity::kChannel, Granularity::kBlock,
            Granularity::kBlockChannel}) {
        Case one = {std::string(to_string(granularity)) + " scale " +
                        std::to_string(softmax_scale) + " block " + std::to_string(kv_block),
                    emulation_options({.softmax_scale = softmax_scale,
                                       .kv_block = kv_block,
                                       .v_granularity = granularity}),
                    random_tensor({1, seqlen_q, 1, dim}, 1),
                    random_tensor({1, seqlen_k, 1, dim}, 2),
                    random_tensor({1, seqlen_k, 1, dim}, 3)};
        one.options.score_grid = true;
        // Uneven V: the fold and the block scales have something to do, now and then its floor too.
        for (int64_t j = 0; j < seqlen_k; ++j) {
          const float factor = j % 29 == 5 ? 0x1p-21F : std::exp2(static_cast<float>(j % 23) / 3);
          for (int64_t d = 0; d < dim; ++d) one.v.at(0, j, 0, d) *= factor;
        }
        list.push_back(std::move(one));
      }
    }
  }
  return list;
}

// Largest |kernel - emulation| / bound.
double worst(const Case& one, const Output& wanted, Fault fault, int64_t blocks_per_part = 100) {
  const std::vector<float> got =
      run_kernel(one.options, fault, blocks_per_part, one.q, one.k, one.v);
  double ratio = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    ratio = std::max(ratio, std::abs(got[i] - wanted.out[i]) / wanted.bound[i]);
  }
  return ratio;
}

TEST(ScoreGridBound, HoldsForKernelsInFloat32) {
  for (Case& one : cases()) {
    for (const bool residual_mean : {true, false}) {
      one.options.residual_mean = residual_mean;
      const Output wanted = run_emulation(one.q, one.k, one.v, one.options);
      ASSERT_TRUE(wanted.status.ok()) << wanted.status.message();
      for (const int64_t blocks_per_part : {100, 3, 1}) {
        EXPECT_LE(worst(one, wanted, Fault::kNone, blocks_per_part), 1.0)
            << one.name << " in parts of " << blocks_per_part;
      }
    }
  }
}

// Blocks of V with scales so far apart that their ratio is subnormal in float32.
TEST(ScoreGridBound, HoldsWhereScalesVanish) {
  for (Case& one : cases()) {
    for (int64_t j = 0; j < one.v.shape[1]; ++j) {
      const float factor = j < 512 ? 0x1p60F : 0x1p-70F;
      for (int64_t d = 0; d < one.v.shape[3]; ++d) one.v.at(0, j, 0, d) *= factor;
    }
    const Output wanted = run_emulation(one.q, one.k, one.v, one.options);
    EXPECT_LE(worst(one, wanted, Fault::kNone), 1.0) << one.name;
  }
}

// A bound that would let these through would be of no use.
TEST(ScoreGridBound, BreaksForFaultyKernels) {
  for (const Case& one : cases()) {
    if (*one.options.softmax_scale > 2) continue;  // one key decides, and rounds like any other
    const Output wanted = run_emulation(one.q, one.k, one.v, one.options);
    for (const Fault fault : kFaults) {
      if (fault == Fault::kNoFloor && one.options.v_granularity != Granularity::kToken) continue;
      // With a scale of 1.5 the last key may weigh nothing.
      if (fault == Fault::kMissingKey && *one.options.softmax_scale > 1) continue;
      EXPECT_GT(worst(one, wanted, fault), 2.0) << one.name << " fault " << static_cast<int>(fault);
    }
  }
}

// No code can flip: what is left is float32 rounding, a few units per block.
TEST(ScoreGridBound, IsThatOfFloat32) {
  for (const Case& one : cases()) {
    const Output wanted = run_emulation(one.q, one.k, one.v, one.options);
    double bound2 = 0, out2 = 0;
    for (size_t i = 0; i < wanted.out.size(); ++i) {
      bound2 += wanted.bound[i] * wanted.bound[i];
      out2 += wanted.out[i] * wanted.out[i];
    }
    EXPECT_LT(std::sqrt(bound2 / out2), 1e-5) << one.name;
    RecordProperty(one.name, std::to_string(std::sqrt(bound2 / out2)));
  }
}

}  // namespace
}  // namespace attn8::reference::testing
