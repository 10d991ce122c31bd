// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// `accurate`, one phase after the other: scores, weights, products. Every ISA has it; AVX-512 runs
// attend_skewed-inl.hpp where that applies, with the same bits. Included inside the namespace of an
// ISA after score_grid-inl.hpp, products-inl.hpp and score_changes-inl.hpp.

/// What a block does to the rows of a pass.
struct GridStep {
  float weight[kRowGroup];        ///< beta
  float rescale[kRowGroup];       ///< of the past; 1 almost always
  float value_weight[kRowGroup];  ///< bv
  float residual[kRowGroup];      ///< rho
};

/// Scores of a block before they are rounded to the grid.
template <bool kChanged>
ATTN8_INLINE F32 score_of_product(const AttendTile& tile, int row, const KeyRecord& record,
                                  int lane, I32 product) {
  const F32 x = to_float(product) * load(record.k_scale + lane);
  const F32 factor = broadcast(tile.score_factor[row]);
  const F32 offset = load(record.offset + lane);
  if constexpr (kChanged) {
    const ScoreChanges& changes = *tile.changes;
    if (changes.softcap != 0) {
      const F32 uncapped = fused(x, factor, broadcast(changes.mean_score[row]));
      return fused(tanh_of_octaves(uncapped), broadcast(changes.softcap), offset);
    }
  }
  return fused(x, factor, offset);
}

/// Scores of a block on the grid, and the rows' maxima. kChanged: tile.changes applies.
template <int kRows, bool kChanged>
ATTN8_KERNEL_INLINE void grid_scores(const AttendTile& tile, const RowGroup& rows,
                                     const TileScratch& scratch, int32_t* scores,
                                     int32_t* block_max) {
  I32 largest[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) largest[r] = broadcast_i32(kHiddenScore);
  for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
    const bool full = all_visible<kRows>(tile, rows, group);
    const KeyRecord& record = tile.kv.records(rows.block)[group];
    int32_t* out = scores + group * kKeyGroup;  // [kRows][kv_block]
    query_products<kRows>(tile, rows, group, [&](int r, int lane, I32 sum) ATTN8_INLINE_LAMBDA {
      F32 v = score_of_product<kChanged>(tile, rows.first_row + r, record, lane, sum);
      F32 bias = broadcast(0.0f);
      if constexpr (kChanged) {
        if (tile.changes->biased) {
          bias = load(scratch.bias + r * tile.kv_block + group * kKeyGroup + lane);
          v = v + bias;
        }
      }
      I32 t = round_to_grid(max(broadcast(-kGridLimit), min(broadcast(kGridLimit), v)));
      if constexpr (kChanged) {
        t = where_less(bias, broadcast(kLowestScore), broadcast_i32(kHiddenScore), t);
      }
      if (!full) [[unlikely]] {
        int lo = 0;
        int hi = 0;
        visible_lanes(tile, rows, r, group, &lo, &hi);
        t = keep_lanes(t, lo - lane, hi - lane, broadcast_i32(kHiddenScore));
      }
      store(out + r * tile.kv_block + lane, t);
      largest[r] = max(largest[r], t);
    });
  }
  for (int r = 0; r < kRows; ++r) block_max[r] = reduce_max(largest[r]);
}

/// The exact sums of a row and block.
struct GridSums {
  int64_t weights = 0;   ///< L: h_j W_j
  int64_t residual = 0;  ///< R: y_j - 256 code_j
};

inline int64_t reduce_add(const I32& sum) {
  int32_t lanes[16];
  store(lanes, sum);
  int64_t total = 0;
  for (const int32_t lane : lanes) total += lane;
  return total;
}

/// P of one row from its scores.
ATTN8_KERNEL_INLINE GridSums grid_weights(const AttendTile& tile, const RowGroup& rows,
                                          const int32_t* scores, int32_t block_max,
                                          std::byte* codes) {
  const KeyRecord* records = tile.kv.records(rows.block);
  const bool any_high = tile.kv.header(rows.block).any_high != 0;
  const I32 top = broadcast_i32(block_max);
  GridSums sums;
  I32 residual = zero_i32();
  for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
    I32 code[4];
    I32 low = zero_i32();
    I32 high = zero_i32();
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const I32 y = grid_weight(top - load(scores + group * kKeyGroup + 16 * c));
      code[c] = shift_right<8>(y + broadcast_i32(128));
      residual = residual + (y - shift_left<8>(code[c]));
      const I32 h = shift_right<1>(y + broadcast_i32(1));
      // h < 2^15 and both halves of W at most 2^12: four products per lane stay far below 2^31.
      low = low + multiply16(h, load_scores16(records[group].inv_low, c));
      if (any_high) high = high + multiply16(h, load_scores16(records[group].inv_high, c));
    }
    store_codes(codes + group * kKeyGroup, code);
    sums.weights += reduce_add(low);
    if (any_high) sums.weights += reduce_add(high) * 4096;
  }
  sums.residual = reduce_add(residual);
  return sums;
}

