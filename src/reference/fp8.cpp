// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/fp8.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace attn8::reference {
namespace {

// x to the nearest multiple of the spacing that a format with `significand_bits` (the leading one
// counted) has at |x|; below `smallest_normal` the spacing stays what it is there.
double round_significand(double x, int significand_bits, double smallest_normal) {
  if (!std::isfinite(x)) return x;
  constexpr uint64_t kExponentField = 0x7FF0'0000'0000'0000;
  const double power_of_two = std::bit_cast<double>(std::bit_cast<uint64_t>(x) & kExponentField);
  const double spacing =
      std::max(power_of_two, smallest_normal) / static_cast<double>(1 << (significand_bits - 1));
  return std::nearbyint(x / spacing) * spacing;
}

double overflow_to_inf(double x, double largest) {
  return std::abs(x) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : x;
}

}  // namespace

double round_bfloat16(double x) noexcept {
  constexpr double kLargest = 0x1.FEp127;
  return overflow_to_inf(round_significand(x, 8, 0x1p-126), kLargest);
}

double round_e4m3(double x) noexcept {
  constexpr double kLargest = 448;
  const double rounded = round_significand(x, 4, 0x1p-6);
  return std::abs(rounded) > kLargest ? std::copysign(kLargest, x) : rounded;
}

double round_e5m2(double x) noexcept {
  constexpr double kLargest = 57344;
  return overflow_to_inf(round_significand(x, 3, 0x1p-14), kLargest);
}

}  // namespace attn8::reference
