// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// `accurate` on AVX-512 VNNI for up to eight query rows (decode), whose time is that of reading K
// and V: one phase after the other, every block read once for all rows, with the bits of
// attend_accurate(). Included inside the ISA's namespace after attend_skewed_avx512-inl.hpp.

/// Asks for the block that comes next, a few lines with every step of the computation: one core
/// keeps few misses open, so that they must be asked for all the time, and a quarter of the block
/// here and a quarter there arrive sooner than one after the other.
struct NextBlock {
  const std::byte* first;   ///< in the first quarter, and one quarter on in the second
  const std::byte* second;  ///< in the third and fourth
  int64_t quarter;          ///< bytes

  ATTN8_INLINE static void request(const std::byte* line) {
    asm volatile("prefetcht1 %0" : : "m"(*line));
  }
  /// Four lines.
  ATTN8_INLINE void request_four() {
    request(first);
    request(first + quarter);
    request(second);
    request(second + quarter);
    first += 64;
    second += 64;
  }
  /// Two lines, of the first two quarters and of the others in turn.
  ATTN8_INLINE void request_two() {
    request(first);
    request(first + quarter);
    const std::byte* then = first + 64;
    first = second;
    second = then;
  }
};

/// One step of a dot product for kRows rows: kStride bytes between the rows of `a`, `fours` bytes
/// between its fours of rows.
template <int kRows, int kVectors, int kStride>
ATTN8_INLINE void few_step(Vector (&sum)[kRows][kVectors], const std::byte* a, int64_t fours,
                           const std::byte* b, NextBlock& next) {
  Vector column[kVectors];
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; ++c) column[c] = load_now(b + 64 * c);
  if constexpr (kVectors == 4) {
    next.request_four();
  } else {
    next.request_two();
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vector x = broadcast_bytes(a + r / 4 * fours + r % 4 * kStride);
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) dot(sum[r][c], x, column[c]);
  }
}

/// Q K of a group for kVectors vectors of 16 keys from vector `first` on, to 16-bit scores.
template <int kRows, int kVectors>
ATTN8_INLINE void few_scores(Skewed (&work)[2], const SkewedItem& item, int group, int first,
                             NextBlock& next, Vector (&largest)[2][kRowGroup]) {
  const AttendTile& tile = work[0].tile;
  const KeyRecord& record = item.records[group];
  const int padded = work[0].padded;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      sum[r][c] = load_vector(record.correction + 16 * (first + c));
    }
  }
  const std::byte* q = tile.q;  // [rows / 4][padded / 4][4][4]
  const std::byte* k =
      item.k + static_cast<size_t>(group) * tile.kv.layout.k_group_bytes + 64 * first;
  for (int dim = 0; dim < padded; dim += 4) {
    few_step<kRows, kVectors, 4>(sum, q, int64_t{4} * padded, k, next);
    q += kQueryStep;
    k += 256;
  }
#pragma GCC unroll 2
  for (int c = 0; c < kVectors; c += 2) {
    const KeyPair keys = load_pair(record, first + c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      score_pair(keys, work[0].factors + r,
                 work[r / 4].scores + (kRowGroup * group + r % 4) * 64 + 16 * (first + c),
                 sum[r][c], sum[r][c + 1], largest[r / 4][r % 4]);
    }
  }
}

/// P V of a block for kVectors vectors of channels from `channel` on, added to O.
template <int kRows, int kVectors>
ATTN8_INLINE void few_values(const Skewed (&work)[2], const SkewedItem& item,
                             const SkewedState (&state)[2], int channel, NextBlock& next) {
  const int slab = channel / 64 * 64;
  const int64_t step_bytes = slab_width(work[0].padded, slab) * 4;
  const int64_t fours = state[1].codes - state[0].codes;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sum[r][c] = _mm512_setzero_si512();
  }
  const std::byte* group_codes = state[0].codes;
  const std::byte* group_v = item.v + slab * kKeyGroup + (channel - slab) * 4;
  for (int group = 0; group < item.groups; ++group) {
    const std::byte* p = group_codes;
    const std::byte* v = group_v;
    for (int step = 0; step < 16; ++step) {
      few_step<kRows, kVectors, kCodesStride>(sum, p, fours, v, next);
      p += 4;
      v += step_bytes;
    }
    group_codes += kRowGroup * kCodesStride;
    group_v += work[0].tile.kv.layout.v_group_bytes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    add_row<kVectors>(work[0], state[r / 4], item.mean, channel, r % 4, sum[r]);
  }
}

