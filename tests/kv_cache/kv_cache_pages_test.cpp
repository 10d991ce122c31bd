// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "attn8/kv_cache.hpp"
#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr int64_t kHeads = 2;
constexpr int64_t kDim = 16;

class KvCachePages : public ::testing::Test {
 protected:
  static KvCache make(int64_t max_pages) {
    Result<KvCache> cache = KvCache::make(
        {.nheads_k = kHeads, .head_dim = kDim, .page_size = 64, .max_pages = max_pages});
    EXPECT_TRUE(cache.ok()) << cache.status().message();
    return cache.value();
  }
  static Tensor tokens(int64_t count, uint64_t seed) {
    Tensor x(DType::kFloat32, {1, count, kHeads, kDim});
    x.fill_normal(seed);
    return x;
  }
  static Status append(KvCache& cache, KvSequence sequence, int64_t count, uint64_t seed) {
    return cache.append(sequence, tokens(count, seed).view(), tokens(count, seed + 1).view(),
                        Context());
  }
  static std::vector<std::byte> attended(const KvCache& cache, KvSequence sequence) {
    const Tensor q = tokens(3, 99);
    Tensor out(DType::kFloat32, q.shape());
    const std::vector<int32_t> cu_seqlens_q = {0, 3};
    const Status status =
        cache.attend({&sequence, 1}, q.view(), cu_seqlens_q, {out.view()}, {}, Context());
    EXPECT_TRUE(status.ok()) << status.message();
    return out.bytes();
  }
  static void expect_refused(const Status& status, StatusCode code, const std::string& message) {
    EXPECT_EQ(to_string(status.code()), to_string(code)) << status.message();
    EXPECT_EQ(status.message(), message);
  }
};

/// Forks share pages until one writes; each sequence keeps its own bits.
TEST_F(KvCachePages, CopyOnWrite) {
  KvCache cache = make(10);
  const KvSequence parent = cache.create().value();
  ASSERT_TRUE(append(cache, parent, 150, 1).ok());
  EXPECT_EQ(cache.usage().pages_used, 3);
  const auto parent_bits = attended(cache, parent);

  const KvSequence whole = cache.fork(parent, 150).value();
  EXPECT_EQ(cache.usage().pages_used, 3);
  EXPECT_EQ(attended(cache, whole), parent_bits);
  ASSERT_TRUE(append(cache, whole, 1, 3).ok());
  EXPECT_EQ(cache.usage().pages_used, 4);
  EXPECT_NE(attended(cache, whole), parent_bits);
  EXPECT_EQ(attended(cache, parent), parent_bits);

  const KvSequence aligned = cache.fork(parent, 128).value();
  EXPECT_EQ(cache.usage().pages_used, 4);
  const KvSequence inside = cache.fork(parent, 100).value();
  EXPECT_EQ(cache.usage().pages_used, 5);
  ASSERT_TRUE(cache.truncate(aligned, 100).ok());  // of its shared second page it takes a copy
  EXPECT_EQ(cache.usage().pages_used, 6);
  EXPECT_EQ(attended(cache, aligned), attended(cache, inside));
  EXPECT_EQ(attended(cache, parent), parent_bits);

  ASSERT_TRUE(cache.free(parent).ok());  // its last page was its alone
  EXPECT_EQ(cache.usage().pages_used, 5);
  const auto whole_bits = attended(cache, whole);
  for (const KvSequence sequence : {aligned, inside}) ASSERT_TRUE(cache.free(sequence).ok());
  EXPECT_EQ(cache.usage().pages_used, 3);
  EXPECT_EQ(attended(cache, whole), whole_bits);
  ASSERT_TRUE(cache.free(whole).ok());
  EXPECT_EQ(cache.usage().bytes_used, 0U);
}

/// A cut and filled again page is like one that never held more.
TEST_F(KvCachePages, TruncatedAndAppendedEqualsDirect) {
  KvCache cache = make(10);
  const KvSequence direct = cache.create().value();
  ASSERT_TRUE(append(cache, direct, 70, 1).ok());
  const KvSequence detour = cache.fork(direct, 70).value();
  ASSERT_TRUE(append(cache, detour, 120, 7).ok());
  ASSERT_TRUE(cache.truncate(detour, 70).ok());
  EXPECT_EQ(attended(cache, detour), attended(cache, direct));
  for (const KvSequence sequence : {direct, detour}) {
    ASSERT_TRUE(append(cache, sequence, 20, 11).ok());
  }
  EXPECT_EQ(attended(cache, detour), attended(cache, direct));
}

