// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "attn8/tensor.hpp"

/// Reading elements of strided views, widened exactly.
namespace attn8::reference {

/// The value of an IEEE binary16 bit pattern; every one is a float32.
inline float widen_float16(uint16_t bits) {
  constexpr uint32_t kExponent = 0x7C00;
  const uint32_t magnitude = bits & 0x7FFFU;
  // Moved to the place of binary32's fields, with binary32's bias (127) in place of binary16's
  // (15).
  float value = std::bit_cast<float>(magnitude << 13) * 0x1p112F;
  if (magnitude == kExponent) value = std::numeric_limits<float>::infinity();
  if (magnitude > kExponent) value = std::numeric_limits<float>::quiet_NaN();
  return (bits & 0x8000U) != 0 ? -value : value;
}

inline float widen_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

/// Element [b, s, h, d] of a float or int8 view as float32, exactly.
inline float load(const ConstTensorView& x, int64_t b, int64_t s, int64_t h, int64_t d) {
  const int64_t offset = b * x.strides[0] + s * x.strides[1] + h * x.strides[2] + d * x.strides[3];
  switch (x.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(x.data)[offset];
    case DType::kFloat16:
      return widen_float16(static_cast<const uint16_t*>(x.data)[offset]);
    case DType::kBFloat16:
      return widen_bfloat16(static_cast<const uint16_t*>(x.data)[offset]);
    case DType::kInt8:
      return static_cast<const int8_t*>(x.data)[offset];
    case DType::kInt32:
    case DType::kBool:
      break;
  }
  return std::numeric_limits<float>::quiet_NaN();
}

/// Tokens [first, first + count) of one (batch, head), one after the other. The channels are padded
/// with zeros to a multiple of kLanes, so that the loops over them have a fixed inner length.
struct Tokens {
  static constexpr int64_t kLanes = 8;

  int64_t first = 0;
  int64_t count = 0;
  int64_t head_dim = 0;
  int64_t stride = 0;
  std::vector<float> values;  // [count, stride]

  Tokens() = default;
  Tokens(int64_t first_in, int64_t count_in, int64_t head_dim_in)
      : first(first_in),
        count(count_in),
        head_dim(head_dim_in),
        stride((head_dim_in + kLanes - 1) / kLanes * kLanes),
        values(static_cast<size_t>(count_in * stride), 0.0F) {}

  /// Channels of token j, counted as in the tensor the tokens come from.
  float* token(int64_t j) { return values.data() + (j - first) * stride; }
  const float* token(int64_t j) const { return values.data() + (j - first) * stride; }
};

inline Tokens gather(const ConstTensorView& x, int64_t b, int64_t h, int64_t first, int64_t last) {
  Tokens tokens(first, last - first, x.shape[3]);
  for (int64_t j = first; j < last; ++j) {
    for (int64_t d = 0; d < tokens.head_dim; ++d) tokens.token(j)[d] = load(x, b, j, h, d);
  }
  return tokens;
}

/// sum_d x_d y_d; both padded.
inline double dot(const double* x, const float* y, int64_t stride) {
  double lane[Tokens::kLanes] = {};
  for (int64_t d = 0; d < stride; d += Tokens::kLanes) {
    for (int64_t u = 0; u < Tokens::kLanes; ++u) lane[u] += x[d + u] * y[d + u];
  }
  double sum = 0;
  for (const double value : lane) sum += value;
  return sum;
}

/// sum_d <- sum_d + weight y_d; both padded.
inline void add_scaled(double* sum, double weight, const float* y, int64_t stride) {
  for (int64_t d = 0; d < stride; d += Tokens::kLanes) {
    double lane[Tokens::kLanes];
    for (int64_t u = 0; u < Tokens::kLanes; ++u) lane[u] = sum[d + u] + weight * y[d + u];
    for (int64_t u = 0; u < Tokens::kLanes; ++u) sum[d + u] = lane[u];
  }
}

}  // namespace attn8::reference
