// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

namespace attn8 {

/// Keys of one packing unit. Every packed operand is a sequence of groups of 64 keys; group g holds
/// the keys [64 g, 64 g + 64) counted from key 0, short groups padded with zero codes.
inline constexpr int64_t kKeyGroup = 64;

constexpr int64_t round_up(int64_t value, int64_t multiple) noexcept {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr int64_t key_groups(int64_t keys) noexcept { return (keys + kKeyGroup - 1) / kKeyGroup; }

/// Vectors hold 16 channels of V, and 16 dims of Q and K are four steps of a dot product, as many
/// as the inner loops take at a time.
constexpr int64_t padded_dim(int64_t head_dim) noexcept { return round_up(head_dim, 16); }

// Codes of Q: four rows at a time, for each quad of dims the rows' bytes side by side, as one step
// of a dot product takes them.

/// Byte of (row, dim) in the Q codes of a tile.
constexpr int64_t packed_q_offset(int64_t row, int64_t dim, int64_t padded) noexcept {
  return row / 4 * 4 * padded + dim / 4 * 16 + row % 4 * 4 + dim % 4;
}

// Packed K, one group, int8 (D16 = padded_dim):
//
//   byte 0                     256                     512        64 * D16
//   | dims 0..3                | dims 4..7             | ...      |
//   | key 0: 4 B | ... key 63  |                                  |
//
// A 64-byte vector holds 16 keys x 4 dims, the operand of one dot-product instruction.

/// Byte of (key, dim) inside its group of packed K.
constexpr int64_t packed_k_offset(int64_t key, int64_t dim) noexcept {
  return dim / 4 * 256 + key * 4 + dim % 4;
}

// P of one query row and one group, uint8: byte p_position(key). The order is what packing four
// vectors of 16 s32 by 128-bit lanes (packssdw twice, packuswb) gives without a shuffle:
//
//   byte 0         4          8          12         16         ...
//   | keys 0..3    | 16..19   | 32..35   | 48..51   | 4..7     ...
//
// Packed V, one group, int8: slabs of 64 channels (the last one narrower); in
// a slab, for each quad of 4 keys in P's order, the slab's channels with 4 keys each:
//
//   slab 0 (64 channels)                                            slab 1 ...
//   | quad 0: ch 0: keys 0..3 | ch 1: keys 0..3 | .. ch 63 | quad 1: keys 16..19 ... |
//   byte 0                    4                 8          256
//
// so that the four P bytes of a quad meet the four keys of each channel in one instruction.

/// Position of `key` (0..63) in a row of P, and so in packed V.
constexpr int64_t p_position(int64_t key) noexcept {
  return (key % 16 / 4 * 4 + key / 16) * 4 + key % 4;
}

/// Channels of the slab that starts at channel `slab_start`.
constexpr int64_t slab_width(int64_t padded, int64_t slab_start) noexcept {
  const int64_t left = padded - slab_start;
  return left < 64 ? left : 64;
}

/// Byte of (key, channel) inside its group of packed V.
constexpr int64_t packed_v_offset(int64_t key, int64_t channel, int64_t padded) noexcept {
  const int64_t slab = channel / 64 * 64;
  const int64_t position = p_position(key);
  return slab * kKeyGroup + position / 4 * slab_width(padded, slab) * 4 + (channel - slab) * 4 +
         position % 4;
}

/// Position of `key` among the 64 scores of a group as 16-bit numbers: what packssdw makes of the
/// vectors 0, 1 and 2, 3.
constexpr int64_t score_position(int64_t key) noexcept {
  return key / 32 * 32 + key % 16 / 4 * 8 + key % 32 / 16 * 4 + key % 4;
}

/// What the softmax needs of each key of a group.
struct alignas(64) KeyRecord {
  float k_scale[kKeyGroup];       ///< 0 for padding and for poisoned tokens
  int32_t correction[kKeyGroup];  ///< -128 * sum of the key's codes: undoes Q codes stored + 128
  float offset[kKeyGroup];        ///< g of docs/numerics.md, 1/64 octaves; 0 unless V is folded
  int16_t inv_low[kKeyGroup];     ///< W mod 2^12, at score_position(key)
  int16_t inv_high[kKeyGroup];    ///< W >> 12, likewise
};

/// What is known of a block as a whole; its arrays follow (BlockLayout).
struct alignas(64) BlockHeader {
  float v_scale;     ///< v_block of docs/numerics.md, > 0 or NaN
  float key_norm;    ///< largest k_scale * length of the codes among its keys, or more
  int32_t any_high;  ///< whether an inv_high differs from 0
  int32_t poisoned;  ///< whether a key holds a NaN or an Inf
};

/// Memory of one kv block of one (batch, kv head): what grows with the keys, and a header apart
/// from it. A page of a cache is the same thing as a block of a call.
///
///   data    | records | K groups | V groups |
///   header  | BlockHeader | poison | mean V | V channel scales |
///
/// K and V are int8 groups as above. In `exact` K is [group][head_dim][64] floats and V rows
/// [key][padded_dim] of floats. Where they are bfloat16, pairs of them that are neighbours along
/// the sum take a float's place: K [group][padded_dim / 2][64][2], V [key / 2][padded_dim][2].
struct BlockLayout {
  size_t records = 0;  ///< KeyRecord [groups] (INT8 K)
  size_t k = 0, k_group_bytes = 0;
  size_t v = 0, v_group_bytes = 0;
  size_t bytes = 0;
  size_t poison = 0;         ///< uint8 [kv_block]: whether K or V of the key holds a NaN or an Inf
  size_t mean = 0;           ///< float [padded_dim] mean V codes of the keys that count (INT8 V)
  size_t channel_scale = 0;  ///< float [padded_dim] V scales of the block (`block_channel`)
  size_t header_bytes = 0;
};

/// k_bytes, v_bytes: of one element of K and of V: 1 for codes, 2 for bfloat16, 4 for float.
constexpr BlockLayout block_layout(int64_t kv_block, int64_t head_dim, int k_bytes, int v_bytes,
                                   bool with_channel_scale) noexcept {
  BlockLayout layout;
  const auto groups = static_cast<size_t>(kv_block / kKeyGroup);
  const auto padded = static_cast<size_t>(padded_dim(head_dim));
  layout.k = k_bytes == 1 ? groups * sizeof(KeyRecord) : 0;
  const auto k_dim = k_bytes == 4 ? static_cast<size_t>(head_dim) : padded;
  layout.k_group_bytes = static_cast<size_t>(kKeyGroup) * k_dim * static_cast<size_t>(k_bytes);
  layout.v = layout.k + groups * layout.k_group_bytes;
  layout.v_group_bytes = static_cast<size_t>(kKeyGroup) * padded * static_cast<size_t>(v_bytes);
  layout.bytes = layout.v + groups * layout.v_group_bytes;
  layout.poison = sizeof(BlockHeader);
  layout.mean = layout.poison + static_cast<size_t>(kv_block);
  layout.channel_scale = layout.mean + (v_bytes == 1 ? padded * sizeof(float) : 0);
  layout.header_bytes = layout.channel_scale + (with_channel_scale ? padded * sizeof(float) : 0);
  return layout;
}

}  // namespace attn8
