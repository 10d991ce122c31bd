// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

#include "attn8/attention.hpp"
#include "core/mask.hpp"
#include "core/packed_layout.hpp"

namespace attn8 {

/// Query rows of one tile: the K/V block a tile reads stays in L2 while 16 groups of 4 rows use it,
/// and its accumulator (64 x 128 floats = 32 KB) fits beside it.
inline constexpr int kQueryTile = 64;
/// Query rows that one pass of the inner loops computes.
inline constexpr int kRowGroup = 4;

/// Where one kv block lies.
struct PackedBlock {
  const std::byte* data;
  const std::byte* header;
};

/// Packed K and V of one (batch, kv head).
struct PackedKv {
  const PackedBlock* blocks = nullptr;  ///< [kv block]; those no row sees are not read
  BlockLayout layout;
  KeyRange keys;               ///< what the means of V average: every key that counts
  float v_ref = 1;             ///< largest v_scale of the blocks
  float key_norm = 0;          ///< largest key_norm of the blocks
  bool channel_scale = false;  ///< whether blocks have V scales per channel

  [[nodiscard]] const BlockHeader& header(int64_t block) const noexcept {
    return *reinterpret_cast<const BlockHeader*>(blocks[block].header);
  }
  [[nodiscard]] const uint8_t* poison(int64_t block) const noexcept {
    return reinterpret_cast<const uint8_t*>(blocks[block].header + layout.poison);
  }
  [[nodiscard]] const float* mean(int64_t block) const noexcept {
    return reinterpret_cast<const float*>(blocks[block].header + layout.mean);
  }
  [[nodiscard]] const float* v_channel_scale(int64_t block) const noexcept {
    return reinterpret_cast<const float*>(blocks[block].header + layout.channel_scale);
  }
  [[nodiscard]] const KeyRecord* records(int64_t block) const noexcept {
    return reinterpret_cast<const KeyRecord*>(blocks[block].data + layout.records);
  }
  /// Group `group` of the block, counted from the block's first key.
  [[nodiscard]] const std::byte* k(int64_t block, int64_t group) const noexcept {
    return blocks[block].data + layout.k + static_cast<size_t>(group) * layout.k_group_bytes;
  }
  [[nodiscard]] const std::byte* v(int64_t block, int64_t group) const noexcept {
    return blocks[block].data + layout.v + static_cast<size_t>(group) * layout.v_group_bytes;
  }
};

/// A number of an attn_mask below this hides the key.
inline constexpr float kHidingMask = -0x1p100f;

/// What softcap, attn_mask and ALiBi make of the scores of a tile (docs/numerics.md, *Score
/// changes*). The unit of scores is the mode's: 1/64 octaves in kAccurate, octaves elsewhere.
struct ScoreChanges {
  float softcap = 0;        ///< in that unit; 0: none
  bool biased = false;      ///< whether there is an attn_mask or ALiBi
  float unit = 0;           ///< one nat in that unit
  int64_t mask_stride = 0;  ///< from key to key, in elements
  DType mask_dtype = DType::kFloat32;
  const std::byte* mask[kQueryTile];  ///< per row: attn_mask of key 0; nullptr: none
  float mean_score[kQueryTile];       ///< m of the row, see softcap
  float alibi_slope[kQueryTile];      ///< in that unit per key; 0 without ALiBi
  int64_t position[kQueryTile];       ///< p of Mask
};

/// One tile of query rows of one (batch, kv head); the rows may belong to several query heads.
struct AttendTile {
  Mode mode = Mode::kAccurate;
  bool bfloat16 = false;  ///< kExact: Q, K and V are bfloat16 pairs; needs bfloat16_pairs
  int head_dim = 0;       ///< of Q and K, or of V, whichever is larger; the other ends in zeros
  int kv_block = 0;
  int rows = 0;  ///< 1..kQueryTile
  PackedKv kv;
  const ScoreChanges* changes = nullptr;  ///< nullptr: none
  KeyRange visible[kQueryTile];           ///< per row
  float score_factor[kQueryTile];         ///< c_i of docs/numerics.md; in kExact without sq_i
  float query_norm[kQueryTile];           ///< length of the codes of the row
  const std::byte* q = nullptr;  ///< codes at packed_q_offset() (s8, or u8 = code + 128 where the
                                 ///< ISA wants it), rows up to the next multiple of kRowGroup; or
                                 ///< floats [rows][head_dim] in kExact, there with `bfloat16`
                                 ///< bfloat16 [rows][padded_dim]
  // Results, unnormalised: the caller divides.
  float* out = nullptr;          ///< [kQueryTile][padded_dim]
  float* normalizer = nullptr;   ///< [kQueryTile] l
  float* weight_sum = nullptr;   ///< [kQueryTile] the weights before rounding: l but in kPaper
  float* row_max = nullptr;      ///< [kQueryTile] m in log2 units; kAccurate: ref / 64
  std::byte* scratch = nullptr;  ///< KernelTable::scratch_bytes(), 64-byte aligned
};

/// Rows of a tensor.
struct RowSpan {
  const void* data;
  DType dtype;        ///< a float type
  int64_t row_bytes;  ///< from a row to the next
  int64_t rows;
  int64_t stride;  ///< from an element of a row to the next, in elements
  int n;           ///< elements of a row, at most 256
};

/// What one ISA provides. Everything is a pure function of its arguments; all but `attend` give the
/// same bits on every ISA, `attend` does in the integer modes.
struct KernelTable {
  Isa isa;
  bool query_codes_offset;  ///< attend() wants Q codes + 128 as u8
  bool bfloat16_pairs;      ///< the CPU multiplies pairs of bfloat16 (AVX512-BF16)

