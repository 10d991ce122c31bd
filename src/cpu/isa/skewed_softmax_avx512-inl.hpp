// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The softmax of attend_skewed_avx512-inl.hpp: scores as 16-bit numbers, weights by a table and a
// shift, exact sums. Included inside the ISA's namespace after skewed_items_avx512-inl.hpp.

/// E of docs/numerics.md.
alignas(64) constexpr uint16_t kGridWeight16[64] = {
    65280, 64577, 63881, 63193, 62512, 61839, 61173, 60514, 59862, 59217, 58579, 57948, 57324,
    56707, 56096, 55491, 54894, 54302, 53717, 53139, 52566, 52000, 51440, 50886, 50338, 49796,
    49259, 48729, 48204, 47684, 47171, 46663, 46160, 45663, 45171, 44684, 44203, 43727, 43256,
    42790, 42329, 41873, 41422, 40976, 40534, 40098, 39666, 39238, 38816, 38398, 37984, 37575,
    37170, 36770, 36374, 35982, 35594, 35211, 34831, 34456, 34085, 33718, 33355, 32995};

struct alignas(64) Words {
  int16_t word[32];
};
constexpr Words repeat_word(int16_t value) {
  Words words = {};
  for (int16_t& word : words.word) word = value;
  return words;
}
/// Keys of the first 32 scores of a group in the order of score_position().
constexpr Words score_keys() {
  Words words = {};
  for (int16_t key = 0; key < 32; ++key) words.word[score_position(key)] = key;
  return words;
}
constexpr Words kHalf16 = repeat_word(128);
constexpr Words kLowByte16 = repeat_word(255);
constexpr Words kZero16 = repeat_word(0);
constexpr Words kScoreKeys = score_keys();

