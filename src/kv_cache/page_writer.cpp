// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "kv_cache/page_writer.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/quant_math.hpp"
#include "cpu/views.hpp"

namespace attn8::kv_cache {

using cpu::kMaxDim;
constexpr int64_t kMaxPage = cpu::kMaxKvBlock;

namespace {

void summarize(const PageBlock& block) noexcept {
  const BlockHeader& header = block.memory.header();
  *block.summary = {header.v_scale, header.key_norm, header.poisoned != 0};
}

}  // namespace

int8_t* PageWriter::staged_v(const PageBlock& block, int64_t filled, int64_t key,
                             int8_t* partial) const noexcept {
  const int64_t fresh = round_up(filled, kKeyGroup);
  if (key < fresh) return partial + (key - filled) * padded_;
  return reinterpret_cast<int8_t*>(block.memory.v(0)) + key * padded_;
}

void PageWriter::encode_v(const PageBlock& block, const RowSpan& rows, int64_t key,
                          int8_t* codes) const noexcept {
  if (rows.rows == 0) return;
  if (round_up(dim_v_, 16) < padded_) {
    std::memset(codes, 0, static_cast<size_t>(rows.rows * padded_));
  }
  uint32_t bits[kMaxPage];
  table_.quantize_rows(rows, nullptr, codes, padded_, bits);
  for (int64_t i = 0; i < rows.rows; ++i) {
    block.v_scale[key + i] = codes_are_zero(bits[i]) ? 0.0f : scale_from_bits(bits[i]);
    if (bits[i] >= kInfBits) block.memory.mark_poisoned(key + i);
  }
}

void PageWriter::encode_k(const PageBlock& block, const RowSpan& rows, int64_t key,
                          const float* k_mean, int8_t* codes, float* k_scale) const noexcept {
  uint32_t bits[kKeyGroup];
  table_.quantize_rows(rows, k_mean, codes, padded_, bits);
  for (int64_t i = 0; i < rows.rows; ++i) {
    const float scale = scale_from_bits(bits[i]);
    if (!cpu::usable(scale)) block.memory.mark_poisoned(key + i);
    k_scale[i] = cpu::record_scale(scale);
  }
}

void PageWriter::fold_v(const PageBlock& block, int64_t key, int8_t* codes) const noexcept {
  float& scale = block.v_scale[key];
  const float block_scale = block.memory.header().v_scale;
  cpu::fold_key(block.memory, key, cpu::fold_ratio(scale, block_scale));
  if (scale > 0 && scale / block_scale < kMinRatio) [[unlikely]] {
    cpu::shrink_codes(codes, dim_v_, scale / block_scale);
    scale = block_scale * kMinRatio;
  }
}

void PageWriter::write_k(const PageBlock& block, int64_t key, const int8_t* codes,
                         float k_scale) const noexcept {
  const int64_t slot = key % kKeyGroup;
  std::byte* group = block.memory.k(key / kKeyGroup);
  int32_t sum = 0;
  int32_t squares = 0;
  for (int d = 0; d < padded_; d += 4) {
    std::memcpy(group + packed_k_offset(slot, d), codes + d, 4);
  }
  for (int d = 0; d < dim_; ++d) {
    sum += codes[d];
    squares += codes[d] * codes[d];
  }
  KeyRecord& record = block.memory.record(key / kKeyGroup);
  record.k_scale[slot] = k_scale;
  record.correction[slot] = -128 * sum;
  const auto scale = static_cast<double>(k_scale);
  BlockHeader& header = block.memory.header();
  header.key_norm =
      std::max(header.key_norm, static_cast<float>(std::sqrt(scale * scale * squares)));
}

void PageWriter::write_v(const PageBlock& block, int64_t key, const int8_t* codes) const noexcept {
  std::byte* group = block.memory.v(key / kKeyGroup);
  for (int d = 0; d < padded_; ++d) {
    group[packed_v_offset(key % kKeyGroup, d, padded_)] = static_cast<std::byte>(codes[d]);
  }
}

void PageWriter::read_v(const PageBlock& block, int64_t key, int8_t* codes) const noexcept {
  const std::byte* group = block.memory.v(key / kKeyGroup);
  for (int d = 0; d < padded_; ++d) {
    codes[d] = std::to_integer<int8_t>(group[packed_v_offset(key % kKeyGroup, d, padded_)]);
  }
}

/// v_block of a page of `keys` tokens whose scales are known, and the folds of the `filled` first
/// of them, whose codes are written. sums: of their codes.
void PageWriter::set_block_scale(const PageBlock& block, int64_t filled, int64_t keys,
                                 int64_t* sums) const noexcept {
  BlockHeader& header = block.memory.header();
  float largest = 0;  // a comparison leaves out the NaN of a poisoned token
  for (int64_t key = 0; key < keys; ++key) largest = std::max(largest, block.v_scale[key]);
  if (largest == 0) largest = 1;
  if (largest == header.v_scale) return;
  header.v_scale = largest;
  header.any_high = 0;
  for (int64_t key = 0; key < filled; ++key) {
    float& scale = block.v_scale[key];
    cpu::fold_key(block.memory, key, cpu::fold_ratio(scale, largest));
    if (scale == 0 || scale / largest >= kMinRatio) [[likely]]
      continue;
    int8_t codes[kMaxDim];
    read_v(block, key, codes);
    for (int d = 0; d < dim_v_; ++d) sums[d] -= codes[d];
    cpu::shrink_codes(codes, dim_v_, scale / largest);
    for (int d = 0; d < dim_v_; ++d) sums[d] += codes[d];
    write_v(block, key, codes);
    scale = largest * kMinRatio;
  }
}

void PageWriter::append(const PageBlock& block, int64_t filled, const ConstTensorView& k,
                        const ConstTensorView& v, int64_t head, int64_t first, int64_t count,
                        const float* k_mean) const noexcept {
  const cpu::BlockMemory& memory = block.memory;
  int64_t sums[kMaxDim] = {};
  if (filled == 0) {
    cpu::clear_header(memory, page_size_);
  } else {
    // The mean is the float quotient of the sum, below 2^24: multiplied back it is off by less than
    // a half.
    for (int d = 0; d < padded_; ++d) {
      sums[d] = std::llrint(static_cast<double>(memory.mean()[d]) * static_cast<double>(filled));
    }
  }
  const int64_t end = filled + count;
  const auto rows_of = [&](const ConstTensorView& view, int64_t lo, int64_t hi) {
    return cpu::token_rows(view, 0, first + lo - filled, hi - lo, head, 0, view.shape[3]);
  };
  // V first and whole, because every fold depends on the largest scale of the page.
  alignas(64) int8_t partial[kKeyGroup * kMaxDim];
  const int64_t fresh = std::min(end, round_up(filled, kKeyGroup));
  encode_v(block, rows_of(v, filled, fresh), filled, partial);
  encode_v(block, rows_of(v, fresh, end), fresh, staged_v(block, filled, fresh, partial));
  set_block_scale(block, filled, end, sums);
  for (int64_t group = filled / kKeyGroup; group * kKeyGroup < end; ++group) {
    const int64_t lo = std::max(filled, group * kKeyGroup);
    const int64_t hi = std::min(end, (group + 1) * kKeyGroup);
    const bool is_fresh = lo % kKeyGroup == 0;
    alignas(64) int8_t k_codes[kKeyGroup * kMaxDim];
    alignas(64) int8_t v_codes[kKeyGroup * kMaxDim];
    if (hi - lo < kKeyGroup || round_up(dim_, 16) < padded_) {
      std::memset(k_codes, 0, static_cast<size_t>((is_fresh ? kKeyGroup : hi - lo) * padded_));
    }
    float k_scale[kKeyGroup] = {};
    encode_k(block, rows_of(k, lo, hi), lo, k_mean, k_codes, k_scale);
    std::memcpy(v_codes, staged_v(block, filled, lo, partial),
                static_cast<size_t>((hi - lo) * padded_));
    for (int64_t key = lo; key < hi; ++key) fold_v(block, key, v_codes + (key - lo) * padded_);
    if (is_fresh) {
      std::memset(v_codes + (hi - lo) * padded_, 0,
                  static_cast<size_t>((group * kKeyGroup + kKeyGroup - hi) * padded_));
      cpu::pack_k_group(table_, memory, group, k_codes, k_scale, padded_);
      cpu::pack_v_group(table_, memory, group, v_codes, padded_, sums);
      for (int64_t key = hi; key < (group + 1) * kKeyGroup; ++key) cpu::fold_key(memory, key, 1);
      continue;
    }
    for (int64_t key = lo; key < hi; ++key) {
      const int64_t row = (key - lo) * padded_;
      write_k(block, key, k_codes + row, k_scale[key - lo]);
      write_v(block, key, v_codes + row);
      for (int d = 0; d < dim_v_; ++d) sums[d] += v_codes[row + d];
    }
  }
  cpu::store_mean(memory, sums, end, padded_);
  summarize(block);
}

void PageWriter::truncate(const PageBlock& block, int64_t filled, int64_t kept) const noexcept {
  const cpu::BlockMemory& memory = block.memory;
  std::memset(memory.poison() + kept, 0, static_cast<size_t>(filled - kept));
  memory.header().poisoned =
      std::memchr(memory.poison(), 1, static_cast<size_t>(kept)) != nullptr ? 1 : 0;
  const int64_t groups = key_groups(kept);
  const int8_t zeros[kMaxDim] = {};
  for (int64_t key = kept; key < std::min(filled, groups * kKeyGroup); ++key) {
    write_k(block, key, zeros, 0);
    write_v(block, key, zeros);
    cpu::fold_key(memory, key, 1);
  }
  int64_t sums[kMaxDim] = {};
  for (int64_t group = 0; group < groups; ++group) {
    int32_t group_sums[kMaxDim];
    table_.sum_v(memory.v(group), padded_, group_sums);
    for (int d = 0; d < padded_; ++d) sums[d] += group_sums[d];
  }
  set_block_scale(block, kept, kept, sums);
  cpu::store_mean(memory, sums, kept, padded_);
  summarize(block);
}

}  // namespace attn8::kv_cache
