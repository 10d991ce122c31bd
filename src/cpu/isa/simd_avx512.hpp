// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

// The vocabulary of kernels/*-inl.hpp on AVX-512 VNNI: 16 lanes are one register.
namespace attn8::avx512_vnni {

#define ATTN8_INLINE inline __attribute__((always_inline))
/// For the large pieces of the algorithm, whose accumulators must stay in registers.
#define ATTN8_KERNEL_INLINE ATTN8_INLINE
#define ATTN8_INLINE_LAMBDA __attribute__((always_inline))

inline constexpr Isa kIsa = Isa::kAvx512Vnni;
/// vpdpbusd multiplies u8 by s8, so Q codes are stored + 128 and undone by the key's correction.
inline constexpr bool kQueryCodesOffset = true;
inline constexpr bool kValueCodesOffset = false;
/// Vectors of 16 columns per pass of a matrix product: 4 rows x 4 vectors are 16 accumulators,
/// which with 4 operands and 1 broadcast leave 11 of 32 registers to the softmax.
inline constexpr int kVectors = 4;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};

ATTN8_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
ATTN8_INLINE I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
ATTN8_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
ATTN8_INLINE void store(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
ATTN8_INLINE F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
ATTN8_INLINE I32 zero_i32() { return {_mm512_setzero_si512()}; }

ATTN8_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
ATTN8_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
ATTN8_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
ATTN8_INLINE F32 divide(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
/// a * b + c, rounded once where the ISA can; only for modes that need no bit-equality.
ATTN8_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
/// a * b + c rounded once: the same bits on every ISA.
ATTN8_INLINE F32 fused(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
/// The larger; b where either is NaN.
ATTN8_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
/// The smaller; b where either is NaN.
ATTN8_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
ATTN8_INLINE F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
/// Round half to even.
ATTN8_INLINE I32 round_to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
/// x * 2^n for the n whose sum with 1.5 * 2^23 is `magic`; the result must be normal.
ATTN8_INLINE F32 scale_by_power(F32 x, F32 magic) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(
      _mm512_castps_si512(x.v), _mm512_slli_epi32(_mm512_castps_si512(magic.v), 23)))};
}
/// a in lanes [lo, hi), other elsewhere; lo and hi may lie outside [0, 16].
ATTN8_INLINE F32 keep_lanes(F32 a, int lo, int hi, F32 other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 inside = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(lo)) &
                           _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(hi));
  return {_mm512_mask_mov_ps(other.v, inside, a.v)};
}
/// x where a < b, else y.
ATTN8_INLINE F32 where_less(F32 a, F32 b, F32 x, F32 y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
ATTN8_INLINE I32 where_less(F32 a, F32 b, I32 x, I32 y) {
  return {_mm512_mask_mov_epi32(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
ATTN8_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }

/// 16 numbers rounded to bfloat16 (nearest even); a finite. kNative: by AVX512-BF16, which not
/// every CPU of this table has, so that the compiler must not use it of its own accord.
template <bool kNative>
ATTN8_INLINE void store_bfloat16(std::byte* p, F32 a) {
  __m256i narrow;
  if constexpr (kNative) {
    asm("vcvtneps2bf16 %1, %0" : "=v"(narrow) : "v"(a.v));
  } else {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
  }
  _mm256_storeu_si256((__m256i*)p, narrow);
}
ATTN8_INLINE F32 load_bfloat16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

/// Four bytes to every lane.
ATTN8_INLINE I32 broadcast4(const std::byte* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return {_mm512_set1_epi32(word)};
}
ATTN8_INLINE I32 load_bytes(const std::byte* p) { return {_mm512_loadu_si512(p)}; }
// vpdpbusd as an asm statement: from the intrinsic g++ 12 copies accumulators between registers.
/// sum[lane] += sum of 4 products of u8 in `a` with s8 in `b`.
ATTN8_INLINE void dot4_u8_s8(I32& sum, I32 a, I32 b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
}
/// The same for Q codes (stored + 128 here) against K codes, for P against V codes, and for bytes
/// below 128.
ATTN8_INLINE void dot4_query(I32& sum, I32 a, I32 b) { dot4_u8_s8(sum, a, b); }
ATTN8_INLINE void dot4_value(I32& sum, I32 a, I32 b) { dot4_u8_s8(sum, a, b); }
ATTN8_INLINE void dot4_u7_s8(I32& sum, I32 a, I32 b) { dot4_u8_s8(sum, a, b); }

/// sum[lane] += both products of the bfloat16 pairs in `a` and `b`.
template <bool kNative>
ATTN8_INLINE void dot2_bfloat16(F32& sum, I32 a, I32 b) {
  if constexpr (kNative) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  } else {
    const __m512i high = _mm512_set1_epi32(~0xffff);
    const __m512 a_low = _mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16));
    const __m512 b_low = _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16));
    const __m512 a_high = _mm512_castsi512_ps(_mm512_and_si512(a.v, high));
    const __m512 b_high = _mm512_castsi512_ps(_mm512_and_si512(b.v, high));
    sum.v = _mm512_fmadd_ps(a_high, b_high, _mm512_fmadd_ps(a_low, b_low, sum.v));
  }
}

