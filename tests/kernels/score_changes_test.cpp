// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Softcap, attn_mask, ALiBi, sinks, lengths, offsets and head_dim_v, in every mode and on every
// ISA.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr Mode kKernelModes[] = {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact};
constexpr MaskKind kMasks[] = {MaskKind::kNone, MaskKind::kBool, MaskKind::kBoolKeys,
                               MaskKind::kAdded, MaskKind::kAddedRows};

class ScoreChanges : public EachIsa {
 protected:
  /// Against the oracle, and in the integer modes against the portable kernel, bit by bit.
  static void check(const KernelCase& c) {
    const KernelInputs inputs = make_inputs(c);
    const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
    expect_matches_oracle(c, inputs.operands(), result, GetParam());
    if (c.options.mode != Mode::kAccurate && c.options.mode != Mode::kPaper) return;
    const KernelResult portable = run_kernel(c, inputs.operands(), Isa::kScalar);
    EXPECT_EQ(result.out.bytes(), portable.out.bytes()) << c.name();
    EXPECT_EQ(result.lse.bytes(), portable.lse.bytes()) << c.name();
  }
};

KernelCase small_case(Mode mode) {
  KernelCase c;
  c.options.mode = mode;
  c.options.kv_block = 64;
  c.nheads_q = 2;
  c.nheads_k = 1;
  c.seqlen_q = 21;
  c.seqlen_k = 150;
  c.head_dim = 32;
  return c;
}

TEST_P(ScoreChanges, OneAtATime) {
  for (const Mode mode : kKernelModes) {
    for (const float softcap : {0.5f, 30.0f}) {
      KernelCase c = small_case(mode);
      c.options.softcap = softcap;
      check(c);
    }
    for (const MaskKind mask : kMasks) {
      KernelCase c = small_case(mode);
      c.batch = 2;
      c.scores.attn_mask = mask;
      check(c);
    }
    KernelCase c = small_case(mode);
    c.batch = 2;
    c.scores.alibi_slopes = true;
    check(c);
    c.scores = {};
    c.scores.sinks = true;
    check(c);
  }
}

TEST_P(ScoreChanges, AllAtOnce) {
  for (const Mode mode : kKernelModes) {
    for (const MaskKind mask : kMasks) {
      for (const CausalAlign align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
        KernelCase c = small_case(mode);
        c.batch = 2;
        c.options.softcap = 3.0f;
        c.options.mask = {.causal = true, .align = align, .window_left = 90};
        c.scores = {.attn_mask = mask,
                    .alibi_slopes = true,
                    .sinks = true,
                    .seqlens_k = true,
                    .leftpad_k = true};
        c.head_dim_v = 48;
        check(c);
      }
    }
  }
}

TEST_P(ScoreChanges, MasksOfEveryTypeAndLayout) {
  for (const Mode mode : {Mode::kAccurate, Mode::kHalf}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const Memory memory : {Memory::kBhsd, Memory::kStrided, Memory::kReversed}) {
        for (const MaskKind mask : {MaskKind::kBool, MaskKind::kAdded}) {
          KernelCase c = small_case(mode);
          c.memory = memory;
          c.scores.attn_mask = mask;
          c.scores.mask_dtype = dtype;
          check(c);
        }
      }
    }
  }
}

TEST_P(ScoreChanges, EveryGranularity) {
  for (const Granularity granularity : {Granularity::kTensor, Granularity::kChannel,
                                        Granularity::kBlock, Granularity::kBlockChannel}) {
    KernelCase c = small_case(Mode::kAccurate);
    c.options.v_granularity = granularity;
    c.options.softcap = 2.0f;
    c.scores.attn_mask = MaskKind::kBool;
    c.scores.sinks = true;
    c.head_dim_v = 20;
    check(c);
  }
}

