// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "support/tensors.hpp"

namespace attn8::testing {
namespace {

constexpr int64_t kBatch = 2, kQueries = 5, kKeys = 150, kHeads = 4, kGroup = 2, kDim = 24;

struct Problem {
  Tensor q = Tensor(DType::kFloat32, {kBatch, kQueries, kHeads* kGroup, kDim}, Memory::kBhsd);
  Tensor k = Tensor(DType::kFloat32, {kBatch, kKeys, kHeads, kDim}, Memory::kStrided);
  Tensor v = Tensor(DType::kFloat32, {kBatch, kKeys, kHeads, kDim});
  Tensor sinks = Tensor(DType::kFloat32, {1, 1, kHeads* kGroup, 1});
  Tensor slopes = Tensor(DType::kFloat32, {kBatch, 1, kHeads* kGroup, 1});
  Tensor bias = Tensor(DType::kFloat32, {1, 1, kHeads* kGroup, kKeys});
  Tensor mask = Tensor(DType::kBool, {kBatch, kQueries, 1, kKeys});
  Tensor out = Tensor(DType::kFloat32, q.shape(), Memory::kReversed);
  Tensor lse = Tensor(DType::kFloat32, {kBatch, kQueries, kHeads* kGroup, 1});

  Problem() {
    q.fill_normal(1);
    k.fill_normal(2);
    v.fill_normal(3);
    sinks.fill_normal(4);
    slopes.fill(
        [](int64_t b, int64_t, int64_t h, int64_t) { return 0.01 * static_cast<double>(b + h); });
    bias.fill_normal(5);
    mask.fill([](int64_t b, int64_t s, int64_t, int64_t j) {
      return (b + 3 * s + j) % 7 == 0 ? 0.0 : 1.0;
    });
  }
  [[nodiscard]] AttentionInputs inputs() const { return {q.view(), k.view(), v.view()}; }
  [[nodiscard]] AttentionOutputs outputs() { return {out.view(), lse.view()}; }
};

/// Every head has the bits that its mode gives it where all heads run in that mode.
void expect_heads_of_their_modes(const AttentionInputs& inputs, AttentionOptions options,
                                 const std::vector<Mode>& modes) {
  Problem mixed;
  options.head_modes = modes;
  const Status status = attention(inputs, mixed.outputs(), options, Context::cpu(2));
  ASSERT_TRUE(status.ok()) << status.message();
  options.head_modes = {};
  for (const Mode mode : {Mode::kAccurate, Mode::kHalf, Mode::kExact, Mode::kPaper}) {
    Problem one;
    options.mode = mode;
    ASSERT_TRUE(attention(inputs, one.outputs(), options, Context()).ok());
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t s = 0; s < kQueries; ++s) {
        for (int64_t h = 0; h < kHeads * kGroup; ++h) {
          if (modes[static_cast<size_t>(h / kGroup)] != mode) continue;
          EXPECT_EQ(mixed.lse.get(b, s, h, 0), one.lse.get(b, s, h, 0));
          for (int64_t d = 0; d < kDim; ++d) {
            ASSERT_EQ(mixed.out.get(b, s, h, d), one.out.get(b, s, h, d))
                << to_string(mode) << " head " << h;
          }
        }
      }
    }
  }
}

TEST(HeadModes, EachHeadRunsInItsMode) {
  const Problem problem;
  const AttentionOptions options = {.mask = {.causal = true, .window_left = 99}};
  using enum Mode;
  for (const std::vector<Mode>& modes : {std::vector{kHalf, kAccurate, kAccurate, kExact},
                                         {kAccurate, kAccurate, kAccurate, kAccurate},
                                         {kExact, kPaper, kExact, kHalf}}) {
    expect_heads_of_their_modes(problem.inputs(), options, modes);
  }
}

TEST(HeadModes, ScoreChangesGoWithTheirHeads) {
  const Problem problem;
  AttentionInputs inputs = problem.inputs();
  inputs.sinks = problem.sinks.view();
  inputs.alibi_slopes = problem.slopes.view();
  const std::vector<Mode> modes = {Mode::kExact, Mode::kAccurate, Mode::kHalf, Mode::kAccurate};
  for (const Tensor* attn_mask : {&problem.bias, &problem.mask}) {
    inputs.attn_mask = attn_mask->view();
    expect_heads_of_their_modes(inputs, {.softcap = 5}, modes);
  }
}

