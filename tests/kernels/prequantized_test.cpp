// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "support/kernel_case.hpp"

// Operands that arrive quantized. quantize() follows the rules the call follows for float operands,
// so where both take their scales over the same keys the results agree bit for bit.

namespace attn8::testing {
namespace {

constexpr Granularity kGranularities[] = {Granularity::kToken, Granularity::kTensor,
                                          Granularity::kChannel, Granularity::kBlock,
                                          Granularity::kBlockChannel};

struct QuantizedTensor {
  Tensor codes, scale, mean;
  QuantSpec spec;
  bool with_mean = false;

  [[nodiscard]] QuantizedView view() const {
    QuantizedView view{codes.view(), scale.view(), spec};
    if (with_mean) view.mean = mean.view();
    return view;
  }
};

QuantizedTensor quantized(const Tensor& x, const QuantSpec& spec, bool subtract_mean,
                          Memory memory) {
  const Extents& s = x.shape();
  QuantizedTensor q{Tensor(DType::kInt8, s, memory),
                    Tensor(DType::kFloat32, scale_shape(s, spec), memory),
                    Tensor(DType::kFloat32, {s[0], 1, s[2], s[3]}, memory), spec, subtract_mean};
  std::optional<TensorView> mean;
  if (subtract_mean) mean = q.mean.view();
  const Status status = quantize(x.view(), spec, q.codes.view(), q.scale.view(), Context(),
                                 subtract_mean ? Mean::kCompute : Mean::kNone, mean);
  EXPECT_TRUE(status.ok()) << status.message();
  return q;
}

KernelCase base_case(Mode mode) {
  KernelCase c;
  c.options.mode = mode;
  c.batch = 2;
  c.nheads_q = 4;
  c.nheads_k = 2;
  c.seqlen_q = 37;
  c.seqlen_k = 211;
  c.head_dim = 40;
  c.data = Data::kOutliers;
  return c;
}

class Prequantized : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(Prequantized);

/// Any subset of the operands quantized beforehand gives the bits of float operands.
TEST_P(Prequantized, EqualsFloatOperands) {
  for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf}) {
    for (const Memory memory : {Memory::kBshd, Memory::kStrided, Memory::kReversed}) {
      KernelCase c = base_case(mode);
      c.memory = memory;
      const KernelInputs inputs = make_inputs(c);
      const KernelResult wanted = run_kernel(c, inputs.operands(), GetParam());
      const QuantizedTensor q = quantized(inputs.q, {}, false, memory);
      const QuantizedTensor k = quantized(inputs.k, {}, mode != Mode::kPaper, memory);
      const Granularity v_granularity =
          mode == Mode::kPaper ? Granularity::kTensor : Granularity::kToken;
      const QuantizedTensor v = quantized(inputs.v, {v_granularity, 0}, false, memory);
      for (int subset = 1; subset < 8; ++subset) {
        if (mode == Mode::kHalf && (subset & 4) != 0) continue;  // takes V as float only
        AttentionInputs operands = inputs.operands();
        if ((subset & 1) != 0) operands.q = q.view();
        if ((subset & 2) != 0) operands.k = k.view();
        if ((subset & 4) != 0) operands.v = v.view();
        const KernelResult got = run_kernel(c, operands, GetParam());
        ASSERT_EQ(got.out.bytes(), wanted.out.bytes()) << "subset " << subset << " " << c.name();
        if ((subset & 1) == 0 || mode == Mode::kPaper) {
          ASSERT_EQ(got.lse.bytes(), wanted.lse.bytes()) << "subset " << subset << " " << c.name();
        }
      }
    }
  }
}

