// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// A mode per kv head through attn8.h, and when outputs in the memory of an input are refused.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attn8/attn8.h"
#include "attn8/attn8.hpp"

namespace attn8::testing {
namespace {

constexpr int64_t kQueries = 3, kKeys = 70, kHeads = 3, kGroup = 2, kDim = 16;

/// [1, seq, heads, kDim] float32 with its memory.
struct Floats {
  Floats(int64_t seq, int64_t heads, int seed)
      : data(static_cast<size_t>(seq * heads * kDim)), shape{1, seq, heads, kDim} {
    for (size_t i = 0; i < data.size(); ++i) {
      data[i] = static_cast<float>((i * 37 + static_cast<size_t>(seed) * 11) % 101) / 25 - 2;
    }
    EXPECT_EQ(attn8_tensor_bshd(&tensor, sizeof tensor, data.data(), ATTN8_FLOAT32, shape.data()),
              ATTN8_OK);
  }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  [[nodiscard]] TensorView view() { return bshd(data.data(), DType::kFloat32, shape); }

  std::vector<float> data;
  Extents shape;
  attn8_tensor tensor = {};
};

class HeadModesCApi : public ::testing::Test {
 protected:
  HeadModesCApi() { EXPECT_EQ(attn8_attention_params_init(&params_, sizeof params_), ATTN8_OK); }

  attn8_status run() {
    return attn8_attention(&q_.tensor, &k_.tensor, &v_.tensor, &out_.tensor, nullptr, &params_,
                           nullptr);
  }
  void set_modes(const std::vector<int32_t>& modes) {
    params_.head_modes = modes.data();
    params_.head_modes_count = static_cast<int64_t>(modes.size());
  }
  void expect_refused(const std::string& message) {
    const std::vector<float> before = out_.data;
    EXPECT_EQ(run(), ATTN8_INVALID_ARGUMENT);
    EXPECT_EQ(attn8_last_error(), message);
    EXPECT_EQ(out_.data, before);
  }

  Floats q_ = {kQueries, kHeads* kGroup, 1};
  Floats k_ = {kKeys, kHeads, 2};
  Floats v_ = {kKeys, kHeads, 3};
  Floats out_ = {kQueries, kHeads* kGroup, 4};
  attn8_attention_params params_ = {};
};

TEST_F(HeadModesCApi, SameAsTheCppApi) {
  const std::vector<int32_t> modes = {ATTN8_EXACT, ATTN8_ACCURATE, ATTN8_HALF};
  const std::vector<Mode> wanted_modes = {Mode::kExact, Mode::kAccurate, Mode::kHalf};
  Floats wanted(kQueries, kHeads * kGroup, 0);
  AttentionOptions options;
  options.head_modes = wanted_modes;
  ASSERT_TRUE(attention({q_.view(), k_.view(), v_.view()}, {wanted.view()}, options, {}).ok());
  params_.mode = ATTN8_PAPER;  // replaced
  set_modes(modes);
  ASSERT_EQ(run(), ATTN8_OK) << attn8_last_error();
  EXPECT_EQ(out_.data, wanted.data);
  // A caller whose struct ends before head_modes does not set them.
  params_.mode = ATTN8_ACCURATE;
  params_.struct_size = offsetof(attn8_attention_params, head_modes_count);
  ASSERT_EQ(run(), ATTN8_OK) << attn8_last_error();
  EXPECT_NE(out_.data, wanted.data);
}

TEST_F(HeadModesCApi, PlanCopiesTheModes) {
  std::vector<int32_t> modes = {ATTN8_HALF, ATTN8_HALF, ATTN8_EXACT};
  set_modes(modes);
  ASSERT_EQ(run(), ATTN8_OK) << attn8_last_error();
  const std::vector<float> wanted = out_.data;
  attn8_plan* plan = nullptr;
  ASSERT_EQ(attn8_plan_create(&q_.tensor, &k_.tensor, &v_.tensor, &out_.tensor, nullptr, &params_,
                              nullptr, &plan),
            ATTN8_OK)
      << attn8_last_error();
  modes.assign(3, ATTN8_PAPER);
  const std::string kernel = attn8_plan_kernel(plan);
  EXPECT_NE(kernel.find("attend_half_"), std::string::npos) << kernel;
  EXPECT_NE(kernel.find("+attend_exact_"), std::string::npos) << kernel;
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::vector<Line> workspace(attn8_plan_workspace_bytes(plan) / 64 + 1);
  out_.data.assign(out_.data.size(), 0);
  EXPECT_EQ(attn8_plan_run(plan, &q_.tensor, &k_.tensor, &v_.tensor, &out_.tensor, nullptr,
                           workspace.data(), workspace.size() * 64, nullptr),
            ATTN8_OK)
      << attn8_last_error();
  EXPECT_EQ(out_.data, wanted);
  // The tensors of a run are not those of the plan, so that it is the run that looks where they
  // are.
  attn8_tensor in_place = out_.tensor;
  in_place.data = q_.data.data();
  attn8_plan* other = nullptr;
  EXPECT_EQ(attn8_plan_create(&q_.tensor, &k_.tensor, &v_.tensor, &in_place, nullptr, &params_,
                              nullptr, &other),
            ATTN8_OK);
  attn8_plan_destroy(other);
  EXPECT_EQ(attn8_plan_run(plan, &q_.tensor, &k_.tensor, &v_.tensor, &in_place, nullptr,
                           workspace.data(), workspace.size() * 64, nullptr),
            ATTN8_INVALID_ARGUMENT);
  EXPECT_STREQ(attn8_last_error(), "out overlaps q, wants memory of its own");
  attn8_plan_destroy(plan);
}

TEST_F(HeadModesCApi, Refused) {
  const std::vector<int32_t> one = {ATTN8_EXACT};
  set_modes(one);
  expect_refused("options.head_modes got 1 modes, wants nheads_k=3");
  params_.head_modes_count = -1;
  expect_refused("options.head_modes got -1 modes, wants nheads_k=3");
  params_.head_modes = nullptr;
  params_.head_modes_count = kHeads;
  expect_refused("params.head_modes got NULL");
  const std::vector<int32_t> odd = {ATTN8_EXACT, 256, ATTN8_EXACT};
  set_modes(odd);
  expect_refused("options.mode is not a value of attn8::Mode");
  const std::vector<int32_t> modes(kHeads, ATTN8_HALF);
  set_modes(modes);
  out_.tensor.data = v_.data.data();
  expect_refused("out overlaps v, wants memory of its own");
}

}  // namespace
}  // namespace attn8::testing