// Statements instead of intrinsics where g++ 12 would copy accumulators or hoist operands into
// registers that are not there. `volatile` keeps them in the order written, which is the schedule.
ATTN8_INLINE void dot(Vector& sum, Vector u8, Vector s8) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8));
}
ATTN8_INLINE void dot_memory(Vector& sum, Vector u8, const std::byte* s8) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "m"(*(const Vector*)s8));
}
ATTN8_INLINE void dot_pairs(Vector& sum, Vector a, const int16_t* b) {
  asm volatile("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "m"(*(const Vector*)b));
}
ATTN8_INLINE __m512 broadcast_now(const float* p) {
  __m512 result;
  asm volatile("vbroadcastss %1, %0" : "=v"(result) : "m"(*p));
  return result;
}
ATTN8_INLINE Vector load_now(const void* p) {
  Vector result;
  asm volatile("vmovdqa64 %1, %0" : "=v"(result) : "m"(*(const Vector*)p));
  return result;
}
ATTN8_INLINE Vector broadcast_bytes(const std::byte* p) {
  Vector result;
  asm volatile("vpbroadcastd %1, %0" : "=v"(result) : "m"(*(const int32_t*)p));
  return result;
}
ATTN8_INLINE Vector load_vector(const void* p) { return _mm512_load_si512(p); }
/// The weights of an item, computed half a group of one row at a time between products. Everything
/// is laid out group by group, rows within.
struct Weigher {
  const int16_t* scores = nullptr;     ///< [groups][kRowGroup][64]
  std::byte* codes = nullptr;          ///< [groups][kRowGroup][64]
  const KeyRecord* records = nullptr;  ///< [groups]
  const int32_t* top = nullptr;        ///< [kRowGroup] maxima, in both halves of a word
  GroupSums* sums = nullptr;           ///< [1 + groups][kRowGroup]
  int next = 0;                        ///< of the groups * kRowGroup pieces
  int end = 0;
};

/// What stays in registers between the halves of a piece.
struct HalfPiece {
  Vector top, code, sum, rest;
};

/// Half `kPart` of piece `piece`: 32 scores to weights and codes. kRow: its row where known, or -1.
template <int kPart, int kRow>
ATTN8_INLINE void weigh_half(const Weigher& weigher, int piece, HalfPiece& half, Vector table_low,
                             Vector table_high) {
  const int64_t offset = int64_t{64} * piece + 32 * kPart;
  if constexpr (kPart == 0) {
    half.top = broadcast_bytes(
        reinterpret_cast<const std::byte*>(weigher.top + (kRow >= 0 ? kRow : piece & 3)));
    half.sum = load_vector(weigher.sums[piece].weights);
  }
  Vector d = _mm512_sub_epi16(half.top, load_vector(weigher.scores + offset));
  const Vector shift = _mm512_srli_epi16(d, 6);
  asm("vpermi2w %2, %1, %0" : "+v"(d) : "v"(table_low), "v"(table_high));
  const Vector y = _mm512_srlv_epi16(d, shift);
  Vector rounded;
  asm("vpaddw %2, %1, %0" : "=v"(rounded) : "v"(y), "m"(kHalf16));
  Vector rest;
  asm("vpandd %2, %1, %0" : "=v"(rest) : "v"(rounded), "m"(kLowByte16));
  Vector h;
  asm("vpavgw %2, %1, %0" : "=v"(h) : "v"(y), "m"(kZero16));
  dot_pairs(half.sum, h, weigher.records[piece >> 2].inv_low + 32 * kPart);
  const Vector code = _mm512_srli_epi16(rounded, 8);
  if constexpr (kPart == 0) {
    half.code = code;
    half.rest = _mm512_add_epi16(rest, load_vector(weigher.sums[piece].rest));
    return;
  }
  GroupSums& sums = weigher.sums[kRowGroup + piece];
  _mm512_store_si512(weigher.codes + int64_t{64} * piece, _mm512_packus_epi16(half.code, code));
  _mm512_store_si512(sums.weights, half.sum);
  _mm512_store_si512(sums.rest, _mm512_add_epi16(half.rest, rest));
}

/// The largest word of each of four vectors, in both halves of a lane of 32 bits.
ATTN8_INLINE __m128i largest_words(const Vector (&v)[kRowGroup]) {
  const Vector ab =
      _mm512_max_epi16(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const Vector cd =
      _mm512_max_epi16(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  // a b a b of every quarter and c d c d of every quarter to a b c d of every quarter
  const Vector all = _mm512_max_epi16(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_max_epi16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  const __m128i words =
      _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return _mm_max_epi16(words, _mm_rol_epi32(words, 16));
}

/// What scores take from two vectors of keys.
struct KeyPair {
  __m512 scale[2];
  __m512 offset[2];
};
/// Of vectors `first` and first + 1 of a group.
ATTN8_INLINE KeyPair load_pair(const KeyRecord& record, int first) {
  const float* scale = record.k_scale + 16 * first;
  const float* offset = record.offset + 16 * first;
  return {.scale = {_mm512_load_ps(scale), _mm512_load_ps(scale + 16)},
          .offset = {_mm512_load_ps(offset), _mm512_load_ps(offset + 16)}};
}

/// Scores of two vectors of keys for one row, to 16-bit numbers, and into the running maximum.
ATTN8_INLINE void score_pair(const KeyPair& keys, const float* factor, int16_t* out, Vector sum_low,
                             Vector sum_high, Vector& largest) {
  const __m512 row_factor = broadcast_now(factor);
  const Vector sum[2] = {sum_low, sum_high};
  Vector w[2];
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[c]), keys.scale[c]);
    w[c] = _mm512_cvtps_epi32(_mm512_fmadd_ps(x, row_factor, keys.offset[c]));
  }
  const Vector packed = _mm512_packs_epi32(w[0], w[1]);
  _mm512_store_si512(out, packed);
  largest = _mm512_max_epi16(largest, packed);
}

/// Hides what the rows of an item do not see among its scores, and takes the maxima anew.
inline __attribute__((noinline)) void hide_scores(Skewed& work, const SkewedItem& item) {
  Vector largest[kRowGroup];
  for (int r = 0; r < kRowGroup; ++r) {
    const KeyRange range = work.tile.visible[item.first_row + r];
    largest[r] = _mm512_set1_epi16(kHiddenScore16);
    for (int half = 0; half < 2 * item.groups; ++half) {
      const int64_t first = item.first_key + 32 * half;
      const auto clamped = [first](int64_t key) {
        return static_cast<int16_t>(key < first ? 0 : key > first + 32 ? 32 : key - first);
      };
      const Vector keys = load_vector(&kScoreKeys);
      const __mmask32 seen = _mm512_cmpge_epi16_mask(keys, _mm512_set1_epi16(clamped(range.lo))) &
                             _mm512_cmplt_epi16_mask(keys, _mm512_set1_epi16(clamped(range.hi)));
      int16_t* scores = work.scores + (half / 2 * kRowGroup + r) * 64 + half % 2 * 32;
      const Vector kept =
          _mm512_mask_mov_epi16(_mm512_set1_epi16(kHiddenScore16), seen, load_vector(scores));
      _mm512_store_si512(scores, kept);
      largest[r] = _mm512_max_epi16(largest[r], kept);
    }
  }
  _mm_store_si128(reinterpret_cast<__m128i*>(work.top), largest_words(largest));
}

/// New references for the rows `far` above theirs; what their past is multiplied by.
inline __attribute__((noinline)) void move_references(int far, __m128i octaves, int32_t* ref,
                                                      SkewedState& state) {
  alignas(16) int32_t octave[kRowGroup];
  _mm_store_si128(reinterpret_cast<__m128i*>(octave), octaves);
  for (int r = 0; r < kRowGroup; ++r) {
    if ((far >> r & 1) == 0) continue;
    state.rescale[r] = grid_power(ref[r] - octave[r]);
    ref[r] = octave[r];
  }
  state.rescales = true;
}

/// Bits of 2^(n / 64) less its whole octaves. Permutations of registers: a gather is microcode
/// and holds up what follows for some 50 cycles.
ATTN8_INLINE __m128i look_up(__m128i n) {
  const Vector index = _mm512_castsi128_si512(n);
  const Vector low =
      _mm512_permutex2var_epi32(load_vector(kGridPower), index, load_vector(kGridPower + 16));
  const Vector high =
      _mm512_permutex2var_epi32(load_vector(kGridPower + 32), index, load_vector(kGridPower + 48));
  const __mmask8 upper = _mm_test_epi32_mask(n, _mm_set1_epi32(32));
  return _mm_mask_mov_epi32(_mm512_castsi512_si128(low), upper, _mm512_castsi512_si128(high));
}

/// advance_reference() for the four rows of an item; largest: of each row, its scores' maxima.
ATTN8_INLINE void advance_rows(Skewed& work, const SkewedItem& item, const Vector (&largest)[4],
                               SkewedState& state) {
  auto* top = reinterpret_cast<__m128i*>(work.top);
  _mm_store_si128(top, largest_words(largest));
  if (item.masked) [[unlikely]]
    hide_scores(work, item);
  auto* ref = reinterpret_cast<__m128i*>(work.scratch.ref + item.first_row);
  const __m128i score = _mm_srai_epi32(_mm_load_si128(top), 16);
  const __m128i octave = _mm_and_si128(score, _mm_set1_epi32(~63));
  const __mmask8 seen = _mm_cmpneq_epi32_mask(score, _mm_set1_epi32(kHiddenScore16));
  const __m128i before = _mm_loadu_si128(ref);
  const __mmask8 first = _mm_cmpeq_epi32_mask(before, _mm_set1_epi32(kNoReference));
  __m128i now = _mm_mask_mov_epi32(before, seen & first, octave);
  _mm_storeu_si128(ref, now);
  state.rescales = false;
  _mm_store_ps(state.rescale, _mm_set1_ps(1));
  // Differences of what has no reference yet wrap around; nobody looks at them.
  const int far =
      seen & _mm_cmpgt_epi32_mask(_mm_sub_epi32(score, now), _mm_set1_epi32(kGridHeadroom * 64));
  if (far != 0) [[unlikely]] {
    move_references(far, octave, work.scratch.ref + item.first_row, state);
    now = _mm_loadu_si128(ref);
  }
  // grid_power()
  const __m128i n = _mm_sub_epi32(score, now);
  const __m128i octaves = _mm_srai_epi32(n, 6);
  const __m128i power = look_up(n);
  const __mmask8 counts = seen & _mm_cmpge_epi32_mask(octaves, _mm_set1_epi32(kGridDepth));
  const __m128 weight =
      _mm_castsi128_ps(_mm_maskz_add_epi32(counts, power, _mm_slli_epi32(octaves, 23)));
  _mm_store_ps(work.weight, weight);
  // A row that sees none of the block stays as it is, also where a V scale is NaN.
  _mm_store_ps(state.value_weight, _mm_maskz_mul_ps(counts, weight, _mm_set1_ps(item.value_scale)));
}

/// 2^12 sum_j h_j (W_j >> 12) of the rows, from the scores: for the few blocks whose V scales
/// differ by more than 16.
inline __attribute__((noinline)) __m256i high_weights(const Skewed& work, const SkewedItem& item) {
  alignas(32) int64_t total[kRowGroup] = {};
  for (int half = 0; half < 2 * kRowGroup * item.groups; ++half) {
    const int piece = half / 2;
    const int r = piece % kRowGroup;
    const Vector d =
        _mm512_sub_epi16(_mm512_set1_epi32(work.top[r]), load_vector(work.scores + 32 * half));
    const Vector e =
        _mm512_permutex2var_epi16(load_vector(kGridWeight16), d, load_vector(kGridWeight16 + 32));
    const Vector y = _mm512_srlv_epi16(e, _mm512_srli_epi16(d, 6));
    const Vector h = _mm512_avg_epu16(y, _mm512_setzero_si512());
    Vector sum = _mm512_setzero_si512();
    dot_pairs(sum, h, item.records[piece / kRowGroup].inv_high + half % 2 * 32);
    total[r] += reduce_add(I32{sum}) * 4096;
  }
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(total));
}

