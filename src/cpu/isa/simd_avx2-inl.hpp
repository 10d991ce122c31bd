// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The vocabulary of kernels/*-inl.hpp on AVX2 + FMA + F16C: 16 lanes are two registers. Included
// inside the namespace of an ISA that says how it multiplies bytes: kIsa, and with ATTN8_HAS_VNNI
// the encoding of vpdpbusd, for files compiled without the flags that would let the compiler use
// it of its own accord.

#define ATTN8_INLINE inline __attribute__((always_inline))
/// For the large pieces of the algorithm, whose accumulators must stay in registers.
#define ATTN8_KERNEL_INLINE ATTN8_INLINE
#define ATTN8_INLINE_LAMBDA __attribute__((always_inline))

#ifdef ATTN8_HAS_VNNI
/// vpdpbusd multiplies u8 by s8, so Q codes are stored + 128 and undone by the key's correction.
inline constexpr bool kQueryCodesOffset = true;
inline constexpr bool kValueCodesOffset = false;
#else
inline constexpr bool kQueryCodesOffset = false;
/// P is stored - 128, because u8 times s8 in pairs overflows 16 bits; the sums of V undo it.
inline constexpr bool kValueCodesOffset = true;
#endif
/// 4 rows x 1 vector of 16 columns are 8 of 16 registers; two operands, one broadcast and the
/// temporaries of the byte products take the rest. Eight sums also cover the latency of vpdpbusd:
/// two ports, four cycles.
inline constexpr int kVectors = 1;

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};

ATTN8_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ATTN8_INLINE I32 load(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
ATTN8_INLINE void store(float* p, F32 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
ATTN8_INLINE void store(int32_t* p, I32 a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)(p + 8), a.hi);
}
ATTN8_INLINE F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ATTN8_INLINE I32 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