/// kRows: 1, 4 or 8 rows are computed, whatever the tile has of them.
template <int kRows>
inline void attend_few(const AttendTile& tile) {
  constexpr int kFours = (kRows + 3) / 4;
  constexpr int kVectors = kRows == 8 ? 2 : 4;  // of a pass: with 8 rows, 16 accumulators
  Skewed work[2] = {Skewed(tile), Skewed(tile)};
  begin_accurate(tile, work[0].scratch);
  const Vector table_low = load_vector(kGridWeight16);
  const Vector table_high = load_vector(kGridWeight16 + 32);
  const Vector hidden = _mm512_set1_epi16(kHiddenScore16);
  SkewedWalk walk(tile, kFours * kRowGroup);
  SkewedItem items[2];
  SkewedState states[2];
  for (int four = 0; four < 2; ++four) {
    states[four].out = tile.out + four * kRowGroup * work[0].padded;
    states[four].codes = work[four].codes[0];
  }
  while (walk.next(items[0])) {
    if constexpr (kFours == 2) walk.next_four(items[0], items[1]);
    const std::byte* block = tile.kv.blocks[items[0].first_key / tile.kv_block].data;
    NextBlock next = {.first = block + items[0].ahead,
                      .second = block + items[0].ahead + tile.kv.layout.bytes / 2,
                      .quarter = static_cast<int64_t>(tile.kv.layout.bytes / 4)};
    Vector largest[2][kRowGroup] = {{hidden, hidden, hidden, hidden},
                                    {hidden, hidden, hidden, hidden}};
    for (int group = 0; group < items[0].groups; ++group) {
      for (size_t line = 0; line < sizeof(KeyRecord); line += 256) next.request_four();
      for (int first = 0; first < 4; first += kVectors) {
        few_scores<kRows, kVectors>(work, items[0], group, first, next, largest);
      }
    }
    for (int four = 0; four < kFours; ++four) {
      advance_rows(work[four], items[four], largest[four], states[four]);
      if (states[four].rescales) [[unlikely]]
        rescale_rows(states[four], work[0].padded);
      const Weigher weigher = {.scores = work[four].scores,
                               .codes = states[four].codes,
                               .records = items[0].records,
                               .top = work[four].top,
                               .sums = work[four].sums};
      for (int piece = 0; piece < kRowGroup * items[0].groups; ++piece) {
        if (piece % kRowGroup >= kRows) continue;
        HalfPiece half;
        weigh_half<0, -1>(weigher, piece, half, table_low, table_high);
        weigh_half<1, -1>(weigher, piece, half, table_low, table_high);
      }
      finish_sums(work[four], items[four], states[four]);
    }
    int channel = 0;
    for (; channel + 16 * kVectors <= work[0].padded; channel += 16 * kVectors) {
      few_values<kRows, kVectors>(work, items[0], states, channel, next);
    }
    for (; channel < work[0].padded; channel += 16) {
      few_values<kRows, 1>(work, items[0], states, channel, next);
    }
  }
  end_accurate(tile, work[0].scratch);
}

/// Where 16 bits hold the scores.
inline void attend_16bit(const AttendTile& tile) {
  if (tile.rows == 1) return attend_few<1>(tile);
  if (tile.rows <= kRowGroup) return attend_few<4>(tile);
  if (tile.rows <= 2 * kRowGroup) return attend_few<8>(tile);
  attend_skewed(tile);
}
