// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The score operands of attn8.h do what those of the C++ API do, in attention, plans, the oracle
// and the KV cache.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attn8/attn8.h"
#include "attn8/attn8.hpp"

namespace attn8 {
namespace {

constexpr int64_t kBatch = 2, kQueries = 5, kKeys = 70, kHeads = 2, kDim = 16;

attn8_tensor tensor_of(const void* data, int32_t dtype, const Extents& shape) {
  attn8_tensor tensor;
  EXPECT_EQ(attn8_tensor_bshd(&tensor, sizeof tensor, data, dtype, shape.data()), ATTN8_OK);
  return tensor;
}

std::vector<float> numbers(size_t count, int seed) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>((static_cast<int>(i) * 37 + seed * 11) % 101 - 50) / 25;
  }
  return values;
}

class ScoreOperands : public ::testing::Test {
 protected:
  ScoreOperands() {
    for (size_t i = 0; i < mask_.size(); ++i) mask_[i] = i % 3 != 0;
    EXPECT_EQ(attn8_score_operands_init(&scores_, sizeof scores_), ATTN8_OK);
    EXPECT_EQ(attn8_attention_params_init(&params_, sizeof params_), ATTN8_OK);
    params_.softcap = 4;
    params_.causal = 1;
    params_.causal_align = ATTN8_TOP_LEFT;
    params_.q_offset = 60;
    params_.k_offset = 2;
    params_.scores = &scores_;
    scores_.attn_mask = &mask_tensor_;
    scores_.alibi_slopes = &slopes_tensor_;
    scores_.sinks = &sinks_tensor_;
    scores_.seqlens_k = &seqlens_tensor_;
    scores_.leftpad_k = &leftpad_tensor_;
  }

  /// By the C++ API.
  std::vector<float> wanted() {
    std::vector<float> out(out_.size());
    AttentionInputs inputs = {bshd(static_cast<const void*>(q_.data()), DType::kFloat32, q_shape_),
                              bshd(static_cast<const void*>(k_.data()), DType::kFloat32, k_shape_),
                              bshd(static_cast<const void*>(v_.data()), DType::kFloat32, k_shape_)};
    inputs.attn_mask = bshd(static_cast<const void*>(mask_.data()), DType::kBool, mask_shape_);
    inputs.alibi_slopes =
        bshd(static_cast<const void*>(slopes_), DType::kFloat32, {1, 1, kHeads, 1});
    inputs.sinks = bshd(static_cast<const void*>(sinks_), DType::kFloat32, {1, 1, kHeads, 1});
    inputs.seqlens_k = bshd(static_cast<const void*>(seqlens_), DType::kInt32, {kBatch, 1, 1, 1});
    inputs.leftpad_k = bshd(static_cast<const void*>(leftpad_), DType::kInt32, {kBatch, 1, 1, 1});
    AttentionOptions options;
    options.softcap = 4;
    options.mask = {.causal = true, .align = CausalAlign::kTopLeft, .q_offset = 60, .k_offset = 2};
    const Status status = attention(
        inputs, {bshd(static_cast<void*>(out.data()), DType::kFloat32, q_shape_)}, options, {});
    EXPECT_TRUE(status.ok()) << status.message();
    return out;
  }