/// A plan keeps the modes, not the memory they came in.
TEST(HeadModes, PlanCopiesTheModes) {
  Problem problem;
  std::vector<Mode> modes = {Mode::kHalf, Mode::kHalf, Mode::kExact, Mode::kHalf};
  AttentionOptions options;
  options.head_modes = modes;
  const Context context = Context::with_isa(Isa::kScalar);
  const Result<AttentionPlan> plan =
      AttentionPlan::make(problem.inputs(), problem.outputs(), options, context);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_EQ(plan.value().kernel(), "attend_half_scalar_d24+attend_exact_scalar_d24");
  EXPECT_EQ(plan.value().isa(), Isa::kScalar);
  EXPECT_EQ(plan.value().kv_block(), kDefaultKvBlock);
  ASSERT_TRUE(attention(problem.inputs(), problem.outputs(), options, context).ok());
  const std::vector<double> wanted = problem.out.values();
  modes.assign(4, Mode::kPaper);
  std::vector<std::byte> memory(plan.value().workspace_bytes() + 64);
  void* begin = memory.data();
  size_t size = memory.size();
  std::align(64, plan.value().workspace_bytes(), begin, size);
  RunTimes times;
  const Status status = plan.value().run(problem.inputs(), problem.outputs(),
                                         {static_cast<std::byte*>(begin), size}, &times);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(problem.out.values(), wanted);
  EXPECT_GT(times.attention_ms, 0);
}

TEST(HeadModes, RefusesWhatIsWrong) {
  Problem problem;
  const auto refused = [&](const AttentionInputs& inputs, const std::vector<Mode>& modes) {
    AttentionOptions options;
    options.head_modes = modes;
    const Status status = attention(inputs, problem.outputs(), options, Context());
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_EQ(refused(problem.inputs(), {Mode::kExact}),
            "options.head_modes got 1 modes, wants nheads_k=4");
  const std::vector<Mode> odd = {Mode::kExact, static_cast<Mode>(9), Mode::kExact, Mode::kExact};
  EXPECT_EQ(refused(problem.inputs(), odd), "options.mode is not a value of attn8::Mode");
  Tensor codes(DType::kInt8, problem.k.shape());
  codes.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0; });
  Tensor scale(DType::kFloat32, {kBatch, kKeys, kHeads, 1});
  scale.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0; });
  AttentionInputs quantized = problem.inputs();
  quantized.k = QuantizedView{codes.view(), scale.view(), {Granularity::kToken}};
  EXPECT_EQ(refused(quantized, {Mode::kHalf, Mode::kHalf, Mode::kExact, Mode::kHalf}),
            "k got int8 codes, mode exact wants float");
}

/// What run() says of outputs in the memory of an input, or of each other; neighbours are fine.
TEST(Validation, OverlapNamesBoth) {
  std::vector<float> memory(4096);
  const Extents shape = {1, 4, 2, 8};
  const auto at = [&](size_t offset, int64_t row) {
    TensorView view = bshd(memory.data() + offset, DType::kFloat32, shape);
    view.strides = {4 * row, row, 8, 1};
    return view;
  };
  // q, k, v and out side by side in rows of 64, lse behind them.
  TensorView lse = bshd(memory.data() + 256, DType::kFloat32, {1, 4, 2, 1});
  const AttentionInputs inputs = {at(0, 64), at(16, 64), at(32, 64)};
  const auto run = [&](const TensorView& out, const TensorView& lse_view) {
    return attention(inputs, {out, lse_view}, {}, Context());
  };
  ASSERT_TRUE(run(at(48, 64), lse).ok()) << run(at(48, 64), lse).message();
  EXPECT_EQ(run(at(1, 64), lse).message(), "out overlaps q, wants memory of its own");
  EXPECT_EQ(run(at(17, 64), lse).message(), "out overlaps k, wants memory of its own");
  EXPECT_EQ(run(at(33, 64), lse).message(), "out overlaps v, wants memory of its own");
  lse.data = memory.data() + 24;
  EXPECT_EQ(run(at(48, 64), lse).message(), "lse overlaps k, wants memory of its own");
  lse.data = memory.data() + 500;
  EXPECT_EQ(run(at(448, 16), lse).message(), "lse overlaps out, wants memory of its own");
  // A plan is made of tensors that need not be where those of a run are.
  const TensorView same = at(0, 64);
  EXPECT_TRUE(AttentionPlan::make({same, same, same}, {same}, {}, Context()).ok());
}

}  // namespace
}  // namespace attn8::testing