/// |b| of every byte, -128 excepted.
ATTN8_INLINE I32 absolute_bytes(I32 a) { return {_mm512_abs_epi8(a.v)}; }

/// Four vectors of 16 codes in [0, 255] to 64 bytes in the order of p_position().
ATTN8_INLINE void store_codes(std::byte* p, const I32 (&codes)[4]) {
  const __m512i low = _mm512_packs_epi32(codes[0].v, codes[1].v);
  const __m512i high = _mm512_packs_epi32(codes[2].v, codes[3].v);
  _mm512_storeu_si512(p, _mm512_packus_epi16(low, high));
}

// The score grid of `accurate`: E[f] = round(65280 * 2^(-f / 64)) is the rounded product of one of
// eight coarse and one of eight fine powers; for all 64 f that is the correctly rounded value,
// which a test checks.
alignas(64) inline constexpr float kCoarsePower[16] = {
    0x1.fep+15f,     0x1.d3ac0cp+15f, 0x1.acdb7p+15f, 0x1.894386p+15f,
    0x1.689fdcp+15f, 0x1.4ab1bp+15f,  0x1.2f3f7p+15f, 0x1.161458p+15f,
    0x1.fep+15f,     0x1.d3ac0cp+15f, 0x1.acdb7p+15f, 0x1.894386p+15f,
    0x1.689fdcp+15f, 0x1.4ab1bp+15f,  0x1.2f3f7p+15f, 0x1.161458p+15f};
alignas(64) inline constexpr float kFinePower[16] = {
    0x1p+0f,        0x1.fa7c18p-1f, 0x1.f50766p-1f, 0x1.efa1bep-1f, 0x1.ea4afap-1f, 0x1.e502eep-1f,
    0x1.dfc974p-1f, 0x1.da9e6p-1f,  0x1p+0f,        0x1.fa7c18p-1f, 0x1.f50766p-1f, 0x1.efa1bep-1f,
    0x1.ea4afap-1f, 0x1.e502eep-1f, 0x1.dfc974p-1f, 0x1.da9e6p-1f};
