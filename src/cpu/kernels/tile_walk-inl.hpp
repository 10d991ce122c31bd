// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// How a tile of query rows is walked: groups of rows against kv blocks, and who sees what. Included
// inside the namespace of an ISA after its vocabulary.

/// The part of a tile's scratch that its row groups work in.
struct TileScratch {
  float* sums;          ///< [kQueryTile][16] sums of codes, by lane (`paper`)
  float* weights;       ///< [kQueryTile][16] weights before rounding, by lane (float softmax)
  int32_t* ref;         ///< [kQueryTile] references (`accurate`), 1/64 octaves
  float* scores;        ///< [kRowGroup][kv_block] log2 units, or int32 1/64 octaves (`accurate`)
  std::byte* codes;     ///< [kRowGroup][kv_block] u8, groups of 64 in P's order
  float* bias;          ///< [kRowGroup][kv_block] what is added to scores (ScoreChanges)
  int32_t* hides;       ///< [kRowGroup] whether attn_mask hides a key of the block from the row
  int32_t* value_sums;  ///< [kv_block / 64][256] 128 times the sums of the block's V codes
};

inline TileScratch tile_scratch(const AttendTile& tile) {
  auto* sums = reinterpret_cast<float*>(tile.scratch);
  float* weights = sums + 16 * kQueryTile;
  auto* ref = reinterpret_cast<int32_t*>(weights + 16 * kQueryTile);
  auto* scores = reinterpret_cast<float*>(ref + kQueryTile);
  auto* codes = reinterpret_cast<std::byte*>(scores + kRowGroup * tile.kv_block);
  auto* bias = reinterpret_cast<float*>(codes + kRowGroup * tile.kv_block);
  auto* hides = reinterpret_cast<int32_t*>(bias + kRowGroup * tile.kv_block);
  int32_t* value_sums = hides + 16;
  return {sums, weights, ref, scores, codes, bias, hides, value_sums};
}

/// The rows of a tile that one pass computes, and the key groups of a block that any of them sees.
struct RowGroup {
  int first_row = 0;
  int64_t block = 0;                   ///< kv block
  int64_t group_lo = 0, group_hi = 0;  ///< key groups, counted from the first of the block
};

/// Lanes of key group `group` that row `row` sees, as [lo, hi) relative to its first key.
ATTN8_INLINE void visible_lanes(const AttendTile& tile, const RowGroup& rows, int r, int64_t group,
                                int* lo, int* hi) {
  const int64_t first = rows.block * tile.kv_block + group * kKeyGroup;
  const int64_t a = tile.visible[rows.first_row + r].lo - first;
  const int64_t b = tile.visible[rows.first_row + r].hi - first;
  *lo = static_cast<int>(a < 0 ? 0 : (a > kKeyGroup ? kKeyGroup : a));
  *hi = static_cast<int>(b < 0 ? 0 : (b > kKeyGroup ? kKeyGroup : b));
}

/// Whether every row of the pass sees all 64 keys of the group.
template <int kRows>
ATTN8_INLINE bool all_visible(const AttendTile& tile, const RowGroup& rows, int64_t group) {
  const int64_t first = rows.block * tile.kv_block + group * kKeyGroup;
  for (int r = 0; r < kRows; ++r) {
    const KeyRange range = tile.visible[rows.first_row + r];
    if (range.lo > first || range.hi < first + kKeyGroup) return false;
  }
  return true;
}

/// Whether row r of the group sees every key of its kv block that any query of the call sees.
ATTN8_INLINE bool sees_block(const AttendTile& tile, const RowGroup& rows, int r) {
  const int64_t first = rows.block * tile.kv_block;
  const int64_t end = first + tile.kv_block;
  const KeyRange keys = tile.kv.keys;
  const KeyRange range = tile.visible[rows.first_row + r];
  return range.lo <= (first > keys.lo ? first : keys.lo) &&
         range.hi >= (end < keys.hi ? end : keys.hi);
}

/// Key groups of kv block `block` that the rows [first_row, first_row + count) see.
inline RowGroup row_group(const AttendTile& tile, int first_row, int count, int64_t block) {
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
  if (lo >= hi) return {first_row, block, 0, 0};
  return {first_row, block, (lo - block_lo) / kKeyGroup,
          (hi - block_lo + kKeyGroup - 1) / kKeyGroup};
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
      if (rows.group_lo < rows.group_hi) visit(rows, count);
      row += count;
    }
  }
}