TEST_F(KvCachePages, OutOfPagesChangesNothing) {
  KvCache cache = make(3);
  const KvSequence sequence = cache.create().value();
  ASSERT_TRUE(append(cache, sequence, 130, 1).ok());
  const auto bits = attended(cache, sequence);
  expect_refused(append(cache, sequence, 63, 3), StatusCode::kOutOfMemory,
                 "pages free got 0, wants 1");
  expect_refused(cache.fork(sequence, 129).status(), StatusCode::kOutOfMemory,
                 "pages free got 0, wants 1");
  const KvSequence whole = cache.fork(sequence, 130).value();
  expect_refused(append(cache, whole, 1, 3), StatusCode::kOutOfMemory, "pages free got 0, wants 1");
  expect_refused(cache.truncate(whole, 129), StatusCode::kOutOfMemory, "pages free got 0, wants 1");
  EXPECT_EQ(cache.length(sequence).value(), 130);
  EXPECT_EQ(cache.length(whole).value(), 130);
  EXPECT_EQ(attended(cache, sequence), bits);
  EXPECT_EQ(attended(cache, whole), bits);
  EXPECT_EQ(cache.usage().sequences, 2);
  ASSERT_TRUE(cache.free(whole).ok());
  ASSERT_TRUE(append(cache, sequence, 62, 3).ok());
  EXPECT_EQ(cache.usage().pages_free, 0);
}

TEST_F(KvCachePages, RefusesWhatIsWrong) {
  constexpr auto kInvalid = StatusCode::kInvalidArgument;
  expect_refused(KvCache::make({.nheads_k = 0, .head_dim = 8, .max_pages = 1}).status(), kInvalid,
                 "options.nheads_k got 0, wants >= 1");
  expect_refused(KvCache::make({.nheads_k = 1, .head_dim = 257, .max_pages = 1}).status(), kInvalid,
                 "options.head_dim got 257, wants 1 to 256");
  expect_refused(
      KvCache::make({.nheads_k = 1, .head_dim = 8, .page_size = 100, .max_pages = 1}).status(),
      kInvalid, "options.page_size got 100, wants a multiple of 64 in [64, 512]");
  expect_refused(KvCache::make({.nheads_k = 1, .head_dim = 8}).status(), kInvalid,
                 "options.max_pages got 0, wants 1 to 2147483647");
  expect_refused(
      KvCache::make({.nheads_k = int64_t{1} << 40, .head_dim = 8, .max_pages = 1 << 30}).status(),
      kInvalid,
      "options.max_pages=1073741824 of nheads_k=1099511627776 heads asks for over 2^28 blocks");

  KvCache cache = make(4);
  KvCache other = make(4);
  const KvSequence sequence = cache.create().value();
  const KvSequence foreign = other.create().value();
  expect_refused(append(cache, foreign, 1, 1), kInvalid,
                 "sequence " + std::to_string(foreign.id) + " is not of this cache");
  expect_refused(cache.length({sequence.cache, 77}).status(), kInvalid,
                 "sequence 77 is not of this cache");
  expect_refused(cache.length({}).status(), kInvalid, "sequence 0 is not of this cache");
  expect_refused(cache.fork(sequence, 1).status(), kInvalid,
                 "length got 1, wants 0 to 0, the tokens there");
  expect_refused(cache.truncate(sequence, -1), kInvalid,
                 "length got -1, wants 0 to 0, the tokens there");
  const Tensor k = tokens(2, 1);
  const Tensor narrow(DType::kFloat32, {1, 2, kHeads, kDim - 1});
  expect_refused(cache.append(sequence, narrow.view(), narrow.view(), Context()), kInvalid,
                 "k.shape got [1, 2, 2, 15], wants [1, 2, 2, 16], as the cache");
  expect_refused(cache.append(sequence, k.view(), tokens(3, 1).view(), Context()), kInvalid,
                 "v.shape got [1, 3, 2, 16], wants [1, 2, 2, 16], as k");
  const Tensor codes(DType::kInt8, {1, 2, kHeads, kDim});
  expect_refused(cache.append(sequence, codes.view(), codes.view(), Context()), kInvalid,
                 "k.dtype got int8, wants float32, float16 or bfloat16");

  ASSERT_TRUE(append(cache, sequence, 2, 1).ok());
  const Tensor q = tokens(2, 5);
  Tensor out(DType::kFloat32, q.shape());
  const auto attend = [&](KvSequence which, std::vector<int32_t> cu_seqlens_q,
                          const KvCacheAttentionOptions& options = {}) {
    return cache.attend({&which, 1}, q.view(), cu_seqlens_q, {out.view()}, options, Context());
  };
  ASSERT_TRUE(attend(sequence, {0, 2}).ok());
  expect_refused(attend(sequence, {0, 1, 2}), kInvalid, "cu_seqlens_q got 3 entries, wants 2");
  expect_refused(attend(sequence, {}), kInvalid, "cu_seqlens_q got 0 entries, wants 2");
  expect_refused(attend(sequence, {0, 3}), kInvalid,
                 "cu_seqlens_q runs from 0 to 3, wants 0 to q.shape[1]=2");
  const std::vector<KvSequence> three(3, sequence);
  const std::vector<int32_t> falling = {0, 2, 1, 2};
  expect_refused(cache.attend(three, q.view(), falling, {out.view()}, {}, Context()), kInvalid,
                 "cu_seqlens_q[2]=1 wants at least the 2 before it");
  expect_refused(attend(sequence, {0, 2}, {.softmax_scale = INFINITY}), kInvalid,
                 "options.softmax_scale got inf, wants a finite number");
  expect_refused(attend(sequence, {0, 2}, {.mask = {.window_left = -2}}), kInvalid,
                 "options.mask.window_left got -2, wants >= -1");
  expect_refused(attend(foreign, {0, 2}), kInvalid,
                 "sequence " + std::to_string(foreign.id) + " is not of this cache");
  const Tensor odd(DType::kFloat32, {1, 2, 3, kDim});
  const std::vector<int32_t> cu_seqlens_q = {0, 2};
  expect_refused(
      cache.attend({&sequence, 1}, odd.view(), cu_seqlens_q, {out.view()}, {}, Context()), kInvalid,
      "q.shape[2]=3 (nheads_q) wants a multiple of nheads_k=2");
  Tensor in_place = q;
  expect_refused(
      cache.attend({&sequence, 1}, in_place.view(), cu_seqlens_q, {in_place.view()}, {}, Context()),
      kInvalid, "out overlaps q, wants memory of its own");
  ASSERT_TRUE(cache.free(sequence).ok());
  expect_refused(attend(sequence, {0, 2}), kInvalid,
                 "sequence " + std::to_string(sequence.id) + " was freed");
}