  Extents q_shape_ = {kBatch, kQueries, kHeads, kDim};
  Extents k_shape_ = {kBatch, kKeys, 1, kDim};
  Extents mask_shape_ = {1, kQueries, 1, kKeys};
  std::vector<float> q_ = numbers(kBatch * kQueries * kHeads * kDim, 1);
  std::vector<float> k_ = numbers(kBatch * kKeys * kDim, 2);
  std::vector<float> v_ = numbers(kBatch * kKeys * kDim, 3);
  std::vector<float> out_ = std::vector<float>(q_.size());
  std::vector<uint8_t> mask_ = std::vector<uint8_t>(kQueries * kKeys);
  float slopes_[kHeads] = {0.5f, 0.1f};
  float sinks_[kHeads] = {1, -1};
  int32_t seqlens_[kBatch] = {kKeys, 33};
  int32_t leftpad_[kBatch] = {3, 0};
  attn8_tensor q_tensor_ = tensor_of(q_.data(), ATTN8_FLOAT32, q_shape_);
  attn8_tensor k_tensor_ = tensor_of(k_.data(), ATTN8_FLOAT32, k_shape_);
  attn8_tensor v_tensor_ = tensor_of(v_.data(), ATTN8_FLOAT32, k_shape_);
  attn8_tensor out_tensor_ = tensor_of(out_.data(), ATTN8_FLOAT32, q_shape_);
  attn8_tensor mask_tensor_ = tensor_of(mask_.data(), ATTN8_BOOL, mask_shape_);
  attn8_tensor slopes_tensor_ = tensor_of(slopes_, ATTN8_FLOAT32, {1, 1, kHeads, 1});
  attn8_tensor sinks_tensor_ = tensor_of(sinks_, ATTN8_FLOAT32, {1, 1, kHeads, 1});
  attn8_tensor seqlens_tensor_ = tensor_of(seqlens_, ATTN8_INT32, {kBatch, 1, 1, 1});
  attn8_tensor leftpad_tensor_ = tensor_of(leftpad_, ATTN8_INT32, {kBatch, 1, 1, 1});
  attn8_score_operands scores_ = {};
  attn8_attention_params params_ = {};
};

TEST_F(ScoreOperands, Attention) {
  ASSERT_EQ(
      attn8_attention(&q_tensor_, &k_tensor_, &v_tensor_, &out_tensor_, nullptr, &params_, nullptr),
      ATTN8_OK)
      << attn8_last_error();
  EXPECT_EQ(out_, wanted());
  const std::vector<float> with_all = out_;
  for (const attn8_tensor** operand : {&scores_.attn_mask, &scores_.alibi_slopes, &scores_.sinks,
                                       &scores_.seqlens_k, &scores_.leftpad_k}) {
    const attn8_tensor* const kept = *operand;
    *operand = nullptr;
    ASSERT_EQ(attn8_attention(&q_tensor_, &k_tensor_, &v_tensor_, &out_tensor_, nullptr, &params_,
                              nullptr),
              ATTN8_OK);
    EXPECT_NE(out_, with_all);
    *operand = kept;
  }
}

