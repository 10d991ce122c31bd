// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <tuple>
#include <vector>

#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr Mode kKernelModes[] = {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact};
constexpr Granularity kGranularities[] = {Granularity::kToken, Granularity::kTensor,
                                          Granularity::kChannel, Granularity::kBlock,
                                          Granularity::kBlockChannel};

class Attend : public EachIsa {};

TEST_P(Attend, OddLengths) {
  for (const Mode mode : kKernelModes) {
    for (const int64_t seqlen_k : {1, 2, 3, 31, 33, 63, 64, 65, 127, 128, 129, 501, 511, 513}) {
      for (const int64_t seqlen_q : {int64_t{1}, int64_t{5}, int64_t{67}}) {
        KernelCase c;
        c.options.mode = mode;
        c.seqlen_q = seqlen_q;
        c.seqlen_k = seqlen_k;
        c.head_dim = 64;
        check_kernel(c, GetParam());
      }
    }
  }
}

TEST_P(Attend, EveryHeadDim) {
  for (const Mode mode : kKernelModes) {
    for (int64_t head_dim = 1; head_dim <= 256;
         head_dim += head_dim < 20 || head_dim > 250 ? 1 : 13) {
      KernelCase c;
      c.options.mode = mode;
      c.seqlen_q = 6;
      c.seqlen_k = 97;
      c.head_dim = head_dim;
      check_kernel(c, GetParam());
    }
  }
}

TEST_P(Attend, Masks) {
  for (const Mode mode : kKernelModes) {
    for (const CausalAlign align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
      for (const auto& [seqlen_q, seqlen_k] :
           {std::pair<int64_t, int64_t>{130, 130}, {40, 200}, {200, 40}, {1, 300}, {9, 0}}) {
        for (const auto& [causal, left, right] : {std::tuple<bool, int64_t, int64_t>{true, -1, -1},
                                                  {false, 5, 5},
                                                  {true, 70, -1},
                                                  {false, 0, 0},
                                                  {false, -1, 3},
                                                  {false, 129, -1},
                                                  {true, 100000, 100000}}) {
          KernelCase c;
          c.options.mode = mode;
          c.options.mask = {
              .causal = causal, .align = align, .window_left = left, .window_right = right};
          c.options.kv_block = 64;
          c.seqlen_q = seqlen_q;
          c.seqlen_k = seqlen_k;
          c.head_dim = 32;
          check_kernel(c, GetParam());
        }
      }
    }
  }
}

TEST_P(Attend, VGranularitiesAndKvBlocks) {
  for (const Granularity granularity : kGranularities) {
    for (const int32_t kv_block : {64, 192, 512}) {
      for (const Data data : {Data::kNormal, Data::kOutliers, Data::kSink}) {
        KernelCase c;
        c.options.v_granularity = granularity;
        c.options.kv_block = kv_block;
        c.options.mask.causal = true;
        c.data = data;
        c.seqlen_q = 70;
        c.seqlen_k = 600;
        c.head_dim = 80;
        check_kernel(c, GetParam());
      }
    }
  }
}

TEST_P(Attend, DataThatBreaksSoftmax) {
  for (const Mode mode : kKernelModes) {
    for (const Data data :
         {Data::kZeros, Data::kOneHot, Data::kOutliers, Data::kHuge, Data::kEqual, Data::kSink}) {
      if (mode == Mode::kExact && data == Data::kHuge) continue;  // float32 dot products overflow
      KernelCase c;
      c.options.mode = mode;
      c.data = data;
      c.seqlen_q = 33;
      c.seqlen_k = 700;
      c.head_dim = 64;
      check_kernel(c, GetParam());
    }
  }
}