ATTN8_INLINE F32 operator+(F32 a, F32 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
ATTN8_INLINE F32 operator-(F32 a, F32 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
ATTN8_INLINE F32 operator*(F32 a, F32 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
ATTN8_INLINE F32 divide(F32 a, F32 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
/// a * b + c, rounded once where the ISA can; only for modes that need no bit-equality.
ATTN8_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
/// a * b + c rounded once: the same bits on every ISA.
ATTN8_INLINE F32 fused(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
/// The larger; b where either is NaN.
ATTN8_INLINE F32 max(F32 a, F32 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
/// The smaller; b where either is NaN.
ATTN8_INLINE F32 min(F32 a, F32 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
ATTN8_INLINE F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
/// Round half to even.
ATTN8_INLINE I32 round_to_int(F32 a) {
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
ATTN8_INLINE __m256 scale_by_power(__m256 x, __m256 magic) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(magic), 23)));
}
/// x * 2^n for the n whose sum with 1.5 * 2^23 is `magic`; the result must be normal.
ATTN8_INLINE F32 scale_by_power(F32 x, F32 magic) {
  return {scale_by_power(x.lo, magic.lo), scale_by_power(x.hi, magic.hi)};
}
/// a in lanes [lo, hi), other elsewhere; lo and hi may lie outside [0, 16].
ATTN8_INLINE F32 keep_lanes(F32 a, int lo, int hi, F32 other) {
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  const __m256i first = _mm256_set1_epi32(lo - 1);
  const __m256i end = _mm256_set1_epi32(hi);
  const __m256i in_low =
      _mm256_and_si256(_mm256_cmpgt_epi32(low, first), _mm256_cmpgt_epi32(end, low));
  const __m256i in_high =
      _mm256_and_si256(_mm256_cmpgt_epi32(high, first), _mm256_cmpgt_epi32(end, high));
  return {_mm256_blendv_ps(other.lo, a.lo, _mm256_castsi256_ps(in_low)),
          _mm256_blendv_ps(other.hi, a.hi, _mm256_castsi256_ps(in_high))};
}
/// x where a < b, else y.
ATTN8_INLINE F32 where_less(F32 a, F32 b, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
ATTN8_INLINE I32 where_less(F32 a, F32 b, I32 x, I32 y) {
  const F32 chosen = where_less(a, b, F32{_mm256_castsi256_ps(x.lo), _mm256_castsi256_ps(x.hi)},
                                F32{_mm256_castsi256_ps(y.lo), _mm256_castsi256_ps(y.hi)});
  return {_mm256_castps_si256(chosen.lo), _mm256_castps_si256(chosen.hi)};
}
ATTN8_INLINE float reduce_max(F32 a) {
  const __m256 m8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
  const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
  return _mm_cvtss_f32(_mm_max_ss(m2, _mm_shuffle_ps(m2, m2, 1)));
}

ATTN8_INLINE __m256i round_to_bfloat16(__m256 p) {
  const __m256i bits = _mm256_castps_si256(p);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_srli_epi32(sum, 16);
}
/// 16 numbers rounded to bfloat16 (nearest even); a finite.
template <bool kNative>
ATTN8_INLINE void store_bfloat16(std::byte* p, F32 a) {
  static_assert(!kNative);
  // Packing works by 128-bit lanes: lo0 hi0 | lo1 hi1, put in order by the permutation.
  const __m256i words = _mm256_packus_epi32(round_to_bfloat16(a.lo), round_to_bfloat16(a.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0)));
}
ATTN8_INLINE __m256 widen_bfloat16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
ATTN8_INLINE F32 load_bfloat16(const uint16_t* p) {
  return {widen_bfloat16(p), widen_bfloat16(p + 8)};
}

/// Four bytes to every lane.
ATTN8_INLINE I32 broadcast4(const std::byte* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  const __m256i a = _mm256_set1_epi32(word);
  return {a, a};
}
ATTN8_INLINE I32 load_bytes(const std::byte* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
#ifdef ATTN8_HAS_VNNI
ATTN8_INLINE void dot4_u8_s8(__m256i& sum, __m256i a, __m256i b) {
  asm(ATTN8_VPDPBUSD " %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
/// sum[lane] += sum of 4 products of u8 in `a` with s8 in `b`.
ATTN8_INLINE void dot4_u8_s8(I32& sum, I32 a, I32 b) {
  dot4_u8_s8(sum.lo, a.lo, b.lo);
  dot4_u8_s8(sum.hi, a.hi, b.hi);
}
/// The same for Q codes (stored + 128 here) against K codes, for P against V codes, and for bytes
/// below 128.
ATTN8_INLINE void dot4_query(I32& sum, I32 a, I32 b) { dot4_u8_s8(sum, a, b); }
ATTN8_INLINE void dot4_value(I32& sum, I32 a, I32 b) { dot4_u8_s8(sum, a, b); }
ATTN8_INLINE void dot4_u7_s8(I32& sum, I32 a, I32 b) { dot4_u8_s8(sum, a, b); }
#else
// vpmaddubsw saturates a sum of two products to 16 bits. |a| * (+-b) of codes stays in range, also
// where a is -128: 2 * 128 * 127 = 32512.
ATTN8_INLINE __m256i dot4_s8_s8(__m256i sum, __m256i a, __m256i b) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
/// sum[lane] += sum of 4 products of Q codes (s8 in [-127, 127]) in `a` with K codes in `b`.
ATTN8_INLINE void dot4_query(I32& sum, I32 a, I32 b) {
  sum.lo = dot4_s8_s8(sum.lo, a.lo, b.lo);
  sum.hi = dot4_s8_s8(sum.hi, a.hi, b.hi);
}
/// The same for P, stored - 128, against V codes.
ATTN8_INLINE void dot4_value(I32& sum, I32 a, I32 b) { dot4_query(sum, a, b); }
/// sum[lane] += sum of 4 products of u8 below 128 in `a` with s8 in `b`.
ATTN8_INLINE void dot4_u7_s8(I32& sum, I32 a, I32 b) {
  const __m256i ones = _mm256_set1_epi16(1);
  sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(a.lo, b.lo), ones));
  sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(a.hi, b.hi), ones));
}
#endif

ATTN8_INLINE __m256 dot2_bfloat16(__m256 sum, __m256i a, __m256i b) {
  const __m256i high = _mm256_set1_epi32(~0xffff);
  const __m256 a_low = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
  const __m256 b_low = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
  const __m256 a_high = _mm256_castsi256_ps(_mm256_and_si256(a, high));
  const __m256 b_high = _mm256_castsi256_ps(_mm256_and_si256(b, high));
  return _mm256_fmadd_ps(a_high, b_high, _mm256_fmadd_ps(a_low, b_low, sum));
}
/// sum[lane] += both products of the bfloat16 pairs in `a` and `b`.
template <bool kNative>
ATTN8_INLINE void dot2_bfloat16(F32& sum, I32 a, I32 b) {
  static_assert(!kNative);
  sum = {dot2_bfloat16(sum.lo, a.lo, b.lo), dot2_bfloat16(sum.hi, a.hi, b.hi)};
}

/// |b| of every byte, -128 excepted.
ATTN8_INLINE I32 absolute_bytes(I32 a) { return {_mm256_abs_epi8(a.lo), _mm256_abs_epi8(a.hi)}; }

/// Four vectors of 16 codes in [0, 255] to 64 bytes in the order of p_position(), as dot4_value()
/// wants them.
ATTN8_INLINE void store_codes(std::byte* p, const I32 (&codes)[4]) {
  const __m256i flip = _mm256_set1_epi8(kValueCodesOffset ? -128 : 0);
  const __m256i low = _mm256_packus_epi16(_mm256_packs_epi32(codes[0].lo, codes[1].lo),
                                          _mm256_packs_epi32(codes[2].lo, codes[3].lo));
  const __m256i high = _mm256_packus_epi16(_mm256_packs_epi32(codes[0].hi, codes[1].hi),
                                           _mm256_packs_epi32(codes[2].hi, codes[3].hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_xor_si256(low, flip));
  _mm256_storeu_si256((__m256i*)(p + 32), _mm256_xor_si256(high, flip));
}

// The score grid of `accurate`: E[f] = round(65280 * 2^(-f / 64)) is the rounded product of one of
// eight coarse and one of eight fine powers; for all 64 f that is the correctly rounded value,
// which a test checks.
alignas(32) inline constexpr float kCoarsePower[8] = {
    0x1.fep+15f,     0x1.d3ac0cp+15f, 0x1.acdb7p+15f, 0x1.894386p+15f,
    0x1.689fdcp+15f, 0x1.4ab1bp+15f,  0x1.2f3f7p+15f, 0x1.161458p+15f};
alignas(32) inline constexpr float kFinePower[8] = {0x1p+0f,        0x1.fa7c18p-1f, 0x1.f50766p-1f,
                                                    0x1.efa1bep-1f, 0x1.ea4afap-1f, 0x1.e502eep-1f,
                                                    0x1.dfc974p-1f, 0x1.da9e6p-1f};
ATTN8_INLINE I32 broadcast_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
ATTN8_INLINE I32 operator+(I32 a, I32 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
ATTN8_INLINE I32 operator-(I32 a, I32 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
ATTN8_INLINE I32 max(I32 a, I32 b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
/// Logical shifts.
template <int kBits>
ATTN8_INLINE I32 shift_right(I32 a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
template <int kBits>
ATTN8_INLINE I32 shift_left(I32 a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
/// Products of numbers in [0, 2^15).
ATTN8_INLINE I32 multiply16(I32 a, I32 b) {
  return {_mm256_madd_epi16(a.lo, b.lo), _mm256_madd_epi16(a.hi, b.hi)};
}
/// Round half to even; |a| <= 2^30.
ATTN8_INLINE I32 round_to_grid(F32 a) { return round_to_int(a); }
ATTN8_INLINE I32 keep_lanes(I32 a, int lo, int hi, I32 other) {
  const F32 kept = keep_lanes(F32{_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}, lo, hi,
                              F32{_mm256_castsi256_ps(other.lo), _mm256_castsi256_ps(other.hi)});
  return {_mm256_castps_si256(kept.lo), _mm256_castps_si256(kept.hi)};
}
ATTN8_INLINE int32_t reduce_max(I32 a) {
  const __m256i m8 = _mm256_max_epi32(a.lo, a.hi);
  const __m128i m4 = _mm_max_epi32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256(m8, 1));
  const __m128i m2 = _mm_max_epi32(m4, _mm_shuffle_epi32(m4, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m2, _mm_shuffle_epi32(m2, 0xb1)));
}
ATTN8_INLINE __m256i grid_weight(__m256i d) {
  // The permutation looks at the low three bits of its index only.
  const __m256 coarse =
      _mm256_permutevar8x32_ps(_mm256_load_ps(kCoarsePower), _mm256_srli_epi32(d, 3));
  const __m256 fine = _mm256_permutevar8x32_ps(_mm256_load_ps(kFinePower), d);
  const __m256i e = _mm256_cvtps_epi32(_mm256_mul_ps(coarse, fine));
  return _mm256_srlv_epi32(e, _mm256_srli_epi32(d, 6));
}
/// E[d mod 64] >> (d div 64), d unsigned.
ATTN8_INLINE I32 grid_weight(I32 d) { return {grid_weight(d.lo), grid_weight(d.hi)}; }
/// Keys 16 c .. 16 c + 15 of 64 numbers in the order of score_position().
ATTN8_INLINE I32 load_scores16(const int16_t* p, int c) {
  const int16_t* quad = p + c / 2 * 32 + c % 2 * 4;  // 4 of 8 numbers are ours
  const __m128i low = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)quad),
                                         _mm_loadl_epi64((const __m128i*)(quad + 8)));
  const __m128i high = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)(quad + 16)),
                                          _mm_loadl_epi64((const __m128i*)(quad + 24)));
  return {_mm256_cvtepi16_epi32(low), _mm256_cvtepi16_epi32(high)};
}

// Rows.
/// Whether `fused` is one instruction, and whether rows are transposed by instructions of the ISA.
inline constexpr bool kFastFused = true;
inline constexpr bool kTransposesRows = false;
inline void transpose_words(const int8_t* rows, int row_stride, std::byte* out);
inline void interleave_rows(const int8_t* rows, int row_stride, std::byte* out);
ATTN8_INLINE F32 load_float16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
ATTN8_INLINE void store_float16(uint16_t* p, F32 a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
/// Bits of max(running, |a|), lane by lane, as unsigned integers.
ATTN8_INLINE I32 max_abs_bits(I32 running, F32 a) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_max_epu32(running.lo, _mm256_and_si256(_mm256_castps_si256(a.lo), mask)),
          _mm256_max_epu32(running.hi, _mm256_and_si256(_mm256_castps_si256(a.hi), mask))};
}
ATTN8_INLINE uint32_t reduce_max_u32(I32 a) {
  const __m256i m8 = _mm256_max_epu32(a.lo, a.hi);
  const __m128i m4 = _mm_max_epu32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256(m8, 1));
  const __m128i m2 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(m2, _mm_shuffle_epi32(m2, 0xb1))));
}
ATTN8_INLINE I32 load_u32(const uint32_t* p) { return load((const int32_t*)p); }
ATTN8_INLINE void store_u32(uint32_t* p, I32 a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)(p + 8), a.hi);
}
/// 16 codes in [-127, 127] to bytes in lane order.
ATTN8_INLINE void store_signed_bytes(int8_t* p, I32 a) {
  // Packing works by 128-bit lanes: lo0 hi0 | lo1 hi1, put in order by the permutation.
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), _MM_SHUFFLE(3, 1, 2, 0));
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words),
                                                _mm256_extracti128_si256(words, 1)));
}
/// 16 double sums.
struct F64 {
  __m256d v[4];
};
ATTN8_INLINE F64 load(const double* p) {
  return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8),
           _mm256_loadu_pd(p + 12)}};
}
ATTN8_INLINE void store(double* p, const F64& a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, a.v[i]);
}
ATTN8_INLINE void add_to(F64& sum, F32 a) {
  sum.v[0] = _mm256_add_pd(sum.v[0], _mm256_cvtps_pd(_mm256_castps256_ps128(a.lo)));
  sum.v[1] = _mm256_add_pd(sum.v[1], _mm256_cvtps_pd(_mm256_extractf128_ps(a.lo, 1)));
  sum.v[2] = _mm256_add_pd(sum.v[2], _mm256_cvtps_pd(_mm256_castps256_ps128(a.hi)));
  sum.v[3] = _mm256_add_pd(sum.v[3], _mm256_cvtps_pd(_mm256_extractf128_ps(a.hi, 1)));
}
