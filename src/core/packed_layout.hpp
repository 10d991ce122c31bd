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

/// Dot products take four bytes at a time, so Q and K are padded to a multiple of 4 dims;
/// V has vectors of 16 channels.
constexpr int64_t padded_qk_dim(int64_t head_dim) noexcept { return round_up(head_dim, 4); }
constexpr int64_t padded_v_dim(int64_t head_dim) noexcept { return round_up(head_dim, 16); }

// Packed K, one group, int8 (D4 = padded_qk_dim):
//
//   byte 0                     256                     512        64 * D4
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
// Packed V, one group, int8 (D16 = padded_v_dim): slabs of 64 channels (the last one narrower); in
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
constexpr int64_t slab_width(int64_t padded_dim, int64_t slab_start) noexcept {
  const int64_t left = padded_dim - slab_start;
  return left < 64 ? left : 64;
}

/// Byte of (key, channel) inside its group of packed V.
constexpr int64_t packed_v_offset(int64_t key, int64_t channel, int64_t padded_dim) noexcept {
  const int64_t slab = channel / 64 * 64;
  const int64_t position = p_position(key);
  return slab * kKeyGroup + position / 4 * slab_width(padded_dim, slab) * 4 + (channel - slab) * 4 +
         position % 4;
}

/// What the softmax needs of each key of a group, in key order.
struct alignas(64) KeyRecord {
  float k_scale[kKeyGroup];       ///< 0 for padding and for poisoned tokens
  int32_t correction[kKeyGroup];  ///< -128 * sum of the key's codes: undoes Q codes stored + 128
  float log2_ratio[kKeyGroup];    ///< log2 r of docs/numerics.md; 0 unless V is folded
  float inv_ratio[kKeyGroup];     ///< 1 / r
};

}  // namespace attn8
