// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "layout.hpp"

/// What the pack kernels write and the attention kernels read. One packed form serves both kernel
/// families; every tile of it is contiguous and lies in memory as it lies in shared memory, so that
/// a tile is one bulk copy and needs no tensor map.
namespace attn8::cuda {

/// Packed sequences are padded with zero codes to whole tiles of 256, the largest tile there is.
inline constexpr int kSequencePad = 256;
/// Keys of a panel of packed V: 128 bytes, the widest swizzle.
inline constexpr int kPanelKeys = 128;
/// Rows of queries share their keys' constants in groups of 16 keys, in packed order.
inline constexpr int kKeyGroup = 16;
/// Keys of a tile of bfloat16 V, and of a block of the kernels that read it.
inline constexpr int kHalfTileKeys = 64;
/// Floats per key group: [k_scale | v_ratio][16], v_ratio the r of docs/numerics.md.
inline constexpr int kKeyConstants = 2 * kKeyGroup;

ATTN8_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

ATTN8_HOST_DEVICE constexpr int clamp_to(int x, int low, int high) {
  return x < low ? low : x > high ? high : x;
}

/// Bytes of a packed row of Q or K: head_dim with zeros up to a whole swizzle span.
ATTN8_HOST_DEVICE constexpr int packed_row_bytes(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
/// Rows of packed V^T: head_dim with zero rows up to the next kernel's.
ATTN8_HOST_DEVICE constexpr int packed_head_dim(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : 256;
}

/// Where byte `byte` of row `row` of packed Q or K lies in its head's image
///   [row_bytes / span][rows][span] swizzled, span = min(row_bytes, 128)
ATTN8_HOST_DEVICE constexpr int64_t packed_row_offset(int64_t rows, int row_bytes, int64_t row,
                                                      int byte) {
  const uint32_t span = row_bytes < 128 ? 64 : 128;
  return (byte / span * rows + (row & ~int64_t{7})) * span +
         swizzle(static_cast<uint32_t>((row & 7) * span + byte % span), span);
}

/// Where key `key` of channel `channel` of packed V^T lies in its head's image
///   [keys / 128][packed_head_dim][128] swizzled, keys of each 16 in packed_key() order
ATTN8_HOST_DEVICE constexpr int64_t packed_v_offset(int packed_dim, int64_t key, int channel) {
  return (key / kPanelKeys * packed_dim + channel / 8 * 8) * kPanelKeys +
         swizzle(
             static_cast<uint32_t>(channel % 8 * kPanelKeys + packed_position(key) % kPanelKeys),
             kPanelKeys);
}

/// Byte offset of channel `channel` of key `key` of bfloat16 V in its head's image of tiles,
///   [keys / 64][2 packed_head_dim / span][64][span] swizzled: SharedTile<64, 2 packed_head_dim>
ATTN8_HOST_DEVICE constexpr int64_t packed_v_half_offset(int packed_dim, int64_t key, int channel) {
  const uint32_t row_bytes = 2 * static_cast<uint32_t>(packed_dim);
  const uint32_t span = swizzle_span(row_bytes);
  const uint32_t byte = 2 * static_cast<uint32_t>(channel);
  return key / kHalfTileKeys * (kHalfTileKeys * row_bytes) + byte / span * (kHalfTileKeys * span) +
         swizzle(static_cast<uint32_t>(key % kHalfTileKeys) * span + byte % span, span);
}

/// Where key `key`'s constant `which` (0 k_scale, 1 v_ratio) lies in its head's [keys / 16][2][16].
ATTN8_HOST_DEVICE constexpr int64_t key_constant_offset(int64_t key, int which) {
  return key / kKeyGroup * kKeyConstants + which * kKeyGroup + packed_position(key) % kKeyGroup;
}

/// Element types of float tensors on the device.
enum class Element : int32_t { kFloat32, kFloat16, kBFloat16 };

/// How scores become weights; one kernel instance each.
enum class Weights : int32_t {
  kFolded,  ///< accurate, V scales per token folded into P
  kPlain,   ///< accurate, V scales per tensor or per channel
  kPaper,   ///< Algorithm 1 of arXiv:2409.16997
  kHalf,    ///< half: weights and V in bfloat16
};

/// What is done to scores before the softmax; one kernel instance each.
enum class Scores : int32_t {
  kPlain,    ///< nothing but the mask
  kSoftcap,  ///< softcap
  kBiased,   ///< all that ScoreChanges says
};

/// A score of attn_mask that hides its key, and those below it.
inline constexpr float kHidingScore = -0x1p100f;

/// What is done to a score, in this order. Log2 units, as scores.
struct ScoreChanges {
  float softcap;              ///< t -> softcap tanh(t / softcap); 0: not
  float softcap_rate;         ///< 2 log2(e) / softcap
  const float* score_shift;   ///< [batch * nheads_q][rows_q] natural units, added before softcap:
                              ///< what smoothing K took away; or nullptr
  const float* alibi_slopes;  ///< t -> t - slope |position of the query - key|; or nullptr
  int64_t alibi_stride_batch, alibi_stride_head;
  int position_offset;     ///< position of query i: i + position_offset
  const float* attn_mask;  ///< added, in nats; at most kHidingScore hides; or nullptr
  int64_t attn_mask_stride_batch, attn_mask_stride_row, attn_mask_stride_head,
      attn_mask_stride_key;  ///< 0 where one stands for all
};

/// One attention call. Plain value, passed to the kernel. `rows` stands for the packed lengths,
/// multiples of kSequencePad.
///
/// With `group` > 1 the query heads that share a kv head are one head of the kernel, their rows
/// interleaved: nheads_q is nheads_k, and row r is query r / group of head head * group + r %
/// group. Strides are those of the caller's heads.
///
/// A ragged batch (cu_seqlens_q) has one image of Q per head, in which the rows of a sequence begin
/// at ragged_row(); out and lse are those of a batch of one. Keys in pages (block_table) lie in
/// images of rows_k = page_size keys, [pages][nheads_k].
///
/// With grid.z > 1 each z attends to split_keys keys and writes an output and an LSE of its
/// own, out_stride_split and lse_stride_split after that of the z before; MergeSplits combines
/// them.
struct AttendParams {
  const int8_t* q;             ///< [batch * nheads_q] images of rows_q rows
  const int8_t* k;             ///< [batch * nheads_k] images of rows_k rows
  const int8_t* v;             ///< [batch * nheads_k] images of rows_k keys
  const float* q_scale;        ///< [batch * nheads_q][rows_q]
  const float* key_constants;  ///< [batch * nheads_k][rows_k / 16][2][16]
  const float* v_scale;        ///< [batch * nheads_k][packed_head_dim], multiplies the output;
                               ///< nullptr: 1
  const float* lse_shift;      ///< [batch * nheads_q][rows_q], added to the LSE; or nullptr
  void* out;                   ///< out_type
  float* lse;                  ///< or nullptr
  int64_t out_stride_batch, out_stride_row, out_stride_head, out_stride_channel;
  int64_t lse_stride_batch, lse_stride_row, lse_stride_head;
  int nheads_q, nheads_k;
  int rows_q, rows_k;
  int seqlen_q, seqlen_k;  ///< seqlen_q counts rows of the kernel
  int head_dim;            ///< channels of out
  int first_offset;        ///< query i sees keys from i + first_offset
  int last_offset;         ///< query i sees keys to i + last_offset
  bool bottom_right;       ///< offsets count from where a sequence's last query meets its last key
  int group;               ///< query heads per head of the kernel, 1 unless they are packed
  int group_inverse;       ///< group_inverse_of(group)
  int split_keys;          ///< keys per z of the grid, whole blocks; 0: all
  int64_t out_stride_split, lse_stride_split;
  Element out_type;
  bool out_pairs;     ///< two neighbouring channels may be stored at once
  bool out_eights;    ///< out is of 16 bits, and channels 8 i to 8 i + 7 may be stored at once
  float score_scale;  ///< float(softmax_scale * log2(e))
  ScoreChanges changes;
  const float* sinks;  ///< [nheads_q of the caller] or nullptr: a score of a key without a V
  int64_t sinks_stride;
  const int* cu_seqlens_q;  ///< [batch + 1] or nullptr: sequence b has queries [b, b + 1) of it
  int total_q;              ///< queries of a ragged batch
  const int* seqlens_k;     ///< [batch] or nullptr: keys of each sequence, at most seqlen_k
  const int* leftpad_k;     ///< [batch] or nullptr: keys before it count for nothing
  int64_t seqlens_k_stride, leftpad_k_stride;
  const int* block_table;  ///< [batch][block_table_stride] page of each page_size keys, or nullptr
  int block_table_stride;
  int page_shift;  ///< log2(page_size)
};

/// Rows of Q that no other sequence of a ragged batch shares a tile with.
inline constexpr int kRaggedRows = 128;
/// Row of the images of Q at which a sequence begins that has `rows` rows before it.
ATTN8_HOST_DEVICE constexpr int64_t ragged_row(int64_t rows, int batch) {
  return (rows / kRaggedRows + batch) * kRaggedRows;
}

/// What a row of a packed group, below kGroupedRows, is multiplied with to get 2^16 times its
/// query: exact, because the error of at most row / 2^16 stays below 1 / group.
inline constexpr int kGroupedRows = 256;
ATTN8_HOST_DEVICE constexpr int group_inverse_of(int group) { return 65535 / group + 1; }

/// Mask offsets that stand for "unlimited": beyond any length, and safe to add to one.
inline constexpr int kNoLimit = 1 << 30;

}  // namespace attn8::cuda
