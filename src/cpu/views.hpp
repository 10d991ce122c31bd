// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

#include "attn8/tensor.hpp"
#include "core/kernel_table.hpp"

namespace attn8::cpu {

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
/// n elements, from `dim` on, of `count` rows along an axis: 1 for tokens, 2 for heads.
inline RowSpan row_span(const ConstTensorView& view, size_t axis, int64_t batch, int64_t seq,
                        int64_t head, int64_t count, int64_t dim, int64_t n) noexcept {
  // Of no rows nothing says where they would lie.
  return {count > 0 ? element(view, batch, seq, head, dim) : nullptr, view.dtype,
          // The stride of a single row may be anything.
          count > 1 ? view.strides[axis] * static_cast<int64_t>(dtype_bytes(view.dtype)) : 0, count,
          view.strides[3], static_cast<int>(n)};
}
/// Likewise of `count` tokens of a head.
inline RowSpan token_rows(const ConstTensorView& view, int64_t batch, int64_t seq, int64_t count,
                          int64_t head, int64_t dim, int64_t n) noexcept {
  return row_span(view, 1, batch, seq, head, count, dim, n);
}
inline float float_at(const ConstTensorView& view, int64_t batch, int64_t seq, int64_t head,
                      int64_t dim = 0) noexcept {
  return *reinterpret_cast<const float*>(element(view, batch, seq, head, dim));
}

/// Copies a row of int8 codes of any stride; returns whether one of them is -128.
inline bool load_codes(const ConstTensorView& codes, int64_t batch, int64_t seq, int64_t head,
                       int8_t* row) noexcept {
  const auto* source = reinterpret_cast<const int8_t*>(element(codes, batch, seq, head));
  const int64_t stride = codes.strides[3];
  bool bad = false;
  for (int64_t d = 0; d < codes.shape[3]; ++d) {
    row[d] = source[d * stride];
    bad = bad || row[d] == -128;
  }
  return bad;
}

}  // namespace attn8::cpu