ATTN8_INLINE I32 broadcast_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
ATTN8_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
ATTN8_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
ATTN8_INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
/// Logical shifts.
template <int kBits>
ATTN8_INLINE I32 shift_right(I32 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
ATTN8_INLINE I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
/// Products of numbers in [0, 2^15).
ATTN8_INLINE I32 multiply16(I32 a, I32 b) { return {_mm512_madd_epi16(a.v, b.v)}; }
/// Round half to even; |a| <= 2^30.
ATTN8_INLINE I32 round_to_grid(F32 a) { return round_to_int(a); }
ATTN8_INLINE I32 keep_lanes(I32 a, int lo, int hi, I32 other) {
  return {_mm512_castps_si512(
      keep_lanes(F32{_mm512_castsi512_ps(a.v)}, lo, hi, F32{_mm512_castsi512_ps(other.v)}).v)};
}
ATTN8_INLINE int32_t reduce_max(I32 a) { return _mm512_reduce_max_epi32(a.v); }
/// E[d mod 64] >> (d div 64), d unsigned.
ATTN8_INLINE I32 grid_weight(I32 d) {
  const __m512 coarse =
      _mm512_permutexvar_ps(_mm512_srli_epi32(d.v, 3), _mm512_load_ps(kCoarsePower));
  const __m512 fine = _mm512_permutexvar_ps(d.v, _mm512_load_ps(kFinePower));
  const __m512i e = _mm512_cvtps_epi32(_mm512_mul_ps(coarse, fine));
  return {_mm512_srlv_epi32(e, _mm512_srli_epi32(d.v, 6))};
}
/// Keys 16 c .. 16 c + 15 of 64 numbers in the order of score_position().
ATTN8_INLINE I32 load_scores16(const int16_t* p, int c) {
  const __m512i half = _mm512_loadu_si512(p + c / 2 * 32);  // 4 x [4 of even c, 4 of odd c]
  const __m512i quads = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i order = _mm512_permutexvar_epi64(quads, half);
  return {_mm512_cvtepi16_epi32(c % 2 == 0 ? _mm512_castsi512_si256(order)
                                           : _mm512_extracti64x4_epi64(order, 1))};
}

// Rows.
/// Whether `fused` is one instruction, and the two functions below exist.
inline constexpr bool kFastFused = true;
inline constexpr bool kTransposesRows = true;
/// 16 rows of 16 words, row_stride bytes apart, to 16 vectors of one word of each row, 256 bytes
/// apart.
ATTN8_INLINE void transpose_words(const int8_t* rows, int row_stride, std::byte* out) {
  __m512i a[16];
  __m512i b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * row_stride);
    // Words, then pairs of words, within quarters; then the quarters of four vectors, twice.
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 r + w] holds, in quarter q, word 4 q + w of rows 4 r .. 4 r + 3.
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[w], a[4 + w], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(a[w], a[4 + w], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + w], a[12 + w], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + w], a[12 + w], 0xee);
    _mm512_storeu_si512(out + 256 * w, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(out + 256 * (4 + w), _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(out + 256 * (8 + w), _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(out + 256 * (12 + w), _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}
/// Four rows of 64 bytes, row_stride apart, to 64 words of one byte of each row.
ATTN8_INLINE void interleave_rows(const int8_t* rows, int row_stride, std::byte* out) {
  const __m512i r0 = _mm512_loadu_si512(rows);
  const __m512i r1 = _mm512_loadu_si512(rows + row_stride);
  const __m512i r2 = _mm512_loadu_si512(rows + 2 * row_stride);
  const __m512i r3 = _mm512_loadu_si512(rows + 3 * row_stride);
  const __m512i low01 = _mm512_unpacklo_epi8(r0, r1);
  const __m512i high01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi8(r2, r3);
  const __m512i high23 = _mm512_unpackhi_epi8(r2, r3);
  // w[j] holds, in quarter q, the words 16 q + 4 j .. 16 q + 4 j + 3.
  const __m512i w0 = _mm512_unpacklo_epi16(low01, low23);
  const __m512i w1 = _mm512_unpackhi_epi16(low01, low23);
  const __m512i w2 = _mm512_unpacklo_epi16(high01, high23);
  const __m512i w3 = _mm512_unpackhi_epi16(high01, high23);
  const __m512i low_a = _mm512_shuffle_i32x4(w0, w1, 0x44);
  const __m512i high_a = _mm512_shuffle_i32x4(w0, w1, 0xee);
  const __m512i low_b = _mm512_shuffle_i32x4(w2, w3, 0x44);
  const __m512i high_b = _mm512_shuffle_i32x4(w2, w3, 0xee);
  _mm512_storeu_si512(out, _mm512_shuffle_i32x4(low_a, low_b, 0x88));
  _mm512_storeu_si512(out + 64, _mm512_shuffle_i32x4(low_a, low_b, 0xdd));
  _mm512_storeu_si512(out + 128, _mm512_shuffle_i32x4(high_a, high_b, 0x88));
  _mm512_storeu_si512(out + 192, _mm512_shuffle_i32x4(high_a, high_b, 0xdd));
}
ATTN8_INLINE F32 load_float16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
ATTN8_INLINE void store_float16(uint16_t* p, F32 a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
/// Bits of max(running, |a|), lane by lane, as unsigned integers.
ATTN8_INLINE I32 max_abs_bits(I32 running, F32 a) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_max_epu32(running.v, bits)};
}
ATTN8_INLINE uint32_t reduce_max_u32(I32 a) { return _mm512_reduce_max_epu32(a.v); }
ATTN8_INLINE I32 load_u32(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
ATTN8_INLINE void store_u32(uint32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
/// 16 codes in [-127, 127] to bytes in lane order.
ATTN8_INLINE void store_signed_bytes(int8_t* p, I32 a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v));
}
/// 16 double sums.
struct F64 {
  __m512d low, high;
};
ATTN8_INLINE F64 load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
ATTN8_INLINE void store(double* p, F64 a) {
  _mm512_storeu_pd(p, a.low);
  _mm512_storeu_pd(p + 8, a.high);
}
ATTN8_INLINE void add_to(F64& sum, F32 a) {
  sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
  sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
}

}  // namespace attn8::avx512_vnni
