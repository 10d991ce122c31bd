// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// What the pipeline of attend_skewed_avx512-inl.hpp works on: items, what they leave, the walk over
// a tile. Included inside the ISA's namespace after attend_accurate-inl.hpp.

/// A hidden key has score -2^15: at this bound it still lies 16 octaves, a weight of 0, below any
/// visible one. Beyond it, T - hidden would leave the 16 bits.
inline constexpr float kMaxSkewedScore = 31000.0f;
inline constexpr int16_t kHiddenScore16 = -32768;
/// Most negative offset g of a key: 16 octaves (kMinRatio).
inline constexpr float kMaxOffset = 1024.0f;

using Vector = __m512i;

/// Key groups of the largest kv_block.
inline constexpr int kMaxGroups = 8;
/// Four query rows against the key groups of a block.
struct SkewedItem {
  int first_row = 0;  ///< of the tile
  int groups = 0;
  int64_t first_key = 0;
  int64_t ahead = 0;             ///< bytes to the data of the next block, 0 for the last one
  bool masked = false;           ///< whether a row does not see all its keys
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
  alignas(16) float value_weight[kRowGroup] = {};
  alignas(16) float residual[kRowGroup] = {};
};

/// Exact sums over the groups of an item so far, for one row. Without a sign, eight groups fit:
/// four products below 2^15 (255 / 256) * 2^12 each, and two bytes each.
struct alignas(64) GroupSums {
  uint32_t weights[16];  ///< h_j (W_j mod 2^12)
  uint16_t rest[32];     ///< y_j - 256 code_j + 128
};
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
  int16_t* scores;                                    ///< [groups][kRowGroup][64]
  std::byte* codes[2];                                ///< [groups][kRowGroup][64]
  GroupSums sums[(1 + kMaxGroups) * kRowGroup] = {};  ///< [1 + groups][kRowGroup], first zeros
  alignas(16) int32_t top[kRowGroup] = {};            ///< maxima, in both halves of a word
  alignas(16) float weight[kRowGroup] = {};           ///< beta
  alignas(64) float nothing[kRowGroup * 256];         ///< where the O of no item goes
};

/// The items of a tile, block by block. rows_per_item: kRowGroup, or twice that for items that come
/// in pairs with the same keys.
class SkewedWalk {
 public:
  explicit SkewedWalk(const AttendTile& tile, int rows_per_item = kRowGroup)
      : tile_(tile), rows_per_item_(rows_per_item) {
    Rows any = kNothing;  // of the tile
    for (int first = 0; first < tile.rows; first += rows_per_item) {
      Rows& rows = rows_[first / rows_per_item];
      rows = kNothing;
      // What rows beyond the tile's see does not matter: nobody reads their results.
      for (int r = first; r < first + rows_per_item && r < tile.rows; ++r) {
        const KeyRange range = tile.visible[r];
        rows.full_lo = range.lo > rows.full_lo ? range.lo : rows.full_lo;
        rows.full_hi = range.hi < rows.full_hi ? range.hi : rows.full_hi;
        if (range.empty()) continue;
        rows.lo = range.lo < rows.lo ? range.lo : rows.lo;
        rows.hi = range.hi > rows.hi ? range.hi : rows.hi;
      }
      any.lo = rows.lo < any.lo ? rows.lo : any.lo;
      any.hi = rows.hi > any.hi ? rows.hi : any.hi;
      any.full_lo = rows.full_lo > any.full_lo ? rows.full_lo : any.full_lo;
      any.full_hi = rows.full_hi < any.full_hi ? rows.full_hi : any.full_hi;
    }
    all_see_ = {any.full_lo, any.full_hi};
    same_rows_ = any.lo == any.full_lo && any.hi == any.full_hi;
    block_ = any.lo < any.hi ? any.lo / tile.kv_block : 0;
    end_ = any.lo < any.hi ? (any.hi + tile.kv_block - 1) / tile.kv_block : 0;
  }

  /// The next item that sees anything; false after the last.
  ATTN8_INLINE bool next(SkewedItem& item) {
    if (same_items_ && row_ < tile_.rows) [[likely]] {
      item = last_;
      item.first_row = row_;
      row_ += rows_per_item_;
      return true;
    }
    return search(item);
  }

  /// The second item of a pair.
  void next_four(const SkewedItem& first, SkewedItem& second) const {
    second = first;
    second.first_row += kRowGroup;
    look(second, false);
  }

 private:
  /// Of the rows of an item: the keys any of them sees, and the keys all of them see.
  struct Rows {
    int64_t lo, hi;
    int64_t full_lo, full_hi;
  };

