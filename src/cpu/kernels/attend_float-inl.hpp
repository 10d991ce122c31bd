// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Attention of one query tile with a float P V product: `half` (INT8 scores, bfloat16 P and V) and
// `exact` (float32). Included inside the namespace of an ISA after attend_paper-inl.hpp.

/// Scores of one key group from float Q and K, in log2 units.
template <int kRows>
ATTN8_KERNEL_INLINE void score_group_float(const AttendTile& tile, const RowGroup& rows,
                                           int64_t group, float* scores, F32 (&largest)[kRows]) {
  const auto* k = reinterpret_cast<const float*>(tile.kv.k(rows.block, group));  // [head_dim][64]
  const auto* q = reinterpret_cast<const float*>(tile.q) + rows.first_row * tile.head_dim;
  const bool full = all_visible<kRows>(tile, rows, group);
  float* out = scores + group * kKeyGroup;  // [kRows][kv_block]
  for (int half = 0; half < 4; half += kVectors) {
    F32 sum[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sum[r][c] = broadcast(0.0f);
    }
    const float* column = k + 16 * half;
    for (int dim = 0; dim < tile.head_dim; ++dim, column += kKeyGroup) {
      F32 b[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) b[c] = load(column + 16 * c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const F32 a = broadcast(q[r * tile.head_dim + dim]);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) sum[r][c] = multiply_add(a, b[c], sum[r][c]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32 factor = broadcast(tile.score_factor[rows.first_row + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        const int lane = 16 * (half + c);
        F32 t = sum[r][c] * factor;
        if (!full) [[unlikely]] {
          int lo = 0;
          int hi = 0;
          visible_lanes(tile, rows, r, group, &lo, &hi);
          t = keep_lanes(t, lo - lane, hi - lane,
                         broadcast(-std::numeric_limits<float>::infinity()));
        }
        store(out + r * tile.kv_block + lane, t);
        largest[r] = max(t, largest[r]);  // this order ignores a NaN here; its weight is NaN below
      }
    }
  }
}

/// Weights of one row and key group in place of its scores, rounded to bfloat16 in `half`.
template <bool kBfloat16>
ATTN8_KERNEL_INLINE void weigh_group(const AttendTile& tile, const RowGroup& rows, int r,
                                     int64_t group, float* scores, float subtract,
                                     F32& weight_sum) {
  int lo = 0;
  int hi = 0;
  visible_lanes(tile, rows, r, group, &lo, &hi);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const int lane = 16 * c;
    F32 w = exp2_scaled<5, 1>(load(scores + lane) - broadcast(subtract));
    if (hi - lo != kKeyGroup) [[unlikely]] {
      w = keep_lanes(w, lo - lane, hi - lane, broadcast(0.0f));
    }
    weight_sum = weight_sum + w;
    if constexpr (kBfloat16) w = round_to_bfloat16(w);
    store(scores + lane, w);
  }
}

template <bool kBfloat16>
ATTN8_INLINE F32 load_value(const std::byte* p) {
  if constexpr (kBfloat16) {
    return load_bfloat16(reinterpret_cast<const uint16_t*>(p));
  } else {
    return load(reinterpret_cast<const float*>(p));
  }
}

template <int kRows, int kCount, bool kBfloat16>
ATTN8_KERNEL_INLINE void add_values_float(const AttendTile& tile, const RowGroup& rows,
                                          const float* weights, const RowState& state,
                                          int channel) {
  constexpr int kBytes = kBfloat16 ? 2 : 4;
  const int64_t padded = padded_dim(tile.head_dim);
  F32 sum[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) sum[r][c] = broadcast(0.0f);
  }
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
  const std::byte* v =
      tile.kv.v(rows.block, 0) + (key * padded + channel) * kBytes;  // [key][padded]
  const float* p = weights + key;                                    // [kRows][kv_block]
  for (; key < end; ++key, ++p, v += padded * kBytes) {
    F32 b[kCount];
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) b[c] = load_value<kBfloat16>(v + 16 * c * kBytes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32 a = broadcast(p[r * tile.kv_block]);
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) sum[r][c] = multiply_add(a, b[c], sum[r][c]);
    }
  }
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

template <int kRows, bool kHalf>
ATTN8_KERNEL_INLINE void attend_block_float(const AttendTile& tile, const RowGroup& rows,
                                            RowState& state, const TileScratch& scratch) {
  float block_max[kRows];
  if constexpr (kHalf) {
    float_scores<kRows>(tile, rows, scratch.scores, block_max);
  } else {
    F32 largest[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      largest[r] = broadcast(-std::numeric_limits<float>::infinity());
    }
    for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
      score_group_float<kRows>(tile, rows, group, scratch.scores, largest);
    }
    for (int r = 0; r < kRows; ++r) block_max[r] = reduce_max(largest[r]);
  }
  advance(state, block_max, kRows);
  for (int r = 0; r < kRows; ++r) {
    F32 weight_sum = broadcast(0.0f);
    for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
      const int64_t offset = r * tile.kv_block + group * kKeyGroup;
      weigh_group<kHalf>(tile, rows, r, group, scratch.scores + offset, state.subtract[r],
                         weight_sum);
    }
    const F32 rescale = broadcast(state.rescale[r]);
    float* weights = scratch.weights + 16 * (rows.first_row + r);
    store(weights, load(weights) * rescale + weight_sum);
  }
  const int padded = static_cast<int>(padded_dim(tile.head_dim));
  int channel = 0;
  for (; channel + 16 * kVectors <= padded; channel += 16 * kVectors) {
    add_values_float<kRows, kVectors, kHalf>(tile, rows, scratch.scores, state, channel);
  }
  for (; channel < padded; channel += 16) {
    add_values_float<kRows, 1, kHalf>(tile, rows, scratch.scores, state, channel);
  }
}

template <bool kHalf>
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
      attend_block_float<kRowGroup, kHalf>(tile, rows, state, scratch);
    } else {
      attend_block_float<1, kHalf>(tile, rows, state, scratch);
    }
    for (int r = 0; r < count; ++r) tile.row_max[rows.first_row + r] = state.max[r];
  });
  for (int r = 0; r < tile.rows; ++r) {
    tile.weight_sum[r] = reduce_add(scratch.weights + 16 * r);
    tile.normalizer[r] = tile.weight_sum[r];
  }
}
