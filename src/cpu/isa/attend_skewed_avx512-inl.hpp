// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// `accurate` on AVX-512 VNNI as a skewed pipeline: the bits of attend_accurate(), with the softmax
// of one item in the shadow of the products of another. Included inside the ISA's namespace after
// attend_accurate-inl.hpp.
//
// An item is four query rows against the key groups of one kv block. Step t of the pipeline does
//
//   Q K of item t      scores of a group become 16-bit numbers row by row, just before the row's
//                      accumulators start on the next group: no int32 score is ever stored
//   P V of item t - 1  between its products, the weights of item t: table, shift, pack
//   O of item t - 2    its last 64 channels leave the accumulators as Q K of item t takes them
//
// so that the two ports of vpdpbusd always have independent work. On Zen 4 what counts is how many
// multiplies and shuffles a score needs beside its products (they share those ports): 2 multiplies
// for the scales, 1/2 for the denominator, and 1.3 shuffles; everything else is free.
//
// 16 bits hold the scores of a tile when no |T| can pass kMaxSkewedScore, which the lengths of q
// and k bound before anything runs; other tiles take attend_accurate().

/// A hidden key has score -2^15: at this bound it still lies 16 octaves, a weight of 0, below any
/// visible one. Beyond it, T - hidden would leave the 16 bits.
inline constexpr float kMaxSkewedScore = 31000.0f;
inline constexpr int16_t kHiddenScore16 = -32768;
/// Most negative offset g of a key: 16 octaves (kMinRatio).
inline constexpr float kMaxOffset = 1024.0f;

using Vector = __m512i;

/// Key groups of the largest kv_block.
inline constexpr int kMaxGroups = 8;

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
ATTN8_INLINE Vector load_now(const std::byte* p) {
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

/// Four query rows against the key groups of a block.
struct SkewedItem {
  int first_row = 0;  ///< of the tile
  int groups = 0;
  int64_t first_key = 0;
  int64_t k_ahead = 0;  ///< bytes to the K of the next block where it is time to ask for it, else 0
  int64_t v_ahead = 0;  ///< likewise V
  bool masked = false;  ///< whether a row does not see all its keys
  const std::byte* k = nullptr;  ///< [groups] packed
  const std::byte* v = nullptr;  ///< [groups] packed
  const KeyRecord* records = nullptr;
  const float* mean = nullptr;  ///< [padded_dim]
  float value_scale = 1;
  bool any_high = false;
  alignas(
      16) float sees_block[kRowGroup] = {};  ///< all bits set where the row sees the block whole
};

/// What an item leaves for its P V and for the update of O.
struct SkewedState {
  float* out = nullptr;        ///< [kRowGroup][padded]
  std::byte* codes = nullptr;  ///< [groups][kRowGroup][64] u8
  bool rescales = false;
  alignas(16) float rescale[kRowGroup] = {1, 1, 1, 1};
  float value_weight[kRowGroup] = {};
  alignas(16) float residual[kRowGroup] = {};
};

/// Exact sums over one group and row as they leave the registers; every lane of 32 bits holds two
/// products, every lane of 16 bits one difference.
struct alignas(64) GroupSums {
  int32_t weights[16];  ///< h_j (W_j mod 2^12)
  uint16_t rest[32];    ///< y_j - 256 code_j + 128, of two keys
};

/// The weights of an item, computed half a group of one row at a time between products. Everything
/// is laid out group by group, rows within.
struct Weigher {
  const int16_t* scores = nullptr;     ///< [groups][kRowGroup][64]
  std::byte* codes = nullptr;          ///< [groups][kRowGroup][64]
  const KeyRecord* records = nullptr;  ///< [groups]
  const int32_t* top = nullptr;        ///< [kRowGroup] maxima, in both halves of a word
  GroupSums* sums = nullptr;           ///< [groups][kRowGroup]
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
    half.sum = _mm512_setzero_si512();
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
    half.rest = rest;
    return;
  }
  GroupSums& sums = weigher.sums[piece];
  _mm512_store_si512(weigher.codes + int64_t{64} * piece, _mm512_packus_epi16(half.code, code));
  _mm512_store_si512(sums.weights, half.sum);
  _mm512_store_si512(sums.rest, _mm512_add_epi16(half.rest, rest));
}

