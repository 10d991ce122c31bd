// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/fp8.hpp"

namespace attn8::reference {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Magnitudes of an FP8 format by its bit patterns, from 0 to the largest finite one.
std::vector<double> magnitudes(int fraction_bits, int bias, int largest_pattern) {
  std::vector<double> values;
  for (int pattern = 0; pattern <= largest_pattern; ++pattern) {
    const int exponent = pattern >> fraction_bits;
    const int fraction = pattern & ((1 << fraction_bits) - 1);
    values.push_back(exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                                   : std::ldexp((1 << fraction_bits) + fraction,
                                                exponent - bias - fraction_bits));
  }
  return values;
}

// Every value stays, every midpoint goes to the even pattern, and just beside a midpoint the nearer
// neighbour wins; both signs.
void check_format(double (*round)(double), const std::vector<double>& values) {
  for (size_t pattern = 0; pattern < values.size(); ++pattern) {
    for (const double sign : {1.0, -1.0}) {
      const double value = sign * values[pattern];
      EXPECT_EQ(round(value), value);
      EXPECT_EQ(std::signbit(round(value)), std::signbit(value));
      if (pattern + 1 == values.size()) continue;
      const double next = sign * values[pattern + 1];
      const double midpoint = (value + next) / 2;
      EXPECT_EQ(round(midpoint), pattern % 2 == 0 ? value : next) << midpoint;
      EXPECT_EQ(round(std::nextafter(midpoint, value)), value) << midpoint;
      EXPECT_EQ(round(std::nextafter(midpoint, next)), next) << midpoint;
    }
  }
}

TEST(Fp8, E4m3IsExhaustivelyRight) {
  const std::vector<double> values = magnitudes(3, 7, 0x7E);
  ASSERT_EQ(values.back(), 448);
  ASSERT_EQ(values[1], 0x1p-9);
  check_format(round_e4m3, values);
}

TEST(Fp8, E4m3Saturates) {
  EXPECT_EQ(round_e4m3(464), 448);  // the midpoint to what would be 480
  EXPECT_EQ(round_e4m3(465), 448);
  EXPECT_EQ(round_e4m3(-1e30), -448);
  EXPECT_EQ(round_e4m3(kInf), 448);
  EXPECT_TRUE(std::isnan(round_e4m3(std::nan(""))));
}

TEST(Fp8, E5m2IsExhaustivelyRight) {
  const std::vector<double> values = magnitudes(2, 15, 0x7B);
  ASSERT_EQ(values.back(), 57344);
  ASSERT_EQ(values[1], 0x1p-16);
  check_format(round_e5m2, values);
}

TEST(Fp8, E5m2OverflowsToInf) {
  EXPECT_EQ(round_e5m2(std::nextafter(61440.0, 0.0)), 57344);
  EXPECT_EQ(round_e5m2(61440), kInf);  // the midpoint to 65536, whose pattern is even
  EXPECT_EQ(round_e5m2(-1e6), -kInf);
  EXPECT_TRUE(std::isnan(round_e5m2(std::nan(""))));
}

TEST(Bfloat16, EveryValueAndEveryMidpoint) {
  constexpr uint32_t kLargest = 0x7F7F;
  for (uint32_t pattern = 0; pattern <= kLargest; ++pattern) {
    const double value = std::bit_cast<float>(pattern << 16);
    ASSERT_EQ(round_bfloat16(value), value);
    if (pattern == kLargest) break;
    const double next = std::bit_cast<float>((pattern + 1) << 16);
    const double midpoint = (value + next) / 2;
    ASSERT_EQ(round_bfloat16(-midpoint), pattern % 2 == 0 ? -value : -next);
    ASSERT_EQ(round_bfloat16(std::nextafter(midpoint, 0.0)), value);
    ASSERT_EQ(round_bfloat16(std::nextafter(midpoint, next)), next);
  }
  EXPECT_EQ(round_bfloat16(0x1.FFp127), kInf);
}

}  // namespace
}  // namespace attn8::reference
