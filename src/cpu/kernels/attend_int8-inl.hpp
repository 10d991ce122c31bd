// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Attention of one query tile with INT8 Q, K, P and V. Included inside the namespace of an ISA
// after its vocabulary and online_softmax-inl.hpp.

/// The part of a tile's scratch that its row groups work in.
struct TileScratch {
  float* sums;       ///< [kQueryTile][16] sums of codes, by lane (`paper`)
  float* weights;    ///< [kQueryTile][16] weights before rounding, by lane
  float* scores;     ///< [kRowGroup][kv_block] log2 units
  std::byte* codes;  ///< [kRowGroup][kv_block] u8, groups of 64 in P's order
};

/// The rows of a tile that one pass computes, and the key groups of the block that any of them
/// sees.
struct RowGroup {
  int first_row = 0;
  int64_t group_lo = 0, group_hi = 0;  ///< key groups, counted from key 0
  int64_t block_group = 0;             ///< first key group of the kv block
};

/// A group of rows and a kv block whose P is known.
struct WeighedBlock {
  const RowGroup& rows;
  const RowState& state;
  const std::byte* codes;      ///< [kRowGroup][kv_block]
  const float* channel_scale;  ///< [padded_v_dim] V scales of the block, or nullptr
  const float* mean;           ///< [padded_v_dim] mean V codes of the block (`accurate`)
};

inline TileScratch tile_scratch(const AttendTile& tile) {
  auto* sums = reinterpret_cast<float*>(tile.scratch);
  float* weights = sums + 16 * kQueryTile;
  float* scores = weights + 16 * kQueryTile;
  return {sums, weights, scores, reinterpret_cast<std::byte*>(scores + kRowGroup * tile.kv_block)};
}

/// Lanes of key group `group` that row `row` sees, as [lo, hi) relative to its first key.
ATTN8_INLINE void visible_lanes(const AttendTile& tile, int row, int64_t group, int* lo, int* hi) {
  const int64_t first = group * kKeyGroup;
  const int64_t a = tile.visible[row].lo - first;
  const int64_t b = tile.visible[row].hi - first;
  *lo = static_cast<int>(a < 0 ? 0 : (a > kKeyGroup ? kKeyGroup : a));
  *hi = static_cast<int>(b < 0 ? 0 : (b > kKeyGroup ? kKeyGroup : b));
}

/// Whether every row of the pass sees all 64 keys of the group.
template <int kRows>
ATTN8_INLINE bool all_visible(const AttendTile& tile, int first_row, int64_t group) {
  for (int r = 0; r < kRows; ++r) {
    const KeyRange range = tile.visible[first_row + r];
    if (range.lo > group * kKeyGroup || range.hi < (group + 1) * kKeyGroup) return false;
  }
  return true;
}

/// Whether row r of the group sees every key of its kv block that any query of the call sees.
ATTN8_INLINE bool sees_block(const AttendTile& tile, const RowGroup& rows, int r) {
  const int64_t first = rows.block_group * kKeyGroup;
  const int64_t end = first + tile.kv_block;
  const KeyRange keys = tile.kv.keys;
  const KeyRange range = tile.visible[rows.first_row + r];
  return range.lo <= (first > keys.lo ? first : keys.lo) &&
         range.hi >= (end < keys.hi ? end : keys.hi);
}

