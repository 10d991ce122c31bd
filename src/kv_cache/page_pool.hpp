// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/pack.hpp"

namespace attn8::kv_cache {

/// What a call wants of each block before it computes, apart from the blocks: those of all heads of
/// a page fit into two cache lines, where their headers lie kilobytes apart.
struct BlockSummary {
  float v_scale;  ///< of its BlockHeader, like the others
  float key_norm;
  bool poisoned;
};

/// One kv head of a page: a packed kv block, and what appending to it takes.
struct PageBlock {
  cpu::BlockMemory memory;
  /// [page_size] V scale of each token, 0 for one of zero codes; times its codes it gives V.
  float* v_scale;
  BlockSummary* summary;
};

/// The memory of all pages, and how many sequences use each. Blocks of all pages lie in one
/// allocation and their headers in another. Thread-safe; what the pages hold is for those who use
/// them to order.
class PagePool {
 public:
  /// Throws std::bad_alloc.
  PagePool(int64_t pages, int64_t page_size, int64_t heads, int64_t head_dim);

  /// Appends `count` pages, each used once, to `pages`; false and nothing done when fewer are free
  /// or `pages` has no capacity for them.
  bool take(int64_t count, std::vector<int32_t>& pages) noexcept;
  /// One more user of each page.
  void share(const int32_t* pages, int64_t count) noexcept;
  /// One user less.
  void release(const int32_t* pages, int64_t count) noexcept;
  [[nodiscard]] bool is_shared(int32_t page) const noexcept;
  [[nodiscard]] int64_t free_pages() const noexcept;
  [[nodiscard]] int64_t pages() const noexcept { return static_cast<int64_t>(users_.size()); }
  [[nodiscard]] size_t bytes_per_page() const noexcept;

  [[nodiscard]] BlockSummary& summary(int32_t page, int64_t head) const noexcept {
    return reinterpret_cast<BlockSummary*>(summaries_.get())[page * heads_ + head];
  }
  [[nodiscard]] PageBlock block(int32_t page, int64_t head) const noexcept;
  /// All heads.
  void copy(int32_t from, int32_t to) const noexcept;
  [[nodiscard]] const BlockLayout& layout() const noexcept { return layout_; }

 private:
  struct Free {
    void operator()(std::byte* p) const noexcept;
  };
  using Memory = std::unique_ptr<std::byte, Free>;
  static Memory allocate(size_t bytes);

  const int64_t heads_;
  const BlockLayout layout_;
  const size_t header_bytes_;  ///< of a block, its V scales included
  Memory data_;                ///< [page][head]
  Memory headers_;             ///< [page][head]
  Memory summaries_;           ///< BlockSummary [page][head]
  mutable std::mutex mutex_;
  std::vector<int32_t> users_;  ///< [page]
  std::vector<int32_t> free_;   ///< the next one to take is last
};

}  // namespace attn8::kv_cache