TEST_P(Attend, GroupedAndMultiQueryHeads) {
  for (const Mode mode : kKernelModes) {
    for (const auto& [nheads_q, nheads_k] : {std::pair<int64_t, int64_t>{8, 2}, {4, 1}, {3, 3}}) {
      KernelCase c;
      c.options.mode = mode;
      c.options.mask.causal = true;
      c.batch = 2;
      c.nheads_q = nheads_q;
      c.nheads_k = nheads_k;
      c.seqlen_q = 19;
      c.seqlen_k = 150;
      c.head_dim = 48;
      check_kernel(c, GetParam());
    }
  }
}

/// Few queries against many keys run in parts of the keys; threads do not change the bits.
TEST_P(Attend, PartsOfTheKeys) {
  for (const Mode mode : {Mode::kAccurate, Mode::kExact}) {
    for (const auto& [seqlen_q, window] :
         {std::pair<int64_t, int64_t>{1, -1}, {5, -1}, {3, 9000}}) {
      KernelCase c;
      c.options.mode = mode;
      c.options.mask.causal = true;
      c.options.mask.window_left = window;
      c.nheads_q = 2;
      c.nheads_k = 1;
      c.seqlen_q = seqlen_q;
      c.seqlen_k = 25000 + seqlen_q;
      c.head_dim = 16;
      const KernelInputs inputs = make_inputs(c);
      const KernelResult one = run_kernel(c, inputs.operands(), GetParam());
      expect_matches_oracle(c, inputs.operands(), one, GetParam());
      c.threads = 3;
      const KernelResult three = run_kernel(c, inputs.operands(), GetParam());
      EXPECT_EQ(one.out.bytes(), three.out.bytes());
      EXPECT_EQ(one.lse.bytes(), three.lse.bytes());
    }
  }
}

/// Scores that grow by hundreds of octaves over the keys: references move, again and again, on the
/// 16-bit path of AVX-512 (a total of 300 octaves) and beyond it (3000).
TEST_P(Attend, ReferencesMove) {
  for (const double octaves : {300.0, 3000.0}) {
    for (const bool causal : {false, true}) {
      KernelCase c;
      c.options.mask.causal = causal;
      c.options.kv_block = 64;
      c.options.smooth_k = false;
      c.options.softmax_scale = 1.0f;
      c.seqlen_q = 66;
      c.seqlen_k = 700;
      c.head_dim = 80;
      KernelInputs inputs = make_inputs(c);
      inputs.q.fill([](int64_t, int64_t i, int64_t, int64_t d) {
        return d == 0 ? 1.0 : 1e-3 * normal_at(7, static_cast<uint64_t>(i * 80 + d));
      });
      inputs.k.fill([&](int64_t, int64_t j, int64_t, int64_t d) {
        return d == 0 ? octaves * std::numbers::ln2 * static_cast<double>(j) / 700
                      : normal_at(8, static_cast<uint64_t>(j * 80 + d));
      });
      const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
      expect_matches_oracle(c, inputs.operands(), result, GetParam());
    }
  }
}

/// V scales over 2^-24 .. 1 within a block: both halves of the weights of the denominator, and
/// tokens below 2^-16 of the largest, whose codes are taken again.
TEST_P(Attend, UnevenValues) {
  for (const int64_t head_dim : {32, 64, 128, 176}) {
    KernelCase c;
    c.options.mask.causal = true;
    c.seqlen_q = 70;
    c.seqlen_k = 600;
    c.head_dim = head_dim;
    KernelInputs inputs = make_inputs(c);
    inputs.v.fill([&](int64_t, int64_t j, int64_t, int64_t d) {
      return std::ldexp(normal_at(9, static_cast<uint64_t>(j * 256 + d)),
                        -static_cast<int>(j * 7 % 25));
    });
    const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
    expect_matches_oracle(c, inputs.operands(), result, GetParam());
  }
}

