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

const float* PageWriter::row_of(const ConstTensorView& view, int64_t token, int64_t head,
                                float* buffer) const noexcept {
  table_.load_row(cpu::element(view, 0, token, head), view.dtype, view.strides[3], dim_, buffer);
  return buffer;
}

/// The scale of a V token.
void PageWriter::measure_v(const PageBlock& block, int64_t key,
                           const float* values) const noexcept {
  const uint32_t bits = table_.max_abs_bits(values, dim_);
  block.v_scale[key] = codes_are_zero(bits) ? 0.0f : scale_from_bits(bits);
  if (bits >= kInfBits) block.memory.mark_poisoned(key);
}

/// K codes of a token, and what its record holds as their scale.
float PageWriter::encode_k(const PageBlock& block, int64_t key, const float* values,
                           const float* k_mean, int8_t* codes) const noexcept {
  float smooth[kMaxDim];
  if (k_mean != nullptr) {
    table_.subtract(values, k_mean, dim_, smooth);
    values = smooth;
  }
  const uint32_t bits = table_.max_abs_bits(values, dim_);
  const float scale = scale_from_bits(bits);
  if (!codes_are_zero(bits)) table_.encode(values, dim_, &scale, 0, codes);
  if (!cpu::usable(scale)) block.memory.mark_poisoned(key);
  return cpu::record_scale(scale);
}

/// V codes of a token relative to the page's largest scale, and its fold.
void PageWriter::encode_v(const PageBlock& block, int64_t key, const float* values,
                          int8_t* codes) const noexcept {
  float& scale = block.v_scale[key];
  const float block_scale = block.memory.header().v_scale;
  cpu::fold_key(block.memory, key, cpu::fold_ratio(scale, block_scale));
  if (scale == 0) return;
  table_.encode(values, dim_, &scale, 0, codes);
  if (scale / block_scale < kMinRatio) [[unlikely]] {
    cpu::shrink_codes(codes, dim_, scale / block_scale);
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
    for (int d = 0; d < dim_; ++d) sums[d] -= codes[d];
    cpu::shrink_codes(codes, dim_, scale / largest);
    for (int d = 0; d < dim_; ++d) sums[d] += codes[d];
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
  float buffer[kMaxDim];
  for (int64_t key = filled; key < end; ++key) {
    measure_v(block, key, row_of(v, first + key - filled, head, buffer));
  }
  set_block_scale(block, filled, end, sums);
  for (int64_t group = filled / kKeyGroup; group * kKeyGroup < end; ++group) {
    const int64_t lo = std::max(filled, group * kKeyGroup);
    const int64_t hi = std::min(end, (group + 1) * kKeyGroup);
    const bool fresh = lo % kKeyGroup == 0;
    alignas(64) int8_t k_codes[kKeyGroup * kMaxDim];
    alignas(64) int8_t v_codes[kKeyGroup * kMaxDim];
    const int64_t rows = fresh ? kKeyGroup : hi - lo;
    std::memset(k_codes, 0, static_cast<size_t>(rows * padded_));
    std::memset(v_codes, 0, static_cast<size_t>(rows * padded_));
    float k_scale[kKeyGroup] = {};
    for (int64_t key = lo; key < hi; ++key) {
      const int64_t token = first + key - filled;
      const int64_t row = (key - lo) * padded_;
      k_scale[key - lo] =
          encode_k(block, key, row_of(k, token, head, buffer), k_mean, k_codes + row);
      encode_v(block, key, row_of(v, token, head, buffer), v_codes + row);
    }
    if (fresh) {
      cpu::pack_k_group(table_, memory, group, k_codes, k_scale, padded_);
      cpu::pack_v_group(table_, memory, group, v_codes, padded_, sums);
      for (int64_t key = hi; key < (group + 1) * kKeyGroup; ++key) cpu::fold_key(memory, key, 1);
      continue;
    }
    for (int64_t key = lo; key < hi; ++key) {
      const int64_t row = (key - lo) * padded_;
      write_k(block, key, k_codes + row, k_scale[key - lo]);
      write_v(block, key, v_codes + row);
      for (int d = 0; d < dim_; ++d) sums[d] += v_codes[row + d];
    }
  }
  cpu::store_mean(memory, sums, end, padded_);
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
}

}  // namespace attn8::kv_cache