/// QK of one key group: exact integers, scaled to log2 units, stored, their maxima taken.
/// kFull: every row sees all 64 keys.
template <int kRows, bool kFold, bool kFull>
ATTN8_KERNEL_INLINE void score_group(const AttendTile& tile, const RowGroup& rows, int64_t group,
                                     float* scores, F32 (&largest)[kRows]) {
  const int padded_dim = static_cast<int>(padded_qk_dim(tile.head_dim));
  const std::byte* k = tile.kv.k + group * kKeyGroup * padded_dim;  // [padded_dim / 4][64][4] s8
  const KeyRecord& record = tile.kv.records[group];
  const std::byte* q = tile.q + rows.first_row * padded_dim;     // [kRows][padded_dim]
  float* out = scores + (group - rows.block_group) * kKeyGroup;  // [kRows][kv_block]
  for (int half = 0; half < 4; half += kVectors) {
    I32 sum[kRows][kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const I32 start = kQueryCodesOffset ? load(record.correction + 16 * (half + c)) : zero_i32();
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][c] = start;
    }
    const std::byte* column = k + half * 64;
    for (int dim = 0; dim < padded_dim; dim += 4, column += 256) {
      I32 b[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) b[c] = load_bytes(column + 64 * c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const I32 a = broadcast4(q + r * padded_dim + dim);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) dot4_query(sum[r][c], a, b[c]);
      }
    }
    const F32 huge = broadcast(std::numeric_limits<float>::max());
    const F32 minus_huge = broadcast(-std::numeric_limits<float>::max());
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32 factor = broadcast(tile.score_factor[rows.first_row + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        const int lane = 16 * (half + c);
        // Saturates instead of overflowing: both ends stay finite, so no difference is NaN.
        F32 t =
            max(minus_huge, min(huge, to_float(sum[r][c]) * load(record.k_scale + lane) * factor));
        if constexpr (kFold) t = t + load(record.log2_ratio + lane);
        if constexpr (!kFull) {
          int lo = 0;
          int hi = 0;
          visible_lanes(tile, rows.first_row + r, group, &lo, &hi);
          t = keep_lanes(t, lo - lane, hi - lane,
                         broadcast(-std::numeric_limits<float>::infinity()));
        }
        store(out + r * tile.kv_block + lane, t);
        largest[r] = max(largest[r], t);
      }
    }
  }
}

/// Scores of a block for a group of rows, and the rows' maxima.
template <int kRows, bool kFold>
ATTN8_KERNEL_INLINE void score_block(const AttendTile& tile, const RowGroup& rows, float* scores,
                                     float* block_max) {
  F32 largest[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    largest[r] = broadcast(-std::numeric_limits<float>::infinity());
  }
  for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
    if (all_visible<kRows>(tile, rows.first_row, group)) [[likely]] {
      score_group<kRows, kFold, true>(tile, rows, group, scores, largest);
    } else {
      score_group<kRows, kFold, false>(tile, rows, group, scores, largest);
    }
  }
  for (int r = 0; r < kRows; ++r) block_max[r] = reduce_max(largest[r]);
}

/// What a block adds to the sums of a row, by lane.
struct BlockSums {
  F32 weights;   ///< weights before rounding, over r
  F32 codes;     ///< `paper`
  F32 residual;  ///< `accurate`: what rounding took from the weights
};

/// Rounds the weights of one row and key group to codes and adds them to the row's sums.
template <bool kPaper, bool kFold>
ATTN8_KERNEL_INLINE void round_group(const AttendTile& tile, int row, int64_t group,
                                     const float* scores, float subtract, std::byte* codes,
                                     BlockSums& sums) {
  constexpr int kTop = kPaper ? 127 : 255;  // the code of weight 1
  const float* inv_ratio = tile.kv.records[group].inv_ratio;
  int lo = 0;
  int hi = 0;
  visible_lanes(tile, row, group, &lo, &hi);
  I32 rounded[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const int lane = 16 * c;
    F32 w = exp2_scaled<4, kTop>(load(scores + lane) - broadcast(subtract));
    if (hi - lo != kKeyGroup) [[unlikely]] {
      w = keep_lanes(w, lo - lane, hi - lane, broadcast(0.0f));
    }
    rounded[c] = round_to_int(w);
    if constexpr (kPaper) {
      sums.codes = sums.codes + to_float(rounded[c]);
    } else {
      sums.residual = sums.residual + (w - to_float(rounded[c]));
    }
    if constexpr (kFold) w = w * load(inv_ratio + lane);
    sums.weights = sums.weights + w;
  }
  store_codes(codes, rounded);
}

/// P of a block for a group of rows.
template <int kRows, bool kPaper, bool kFold>
ATTN8_KERNEL_INLINE void weigh_block(const AttendTile& tile, const TileScratch& scratch,
                                     const RowGroup& rows, RowState& state) {
  for (int r = 0; r < kRows; ++r) {
    BlockSums sums = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
      const int64_t offset = r * tile.kv_block + (group - rows.block_group) * kKeyGroup;
      round_group<kPaper, kFold>(tile, rows.first_row + r, group, scratch.scores + offset,
                                 state.subtract[r], scratch.codes + offset, sums);
    }
    const F32 rescale = broadcast(state.rescale[r]);
    const F32 weight = broadcast(state.weight[r]);
    float* weights = scratch.weights + 16 * (rows.first_row + r);
    store(weights, load(weights) * rescale + sums.weights * weight);
    if constexpr (kPaper) {
      float* codes = scratch.sums + 16 * (rows.first_row + r);
      store(codes, load(codes) * rescale + sums.codes * weight);
    } else {
      float lanes[16];
      store(lanes, sums.residual);
      state.residual[r] = sees_block(tile, rows, r) ? reduce_add(lanes) : 0.0f;
    }
  }
}