/// Two packed sequences give what each gives alone, and so does the oracle.
TEST_F(ScoreOperands, PackedSequences) {
  const Extents packed_q = {1, kBatch * kQueries, kHeads, kDim};
  const Extents packed_k = {1, kBatch * kKeys, 1, kDim};
  const attn8_tensor q = tensor_of(q_.data(), ATTN8_FLOAT32, packed_q);
  const attn8_tensor k = tensor_of(k_.data(), ATTN8_FLOAT32, packed_k);
  const attn8_tensor v = tensor_of(v_.data(), ATTN8_FLOAT32, packed_k);
  const attn8_tensor out = tensor_of(out_.data(), ATTN8_FLOAT32, packed_q);
  params_.q_offset = params_.k_offset = 0;
  scores_.attn_mask = scores_.seqlens_k = scores_.leftpad_k = nullptr;
  const int32_t starts_q[] = {0, 3, kBatch * kQueries};
  const int32_t starts_k[] = {0, 100, kBatch * kKeys};
  const attn8_tensor cu_seqlens_q = tensor_of(starts_q, ATTN8_INT32, {3, 1, 1, 1});
  const attn8_tensor cu_seqlens_k = tensor_of(starts_k, ATTN8_INT32, {3, 1, 1, 1});
  scores_.cu_seqlens_q = &cu_seqlens_q;
  EXPECT_EQ(attn8_attention(&q, &k, &v, &out, nullptr, &params_, nullptr), ATTN8_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(attn8_last_error()),
            "cu_seqlens_q is set alone, wants cu_seqlens_q and cu_seqlens_k");
  scores_.cu_seqlens_k = &cu_seqlens_k;
  ASSERT_EQ(attn8_attention(&q, &k, &v, &out, nullptr, &params_, nullptr), ATTN8_OK)
      << attn8_last_error();
  const std::vector<float> packed = out_;
  std::vector<double> oracle(out_.size());
  ASSERT_EQ(
      attn8_reference_attention(&q, &k, &v, &params_, oracle.data(), oracle.size(), nullptr, 0),
      ATTN8_OK)
      << attn8_last_error();
  scores_.cu_seqlens_q = scores_.cu_seqlens_k = nullptr;
  for (size_t i = 0; i < 2; ++i) {
    const int64_t queries = starts_q[i + 1] - starts_q[i];
    const int64_t keys = starts_k[i + 1] - starts_k[i];
    const auto own = [&](const std::vector<float>& x, int64_t first, int64_t tokens,
                         int64_t heads) {
      return tensor_of(x.data() + first * heads * kDim, ATTN8_FLOAT32, {1, tokens, heads, kDim});
    };
    const attn8_tensor q_own = own(q_, starts_q[i], queries, kHeads);
    const attn8_tensor k_own = own(k_, starts_k[i], keys, 1);
    const attn8_tensor v_own = own(v_, starts_k[i], keys, 1);
    const attn8_tensor out_own = own(out_, starts_q[i], queries, kHeads);
    ASSERT_EQ(attn8_attention(&q_own, &k_own, &v_own, &out_own, nullptr, &params_, nullptr),
              ATTN8_OK)
        << attn8_last_error();
  }
  EXPECT_EQ(packed, out_);
  for (size_t i = 0; i < oracle.size(); ++i) {
    ASSERT_NEAR(oracle[i], static_cast<double>(packed[i]), 0.1) << i;
  }
}

TEST_F(ScoreOperands, Plan) {
  attn8_plan* plan = nullptr;
  ASSERT_EQ(attn8_plan_create(&q_tensor_, &k_tensor_, &v_tensor_, &out_tensor_, nullptr, &params_,
                              nullptr, &plan),
            ATTN8_OK)
      << attn8_last_error();
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::vector<Line> workspace(attn8_plan_workspace_bytes(plan) / 64 + 1);
  const size_t bytes = workspace.size() * 64;
  EXPECT_EQ(attn8_plan_run_with_scores(plan, &q_tensor_, &k_tensor_, &v_tensor_, &scores_,
                                       &out_tensor_, nullptr, workspace.data(), bytes, nullptr),
            ATTN8_OK)
      << attn8_last_error();
  EXPECT_EQ(out_, wanted());
  EXPECT_EQ(attn8_plan_run(plan, &q_tensor_, &k_tensor_, &v_tensor_, &out_tensor_, nullptr,
                           workspace.data(), bytes, nullptr),
            ATTN8_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(attn8_last_error()),
            "operands do not have the dtypes, lengths and outputs the plan was made for");
  attn8_plan_destroy(plan);
}

TEST_F(ScoreOperands, Reference) {
  std::vector<double> out(out_.size());
  ASSERT_EQ(attn8_reference_attention(&q_tensor_, &k_tensor_, &v_tensor_, &params_, out.data(),
                                      out.size(), nullptr, 0),
            ATTN8_OK)
      << attn8_last_error();
  const std::vector<float> kernel = wanted();
  for (size_t i = 0; i < out.size(); ++i) {
    ASSERT_NEAR(out[i], static_cast<double>(kernel[i]), 0.1) << i;
  }
}