  /// dst[i] = float(src[i * stride]), exact. src: element pointer of the given float type.
  void (*load_row)(const void* src, DType dtype, int64_t stride, int n, float* dst);
  /// dst[i * stride] = x[i] rounded to the type.
  void (*store_row)(const float* x, int n, DType dtype, int64_t stride, void* dst);
  /// Bits of the largest |x[i]|; >= kInfBits when one is not finite.
  uint32_t (*max_abs_bits)(const float* x, int n);
  /// bits[i] = max(bits[i], bits of |x[i]|).
  void (*max_abs_bits_each)(const float* x, int n, uint32_t* bits);
  /// sums[i] += element i of each row, in their order.
  void (*add_rows)(const RowSpan& src, double* sums);
  /// dst[i] = x[i] - mean[i]; dst may be x.
  void (*subtract)(const float* x, const float* mean, int n, float* dst);
  /// codes[i] = round-half-even(x[i] / scale[i * scale_step]); scale_step 0 or 1; x finite.
  void (*encode)(const float* x, int n, const float* scale, int scale_step, int8_t* codes);
  /// For each row less `mean` (unless nullptr): max_abs_bits(), and the codes of the scale that
  /// those give, codes_stride apart, followed by zeros up to the next multiple of 16.
  void (*quantize_rows)(const RowSpan& src, const float* mean, int8_t* codes, int64_t codes_stride,
                        uint32_t* bits);
  /// Sum of the squares of n codes; those up to the next multiple of 64 are readable and 0.
  int32_t (*squared_length)(const int8_t* codes, int n);
  /// x[i] = x[i] / divisor, times scale[i] unless that is nullptr; up to the next multiple of 16.
  void (*normalize)(float* x, int n, float divisor, const float* scale);
  /// 64 rows of codes [64][row_stride], zero-padded to padded_dim, into one packed K group; the
  /// corrections and the sums of the squared codes of its 64 keys.
  void (*pack_k)(const int8_t* codes, int row_stride, int padded, std::byte* group,
                 int32_t* correction, int32_t* squares);
  /// 64 rows of codes [64][row_stride], zero-padded to padded_dim, into one packed V group.
  void (*pack_v)(const int8_t* codes, int row_stride, int padded, std::byte* group);
  /// sums[d] = sum of channel d over the 64 keys of a packed V group; [padded_dim].
  void (*sum_v)(const std::byte* group, int padded, int32_t* sums);
  /// Bytes of scratch that attend() needs for this kv_block.
  size_t (*scratch_bytes)(int kv_block);
  void (*attend)(const AttendTile& tile);
};

/// The table of an ISA, nullptr where it is not compiled in or the machine cannot run it.
const KernelTable* find_kernel_table(Isa isa) noexcept;

}  // namespace attn8