TEST_P(Prequantized, EveryVGranularity) {
  for (const Granularity granularity : kGranularities) {
    for (const int32_t kv_block : {64, 128, 192}) {
      KernelCase c = base_case(Mode::kAccurate);
      c.options.v_granularity = granularity;
      c.options.kv_block = kv_block;
      const KernelInputs inputs = make_inputs(c);
      const KernelResult wanted = run_kernel(c, inputs.operands(), GetParam());
      const QuantizedTensor v =
          quantized(inputs.v, {granularity, kv_block}, false, Memory::kStrided);
      // The option tells how to quantize float V; codes bring their own.
      c.options.v_granularity = Granularity::kToken;
      const KernelResult got =
          run_kernel(c, {inputs.q.view(), inputs.k.view(), v.view()}, GetParam());
      ASSERT_EQ(got.out.bytes(), wanted.out.bytes()) << c.name();
      ASSERT_EQ(got.lse.bytes(), wanted.lse.bytes()) << c.name();
    }
  }
}

/// Masks, every V granularity, quantized Q and K with a mean: against the emulation.
TEST_P(Prequantized, MatchesTheOracle) {
  for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf}) {
    for (const Granularity granularity : kGranularities) {
      if (mode == Mode::kPaper && granularity != Granularity::kTensor) continue;
      for (const int64_t window : {-1, 70}) {
        KernelCase c = base_case(mode);
        c.options.mask.causal = true;
        c.options.mask.window_left = window;
        c.options.kv_block = 64;
        const KernelInputs inputs = make_inputs(c);
        const QuantizedTensor q = quantized(inputs.q, {}, false, Memory::kBshd);
        const QuantizedTensor k = quantized(inputs.k, {}, true, Memory::kBhsd);
        const QuantizedTensor v = quantized(inputs.v, {granularity, 64}, false, Memory::kStrided);
        AttentionInputs operands = {q.view(), k.view(), v.view()};
        if (mode == Mode::kHalf) operands.v = inputs.v.view();
        expect_matches_oracle(c, operands, run_kernel(c, operands, GetParam()), GetParam());
      }
    }
  }
}

/// K minus its mean gives the output without it, and the LSE once q.mean is added.
TEST_P(Prequantized, MeanOfKReachesOnlyTheLse) {
  KernelCase c = base_case(Mode::kAccurate);
  const KernelInputs inputs = make_inputs(c);
  QuantizedTensor k = quantized(inputs.k, {}, true, Memory::kBshd);
  k.mean.fill_normal(99, 3);  // any mean: nothing else depends on it
  const QuantizedTensor q = quantized(inputs.q, {}, false, Memory::kBshd);
  QuantizedTensor without = k;
  without.with_mean = false;
  for (const bool quantized_q : {false, true}) {
    AttentionInputs a = {inputs.q.view(), k.view(), inputs.v.view()};
    AttentionInputs b = {inputs.q.view(), without.view(), inputs.v.view()};
    if (quantized_q) a.q = b.q = q.view();
    const KernelResult with_mean = run_kernel(c, a, GetParam());
    const KernelResult plain = run_kernel(c, b, GetParam());
    EXPECT_EQ(with_mean.out.bytes(), plain.out.bytes());
    for (int64_t batch = 0; batch < c.batch; ++batch) {
      for (int64_t s = 0; s < c.seqlen_q; ++s) {
        for (int64_t h = 0; h < c.nheads_q; ++h) {
          double score = 0;
          double magnitude = std::fabs(plain.lse.get(batch, s, h, 0));
          for (int64_t d = 0; d < c.head_dim; ++d) {
            const double x = quantized_q ? q.codes.get(batch, s, h, d) * q.scale.get(batch, s, h, 0)
                                         : inputs.q.get(batch, s, h, d);
            const double term =
                x * k.mean.get(batch, 0, h / 2, d) / std::sqrt(static_cast<double>(c.head_dim));
            score += term;
            magnitude += std::fabs(term);
          }
          ASSERT_NEAR(with_mean.lse.get(batch, s, h, 0), plain.lse.get(batch, s, h, 0) + score,
                      magnitude * 0x1p-22)
              << "quantized q " << quantized_q;
        }
      }
    }
  }
}

constexpr double kBadScales[] = {std::numeric_limits<double>::quiet_NaN(), 0.0, -0.5,
                                 std::numeric_limits<double>::infinity()};

