// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// KvCache::append() of several sequences in one call.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "attn8/kv_cache.hpp"
#include "support/tensors.hpp"

namespace attn8::testing {
namespace {

constexpr int64_t kHeads = 2;
constexpr int64_t kDim = 24;
constexpr int64_t kPageSize = 64;

Tensor tokens(int64_t count, uint64_t seed) {
  Tensor x(DType::kFloat32, {1, count, kHeads, kDim});
  x.fill_normal(seed);
  return x;
}

struct Cache {
  KvCache cache;
  std::vector<KvSequence> sequences;

  Cache(int64_t max_pages, size_t count)
      : cache(KvCache::make({.nheads_k = kHeads,
                             .head_dim = kDim,
                             .page_size = kPageSize,
                             .max_pages = max_pages})
                  .value()) {
    for (size_t i = 0; i < count; ++i) sequences.push_back(cache.create().value());
  }
  [[nodiscard]] std::vector<int64_t> lengths() const {
    std::vector<int64_t> all;
    for (const KvSequence sequence : sequences) all.push_back(cache.length(sequence).value());
    return all;
  }
  /// Two queries of every sequence, causal.
  [[nodiscard]] std::vector<std::byte> attended() const {
    const auto count = static_cast<int64_t>(sequences.size());
    Tensor q(DType::kFloat32, {1, 2 * count, kHeads, kDim});
    q.fill_normal(99);
    Tensor out = q;
    std::vector<int32_t> cu_seqlens_q;
    for (int32_t i = 0; i <= count; ++i) cu_seqlens_q.push_back(2 * i);
    const Status status = cache.attend(sequences, std::as_const(q).view(), cu_seqlens_q,
                                       {out.view()}, {.mask = {.causal = true}}, Context::cpu(1));
    EXPECT_TRUE(status.ok()) << status.message();
    return out.bytes();
  }
  Status append(const std::vector<int32_t>& cu_seqlens, uint64_t seed, const Context& context) {
    const Tensor k = tokens(cu_seqlens.back(), seed);
    const Tensor v = tokens(cu_seqlens.back(), seed + 1);
    return cache.append(sequences, k.view(), v.view(), cu_seqlens, context);
  }
  /// The same, one call for each sequence.
  void append_each(const std::vector<int32_t>& cu_seqlens, uint64_t seed) {
    const Tensor k = tokens(cu_seqlens.back(), seed);
    const Tensor v = tokens(cu_seqlens.back(), seed + 1);
    for (size_t i = 0; i < sequences.size(); ++i) {
      const int64_t count = cu_seqlens[i + 1] - cu_seqlens[i];
      const Status status =
          cache.append(sequences[i], stretch(k.view(), 1, cu_seqlens[i], count),
                       stretch(v.view(), 1, cu_seqlens[i], count), Context::cpu(1));
      ASSERT_TRUE(status.ok()) << status.message();
    }
  }
};

/// Prompts, chunks and single tokens, into pages that are empty, half full and full.
const std::vector<std::vector<int32_t>> kSteps = {{0, 100, 100, 164, 165, 300},
                                                  {0, 1, 2, 3, 4, 5},
                                                  {0, 0, 0, 0, 0, 0},
                                                  {0, 27, 28, 120, 120, 121},
                                                  {0, 1, 65, 66, 67, 68}};

TEST(AppendBatch, IsAnAppendToEach) {
  for (const int32_t threads : {1, 3}) {
    Cache batch(64, 5);
    Cache each(64, 5);
    uint64_t seed = 10;
    for (const std::vector<int32_t>& step : kSteps) {
      const Status status = batch.append(step, seed, Context::cpu(threads));
      ASSERT_TRUE(status.ok()) << status.message();
      each.append_each(step, seed);
      ASSERT_EQ(batch.lengths(), each.lengths());
      ASSERT_EQ(batch.attended(), each.attended());
      ASSERT_EQ(batch.cache.usage().pages_used, each.cache.usage().pages_used);
      seed += 2;
    }
  }
}

/// Forks of one sequence write into the page that they share: each gets its own.
TEST(AppendBatch, ForksOfOneAnother) {
  Cache batch(16, 1);
  Cache each(16, 1);
  for (Cache* cache : {&batch, &each}) {
    ASSERT_TRUE(cache->append({0, 70}, 1, Context::cpu(1)).ok());
    for (int i = 0; i < 2; ++i) {
      cache->sequences.push_back(cache->cache.fork(cache->sequences[0], 70).value());
    }
  }
  ASSERT_EQ(batch.cache.usage().pages_used, 2);
  ASSERT_TRUE(batch.append({0, 1, 2, 3}, 5, Context::cpu(2)).ok());
  each.append_each({0, 1, 2, 3}, 5);
  EXPECT_EQ(batch.attended(), each.attended());
  EXPECT_EQ(batch.cache.usage().pages_used, 4);
  EXPECT_EQ(each.cache.usage().pages_used, 4);
}

TEST(AppendBatch, ARefusedOneChangesNothing) {
  Cache cache(5, 3);
  ASSERT_TRUE(cache.append({0, 64, 128, 130}, 1, Context::cpu(1)).ok());
  const std::vector<std::byte> before = cache.attended();
  const auto expect_refused = [&](const Status& status, StatusCode code,
                                  const std::string& message) {
    EXPECT_EQ(to_string(status.code()), to_string(code));
    EXPECT_EQ(status.message(), message);
    EXPECT_EQ(cache.lengths(), (std::vector<int64_t>{64, 64, 2}));
    EXPECT_EQ(cache.cache.usage().pages_used, 3);
    EXPECT_EQ(cache.attended(), before);
  };
  // Two pages are free; three are wanted.
  expect_refused(cache.append({0, 1, 2, 65}, 3, Context::cpu(1)), StatusCode::kOutOfMemory,
                 "pages free got 2, wants 3");
  const Tensor k = tokens(3, 7);
  const auto append = [&](const std::vector<KvSequence>& sequences,
                          const std::vector<int32_t>& cu_seqlens) {
    return cache.cache.append(sequences, k.view(), k.view(), cu_seqlens, Context::cpu(1));
  };
  const std::vector<KvSequence>& all = cache.sequences;
  expect_refused(append({all[0], all[1], all[0]}, {0, 1, 2, 3}), StatusCode::kInvalidArgument,
                 "sequences holds sequence 1 twice, wants it once");
  expect_refused(append({all[0], all[1], {}}, {0, 1, 2, 3}), StatusCode::kInvalidArgument,
                 "sequence 0 is not of this cache");
  expect_refused(append(all, {0, 1, 2}), StatusCode::kInvalidArgument,
                 "cu_seqlens got 3 entries, wants 4");
  expect_refused(append(all, {0, 1, 2, 2}), StatusCode::kInvalidArgument,
                 "cu_seqlens runs from 0 to 2, wants 0 to k.shape[1]=3");
  expect_refused(append(all, {0, 2, 1, 3}), StatusCode::kInvalidArgument,
                 "cu_seqlens[2]=1 wants at least the 2 before it");
  const KvSequence gone = cache.cache.create().value();
  ASSERT_TRUE(cache.cache.free(gone).ok());
  expect_refused(append({all[0], gone, all[2]}, {0, 1, 2, 3}), StatusCode::kInvalidArgument,
                 "sequence 4 was freed");
  Tensor narrow(DType::kFloat32, {1, 3, kHeads, kDim - 1});
  const Status status = cache.cache.append(all, k.view(), std::as_const(narrow).view(),
                                           std::vector<int32_t>{0, 1, 2, 3}, Context::cpu(1));
  EXPECT_EQ(to_string(status.code()), to_string(StatusCode::kInvalidArgument));
  EXPECT_EQ(cache.attended(), before);
}

TEST(AppendBatch, OfNoSequences) {
  Cache cache(1, 0);
  EXPECT_TRUE(cache.append({0}, 1, Context::cpu(1)).ok());
}

/// Two writers whose batches name the same sequences in opposite orders, and a reader: nobody waits
/// for ever, and no token is lost.
TEST(AppendBatch, BesideOthers) {
  constexpr int kRounds = 60;
  Cache cache(256, 4);
  const auto write = [&](bool reversed) {
    std::vector<KvSequence> sequences = cache.sequences;
    if (reversed) std::ranges::reverse(sequences);
    const Tensor k = tokens(4, reversed ? 1 : 2);
    const std::vector<int32_t> cu_seqlens = {0, 1, 2, 3, 4};
    for (int i = 0; i < kRounds; ++i) {
      EXPECT_TRUE(
          cache.cache.append(sequences, k.view(), k.view(), cu_seqlens, Context::cpu(1)).ok());
    }
  };
  std::thread forward(write, false);
  std::thread backward(write, true);
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(cache.attended().empty());
  forward.join();
  backward.join();
  EXPECT_EQ(cache.lengths(), std::vector<int64_t>(4, 2 * kRounds));
}

}  // namespace
}  // namespace attn8::testing