/// Sums of the lanes of four vectors: int32 and int64.
ATTN8_INLINE __m128i add_lanes_i32(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const Vector cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  // a b a b of every quarter and c d c d of every quarter to a b c d of every quarter
  const Vector sum = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
ATTN8_INLINE __m256i add_lanes_i64(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const Vector cd = _mm512_add_epi64(_mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d));
  // a b in each of four quarters, c d likewise: quarters 0, 2 and 1, 3 of both, then across
  const Vector even = _mm512_shuffle_i64x2(ab, cd, 0x88);
  const Vector odd = _mm512_shuffle_i64x2(ab, cd, 0xdd);
  const Vector sum = _mm512_add_epi64(even, odd);  // ab ab cd cd
  const Vector swapped = _mm512_shuffle_i64x2(sum, sum, 0xb1);
  const Vector total = _mm512_add_epi64(sum, swapped);
  return _mm512_castsi512_si256(_mm512_shuffle_i64x2(total, total, 0x08));
}

/// l and rho of an item's rows from the sums that its weights left.
ATTN8_INLINE void finish_sums(Skewed& work, const SkewedItem& item, SkewedState& state) {
  Vector weights[kRowGroup];  // 16 x uint32
  Vector rest[kRowGroup];     // 32 x uint16
  const GroupSums* sums = work.sums + kRowGroup * item.groups;
#pragma GCC unroll 4
  for (int r = 0; r < kRowGroup; ++r) {
    weights[r] = load_vector(sums[r].weights);
    rest[r] = load_vector(sums[r].rest);
  }
  const Vector ones = _mm512_set1_epi16(1);
  const __m128i residual = _mm_sub_epi32(
      add_lanes_i32(_mm512_madd_epi16(rest[0], ones), _mm512_madd_epi16(rest[1], ones),
                    _mm512_madd_epi16(rest[2], ones), _mm512_madd_epi16(rest[3], ones)),
      _mm_set1_epi32(128 * 64 * item.groups));
  const Vector low_half = _mm512_set1_epi64(0xffffffff);
#pragma GCC unroll 4
  for (int r = 0; r < kRowGroup; ++r) {
    weights[r] =
        _mm512_add_epi64(_mm512_and_si512(weights[r], low_half), _mm512_srli_epi64(weights[r], 32));
  }
  __m256i total = add_lanes_i64(weights[0], weights[1], weights[2], weights[3]);
  if (item.any_high) [[unlikely]]
    total = _mm256_add_epi64(total, high_weights(work, item));
  float* normalizer = work.tile.normalizer + item.first_row;
  _mm_storeu_ps(normalizer,
                _mm_fmadd_ps(_mm_load_ps(work.weight), _mm256_cvtepi64_ps(total),
                             _mm_mul_ps(_mm_loadu_ps(normalizer), _mm_load_ps(state.rescale))));
  const __m128 rho = _mm_mul_ps(_mm_cvtepi32_ps(residual), _mm_set1_ps(0x1p-8f));
  _mm_store_ps(state.residual, _mm_and_ps(rho, _mm_load_ps(item.sees_block)));
}
