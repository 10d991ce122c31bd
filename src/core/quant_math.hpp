// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

#include "attn8/quantize.hpp"

namespace attn8 {

/// Whether groups end at multiples of a block of tokens.
constexpr bool by_block(Granularity granularity) noexcept {
  return granularity == Granularity::kBlock || granularity == Granularity::kBlockChannel;
}
/// Whether every channel has a scale of its own.
constexpr bool by_channel(Granularity granularity) noexcept {
  return granularity == Granularity::kChannel || granularity == Granularity::kBlockChannel;
}

/// Bits of |x| order as the values do, with Inf and NaN above every finite one: one unsigned
/// maximum finds both the largest magnitude and whether anything was not finite.
inline constexpr uint32_t kInfBits = 0x7f800000u;

/// Scale of a group from the bits of its largest magnitude (docs/numerics.md, "Scales and codes").
constexpr float scale_from_bits(uint32_t max_abs_bits) noexcept {
  if (max_abs_bits >= kInfBits) return std::numeric_limits<float>::quiet_NaN();
  const float scale = std::bit_cast<float>(max_abs_bits) / 127.0f;
  if (!(scale >= std::numeric_limits<float>::min())) return 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scale) & ~7u);
}

/// Whether a group with this scale and magnitude has only zero codes.
constexpr bool codes_are_zero(uint32_t max_abs_bits) noexcept {
  return max_abs_bits >= kInfBits ||
         !(std::bit_cast<float>(max_abs_bits) / 127.0f >= std::numeric_limits<float>::min());
}

/// Tokens per partial sum of the K mean.
inline constexpr int64_t kMeanChunk = 4096;

/// Largest scale of K that scores are computed with: times a dot product, below 2^23, it stays
/// finite.
inline constexpr float kMaxKeyScale = 0x1p104f;

/// Smallest r of a V token: the integer weights of the denominator span 2^16.
inline constexpr float kMinRatio = 0x1p-16f;

/// r of a V token of zero codes; for its output any is right. A large one keeps the weights of many
/// such tokens (padding) in the denominator; a small one leaves the bits of P to the others where
/// one such token has most of the weight (a sink).
inline constexpr float kZeroRatio = 0x1p-6f;

}  // namespace attn8
