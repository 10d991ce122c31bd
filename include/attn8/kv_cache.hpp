// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "attn8/attention.hpp"
#include "attn8/context.hpp"
#include "attn8/export.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

namespace attn8 {

struct KvCacheOptions {
  int64_t nheads_k = 0;  ///< >= 1
  int64_t head_dim = 0;  ///< of Q and K, 1 to 256
  /// Of V and out, 1 to 256; 0: head_dim. A page has room for the larger of the two in both.
  int64_t head_dim_v = 0;
  /// Tokens per page, and kv_block of attention over the cache: a multiple of 64 in [64, 512].
  int32_t page_size = kDefaultKvBlock;
  int64_t max_pages = 0;  ///< >= 1; their memory is reserved by make() and touched when first used
  /// Subtract from K of a sequence the mean of the tokens of its first append.
  bool smooth_k = true;
};

/// Names a sequence of one cache. Never reused, so that a freed one stays an error.
struct KvSequence {
  uint64_t cache = 0;
  uint64_t id = 0;
  friend constexpr bool operator==(const KvSequence&, const KvSequence&) = default;
};

/// What a cache holds at one moment.
struct KvCacheUsage {
  int64_t sequences = 0;
  int64_t pages_used = 0;  ///< a page that several sequences share counts once
  int64_t pages_free = 0;
  size_t bytes_used = 0;      ///< pages_used * bytes_per_page
  size_t bytes_per_page = 0;  ///< codes, scales and what attention wants to know of a page
};

struct KvCacheAttentionOptions {
  /// kAccurate computes on the pages as they are. kHalf and kExact run attention() over what they
  /// stand for, sequence by sequence: K (in kExact) and V as floats, codes * scale (+ mean), in
  /// memory of the call. They spare the rounding of P (and of Q) but not that of K and V, and cost
  /// the time to unpack. The others have no such meaning and are kUnsupported.
  Mode mode = Mode::kAccurate;
  /// Mode of each kv head, in place of `mode`; empty, or [nheads_k].
  std::span<const Mode> head_modes = {};
  std::optional<float> softmax_scale = std::nullopt;  ///< finite; nullopt: 1/sqrt(head_dim)
  /// Per sequence, with its number of queries as seqlen_q and its length as seqlen_k.
  Mask mask = {};
  /// As of AttentionOptions and AttentionInputs.
  float softcap = 0;
  /// [1, total or 1, nheads_q or 1, keys or 1]: a row of it per row of q; keys count from the start
  /// of the sequence that the row belongs to, at least as many as the longest sequence has, and
  /// what is beyond a sequence is not read.
  std::optional<ConstTensorView> attn_mask = std::nullopt;
  std::optional<ConstTensorView> alibi_slopes = std::nullopt;  ///< [1, 1, nheads_q, 1]
  std::optional<ConstTensorView> sinks = std::nullopt;         ///< [1, 1, nheads_q, 1]
};

/// Paged KV cache in INT8 on the CPU: one scale per token and kv head for K and for V, packed as
/// Mode::kAccurate reads it, quantized as it is appended by the rules of docs/numerics.md. A page
/// holds page_size tokens of one sequence, all kv heads; sequences that were forked share pages
/// until one of them writes.
///
/// In the terms of docs/numerics.md every key of a sequence counts, also where a window hides it
/// from all queries. So attend() gives the bits of attention() on the same codes, scales and mean,
/// kv_block = page_size, wherever the queries see every key; how the tokens were spread over
/// appends does not matter, except for a V token more than 2^16 below the largest of its page:
/// its codes are rounded again when a larger one arrives.
///
/// A handle: copies name the same cache, which lives as long as the last of them. Every function
/// may be called from any thread at any time: those that change a sequence wait for the calls that
/// read it and the other way round; different sequences do not wait for one another, also where
/// they share pages. A call that fails changes nothing.
/// A sequence that is freed, or of another cache, is kInvalidArgument.
class ATTN8_API KvCache {
 public:
  /// Errors: kInvalidArgument, kOutOfMemory.
  static Result<KvCache> make(const KvCacheOptions& options) noexcept;