TEST_F(ScoreOperands, Refused) {
  const auto run = [&] {
    EXPECT_EQ(attn8_attention(&q_tensor_, &k_tensor_, &v_tensor_, &out_tensor_, nullptr, &params_,
                              nullptr),
              ATTN8_INVALID_ARGUMENT);
    return std::string(attn8_last_error());
  };
  mask_tensor_.shape[1] = 2;
  EXPECT_EQ(run(),
            "attn_mask.shape got [1, 2, 1, 70], wants [2, 5, 2, 70] (batch, seqlen_q, nheads_q, "
            "seqlen_k), each also 1");
  mask_tensor_.shape[1] = kQueries;
  seqlens_[1] = 71;
  EXPECT_EQ(run(), "seqlens_k[1] got 71, wants 0 to seqlen_k=70");
  scores_.reserved = 1;
  EXPECT_EQ(run(), "scores.reserved got 1, wants 0");
  scores_.struct_size = 3;
  EXPECT_EQ(run(), "scores.struct_size got 3, wants a multiple of 8 in [8, 4096]");
}

/// The cache with a sequence gives the bits of attention() on the same keys.
TEST_F(ScoreOperands, KvCache) {
  attn8_kv_cache_params cache_params;
  ASSERT_EQ(attn8_kv_cache_params_init(&cache_params, sizeof cache_params), ATTN8_OK);
  cache_params.nheads_k = 1;
  cache_params.head_dim = kDim;
  cache_params.max_pages = 2;
  attn8_kv_cache* cache = nullptr;
  ASSERT_EQ(attn8_kv_cache_create(&cache_params, &cache), ATTN8_OK) << attn8_last_error();
  attn8_kv_sequence sequence;
  ASSERT_EQ(attn8_kv_sequence_create(cache, &sequence), ATTN8_OK);
  attn8_tensor k = k_tensor_, v = v_tensor_, q = q_tensor_, out = out_tensor_;
  for (attn8_tensor* tensor : {&k, &v, &q, &out}) tensor->shape[0] = 1;
  ASSERT_EQ(attn8_kv_sequence_append(cache, sequence, &k, &v, nullptr), ATTN8_OK);
  scores_.attn_mask = scores_.seqlens_k = scores_.leftpad_k = nullptr;
  attn8_kv_attention_params attend_params;
  ASSERT_EQ(attn8_kv_attention_params_init(&attend_params, sizeof attend_params), ATTN8_OK);
  attend_params.softcap = 4;
  attend_params.scores = &scores_;
  const int32_t cu_seqlens_q[2] = {0, kQueries};
  const auto attend = [&] {
    return attn8_kv_cache_attend(cache, &sequence, 1, &q, cu_seqlens_q, &out, nullptr,
                                 &attend_params, nullptr);
  };
  ASSERT_EQ(attend(), ATTN8_OK) << attn8_last_error();
  const std::vector<float> from_pages = out_;
  params_.causal = 0;
  params_.causal_align = ATTN8_BOTTOM_RIGHT;
  params_.q_offset = params_.k_offset = 0;
  ASSERT_EQ(attn8_attention(&q, &k, &v, &out, nullptr, &params_, nullptr), ATTN8_OK)
      << attn8_last_error();
  EXPECT_EQ(from_pages, out_);
  scores_.attn_mask = &mask_tensor_;
  ASSERT_EQ(attend(), ATTN8_OK) << attn8_last_error();
  const std::vector<float> with_mask = out_;
  EXPECT_NE(with_mask, from_pages);
  ASSERT_EQ(attn8_attention(&q, &k, &v, &out, nullptr, &params_, nullptr), ATTN8_OK);
  EXPECT_EQ(with_mask, out_);
  scores_.seqlens_k = &seqlens_tensor_;
  EXPECT_EQ(attend(), ATTN8_INVALID_ARGUMENT);
  EXPECT_EQ(
      std::string(attn8_last_error()),
      "params.scores sets lengths of sequences, wants attn_mask, alibi_slopes and sinks only");
  attn8_kv_cache_destroy(cache);
}

}  // namespace
}  // namespace attn8