/// One quad of keys of P V: four P bytes of each row against the quad's V.
template <int kRows, int kCount>
ATTN8_INLINE void multiply_quad(I32 (&sum)[kRows][kCount], const std::byte* p, int64_t p_stride,
                                const std::byte* v) {
  I32 b[kCount];
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) b[c] = load_bytes(v + 64 * c);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const I32 a = broadcast4(p + r * p_stride);
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) dot4_u8_s8(sum[r][c], a, b[c]);
  }
}

/// Adds the sums of a block, of kCount vectors from `channel` on, to the rows' accumulators.
template <int kRows, int kCount, bool kPaper>
ATTN8_INLINE void add_products(const AttendTile& tile, const WeighedBlock& block, int channel,
                               const I32 (&sum)[kRows][kCount]) {
  const int64_t padded_dim = padded_v_dim(tile.head_dim);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    // A row that sees none of the block stays as it is, also where a V scale of the block is NaN.
    if (block.state.weight[r] == 0) [[unlikely]]
      continue;
    float* out = tile.out + (block.rows.first_row + r) * padded_dim + channel;  // [kCount * 16]
    const F32 rescale = broadcast(block.state.rescale[r]);
    const F32 weight = broadcast(block.state.value_weight[r]);
    const F32 residual = broadcast(block.state.residual[r]);
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      F32 x = to_float(sum[r][c]);
      if constexpr (!kPaper) x = x + residual * load(block.mean + channel + 16 * c);
      x = x * weight;
      if (block.channel_scale != nullptr) x = x * load(block.channel_scale + channel + 16 * c);
      store(out + 16 * c, load(out + 16 * c) * rescale + x);
    }
  }
}

/// First V byte of (group, channel), and the distance between its quads.
ATTN8_INLINE const std::byte* value_bytes(const AttendTile& tile, int64_t group, int channel,
                                          int64_t* quad_stride) {
  const int64_t padded_dim = padded_v_dim(tile.head_dim);
  const int64_t slab = channel / 64 * 64;
  *quad_stride = slab_width(padded_dim, slab) * 4;
  return tile.kv.v + group * kKeyGroup * padded_dim + slab * kKeyGroup + (channel - slab) * 4;
}

/// P V of the block for `kCount` vectors of 16 channels, added to the rows' accumulators.
template <int kRows, int kCount, bool kPaper>
ATTN8_KERNEL_INLINE void add_values(const AttendTile& tile, const WeighedBlock& block,
                                    int channel) {
  const RowGroup& rows = block.rows;
  I32 sum[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) sum[r][c] = zero_i32();
  }
  for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
    int64_t quad_stride = 0;
    const std::byte* v = value_bytes(tile, group, channel, &quad_stride);       // [16][channel][4]
    const std::byte* p = block.codes + (group - rows.block_group) * kKeyGroup;  // [kRows][16][4]
    for (int quad = 0; quad < 16; ++quad, v += quad_stride) {
      multiply_quad<kRows, kCount>(sum, p + quad * 4, tile.kv_block, v);
    }
  }
  add_products<kRows, kCount, kPaper>(tile, block, channel, sum);
}

/// P V of the block.
template <int kRows, bool kPaper>
ATTN8_KERNEL_INLINE void add_all_values(const AttendTile& tile, const WeighedBlock& block) {
  const int padded_dim = static_cast<int>(padded_v_dim(tile.head_dim));
  int channel = 0;
  // A slab is 64 channels; passes of kVectors vectors do not cross its end.
  for (; channel + 16 * kVectors <= padded_dim; channel += 16 * kVectors) {
    add_values<kRows, kVectors, kPaper>(tile, block, channel);
  }
  for (; channel < padded_dim; channel += 16) add_values<kRows, 1, kPaper>(tile, block, channel);
}