/// Everything a tile's pipeline works on. On a page of its own: which loads of K and V wait for
/// stores whose addresses share their low 12 bits is then the same in every call (measured: up to a
/// tenth of the time otherwise, by where the stack happens to lie).
struct alignas(4096) Skewed {
  explicit Skewed(const AttendTile& the_tile)
      : tile(the_tile),
        scratch(tile_scratch(the_tile)),
        padded(static_cast<int>(padded_dim(the_tile.head_dim))),
        scores(score_memory),
        codes{codes_memory, codes_memory + 2048} {
    std::memset(nothing, 0, sizeof(nothing));
    std::memcpy(factors, the_tile.score_factor, sizeof(factors));
  }

  alignas(64) float factors[kQueryTile];
  alignas(64) int16_t score_memory[2048];
  alignas(64) std::byte codes_memory[4096];
  const AttendTile& tile;
  TileScratch scratch;
  int padded;
  int16_t* scores;                             ///< [groups][kRowGroup][64]
  std::byte* codes[2];                         ///< [groups][kRowGroup][64]
  GroupSums sums[kMaxGroups * kRowGroup];      // NOLINT: filled before they are read
  int32_t top[kRowGroup] = {};                 ///< maxima, in both halves of a word
  alignas(16) float weight[kRowGroup] = {};    ///< beta
  alignas(64) float nothing[kRowGroup * 256];  ///< where the O of no item goes
};

ATTN8_INLINE int16_t largest_word(Vector v) {
  const __m256i m16 = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i m8 = _mm_max_epi16(_mm256_castsi256_si128(m16), _mm256_extracti128_si256(m16, 1));
  // vphminposuw finds the smallest unsigned word; this flip reverses and unsigns the order.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(m8, _mm_set1_epi16(0x7fff)));
  return static_cast<int16_t>(_mm_cvtsi128_si32(least) ^ 0x7fff);
}

/// Scores of a group for one row, its sums to 16-bit numbers, and into the running maximum.
ATTN8_INLINE void score_row(const KeyRecord* record, const float* factor, int16_t* out,
                            const Vector (&sum)[4], Vector& largest) {
  const __m512 row_factor = broadcast_now(factor);
  Vector w[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 x =
        _mm512_mul_ps(_mm512_cvtepi32_ps(sum[c]), _mm512_load_ps(record->k_scale + 16 * c));
    w[c] =
        _mm512_cvtps_epi32(_mm512_fmadd_ps(x, row_factor, _mm512_load_ps(record->offset + 16 * c)));
  }
  const Vector low = _mm512_packs_epi32(w[0], w[1]);
  const Vector high = _mm512_packs_epi32(w[2], w[3]);
  _mm512_store_si512(out, low);
  _mm512_store_si512(out + 32, high);
  largest = _mm512_max_epi16(largest, _mm512_max_epi16(low, high));
}

/// Hides what the rows of an item do not see among its scores, and takes the maxima anew.
inline __attribute__((noinline)) void hide_scores(const Skewed& work, const SkewedItem& item,
                                                  int16_t* top) {
  for (int r = 0; r < kRowGroup; ++r) {
    const KeyRange range = work.tile.visible[item.first_row + r];
    Vector largest = _mm512_set1_epi16(kHiddenScore16);
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
      largest = _mm512_max_epi16(largest, kept);
    }
    top[r] = largest_word(largest);
  }
}

/// Moves O of an item's rows to their new references, where one moved.
inline __attribute__((noinline)) void rescale_rows(const SkewedState& state, int padded) {
  for (int r = 0; r < kRowGroup; ++r) {
    for (int c = 0; c < padded; ++c) state.out[r * padded + c] *= state.rescale[r];
  }
}

