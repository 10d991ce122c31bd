// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

/// 16-bit floats in plain C++, for machines without the instructions.
namespace attn8::emulator {

/// binary16 nearest to x, ties to even.
inline uint16_t half_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7FFF;
  // 65520 is halfway between the largest half and 2^16, and the tie rounds away from it.
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  // Below 2^-14 halves are multiples of 2^-24.
  if (magnitude < 0x1p-14f) {
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const uint32_t m = bits & 0x7FFFFFFF;
  const uint32_t rounded = m + 0xFFF + (m >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

inline float half_value(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t mantissa = half & 0x3FF;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000 | mantissa << 13);
  const float magnitude = exponent == 0
                              ? static_cast<float>(mantissa) * 0x1p-24f
                              : std::bit_cast<float>((exponent + 112) << 23 | mantissa << 13);
  return sign != 0 ? -magnitude : magnitude;
}

/// bfloat16 nearest to x, ties to even.
inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace attn8::emulator
