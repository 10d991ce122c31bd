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
/// For the large pieces of the algorithm: separate functions, which compile fast; here nothing is
/// gained by keeping accumulators in registers across them.
#define ATTN8_KERNEL_INLINE inline __attribute__((noinline))
#define ATTN8_INLINE_LAMBDA

inline constexpr Isa kIsa = Isa::kScalar;
inline constexpr bool kQueryCodesOffset = false;
inline constexpr bool kValueCodesOffset = false;
inline constexpr int kVectors = 1;

/// 16 lanes as a vector type of the compiler's, which lowers it to whatever the target has; every
/// operation is the IEEE one lane by lane.
typedef float Float16Lanes __attribute__((vector_size(64)));
typedef int32_t Int16Lanes __attribute__((vector_size(64)));
typedef uint32_t Uint16Lanes __attribute__((vector_size(64)));

struct F32 {
  Float16Lanes v;
};
struct I32 {
  Int16Lanes v;
};

/// The bits of one vector type as another.
template <class To, class From>
ATTN8_INLINE To bits_as(const From& from) {
  return reinterpret_cast<To>(from);
}
/// 16 elements from any address.
template <class R, class T>
ATTN8_INLINE R load_lanes(const T* p) {
  R result;
  std::memcpy(&result.v, p, 64);
  return result;
}
constexpr Int16Lanes kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

ATTN8_INLINE F32 load(const float* p) { return load_lanes<F32>(p); }
ATTN8_INLINE I32 load(const int32_t* p) { return load_lanes<I32>(p); }
ATTN8_INLINE void store(float* p, const F32& a) { std::memcpy(p, &a.v, 64); }
ATTN8_INLINE void store(int32_t* p, const I32& a) { std::memcpy(p, &a.v, 64); }
ATTN8_INLINE F32 broadcast(float x) { return {Float16Lanes{} + x}; }
ATTN8_INLINE I32 zero_i32() { return {Int16Lanes{}}; }