/// O of one row and kVectors vectors of channels from `channel` on.
template <int kVectors>
ATTN8_INLINE void add_row(const Skewed& work, const SkewedState& state, const float* mean,
                          int channel, int r, const Vector (&sum)[4]) {
  float* out = state.out + r * work.padded + channel;
  const __m512 weight = broadcast_now(state.value_weight + r);
  const __m512 residual = broadcast_now(state.residual + r);
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; ++c) {
    const __m512 x = _mm512_fmadd_ps(residual, _mm512_load_ps(mean + channel + 16 * c),
                                     _mm512_cvtepi32_ps(sum[c]));
    _mm512_store_ps(out + 16 * c, _mm512_fmadd_ps(weight, x, _mm512_load_ps(out + 16 * c)));
  }
}

/// One step of a dot product for four rows: kStride bytes between rows of `a`, kVectors vectors of
/// b; kAhead: asks for those `ahead` bytes further.
template <bool kAhead, int kVectors, int kStride>
ATTN8_INLINE void dot_step(Vector (&sum)[4][4], const std::byte* a, const std::byte* b,
                           int64_t ahead) {
  Vector column[kVectors];
#pragma GCC unroll 16
  for (int c = 0; c < kVectors; ++c) {
    column[c] = load_now(b + 64 * c);
    if constexpr (kAhead) asm volatile("prefetcht1 %0" : : "m"(*(b + ahead + 64 * c)));
  }
#pragma GCC unroll 16
  for (int r = 0; r < 4; ++r) {
    const Vector x = broadcast_bytes(a + r * kStride);
#pragma GCC unroll 16
    for (int c = 0; c < kVectors; ++c) {
      dot(sum[r][c], x, column[c]);
    }
  }
}

/// The first two steps of one row, which starts before the other rows are ready; kNext bytes
/// between the steps of `a`.
template <int kVectors, int kNext>
ATTN8_INLINE void dot_head(Vector (&sum)[4], const std::byte* a, const std::byte* b) {
#pragma GCC unroll 16
  for (int step = 0; step < 2; ++step) {
    const Vector x = broadcast_bytes(a + kNext * step);
#pragma GCC unroll 16
    for (int c = 0; c < kVectors; ++c) {
      dot_memory(sum[c], x, b + (step * kVectors + c) * 64);
    }
  }
}

/// Bytes between the rows of P, and between the steps of Q's dims.
inline constexpr int kCodesStride = 64;
inline constexpr int kQueryStep = 16;

/// Steps kFirst..15 of P V of a group, with kPieces pieces of the next item's weights between.
template <bool kAhead, int kVectors, int kFirst, int kPieces>
ATTN8_INLINE void value_group(Vector (&sum)[4][4], const std::byte* p, const std::byte* v,
                              int64_t ahead, const Weigher& weigher, int piece, Vector table_low,
                              Vector table_high) {
  constexpr int kSteps = 16 - kFirst;
  constexpr int kHalves = 2 * kPieces;
  HalfPiece half;
#pragma GCC unroll 16
  for (int step = 0; step < kSteps; ++step) {
    dot_step<kAhead, kVectors, kCodesStride>(sum, p + 4 * (kFirst + step),
                                             v + (kFirst + step) * kVectors * 64, ahead);
    // At most one half per step: the halves are spread over the steps.
    const int done = step * kHalves / kSteps;
    if ((step + 1) * kHalves / kSteps > done) {
      // Four pieces are the four rows of a group.
      if (kPieces == 4 && done == 0) {
        weigh_half<0, 0>(weigher, piece, half, table_low, table_high);
      } else if (kPieces == 4 && done == 2) {
        weigh_half<0, 1>(weigher, piece + 1, half, table_low, table_high);
      } else if (kPieces == 4 && done == 4) {
        weigh_half<0, 2>(weigher, piece + 2, half, table_low, table_high);
      } else if (kPieces == 4 && done == 6) {
        weigh_half<0, 3>(weigher, piece + 3, half, table_low, table_high);
      } else if (done % 2 == 0) {
        weigh_half<0, -1>(weigher, piece + done / 2, half, table_low, table_high);
      } else {
        weigh_half<1, -1>(weigher, piece + done / 2, half, table_low, table_high);
      }
    }
  }
}

