// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// `paper`: Algorithm 1 of arXiv:2409.16997 with float32 scores. Included inside the namespace of an
// ISA after online_softmax-inl.hpp and products-inl.hpp.

/// Scores of a block in log2 units, and the rows' maxima.
template <int kRows>
ATTN8_KERNEL_INLINE void float_scores(const AttendTile& tile, const RowGroup& rows, float* scores,
                                      float* block_max) {
  F32 largest[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    largest[r] = broadcast(-std::numeric_limits<float>::infinity());
  }
  const F32 huge = broadcast(std::numeric_limits<float>::max());
  const F32 minus_huge = broadcast(-std::numeric_limits<float>::max());
  for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
    const bool full = all_visible<kRows>(tile, rows, group);
    const KeyRecord& record = tile.kv.records(rows.block)[group];
    float* out = scores + group * kKeyGroup;  // [kRows][kv_block]
    query_products<kRows>(tile, rows, group, [&](int r, int lane, I32 sum) ATTN8_INLINE_LAMBDA {
      const F32 factor = broadcast(tile.score_factor[rows.first_row + r]);
      // Saturates instead of overflowing: both ends stay finite, so no difference is NaN.
      F32 t = max(minus_huge, min(huge, to_float(sum) * load(record.k_scale + lane) * factor));
      if (!full) [[unlikely]] {
        int lo = 0;
        int hi = 0;
        visible_lanes(tile, rows, r, group, &lo, &hi);
        t = keep_lanes(t, lo - lane, hi - lane, broadcast(-std::numeric_limits<float>::infinity()));
      }
      store(out + r * tile.kv_block + lane, t);
      largest[r] = max(largest[r], t);
    });
  }
  for (int r = 0; r < kRows; ++r) block_max[r] = reduce_max(largest[r]);
}

/// One group of rows against one kv block.
template <int kRows>
ATTN8_KERNEL_INLINE void attend_block_paper(const AttendTile& tile, const TileScratch& scratch,
                                            const RowGroup& rows) {
  if (!begin_changes(tile, scratch, rows, kRows)) return;
  RowState state = {};
  for (int r = 0; r < kRows; ++r) state.max[r] = tile.row_max[rows.first_row + r];
  float block_max[kRows];
  float_scores<kRows>(tile, rows, scratch.scores, block_max);
  if (tile.changes != nullptr) change_scores(tile, scratch, rows, kRows, block_max);
  advance(state, block_max, kRows);
  for (int r = 0; r < kRows; ++r) {
    const int row = rows.first_row + r;
    tile.row_max[row] = state.max[r];
    F32 weight_sum = broadcast(0.0f);
    F32 code_sum = broadcast(0.0f);
    for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
      const int64_t offset = r * tile.kv_block + group * kKeyGroup;
      int lo = 0;
      int hi = 0;
      visible_lanes(tile, rows, r, group, &lo, &hi);
      const bool some_hidden = hi - lo != kKeyGroup || tile.changes != nullptr;
      I32 rounded[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const int lane = 16 * c;
        const F32 score = load(scratch.scores + offset + lane);
        F32 w = exp2_scaled<4, 127>(score - broadcast(state.subtract[r]));
        if (some_hidden) [[unlikely]] {
          w = where_less(score, broadcast(kLowestScore), broadcast(0.0f), w);
        }
        rounded[c] = round_to_int(w);
        code_sum = code_sum + to_float(rounded[c]);
        weight_sum = weight_sum + w;
      }
      store_codes(scratch.codes + offset, rounded);
    }
    const F32 rescale = broadcast(state.rescale[r]);
    float* weights = scratch.weights + 16 * row;
    store(weights, load(weights) * rescale + weight_sum);
    float* codes = scratch.sums + 16 * row;
    store(codes, load(codes) * rescale + code_sum);
  }
  const int64_t padded = padded_dim(tile.head_dim);
  value_products<kRows>(
      tile, rows, scratch, [&](int r, int channel, const auto& sum) ATTN8_INLINE_LAMBDA {
        float* out = tile.out + (rows.first_row + r) * padded + channel;  // [16 * vectors]
        constexpr int kCount = sizeof(sum) / sizeof(sum[0]);
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) {
          store(out + 16 * c, load(out + 16 * c) * broadcast(state.rescale[r]) + to_float(sum[c]));
        }
      });
}

inline void attend_paper(const AttendTile& tile) {
  const int64_t padded = padded_dim(tile.head_dim);
  const TileScratch scratch = tile_scratch(tile);
  std::memset(scratch.sums, 0, sizeof(float) * 2 * 16 * kQueryTile);
  std::memset(tile.out, 0, sizeof(float) * static_cast<size_t>(tile.rows * padded));
  for (int r = 0; r < tile.rows; ++r) tile.row_max[r] = -std::numeric_limits<float>::infinity();
  int64_t summed = -1;  // block
  for_each_block(tile, [&](const RowGroup& rows, int count) ATTN8_INLINE_LAMBDA {
    if (kValueCodesOffset && rows.block != summed) {
      sum_values(tile, rows.block, scratch);
      summed = rows.block;
    }
    if (count == kRowGroup) {
      attend_block_paper<kRowGroup>(tile, scratch, rows);
    } else {
      attend_block_paper<1>(tile, scratch, rows);
    }
  });
  for (int r = 0; r < tile.rows; ++r) {
    tile.weight_sum[r] = reduce_add(scratch.weights + 16 * r);
    tile.normalizer[r] = reduce_add(scratch.sums + 16 * r);
  }
}