ATTN8_INLINE F32 operator+(const F32& a, const F32& b) { return {a.v + b.v}; }
ATTN8_INLINE F32 operator-(const F32& a, const F32& b) { return {a.v - b.v}; }
ATTN8_INLINE F32 operator*(const F32& a, const F32& b) { return {a.v * b.v}; }
ATTN8_INLINE F32 divide(const F32& a, const F32& b) { return {a.v / b.v}; }
/// a * b + c, rounded once where the ISA can; only for modes that need no bit-equality.
ATTN8_INLINE F32 multiply_add(const F32& a, const F32& b, const F32& c) {
  return {a.v * b.v + c.v};
}
/// a * b + c rounded once: the same bits on every ISA.
ATTN8_INLINE F32 fused(const F32& a, const F32& b, const F32& c) {
  F32 result;
  for (int i = 0; i < 16; ++i) result.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return result;
}
/// The larger; b where either is NaN.
ATTN8_INLINE F32 max(const F32& a, const F32& b) { return {a.v > b.v ? a.v : b.v}; }
/// The smaller; b where either is NaN.
ATTN8_INLINE F32 min(const F32& a, const F32& b) { return {a.v < b.v ? a.v : b.v}; }
ATTN8_INLINE F32 to_float(const I32& a) { return {__builtin_convertvector(a.v, Float16Lanes)}; }
/// Round half to even; |a| < 2^22. The sum with 1.5 * 2^23 has the integer in its low bits.
ATTN8_INLINE I32 round_to_int(const F32& a) {
  return {bits_as<Int16Lanes>(a.v + 0x1.8p23f) - std::bit_cast<int32_t>(0x1.8p23f)};
}
/// x * 2^n for the n whose sum with 1.5 * 2^23 is `magic`; the result must be normal.
ATTN8_INLINE F32 scale_by_power(const F32& x, const F32& magic) {
  return {bits_as<Float16Lanes>(bits_as<Uint16Lanes>(x.v) + (bits_as<Uint16Lanes>(magic.v) << 23))};
}
/// a in lanes [lo, hi), other elsewhere; lo and hi may lie outside [0, 16].
ATTN8_INLINE F32 keep_lanes(const F32& a, int lo, int hi, const F32& other) {
  return {((kLane >= lo) & (kLane < hi)) ? a.v : other.v};
}
/// x where a < b, else y.
ATTN8_INLINE F32 where_less(const F32& a, const F32& b, const F32& x, const F32& y) {
  return {a.v < b.v ? x.v : y.v};
}
ATTN8_INLINE I32 where_less(const F32& a, const F32& b, const I32& x, const I32& y) {
  return {a.v < b.v ? x.v : y.v};
}
ATTN8_INLINE float reduce_max(const F32& a) {
  float largest = a.v[0];
  for (int i = 1; i < 16; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}

/// 16 numbers rounded to bfloat16 (nearest even); a finite.
template <bool kNative>
ATTN8_INLINE void store_bfloat16(std::byte* p, const F32& a) {
  static_assert(!kNative);
  for (int i = 0; i < 16; ++i) {
    const uint16_t narrow = float_to_bfloat16(a.v[i]);
    std::memcpy(p + 2 * i, &narrow, 2);
  }
}
/// sum[lane] += both products of the bfloat16 pairs in `a` and `b`.
template <bool kNative>
ATTN8_INLINE void dot2_bfloat16(F32& sum, const I32& a, const I32& b) {
  static_assert(!kNative);
  const auto low = [](const I32& x) {
    return bits_as<Float16Lanes>(bits_as<Uint16Lanes>(x.v) << 16);
  };
  const auto high = [](const I32& x) {
    return bits_as<Float16Lanes>(bits_as<Uint16Lanes>(x.v) & ~0xffffu);
  };
  sum.v = high(a) * high(b) + (low(a) * low(b) + sum.v);
}
ATTN8_INLINE F32 load_bfloat16(const uint16_t* p) {
  F32 result;
  for (int i = 0; i < 16; ++i) result.v[i] = bfloat16_to_float(p[i]);
  return result;
}

/// Four bytes to every lane.
ATTN8_INLINE I32 broadcast4(const std::byte* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return {Int16Lanes{} + word};
}
ATTN8_INLINE I32 load_bytes(const std::byte* p) { return load_lanes<I32>(p); }
// The four products of a lane one after the other: shifting left and back extends the sign of a
// byte, and codes of 8 bits multiply within 16.
/// sum[lane] += sum of 4 products of u8 in `a` with s8 in `b`.
ATTN8_INLINE void dot4_u8_s8(I32& sum, const I32& a, const I32& b) {
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; ++byte) {
    const Int16Lanes x = a.v >> (8 * byte) & 0xff;
    const Int16Lanes y = bits_as<Int16Lanes>(bits_as<Uint16Lanes>(b.v) << (24 - 8 * byte)) >> 24;
    sum.v += x * y;
  }
}
/// The same for P against V codes, and for bytes below 128.
ATTN8_INLINE void dot4_value(I32& sum, const I32& a, const I32& b) { dot4_u8_s8(sum, a, b); }
ATTN8_INLINE void dot4_u7_s8(I32& sum, const I32& a, const I32& b) { dot4_u8_s8(sum, a, b); }
/// The same for Q codes (s8) against K codes.
ATTN8_INLINE void dot4_query(I32& sum, const I32& a, const I32& b) {
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; ++byte) {
    const Int16Lanes x = bits_as<Int16Lanes>(bits_as<Uint16Lanes>(a.v) << (24 - 8 * byte)) >> 24;
    const Int16Lanes y = bits_as<Int16Lanes>(bits_as<Uint16Lanes>(b.v) << (24 - 8 * byte)) >> 24;
    sum.v += x * y;
  }
}

/// |b| of every byte, -128 excepted.
ATTN8_INLINE I32 absolute_bytes(const I32& a) {
  int8_t bytes[64];
  std::memcpy(bytes, &a.v, 64);
  for (int8_t& byte : bytes) byte = static_cast<int8_t>(byte < 0 ? -byte : byte);
  return load_lanes<I32>(bytes);
}

/// Four vectors of 16 codes in [0, 255] to 64 bytes in the order of p_position().
ATTN8_INLINE void store_codes(std::byte* p, const I32 (&codes)[4]) {
  for (int key = 0; key < 64; ++key) {
    p[p_position(key)] = static_cast<std::byte>(codes[key / 16].v[key % 16]);
  }
}

// The score grid of `accurate`.
/// E[f] = round(65280 * 2^(-f / 64)).
inline constexpr uint16_t kGridWeight[64] = {
    65280, 64577, 63881, 63193, 62512, 61839, 61173, 60514, 59862, 59217, 58579, 57948, 57324,
    56707, 56096, 55491, 54894, 54302, 53717, 53139, 52566, 52000, 51440, 50886, 50338, 49796,
    49259, 48729, 48204, 47684, 47171, 46663, 46160, 45663, 45171, 44684, 44203, 43727, 43256,
    42790, 42329, 41873, 41422, 40976, 40534, 40098, 39666, 39238, 38816, 38398, 37984, 37575,
    37170, 36770, 36374, 35982, 35594, 35211, 34831, 34456, 34085, 33718, 33355, 32995};
