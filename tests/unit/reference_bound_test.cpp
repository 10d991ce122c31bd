// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The bound of the emulation must hold for every float32 kernel that follows docs/numerics.md with
// scores in float, and break for one that does not. Both are written here as plain float32 loops
// over the same codes.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>

#include "reference/quantization.hpp"
#include "reference_tensor.hpp"

namespace attn8::reference::testing {
namespace {

enum class Fault {
  kNone,
  kTruncate,        // codes rounded down
  kRange,           // R one too small
  kMissingBlock,    // one block of keys not visited
  kMissingKey,      // the last key not visited
  kOtherMaximum,    // running in place of block-local, or the other way
  kNoResidual,      // without the mean of V
  kOtherNormalizer  // codes in place of weights, or the reverse
};

struct Kernel {
  EmulationOptions options;
  Fault fault = Fault::kNone;
  // Relative error of the exponential: this much, up or down by the bits of its argument, or the
  // same way always.
  float exp2_error = 0;
  bool alternate = true;

  [[nodiscard]] float exp2(float x) const {
    if (x == 0) return 1;
    const bool up = !alternate || std::popcount(std::bit_cast<uint32_t>(x)) % 2 == 0;
    return std::exp2(std::max(x, -126.0F)) * (1 + (up ? exp2_error : -exp2_error));
  }
};

float to_bfloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000U);
}

