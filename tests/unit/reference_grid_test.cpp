// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// `accurate` on the score grid, by hand: with head_dim 1, q = 1 and a softmax_scale of ln 2 / 64 a
// key's score is its K in steps of the grid.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numbers>

#include "reference_tensor.hpp"

namespace attn8::reference::testing {
namespace {

constexpr double kLog2 = std::numbers::ln2;
constexpr double kWeightUnits = 0x1p15;  // of l, for one code of P

Tensor column(std::vector<float> values) {
  Tensor tensor({1, static_cast<int64_t>(values.size()), 1, 1});
  tensor.values = std::move(values);
  return tensor;
}

EmulationOptions grid_options(Granularity granularity = Granularity::kToken) {
  EmulationOptions options = emulation_options({.v_granularity = granularity});
  options.softmax_scale = std::numbers::ln2_v<float> / 64;
  options.smooth_k = false;
  options.score_grid = true;
  return options;
}

Output attend(const Tensor& k, const Tensor& v, const EmulationOptions& options) {
  Output o = run_emulation(column({1}), k, v, options);
  EXPECT_TRUE(o.status.ok()) << o.status.message();
  return o;
}

// y of a key this many steps below the maximum.
int64_t weight(int64_t distance) {
  if (distance >= 1024) return 0;
  const auto f = static_cast<long double>(distance % 64);
  const auto table = static_cast<int64_t>(std::floor(65280 * std::pow(0.5L, f / 64) + 0.5L));
  return table / (int64_t{1} << (distance / 64));
}

int64_t code_of_weight(int64_t y) { return (y + 128) / 256; }
int64_t half_of_weight(int64_t y) { return (y + 1) / 2; }

double lse_of(double l, double reference_steps) {
  return std::log(l / (255 * kWeightUnits)) + reference_steps / 64 * kLog2;
}

TEST(ScoreGrid, TableOfAnOctave) {
  EXPECT_EQ(weight(0), 65280);
  EXPECT_EQ(weight(1), 64577);
  EXPECT_EQ(weight(32), 46160);
  EXPECT_EQ(weight(63), 32995);
  EXPECT_EQ(weight(64), 32640);
  EXPECT_EQ(weight(1023), 1);
}

// The numerator shows the code and what rounding took, the LSE the half weight. One scale for all
// of V: codes 127 and 0, whose mean is 63.5.
TEST(ScoreGrid, WeightsAtEveryDistance) {
  const EmulationOptions options = grid_options(Granularity::kTensor);
  for (int64_t distance = 0; distance <= 1100; ++distance) {
    const int64_t y = weight(distance);
    const double code = static_cast<double>(code_of_weight(y));
    const double l = 256.0 * (32640 + static_cast<double>(half_of_weight(y)));
    const double rho = static_cast<double>(y) / 256 - code;
    // Seen second, with V = 127: its code is in the sum too.
    const Output o = attend(column({0, -static_cast<float>(distance)}), column({0, 127}), options);
    EXPECT_NEAR(o.out[0], (code * 127 + rho * 63.5) / (l / kWeightUnits), 1e-11) << distance;
    EXPECT_NEAR(o.lse[0], lse_of(l, 0), 1e-13) << distance;
    EXPECT_LT(o.bound[0], 1e-4) << distance;
  }
}

// The maximum of the block need not be at a whole octave: 70 steps are a reference of 64 and a beta
// of 2^(6/64).
TEST(ScoreGrid, ReferenceIsAWholeOctave) {
  const Output o = attend(column({70, 60}), column({127, -127}), grid_options());
  const int64_t y = weight(10);
  const double l = 256.0 * (32640 + static_cast<double>(half_of_weight(y)));
  const double beta = static_cast<float>(std::pow(2.0, 6.0 / 64));
  EXPECT_NEAR(o.out[0], 127.0 * static_cast<double>(255 - code_of_weight(y)) / (l / kWeightUnits),
              1e-11);
  EXPECT_NEAR(o.lse[0], lse_of(beta * l, 64), 1e-13);
}

// A V token of 0.3 times the scale: 64 log2 0.3 = -111.17 steps, W = round(256 / 0.3) = 853.
TEST(ScoreGrid, TokenScalesOfVAreFolded) {
  const Output o = attend(column({0, 50}), column({127, 38.1F}), grid_options());
  const int64_t y = weight(61);
  const double code = static_cast<double>(code_of_weight(y));
  const double l = 32640.0 * 256 + static_cast<double>(half_of_weight(y)) * 853;
  const double numerator = 127 * (255 + static_cast<double>(y) / 256);
  ASSERT_NE(code * 256, y);
  EXPECT_NEAR(o.out[0], numerator / (l / kWeightUnits), 1e-4);  // a scale within 2^-20 of 1
  EXPECT_NEAR(o.lse[0], lse_of(l, 0), 1e-12);
}

// Below 2^-16 of the block's largest scale the codes shrink instead: 127 / 4 rounds to 32.
TEST(ScoreGrid, TinyTokensOfVAreEncodedAgain) {
  const Output o = attend(column({0, 1024}), column({127, 127 * 0x1p-18F}), grid_options());
  const double l = 32640.0 * (256 + 0x1p24);
  EXPECT_NEAR(o.out[0], 255.0 * (127 + 32) / (l / kWeightUnits), 1e-8);
  EXPECT_NEAR(o.lse[0], lse_of(l, 0), 1e-12);
  // So small that nothing is left: it counts in l, as does 2^-16 itself.
  const Output none = attend(column({0, 1024}), column({127, 127 * 0x1p-30F}), grid_options());
  EXPECT_NEAR(none.out[0], 255.0 * 127 / (l / kWeightUnits), 1e-8);
  EXPECT_NEAR(none.lse[0], lse_of(l, 0), 1e-12);
  const Output edge = attend(column({0, 1024}), column({127, 127 * 0x1p-16F}), grid_options());
  EXPECT_NEAR(edge.out[0], 255.0 * (127 + 127) / (l / kWeightUnits), 1e-8);
}

// A V token of zeros has r = 2^-6, 384 steps.
TEST(ScoreGrid, ZeroTokensOfVKeepTheirWeight) {
  const Output o = attend(column({0, 384}), column({127, 0}), grid_options());
  const double l = 32640.0 * (256 + 0x1p14);
  EXPECT_NEAR(o.out[0], 255.0 * 127 / (l / kWeightUnits), 1e-8);
  EXPECT_NEAR(o.lse[0], lse_of(l, 0), 1e-12);
}

// The fold starts anew in every block: no token is small beside one of another block.
TEST(ScoreGrid, TheScaleOfVIsThatOfTheBlock) {
  EmulationOptions options = grid_options();
  options.kv_block = 1;
  const Output o = attend(column({0, 0}), column({127, 127 * 0x1p-20F}), options);
  EXPECT_NEAR(o.out[0], 127.0 * (1 + 0x1p-20) / 2, 1e-8);
  EXPECT_NEAR(o.lse[0], kLog2, 1e-12);
  // Neither beside the 1 that stands for the scale of a block of zeros.
  const Output zeros = attend(column({0, 0}), column({0x1p-40F, 0}), options);
  EXPECT_NEAR(zeros.out[0], 0x1p-41, 0x1p-60);
  EXPECT_NEAR(zeros.lse[0], kLog2, 1e-12);
}

// Blocks beyond 100 octaves of the reference, on either side, weigh nothing at all.
TEST(ScoreGrid, WhatLiesOutOfReachIsZero) {
  EmulationOptions options = grid_options(Granularity::kTensor);
  options.kv_block = 1;
  const Tensor first = column({127, 0}), second = column({0, 127});
  EXPECT_NEAR(attend(column({0, 6400}), first, options).out[0], 127 * 0x1p-100, 0x1p-110);
  EXPECT_EQ(attend(column({0, 6464}), first, options).out[0], 0);
  EXPECT_NEAR(attend(column({6400, 0}), second, options).out[0], 127 * 0x1p-100, 0x1p-110);
  EXPECT_EQ(attend(column({6400, -1}), second, options).out[0], 0);
  // 60 octaves do not move the reference; the first block keeps its weight either way.
  for (const float k : {3840.0F, 3841.0F, 3904.0F}) {
    const Output o = attend(column({0, k}), first, options);
    EXPECT_NEAR(o.out[0] / (127 * std::exp2(-k / 64)), 1, 1e-6) << k;
    EXPECT_NEAR(o.lse[0], k / 64 * kLog2, 1e-6) << k;
  }
}

// Out of reach not even a poisoned V counts; within reach it does.
TEST(ScoreGrid, PoisonOutOfReachIsZeroToo) {
  EmulationOptions options = grid_options(Granularity::kBlock);
  options.kv_block = 1;
  const Tensor v = column({127, std::numeric_limits<float>::quiet_NaN()});
  EXPECT_NEAR(attend(column({6400, -1}), v, options).out[0], 127, 1e-11);
  EXPECT_TRUE(std::isnan(attend(column({6400, 0}), v, options).out[0]));
}

// Scores beyond 2^30 steps are equal, those 2^31 below them weigh nothing.
TEST(ScoreGrid, ScoresAreClamped) {
  EmulationOptions options = grid_options();
  options.softmax_scale = 1e30F;
  const Output o = attend(column({1e9F, 1e20F, -1e30F}), column({5, -5, 5}), options);
  EXPECT_EQ(o.out[0], 0);
  EXPECT_NEAR(o.lse[0], kLog2 + 0x1p24 * kLog2, 1e-6);
}

// Codes and scales that make every step exact: a scale of ln 2 is 1 in log2 units.
struct Exact {
  std::vector<int8_t> q = {1}, k, v;
  Tensor q_scale = column({1.0F / 64}), k_scale, v_scale;

