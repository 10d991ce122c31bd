// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "attn8/tensor.hpp"
#include "core/kernel_table.hpp"
#include "kv_cache/page_pool.hpp"

namespace attn8::kv_cache {

/// Writes the tokens of one kv head into pages.
class PageWriter {
 public:
  PageWriter(const KernelTable& table, int64_t page_size, int64_t head_dim) noexcept
      : table_(table),
        page_size_(page_size),
        dim_(static_cast<int>(head_dim)),
        padded_(static_cast<int>(padded_dim(head_dim))) {}

  /// Quantizes rows [first, first + count) of kv head `head` of k and v ([1, n, nheads_k,
  /// head_dim]) behind the `filled` tokens of a page. k_mean [head_dim] is subtracted, or nullptr.
  void append(const PageBlock& block, int64_t filled, const ConstTensorView& k,
              const ConstTensorView& v, int64_t head, int64_t first, int64_t count,
              const float* k_mean) const noexcept;

  /// Keeps the first `kept` (at least 1) of the `filled` tokens of a page.
  void truncate(const PageBlock& block, int64_t filled, int64_t kept) const noexcept;

 private:
  void measure_v(const PageBlock& block, int64_t key, const float* values) const noexcept;
  float encode_k(const PageBlock& block, int64_t key, const float* values, const float* k_mean,
                 int8_t* codes) const noexcept;
  void encode_v(const PageBlock& block, int64_t key, const float* values,
                int8_t* codes) const noexcept;
  void set_block_scale(const PageBlock& block, int64_t filled, int64_t keys,
                       int64_t* sums) const noexcept;
  void write_k(const PageBlock& block, int64_t key, const int8_t* codes,
               float k_scale) const noexcept;
  void write_v(const PageBlock& block, int64_t key, const int8_t* codes) const noexcept;
  void read_v(const PageBlock& block, int64_t key, int8_t* codes) const noexcept;
  const float* row_of(const ConstTensorView& view, int64_t token, int64_t head,
                      float* buffer) const noexcept;

  const KernelTable& table_;
  const int64_t page_size_;
  const int dim_;
  const int padded_;
};

}  // namespace attn8::kv_cache