/// A mask of booleans that is a causal mask gives the bits of the causal mask.
TEST_P(ScoreChanges, BooleanCausalIsCausal) {
  for (const Mode mode : kKernelModes) {
    KernelCase c = small_case(mode);
    c.seqlen_q = 130;
    c.options.mask.causal = true;
    KernelInputs inputs = make_inputs(c);
    const KernelResult causal = run_kernel(c, inputs.operands(), GetParam());
    c.options.mask.causal = false;
    inputs.attn_mask.emplace(DType::kBool, Extents{1, c.seqlen_q, 1, c.seqlen_k});
    inputs.attn_mask->fill([&](int64_t, int64_t i, int64_t, int64_t j) {
      return j <= i + c.seqlen_k - c.seqlen_q ? 1.0 : 0.0;
    });
    const KernelResult masked = run_kernel(c, inputs.operands(), GetParam());
    EXPECT_EQ(causal.out.bytes(), masked.out.bytes()) << c.name();
    EXPECT_EQ(causal.lse.bytes(), masked.lse.bytes()) << c.name();
  }
}

/// A hidden key may hold anything; a NaN of the mask is its row's alone.
TEST_P(ScoreChanges, PoisonAndMasks) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  for (const Mode mode : kKernelModes) {
    KernelCase c = small_case(mode);
    c.options.smooth_k = false;
    c.scores.attn_mask = MaskKind::kAdded;
    KernelInputs inputs = make_inputs(c);
    for (int64_t i = 0; i < c.seqlen_q; ++i) {
      for (int64_t h = 0; h < c.nheads_q; ++h) {
        // Query 3 alone sees key 70.
        inputs.attn_mask->set(0, i, h, 70, i == 3 ? 0.0 : -HUGE_VAL);
      }
    }
    inputs.attn_mask->set(0, 5, 1, 100, kNan);
    if (mode != Mode::kPaper) {  // one V scale there: the NaN reaches every row
      inputs.v.set(0, 70, 0, 3, kNan);
    }
    inputs.k.set(0, 70, 0, 3, kNan);
    const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
    for (int64_t i = 0; i < c.seqlen_q; ++i) {
      for (int64_t h = 0; h < c.nheads_q; ++h) {
        const bool nan = i == 3 || (i == 5 && h == 1);
        EXPECT_EQ(std::isnan(result.out.get(0, i, h, 7)), nan) << c.name() << " " << i << " " << h;
        EXPECT_EQ(std::isnan(result.lse.get(0, i, h, 0)), nan) << c.name() << " " << i << " " << h;
      }
    }
    expect_matches_oracle(c, inputs.operands(), result, GetParam());
  }
}

/// A query that is not finite makes its rows NaN, whatever factor its scores get.
TEST_P(ScoreChanges, PoisonedQueries) {
  for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf}) {
    for (const bool capped : {false, true}) {
      KernelCase c = small_case(mode);
      c.scores.attn_mask = MaskKind::kAdded;
      if (capped) {
        c.options.softcap = 50;
      } else {
        c.options.softmax_scale = 3e38f;
      }
      KernelInputs inputs = make_inputs(c);
      inputs.q.set(0, 3, 1, 0, -HUGE_VAL);
      const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
      for (int64_t i = 0; i < c.seqlen_q; ++i) {
        for (int64_t h = 0; h < c.nheads_q; ++h) {
          const bool nan = i == 3 && h == 1;
          EXPECT_EQ(std::isnan(result.out.get(0, i, h, 7)), nan) << c.name() << " " << i;
          EXPECT_EQ(std::isnan(result.lse.get(0, i, h, 0)), nan) << c.name() << " " << i;
        }
      }
    }
  }
}

/// A sink that outweighs every key hides no NaN of a V scale that keys share.
TEST_P(ScoreChanges, SinksAndPoisonedScales) {
  for (const Granularity granularity : {Granularity::kBlockChannel, Granularity::kChannel}) {
    KernelCase c = small_case(Mode::kAccurate);
    c.options.v_granularity = granularity;
    c.scores.sinks = true;
    KernelInputs inputs = make_inputs(c);
    inputs.sinks->fill([](int64_t, int64_t, int64_t, int64_t) { return 1e30; });
    inputs.v.set(0, 70, 0, 3, HUGE_VAL);
    const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
    EXPECT_TRUE(std::isnan(result.out.get(0, 0, 0, 3))) << c.name();
    EXPECT_EQ(result.out.get(0, 0, 0, 4), 0.0) << c.name();
    expect_matches_oracle(c, inputs.operands(), result, GetParam());
  }
}