  Exact(std::vector<int8_t> k_in, Tensor k_scale_in, std::vector<int8_t> v_in)
      : k(std::move(k_in)),
        v(std::move(v_in)),
        k_scale(std::move(k_scale_in)),
        v_scale(k_scale.shape, 1) {}
  [[nodiscard]] Output run() const {
    const auto view = [](const std::vector<int8_t>& codes, const Tensor& scale) {
      return QuantizedView{bshd(static_cast<const void*>(codes.data()), DType::kInt8,
                                {1, static_cast<int64_t>(codes.size()), 1, 1}),
                           scale.view(), QuantSpec{}, std::nullopt};
    };
    EmulationOptions options = grid_options();
    options.softmax_scale = std::numbers::ln2_v<float>;
    return run_emulation({view(q, q_scale), view(k, k_scale), view(v, v_scale)}, {1, 1, 1, 1},
                         options);
  }
};

TEST(ScoreGrid, TiesGoToEvenSteps) {
  // Halves of 1, 3 and 5: steps 0, 2 and 2.
  const Output o = Exact({1, 3, 5}, column({0.5F, 0.5F, 0.5F}), {1, 1, 1}).run();
  ASSERT_TRUE(o.status.ok()) << o.status.message();
  const double l = 256.0 * (2 * 32640 + static_cast<double>(half_of_weight(weight(2))));
  const double beta = static_cast<float>(std::pow(2.0, 2.0 / 64));
  EXPECT_NEAR(o.lse[0], lse_of(beta * l, 0), 1e-13);
}

// 385.47647 (1 + 2^-14) - 384 = 1.4999986: one step. With the product rounded to float32 first it
// would be a tie, and two. The token of zeros is the one with g = -384.
TEST(ScoreGrid, MultiplyingAndAddingRoundOnce) {
  Exact problem({1, 0}, column({385.476470947265625F, 1}), {0, 127});
  problem.q_scale = column({(1 + 0x1p-14F) / 64});
  const Output o = problem.run();
  ASSERT_TRUE(o.status.ok()) << o.status.message();
  const double l = 32640 * 0x1p14 + 256.0 * static_cast<double>(half_of_weight(weight(1)));
  const double beta = static_cast<float>(std::pow(2.0, 1.0 / 64));
  EXPECT_NEAR(o.lse[0], lse_of(beta * l, 0), 1e-13);
}

// Of two causal rows only the last one sees the whole block: the other must not learn its mean.
TEST(ScoreGrid, ResidualOnlyWhereTheWholeBlockIsSeen) {
  EmulationOptions options = grid_options();
  options.mask.causal = true;
  const Tensor q = column({1, 1, 1}), k = column({0, -600, -600}), v = column({1, -1, 1});
  const Output with = run_emulation(q, k, v, options);
  options.residual_mean = false;
  const Output without = run_emulation(q, k, v, options);
  EXPECT_EQ(with.out[0], without.out[0]);
  EXPECT_EQ(with.out[1], without.out[1]);
  // Both small weights, 98 / 256, round to 0; a third of V is their mean.
  const double y = static_cast<double>(weight(600));
  ASSERT_EQ(y, 98);
  const double l = 256.0 * (32640 + 2 * 49);
  EXPECT_NEAR(with.out[2] - without.out[2], 2 * y / 256 / 3 / (l / kWeightUnits), 1e-8);
}

// The mean is of what the call sees: with a window of one key back the last block is {2}, and its
// weight is exact.
TEST(ScoreGrid, BlocksEndWhereTheVisibleKeysEnd) {
  EmulationOptions options = grid_options(Granularity::kTensor);
  options.kv_block = 2;
  options.mask.window_left = 2;
  const Output o = attend(column({9, 0, -600, 3}), column({99, 127, 127, -127}), options);
  // Blocks {1}, {2, 3} of four keys; key 0 is not seen.
  const int64_t y = weight(603);
  const double code = static_cast<double>(code_of_weight(y));
  const double l_last = 256.0 * (32640 + static_cast<double>(half_of_weight(y)));
  const double beta = static_cast<float>(std::pow(2.0, 3.0 / 64));
  const double numerator = 255.0 * 127 + beta * (-255.0 * 127 + code * 127);
  EXPECT_NEAR(o.out[0], numerator / ((32640.0 * 256 + beta * l_last) / kWeightUnits), 1e-4);
  EXPECT_NEAR(o.lse[0], lse_of(32640.0 * 256 + beta * l_last, 0), 1e-12);
}

TEST(ScoreGrid, OptionsItDoesNotDefineAreRefused) {
  const Tensor x = column({1, 2});
  EmulationOptions options = grid_options();
  options.normalizer = Normalizer::kCodes;
  Status status = run_emulation(x, x, x, options).status;
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "options.normalizer must be kFloat with options.score_grid");
  options = grid_options();
  options.p_scale = PScale::kRunningMax255;
  status = run_emulation(x, x, x, options).status;
  EXPECT_EQ(status.message(), "options.p_scale must be kBlockLocal255 with options.score_grid");
  options.mode = Mode::kPaper;  // looks at neither
  EXPECT_TRUE(run_emulation(x, x, x, options).status.ok());
}

// The grid adds at most a fifth to the error that the arithmetic has without it, at any length.
TEST(ScoreGrid, ErrorAgainstFloat64) {
  const int64_t dim = 64;
  for (const int64_t seqlen_k : {512, 4096, 32768}) {
    for (const int32_t kv_block : {128, 256, 512}) {
      const Tensor q = random_tensor({1, 16, 1, dim}, 1),
                   k = random_tensor({1, seqlen_k, 1, dim}, 2),
                   v = random_tensor({1, seqlen_k, 1, dim}, 3);
      const Output exact = run_exact(q, k, v);
      EmulationOptions options = emulation_options({.kv_block = kv_block});
      options.score_grid = true;
      const Output grid = run_emulation(q, k, v, options);
      options.score_grid = false;
      const Output floats = run_emulation(q, k, v, options);
      const double grid_error = error_report(grid.out, exact.out).rel_l2;
      EXPECT_LT(grid_error, 0.018) << seqlen_k << " " << kv_block;
      EXPECT_LT(grid_error, 1.2 * error_report(floats.out, exact.out).rel_l2)
          << seqlen_k << " " << kv_block;
      EXPECT_NE(grid.out, floats.out);
      EXPECT_LT(error_report(grid.lse, exact.lse).max_abs, 0.01);
    }
  }
}

}  // namespace
}  // namespace attn8::reference::testing