/// The maxima of an item's rows: references, weights, and what is rescaled.
ATTN8_INLINE void advance_rows(Skewed& work, const SkewedItem& item, const Vector (&largest)[4],
                               SkewedState& state) {
  int16_t top[kRowGroup];
#pragma GCC unroll 4
  for (int r = 0; r < kRowGroup; ++r) top[r] = largest_word(largest[r]);
  if (item.masked) [[unlikely]]
    hide_scores(work, item, top);
  state.rescales = false;
#pragma GCC unroll 4
  for (int r = 0; r < kRowGroup; ++r) {
    work.top[r] = static_cast<int32_t>(static_cast<uint16_t>(top[r]) * 0x10001u);
    advance_reference(top[r] == kHiddenScore16 ? kHiddenScore : top[r],
                      &work.scratch.ref[item.first_row + r], &work.weight[r], &state.rescale[r]);
    state.rescales = state.rescales || state.rescale[r] != 1.0f;
    state.value_weight[r] = work.weight[r] == 0 ? 0.0f : work.weight[r] * item.value_scale;
  }
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
  Vector weights[kRowGroup];  // 8 x int64
  Vector rest[kRowGroup];     // 32 x uint16: 8 groups of two bytes fit
  const Vector low_half = _mm512_set1_epi64(0xffffffff);
#pragma GCC unroll 4
  for (int r = 0; r < kRowGroup; ++r) {
    const Vector x = load_vector(work.sums[r].weights);
    weights[r] = _mm512_add_epi64(_mm512_and_si512(x, low_half), _mm512_srli_epi64(x, 32));
    rest[r] = load_vector(work.sums[r].rest);
  }
  const GroupSums* sums = work.sums + kRowGroup;
  for (int group = 1; group < item.groups; ++group, sums += kRowGroup) {
#pragma GCC unroll 4
    for (int r = 0; r < kRowGroup; ++r) {
      const Vector x = load_vector(sums[r].weights);
      const Vector wide = _mm512_add_epi64(_mm512_and_si512(x, low_half), _mm512_srli_epi64(x, 32));
      weights[r] = _mm512_add_epi64(weights[r], wide);
      rest[r] = _mm512_add_epi16(rest[r], load_vector(sums[r].rest));
    }
  }
  const Vector ones = _mm512_set1_epi16(1);
  const __m128i residual = _mm_sub_epi32(
      add_lanes_i32(_mm512_madd_epi16(rest[0], ones), _mm512_madd_epi16(rest[1], ones),
                    _mm512_madd_epi16(rest[2], ones), _mm512_madd_epi16(rest[3], ones)),
      _mm_set1_epi32(128 * 64 * item.groups));
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

/// The items of a tile, block by block.
class SkewedWalk {
 public:
  explicit SkewedWalk(const AttendTile& tile) : tile_(tile) {
    int64_t lo = std::numeric_limits<int64_t>::max();
    int64_t hi = 0;
    for (int first = 0; first < tile.rows; first += kRowGroup) {
      Rows& rows = rows_[first / kRowGroup];
      rows = {std::numeric_limits<int64_t>::max(), 0, 0, std::numeric_limits<int64_t>::max()};
      for (int r = first; r < first + kRowGroup; ++r) {
        const KeyRange range = tile.visible[r];
        rows.full_lo = range.lo > rows.full_lo ? range.lo : rows.full_lo;
        rows.full_hi = range.hi < rows.full_hi ? range.hi : rows.full_hi;
        if (range.empty()) continue;
        rows.lo = range.lo < rows.lo ? range.lo : rows.lo;
        rows.hi = range.hi > rows.hi ? range.hi : rows.hi;
      }
      lo = rows.lo < lo ? rows.lo : lo;
      hi = rows.hi > hi ? rows.hi : hi;
    }
    block_ = lo < hi ? lo / tile.kv_block : 0;
    end_ = lo < hi ? (hi + tile.kv_block - 1) / tile.kv_block : 0;
  }

  /// The next item that sees anything; false after the last.
  bool next(SkewedItem& item) {
    for (; block_ < end_; ++block_, row_ = 0) {
      const int64_t block_lo = block_ * tile_.kv_block;
      const int64_t block_hi = block_lo + tile_.kv_block;
      while (row_ < tile_.rows) {
        const Rows& rows = rows_[row_ / kRowGroup];
        const int64_t lo = rows.lo > block_lo ? rows.lo : block_lo;
        const int64_t hi = rows.hi < block_hi ? rows.hi : block_hi;
        item.first_row = row_;
        row_ += kRowGroup;
        if (lo >= hi) continue;
        fill(item, rows, lo, hi);
        return true;
      }
    }
    return false;
  }

 private:
  /// Of four rows: the keys any of them sees, and the keys all of them see.
  struct Rows {
    int64_t lo, hi;
    int64_t full_lo, full_hi;
  };

  void fill(SkewedItem& item, const Rows& rows, int64_t lo, int64_t hi) const {
    const PackedKv& kv = tile_.kv;
    const BlockHeader& header = kv.header(block_);
    const int64_t block_lo = block_ * tile_.kv_block;
    const int64_t group_lo = (lo - block_lo) / kKeyGroup;
    const int64_t group_hi = (hi - block_lo + kKeyGroup - 1) / kKeyGroup;
    item.groups = static_cast<int>(group_hi - group_lo);
    item.first_key = block_lo + group_lo * kKeyGroup;
    item.k = kv.k(block_, group_lo);
    item.v = kv.v(block_, group_lo);
    item.records = kv.records(block_) + group_lo;
    item.mean = kv.mean(block_);
    item.value_scale = header.v_scale / kv.v_ref;
    item.any_high = header.any_high != 0;
    // The first row group asks for K, the last one for V.
    const int64_t next =
        block_ + 1 < end_ ? kv.blocks[block_ + 1].data - kv.blocks[block_].data : 0;
    item.k_ahead = item.first_row == 0 ? next : 0;
    item.v_ahead = row_ >= tile_.rows ? next : 0;
    item.masked =
        rows.full_lo > item.first_key || rows.full_hi < item.first_key + item.groups * kKeyGroup;
    const RowGroup group = {item.first_row, block_, group_lo, group_hi};
    for (int r = 0; r < kRowGroup; ++r) {
      item.sees_block[r] = std::bit_cast<float>(sees_block(tile_, group, r) ? ~0u : 0u);
    }
  }

  const AttendTile& tile_;
  int64_t block_ = 0, end_ = 0;
  int row_ = 0;
  Rows rows_[kQueryTile / kRowGroup];
};

/// Whether 16-bit scores hold every score of the tile.
inline bool fits_skewed(const AttendTile& tile) {
  if (tile.kv.channel_scale) return false;
  float largest = 0;
  for (int r = 0; r < tile.rows; ++r) {
    const float bound = tile.query_norm[r] * tile.score_factor[r];
    largest = bound > largest ? bound : largest;
    if (tile.score_factor[r] < 0 && -bound > largest) largest = -bound;
  }
  return largest * tile.kv.key_norm + kMaxOffset <= kMaxSkewedScore;
}

/// Starts Q K of one group for one row.
ATTN8_INLINE void start_query_row(Vector (&sum)[4], const KeyRecord& record, const std::byte* q,
                                  const std::byte* k) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) sum[c] = load_vector(record.correction + 16 * c);
  dot_head<4, kQueryStep>(sum, q, k);
}