/// Sinks of every size, also where nothing else is visible.
TEST_P(ScoreChanges, ExtremeSinks) {
  for (const Mode mode : kKernelModes) {
    for (const double sink : {-HUGE_VAL, -1e30, -50.0, 0.0, 60.0, 200.0, 1e30, HUGE_VAL}) {
      KernelCase c = small_case(mode);
      c.options.mask = {.causal = true, .align = CausalAlign::kTopLeft, .q_offset = -5};
      c.scores.sinks = true;
      KernelInputs inputs = make_inputs(c);
      inputs.sinks->fill([&](int64_t, int64_t, int64_t, int64_t) { return sink; });
      const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
      expect_matches_oracle(c, inputs.operands(), result, GetParam());
      EXPECT_EQ(result.lse.get(0, 0, 0, 0), static_cast<double>(static_cast<float>(sink)));
      EXPECT_EQ(result.out.get(0, 0, 0, 0), 0.0);
    }
  }
}

/// One sequence cut into shards of queries and keys at odd places, each with its offsets, merged.
TEST_P(ScoreChanges, ShardsWithOffsetsMakeTheWhole) {
  constexpr int64_t kLength = 200;
  const std::vector<int64_t> cuts = {0, 37, 64, 150, kLength};
  for (const int64_t window : {int64_t{-1}, int64_t{60}}) {
    KernelCase c;
    c.options.mode = Mode::kExact;
    c.options.mask = {.causal = true, .window_left = window};
    c.options.softcap = 5.0f;
    c.nheads_q = 2;
    c.seqlen_q = kLength;
    c.seqlen_k = kLength;
    c.head_dim = 16;
    c.scores.alibi_slopes = true;
    const KernelInputs inputs = make_inputs(c);
    const KernelResult whole = run_kernel(c, inputs.operands(), GetParam());
    const auto shard = [](ConstTensorView view, int64_t begin, int64_t end) {
      view.data = static_cast<const float*>(view.data) + begin * view.strides[1];
      view.shape[1] = end - begin;
      return view;
    };
    for (size_t a = 0; a + 1 < cuts.size(); ++a) {
      KernelCase part = c;
      part.seqlen_q = cuts[a + 1] - cuts[a];
      std::vector<KernelResult> results;
      std::vector<AttentionState> states;
      for (size_t b = 0; b + 1 < cuts.size(); ++b) {
        part.seqlen_k = cuts[b + 1] - cuts[b];
        part.options.mask.align = CausalAlign::kTopLeft;
        part.options.mask.q_offset = cuts[a];
        part.options.mask.k_offset = cuts[b];
        AttentionInputs operands = inputs.operands();
        operands.q = shard(inputs.q.view(), cuts[a], cuts[a + 1]);
        operands.k = shard(inputs.k.view(), cuts[b], cuts[b + 1]);
        operands.v = shard(inputs.v.view(), cuts[b], cuts[b + 1]);
        results.push_back(run_kernel(part, operands, GetParam()));
        expect_matches_oracle(part, operands, results.back(), GetParam());
      }
      for (KernelResult& result : results) {
        states.push_back({.out = result.out.view(), .lse = result.lse.view()});
      }
      KernelResult merged{Tensor(DType::kFloat32, results[0].out.shape()),
                          Tensor(DType::kFloat32, results[0].lse.shape())};
      const Status status =
          merge_states(states, {merged.out.view(), merged.lse.view()}, Context::cpu(1));
      ASSERT_TRUE(status.ok()) << status.message();
      for (int64_t i = 0; i < part.seqlen_q; ++i) {
        for (int64_t h = 0; h < c.nheads_q; ++h) {
          ASSERT_NEAR(merged.lse.get(0, i, h, 0), whole.lse.get(0, cuts[a] + i, h, 0), 1e-5);
          for (int64_t d = 0; d < c.head_dim; ++d) {
            ASSERT_NEAR(merged.out.get(0, i, h, d), whole.out.get(0, cuts[a] + i, h, d), 1e-5);
          }
        }
      }
    }
  }
}