/// One group of rows against one kv block.
template <int kRows>
ATTN8_KERNEL_INLINE void attend_block_accurate(const AttendTile& tile, const TileScratch& scratch,
                                               const RowGroup& rows) {
  auto* scores = reinterpret_cast<int32_t*>(scratch.scores);
  int32_t block_max[kRows];
  if (tile.changes == nullptr) {
    grid_scores<kRows, false>(tile, rows, scratch, scores, block_max);
  } else {
    if (!begin_changes(tile, scratch, rows, kRows)) return;
    grid_scores<kRows, true>(tile, rows, scratch, scores, block_max);
  }
  const float value_scale =
      tile.kv.channel_scale ? 1.0f : tile.kv.header(rows.block).v_scale / tile.kv.v_ref;
  GridStep step;
  for (int r = 0; r < kRows; ++r) {
    const int row = rows.first_row + r;
    advance_reference(block_max[r], &scratch.ref[row], &step.weight[r], &step.rescale[r]);
    // A row that sees none of the block stays as it is, also where a V scale is NaN.
    step.value_weight[r] = step.weight[r] == 0 ? 0.0f : step.weight[r] * value_scale;
    const GridSums sums = grid_weights(tile, rows, scores + r * tile.kv_block, block_max[r],
                                       scratch.codes + r * tile.kv_block);
    const bool sees_all = sees_block(tile, rows, r) && !hides_keys(tile, scratch, r);
    step.residual[r] = sees_all ? static_cast<float>(sums.residual) * 0x1p-8f : 0.0f;
    tile.normalizer[row] = __builtin_fmaf(step.weight[r], static_cast<float>(sums.weights),
                                          tile.normalizer[row] * step.rescale[r]);
  }
  const int64_t padded = padded_dim(tile.head_dim);
  const float* mean = tile.kv.mean(rows.block);
  const float* channel_scale = tile.kv.v_channel_scale(rows.block);
  value_products<kRows>(
      tile, rows, scratch, [&](int r, int channel, const auto& sum) ATTN8_INLINE_LAMBDA {
        float* out = tile.out + (rows.first_row + r) * padded + channel;  // [16 * vectors]
        constexpr int kCount = sizeof(sum) / sizeof(sum[0]);
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) {
          F32 x =
              fused(broadcast(step.residual[r]), load(mean + channel + 16 * c), to_float(sum[c]));
          if (tile.kv.channel_scale) {
            if (step.weight[r] == 0) continue;  // as above: 0 * NaN
            x = x * divide(load(channel_scale + channel + 16 * c), broadcast(tile.kv.v_ref));
          }
          const F32 past = load(out + 16 * c) * broadcast(step.rescale[r]);
          store(out + 16 * c, fused(broadcast(step.value_weight[r]), x, past));
        }
      });
}

/// Clears the results of a tile.
inline void begin_accurate(const AttendTile& tile, const TileScratch& scratch) {
  const auto rows = static_cast<size_t>(round_up(tile.rows, kRowGroup));
  std::memset(tile.out, 0, sizeof(float) * rows * static_cast<size_t>(padded_dim(tile.head_dim)));
  for (size_t r = 0; r < rows; ++r) {
    scratch.ref[r] = kNoReference;
    tile.normalizer[r] = 0;
  }
}

/// Brings l and the references to what the caller divides by.
inline void end_accurate(const AttendTile& tile, const TileScratch& scratch) {
  for (int r = 0; r < tile.rows; ++r) {
    tile.normalizer[r] *= 0x1p-15f;
    tile.weight_sum[r] = tile.normalizer[r];
    tile.row_max[r] = scratch.ref[r] == kNoReference ? -std::numeric_limits<float>::infinity()
                                                     : static_cast<float>(scratch.ref[r] / 64);
  }
}

inline void attend_accurate(const AttendTile& tile) {
  const TileScratch scratch = tile_scratch(tile);
  begin_accurate(tile, scratch);
  int64_t summed = -1;  // block
  for_each_block(tile, [&](const RowGroup& rows, int count) ATTN8_INLINE_LAMBDA {
    if (kValueCodesOffset && rows.block != summed) {
      sum_values(tile, rows.block, scratch);
      summed = rows.block;
    }
    if (count == kRowGroup) {
      attend_block_accurate<kRowGroup>(tile, scratch, rows);
    } else {
      attend_block_accurate<1>(tile, scratch, rows);
    }
  });
  end_accurate(tile, scratch);
}