/// The other steps of Q K of one group.
template <bool kAhead>
ATTN8_INLINE void finish_query_group(Vector (&sum)[4][4], const std::byte* q, int padded,
                                     const std::byte* k, int64_t ahead) {
  dot_step<kAhead, 4, 4>(sum, q + 2 * kQueryStep, k + 512, ahead);
  dot_step<kAhead, 4, 4>(sum, q + 3 * kQueryStep, k + 768, ahead);
  for (int dim = 16; dim < padded; dim += 16) {
    q += 4 * kQueryStep;
    k += 1024;
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      dot_step<kAhead, 4, 4>(sum, q + kQueryStep * step, k + 256 * step, ahead);
    }
  }
}

/// Scores of one group, each row starting on the next group as soon as its accumulators are free.
ATTN8_INLINE void next_query_group(Vector (&sum)[4][4], const KeyRecord* record,
                                   const float* factors, int16_t* scores, const std::byte* q,
                                   const std::byte* k, Vector (&largest)[4]) {
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    score_row(record, factors + r, scores + 64 * r, sum[r], largest[r]);
    start_query_row(sum[r], record[1], q + 4 * r, k);
  }
}

/// Likewise of the last group, each row starting on P V of the item before.
template <int kVectors>
ATTN8_INLINE void leave_query(Vector (&sum)[4][4], const KeyRecord* record, const float* factors,
                              int16_t* scores, const std::byte* p, const std::byte* v,
                              Vector (&largest)[4]) {
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    score_row(record, factors + r, scores + 64 * r, sum[r], largest[r]);
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sum[r][c] = _mm512_setzero_si512();
    dot_head<kVectors, 4>(sum[r], p + r * kCodesStride, v);
  }
}

