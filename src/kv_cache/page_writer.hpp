// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>

#include "attn8/kv_cache.hpp"
#include "attn8/tensor.hpp"
#include "core/kernel_table.hpp"
#include "kv_cache/page_pool.hpp"

namespace attn8::kv_cache {

/// Writes the tokens of one kv head into pages.
class PageWriter {
 public:
  PageWriter(const KernelTable& table, const KvCacheOptions& options) noexcept
      : table_(table),
        page_size_(options.page_size),
        dim_(static_cast<int>(options.head_dim)),
        dim_v_(static_cast<int>(options.head_dim_v)),
        padded_(static_cast<int>(padded_dim(std::max(options.head_dim, options.head_dim_v)))) {}

  /// Quantizes rows [first, first + count) of kv head `head` of k and v, as KvCache::append() has
  /// them, behind the `filled` tokens of a page. k_mean [head_dim] is subtracted, or nullptr.
  void append(const PageBlock& block, int64_t filled, const ConstTensorView& k,
              const ConstTensorView& v, int64_t head, int64_t first, int64_t count,
              const float* k_mean) const noexcept;

  /// Keeps the first `kept` (at least 1) of the `filled` tokens of a page.
  void truncate(const PageBlock& block, int64_t filled, int64_t kept) const noexcept;

 private:
  /// Where the codes of appended token `key` wait until every scale of the page is known: those of
  /// new groups row by row in the place that they are packed into, others in `partial`.
  int8_t* staged_v(const PageBlock& block, int64_t filled, int64_t key,
                   int8_t* partial) const noexcept;
  /// Codes of V tokens from `key` on, padded_ apart, and their scales.
  void encode_v(const PageBlock& block, const RowSpan& rows, int64_t key,
                int8_t* codes) const noexcept;
  /// Codes of at most 64 K tokens, and what their record holds as scales.
  void encode_k(const PageBlock& block, const RowSpan& rows, int64_t key, const float* k_mean,
                int8_t* codes, float* k_scale) const noexcept;
  /// The fold of a token relative to the page's largest scale; codes that are too small for it are
  /// rounded again.
  void fold_v(const PageBlock& block, int64_t key, int8_t* codes) const noexcept;
  void set_block_scale(const PageBlock& block, int64_t filled, int64_t keys,
                       int64_t* sums) const noexcept;
  void write_k(const PageBlock& block, int64_t key, const int8_t* codes,
               float k_scale) const noexcept;
  void write_v(const PageBlock& block, int64_t key, const int8_t* codes) const noexcept;
  void read_v(const PageBlock& block, int64_t key, int8_t* codes) const noexcept;

  const KernelTable& table_;
  const int64_t page_size_;
  const int dim_;     ///< of K
  const int dim_v_;   ///< of V
  const int padded_;  ///< of both in a page
};

}  // namespace attn8::kv_cache