TEST_F(KvCachePages, TheStrideOfOneTokenMayBeAnything) {
  KvCache cache = make(4);
  const KvSequence sequence = cache.create().value();
  const Tensor token = tokens(1, 1);
  ConstTensorView view = token.view();
  view.strides[0] = std::numeric_limits<int64_t>::min();
  view.strides[1] = std::numeric_limits<int64_t>::max();
  const Status status = cache.append(sequence, view, view, Context());
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cache.length(sequence).value(), 1);
}

TEST_F(KvCachePages, EmptyBatchesAndSequences) {
  KvCache cache = make(1);
  Tensor none(DType::kFloat32, {1, 0, kHeads, kDim});
  const std::vector<int32_t> start = {0};
  EXPECT_TRUE(cache.attend({}, none.view(), start, {none.view()}, {}, Context()).ok());
  // Heads of nothing, one by one: what they would be apart may be anything.
  TensorView nowhere = none.view();
  nowhere.strides[2] = std::numeric_limits<int64_t>::max();
  const std::vector<Mode> head_modes(kHeads, Mode::kExact);
  EXPECT_TRUE(
      cache.attend({}, nowhere, start, {nowhere}, {.head_modes = head_modes}, Context()).ok());
  const KvSequence sequence = cache.create().value();
  EXPECT_TRUE(cache.append(sequence, none.view(), none.view(), Context()).ok());
  EXPECT_EQ(cache.length(sequence).value(), 0);
  for (const std::byte byte : attended(cache, sequence)) EXPECT_EQ(byte, std::byte{0});
}

/// Readers of a sequence that does not change see the same bits while others write, fork, cut and
/// free sequences that share its pages. For the thread sanitizer too.
TEST_F(KvCachePages, ReadersBesideWriters) {
  KvCache cache = make(40);
  const KvSequence fixed = cache.create().value();
  const KvSequence growing = cache.create().value();
  ASSERT_TRUE(append(cache, fixed, 100, 1).ok());
  ASSERT_TRUE(append(cache, growing, 5, 1).ok());
  const auto bits = attended(cache, fixed);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int reader = 0; reader < 2; ++reader) {
    threads.emplace_back([&] {
      const Tensor q = tokens(4, 99);
      Tensor out(DType::kFloat32, q.shape());
      const std::vector<KvSequence> both = {growing, fixed};
      const std::vector<int32_t> cu_seqlens_q = {0, 1, 4};
      for (int i = 0; i < 60; ++i) {
        if (attended(cache, fixed) != bits) ++wrong;
        if (!cache.attend(both, q.view(), cu_seqlens_q, {out.view()}, {}, Context()).ok()) ++wrong;
      }
    });
  }
  threads.emplace_back([&] {
    for (int i = 0; i < 60; ++i) {
      if (!append(cache, growing, 1 + i % 7, 50).ok()) ++wrong;
      if (i % 10 == 9 && !cache.truncate(growing, 20).ok()) ++wrong;
    }
  });
  for (int writer = 0; writer < 2; ++writer) {
    threads.emplace_back([&] {
      for (int i = 0; i < 40; ++i) {
        const Result<KvSequence> child = cache.fork(fixed, i % 2 == 0 ? 100 : 90);
        if (!child.ok() || !append(cache, child.value(), 30, 70).ok() ||
            !cache.truncate(child.value(), 70).ok() || !cache.free(child.value()).ok()) {
          ++wrong;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(attended(cache, fixed), bits);
  EXPECT_EQ(cache.usage().sequences, 2);
}

}  // namespace
}  // namespace attn8::testing