TEST_P(ScoreChanges, HeadDimOfV) {
  for (const Mode mode : kKernelModes) {
    for (const auto& [head_dim, head_dim_v] :
         {std::pair<int64_t, int64_t>{192, 128}, {16, 100}, {1, 256}, {256, 1}, {40, 64}}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        if (mode == Mode::kExact && dtype != DType::kFloat32) continue;
        KernelCase c = small_case(mode);
        c.dtype = dtype;
        c.head_dim = head_dim;
        c.head_dim_v = head_dim_v;
        check(c);
      }
    }
  }
}

/// A sequence of a batch with lengths is what it is alone.
TEST_P(ScoreChanges, LengthsAreSequencesOfTheirOwn) {
  for (const Mode mode : kKernelModes) {
    for (const bool causal : {false, true}) {
      KernelCase c = small_case(mode);
      c.batch = 5;
      c.options.mask.causal = causal;
      c.scores.seqlens_k = true;
      KernelInputs inputs = make_inputs(c);
      for (int64_t d = 0; d < c.head_dim; ++d) {  // beyond the length of sequence 1
        inputs.k.set(1, c.seqlen_k - 1, 0, d, std::nan(""));
        inputs.v.set(1, c.seqlen_k - 1, 0, d, std::nan(""));
      }
      const KernelResult all = run_kernel(c, inputs.operands(), GetParam());
      expect_matches_oracle(c, inputs.operands(), all, GetParam());
      for (int64_t b = 0; b < c.batch; ++b) {
        KernelCase one = c;
        one.batch = 1;
        one.seqlen_k = static_cast<int64_t>(inputs.seqlens_k->get(b, 0, 0, 0));
        const auto alone = [b](const Tensor& tensor, int64_t length) {
          ConstTensorView view = tensor.view();
          view.data = static_cast<const float*>(view.data) + b * view.strides[0];
          view.shape[0] = 1;
          view.shape[1] = length;
          return view;
        };
        const AttentionInputs operands = {alone(inputs.q, c.seqlen_q),
                                          alone(inputs.k, one.seqlen_k),
                                          alone(inputs.v, one.seqlen_k)};
        const KernelResult result = run_kernel(one, operands, GetParam());
        for (int64_t i = 0; i < c.seqlen_q; ++i) {
          for (int64_t h = 0; h < c.nheads_q; ++h) {
            ASSERT_EQ(all.lse.get(b, i, h, 0), result.lse.get(0, i, h, 0)) << c.name();
            for (int64_t d = 0; d < c.head_dim; ++d) {
              ASSERT_EQ(all.out.get(b, i, h, d), result.out.get(0, i, h, d)) << c.name();
            }
          }
        }
      }
    }
  }
}

/// The same where few queries meet many keys, which run in parts.
TEST_P(ScoreChanges, PartsOfTheKeys) {
  for (const Mode mode : {Mode::kAccurate, Mode::kExact}) {
    KernelCase c;
    c.options.mode = mode;
    c.options.softcap = 4.0f;
    c.batch = 2;
    c.nheads_q = 2;
    c.nheads_k = 1;
    c.seqlen_q = 3;
    c.seqlen_k = 17000;
    c.head_dim = 16;
    c.scores = {.attn_mask = MaskKind::kBool,
                .alibi_slopes = true,
                .sinks = true,
                .seqlens_k = true,
                .leftpad_k = true};
    check(c);
  }
}

ATTN8_INSTANTIATE_EACH_ISA(ScoreChanges);

}  // namespace
}  // namespace attn8::testing