/// A token whose scale is no positive number makes the rows that read it NaN, and no other bit
/// changes. Three query heads per kv head, so that passes of four rows mix positions.
TEST_P(Prequantized, BadTokenScalesPoisonWhatReadsThem) {
  for (const Mode mode : {Mode::kAccurate, Mode::kHalf}) {
    for (const char operand : {'q', 'k', 'v'}) {
      if (operand == 'v' && mode == Mode::kHalf) continue;
      for (const double bad : kBadScales) {
        KernelCase c = base_case(mode);
        c.options.mask.causal = true;
        c.seqlen_q = c.seqlen_k = 150;
        c.nheads_q = 6;
        c.data = Data::kNormal;
        const KernelInputs inputs = make_inputs(c);
        QuantizedTensor q = quantized(inputs.q, {}, false, Memory::kBshd);
        QuantizedTensor k = quantized(inputs.k, {}, true, Memory::kBshd);
        QuantizedTensor v = quantized(inputs.v, {}, false, Memory::kBshd);
        const bool float_v = mode == Mode::kHalf;
        const auto run = [&] {
          AttentionInputs operands = {q.view(), k.view(), v.view()};
          if (float_v) operands.v = inputs.v.view();
          return run_kernel(c, operands, GetParam());
        };
        const KernelResult clean = run();
        const int64_t at = 70;
        const int64_t head = operand == 'q' ? 4 : 1;
        QuantizedTensor& target = operand == 'q' ? q : operand == 'k' ? k : v;
        // The smallest scale of V, so that the reference of the others stays.
        if (operand == 'v') {
          target.scale.set(1, at, head, 0, 1e-6);
        }
        const KernelResult before = operand == 'v' ? run() : clean;
        target.scale.set(1, at, head, 0, bad);
        const KernelResult got = run();
        for (int64_t b = 0; b < c.batch; ++b) {
          for (int64_t s = 0; s < c.seqlen_q; ++s) {
            for (int64_t h = 0; h < c.nheads_q; ++h) {
              const bool poisoned =
                  b == 1 && (operand == 'q' ? s == at && h == head : h / 3 == head && s >= at);
              ASSERT_EQ(std::isnan(got.lse.get(b, s, h, 0)), poisoned)
                  << operand << " scale " << bad << " row " << s << " head " << h;
              for (int64_t d = 0; d < c.head_dim; ++d) {
                ASSERT_EQ(std::isnan(got.out.get(b, s, h, d)), poisoned)
                    << operand << " scale " << bad << " row " << s << " head " << h << " dim " << d;
                if (!poisoned) {
                  ASSERT_EQ(got.out.get(b, s, h, d), before.out.get(b, s, h, d))
                      << operand << " scale " << bad << " row " << s << " head " << h;
                }
              }
            }
          }
        }
      }
    }
  }
}

/// The same for the groups of V: a block poisons the rows that read the block, a channel only
/// itself.
TEST_P(Prequantized, BadGroupScalesPoisonWhatReadsThem) {
  for (const Granularity granularity : kGranularities) {
    if (granularity == Granularity::kToken) continue;
    for (const double bad : kBadScales) {
      KernelCase c = base_case(Mode::kAccurate);
      c.options.mask.causal = true;
      c.options.kv_block = 64;
      c.seqlen_q = c.seqlen_k = 150;
      c.nheads_q = 6;
      c.data = Data::kNormal;
      const KernelInputs inputs = make_inputs(c);
      const bool blocks =
          granularity == Granularity::kBlock || granularity == Granularity::kBlockChannel;
      const bool channels =
          granularity == Granularity::kChannel || granularity == Granularity::kBlockChannel;
      const int64_t group = blocks ? 1 : 0;
      const int64_t channel = channels ? 5 : 0;
      QuantizedTensor v = quantized(inputs.v, {granularity, 64}, false, Memory::kBshd);
      // The smallest of its head, so that the reference of the others stays.
      v.scale.set(1, group, 1, channel, 1e-6);
      const AttentionInputs operands = {inputs.q.view(), inputs.k.view(), v.view()};
      const KernelResult before = run_kernel(c, operands, GetParam());
      v.scale.set(1, group, 1, channel, bad);
      const KernelResult got = run_kernel(c, operands, GetParam());
      EXPECT_EQ(got.lse.bytes(), before.lse.bytes()) << to_string(granularity) << " " << bad;
      for (int64_t b = 0; b < c.batch; ++b) {
        for (int64_t s = 0; s < c.seqlen_q; ++s) {
          for (int64_t h = 0; h < c.nheads_q; ++h) {
            for (int64_t d = 0; d < c.head_dim; ++d) {
              const bool poisoned =
                  b == 1 && h / 3 == 1 && s >= group * 64 && (!channels || d == channel);
              ASSERT_EQ(std::isnan(got.out.get(b, s, h, d)), poisoned)
                  << to_string(granularity) << " scale " << bad << " row " << s << " head " << h
                  << " dim " << d << " got " << got.out.get(b, s, h, d);
              if (!poisoned) {
                ASSERT_EQ(got.out.get(b, s, h, d), before.out.get(b, s, h, d))
                    << to_string(granularity) << " scale " << bad << " row " << s;
              }
            }
          }
        }
      }
    }
  }
}

