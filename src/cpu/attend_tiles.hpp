// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "attn8/attention.hpp"
#include "core/kernel_table.hpp"
#include "cpu/attend_sequences.hpp"

namespace attn8::cpu {

/// Of what a call works on: a page, so that the distances between what a kernel stores and what it
/// loads next, modulo the 12 bits by which CPUs match them, do not depend on the caller.
inline constexpr size_t kAlignment = 4096;

constexpr size_t on_pages(size_t bytes) noexcept {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// An operand of AttendCall that may be missing.
inline const ConstTensorView* view_or_null(const std::optional<ConstTensorView>& view) noexcept {
  return view.has_value() ? &*view : nullptr;
}

/// Attention of a batch of sequences over packed K and V.
struct AttendCall {
  const KernelTable& table;
  const Context& context;
  Mode mode;
  bool bfloat16;  ///< as AttendTile's
  const Mask& mask;
  float softmax_scale;
  float softcap;  ///< of AttentionOptions
  int kv_block;
  int64_t nheads_q, nheads_k, head_dim;
  int64_t head_dim_v;  ///< of out; K and V are packed with the larger of the two
  const Operand& q;
  const ConstTensorView* attn_mask;     ///< nullptr: none, like the next two
  const ConstTensorView* alibi_slopes;  ///< as in AttentionInputs
  const ConstTensorView* sinks;
  const AttentionOutputs& outputs;
  std::span<const AttendSequence> sequences;
  std::byte* workers;        ///< [context.threads][worker_bytes()], on pages
  std::byte* partials;       ///< [begin_tasks().partials][partial_bytes()], 64-byte aligned
  size_t bytes_per_partial;  ///< partial_bytes() of the most rows of a sequence that is split
  int64_t tasks = 0;         ///< of begin_tasks()
};

/// Bytes of a worker's buffers; packed_dim: the larger of head_dim and head_dim_v.
size_t worker_bytes(const KernelTable& table, int kv_block, int64_t packed_dim) noexcept;
/// Bytes of the results of one part of the keys.
size_t partial_bytes(int64_t rows, int64_t packed_dim) noexcept;

/// Computes every row; kInvalidArgument when codes of q hold -128.
Status attend_tiles(const AttendCall& call) noexcept;

}  // namespace attn8::cpu
