// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The KV cache of attn8.h against the shared library: the results of the C++ API, and every
// argument that is wrong.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attn8/attn8.h"
#include "attn8/attn8.hpp"
#include "attn8/kv_cache.hpp"

namespace attn8::testing {
namespace {

constexpr int64_t kHeads = 2, kDim = 8, kPage = 64;

void expect_refused(attn8_status got, attn8_status want, const std::string& message) {
  EXPECT_EQ(got, want);
  EXPECT_EQ(attn8_last_error(), message);
}
void expect_invalid(attn8_status got, const std::string& message) {
  expect_refused(got, ATTN8_INVALID_ARGUMENT, message);
}

struct Destroy {
  void operator()(attn8_kv_cache* cache) const { attn8_kv_cache_destroy(cache); }
};
using Cache = std::unique_ptr<attn8_kv_cache, Destroy>;

attn8_kv_cache_params cache_params(int64_t max_pages) {
  attn8_kv_cache_params params;
  EXPECT_EQ(attn8_kv_cache_params_init(&params, sizeof params), ATTN8_OK);
  EXPECT_EQ(params.page_size, 256);
  EXPECT_EQ(params.smooth_k, 1);
  params.nheads_k = kHeads;
  params.head_dim = kDim;
  params.page_size = kPage;
  params.max_pages = max_pages;
  return params;
}

Cache make_cache(int64_t max_pages) {
  const attn8_kv_cache_params params = cache_params(max_pages);
  attn8_kv_cache* cache = nullptr;
  EXPECT_EQ(attn8_kv_cache_create(&params, &cache), ATTN8_OK) << attn8_last_error();
  return Cache(cache);
}

attn8_kv_sequence create(const Cache& cache) {
  attn8_kv_sequence sequence = {};
  EXPECT_EQ(attn8_kv_sequence_create(cache.get(), &sequence), ATTN8_OK) << attn8_last_error();
  EXPECT_NE(sequence.id, 0U);
  return sequence;
}

/// [1, seq, heads, dim] float32 with its memory.
struct Floats {
  Floats(int64_t seq, int64_t heads, int64_t dim, int seed)
      : data(static_cast<size_t>(seq * heads * dim)), shape{1, seq, heads, dim} {
    for (size_t i = 0; i < data.size(); ++i) {
      data[i] = static_cast<float>((i * 37 + static_cast<size_t>(seed) * 11) % 23) / 11 - 1;
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

attn8_status append(const Cache& cache, attn8_kv_sequence sequence, int64_t tokens) {
  const Floats k(tokens, kHeads, kDim, 1);
  const Floats v(tokens, kHeads, kDim, 2);
  return attn8_kv_sequence_append(cache.get(), sequence, &k.tensor, &v.tensor, nullptr);
}

int64_t length_of(const Cache& cache, attn8_kv_sequence sequence) {
  int64_t length = -1;
  EXPECT_EQ(attn8_kv_sequence_length(cache.get(), sequence, &length), ATTN8_OK);
  return length;
}

attn8_kv_cache_usage usage_of(const Cache& cache) {
  attn8_kv_cache_usage usage = {};
  usage.struct_size = sizeof usage;
  EXPECT_EQ(attn8_kv_cache_get_usage(cache.get(), &usage), ATTN8_OK);
  return usage;
}

TEST(KvCacheCApi, AppendToSeveral) {
  const Cache cache = make_cache(8);
  const attn8_kv_sequence a = create(cache);
  const attn8_kv_sequence b = create(cache);
  const std::vector<attn8_kv_sequence> both = {a, b};
  const Floats k(50, kHeads, kDim, 3);
  const Floats v(50, kHeads, kDim, 4);
  const std::vector<int32_t> cu_seqlens = {0, 13, 50};
  const auto append_both = [&](const attn8_kv_sequence* sequences, const attn8_tensor* k_tensor,
                               const int32_t* starts) {
    return attn8_kv_cache_append(cache.get(), sequences, 2, k_tensor, &v.tensor, starts, nullptr);
  };
  ASSERT_EQ(append_both(both.data(), &k.tensor, cu_seqlens.data()), ATTN8_OK) << attn8_last_error();
  EXPECT_EQ(length_of(cache, a), 13);
  EXPECT_EQ(length_of(cache, b), 37);
  expect_invalid(append_both(nullptr, &k.tensor, cu_seqlens.data()), "sequences got NULL");
  expect_invalid(append_both(both.data(), nullptr, cu_seqlens.data()), "k got NULL");
  expect_invalid(append_both(both.data(), &k.tensor, nullptr), "cu_seqlens got NULL");
  const std::vector<attn8_kv_sequence> twice = {a, a};
  expect_invalid(append_both(twice.data(), &k.tensor, cu_seqlens.data()),
                 "sequences holds sequence " + std::to_string(a.id) + " twice, wants it once");
  expect_invalid(attn8_kv_cache_append(nullptr, both.data(), 2, &k.tensor, &v.tensor,
                                       cu_seqlens.data(), nullptr),
                 "cache got NULL");
  EXPECT_EQ(length_of(cache, a), 13);
  EXPECT_EQ(length_of(cache, b), 37);
}

TEST(KvCacheCApi, SameAsTheCppApi) {
  const Cache cache = make_cache(8);
  KvCache direct =
      KvCache::make({.nheads_k = kHeads, .head_dim = kDim, .page_size = kPage, .max_pages = 8})
          .value();
  const attn8_kv_sequence a = create(cache);
  const KvSequence direct_a = direct.create().value();
  Floats k(100, kHeads, kDim, 3);
  Floats v(100, kHeads, kDim, 4);
  ASSERT_EQ(attn8_kv_sequence_append(cache.get(), a, &k.tensor, &v.tensor, nullptr), ATTN8_OK);
  ASSERT_TRUE(direct.append(direct_a, k.view(), v.view(), Context()).ok());
  attn8_kv_sequence b = {};
  ASSERT_EQ(attn8_kv_sequence_fork(cache.get(), a, 70, &b), ATTN8_OK);
  const KvSequence direct_b = direct.fork(direct_a, 70).value();
  ASSERT_EQ(attn8_kv_sequence_truncate(cache.get(), a, 90), ATTN8_OK);
  ASSERT_TRUE(direct.truncate(direct_a, 90).ok());
  EXPECT_EQ(length_of(cache, a), 90);
  EXPECT_EQ(length_of(cache, b), 70);

  const attn8_kv_cache_usage usage = usage_of(cache);
  const KvCacheUsage direct_usage = direct.usage();
  EXPECT_EQ(usage.sequences, direct_usage.sequences);
  EXPECT_EQ(usage.pages_used, direct_usage.pages_used);
  EXPECT_EQ(usage.pages_free, direct_usage.pages_free);
  EXPECT_EQ(usage.bytes_used, direct_usage.bytes_used);
  EXPECT_EQ(usage.bytes_per_page, direct_usage.bytes_per_page);

  Floats q(5, 4, kDim, 5);
  Floats out(5, 4, kDim, 0), lse(5, 4, 1, 0), direct_out(5, 4, kDim, 0), direct_lse(5, 4, 1, 0);
  const attn8_kv_sequence both[] = {a, b};
  const KvSequence direct_both[] = {direct_a, direct_b};
  const std::vector<int32_t> cu_seqlens_q = {0, 4, 5};
  attn8_kv_attention_params params;
  ASSERT_EQ(attn8_kv_attention_params_init(&params, sizeof params), ATTN8_OK);
  params.has_softmax_scale = 1;
  params.softmax_scale = 0.25F;
  params.causal = 1;
  params.causal_align = ATTN8_TOP_LEFT;
  params.window_left = 2;
  params.window_right = 1;
  ASSERT_EQ(attn8_kv_cache_attend(cache.get(), both, 2, &q.tensor, cu_seqlens_q.data(), &out.tensor,
                                  &lse.tensor, &params, nullptr),
            ATTN8_OK)
      << attn8_last_error();
  const KvCacheAttentionOptions options = {.softmax_scale = 0.25F,
                                           .mask = {true, CausalAlign::kTopLeft, 2, 1}};
  ASSERT_TRUE(direct
                  .attend(direct_both, q.view(), cu_seqlens_q,
                          {direct_out.view(), direct_lse.view()}, options, Context())
                  .ok());
  EXPECT_EQ(out.data, direct_out.data);
  EXPECT_EQ(lse.data, direct_lse.data);
  // Without params: the defaults, which give something else; without lse too.
  ASSERT_EQ(attn8_kv_cache_attend(cache.get(), both, 2, &q.tensor, cu_seqlens_q.data(), &out.tensor,
                                  nullptr, nullptr, nullptr),
            ATTN8_OK);
  EXPECT_NE(out.data, direct_out.data);

  for (const attn8_kv_sequence sequence : both) {
    EXPECT_EQ(attn8_kv_sequence_free(cache.get(), sequence), ATTN8_OK);
  }
  EXPECT_EQ(usage_of(cache).pages_used, 0);
}

/// Modes, a mode per head, attn_mask and a head_dim of V arrive.
TEST(KvCacheCApi, ModesMaskAndHeadDimOfV) {
  constexpr int64_t kDimV = 20;
  attn8_kv_cache_params cache_options = cache_params(4);
  cache_options.head_dim_v = kDimV;
  attn8_kv_cache* made = nullptr;
  ASSERT_EQ(attn8_kv_cache_create(&cache_options, &made), ATTN8_OK) << attn8_last_error();
  const Cache cache(made);
  KvCache direct = KvCache::make({.nheads_k = kHeads,
                                  .head_dim = kDim,
                                  .head_dim_v = kDimV,
                                  .page_size = kPage,
                                  .max_pages = 4})
                       .value();
  const attn8_kv_sequence a = create(cache);
  const KvSequence direct_a = direct.create().value();
  Floats k(90, kHeads, kDim, 3), v(90, kHeads, kDimV, 4), q(2, 4, kDim, 5), mask(1, 1, 90, 6);
  ASSERT_EQ(attn8_kv_sequence_append(cache.get(), a, &k.tensor, &v.tensor, nullptr), ATTN8_OK)
      << attn8_last_error();
  ASSERT_TRUE(direct.append(direct_a, k.view(), v.view(), Context()).ok());

  attn8_score_operands scores;
  ASSERT_EQ(attn8_score_operands_init(&scores, sizeof scores), ATTN8_OK);
  scores.attn_mask = &mask.tensor;
  attn8_kv_attention_params params;
  ASSERT_EQ(attn8_kv_attention_params_init(&params, sizeof params), ATTN8_OK);
  params.scores = &scores;
  KvCacheAttentionOptions options;
  options.attn_mask = mask.view();
  const std::vector<int32_t> cu_seqlens_q = {0, 2};
  const auto expect_same = [&] {
    Floats out(2, 4, kDimV, 1), want(2, 4, kDimV, 2);
    ASSERT_EQ(attn8_kv_cache_attend(cache.get(), &a, 1, &q.tensor, cu_seqlens_q.data(), &out.tensor,
                                    nullptr, &params, nullptr),
              ATTN8_OK)
        << attn8_last_error();
    const Status status =
        direct.attend({&direct_a, 1}, q.view(), cu_seqlens_q, {want.view()}, options, Context());
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(out.data, want.data);
  };
  const auto expect_wrong = [&](attn8_status code, const std::string& message) {
    Floats out(2, 4, kDimV, 1);
    expect_refused(attn8_kv_cache_attend(cache.get(), &a, 1, &q.tensor, cu_seqlens_q.data(),
                                         &out.tensor, nullptr, &params, nullptr),
                   code, message);
  };
  expect_same();
  params.mode = ATTN8_EXACT;
  options.mode = Mode::kExact;
  expect_same();
  const std::vector<int32_t> modes = {ATTN8_ACCURATE, ATTN8_HALF};
  const std::vector<Mode> direct_modes = {Mode::kAccurate, Mode::kHalf};
  params.head_modes = modes.data();
  params.head_modes_count = 2;
  options.head_modes = direct_modes;
  expect_same();
  params.head_modes_count = 3;
  expect_wrong(ATTN8_INVALID_ARGUMENT, "options.head_modes got 3 modes, wants nheads_k=2");
  params.head_modes_count = 0;
  params.mode = ATTN8_PAPER;
  expect_wrong(ATTN8_UNSUPPORTED,
               "options.mode got paper, a cache of INT8 tokens wants accurate, half or exact");
  params.mode = -1;
  expect_wrong(ATTN8_INVALID_ARGUMENT, "options.mode is not a value of attn8::Mode");
  params.mode = ATTN8_ACCURATE;
  mask.tensor.shape[3] = 89;
  expect_wrong(ATTN8_INVALID_ARGUMENT,
               "attn_mask.shape[3]=89 wants 1 or at least 90, the tokens of the longest sequence");
  params.reserved = 1;
  expect_wrong(ATTN8_INVALID_ARGUMENT, "params.reserved got 1, wants 0");
}

TEST(KvCacheCApi, OutOfPagesChangesNothing) {
  const Cache cache = make_cache(2);
  const attn8_kv_sequence a = create(cache);
  ASSERT_EQ(append(cache, a, 100), ATTN8_OK);
  expect_refused(append(cache, a, 29), ATTN8_OUT_OF_MEMORY, "pages free got 0, wants 1");
  attn8_kv_sequence b = {1, 1};
  expect_refused(attn8_kv_sequence_fork(cache.get(), a, 99, &b), ATTN8_OUT_OF_MEMORY,
                 "pages free got 0, wants 1");
  EXPECT_EQ(b.id, 0U);
  EXPECT_EQ(length_of(cache, a), 100);
  EXPECT_EQ(usage_of(cache).sequences, 1);
}

TEST(KvCacheCApi, RefusesWhatIsWrong) {
  const Cache cache = make_cache(4);
  const Cache other = make_cache(1);
  const attn8_kv_sequence sequence = create(cache);
  const attn8_kv_sequence foreign = create(other);
  ASSERT_EQ(append(cache, sequence, 3), ATTN8_OK);
  attn8_kv_sequence made = {};
  int64_t length = 0;
  const Floats token(1, kHeads, kDim, 1);
  Floats out(1, kHeads, kDim, 1);

  expect_invalid(attn8_kv_sequence_create(nullptr, &made), "cache got NULL");
  expect_invalid(attn8_kv_sequence_create(cache.get(), nullptr), "sequence got NULL");
  expect_invalid(attn8_kv_sequence_fork(nullptr, sequence, 1, &made), "cache got NULL");
  expect_invalid(attn8_kv_sequence_fork(cache.get(), sequence, 1, nullptr), "sequence got NULL");
  expect_invalid(attn8_kv_sequence_fork(cache.get(), sequence, 4, &made),
                 "length got 4, wants 0 to 3, the tokens there");
  expect_invalid(attn8_kv_sequence_append(nullptr, sequence, &token.tensor, &token.tensor, nullptr),
                 "cache got NULL");
  expect_invalid(attn8_kv_sequence_append(cache.get(), sequence, nullptr, &token.tensor, nullptr),
                 "k got NULL");
  expect_invalid(attn8_kv_sequence_append(cache.get(), sequence, &token.tensor, nullptr, nullptr),
                 "v got NULL");
  expect_invalid(attn8_kv_sequence_truncate(nullptr, sequence, 0), "cache got NULL");
  expect_invalid(attn8_kv_sequence_truncate(cache.get(), sequence, -1),
                 "length got -1, wants 0 to 3, the tokens there");
  expect_invalid(attn8_kv_sequence_free(nullptr, sequence), "cache got NULL");
  expect_invalid(attn8_kv_sequence_length(nullptr, sequence, &length), "cache got NULL");
  expect_invalid(attn8_kv_sequence_length(cache.get(), sequence, nullptr), "length got NULL");
  expect_invalid(attn8_kv_cache_get_usage(cache.get(), nullptr), "usage got NULL");
  const std::string not_here = "sequence " + std::to_string(foreign.id) + " is not of this cache";
  expect_invalid(attn8_kv_sequence_length(cache.get(), foreign, &length), not_here);
  expect_invalid(attn8_kv_sequence_free(cache.get(), foreign), not_here);
  expect_invalid(attn8_kv_sequence_truncate(cache.get(), {0, 0}, 0),
                 "sequence 0 is not of this cache");

  const std::vector<int32_t> cu_seqlens_q = {0, 1};
  const auto attend = [&](const attn8_kv_sequence* sequences, const int32_t* cu,
                          const attn8_tensor* q, const attn8_tensor* into,
                          const attn8_kv_attention_params* params) {
    return attn8_kv_cache_attend(cache.get(), sequences, 1, q, cu, into, nullptr, params, nullptr);
  };
  const int32_t* cu = cu_seqlens_q.data();
  expect_invalid(attend(nullptr, cu, &token.tensor, &out.tensor, nullptr), "sequences got NULL");
  expect_invalid(attend(&sequence, nullptr, &token.tensor, &out.tensor, nullptr),
                 "cu_seqlens_q got NULL");
  expect_invalid(attend(&sequence, cu, nullptr, &out.tensor, nullptr), "q got NULL");
  expect_invalid(attend(&sequence, cu, &token.tensor, nullptr, nullptr), "out got NULL");
  expect_invalid(attend(&foreign, cu, &token.tensor, &out.tensor, nullptr), not_here);
  attn8_kv_attention_params params;
  ASSERT_EQ(attn8_kv_attention_params_init(&params, sizeof params), ATTN8_OK);
  params.causal_align = -1;
  expect_invalid(attend(&sequence, cu, &token.tensor, &out.tensor, &params),
                 "options.mask.align is not a value of attn8::CausalAlign");
  params.causal_align = 0;
  params.softcap = -3;
  expect_invalid(attend(&sequence, cu, &token.tensor, &out.tensor, &params),
                 "options.softcap got -3.000000, wants 0 or 2^-20 to 2^20");
  EXPECT_EQ(length_of(cache, sequence), 3);
  ASSERT_EQ(attn8_kv_sequence_free(cache.get(), sequence), ATTN8_OK);
  expect_invalid(attend(&sequence, cu, &token.tensor, &out.tensor, nullptr),
                 "sequence " + std::to_string(sequence.id) + " was freed");

  attn8_kv_cache* none = cache.get();
  expect_invalid(attn8_kv_cache_create(nullptr, &none), "params got NULL");
  EXPECT_EQ(none, nullptr);
  attn8_kv_cache_params wrong = cache_params(4);
  expect_invalid(attn8_kv_cache_create(&wrong, nullptr), "cache got NULL");
  wrong.reserved = 1;
  expect_invalid(attn8_kv_cache_create(&wrong, &none), "params.reserved got 1, wants 0");
  wrong = cache_params(0);
  expect_invalid(attn8_kv_cache_create(&wrong, &none),
                 "options.max_pages got 0, wants 1 to 2147483647");
  attn8_kv_cache_destroy(nullptr);
}

/// Smaller structs, of an older header, have defaults for the rest; larger ones are read while what
/// is beyond is 0.
TEST(KvCacheCApi, StructsOfOtherSizes) {
  struct Larger {
    attn8_kv_cache_params params;
    uint64_t beyond;
  } larger = {cache_params(4), 0};
  larger.params.struct_size = sizeof larger;
  attn8_kv_cache* cache = nullptr;
  ASSERT_EQ(attn8_kv_cache_create(&larger.params, &cache), ATTN8_OK) << attn8_last_error();
  const Cache owner(cache);
  larger.beyond = 1;
  expect_refused(attn8_kv_cache_create(&larger.params, &cache), ATTN8_UNSUPPORTED,
                 "params sets a field at byte " + std::to_string(sizeof larger.params) +
                     " that version " + std::string(attn8_version()) + " does not have");
  attn8_kv_cache_params smaller = cache_params(4);
  smaller.struct_size = 32;
  smaller.smooth_k = -77;  // beyond its size: not read
  smaller.reserved = 5;
  ASSERT_EQ(attn8_kv_cache_create(&smaller, &cache), ATTN8_OK) << attn8_last_error();
  attn8_kv_cache_destroy(cache);
  smaller.struct_size = 12;
  expect_invalid(attn8_kv_cache_create(&smaller, &cache),
                 "params.struct_size got 12, wants a multiple of 8 in [8, 4096]");

  attn8_kv_cache_usage usage;
  std::memset(&usage, 0x77, sizeof usage);
  usage.struct_size = 24;
  ASSERT_EQ(attn8_kv_cache_get_usage(owner.get(), &usage), ATTN8_OK);
  EXPECT_EQ(usage.sequences, 0);
  EXPECT_EQ(usage.pages_used, 0);
  EXPECT_EQ(usage.pages_free, 0x7777777777777777);  // beyond its size: not written
  usage.struct_size = 4;
  expect_invalid(attn8_kv_cache_get_usage(owner.get(), &usage),
                 "usage.struct_size got 4, wants a multiple of 8 in [8, 4096]");
}

}  // namespace
}  // namespace attn8::testing