/// Keys whose V is zero keep their weight in the softmax: text that is padded with zeros has many
/// of them, an attention sink may be one.
TEST_P(Attend, KeysWithoutValues) {
  for (const int64_t last : {1, 12, 150, 299}) {  // keys from there on have no V
    for (const bool padding : {false, true}) {
      KernelCase c;
      c.seqlen_q = 40;
      c.seqlen_k = 300;
      c.head_dim = 64;
      KernelInputs inputs = make_inputs(c);
      for (int64_t j = last; j < c.seqlen_k; ++j) {
        for (int64_t d = 0; d < c.head_dim; ++d) {
          inputs.v.set(0, j, 0, d, 0);
          if (padding) inputs.k.set(0, j, 0, d, 0);
        }
      }
      const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
      expect_matches_oracle(c, inputs.operands(), result, GetParam());
      std::vector<double> out(static_cast<size_t>(c.seqlen_q * c.head_dim));
      std::vector<double> lse(static_cast<size_t>(c.seqlen_q));
      const Status status = reference::exact_attention(inputs.q.view(), inputs.k.view(),
                                                       inputs.v.view(), std::nullopt, {}, out, lse);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_LT(reference::error_report(result.out.values(), out).rel_l2, 0.03)
          << "from " << last << " padding " << padding;
    }
  }
}

TEST_P(Attend, MemoryLayoutsAndTypes) {
  for (const Mode mode : kKernelModes) {
    for (const Memory memory : {Memory::kBhsd, Memory::kStrided, Memory::kReversed}) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        if (mode == Mode::kExact && dtype != DType::kFloat32) continue;  // see ExactOfNarrowTypes
        KernelCase c;
        c.options.mode = mode;
        c.memory = memory;
        c.dtype = dtype;
        c.out_dtype = dtype;
        c.batch = 2;
        c.nheads_q = 2;
        c.nheads_k = 1;
        c.seqlen_q = 13;
        c.seqlen_k = 77;
        c.head_dim = 40;
        check_kernel(c, GetParam());
      }
    }
  }
}

/// Narrow inputs widen exactly: the same bits as from the widened tensors. Only where the CPU
/// multiplies pairs of bfloat16 is P rounded to it, which the kernel's name says.
TEST_P(Attend, ExactOfNarrowTypes) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    KernelCase c;
    c.options.mode = Mode::kExact;
    c.dtype = dtype;
    c.seqlen_q = 9;
    c.seqlen_k = 100;
    c.head_dim = 64;
    const KernelInputs narrow = make_inputs(c);
    KernelInputs wide = narrow;
    for (auto [from, to] : {std::pair<const Tensor*, Tensor*>{&narrow.q, &wide.q},
                            {&narrow.k, &wide.k},
                            {&narrow.v, &wide.v}}) {
      *to = Tensor(DType::kFloat32, from->shape());
      to->fill([&](int64_t b, int64_t s, int64_t h, int64_t d) { return from->get(b, s, h, d); });
    }
    const KernelResult a = run_kernel(c, narrow.operands(), GetParam());
    const KernelResult b = run_kernel(c, wide.operands(), GetParam());
    if (a.kernel.find("_bfloat16_") == std::string::npos) {
      EXPECT_EQ(a.out.bytes(), b.out.bytes());
      EXPECT_EQ(a.lse.bytes(), b.lse.bytes());
      continue;
    }
    EXPECT_EQ(dtype, DType::kBFloat16);
    EXPECT_NE(a.out.bytes(), b.out.bytes());
    double largest_v = 0;
    for (const double v : narrow.v.values()) largest_v = std::max(largest_v, std::fabs(v));
    const std::vector<double> got = a.out.values();
    const std::vector<double> wanted = b.out.values();
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], wanted[i], 0x1p-8 * largest_v) << i;  // half a unit of bfloat16
    }
    const std::vector<double> got_lse = a.lse.values();
    const std::vector<double> wanted_lse = b.lse.values();
    for (size_t i = 0; i < got_lse.size(); ++i) ASSERT_NEAR(got_lse[i], wanted_lse[i], 1e-5) << i;
  }
}

