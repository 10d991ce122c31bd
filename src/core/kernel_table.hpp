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

/// Packed K and V of one (batch, kv head); which pointers are set follows from the mode.
struct PackedKv {
  std::byte* k = nullptr;        ///< int8 groups (packed_k_offset), or float [group][dim][64]
  std::byte* v = nullptr;        ///< int8 groups (packed_v_offset), or rows [key][padded_v_dim] of
                                 ///< bfloat16 (kHalf) or float (kExact)
  KeyRecord* records = nullptr;  ///< [group]; INT8 K only
  const float* v_block_scale = nullptr;    ///< [kv block] (kBlock) or [kv block][padded_v_dim]
  bool v_block_scale_per_channel = false;  ///< which of the two
  const float* v_mean = nullptr;  ///< [kv block][padded_v_dim] mean of the V codes (kAccurate)
  KeyRange keys;                  ///< visible to at least one query: what v_mean averages
  bool fold_v = false;            ///< V granularity kToken: log2_ratio and inv_ratio count
};

/// One tile of query rows of one (batch, kv head); the rows may belong to several query heads.
struct AttendTile {
  Mode mode = Mode::kAccurate;
  int head_dim = 0;
  int kv_block = 0;
  int rows = 0;  ///< 1..kQueryTile
  PackedKv kv;
  KeyRange visible[kQueryTile];    ///< per row
  float score_factor[kQueryTile];  ///< c_i of docs/numerics.md; softmax_scale * log2 e in kExact
  const std::byte* q = nullptr;  ///< codes [rows][padded_qk_dim] (s8, or u8 = code + 128 where the
                                 ///< ISA wants it), or floats [rows][head_dim] in kExact
  // Results, unnormalised: the caller divides.
  float* out = nullptr;          ///< [rows][padded_v_dim]
  float* normalizer = nullptr;   ///< [rows] l
  float* weight_sum = nullptr;   ///< [rows] the weights before rounding: l but in kPaper
  float* row_max = nullptr;      ///< [rows] m, log2 units
  std::byte* scratch = nullptr;  ///< KernelTable::scratch_bytes(), 64-byte aligned
};

/// What one ISA provides. Everything is a pure function of its arguments; all but `attend` give the
/// same bits on every ISA, `attend` does in the integer modes.
struct KernelTable {
  Isa isa;
  bool query_codes_offset;  ///< attend() wants Q codes + 128 as u8

  /// dst[i] = float(src[i * stride]), exact. src: element pointer of the given float type.
  void (*load_row)(const void* src, DType dtype, int64_t stride, int n, float* dst);
  /// dst[i * stride] = x[i] rounded to the type.
  void (*store_row)(const float* x, int n, DType dtype, int64_t stride, void* dst);
  /// Bits of the largest |x[i]|; >= kInfBits when one is not finite.
  uint32_t (*max_abs_bits)(const float* x, int n);
  /// bits[i] = max(bits[i], bits of |x[i]|).
  void (*max_abs_bits_each)(const float* x, int n, uint32_t* bits);
  /// sums[i] += x[i].
  void (*add_to_sums)(const float* x, int n, double* sums);
  /// x[i] -= mean[i].
  void (*subtract)(float* x, const float* mean, int n);
  /// codes[i] = round-half-even(x[i] / scale[i * scale_step]); scale_step 0 or 1; x finite.
  void (*encode)(const float* x, int n, const float* scale, int scale_step, int8_t* codes);
  /// 64 rows of codes [64][row_stride], zero-padded to padded_qk_dim, into one packed K group.
  void (*pack_k)(const int8_t* codes, int row_stride, int padded_dim, std::byte* group,
                 int32_t* correction);
  /// 64 rows of codes [64][row_stride], zero-padded to padded_v_dim, into one packed V group.
  void (*pack_v)(const int8_t* codes, int row_stride, int padded_dim, std::byte* group);
  /// sums[d] = sum of channel d over the 64 keys of a packed V group; [padded_v_dim].
  void (*sum_v)(const std::byte* group, int padded_dim, int32_t* sums);
  /// Bytes of scratch that attend() needs for this kv_block.
  size_t (*scratch_bytes)(int kv_block);
  void (*attend)(const AttendTile& tile);
};

/// The table of an ISA, nullptr where it is not compiled in or the machine cannot run it.
const KernelTable* find_kernel_table(Isa isa) noexcept;

}  // namespace attn8
