// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cpu/pack.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/quant_math.hpp"

namespace attn8::cpu {

void clear_header(const BlockMemory& block, int64_t kv_block) noexcept {
  block.header() = {.v_scale = 1.0f, .key_norm = 0, .any_high = 0, .poisoned = 0};
  std::memset(block.poison(), 0, static_cast<size_t>(kv_block));
}

float record_scale(float k_scale) noexcept {
  return usable(k_scale) ? std::min(k_scale, kMaxKeyScale) : 0.0f;
}

void pack_k_group(const KernelTable& table, const BlockMemory& block, int64_t group,
                  const int8_t* codes, const float* k_scale, int padded) noexcept {
  KeyRecord& record = block.record(group);
  std::copy_n(k_scale, kKeyGroup, record.k_scale);
  int32_t squares[kKeyGroup];
  table.pack_k(codes, padded, padded, block.k(group), record.correction, squares);
  double largest = 0;
  for (int64_t slot = 0; slot < kKeyGroup; ++slot) {
    const auto scale = static_cast<double>(record.k_scale[slot]);
    largest = std::max(largest, scale * scale * squares[slot]);
  }
  BlockHeader& header = block.header();
  header.key_norm = std::max(header.key_norm, static_cast<float>(std::sqrt(largest)));
}

void pack_v_group(const KernelTable& table, const BlockMemory& block, int64_t group,
                  const int8_t* codes, int padded, int64_t* sums) noexcept {
  table.pack_v(codes, padded, padded, block.v(group));
  int32_t group_sums[kMaxDim];
  table.sum_v(block.v(group), padded, group_sums);
  for (int d = 0; d < padded; ++d) sums[d] += group_sums[d];
}

float fold_ratio(float v_scale, float block_scale) noexcept {
  return v_scale == 0 ? kZeroRatio : std::max(kMinRatio, v_scale / block_scale);
}

void fold_key(const BlockMemory& block, int64_t key, float ratio) noexcept {
  KeyRecord& record = block.record(key / kKeyGroup);
  const int64_t slot = key % kKeyGroup;
  // Most ratios repeat in no tensor, but 1 does in every granularity but `token`.
  record.offset[slot] =
      ratio == 1 ? 0.0f : static_cast<float>(64 * std::log2(static_cast<double>(ratio)));
  const auto weight = static_cast<int32_t>(std::lrint(256 / ratio));
  const int64_t position = score_position(slot);
  record.inv_low[position] = static_cast<int16_t>(weight % 4096);
  record.inv_high[position] = static_cast<int16_t>(weight / 4096);
  if (weight >= 4096) block.header().any_high = 1;
}

void shrink_codes(int8_t* codes, int dim, float ratio) noexcept {
  const float shrink = ratio * (1 / kMinRatio);
  for (int d = 0; d < dim; ++d) {
    codes[d] = static_cast<int8_t>(std::nearbyint(static_cast<float>(codes[d]) * shrink));
  }
}

void store_mean(const BlockMemory& block, const int64_t* sums, int64_t keys, int padded) noexcept {
  float* mean = block.mean();
  for (int d = 0; d < padded; ++d) {
    mean[d] = static_cast<float>(sums[d]) / static_cast<float>(keys);
  }
}

int64_t mean_chunks(int64_t tokens) noexcept { return (tokens + kMeanChunk - 1) / kMeanChunk; }

void mean_of_chunks(const double* sums, int64_t tokens, int dim, float* mean) noexcept {
  const int64_t chunks = mean_chunks(tokens);
  for (int d = 0; d < dim; ++d) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += sums[c * dim + d];
    const auto quotient = static_cast<float>(sum / static_cast<double>(tokens));
    mean[d] = std::isfinite(quotient) ? quotient : 0.0f;
  }
}

}  // namespace attn8::cpu
