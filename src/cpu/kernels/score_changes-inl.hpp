// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// What softcap, attn_mask and ALiBi make of scores (docs/numerics.md, *Score changes*): one file
// for all modes. Included inside the namespace of an ISA after online_softmax-inl.hpp.

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
/// Only -Inf, the score of a hidden key, lies below it.
inline constexpr float kLowestScore = std::numeric_limits<float>::lowest();

alignas(64) inline constexpr float kLaneNumber[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                      8, 9, 10, 11, 12, 13, 14, 15};

/// tanh(x ln 2 / 2) from one power of two; the same bits on every ISA.
ATTN8_INLINE F32 tanh_of_octaves(F32 x) {
  const F32 zero = broadcast(0.0f);
  const F32 one = broadcast(1.0f);
  const F32 power = exp2_scaled<5, 1>(zero - max(x, zero - x));
  const F32 magnitude = divide(one - power, one + power);
  return where_less(x, zero, zero - magnitude, magnitude);
}

/// `count` numbers of an attn_mask from key `first` on: what it adds, -Inf where it hides by false.
inline void load_mask(const ScoreChanges& changes, int row, int64_t first, int count, float* dst) {
  const int64_t stride = changes.mask_stride;
  const std::byte* source =
      changes.mask[row] + first * stride * static_cast<int64_t>(dtype_bytes(changes.mask_dtype));
  if (changes.mask_dtype != DType::kBool) {
    load_row(source, changes.mask_dtype, stride, count, dst);
    return;
  }
  constexpr uint32_t kMinusInfinityBits = 0xff800000u;
  const auto bits = [](std::byte visible) ATTN8_INLINE_LAMBDA {
    return (static_cast<uint32_t>(visible != std::byte{0}) - 1u) & kMinusInfinityBits;
  };
  int i = 0;
  if (stride == 1) {
    for (; i + 16 <= count; i += 16) {
      uint32_t lanes[16];
      for (int lane = 0; lane < 16; ++lane) lanes[lane] = bits(source[i + lane]);
      std::memcpy(dst + i, lanes, sizeof lanes);
    }
  }
  for (; i < count; ++i) dst[i] = std::bit_cast<float>(bits(source[i * stride]));
}

/// Makes a row NaN: what it sums up from here on stays one.
inline void poison_row(const AttendTile& tile, const TileScratch& scratch, int row) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  tile.normalizer[row] = kNan;
  store(scratch.weights + 16 * row, broadcast(kNan));
  store(scratch.sums + 16 * row, broadcast(kNan));
}

/// b of the rows of a pass for the keys they see, -Inf for those the mask hides; anything for
/// others. False when no row sees any key, so that the block may be left out.
inline bool score_bias(const AttendTile& tile, const TileScratch& scratch, const RowGroup& rows,
                       int count) {
  bool sees_one = false;
  const ScoreChanges& changes = *tile.changes;
  const int64_t first = rows.block * tile.kv_block;
  const int64_t begin = rows.group_lo * kKeyGroup;  // keys of the block
  const int64_t end = rows.group_hi * kKeyGroup;
  for (int r = 0; r < count; ++r) {
    const int row = rows.first_row + r;
    float* bias = scratch.bias + r * tile.kv_block;  // [kv_block]
    const int64_t seen_lo = tile.visible[row].lo - first;
    const int64_t seen_hi = tile.visible[row].hi - first;
    const int64_t lo = seen_lo > begin ? seen_lo : begin;
    const int64_t hi = seen_hi < end ? seen_hi : end;
    std::memset(bias + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    scratch.hides[r] = 0;
    if (lo >= hi) continue;
    if (changes.mask[row] != nullptr) {
      const auto keys = static_cast<int>(hi - lo);
      load_mask(changes, row, first + lo, keys, bias + lo);
      if (row_max_abs_bits(bias + lo, keys) > kInfBits) {
        poison_row(tile, scratch, row);
        std::memset(bias + lo, 0, static_cast<size_t>(keys) * sizeof(float));
      }
    }
    const F32 slope = broadcast(-changes.alibi_slope[row]);
    const F32 unit = broadcast(changes.unit);
    F32 least = broadcast(0.0f);
    F32 most = broadcast(kMinusInfinity);
    for (int64_t key = lo / 16 * 16; key < hi; key += 16) {
      const F32 added = load(bias + key);
      const F32 offset =
          broadcast(static_cast<float>(changes.position[row] - first - key)) - load(kLaneNumber);
      const F32 distance = max(offset, broadcast(0.0f) - offset);
      const F32 changed = fused(slope, distance, added * unit);
      store(bias + key,
            where_less(added, broadcast(kHidingMask), broadcast(kMinusInfinity), changed));
      least = min(least, added);
      most = max(most, added);
    }
    scratch.hides[r] = reduce_max(broadcast(0.0f) - least) > -kHidingMask;
    // A lane beside the keys that the row sees holds 0 and may keep a block that could be left out.
    sees_one = sees_one || reduce_max(most) >= kHidingMask;
  }
  return sees_one;
}

/// What the scores of a pass need before they are computed; false as score_bias().
inline bool begin_changes(const AttendTile& tile, const TileScratch& scratch, const RowGroup& rows,
                          int count) {
  return tile.changes == nullptr || !tile.changes->biased || score_bias(tile, scratch, rows, count);
}

/// Whether attn_mask hides one of the keys of the block that row r of the pass otherwise sees.
inline bool hides_keys(const AttendTile& tile, const TileScratch& scratch, int r) {
  return tile.changes != nullptr && tile.changes->biased && scratch.hides[r] != 0;
}

/// After begin_changes(): changes the scores of a block in octaves; the rows' maxima follow. Hidden
/// keys are -Inf before and after.
inline void change_scores(const AttendTile& tile, const TileScratch& scratch, const RowGroup& rows,
                          int count, float* block_max) {
  const ScoreChanges& changes = *tile.changes;
  const F32 huge = broadcast(std::numeric_limits<float>::max());
  const F32 lowest = broadcast(kLowestScore);
  const F32 hidden = broadcast(kMinusInfinity);
  for (int r = 0; r < count; ++r) {
    const F32 mean = broadcast(changes.mean_score[rows.first_row + r]);
    F32 largest = hidden;
    for (int64_t key = rows.group_lo * kKeyGroup; key < rows.group_hi * kKeyGroup; key += 16) {
      float* score = scratch.scores + r * tile.kv_block + key;  // [16]
      const F32 before = load(score);
      F32 t = before;
      if (changes.softcap != 0) t = tanh_of_octaves(t + mean) * broadcast(changes.softcap);
      if (changes.biased) {
        const F32 bias = load(scratch.bias + r * tile.kv_block + key);
        t = where_less(bias, lowest, hidden, max(lowest, min(huge, t + bias)));
      }
      t = where_less(before, lowest, hidden, t);
      store(score, t);
      largest = max(t, largest);  // ignores a NaN here; its weight is NaN below
    }
    block_max[r] = reduce_max(largest);
  }
}