// One head, no mask: out [seqlen_q, head_dim].
std::vector<float> run_kernel(const Kernel& kernel, const Tensor& q, const Tensor& k,
                              const Tensor& v) {
  const EmulationOptions& options = kernel.options;
  const bool half = options.mode == Mode::kHalf, paper = options.mode == Mode::kPaper;
  const int64_t seqlen_q = q.shape[1], seqlen_k = k.shape[1], dim = q.shape[3];
  const int64_t kv_block = options.kv_block;
  const Fault fault = kernel.fault;

  Tokens k_tokens = gather(k.view(), 0, 0, 0, seqlen_k);
  if (options.smooth_k) {
    const std::vector<float> mean = channel_mean(k_tokens);
    for (int64_t j = 0; j < seqlen_k; ++j) {
      for (int64_t d = 0; d < dim; ++d) k_tokens.token(j)[d] -= mean[static_cast<size_t>(d)];
    }
  }
  const Quantized q8 = quantize_tokens(gather(q.view(), 0, 0, 0, seqlen_q), {}, seqlen_q);
  const Quantized k8 = quantize_tokens(k_tokens, {}, seqlen_k);
  const QuantSpec spec = {options.v_granularity, options.kv_block};
  Quantized v8 = quantize_tokens(gather(v.view(), 0, 0, 0, seqlen_k), spec, seqlen_k);
  const bool fold = spec.granularity == Granularity::kToken && !half;
  const float v_ref =
      fold ? static_cast<float>(*std::max_element(v8.scale.begin(), v8.scale.end())) : 1.0F;
  if (half) {
    v8.codes = gather(v.view(), 0, 0, 0, seqlen_k);
    for (float& x : v8.codes.values) x = to_bfloat16(x);
  }

  const bool local = (options.mode == Mode::kAccurate) != (fault == Fault::kOtherMaximum);
  const float range = (half ? 1.0F : paper ? 127.0F : 255.0F) - (fault == Fault::kRange ? 1 : 0);
  const int64_t last_key = seqlen_k - (fault == Fault::kMissingKey ? 1 : 0);
  std::vector<float> out(static_cast<size_t>(seqlen_q * dim));
  for (int64_t i = 0; i < seqlen_q; ++i) {
    const float scale = options.softmax_scale.value_or(1 / std::sqrt(static_cast<float>(dim)));
    const float factor = static_cast<float>(q8.scale[static_cast<size_t>(i)]) *
                         (scale * std::numbers::log2e_v<float>);
    float m = -std::numeric_limits<float>::infinity(), l = 0;
    std::vector<float> sum(static_cast<size_t>(dim));
    for (int64_t begin = 0; begin < last_key; begin += kv_block) {
      if (fault == Fault::kMissingBlock && begin == kv_block) continue;
      const int64_t end = std::min(begin + kv_block, last_key);
      std::vector<float> t, r;
      for (int64_t j = begin; j < end; ++j) {
        int32_t a = 0;
        for (int64_t d = 0; d < dim; ++d) {
          a += static_cast<int32_t>(q8.codes.token(i)[d] * k8.codes.token(j)[d]);
        }
        const auto n = static_cast<size_t>(j);
        r.push_back(fold ? static_cast<float>(v8.scale[n]) / v_ref : 1.0F);
        t.push_back(static_cast<float>(a) * static_cast<float>(k8.scale[n]) * factor +
                    std::log2(r.back()));
      }
      const float block_max = *std::max_element(t.begin(), t.end());
      const float m_new = std::max(m, block_max);
      const float reference = local ? block_max : m_new;
      float block_l = 0, residual = 0;
      std::vector<float> block_sum(static_cast<size_t>(dim)), block_mean(static_cast<size_t>(dim));
      for (int64_t j = begin; j < end; ++j) {
        const auto n = static_cast<size_t>(j - begin);
        const float w = range * kernel.exp2(t[n] - reference);
        const float code = half                        ? to_bfloat16(w)
                           : fault == Fault::kTruncate ? std::floor(w)
                                                       : std::nearbyint(w);
        const bool sums_code = paper != (fault == Fault::kOtherNormalizer);
        block_l += (sums_code ? code : w) * (1 / r[n]);
        residual += w - code;
        for (int64_t d = 0; d < dim; ++d) {
          block_sum[static_cast<size_t>(d)] += code * v8.codes.token(j)[d];
          block_mean[static_cast<size_t>(d)] += v8.codes.token(j)[d];
        }
      }
      if (options.residual_mean && fault != Fault::kNoResidual) {
        for (size_t d = 0; d < block_sum.size(); ++d) {
          block_sum[d] += residual * (block_mean[d] / static_cast<float>(end - begin));
        }
      }
      const float a = kernel.exp2(m - m_new), b = local ? kernel.exp2(block_max - m_new) : 1.0F;
      l = a * l + b * block_l;
      for (int64_t d = 0; d < dim; ++d) {
        const auto n = static_cast<size_t>(d);
        const float v_scale =
            fold || half
                ? 1.0F
                : static_cast<float>(v8.scale[static_cast<size_t>(group_of(spec, dim, begin, d))]);
        sum[n] = a * sum[n] + b * v_scale * block_sum[n];
      }
      m = m_new;
    }
    for (int64_t d = 0; d < dim; ++d) {
      out[static_cast<size_t>(i * dim + d)] = sum[static_cast<size_t>(d)] / l * v_ref;
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
  for (const float softmax_scale : {0.18F, 1.5F}) {
    for (const int32_t kv_block : {64, 512}) {
      const auto add = [&](const std::string& name, const AttentionOptions& options) {
        Case one = {
            name + " scale " + std::to_string(softmax_scale) + " block " + std::to_string(kv_block),
            emulation_options(options), random_tensor({1, seqlen_q, 1, dim}, 1),
            random_tensor({1, seqlen_k, 1, dim}, 2), random_tensor({1, seqlen_k, 1, dim}, 3)};
        one.options.softmax_scale = softmax_scale;
        one.options.kv_block = kv_block;
        one.options.score_grid = false;
        // Uneven V: the fold and the block scales have something to do.
        for (int64_t j = 0; j < seqlen_k; ++j) {
          const float factor = std::exp2(static_cast<float>(j % 23) / 3 - 6);
          for (int64_t d = 0; d < dim; ++d) one.v.at(0, j, 0, d) *= factor;
        }
        list.push_back(std::move(one));
      };
      add("token", {.mode = Mode::kAccurate});
      add("tensor", {.mode = Mode::kAccurate, .v_granularity = Granularity::kTensor});
      add("channel", {.mode = Mode::kAccurate, .v_granularity = Granularity::kChannel});
      add("block", {.mode = Mode::kAccurate, .v_granularity = Granularity::kBlock});
      add("block_channel", {.mode = Mode::kAccurate, .v_granularity = Granularity::kBlockChannel});
      add("paper", {.mode = Mode::kPaper});
      add("half", {.mode = Mode::kHalf});
    }
  }
  return list;
}

// Largest |kernel - emulation| / bound.
double worst(const Case& one, const Output& wanted, const Kernel& kernel) {
  const std::vector<float> got = run_kernel(kernel, one.q, one.k, one.v);
  double ratio = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    ratio = std::max(ratio, std::abs(got[i] - wanted.out[i]) / wanted.bound[i]);
  }
  return ratio;
}

TEST(EmulationBound, HoldsForKernelsInFloat32) {
  for (const Case& one : cases()) {
    const Output wanted = run_emulation(one.q, one.k, one.v, one.options);
    ASSERT_TRUE(wanted.status.ok()) << wanted.status.message();
    // 2.7e-6: what a polynomial of degree 4 reaches.
    for (const float exp2_error : {0.0F, 2.7e-6F, -2.7e-6F}) {
      for (const bool alternate : {false, true}) {
        const Kernel kernel = {one.options, Fault::kNone, exp2_error, alternate};
        EXPECT_LE(worst(one, wanted, kernel), 1.0) << one.name << " exp2 error " << exp2_error;
      }
    }
  }
}

// One key far above the others whose V is zero: all that is left are weights of 2^-126, which a
// kernel may have where the emulation has 0.
TEST(EmulationBound, HoldsWhereWeightsVanish) {
  for (Case& one : cases()) {
    for (int64_t d = 0; d < one.q.shape[3]; ++d) {
      for (int64_t i = 0; i < one.q.shape[1]; ++i) one.q.at(0, i, 0, d) = 1;
      one.k.at(0, 500, 0, d) = 1e6F;
      one.v.at(0, 500, 0, d) = 0;
    }
    // The kernel of this test knows no rule for V tokens of zeros.
    if (one.options.mode == Mode::kAccurate && one.options.v_granularity == Granularity::kToken) {
      continue;
    }
    const Output wanted = run_emulation(one.q, one.k, one.v, one.options);
    EXPECT_LE(worst(one, wanted, {one.options}), 1.0) << one.name;
    EXPECT_LT(wanted.bound[0], 1e-30) << one.name;
  }
}

// A bound that would let these through would be of no use.
TEST(EmulationBound, BreaksForFaultyKernels) {
  for (const Case& one : cases()) {
    const Output wanted = run_emulation(one.q, one.k, one.v, one.options);
    const bool half = one.options.mode == Mode::kHalf;
    for (const Fault fault :
         {Fault::kTruncate, Fault::kRange, Fault::kMissingBlock, Fault::kMissingKey,
          Fault::kOtherMaximum, Fault::kNoResidual, Fault::kOtherNormalizer}) {
      // In half, P has no range of codes, and where it is rounded hardly shows.
      if (half && fault != Fault::kMissingBlock && fault != Fault::kMissingKey) continue;
      if (fault == Fault::kNoResidual && !one.options.residual_mean) continue;
      // With a scale of 1.5 the last key may weigh nothing.
      if (fault == Fault::kMissingKey && *one.options.softmax_scale > 1) continue;
      EXPECT_GT(worst(one, wanted, {one.options, fault}), 2.0)
          << one.name << " fault " << static_cast<int>(fault);
    }
  }
}

// The bound is small beside what quantization itself costs, or it would say nothing.
TEST(EmulationBound, IsTightBesideTheErrorOfTheMode) {
  for (const Case& one : cases()) {
    const Output wanted = run_emulation(one.q, one.k, one.v, one.options);
    const Output exact = run_exact(one.q, one.k, one.v, {}, one.options.softmax_scale);
    double bound2 = 0, error2 = 0;
    for (size_t i = 0; i < wanted.out.size(); ++i) {
      bound2 += wanted.bound[i] * wanted.bound[i];
      error2 += (wanted.out[i] - exact.out[i]) * (wanted.out[i] - exact.out[i]);
    }
    EXPECT_LT(std::sqrt(bound2), 0.2 * std::sqrt(error2)) << one.name;
    RecordProperty(one.name, std::to_string(std::sqrt(bound2 / error2)));
  }
}

}  // namespace
}  // namespace attn8::reference::testing