  static constexpr Rows kNothing = {std::numeric_limits<int64_t>::max(), 0, 0,
                                    std::numeric_limits<int64_t>::max()};

  /// next() where rows may see different keys. Out of line: the pipeline keeps its registers.
  __attribute__((noinline)) bool search(SkewedItem& item) {
    same_items_ = false;
    for (; block_ < end_; ++block_, row_ = 0, group_ = 0) {
      const int64_t block_lo = block_ * tile_.kv_block;
      const int64_t block_hi = block_lo + tile_.kv_block;
      while (row_ < tile_.rows) {
        const Rows& rows = rows_[group_];
        const int64_t lo = rows.lo > block_lo ? rows.lo : block_lo;
        const int64_t hi = rows.hi < block_hi ? rows.hi : block_hi;
        const int first_row = row_;
        row_ += rows_per_item_;
        ++group_;
        if (lo >= hi) continue;
        last_.first_row = first_row;
        fill(last_, rows, lo, hi);
        // What was found for the first rows of the block goes for the others.
        same_items_ =
            first_row == 0 && (same_rows_ || (all_see_.lo <= block_lo && all_see_.hi >= block_hi));
        item = last_;
        return true;
      }
    }
    return false;
  }

  void fill(SkewedItem& item, const Rows& rows, int64_t lo, int64_t hi) {
    const PackedKv& kv = tile_.kv;
    const int64_t block_lo = block_ * tile_.kv_block;
    const int64_t block_hi = block_lo + tile_.kv_block;
    if (block_ != known_block_) {
      const BlockHeader& header = kv.header(block_);
      value_scale_ = header.v_scale / kv.v_ref;
      any_high_ = header.any_high != 0;
      next_ = block_ + 1 < end_ ? kv.blocks[block_ + 1].data - kv.blocks[block_].data : 0;
      whole_ = {block_lo > kv.keys.lo ? block_lo : kv.keys.lo,
                block_hi < kv.keys.hi ? block_hi : kv.keys.hi};
      known_block_ = block_;
    }
    const int64_t group_lo = (lo - block_lo) / kKeyGroup;
    const int64_t group_hi = (hi - block_lo + kKeyGroup - 1) / kKeyGroup;
    item.groups = static_cast<int>(group_hi - group_lo);
    item.first_key = block_lo + group_lo * kKeyGroup;
    item.k = kv.k(block_, group_lo);
    item.v = kv.v(block_, group_lo);
    item.records = kv.records(block_) + group_lo;
    item.mean = kv.mean(block_);
    item.value_scale = value_scale_;
    item.any_high = any_high_;
    item.ahead = next_;
    item.masked =
        rows.full_lo > item.first_key || rows.full_hi < item.first_key + item.groups * kKeyGroup;
    look(item, rows.full_lo <= whole_.lo && rows.full_hi >= whole_.hi);
  }

  /// Which rows of an item see the block whole; all: whether all are known to.
  void look(SkewedItem& item, bool all) const {
    for (int r = 0; r < kRowGroup; ++r) {
      const KeyRange range = tile_.visible[item.first_row + r];
      const bool sees = all || (range.lo <= whole_.lo && range.hi >= whole_.hi);
      item.sees_block[r] = std::bit_cast<float>(sees ? ~0u : 0u);
    }
  }

  bool same_rows_ = false;   ///< all rows of the tile see the same keys
  KeyRange all_see_;         ///< the keys that every row sees
  bool same_items_ = false;  ///< the other items of the block differ from last_ in first_row only
  SkewedItem last_;          ///< its first_row does not count
  // What is the same for all items of a block.
  int64_t known_block_ = -1;
  float value_scale_ = 1;
  bool any_high_ = false;
  int64_t next_ = 0;  ///< bytes to the data of the next block
  KeyRange whole_;    ///< the keys of the block that count

  const AttendTile& tile_;
  int rows_per_item_;
  int64_t block_ = 0, end_ = 0;
  int row_ = 0;
  int group_ = 0;  ///< row_ / rows_per_item_
  Rows rows_[kQueryTile / kRowGroup];
};

/// Whether 16-bit scores hold every score of the tile.
inline bool fits_skewed(const AttendTile& tile) {
  if (tile.kv.channel_scale || tile.changes != nullptr) return false;
  float largest = 0;
  for (int r = 0; r < tile.rows; ++r) {
    const float bound = tile.query_norm[r] * tile.score_factor[r];
    largest = bound > largest ? bound : largest;
    if (tile.score_factor[r] < 0 && -bound > largest) largest = -bound;
  }
  return largest * tile.kv.key_norm + kMaxOffset <= kMaxSkewedScore;
}