ATTN8_INLINE I32 broadcast_i32(int32_t x) { return {Int16Lanes{} + x}; }
ATTN8_INLINE I32 operator+(const I32& a, const I32& b) { return {a.v + b.v}; }
/// Wraps, as the vector instructions do.
ATTN8_INLINE I32 operator-(const I32& a, const I32& b) {
  return {bits_as<Int16Lanes>(bits_as<Uint16Lanes>(a.v) - bits_as<Uint16Lanes>(b.v))};
}
ATTN8_INLINE I32 max(const I32& a, const I32& b) { return {a.v > b.v ? a.v : b.v}; }
/// Logical shifts.
template <int kBits>
ATTN8_INLINE I32 shift_right(const I32& a) {
  return {bits_as<Int16Lanes>(bits_as<Uint16Lanes>(a.v) >> kBits)};
}
template <int kBits>
ATTN8_INLINE I32 shift_left(const I32& a) {
  return {bits_as<Int16Lanes>(bits_as<Uint16Lanes>(a.v) << kBits)};
}
/// Products of numbers in [0, 2^15).
ATTN8_INLINE I32 multiply16(const I32& a, const I32& b) { return {a.v * b.v}; }
/// Round half to even; |a| <= 2^30.
ATTN8_INLINE I32 round_to_grid(const F32& a) {
  I32 result;
  for (int i = 0; i < 16; ++i) {
    result.v[i] = static_cast<int32_t>(__builtin_rintf(a.v[i]));
  }
  return result;
}
ATTN8_INLINE I32 keep_lanes(const I32& a, int lo, int hi, const I32& other) {
  return {((kLane >= lo) & (kLane < hi)) ? a.v : other.v};
}
ATTN8_INLINE int32_t reduce_max(const I32& a) {
  int32_t largest = a.v[0];
  for (int i = 1; i < 16; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}
/// E[d mod 64] >> (d div 64), d unsigned.
ATTN8_INLINE I32 grid_weight(const I32& d) {
  I32 result;
  for (int i = 0; i < 16; ++i) {
    const auto distance = static_cast<uint32_t>(d.v[i]);
    const uint32_t shift = distance >> 6;
    result.v[i] = shift < 16 ? kGridWeight[distance & 63] >> shift : 0;
  }
  return result;
}
/// Keys 16 c .. 16 c + 15 of 64 numbers in the order of score_position().
ATTN8_INLINE I32 load_scores16(const int16_t* p, int c) {
  I32 result;
  for (int i = 0; i < 16; ++i) result.v[i] = p[score_position(16 * c + i)];
  return result;
}

// Rows.
/// Whether `fused` is one instruction, and whether rows are transposed by instructions of the ISA.
inline constexpr bool kFastFused = false;
inline constexpr bool kTransposesRows = false;
inline void transpose_words(const int8_t* rows, int row_stride, std::byte* out);
inline void interleave_rows(const int8_t* rows, int row_stride, std::byte* out);
ATTN8_INLINE F32 load_float16(const uint16_t* p) {
  F32 result;
  for (int i = 0; i < 16; ++i) result.v[i] = float16_to_float(p[i]);
  return result;
}
ATTN8_INLINE void store_float16(uint16_t* p, const F32& a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_float16(a.v[i]);
}
/// Bits of max(running, |a|), lane by lane, as unsigned integers.
ATTN8_INLINE I32 max_abs_bits(const I32& running, const F32& a) {
  const Int16Lanes bits = bits_as<Int16Lanes>(a.v) & 0x7fffffff;  // not negative: order kept
  return {bits > running.v ? bits : running.v};
}
ATTN8_INLINE uint32_t reduce_max_u32(const I32& a) {
  int32_t largest = a.v[0];
  for (int i = 1; i < 16; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return static_cast<uint32_t>(largest);
}
ATTN8_INLINE I32 load_u32(const uint32_t* p) { return load_lanes<I32>(p); }
ATTN8_INLINE void store_u32(uint32_t* p, const I32& a) { std::memcpy(p, &a.v, 64); }
/// 16 codes in [-127, 127] to bytes in lane order.
ATTN8_INLINE void store_signed_bytes(int8_t* p, const I32& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
/// 16 double sums.
struct F64 {
  double v[16];
};
ATTN8_INLINE F64 load(const double* p) {
  F64 a;
  std::memcpy(a.v, p, sizeof(a.v));
  return a;
}
ATTN8_INLINE void store(double* p, const F64& a) { std::memcpy(p, a.v, sizeof(a.v)); }
ATTN8_INLINE void add_to(F64& sum, const F32& a) {
  for (int i = 0; i < 16; ++i) sum.v[i] += static_cast<double>(a.v[i]);
}

}  // namespace attn8::scalar
