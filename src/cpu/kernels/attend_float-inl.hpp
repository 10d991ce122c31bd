// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Attention of one query tile with a float P V product: `half` (INT8 scores, bfloat16 P and V) and
// `exact` (float32, or bfloat16 where Q, K and V are). Included inside the namespace of an ISA
// after attend_paper-inl.hpp.
//
// Both products read operands in words of four bytes, a float or a pair of bfloat16 that are
// neighbours along the sum: dims in Q K, keys in P V. So one loop serves both.

/// Words of one float.
struct FloatWords {
  using Vector = F32;
  static constexpr int kPerWord = 1;
  static ATTN8_INLINE Vector load_words(const std::byte* p) {
    return load(reinterpret_cast<const float*>(p));
  }
  static ATTN8_INLINE Vector broadcast_word(const std::byte* p) {
    return broadcast(*reinterpret_cast<const float*>(p));
  }
  static ATTN8_INLINE void multiply(F32& sum, Vector a, Vector b) { sum = multiply_add(a, b, sum); }
  /// 16 weights to P.
  static ATTN8_INLINE void store_weights(std::byte* p, F32 w) {
    store(reinterpret_cast<float*>(p), w);
  }
};

/// Words of two bfloat16; kNative: by the CPU's own dot product of pairs.
template <bool kNative>
struct PairWords {
  using Vector = I32;
  static constexpr int kPerWord = 2;
  static ATTN8_INLINE Vector load_words(const std::byte* p) { return load_bytes(p); }
  static ATTN8_INLINE Vector broadcast_word(const std::byte* p) { return broadcast4(p); }
  static ATTN8_INLINE void multiply(F32& sum, Vector a, Vector b) {
    dot2_bfloat16<kNative>(sum, a, b);
  }
  static ATTN8_INLINE void store_weights(std::byte* p, F32 w) { store_bfloat16<kNative>(p, w); }
};

/// Stands for the integer scores of `half`.
struct CodeScores {};

/// sum[r][c] += over `steps` words of row r (a_stride bytes apart) times vector c of the matrix,
/// whose steps are b_stride bytes apart.
template <class Words, int kRows, int kCount>
ATTN8_INLINE void multiply_words(F32 (&sum)[kRows][kCount], const std::byte* a, int64_t a_stride,
                                 const std::byte* b, int64_t b_stride, int64_t steps) {
  for (; steps > 0; --steps, a += 4, b += b_stride) {
    typename Words::Vector column[kCount];
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) column[c] = Words::load_words(b + 64 * c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const typename Words::Vector word = Words::broadcast_word(a + r * a_stride);
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) Words::multiply(sum[r][c], word, column[c]);
    }
  }
}

template <int kRows, int kCount>
ATTN8_INLINE void clear(F32 (&sum)[kRows][kCount]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) sum[r][c] = broadcast(0.0f);
  }
}

/// Scores of a block from float Q and K in log2 units, and the rows' maxima.
template <class Words, int kRows>
ATTN8_KERNEL_INLINE void word_scores(const AttendTile& tile, const RowGroup& rows, float* scores,
                                     float* block_max) {
  constexpr int64_t kStep = 4 * kKeyGroup;  // K is [words of a key][64 keys]
  const int64_t steps =
      Words::kPerWord == 1 ? tile.head_dim : padded_dim(tile.head_dim) / Words::kPerWord;
  const std::byte* q = tile.q + rows.first_row * steps * 4;  // [kRows][steps] words
  F32 largest[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    largest[r] = broadcast(-std::numeric_limits<float>::infinity());
  }
  for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
    const bool full = all_visible<kRows>(tile, rows, group);
    float* out = scores + group * kKeyGroup;  // [kRows][kv_block]
    for (int first = 0; first < kKeyGroup; first += 16 * kVectors) {
      F32 sum[kRows][kVectors];
      clear(sum);
      multiply_words<Words>(sum, q, steps * 4, tile.kv.k(rows.block, group) + 4 * first, kStep,
                            steps);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const F32 factor = broadcast(tile.score_factor[rows.first_row + r]);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) {
          const int lane = first + 16 * c;
          F32 t = sum[r][c] * factor;
          if (!full) [[unlikely]] {
            int lo = 0;
            int hi = 0;
            visible_lanes(tile, rows, r, group, &lo, &hi);
            t = keep_lanes(t, lo - lane, hi - lane,
                           broadcast(-std::numeric_limits<float>::infinity()));
          }
          store(out + r * tile.kv_block + lane, t);
          largest[r] = max(t, largest[r]);  // ignores a NaN here; its weight is NaN below
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) block_max[r] = reduce_max(largest[r]);
}

/// Weights of one row and key group, as Words in the front of the row's scores; the scores of this
/// group and of those after it are still to be read, the weights never reach them.
template <class Words>
ATTN8_KERNEL_INLINE void weigh_group(const AttendTile& tile, const RowGroup& rows, int r,
                                     int64_t group, float* row_scores, float subtract,
                                     F32& weight_sum) {
  int lo = 0;
  int hi = 0;
  visible_lanes(tile, rows, r, group, &lo, &hi);
  const bool some_hidden = hi - lo != kKeyGroup || tile.changes != nullptr;
  const float* scores = row_scores + group * kKeyGroup;
  std::byte* weights =
      reinterpret_cast<std::byte*>(row_scores) + group * kKeyGroup * 4 / Words::kPerWord;
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const int lane = 16 * c;
    const F32 score = load(scores + lane);
    F32 w = exp2_scaled<5, 1>(score - broadcast(subtract));
    if (some_hidden) [[unlikely]] {
      w = where_less(score, broadcast(kLowestScore), broadcast(0.0f), w);
    }
    weight_sum = weight_sum + w;
    Words::store_weights(weights + lane * 4 / Words::kPerWord, w);
  }
}

