// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/element.hpp"
#include "core/packed_layout.hpp"

// The vocabulary of kernels/*-inl.hpp in portable C++: 16 lanes are an array, with the same lane
// order in every sum, so that the integer modes give the bits of the vector ISAs.
namespace attn8::scalar {

#define ATTN8_INLINE inline __attribute__((always_inline))
#define ATTN8_INLINE_LAMBDA __attribute__((always_inline))

inline constexpr Isa kIsa = Isa::kScalar;
inline constexpr bool kQueryCodesOffset = false;
inline constexpr int kVectors = 1;

struct F32 {
  float v[16];
};
struct I32 {
  int32_t v[16];
};

template <class R, class F>
ATTN8_INLINE R lanes(F f) {
  R result;
  for (int i = 0; i < 16; ++i) result.v[i] = f(i);
  return result;
}

ATTN8_INLINE F32 load(const float* p) {
  return lanes<F32>([=](int i) { return p[i]; });
}
ATTN8_INLINE I32 load(const int32_t* p) {
  return lanes<I32>([=](int i) { return p[i]; });
}
ATTN8_INLINE void store(float* p, const F32& a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
ATTN8_INLINE F32 broadcast(float x) {
  return lanes<F32>([=](int) { return x; });
}
ATTN8_INLINE I32 zero_i32() { return {}; }

ATTN8_INLINE F32 operator+(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] + b.v[i]; });
}
ATTN8_INLINE F32 operator-(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] - b.v[i]; });
}
ATTN8_INLINE F32 operator*(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] * b.v[i]; });
}
ATTN8_INLINE F32 divide(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] / b.v[i]; });
}
/// a * b + c, rounded once where the ISA can; only for modes that need no bit-equality.
ATTN8_INLINE F32 multiply_add(const F32& a, const F32& b, const F32& c) {
  return lanes<F32>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
/// The larger; b where either is NaN.
ATTN8_INLINE F32 max(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
/// The smaller; b where either is NaN.
ATTN8_INLINE F32 min(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
ATTN8_INLINE F32 to_float(const I32& a) {
  return lanes<F32>([&](int i) { return static_cast<float>(a.v[i]); });
}
/// Round half to even; |a| < 2^22. The sum with 1.5 * 2^23 has the integer in its low bits.
ATTN8_INLINE I32 round_to_int(const F32& a) {
  return lanes<I32>([&](int i) {
    return std::bit_cast<int32_t>(a.v[i] + 0x1.8p23f) - std::bit_cast<int32_t>(0x1.8p23f);
  });
}
/// x * 2^n for the n whose sum with 1.5 * 2^23 is `magic`; the result must be normal.
ATTN8_INLINE F32 scale_by_power(const F32& x, const F32& magic) {
  return lanes<F32>([&](int i) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(x.v[i]) +
                                (std::bit_cast<uint32_t>(magic.v[i]) << 23));
  });
}
/// a in lanes [lo, hi), other elsewhere; lo and hi may lie outside [0, 16].
ATTN8_INLINE F32 keep_lanes(const F32& a, int lo, int hi, const F32& other) {
  return lanes<F32>([&](int i) { return i >= lo && i < hi ? a.v[i] : other.v[i]; });
}
/// a where x >= bound, b elsewhere.
ATTN8_INLINE F32 select_not_below(const F32& x, const F32& bound, const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return x.v[i] >= bound.v[i] ? a.v[i] : b.v[i]; });
}
ATTN8_INLINE float reduce_max(const F32& a) {
  float largest = a.v[0];
  for (int i = 1; i < 16; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}

/// p rounded to bfloat16 (nearest even) and back; p finite.
ATTN8_INLINE F32 round_to_bfloat16(const F32& p) {
  return lanes<F32>([&](int i) { return bfloat16_to_float(float_to_bfloat16(p.v[i])); });
}
ATTN8_INLINE F32 load_bfloat16(const uint16_t* p) {
  return lanes<F32>([=](int i) { return bfloat16_to_float(p[i]); });
}

/// Four bytes to every lane.
ATTN8_INLINE I32 broadcast4(const std::byte* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return lanes<I32>([=](int) { return word; });
}
ATTN8_INLINE I32 load_bytes(const std::byte* p) {
  I32 result;
  std::memcpy(result.v, p, 64);
  return result;
}
template <class A>
ATTN8_INLINE void dot4(I32& sum, const I32& a, const I32& b) {
  for (int i = 0; i < 16; ++i) {
    A x[4];
    int8_t y[4];
    std::memcpy(x, &a.v[i], 4);
    std::memcpy(y, &b.v[i], 4);
    sum.v[i] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
  }
}
/// sum[lane] += sum of 4 products of u8 in `a` with s8 in `b`.
ATTN8_INLINE void dot4_u8_s8(I32& sum, const I32& a, const I32& b) { dot4<uint8_t>(sum, a, b); }
/// The same for Q codes (s8) against K codes.
ATTN8_INLINE void dot4_query(I32& sum, const I32& a, const I32& b) { dot4<int8_t>(sum, a, b); }

/// Four vectors of 16 codes in [0, 255] to 64 bytes in the order of p_position().
ATTN8_INLINE void store_codes(std::byte* p, const I32 (&codes)[4]) {
  for (int key = 0; key < 64; ++key) {
    p[p_position(key)] = static_cast<std::byte>(codes[key / 16].v[key % 16]);
  }
}

// Rows.
ATTN8_INLINE F32 load_float16(const uint16_t* p) {
  return lanes<F32>([=](int i) { return float16_to_float(p[i]); });
}
ATTN8_INLINE void store_float16(uint16_t* p, const F32& a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_float16(a.v[i]);
}
/// Bits of max(running, |a|), lane by lane, as unsigned integers.
ATTN8_INLINE I32 max_abs_bits(const I32& running, const F32& a) {
  return lanes<I32>([&](int i) {
    const int32_t bits = std::bit_cast<int32_t>(a.v[i]) & 0x7fffffff;  // not negative: order kept
    return bits > running.v[i] ? bits : running.v[i];
  });
}
ATTN8_INLINE uint32_t reduce_max_u32(const I32& a) {
  int32_t largest = a.v[0];
  for (int i = 1; i < 16; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return static_cast<uint32_t>(largest);
}
ATTN8_INLINE I32 load_u32(const uint32_t* p) {
  return lanes<I32>([=](int i) { return static_cast<int32_t>(p[i]); });
}
ATTN8_INLINE void store_u32(uint32_t* p, const I32& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint32_t>(a.v[i]);
}
/// 16 codes in [-127, 127] to bytes in lane order.
ATTN8_INLINE void store_signed_bytes(int8_t* p, const I32& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
ATTN8_INLINE void add_to_doubles(double* sums, const F32& a) {
  for (int i = 0; i < 16; ++i) sums[i] += static_cast<double>(a.v[i]);
}

}  // namespace attn8::scalar
