// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>

#include "core/plan_state.hpp"
#include "cpu/attend_tiles.hpp"
#include "cpu/pack.hpp"
#include "cpu/views.hpp"

namespace attn8::cpu {

/// Typed pointers into the workspace of one run.
struct Workspace {
  const AttentionPlan::State& plan;
  std::byte* base;

  template <class T>
  [[nodiscard]] T* at(size_t offset) const noexcept {
    return reinterpret_cast<T*>(base + offset);
  }
  /// head counts (batch, kv head) pairs.
  [[nodiscard]] BlockMemory block_memory(int64_t head, int64_t block) const noexcept {
    const auto index = static_cast<size_t>(head * plan.kv_blocks() + block);
    const BlockLayout& layout = plan.layout.block;
    return {base + plan.layout.blocks + index * layout.bytes,
            base + plan.layout.block_headers + index * layout.header_bytes, layout};
  }
  [[nodiscard]] PackedBlock* packed_blocks(int64_t head) const noexcept {
    return at<PackedBlock>(plan.layout.packed_blocks) + head * plan.kv_blocks();
  }
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

/// The keys of one sequence of a batch.
struct SequenceKeys {
  int64_t seqlen_k = 0;
  int64_t leftpad_k = 0;
  KeyRange visible;  ///< to at least one query
};
SequenceKeys keys_of(const AttentionPlan::State& plan, const AttentionInputs& inputs,
                     int64_t batch) noexcept;

/// Quantizes and packs K and V of every (batch, kv head) into the workspace.
Status prepare(const Workspace& workspace, const AttentionInputs& inputs) noexcept;

}  // namespace attn8::cpu