/// The pieces to weigh beside the next group of P V. After the last piece it repeats that: cheaper
/// than a second copy of the loop, and the same numbers again.
template <int kPieces>
ATTN8_INLINE int take_pieces(Weigher& weigher) {
  const int piece = weigher.next < weigher.end - kPieces ? weigher.next : weigher.end - kPieces;
  weigher.next = piece + kPieces;
  return piece;
}

/// P V of an item for one slab of channels whose rows are started, with kPieces pieces of the next
/// item's weights in each of its groups.
template <bool kAhead, int kVectors, int kPieces>
ATTN8_INLINE void value_slab(Vector (&sum)[4][4], int groups, const std::byte* p,
                             const std::byte* v, size_t v_group_bytes, int64_t ahead,
                             Weigher& weigher, Vector table_low, Vector table_high) {
  value_group<kAhead, kVectors, 2, kPieces>(sum, p, v, ahead, weigher,
                                            take_pieces<kPieces>(weigher), table_low, table_high);
  for (int group = 1; group < groups; ++group) {
    v += v_group_bytes;
    p += kRowGroup * kCodesStride;
    value_group<kAhead, kVectors, 0, kPieces>(sum, p, v, ahead, weigher,
                                              take_pieces<kPieces>(weigher), table_low, table_high);
  }
}

/// P V of an item for kVectors vectors of channels from `channel` on, added to its O.
template <int kVectors>
ATTN8_INLINE void drain_channels(const Skewed& work, const SkewedItem& item,
                                 const SkewedState& state, int channel) {
  const int slab = channel / 64 * 64;
  const int64_t step_bytes = slab_width(work.padded, slab) * 4;
  Vector sum[4][4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sum[r][c] = _mm512_setzero_si512();
  }
  const std::byte* p = state.codes;
  const std::byte* v = item.v + slab * kKeyGroup + (channel - slab) * 4;
  for (int group = 0; group < item.groups; ++group) {
    for (int step = 0; step < 16; ++step) {
      dot_step<false, kVectors, kCodesStride>(sum, p + 4 * step, v + step * step_bytes, 0);
    }
    p += kRowGroup * kCodesStride;
    v += work.tile.kv.layout.v_group_bytes;
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) add_row<kVectors>(work, state, item.mean, channel, r, sum[r]);
}

