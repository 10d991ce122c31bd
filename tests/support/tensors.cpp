// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "support/tensors.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>

namespace attn8::testing {
namespace {

uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;  // splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

double uniform(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53; }

/// A value rounded to `digits` bits of significand with exponents from `least` on, nearest even.
double rounded(double value, int digits, int least) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), least);
  const double unit = std::ldexp(1.0, exponent - digits + 1);
  return std::nearbyint(value / unit) * unit;
}

uint16_t float16_bits(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  const double magnitude = rounded(std::fabs(value), 11, -14);
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 0x1p-14) return static_cast<uint16_t>(sign + std::lround(magnitude * 0x1p24));
  const int exponent = std::ilogb(magnitude);
  const long fraction = std::lround((std::ldexp(magnitude, -exponent) - 1) * 1024);
  return static_cast<uint16_t>(sign + ((exponent + 15) << 10) + fraction);
}

double float16_value(uint16_t bits) {
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

uint16_t bfloat16_bits(double value) {
  const auto narrow = static_cast<float>(value);
  if (std::isnan(narrow)) return 0x7fc0;
  const auto near = static_cast<float>(rounded(narrow, 8, -126));
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(near) >> 16);
}

}  // namespace

double normal_at(uint64_t seed, uint64_t index) {
  const uint64_t a = mixed(mixed(seed) ^ index);
  return std::sqrt(-2 * std::log(uniform(a))) * std::cos(2 * std::numbers::pi * uniform(mixed(a)));
}

Tensor::Tensor(DType dtype, const Extents& shape, Memory memory) : dtype_(dtype), shape_(shape) {
  int64_t elements = shape[0] * shape[1] * shape[2] * shape[3];
  switch (memory) {
    case Memory::kBshd:
      strides_ = bshd_strides(shape);
      break;
    case Memory::kBhsd:
      strides_ = bhsd_strides(shape);
      break;
    case Memory::kStrided: {
      const int64_t row = shape[3] * 2 + 1;
      const int64_t position = shape[2] * row + 3;
      strides_ = {shape[1] * position + 5, position, row, 2};
      start_ = 7;
      elements = start_ + shape[0] * strides_[0] + 16;
      break;
    }
    case Memory::kReversed:
      strides_ = bshd_strides(shape);
      start_ = (shape[1] - 1) * strides_[1] + (shape[3] - 1) * strides_[3];
      strides_[1] = -strides_[1];
      strides_[3] = -strides_[3];
      break;
  }
  bytes_.assign(static_cast<size_t>(std::max<int64_t>(elements, 0)) * dtype_bytes(dtype),
                std::byte{0x5a});
}

std::byte* Tensor::address(int64_t b, int64_t s, int64_t h, int64_t d) {
  const int64_t i = start_ + b * strides_[0] + s * strides_[1] + h * strides_[2] + d * strides_[3];
  return bytes_.data() + static_cast<size_t>(i) * dtype_bytes(dtype_);
}

const std::byte* Tensor::address(int64_t b, int64_t s, int64_t h, int64_t d) const {
  return const_cast<Tensor*>(this)->address(b, s, h, d);
}

void Tensor::set(int64_t b, int64_t s, int64_t h, int64_t d, double value) {
  std::byte* p = address(b, s, h, d);
  const auto store = [p](auto x) { std::memcpy(p, &x, sizeof x); };
  switch (dtype_) {
    case DType::kFloat32:
      return store(static_cast<float>(value));
    case DType::kFloat16:
      return store(float16_bits(value));
    case DType::kBFloat16:
      return store(bfloat16_bits(value));
    case DType::kInt8:
      return store(static_cast<int8_t>(value));
    case DType::kInt32:
      return store(static_cast<int32_t>(value));
    case DType::kBool:
      return store(static_cast<uint8_t>(value != 0));
  }
}

double Tensor::get(int64_t b, int64_t s, int64_t h, int64_t d) const {
  const std::byte* p = address(b, s, h, d);
  const auto load = [p](auto x) {
    std::memcpy(&x, p, sizeof x);
    return x;
  };
  switch (dtype_) {
    case DType::kFloat32:
      return static_cast<double>(load(float{}));
    case DType::kFloat16:
      return float16_value(load(uint16_t{}));
    case DType::kBFloat16:
      return static_cast<double>(
          std::bit_cast<float>(static_cast<uint32_t>(load(uint16_t{})) << 16));
    case DType::kInt8:
      return load(int8_t{});
    case DType::kInt32:
      return load(int32_t{});
    case DType::kBool:
      return load(uint8_t{}) != 0 ? 1 : 0;
  }
  return 0;
}

void Tensor::fill(const std::function<double(int64_t, int64_t, int64_t, int64_t)>& value) {
  for (int64_t b = 0; b < shape_[0]; ++b) {
    for (int64_t s = 0; s < shape_[1]; ++s) {
      for (int64_t h = 0; h < shape_[2]; ++h) {
        for (int64_t d = 0; d < shape_[3]; ++d) set(b, s, h, d, value(b, s, h, d));
      }
    }
  }
}

void Tensor::fill_normal(uint64_t seed, double sigma) {
  fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    const auto place = static_cast<uint64_t>(((b * 1000003 + s) * 1009 + h) * 1031 + d);
    return sigma * normal_at(seed, place);
  });
}

TensorView Tensor::view() {
  std::byte* data = bytes_.empty() ? nullptr : address(0, 0, 0, 0);
  return {data, dtype_, {}, shape_, strides_};
}

ConstTensorView Tensor::view() const { return const_cast<Tensor*>(this)->view(); }

std::vector<double> Tensor::values() const {
  std::vector<double> result;
  for (int64_t b = 0; b < shape_[0]; ++b) {
    for (int64_t s = 0; s < shape_[1]; ++s) {
      for (int64_t h = 0; h < shape_[2]; ++h) {
        for (int64_t d = 0; d < shape_[3]; ++d) result.push_back(get(b, s, h, d));
      }
    }
  }
  return result;
}

}  // namespace attn8::testing
