// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/quantization.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "reference_tensor.hpp"

namespace attn8::reference::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(ReferenceQuantization, ScaleHasItsLowThreeBitsCleared) {
  EXPECT_EQ(scale_of(127.0F), 1.0F);
  const float plain = 1.0F / 127.0F;  // 0x3C010204
  ASSERT_NE(std::bit_cast<uint32_t>(plain) & 7U, 0U);
  EXPECT_EQ(std::bit_cast<uint32_t>(scale_of(1.0F)), std::bit_cast<uint32_t>(plain) & ~7U);
}

TEST(ReferenceQuantization, GroupsTooSmallForAScale) {
  const float smallest = std::numeric_limits<float>::min();
  EXPECT_EQ(scale_of(0.0F), 1.0F);
  EXPECT_EQ(scale_of(126 * smallest), 1.0F);
  EXPECT_EQ(code_of(126 * smallest, 1.0F, 126 * smallest), 0.0F);
  EXPECT_EQ(scale_of(127 * smallest), smallest);
  EXPECT_EQ(code_of(-127 * smallest, smallest, 127 * smallest), -127.0F);
}

TEST(ReferenceQuantization, TiesGoToTheEvenCode) {
  const float codes_wanted[] = {0, 2, 2, 4, -2, 126};
  const float values[] = {0.5F, 1.5F, 2.5F, 3.5F, -2.5F, 126.5F};
  for (size_t i = 0; i < std::size(values); ++i) {
    EXPECT_EQ(code_of(values[i], 1.0F, 127.0F), codes_wanted[i]) << values[i];
  }
  EXPECT_EQ(code_of(std::nextafter(0.5F, 1.0F), 1.0F, 127.0F), 1.0F);
}

// The cleared bits make the scale smaller, so x / scale passes 127 by a little, never to 128.
TEST(ReferenceQuantization, LargestMagnitudeIs127ForEveryMantissa) {
  for (uint32_t bits = 0x3F800000; bits < 0x40000000; bits += 4099) {
    const float x = std::bit_cast<float>(bits);
    ASSERT_EQ(code_of(-x, scale_of(x), x), -127.0F) << x;
    ASSERT_EQ(code_of(x, scale_of(x), x), 127.0F) << x;
  }
  const float largest = std::numeric_limits<float>::max();
  EXPECT_EQ(code_of(-largest, scale_of(largest), largest), -127.0F);
}

TEST(ReferenceQuantization, PoisonGivesScaleNanAndCodesZero) {
  EXPECT_TRUE(std::isnan(scale_of(kInfinity)));
  EXPECT_TRUE(std::isnan(scale_of(kNan)));
  EXPECT_EQ(code_of(3.0F, kNan, kNan), 0.0F);
}

TEST(ReferenceQuantization, GroupsOfEveryGranularity) {
  // 5 tokens, 2 channels; token j holds +-(j + 1) and 10 (j + 1).
  Tokens tokens(0, 5, 2);
  for (int64_t j = 0; j < 5; ++j) {
    tokens.token(j)[0] = static_cast<float>(-(j + 1));
    tokens.token(j)[1] = static_cast<float>(10 * (j + 1));
  }
  const auto scales = [&](const QuantSpec& spec) {
    std::vector<double> max_abs;
    for (const double scale : quantize_tokens(tokens, spec, 5).scale) {
      max_abs.push_back(std::nearbyint(scale * 127));
    }
    return max_abs;
  };
  EXPECT_EQ(scales({Granularity::kToken}), (std::vector<double>{10, 20, 30, 40, 50}));
  EXPECT_EQ(scales({Granularity::kTensor}), (std::vector<double>{50}));
  EXPECT_EQ(scales({Granularity::kChannel}), (std::vector<double>{5, 50}));
  EXPECT_EQ(scales({Granularity::kBlock, 2}), (std::vector<double>{20, 40, 50}));
  EXPECT_EQ(scales({Granularity::kBlockChannel, 2}), (std::vector<double>{2, 20, 4, 40, 5, 50}));
  const Quantized by_channel = quantize_tokens(tokens, {Granularity::kChannel}, 5);
  EXPECT_EQ(by_channel.codes.token(4)[0], -127);
  EXPECT_EQ(by_channel.codes.token(1)[0], -51);  // 2 / 5 * 127 = 50.8
}

// Blocks are counted from token 0 even where the first visible token is another.
TEST(ReferenceQuantization, BlocksStartAtMultiples) {
  Tokens tokens(3, 2, 1);
  tokens.token(3)[0] = 127;
  tokens.token(4)[0] = 254;
  const Quantized quantized = quantize_tokens(tokens, {Granularity::kBlock, 4}, 8);
  EXPECT_EQ(quantized.scale, (std::vector<double>{1, 2}));
}

TEST(ReferenceQuantization, MeanIsTakenInDoubleAndIsFinite) {
  Tokens tokens(2, 3, 2);
  // In float32, 2^24 + 1 would lose its 1.
  tokens.token(2)[0] = 0x1p24F;
  tokens.token(3)[0] = 1;
  tokens.token(4)[0] = -0x1p24F;
  tokens.token(2)[1] = 3;
  tokens.token(3)[1] = kInfinity;
  tokens.token(4)[1] = 3;
  EXPECT_EQ(channel_mean(tokens), (std::vector<float>{1.0F / 3.0F, 0.0F}));
  EXPECT_EQ(channel_mean(Tokens(0, 0, 1)), std::vector<float>{0.0F});
}

// Chunks of 4096 tokens have sums of their own: beside 2^53 the ones of the first chunk are lost,
// beside -2^53 those of the second are not.
TEST(ReferenceQuantization, MeanSumsByChunksOfTokens) {
  const int64_t count = 4096 + 4;
  Tokens tokens(5, count, 1);
  for (int64_t j = 5; j < 5 + count; ++j) tokens.token(j)[0] = 1;
  tokens.token(5)[0] = 0x1p53F;
  tokens.token(5 + 4097)[0] = -0x1p53F;
  EXPECT_EQ(channel_mean(tokens)[0], static_cast<float>(3.0 / static_cast<double>(count)));
}

}  // namespace
}  // namespace attn8::reference::testing