/// `exact` of bfloat16 against float64, over lengths, masks and head_dims that leave half pairs.
TEST_P(Attend, ExactOfBfloat16) {
  for (const int64_t head_dim : {1, 15, 40, 64, 129}) {
    for (const int64_t seqlen_k : {1, 63, 64, 65, 200}) {
      for (const bool causal : {false, true}) {
        KernelCase c;
        c.options.mode = Mode::kExact;
        c.options.mask.causal = causal;
        if (seqlen_k == 200) c.options.mask.window_left = 70;  // a range that starts amid a pair
        c.dtype = DType::kBFloat16;
        c.nheads_q = 2;
        c.seqlen_q = 7;
        c.seqlen_k = seqlen_k;
        c.head_dim = head_dim;
        const KernelInputs inputs = make_inputs(c);
        const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
        const auto rows = static_cast<size_t>(c.seqlen_q * c.nheads_q);
        std::vector<double> out(rows * static_cast<size_t>(head_dim));
        std::vector<double> lse(rows);
        const Status status =
            reference::exact_attention(inputs.q.view(), inputs.k.view(), inputs.v.view(),
                                       c.options.softmax_scale, c.options.mask, out, lse);
        ASSERT_TRUE(status.ok()) << status.message();
        double largest_v = 0;
        for (const double v : inputs.v.values()) largest_v = std::max(largest_v, std::fabs(v));
        const std::vector<double> got = result.out.values();
        for (size_t i = 0; i < out.size(); ++i) {
          ASSERT_NEAR(got[i], out[i], (0x1p-8 + 1e-5) * largest_v) << c.name() << " " << i;
        }
        const std::vector<double> got_lse = result.lse.values();
        for (size_t i = 0; i < rows; ++i) {
          if (std::isinf(lse[i])) {
            ASSERT_EQ(got_lse[i], lse[i]) << c.name() << " " << i;
          } else {
            ASSERT_NEAR(got_lse[i], lse[i], 1e-4) << c.name() << " " << i;
          }
        }
      }
    }
  }
}

/// Factors of a score that would overflow alone saturate: 0 times one of them is 0, not NaN.
TEST_P(Attend, ScoresThatWouldOverflowStayNumbers) {
  for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf}) {
    for (const auto& [softmax_scale, q_size, k_size] :
         {std::tuple<float, double, double>{0.0f, 1, 3e38},
          {200.0f, 3e38, 1},
          {1.0f, 3e38, 3e38}}) {
      KernelCase c;
      c.options.mode = mode;
      c.options.softmax_scale = softmax_scale;
      c.options.smooth_k = false;
      c.seqlen_q = 5;
      c.seqlen_k = 70;
      c.head_dim = 16;
      KernelInputs inputs = make_inputs(c);
      inputs.q.fill([&](int64_t, int64_t s, int64_t, int64_t) { return q_size / (1.0 + s); });
      inputs.k.fill([&](int64_t, int64_t s, int64_t, int64_t d) {
        return s % 5 == 0 ? 0.0 : (d % 2 == 0 ? k_size : -k_size / 2);
      });
      const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
      for (const double value : result.out.values()) {
        ASSERT_TRUE(std::isfinite(value)) << c.name() << " scale " << softmax_scale;
      }
      expect_matches_oracle(c, inputs.operands(), result, GetParam());
    }
  }
}

TEST_P(Attend, WritesOnlyTheOutput) {
  KernelCase c;
  c.memory = Memory::kStrided;
  c.seqlen_q = 11;
  c.seqlen_k = 65;
  c.head_dim = 24;
  const KernelInputs inputs = make_inputs(c);
  const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
  Tensor erased = result.out;
  erased.fill([](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
  Tensor untouched(c.out_dtype, result.out.shape(), c.memory);
  untouched.fill([](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
  EXPECT_EQ(erased.bytes(), untouched.bytes());
}

ATTN8_INSTANTIATE_EACH_ISA(Attend);

}  // namespace
}  // namespace attn8::testing
