// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "attn8/attention.hpp"
#include "attn8/context.hpp"
#include "attn8/export.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

namespace attn8 {

struct CudaKvCacheOptions {
  int64_t nheads_k = 0;     ///< >= 1
  int64_t head_dim = 0;     ///< 1 to 256
  int32_t page_size = 256;  ///< tokens per page: a power of two in [256, 65536]
  int64_t num_pages = 0;    ///< >= 1
  /// Subtract from K of a sequence the mean of the tokens of its first append, which is kept with
  /// its first page.
  bool smooth_k = true;
  /// Where the pages go, for callers with an allocator of their own: CudaKvCache::memory_bytes() of
  /// device memory, 256-byte aligned, that outlives the cache. Empty: the cache allocates.
  std::span<std::byte> memory = {};
};

/// The sequences of a call, in flash-attn's names. int32, any strides, all on the cache's device or
/// all on the host (Device{}). What lies on the host is checked, and a table that points outside is
/// kInvalidArgument; what lies on the device is checked there: a sequence whose lengths or pages
/// point outside gets an output of NaN, and nothing is appended to it.
///
/// block_table    [batch, max_pages, 1, 1] page of each page_size tokens, in [0, num_pages);
/// entries
///                past a sequence's last page are not read. Sequences may share pages that nobody
///                appends to.
/// cache_seqlens  [batch, 1, 1, 1] tokens that a sequence has: before an append, and for attention
/// cu_seqlens     [batch + 1, 1, 1, 1] or nothing. With it the tokens of the call (k and v of an
///                append, q of attention) are a ragged batch [1, total, heads, head_dim], those of
///                sequence b in [cu_seqlens[b], cu_seqlens[b + 1]). Without it they are
///                [batch, seqlen, heads, head_dim].
/// max_seqlen     with cu_seqlens: the most of those tokens that one sequence has; 0: total. Of a
///                longer one whose table is on the device the output means nothing.
struct CudaKvTables {
  ConstTensorView block_table;
  ConstTensorView cache_seqlens;
  std::optional<ConstTensorView> cu_seqlens = std::nullopt;
  int64_t max_seqlen = 0;
};

struct CudaKvAttentionOptions {
  std::optional<float> softmax_scale = std::nullopt;  ///< finite; nullopt: 1/sqrt(head_dim)
  /// Per sequence, with its number of queries as seqlen_q and its cache_seqlens as seqlen_k.
  Mask mask = {};
  float softcap = 0;  ///< as AttentionOptions::softcap
  /// As AttentionInputs::sinks.
  std::optional<ConstTensorView> sinks = std::nullopt;
  /// As AttentionInputs::alibi_slopes, its batch that of the block table.
  std::optional<ConstTensorView> alibi_slopes = std::nullopt;
  /// [q.shape[0] or 1, q.shape[1] or 1, nheads_q or 1, keys or 1] float32, added to scores; what is
  /// at most -2^100 hides a key. Keys count from the start of a row's sequence; a sequence that has
  /// more of them is refused as one whose pages point outside.
  std::optional<ConstTensorView> attn_mask = std::nullopt;
};

/// Paged KV cache in INT8 in the memory of a CUDA device, for Mode::kAccurate with one V scale per
/// token. It owns the pages and knows nothing of sequences: block tables and lengths are the
/// caller's, as with flash-attn's paged cache. Tokens are quantized, packed and put into their
/// pages in one pass, in the form that prefill and decode read.
///
/// A handle: copies name the same pages, which are freed with the last of them. append() and
/// attend() only enqueue on Context::stream; with tables on the device they neither synchronize nor
/// allocate, and can be captured into a CUDA graph. Calls on the same pages are ordered by the
/// stream alone. Thread-safe.
class ATTN8_API CudaKvCache {
 public:
  /// Device memory of the pages of such a cache. Errors: kInvalidArgument, kUnavailable.
  static Result<size_t> memory_bytes(const CudaKvCacheOptions& options,
                                     const Context& context) noexcept;
  /// Allocates the pages and clears them, or only enqueues the clearing of options.memory on
  /// Context::stream. Errors: kInvalidArgument, kUnavailable, kOutOfMemory, kDeviceError.
  static Result<CudaKvCache> make(const CudaKvCacheOptions& options,
                                  const Context& context) noexcept;

  /// Bytes of device memory that append() or attend() need as workspace for tokens of this shape
  /// ([batch, seqlen, heads, head_dim], or [1, total, heads, head_dim] with cu_seqlens); 0 for
  /// shapes that those refuse.
  [[nodiscard]] size_t workspace_bytes(const Extents& tokens,
                                       const CudaKvTables& tables) const noexcept;

  /// Appends tokens behind cache_seqlens. The caller adds their number to cache_seqlens afterwards.
  ///   k, v  float32, float16 or bfloat16, one type, any strides; heads = nheads_k
  /// A token with a NaN or an Inf makes the rows that see it NaN.
  /// Errors: kInvalidArgument, kUnsupported, kDeviceError.
  Status append(const ConstTensorView& k, const ConstTensorView& v, const CudaKvTables& tables,
                std::span<std::byte> workspace, const Context& context) const noexcept;

  /// Attention of q over the first cache_seqlens tokens of each sequence.
  ///   q        float32, float16 or bfloat16, any strides; nheads_k divides its heads
  ///   outputs  out as q, lse [.., .., nheads_q, 1]; may not overlap q
  /// A row that sees no key is 0 with LSE -inf, or its sink.
  /// Errors: kInvalidArgument, kUnsupported, kDeviceError.
  Status attend(const ConstTensorView& q, const CudaKvTables& tables,
                const AttentionOutputs& outputs, const CudaKvAttentionOptions& options,
                std::span<std::byte> workspace, const Context& context) const noexcept;

  [[nodiscard]] const CudaKvCacheOptions& options() const noexcept;
  /// Device memory of one page: codes, scales and the mean of K.
  [[nodiscard]] size_t bytes_per_page() const noexcept;

  struct State;  ///< private to the library

 private:
  explicit CudaKvCache(std::shared_ptr<const State> state) noexcept : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

}  // namespace attn8