  /// A new sequence without tokens. Errors: kOutOfMemory.
  Result<KvSequence> create() noexcept;

  /// Appends n tokens.
  ///   k  [1, n, nheads_k, head_dim] float32, float16 or bfloat16, any strides; n may be 0
  ///   v  [1, n, nheads_k, head_dim_v], likewise
  /// A token with a NaN or an Inf makes the rows that see it NaN.
  /// Errors: kInvalidArgument, kUnavailable (forced ISA), kOutOfMemory when pages run out.
  Status append(KvSequence sequence, const ConstTensorView& k, const ConstTensorView& v,
                const Context& context) noexcept;

  /// The same for several sequences at once, their work divided over the threads: tokens
  /// [cu_seqlens[i], cu_seqlens[i + 1]) of k and v, which may be none, go to sequences[i].
  ///   sequences   each once at most
  ///   k, v        as above, n = total
  ///   cu_seqlens  [sequences + 1], from 0 to total, not decreasing
  /// All sequences are appended to, or none; a page that several of them share is copied for each.
  /// Errors: as above.
  Status append(std::span<const KvSequence> sequences, const ConstTensorView& k,
                const ConstTensorView& v, std::span<const int32_t> cu_seqlens,
                const Context& context) noexcept;

  /// A new sequence with the first `length` tokens of `parent` (and its K mean). Shares their
  /// pages; takes one of its own only where `length` ends inside a page that holds more tokens.
  /// Errors: kInvalidArgument, kOutOfMemory.
  Result<KvSequence> fork(KvSequence parent, int64_t length) noexcept;

  /// Drops the tokens from `length` on. Takes a page only where `length` ends inside a shared one.
  /// A sequence cut to 0 tokens is as if created. Errors: kInvalidArgument, kOutOfMemory.
  Status truncate(KvSequence sequence, int64_t length) noexcept;

  /// Ends a sequence and gives back the pages that are its alone. Errors: kInvalidArgument.
  Status free(KvSequence sequence) noexcept;

  /// Tokens of a sequence. Errors: kInvalidArgument.
  [[nodiscard]] Result<int64_t> length(KvSequence sequence) const noexcept;

  [[nodiscard]] KvCacheUsage usage() const noexcept;
  /// Those of make(), head_dim_v never 0.
  [[nodiscard]] const KvCacheOptions& options() const noexcept;

  /// Attention of a batch of sequences, each with any number of queries (none, one, many): the
  /// queries of sequences[i] are rows [cu_seqlens_q[i], cu_seqlens_q[i + 1]) of q, out and lse.
  ///   sequences     may repeat one
  ///   q             [1, total, nheads_q, head_dim] float32, float16, bfloat16, any strides, or
  ///                 quantized with Granularity::kToken (not for kExact); nheads_k divides nheads_q
  ///   cu_seqlens_q  [sequences + 1], from 0 to total, not decreasing
  ///   outputs       out [1, total, nheads_q, head_dim_v], lse [1, total, nheads_q, 1]; may not
  ///                 overlap an input
  /// A row that sees no key is 0 with LSE -inf. Results depend neither on the threads nor on what
  /// else is in the batch.
  /// Errors: kInvalidArgument, kUnsupported, kUnavailable (forced ISA), kOutOfMemory.
  Status attend(std::span<const KvSequence> sequences, const Operand& q,
                std::span<const int32_t> cu_seqlens_q, const AttentionOutputs& outputs,
                const KvCacheAttentionOptions& options, const Context& context) const noexcept;

  struct State;  ///< private to the library

 private:
  explicit KvCache(std::shared_ptr<State> state) noexcept : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

}  // namespace attn8