/// Groups of V that no query reads change nothing, whatever their scales hold.
TEST_P(Prequantized, InvisibleGroupsChangeNothing) {
  for (const Granularity granularity :
       {Granularity::kToken, Granularity::kBlock, Granularity::kBlockChannel}) {
    KernelCase c = base_case(Mode::kAccurate);
    c.options.kv_block = 64;
    c.options.mask.align = CausalAlign::kTopLeft;
    c.options.mask.causal = true;  // 37 rows: only the first block is read
    c.data = Data::kNormal;
    const KernelInputs inputs = make_inputs(c);
    QuantizedTensor v = quantized(inputs.v, {granularity, 64}, false, Memory::kBshd);
    const AttentionInputs operands = {inputs.q.view(), inputs.k.view(), v.view()};
    const KernelResult before = run_kernel(c, operands, GetParam());
    for (const double scale : {1e30, 1e-30, kBadScales[0], kBadScales[2], kBadScales[3]}) {
      for (int64_t s = granularity == Granularity::kToken ? 64 : 1; s < v.scale.shape()[1]; ++s) {
        v.scale.set(0, s, 0, 0, scale);
      }
      const KernelResult got = run_kernel(c, operands, GetParam());
      EXPECT_EQ(got.out.bytes(), before.out.bytes()) << to_string(granularity) << " " << scale;
      EXPECT_EQ(got.lse.bytes(), before.lse.bytes()) << to_string(granularity) << " " << scale;
    }
  }
}

/// Scales of V by a power of two scale the output by it far down in the range too: to the bit, or
/// to the last one where the output is subnormal.
TEST_P(Prequantized, SmallVKeepsItsPrecision) {
  for (const Granularity granularity : kGranularities) {
    for (const int64_t head_dim : {40, 48}) {  // with padding and without
      KernelCase c = base_case(Mode::kAccurate);
      c.options.kv_block = 64;
      c.head_dim = head_dim;
      const KernelInputs inputs = make_inputs(c);
      QuantizedTensor v = quantized(inputs.v, {granularity, 64}, false, Memory::kBshd);
      const AttentionInputs operands = {inputs.q.view(), inputs.k.view(), v.view()};
      Tensor wanted = run_kernel(c, operands, GetParam()).out;
      const Tensor scale = v.scale;
      v.scale.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        return scale.get(b, s, h, d) * 0x1p-100;
      });
      const Tensor got = run_kernel(c, operands, GetParam()).out;
      const Tensor large = wanted;
      wanted.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        return large.get(b, s, h, d) * 0x1p-100;
      });
      const std::vector<double> a = got.values();
      const std::vector<double> b = wanted.values();
      for (size_t i = 0; i < a.size(); ++i) {
        ASSERT_NEAR(a[i], b[i], 0x1p-149) << i << " " << to_string(granularity) << " " << c.name();
      }
    }
  }
}

}  // namespace
}  // namespace attn8::testing
