// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The oracles under softcap, attn_mask, ALiBi, sinks, lengths, offsets and head_dim_v: against
// hand-made numbers, and the emulations against float64 attention, from which they differ by
// quantizing only.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

/// One query of zeros, so that scores are what is added to them, and V of one channel.
struct ByHand {
  Tensor q{DType::kFloat32, {1, 1, 1, 4}};
  Tensor k{DType::kFloat32, {1, 3, 1, 4}};
  Tensor v{DType::kFloat32, {1, 3, 1, 1}};
  ByHand() {
    q.fill([](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
    k.fill_normal(5);
    v.fill([](int64_t, int64_t s, int64_t, int64_t) { return static_cast<double>(1 << s); });
  }
  [[nodiscard]] AttentionInputs inputs() const { return {q.view(), k.view(), v.view()}; }
};

struct Answer {
  double out, lse;
};
Answer answer(const AttentionInputs& inputs, const AttentionOptions& options = {}) {
  std::vector<double> out(1);
  std::vector<double> lse(1);
  const Status status = reference::exact_attention(inputs, options, out, lse);
  EXPECT_TRUE(status.ok()) << status.message();
  return {out[0], lse[0]};
}

TEST(ReferenceScoreChanges, AddedMask) {
  const ByHand problem;
  Tensor mask(DType::kFloat32, {1, 1, 1, 3});
  mask.set(0, 0, 0, 0, std::log(2.0));
  mask.set(0, 0, 0, 1, -HUGE_VAL);
  mask.set(0, 0, 0, 2, 0);
  AttentionInputs inputs = problem.inputs();
  inputs.attn_mask = std::as_const(mask).view();
  EXPECT_NEAR(answer(inputs).out, (2 * 1 + 1 * 4) / 3.0, 1e-7);
  EXPECT_NEAR(answer(inputs).lse, std::log(3.0), 1e-7);
}

TEST(ReferenceScoreChanges, BooleanMaskThatHidesAll) {
  const ByHand problem;
  Tensor mask(DType::kBool, {1, 1, 1, 1});
  mask.set(0, 0, 0, 0, 0);
  AttentionInputs inputs = problem.inputs();
  inputs.attn_mask = std::as_const(mask).view();
  EXPECT_EQ(answer(inputs).out, 0);
  EXPECT_EQ(answer(inputs).lse, -HUGE_VAL);
}

TEST(ReferenceScoreChanges, Alibi) {
  const ByHand problem;
  Tensor slopes(DType::kFloat32, {1, 1, 1, 1});
  slopes.set(0, 0, 0, 0, std::log(2.0));
  AttentionInputs inputs = problem.inputs();
  inputs.alibi_slopes = std::as_const(slopes).view();
  // Bottom-right: the query stands at key 2, so the weights are 1/4, 1/2, 1.
  EXPECT_NEAR(answer(inputs).out, (0.25 * 1 + 0.5 * 2 + 1 * 4) / 1.75, 1e-7);
  // Top-left: at key 0; shifted by its offset: at key 1.
  AttentionOptions options;
  options.mask.align = CausalAlign::kTopLeft;
  EXPECT_NEAR(answer(inputs, options).out, (1 * 1 + 0.5 * 2 + 0.25 * 4) / 1.75, 1e-7);
  options.mask.q_offset = 4;
  options.mask.k_offset = 3;
  EXPECT_NEAR(answer(inputs, options).out, (0.5 * 1 + 1 * 2 + 0.5 * 4) / 2, 1e-7);
}

TEST(ReferenceScoreChanges, Sink) {
  const ByHand problem;
  Tensor sinks(DType::kFloat32, {1, 1, 1, 1});
  sinks.set(0, 0, 0, 0, std::log(4.0));
  AttentionInputs inputs = problem.inputs();
  inputs.sinks = std::as_const(sinks).view();
  EXPECT_NEAR(answer(inputs).out, 7 / 7.0, 1e-7);
  EXPECT_NEAR(answer(inputs).lse, std::log(7.0), 1e-7);
}

TEST(ReferenceScoreChanges, Softcap) {
  ByHand problem;
  problem.q.fill([](int64_t, int64_t, int64_t, int64_t) { return 2.0; });
  problem.k.fill([](int64_t, int64_t s, int64_t, int64_t) { return s == 1 ? 1.0 : 0.0; });
  AttentionOptions options;
  options.softmax_scale = 0.5f;  // scores 0, 4, 0
  options.softcap = 2;
  const double weight = std::exp(2 * std::tanh(2.0));
  EXPECT_NEAR(answer(problem.inputs(), options).out, (1 + weight * 2 + 4) / (weight + 2), 1e-12);
}

TEST(ReferenceScoreChanges, Lengths) {
  const ByHand problem;
  Tensor seqlens(DType::kInt32, {1, 1, 1, 1});
  Tensor leftpad(DType::kInt32, {1, 1, 1, 1});
  seqlens.set(0, 0, 0, 0, 2);
  leftpad.set(0, 0, 0, 0, 1);
  AttentionInputs inputs = problem.inputs();
  inputs.seqlens_k = std::as_const(seqlens).view();
  EXPECT_NEAR(answer(inputs).out, 1.5, 1e-12);
  inputs.leftpad_k = std::as_const(leftpad).view();
  EXPECT_NEAR(answer(inputs).out, 2, 1e-12);
  leftpad.set(0, 0, 0, 0, 3);
  std::vector<double> out(1);
  EXPECT_EQ(reference::exact_attention(inputs, {}, out, {}).code(), StatusCode::kInvalidArgument);
}

/// All changes at once: every mode stays near float64 attention. The limits are those of plain
/// attention on the same data, so that a change lost or applied twice stands out.
TEST(ReferenceScoreChanges, EmulationsFollowFloat64) {
  for (const auto& [mode, limit] : {std::pair{Mode::kAccurate, 0.05},
                                    {Mode::kPaper, 0.12},
                                    {Mode::kHalf, 0.04},
                                    {Mode::kFp8, 0.20}}) {
    for (const MaskKind mask : {MaskKind::kNone, MaskKind::kBool, MaskKind::kAdded}) {
      for (const float softcap : {0.0f, 2.0f}) {
        KernelCase c;
        c.options.mode = mode;
        c.options.mask = {.causal = true, .align = CausalAlign::kTopLeft, .q_offset = 40};
        c.options.softcap = softcap;
        c.batch = 2;
        c.nheads_q = 2;
        c.nheads_k = 1;
        c.seqlen_q = 30;
        c.seqlen_k = 90;
        c.head_dim = 32;
        c.head_dim_v = 40;
        c.scores = {.attn_mask = mask,
                    .alibi_slopes = true,
                    .sinks = true,
                    .seqlens_k = true,
                    .leftpad_k = true};
        KernelInputs inputs = make_inputs(c);
        // A mean that smoothing takes, and softcap and sinks must get back.
        inputs.k.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
          return 1 + normal_at(11, static_cast<uint64_t>((b * 90 + s) * 32 + h + d));
        });
        const auto rows = static_cast<size_t>(c.batch * c.seqlen_q * c.nheads_q);
        std::vector<double> exact(rows * 40), got(rows * 40);
        std::vector<double> exact_lse(rows), got_lse(rows);
        Status status = reference::exact_attention(inputs.operands(), c.options, exact, exact_lse);
        ASSERT_TRUE(status.ok()) << status.message();
        status = reference::emulation(inputs.operands(), reference::emulation_options(c.options),
                                      got, got_lse, {});
        ASSERT_TRUE(status.ok()) << status.message();
        EXPECT_LE(reference::error_report(got, exact).rel_l2, limit) << c.name();
        for (size_t i = 0; i < rows; ++i) {
          if (exact_lse[i] == got_lse[i]) continue;  // -Inf included
          EXPECT_NEAR(got_lse[i], exact_lse[i], 2 * limit) << c.name() << " " << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace attn8::testing
