// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/kernel_table.hpp"
#include "core/packed_layout.hpp"

namespace attn8::cpu {

inline constexpr int kMaxDim = 256;
inline constexpr int kMaxKvBlock = 512;

/// Whether a scale can be used; anything else poisons what it scales.
constexpr bool usable(float scale) noexcept {
  return scale > 0 && scale <= std::numeric_limits<float>::max();
}

/// The parts of one kv block, to write. Keys and groups count from the block's first.
struct BlockMemory {
  std::byte* data;
  std::byte* header_data;
  const BlockLayout& layout;

  [[nodiscard]] BlockHeader& header() const noexcept {
    return *reinterpret_cast<BlockHeader*>(header_data);
  }
  [[nodiscard]] uint8_t* poison() const noexcept {
    return reinterpret_cast<uint8_t*>(header_data + layout.poison);
  }
  [[nodiscard]] float* mean() const noexcept {
    return reinterpret_cast<float*>(header_data + layout.mean);
  }
  [[nodiscard]] float* channel_scale() const noexcept {
    return reinterpret_cast<float*>(header_data + layout.channel_scale);
  }
  [[nodiscard]] KeyRecord& record(int64_t group) const noexcept {
    return reinterpret_cast<KeyRecord*>(data + layout.records)[group];
  }
  [[nodiscard]] std::byte* k(int64_t group) const noexcept {
    return data + layout.k + static_cast<size_t>(group) * layout.k_group_bytes;
  }
  [[nodiscard]] std::byte* v(int64_t group) const noexcept {
    return data + layout.v + static_cast<size_t>(group) * layout.v_group_bytes;
  }
  void mark_poisoned(int64_t key) const noexcept {
    poison()[key] = 1;
    header().poisoned = 1;
  }
};

/// A header of a block without keys.
void clear_header(const BlockMemory& block, int64_t kv_block) noexcept;

/// What the record of a key holds for its scale: 0 unless usable, at most kMaxKeyScale.
float record_scale(float k_scale) noexcept;

/// 64 rows of K codes [64][padded] with what record_scale() made of their scales, 0 for padding.
void pack_k_group(const KernelTable& table, const BlockMemory& block, int64_t group,
                  const int8_t* codes, const float* k_scale, int padded) noexcept;

/// 64 rows of V codes [64][padded]; adds their sums by channel to sums [padded].
void pack_v_group(const KernelTable& table, const BlockMemory& block, int64_t group,
                  const int8_t* codes, int padded, int64_t* sums) noexcept;

/// r of docs/numerics.md; v_scale 0 for a token of zero codes.
float fold_ratio(float v_scale, float block_scale) noexcept;

/// g and W of a key from its r; 1 for padding, whose W no row adds.
void fold_key(const BlockMemory& block, int64_t key, float ratio) noexcept;

/// V codes of a token below kMinRatio of its block: what they are relative to that ratio.
void shrink_codes(int8_t* codes, int dim, float ratio) noexcept;

/// Mean V codes from their sums [padded] over `keys` keys.
void store_mean(const BlockMemory& block, const int64_t* sums, int64_t keys, int padded) noexcept;

/// Chunks of kMeanChunk tokens, of which the K mean is made.
int64_t mean_chunks(int64_t tokens) noexcept;

/// The K mean of `tokens` tokens from the sums of its chunks [chunks][dim]. A NaN or an Inf among
/// the tokens poisons its own token, not the mean of the others: 0 then.
void mean_of_chunks(const double* sums, int64_t tokens, int dim, float* mean) noexcept;

}  // namespace attn8::cpu
