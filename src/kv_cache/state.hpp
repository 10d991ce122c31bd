// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "attn8/kv_cache.hpp"
#include "kv_cache/page_pool.hpp"

namespace attn8 {
namespace kv_cache {

/// One sequence; gives its pages back when it goes.
struct Sequence {
  explicit Sequence(PagePool& page_pool) noexcept : pool(page_pool) {}
  ~Sequence() { pool.release(pages.data(), static_cast<int64_t>(pages.size())); }
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  /// Of everything below and of what the pages hold up to `length`. Shared pages are written by
  /// nobody.
  mutable std::shared_mutex mutex;
  PagePool& pool;
  bool freed = false;  ///< for those who found the sequence before it was freed
  int64_t length = 0;
  std::vector<int32_t> pages;
  std::vector<float> k_mean;  ///< [nheads_k][head_dim]; empty where nothing is subtracted
};

}  // namespace kv_cache

/// Locks are taken in the order: sequences by address, then `mutex` or the pool's.
struct KvCache::State {
  explicit State(const KvCacheOptions& the_options);

  /// The sequence, or kInvalidArgument naming it.
  Status find(KvSequence sequence, std::shared_ptr<kv_cache::Sequence>& found) const;
  /// Throws std::bad_alloc.
  KvSequence add(std::shared_ptr<kv_cache::Sequence> sequence);

  /// head_dim of what the pages hold: the shorter of K and V ends in zeros.
  [[nodiscard]] int64_t packed_dim() const noexcept {
    return std::max(options.head_dim, options.head_dim_v);
  }

  const KvCacheOptions options;  ///< head_dim_v resolved
  const KernelTable& table;      ///< of this machine's best ISA; what it packs depends on none
  const uint64_t id;             ///< of the cache, unlike that of any other in the process
  kv_cache::PagePool pool;
  mutable std::mutex mutex;  ///< of the members below
  std::unordered_map<uint64_t, std::shared_ptr<kv_cache::Sequence>> sequences;
  uint64_t next_sequence = 1;
};

namespace kv_cache {

/// A sequence that was freed between find() and its lock.
Status freed_error(KvSequence sequence) noexcept;
Status out_of_pages(int64_t wanted, int64_t free_pages) noexcept;

}  // namespace kv_cache
}  // namespace attn8