/// P V of the last item, which has nothing to run beside.
inline __attribute__((noinline)) void drain(const Skewed& work, const SkewedItem& item,
                                            const SkewedState& state) {
  if (state.rescales) rescale_rows(state, work.padded);
  int channel = 0;
  for (; channel + 64 <= work.padded; channel += 64) drain_channels<4>(work, item, state, channel);
  for (; channel < work.padded; channel += 16) drain_channels<1>(work, item, state, channel);
}

/// kTail: channels of the last slab when it is narrower than 64, else 0. kPieces: pieces of weights
/// per group and slab of P V, about four over the slabs of an item. kAhead: for few rows, whose K
/// and V come from memory: asks for the next block while it computes on one.
template <int kTail, int kPieces, bool kAhead>
inline void attend_skewed(const AttendTile& tile) {
  constexpr int kTailVectors = kTail / 16;
  Skewed work(tile);
  begin_accurate(tile, work.scratch);
  SkewedWalk walk(tile);
  SkewedItem items[2];
  if (!walk.next(items[0])) return end_accurate(tile, work.scratch);
  // Before the first item comes one of zeros, whose O nobody reads.
  SkewedState states[2];
  std::memset(work.codes[1], 0, kRowGroup * kCodesStride);
  items[1] = items[0];
  items[1].groups = 1;
  items[1].mean = work.nothing;
  for (int i = 0; i < 2; ++i) {
    states[i].out = work.nothing;
    states[i].codes = work.codes[i];
  }
  const float* pending_mean = work.nothing;

  const int padded = work.padded;
  const int slabs = padded / 64;
  const size_t k_group_bytes = tile.kv.layout.k_group_bytes;
  const size_t v_group_bytes = tile.kv.layout.v_group_bytes;
  const Vector table_low = load_vector(kGridWeight16);
  const Vector table_high = load_vector(kGridWeight16 + 32);
  const Vector zero = _mm512_setzero_si512();
  Vector sum[4][4] = {{zero, zero, zero, zero},
                      {zero, zero, zero, zero},
                      {zero, zero, zero, zero},
                      {zero, zero, zero, zero}};
  int t = 0;
  do {
    const SkewedItem& item = items[t & 1];
    const SkewedItem& previous = items[(t + 1) & 1];
    SkewedState& state = states[t & 1];  // that of two items ago until its O is complete
    SkewedState& previous_state = states[(t + 1) & 1];
    const std::byte* q = tile.q + item.first_row * padded;  // [padded / 4][4][4]
    const std::byte* k = item.k;
    const KeyRecord* record = item.records;
    const float* factors = work.factors + item.first_row;
    int16_t* scores = work.scores;
    const Vector hidden = _mm512_set1_epi16(kHiddenScore16);
    Vector largest[4] = {hidden, hidden, hidden, hidden};
    // Q K of the item; its first rows start where the last slab of P V leaves.
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (kPieces < 4 || kTail == 0 || slabs > 0) {
        add_row<4>(work, state, pending_mean, 64 * (slabs - 1), r, sum[r]);
      }
      start_query_row(sum[r], *record, q + 4 * r, k);
    }
    finish_query_group<kAhead>(sum, q, padded, k, item.k_ahead);
    for (int group = item.groups; group > 1; --group) {
      k += k_group_bytes;
      next_query_group(sum, record, factors, scores, q, k, largest);
      ++record;
      scores += kRowGroup * 64;
      finish_query_group<kAhead>(sum, q, padded, k, item.k_ahead);
    }

    // P V of the previous item; the narrow slab is last in memory and first in time.
    if (previous_state.rescales) [[unlikely]]
      rescale_rows(previous_state, padded);
    const std::byte* p = previous_state.codes;
    const std::byte* v = previous.v + (kTail > 0 ? 64 * slabs : 0) * kKeyGroup;
    constexpr int kFirstVectors = kTail > 0 ? kTailVectors : 4;
    leave_query<kFirstVectors>(sum, record, factors, scores, p, v, largest);
    state.out = tile.out + item.first_row * padded;
    advance_rows(work, item, largest, state);
    Weigher weigher = {.scores = work.scores,
                       .codes = state.codes,
                       .records = item.records,
                       .top = work.top,
                       .sums = work.sums,
                       .next = 0,
                       .end = kRowGroup * item.groups};
    if constexpr (kTail > 0) {
      // With no full slab beside it, the weights go here.
      if (slabs > 0) {
        value_slab<kAhead, kTailVectors, 0>(sum, previous.groups, p, v, v_group_bytes,
                                            previous.v_ahead, weigher, table_low, table_high);
      } else {
        value_slab<kAhead, kTailVectors, kPieces>(sum, previous.groups, p, v, v_group_bytes,
                                                  previous.v_ahead, weigher, table_low, table_high);
      }
    }
    for (int h = 0; h < slabs; ++h) {
      v = previous.v + 64 * h * kKeyGroup;
      if (kTail > 0 || h > 0) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          if (kTail == 0 || h > 0) {
            add_row<4>(work, previous_state, previous.mean, 64 * (h - 1), r, sum[r]);
          } else {
            add_row<kTailVectors>(work, previous_state, previous.mean, 64 * slabs, r, sum[r]);
          }
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_si512();
          dot_head<4, 4>(sum[r], p + r * kCodesStride, v);
        }
      }
      value_slab<kAhead, 4, kPieces>(sum, previous.groups, p, v, v_group_bytes, previous.v_ahead,
                                     weigher, table_low, table_high);
    }
    if constexpr (kTail > 0 && kPieces == 4) {
      if (slabs == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          add_row<kTailVectors>(work, previous_state, previous.mean, 0, r, sum[r]);
        }
      }
    }
    pending_mean = previous.mean;
    for (; weigher.next < weigher.end; ++weigher.next) {
      HalfPiece half;
      weigh_half<0, -1>(weigher, weigher.next, half, table_low, table_high);
      weigh_half<1, -1>(weigher, weigher.next, half, table_low, table_high);
    }
    finish_sums(work, item, state);
    ++t;
  } while (walk.next(items[t & 1]));
  if (slabs > 0) {
    const SkewedState& state = states[t & 1];
    add_row<4>(work, state, pending_mean, 64 * (slabs - 1), 0, sum[0]);
    add_row<4>(work, state, pending_mean, 64 * (slabs - 1), 1, sum[1]);
    add_row<4>(work, state, pending_mean, 64 * (slabs - 1), 2, sum[2]);
    add_row<4>(work, state, pending_mean, 64 * (slabs - 1), 3, sum[3]);
  }
  drain(work, items[(t + 1) & 1], states[(t + 1) & 1]);
  end_accurate(tile, work.scratch);
}

