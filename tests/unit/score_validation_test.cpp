// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Messages about attn_mask, alibi_slopes, sinks, lengths, softcap, offsets and head_dim_v.
#include <functional>
#include <limits>
#include <string>

#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// A valid call with everything that changes scores, which a test then breaks in one place.
struct Call {
  Tensor q{DType::kFloat32, {2, 3, 4, 8}};
  Tensor k{DType::kFloat32, {2, 5, 2, 8}};
  Tensor v{DType::kFloat32, {2, 5, 2, 6}};
  Tensor out{DType::kFloat32, {2, 3, 4, 6}};
  Tensor attn_mask{DType::kBool, {2, 3, 4, 5}};
  Tensor alibi_slopes{DType::kFloat32, {2, 1, 4, 1}};
  Tensor sinks{DType::kFloat32, {1, 1, 4, 1}};
  Tensor seqlens_k{DType::kInt32, {2, 1, 1, 1}};
  Tensor leftpad_k{DType::kInt32, {2, 1, 1, 1}};
  AttentionInputs inputs;
  AttentionOutputs outputs;
  AttentionOptions options;

  Call() {
    const auto fill = [](Tensor& tensor, double value) {
      tensor.fill([=](int64_t, int64_t, int64_t, int64_t) { return value; });
    };
    fill(q, 1);
    fill(k, 1);
    fill(v, 1);
    fill(attn_mask, 1);
    fill(alibi_slopes, 0.5);
    fill(sinks, 1);
    fill(seqlens_k, 4);
    fill(leftpad_k, 1);
    inputs = {
        q.view(),     k.view(),         v.view(),        attn_mask.view(), alibi_slopes.view(),
        sinks.view(), seqlens_k.view(), leftpad_k.view()};
    outputs = {out.view()};
    options.softcap = 10;
    options.mask = {.causal = true, .q_offset = 3, .k_offset = 1};
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

void expect_refused(const std::string& message, const std::function<void(Call&)>& change) {
  Call call;
  Status status = attention(call.inputs, call.outputs, call.options, Context::cpu(1));
  ASSERT_TRUE(status.ok()) << status.message();
  change(call);
  status = attention(call.inputs, call.outputs, call.options, Context::cpu(1));
  EXPECT_EQ(to_string(status.code()), to_string(StatusCode::kInvalidArgument));
  EXPECT_EQ(status.message(), message);
}

TEST(ScoreValidation, AttnMask) {
  expect_refused(
      "attn_mask.shape got [2, 3, 4, 4], wants [2, 3, 4, 5] (batch, seqlen_q, nheads_q, seqlen_k), "
      "each also 1",
      [](Call& c) { c.inputs.attn_mask->shape[3] = 4; });
  expect_refused(
      "attn_mask.shape got [2, 3, 2, 5], wants [2, 3, 4, 5] (batch, seqlen_q, nheads_q, seqlen_k), "
      "each also 1",
      [](Call& c) { c.inputs.attn_mask->shape[2] = 2; });
  expect_refused("attn_mask.dtype got int8, wants bool, float32, float16 or bfloat16",
                 [](Call& c) { c.inputs.attn_mask->dtype = DType::kInt8; });
  expect_refused("attn_mask.data got nullptr, wants [2, 3, 4, 5]",
                 [](Call& c) { c.inputs.attn_mask->data = nullptr; });
  expect_refused("attn_mask.device got cuda:0, wants cpu, as the context's", [](Call& c) {
    c.inputs.attn_mask->device = {DeviceType::kCuda, 0};
  });
}

TEST(ScoreValidation, AlibiSlopes) {
  expect_refused("alibi_slopes.dtype got bool, wants float32",
                 [](Call& c) { c.inputs.alibi_slopes->dtype = DType::kBool; });
  expect_refused("alibi_slopes.shape got [2, 1, 2, 1], wants [2, 1, 4, 1] or a first extent of 1",
                 [](Call& c) { c.inputs.alibi_slopes->shape[2] = 2; });
  expect_refused("alibi_slopes[1, 0, 2, 0] got nan, wants at most 2^20 in magnitude",
                 [](Call& c) { c.alibi_slopes.set(1, 0, 2, 0, kNan); });
}

TEST(ScoreValidation, Sinks) {
  expect_refused("sinks.shape got [2, 1, 4, 1], wants [1, 1, 4, 1]",
                 [](Call& c) { c.inputs.sinks->shape[0] = 2; });
  expect_refused("sinks.dtype got float16, wants float32",
                 [](Call& c) { c.inputs.sinks->dtype = DType::kFloat16; });
}

TEST(ScoreValidation, Lengths) {
  expect_refused("seqlens_k.shape got [1, 1, 1, 1], wants [2, 1, 1, 1]",
                 [](Call& c) { c.inputs.seqlens_k->shape[0] = 1; });
  expect_refused("leftpad_k.dtype got float32, wants int32",
                 [](Call& c) { c.inputs.leftpad_k->dtype = DType::kFloat32; });
  expect_refused("seqlens_k[1] got 6, wants 0 to seqlen_k=5",
                 [](Call& c) { c.seqlens_k.set(1, 0, 0, 0, 6); });
  expect_refused("seqlens_k[0] got -1, wants 0 to seqlen_k=5",
                 [](Call& c) { c.seqlens_k.set(0, 0, 0, 0, -1); });
  expect_refused("leftpad_k[1] got 5, wants 0 to the sequence's 4 keys",
                 [](Call& c) { c.leftpad_k.set(1, 0, 0, 0, 5); });
}

TEST(ScoreValidation, Options) {
  for (const float softcap : {-1.0f, 1e-9f, 1e9f, static_cast<float>(kNan)}) {
    expect_refused("options.softcap got " + std::to_string(softcap) + ", wants 0 or 2^-20 to 2^20",
                   [=](Call& c) { c.options.softcap = softcap; });
  }
  expect_refused("options.mask.q_offset got 281474976710657, wants -2^48 to 2^48",
                 [](Call& c) { c.options.mask.q_offset = (int64_t{1} << 48) + 1; });
  expect_refused("options.mask.k_offset got -281474976710657, wants -2^48 to 2^48",
                 [](Call& c) { c.options.mask.k_offset = -(int64_t{1} << 48) - 1; });
}

TEST(ScoreValidation, HeadDimV) {
  expect_refused("out.shape got [2, 3, 4, 8], wants [2, 3, 4, 6], as q and head_dim_v",
                 [](Call& c) { c.outputs.out.shape[3] = 8; });
  expect_refused("v.shape[3]=257 (head_dim_v) wants 1 to 256", [](Call& c) {
    auto& v = *std::get_if<ConstTensorView>(&c.inputs.v);
    v.shape[3] = 257;
    v.strides = {0, 0, 0, 0};
  });
}

/// A plan keeps whether lengths are given, and a run may not differ.
TEST(ScoreValidation, RunUnlikeItsPlan) {
  Call call;
  const auto plan = AttentionPlan::make(call.inputs, call.outputs, call.options, Context::cpu(1));
  ASSERT_TRUE(plan.ok());
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines(plan.value().workspace_bytes() / 64 + 1);
  const std::span<std::byte> workspace(lines[0].bytes, lines.size() * 64);
  EXPECT_TRUE(plan.value().run(call.inputs, call.outputs, workspace).ok());
  call.inputs.attn_mask.reset();
  EXPECT_TRUE(plan.value().run(call.inputs, call.outputs, workspace).ok());
  call.inputs.seqlens_k.reset();
  EXPECT_TRUE(plan.value().run(call.inputs, call.outputs, workspace).ok());
  call.inputs.leftpad_k.reset();
  EXPECT_EQ(plan.value().run(call.inputs, call.outputs, workspace).message(),
            "operands do not have the dtypes, lengths and outputs the plan was made for");
}

}  // namespace
}  // namespace attn8::testing
