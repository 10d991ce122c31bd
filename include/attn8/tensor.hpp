// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "attn8/export.hpp"

namespace attn8 {

/// Element types. Float16 is IEEE binary16; BFloat16 the upper half of binary32; Bool one byte, 0
/// or not.
enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt8, kInt32, kBool };

/// Bytes of one element.
constexpr size_t dtype_bytes(DType dtype) noexcept {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt8:
    case DType::kBool:
      return 1;
  }
  return 0;
}

constexpr bool is_float(DType dtype) noexcept {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

/// "float32", "float16", "bfloat16", "int8", "int32", "bool".
ATTN8_API std::string_view to_string(DType dtype) noexcept;

enum class DeviceType : uint8_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;
  friend constexpr bool operator==(const Device&, const Device&) = default;
};

/// Sizes of a rank-4 tensor, always in the logical order [batch, seq, head, dim].
using Extents = std::array<int64_t, 4>;

/// Non-owning rank-4 tensor. The logical order is always [batch, seq, head, dim]; the memory order
/// is free, because every dimension has its own stride, counted in elements (it may be zero for a
/// broadcast input, negative strides are allowed). A view with a zero extent may hold nullptr.
/// Copying a view never copies data; the caller keeps the data alive while a call uses it.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = {};
  Extents shape = {0, 0, 0, 0};
  Extents strides = {0, 0, 0, 0};
};

/// As TensorView, read-only.
struct ConstTensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = {};
  Extents shape = {0, 0, 0, 0};
  Extents strides = {0, 0, 0, 0};

  constexpr ConstTensorView() noexcept = default;
  constexpr ConstTensorView(const void* data_in, DType dtype_in, Device device_in,
                            const Extents& shape_in, const Extents& strides_in) noexcept
      : data(data_in), dtype(dtype_in), device(device_in), shape(shape_in), strides(strides_in) {}
  constexpr ConstTensorView(
      const TensorView& view) noexcept  // NOLINT: a view is its own const view
      : data(view.data),
        dtype(view.dtype),
        device(view.device),
        shape(view.shape),
        strides(view.strides) {}
};

/// Dense strides for the memory order [batch, seq, head, dim] (flash-attn's).
constexpr Extents bshd_strides(const Extents& s) noexcept {
  return {s[1] * s[2] * s[3], s[2] * s[3], s[3], 1};
}

/// Dense strides for the memory order [batch, head, seq, dim] (torch SDPA's).
constexpr Extents bhsd_strides(const Extents& s) noexcept {
  return {s[1] * s[2] * s[3], s[3], s[1] * s[3], 1};
}

/// View of dense memory in the order [batch, seq, head, dim]; shape is in that order too.
constexpr TensorView bshd(void* data, DType dtype, const Extents& shape,
                          Device device = {}) noexcept {
  return {data, dtype, device, shape, bshd_strides(shape)};
}
constexpr ConstTensorView bshd(const void* data, DType dtype, const Extents& shape,
                               Device device = {}) noexcept {
  return {data, dtype, device, shape, bshd_strides(shape)};
}

/// View of dense memory in the order [batch, head, seq, dim]; shape stays [batch, seq, head, dim].
constexpr TensorView bhsd(void* data, DType dtype, const Extents& shape,
                          Device device = {}) noexcept {
  return {data, dtype, device, shape, bhsd_strides(shape)};
}
constexpr ConstTensorView bhsd(const void* data, DType dtype, const Extents& shape,
                               Device device = {}) noexcept {
  return {data, dtype, device, shape, bhsd_strides(shape)};
}

}  // namespace attn8