/// The pipeline for the tile's head_dim.
inline void attend_skewed(const AttendTile& tile) {
  const auto padded = padded_dim(tile.head_dim);
  const bool few = tile.rows <= 2 * kRowGroup;
  switch (padded / 64 * 4 + padded % 64 / 16) {
    case 0 * 4 + 1:
    case 1 * 4 + 1:
      return attend_skewed<16, 4, false>(tile);
    case 0 * 4 + 2:
    case 1 * 4 + 2:
      return attend_skewed<32, 4, false>(tile);
    case 0 * 4 + 3:
    case 1 * 4 + 3:
      return attend_skewed<48, 4, false>(tile);
    case 1 * 4:
      return few ? attend_skewed<0, 4, true>(tile) : attend_skewed<0, 4, false>(tile);
    case 2 * 4:
    case 3 * 4:
      return few ? attend_skewed<0, 2, true>(tile) : attend_skewed<0, 2, false>(tile);
    case 4 * 4:
      return attend_skewed<0, 1, false>(tile);
    case 2 * 4 + 1:
    case 3 * 4 + 1:
      return attend_skewed<16, 2, false>(tile);
    case 2 * 4 + 2:
    case 3 * 4 + 2:
      return attend_skewed<32, 2, false>(tile);
    default:
      return attend_skewed<48, 2, false>(tile);
  }
}
