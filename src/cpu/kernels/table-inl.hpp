// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The table of one ISA. Included last inside its namespace.

inline size_t scratch_bytes(int kv_block) {
  const size_t sums = sizeof(float) * (2 * 16 + 1) * kQueryTile;
  const auto block = static_cast<size_t>(kRowGroup * kv_block);
  const size_t value_sums =
      kValueCodesOffset ? static_cast<size_t>(kv_block / kKeyGroup) * 256 * sizeof(int32_t) : 0;
  const size_t bias = block * sizeof(float) + 16 * sizeof(int32_t);
  return sums + block * sizeof(float) + block + bias + value_sums;
}

/// kNative: the CPU has AVX512-BF16.
template <bool kNative>
inline void attend(const AttendTile& tile) {
  switch (tile.mode) {
    case Mode::kAccurate:
#ifdef ATTN8_HAS_SKEWED
      if (fits_skewed(tile)) return attend_16bit(tile);
#endif
      return attend_accurate(tile);
    case Mode::kPaper:
      return attend_paper(tile);
    case Mode::kHalf:
      return attend_float<CodeScores, PairWords<kNative>>(tile);
    case Mode::kExact:
      if constexpr (kNative) {
        if (tile.bfloat16) return attend_float<PairWords<true>, PairWords<true>>(tile);
      }
      return attend_float<FloatWords, FloatWords>(tile);
    case Mode::kFp8:
      return;  // has no kernel: plan.cpp sends it to the emulation
  }
}

inline constexpr KernelTable kTable = {
    .isa = kIsa,
    .query_codes_offset = kQueryCodesOffset,
    .bfloat16_pairs = false,
    .load_row = load_row,
    .store_row = store_row,
    .max_abs_bits = row_max_abs_bits,
    .max_abs_bits_each = row_max_abs_bits_each,
    .add_rows = add_rows,
    .subtract = subtract,
    .encode = encode,
    .quantize_rows = quantize_rows,
    .squared_length = squared_length,
    .normalize = normalize,
    .pack_k = pack_k,
    .pack_v = pack_v,
    .sum_v = sum_v,
    .scratch_bytes = scratch_bytes,
    .attend = attend<false>,
};
