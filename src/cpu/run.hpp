// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/plan_state.hpp"
#include "cpu/attend_tiles.hpp"
#include "cpu/pack.hpp"
#include "cpu/views.hpp"

namespace attn8::cpu {

/// Blocks of kv_block keys that begin in [0, keys).
constexpr int64_t block_count(int64_t keys, int64_t kv_block) noexcept {
  return (keys + kv_block - 1) / kv_block;
}

/// K and V of one sequence of a run, and where lies what is made of them.
struct SequenceKeys {
  int64_t batch = 0, first_key = 0;  ///< where its first key lies in k and v
  int64_t seqlen_k = 0;
  int64_t leftpad_k = 0;
  KeyRange visible;         ///< to at least one query
  int64_t first_block = 0;  ///< the first one that holds such a key
  int64_t blocks = 0;       ///< from there to the last one
  int64_t block_slot = 0;   ///< `blocks` of the sequences before this one
  int64_t table_slot = 0;   ///< all blocks of the sequences before this one
  int64_t chunks = 0;       ///< in which the mean of K is taken
  int64_t chunk_slot = 0;   ///< `chunks` of the sequences before this one
};

/// Typed pointers into the workspace of one run.
struct Workspace {
  const AttentionPlan::State& plan;
  std::byte* base;

  template <class T>
  [[nodiscard]] T* at(size_t offset) const noexcept {
    return reinterpret_cast<T*>(base + offset);
  }
  [[nodiscard]] std::span<SequenceKeys> sequence_keys() const noexcept {
    return {at<SequenceKeys>(plan.layout.sequence_keys), static_cast<size_t>(plan.sequences)};
  }
  [[nodiscard]] int64_t block_index(const SequenceKeys& keys, int64_t kv_head,
                                    int64_t block) const noexcept {
    return keys.block_slot * plan.nheads_k + kv_head * keys.blocks + block - keys.first_block;
  }
  /// block: one of `blocks` from first_block on.
  [[nodiscard]] BlockMemory block_memory(const SequenceKeys& keys, int64_t kv_head,
                                         int64_t block) const noexcept {
    const auto index = static_cast<size_t>(block_index(keys, kv_head, block));
    const BlockLayout& layout = plan.layout.block;
    return {base + plan.layout.blocks + index * layout.bytes,
            base + plan.layout.block_headers + index * layout.header_bytes, layout};
  }
  [[nodiscard]] PackedBlock* packed_blocks(const SequenceKeys& keys,
                                           int64_t kv_head) const noexcept {
    return at<PackedBlock>(plan.layout.packed_blocks) + keys.table_slot * plan.nheads_k +
           kv_head * block_count(keys.seqlen_k, plan.options.kv_block);
  }
  /// head counts (sequence, kv head) pairs.
  [[nodiscard]] PackedHead& head(int64_t head) const noexcept {
    return at<PackedHead>(plan.layout.heads)[head];
  }
  [[nodiscard]] float* k_mean(int64_t head) const noexcept {
    return at<float>(plan.layout.k_mean) + head * plan.head_dim;
  }
  [[nodiscard]] float* v_out_scale(int64_t head) const noexcept {
    return at<float>(plan.layout.v_out_scale) + head * padded_dim(plan.packed_dim());
  }
};

/// Quantizes and packs K and V of every (sequence, kv head) into the workspace, whose
/// sequence_keys() are set.
Status prepare(const Workspace& workspace, const AttentionInputs& inputs) noexcept;

}  // namespace attn8::cpu
