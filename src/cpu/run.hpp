// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>

#include "core/plan_state.hpp"

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
  [[nodiscard]] std::byte* block(int64_t head, int64_t block) const noexcept {
    return base + plan.layout.blocks +
           static_cast<size_t>(head * plan.kv_blocks() + block) * plan.layout.block.bytes;
  }
  [[nodiscard]] std::byte* block_header(int64_t head, int64_t block) const noexcept {
    return base + plan.layout.block_headers +
           static_cast<size_t>(head * plan.kv_blocks() + block) * plan.layout.block.header_bytes;
  }
  [[nodiscard]] PackedBlock* packed_blocks(int64_t head) const noexcept {
    return at<PackedBlock>(plan.layout.packed_blocks) + head * plan.kv_blocks();
  }
  [[nodiscard]] HeadState& head(int64_t head) const noexcept {
    return at<HeadState>(plan.layout.heads)[head];
  }
  [[nodiscard]] uint8_t* poison(int64_t head) const noexcept {
    return at<uint8_t>(plan.layout.poison) + head * plan.seqlen_k;
  }
  [[nodiscard]] float* k_mean(int64_t head) const noexcept {
    return at<float>(plan.layout.k_mean) + head * plan.head_dim;
  }
  [[nodiscard]] float* v_out_scale(int64_t head) const noexcept {
    return at<float>(plan.layout.v_out_scale) + head * padded_dim(plan.head_dim);
  }
};

/// Element pointer of a view.
inline const std::byte* element(const ConstTensorView& view, int64_t batch, int64_t seq,
                                int64_t head, int64_t dim = 0) noexcept {
  const int64_t i = batch * view.strides[0] + seq * view.strides[1] + head * view.strides[2] +
                    dim * view.strides[3];
  return static_cast<const std::byte*>(view.data) +
         i * static_cast<int64_t>(dtype_bytes(view.dtype));
}
inline std::byte* element(const TensorView& view, int64_t batch, int64_t seq, int64_t head,
                          int64_t dim = 0) noexcept {
  return const_cast<std::byte*>(element(ConstTensorView(view), batch, seq, head, dim));
}
inline float float_at(const ConstTensorView& view, int64_t batch, int64_t seq, int64_t head,
                      int64_t dim = 0) noexcept {
  return *reinterpret_cast<const float*>(element(view, batch, seq, head, dim));
}

/// Copies a row of int8 codes of any stride; returns whether one of them is -128.
bool load_codes(const ConstTensorView& codes, int64_t batch, int64_t seq, int64_t head,
                int8_t* row) noexcept;

/// Quantizes and packs K and V of every (batch, kv head) into the workspace.
Status prepare(const Workspace& workspace, const AttentionInputs& inputs) noexcept;

}  // namespace attn8::cpu
