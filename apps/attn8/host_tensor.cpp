// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "host_tensor.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

namespace attn8::app {
namespace {

float float16_to_float(uint16_t bits) noexcept {
  const uint32_t sign = uint32_t{bits & 0x8000U} << 16;
  const uint32_t exponent = (bits >> 10) & 0x1FU;
  const uint32_t fraction = bits & 0x3FFU;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000U | (fraction << 13));
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  // The exponent bias goes from 15 to 127.
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
}

uint16_t float_to_float16(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  if (std::isnan(value)) return sign | 0x7E00U;
  const float magnitude = std::fabs(value);
  // 65520 is halfway between the largest float16, 65504, and the next power of two.
  if (magnitude >= 65520.0F) return sign | 0x7C00U;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // Values in [2^(e-1), 2^e) are multiples of 2^(e-11); below 2^-14 of 2^-24.
  const int ulp = exponent - 11 < -24 ? -24 : exponent - 11;
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(magnitude, -ulp)), ulp);
  if (rounded < 0x1p-14F) return sign | static_cast<uint16_t>(std::ldexp(rounded, 24));
  const uint32_t r = std::bit_cast<uint32_t>(rounded);
  return sign | static_cast<uint16_t>((((r >> 23) - 112) << 10) | ((r >> 13) & 0x3FFU));
}

uint16_t float_to_bfloat16(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

template <class T>
T load(const std::byte* address) noexcept {
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

}  // namespace

HostTensor::HostTensor(DType dtype, const Extents& shape, Layout layout)
    : bytes_(static_cast<size_t>(element_count(shape)) * dtype_bytes(dtype)),
      dtype_(dtype),
      shape_(shape),
      strides_(layout == Layout::kBshd ? bshd_strides(shape) : bhsd_strides(shape)) {}

HostTensor::HostTensor(AlignedBytes bytes, DType dtype, const Extents& shape,
                       const Extents& strides)
    : bytes_(std::move(bytes)), dtype_(dtype), shape_(shape), strides_(strides) {}

TensorView HostTensor::view() noexcept { return {bytes_.data(), dtype_, {}, shape_, strides_}; }

ConstTensorView HostTensor::view() const noexcept {
  return {bytes_.data(), dtype_, {}, shape_, strides_};
}

std::span<float> HostTensor::floats() noexcept {
  // The bytes come from operator new and hold floats only.
  return {reinterpret_cast<float*>(bytes_.data()), bytes_.size() / sizeof(float)};
}

const std::byte* element_address(const ConstTensorView& x, int64_t batch, int64_t seq, int64_t head,
                                 int64_t dim) noexcept {
  const int64_t offset =
      batch * x.strides[0] + seq * x.strides[1] + head * x.strides[2] + dim * x.strides[3];
  return static_cast<const std::byte*>(x.data) +
         offset * static_cast<int64_t>(dtype_bytes(x.dtype));
}

double load_float(const std::byte* address, DType dtype) noexcept {
  switch (dtype) {
    case DType::kFloat32:
      return load<float>(address);
    case DType::kFloat16:
      return float16_to_float(load<uint16_t>(address));
    case DType::kBFloat16:
      return std::bit_cast<float>(uint32_t{load<uint16_t>(address)} << 16);
    case DType::kInt8:
    case DType::kInt32:
    case DType::kBool:
      break;
  }
  return std::nan("");
}

HostTensor convert(const ConstTensorView& x, DType dtype) {
  HostTensor result(dtype, x.shape);
  std::byte* out = result.data();
  for (int64_t b = 0; b < x.shape[0]; ++b) {
    for (int64_t s = 0; s < x.shape[1]; ++s) {
      for (int64_t h = 0; h < x.shape[2]; ++h) {
        for (int64_t d = 0; d < x.shape[3]; ++d) {
          const auto value =
              static_cast<float>(load_float(element_address(x, b, s, h, d), x.dtype));
          if (dtype == DType::kFloat32) {
            std::memcpy(out, &value, sizeof(value));
          } else {
            const uint16_t bits =
                dtype == DType::kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
            std::memcpy(out, &bits, sizeof(bits));
          }
          out += dtype_bytes(dtype);
        }
      }
    }
  }
  return result;
}

ConstTensorView slice_heads(const ConstTensorView& x, int64_t batch, int64_t head,
                            int64_t heads) noexcept {
  ConstTensorView slice = x;
  if (x.data != nullptr) slice.data = element_address(x, batch, 0, head, 0);
  slice.shape[0] = 1;
  slice.shape[2] = heads;
  return slice;
}

std::vector<double> gather_rows(const ConstTensorView& x, std::span<const int64_t> rows) {
  const int64_t count = rows.empty() ? x.shape[1] : static_cast<int64_t>(rows.size());
  std::vector<double> result;
  result.reserve(static_cast<size_t>(x.shape[0] * x.shape[2] * count * x.shape[3]));
  for (int64_t b = 0; b < x.shape[0]; ++b) {
    for (int64_t h = 0; h < x.shape[2]; ++h) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = rows.empty() ? r : rows[static_cast<size_t>(r)];
        for (int64_t d = 0; d < x.shape[3]; ++d) {
          result.push_back(load_float(element_address(x, b, row, h, d), x.dtype));
        }
      }
    }
  }
  return result;
}

}  // namespace attn8::app