/// One group of rows against one kv block.
template <int kRows, bool kPaper, bool kFold>
ATTN8_KERNEL_INLINE void attend_block(const AttendTile& tile, const TileScratch& scratch,
                                      const RowGroup& rows, int64_t block) {
  RowState state = {};
  for (int r = 0; r < kRows; ++r) state.max[r] = tile.row_max[rows.first_row + r];
  float block_max[kRows];
  score_block<kRows, kFold>(tile, rows, scratch.scores, block_max);
  advance<!kPaper>(state, block_max, kRows);
  const float* channel_scale = nullptr;
  float value_scale = 1.0f;
  if (tile.kv.v_block_scale != nullptr && tile.kv.v_block_scale_per_channel) {
    channel_scale = tile.kv.v_block_scale + block * padded_v_dim(tile.head_dim);
  } else if (tile.kv.v_block_scale != nullptr) {
    value_scale = tile.kv.v_block_scale[block];
  }
  for (int r = 0; r < kRows; ++r) {
    state.value_weight[r] = state.weight[r] * value_scale;
    tile.row_max[rows.first_row + r] = state.max[r];
  }
  weigh_block<kRows, kPaper, kFold>(tile, scratch, rows, state);
  const float* mean =
      kPaper ? nullptr : tile.kv.v_mean + block * padded_v_dim(tile.head_dim);  // [padded_v_dim]
  add_all_values<kRows, kPaper>(tile,
                                WeighedBlock{rows, state, scratch.codes, channel_scale, mean});
}

/// Key groups of kv block `block` that the rows [first_row, first_row + count) see.
inline RowGroup row_group(const AttendTile& tile, int first_row, int count, int64_t block) {
  const int64_t block_group = block * tile.kv_block / kKeyGroup;
  int64_t lo = (block + 1) * tile.kv_block;
  int64_t hi = 0;
  for (int r = first_row; r < first_row + count; ++r) {
    const KeyRange range = tile.visible[r];
    if (range.empty()) continue;
    lo = range.lo < lo ? range.lo : lo;
    hi = range.hi > hi ? range.hi : hi;
  }
  const int64_t block_lo = block * tile.kv_block;
  const int64_t block_hi = block_lo + tile.kv_block;
  lo = lo > block_lo ? lo : block_lo;
  hi = hi < block_hi ? hi : block_hi;
  if (lo >= hi) return {first_row, block_group, block_group, block_group};
  return {first_row, lo / kKeyGroup, (hi + kKeyGroup - 1) / kKeyGroup, block_group};
}

/// Calls visit(rows, count) for every group of rows and every kv block it sees, block by block, so
/// that a block stays in cache while all rows of the tile use it.
template <class Visit>
ATTN8_INLINE void for_each_block(const AttendTile& tile, Visit visit) {
  int64_t lo = std::numeric_limits<int64_t>::max();
  int64_t hi = 0;
  for (int r = 0; r < tile.rows; ++r) {
    if (tile.visible[r].empty()) continue;
    lo = tile.visible[r].lo < lo ? tile.visible[r].lo : lo;
    hi = tile.visible[r].hi > hi ? tile.visible[r].hi : hi;
  }
  if (lo >= hi) return;
  const int64_t last = (hi + tile.kv_block - 1) / tile.kv_block;
  for (int64_t block = lo / tile.kv_block; block < last; ++block) {
    int row = 0;
    while (row < tile.rows) {
      const int count = tile.rows - row >= kRowGroup ? kRowGroup : 1;
      const RowGroup rows = row_group(tile, row, count, block);
      if (rows.group_lo < rows.group_hi) visit(rows, count, block);
      row += count;
    }
  }
}

template <bool kPaper, bool kFold>
inline void attend_int8(const AttendTile& tile) {
  const int64_t padded_dim = padded_v_dim(tile.head_dim);
  const TileScratch scratch = tile_scratch(tile);
  std::memset(scratch.sums, 0, sizeof(float) * 2 * 16 * kQueryTile);
  std::memset(tile.out, 0, sizeof(float) * static_cast<size_t>(tile.rows * padded_dim));
  for (int r = 0; r < tile.rows; ++r) tile.row_max[r] = -std::numeric_limits<float>::infinity();
  for_each_block(tile, [&](const RowGroup& rows, int count, int64_t block) ATTN8_INLINE_LAMBDA {
    if (count == kRowGroup) {
      attend_block<kRowGroup, kPaper, kFold>(tile, scratch, rows, block);
    } else {
      attend_block<1, kPaper, kFold>(tile, scratch, rows, block);
    }
  });
  for (int r = 0; r < tile.rows; ++r) {
    tile.weight_sum[r] = reduce_add(scratch.weights + 16 * r);
    tile.normalizer[r] = kPaper ? reduce_add(scratch.sums + 16 * r) : tile.weight_sum[r];
  }
}
