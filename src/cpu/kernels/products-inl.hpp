// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The two integer matrix products of a block. Included inside the namespace of an ISA after
// tile_walk-inl.hpp.

/// Q K of one key group: calls consume(row, first key of 16, exact dot products).
template <int kRows, class Consume>
ATTN8_INLINE void query_products(const AttendTile& tile, const RowGroup& rows, int64_t group,
                                 Consume consume) {
  const int padded = static_cast<int>(padded_dim(tile.head_dim));
  const std::byte* k = tile.kv.k(rows.block, group);  // [padded / 4][64][4] s8
  const KeyRecord& record = tile.kv.records(rows.block)[group];
  const std::byte* q = tile.q + packed_q_offset(rows.first_row, 0, padded);  // [padded / 4][4][4]
  for (int half = 0; half < 4; half += kVectors) {
    I32 sum[kRows][kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const I32 start = kQueryCodesOffset ? load(record.correction + 16 * (half + c)) : zero_i32();
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][c] = start;
    }
    const std::byte* column = k + half * 64;
    for (int dim = 0; dim < padded; dim += 4, column += 256) {
      I32 b[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) b[c] = load_bytes(column + 64 * c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const I32 a = broadcast4(q + 4 * dim + 4 * r);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) dot4_query(sum[r][c], a, b[c]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) consume(r, 16 * (half + c), sum[r][c]);
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
    for (int c = 0; c < kCount; ++c) dot4_value(sum[r][c], a, b[c]);
  }
}

/// What P stored - 128 takes from the sums with V, for each group of a block.
inline void sum_values(const AttendTile& tile, int64_t block, const TileScratch& scratch) {
  const auto padded = static_cast<int>(padded_dim(tile.head_dim));
  const int64_t left = key_groups(tile.kv.keys.hi - block * tile.kv_block);
  const int64_t groups = tile.kv_block / kKeyGroup;
  for (int64_t group = 0; group < (left < groups ? left : groups); ++group) {
    int32_t* sums = scratch.value_sums + group * padded;  // [padded]
    sum_v(tile.kv.v(block, group), padded, sums);
    for (int d = 0; d < padded; d += 16) store(sums + d, shift_left<7>(load(sums + d)));
  }
}

/// P V of the block for kCount vectors of 16 channels from `channel` on.
template <int kRows, int kCount, class Consume>
ATTN8_KERNEL_INLINE void value_products_of(const AttendTile& tile, const RowGroup& rows,
                                           const TileScratch& scratch, int channel,
                                           Consume consume) {
  const int64_t padded = padded_dim(tile.head_dim);
  const int64_t slab = channel / 64 * 64;
  const int64_t quad_stride = slab_width(padded, slab) * 4;
  I32 sum[kRows][kCount];
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) {
    I32 start = zero_i32();
    if constexpr (kValueCodesOffset) {
      for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
        start = start + load(scratch.value_sums + group * padded + channel + 16 * c);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r][c] = start;
  }
  for (int64_t group = rows.group_lo; group < rows.group_hi; ++group) {
    // [16][slab][4]
    const std::byte* v = tile.kv.v(rows.block, group) + slab * kKeyGroup + (channel - slab) * 4;
    const std::byte* p = scratch.codes + group * kKeyGroup;  // [kRows][16][4]
    for (int quad = 0; quad < 16; ++quad, v += quad_stride) {
      multiply_quad<kRows, kCount>(sum, p + quad * 4, tile.kv_block, v);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) consume(r, channel, sum[r]);
}

/// P V of the block: calls consume(row, first channel, sums of 16 channels [kCount]).
template <int kRows, class Consume>
ATTN8_KERNEL_INLINE void value_products(const AttendTile& tile, const RowGroup& rows,
                                        const TileScratch& scratch, Consume consume) {
  const int padded = static_cast<int>(padded_dim(tile.head_dim));
  int channel = 0;
  // A slab is 64 channels; passes of kVectors vectors do not cross its end.
  for (; channel + 16 * kVectors <= padded; channel += 16 * kVectors) {
    value_products_of<kRows, kVectors>(tile, rows, scratch, channel, consume);
  }
  for (; channel < padded; channel += 16) {
    value_products_of<kRows, 1>(tile, rows, scratch, channel, consume);
  }
}