/// O of kCount vectors of channels from `channel` on.
template <class Words, int kRows, int kCount>
ATTN8_KERNEL_INLINE void add_values(const AttendTile& tile, const RowGroup& rows,
                                    const float* scores, const RowState& state, int channel) {
  const int64_t padded = padded_dim(tile.head_dim);
  // Keys that no row of the group sees are not multiplied: an infinite V times a weight of 0 is
  // NaN.
  const int64_t first = rows.block * tile.kv_block;
  int64_t key = rows.group_hi * kKeyGroup;  // from the block's first on
  int64_t end = 0;
  for (int r = 0; r < kRows; ++r) {
    const KeyRange range = tile.visible[rows.first_row + r];
    if (range.empty()) continue;
    key = range.lo - first < key ? range.lo - first : key;
    end = range.hi - first > end ? range.hi - first : end;
  }
  key = key > rows.group_lo * kKeyGroup ? key : rows.group_lo * kKeyGroup;
  end = end < rows.group_hi * kKeyGroup ? end : rows.group_hi * kKeyGroup;
  const int64_t word = key / Words::kPerWord;
  const int64_t steps = (end + Words::kPerWord - 1) / Words::kPerWord - word;
  const std::byte* v = tile.kv.v(rows.block, 0) + (word * padded + channel) * 4;  // [word][padded]
  const std::byte* p = reinterpret_cast<const std::byte*>(scores) + word * 4;
  F32 sum[kRows][kCount];
  clear(sum);
  multiply_words<Words>(sum, p, int64_t{4} * tile.kv_block, v, padded * 4, steps);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* out = tile.out + (rows.first_row + r) * padded + channel;  // [kCount * 16]
    const F32 rescale = broadcast(state.rescale[r]);
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      store(out + 16 * c, load(out + 16 * c) * rescale + sum[r][c]);
    }
  }
}

template <class Scores, class Values, int kRows>
ATTN8_KERNEL_INLINE void attend_block_float(const AttendTile& tile, const RowGroup& rows,
                                            RowState& state, const TileScratch& scratch) {
  if (!begin_changes(tile, scratch, rows, kRows)) return;
  float block_max[kRows];
  if constexpr (std::is_same_v<Scores, CodeScores>) {
    float_scores<kRows>(tile, rows, scratch.scores, block_max);
  } else {
    word_scores<Scores, kRows>(tile, rows, scratch.scores, block_max);
  }
  if (tile.changes != nullptr) change_scores(tile, scratch, rows, kRows, block_max);
  advance(state, block_max, kRows);
  for (int r = 0; r < kRows; ++r) {
    F32 weight_sum = broadcast(0.0f);
    for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
      weigh_group<Values>(tile, rows, r, group, scratch.scores + r * tile.kv_block,
                          state.subtract[r], weight_sum);
    }
    const F32 rescale = broadcast(state.rescale[r]);
    float* weights = scratch.weights + 16 * (rows.first_row + r);
    store(weights, load(weights) * rescale + weight_sum);
  }
  const int padded = static_cast<int>(padded_dim(tile.head_dim));
  int channel = 0;
  for (; channel + 16 * kVectors <= padded; channel += 16 * kVectors) {
    add_values<Values, kRows, kVectors>(tile, rows, scratch.scores, state, channel);
  }
  for (; channel < padded; channel += 16) {
    add_values<Values, kRows, 1>(tile, rows, scratch.scores, state, channel);
  }
}

template <class Scores, class Values>
inline void attend_float(const AttendTile& tile) {
  const int64_t padded = padded_dim(tile.head_dim);
  const TileScratch scratch = tile_scratch(tile);
  std::memset(scratch.sums, 0, sizeof(float) * 2 * 16 * kQueryTile);
  std::memset(tile.out, 0, sizeof(float) * static_cast<size_t>(tile.rows * padded));
  for (int r = 0; r < tile.rows; ++r) tile.row_max[r] = -std::numeric_limits<float>::infinity();
  for_each_block(tile, [&](const RowGroup& rows, int count) ATTN8_INLINE_LAMBDA {
    RowState state;
    for (int r = 0; r < count; ++r) state.max[r] = tile.row_max[rows.first_row + r];
    if (count == kRowGroup) {
      attend_block_float<Scores, Values, kRowGroup>(tile, rows, state, scratch);
    } else {
      attend_block_float<Scores, Values, 1>(tile, rows, state, scratch);
    }
    for (int r = 0; r < count; ++r) tile.row_max[rows.first_row + r] = state.max[r];
  });
  for (int r = 0; r < tile.rows; ++r) {
    tile.weight_sum[r] = reduce_add(scratch.weights + 16 * r);
    tile.normalizer[r] = tile.weight_sum[r];
  }
}
