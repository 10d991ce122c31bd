// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>

#include "attn8/attention.hpp"

/// Parts of tensors as views of the same memory.
namespace attn8 {

/// Entries [first, first + count) of a dimension.
template <class View>
View slice(View view, size_t dim, int64_t first, int64_t count) noexcept {
  view.shape[dim] = count;
  // Where there are no elements there may be no memory, and strides may be anything.
  if (std::ranges::find(view.shape, 0) == std::end(view.shape)) {
    using Byte = std::conditional_t<std::is_same_v<View, TensorView>, std::byte, const std::byte>;
    view.data = static_cast<Byte*>(view.data) +
                first * view.strides[dim] * static_cast<int64_t>(dtype_bytes(view.dtype));
  }
  return view;
}

/// The same of an operand that may have a single entry there for all.
template <class View>
View slice_or_all(const View& view, size_t dim, int64_t first, int64_t count) noexcept {
  return view.shape[dim] == 1 ? view : slice(view, dim, first, count);
}

/// Tokens (dim 1) or heads (dim 2) of an operand; of codes, with Granularity::kToken if tokens.
inline Operand slice(const Operand& operand, size_t dim, int64_t first, int64_t count) noexcept {
  const auto* view = std::get_if<ConstTensorView>(&operand);
  if (view != nullptr) return slice(*view, dim, first, count);
  QuantizedView part = *std::get_if<QuantizedView>(&operand);
  part.codes = slice(part.codes, dim, first, count);
  part.scale = slice(part.scale, dim, first, count);
  if (part.mean.has_value()) part.mean = slice_or_all(*part.mean, dim, first, count);
  return part;
}

}  // namespace attn8
