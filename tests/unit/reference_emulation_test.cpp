// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "reference/quantization.hpp"
#include "reference_tensor.hpp"

namespace attn8::reference::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

EmulationOptions mode_options(Mode mode) { return emulation_options({.mode = mode}); }

// `accurate` on the score grid or with float scores, whichever attention() uses.
EmulationOptions accurate_options(bool score_grid) {
  EmulationOptions options = mode_options(Mode::kAccurate);
  options.score_grid = score_grid;
  return options;
}

// Every mode, `accurate` with both kinds of scores.
std::vector<EmulationOptions> all_options() {
  return {accurate_options(true), accurate_options(false), mode_options(Mode::kPaper),
          mode_options(Mode::kHalf), mode_options(Mode::kFp8)};
}

// head_dim 1, q = 1: scores are k, up to the one rounding of a scale near 1/127.
Tensor column(std::vector<float> values) {
  Tensor tensor({1, static_cast<int64_t>(values.size()), 1, 1});
  tensor.values = std::move(values);
  return tensor;
}

double rel_l2(const Output& o, const Output& reference) {
  return error_report(o.out, reference.out).rel_l2;
}

TEST(EmulationOptions, FollowTheModes) {
  const EmulationOptions accurate = mode_options(Mode::kAccurate);
  EXPECT_EQ(accurate.p_scale, PScale::kBlockLocal255);
  EXPECT_EQ(accurate.normalizer, Normalizer::kFloat);
  EXPECT_EQ(accurate.v_granularity, Granularity::kToken);
  EXPECT_EQ(accurate.kv_block, kDefaultKvBlock);
  EXPECT_TRUE(accurate.smooth_k);
  EXPECT_TRUE(accurate.score_grid);
  const EmulationOptions paper = mode_options(Mode::kPaper);
  EXPECT_EQ(paper.p_scale, PScale::kRunningMax127);
  EXPECT_EQ(paper.normalizer, Normalizer::kCodes);
  EXPECT_EQ(paper.v_granularity, Granularity::kTensor);
  EXPECT_FALSE(paper.smooth_k);
  EXPECT_FALSE(paper.score_grid);
  const EmulationOptions other = emulation_options({.mode = Mode::kHalf,
                                                    .softmax_scale = 0.5F,
                                                    .mask = {.causal = true},
                                                    .kv_block = 64,
                                                    .smooth_k = false});
  EXPECT_EQ(other.softmax_scale, 0.5F);
  EXPECT_TRUE(other.mask.causal);
  EXPECT_EQ(other.kv_block, 64);
  EXPECT_FALSE(other.smooth_k);
}

// Algorithm 1 with blocks of one key: the code of a key is relative to the maximum so far.
TEST(Emulation, PaperRoundsRelativeToTheRunningMaximum) {
  const Tensor q = column({1});
  EmulationOptions options = mode_options(Mode::kPaper);
  options.softmax_scale = 1.0F;
  options.kv_block = 1;
  // 1 nat below, seen later: round(127 / e) = 47.
  Output o = run_emulation(q, column({1, 0}), column({127, -127}), options);
  ASSERT_TRUE(o.status.ok()) << o.status.message();
  EXPECT_NEAR(o.out[0], 127.0 * (127 - 47) / (127 + 47), 1e-4);
  // Seen first: it has code 127, scaled by 1/e afterwards.
  o = run_emulation(q, column({0, 1}), column({-127, 127}), options);
  EXPECT_NEAR(o.out[0], 127.0 * (1 - std::exp(-1)) / (1 + std::exp(-1)), 1e-4);
  EXPECT_NEAR(o.lse[0], std::log(1 + std::exp(1)), 1e-6);
  // 6 nats below rounds to 0: 127 e^-6 = 0.31.
  o = run_emulation(q, column({6, 0}), column({127, -127}), options);
  EXPECT_NEAR(o.out[0], 127, 1e-9);
}

TEST(Emulation, AccurateRoundsRelativeToTheBlockMaximum) {
  const Tensor q = column({1});
  EmulationOptions options = accurate_options(false);
  options.softmax_scale = 1.0F;
  options.smooth_k = false;
  // Blocks of one key: every code is 255, nothing is lost 6 nats below.
  options.kv_block = 1;
  options.normalizer = Normalizer::kMixed;
  Output o = run_emulation(q, column({6, 0}), column({127, -127}), options);
  EXPECT_NEAR(o.out[0], 127 * std::tanh(3.0), 1e-4);
  // In one block: round(255 e^-6) = round(0.63) = 1 for 0.63.
  options.kv_block = 2;
  o = run_emulation(q, column({6, 0}), column({127, -127}), options);
  EXPECT_NEAR(o.out[0], 127.0 * (255 - 1) / (255 + 1), 1e-9);
  EXPECT_NEAR(o.lse[0], 6 + std::log1p(std::exp(-6)), 1e-5);
  options.normalizer = Normalizer::kFloat;
  o = run_emulation(q, column({6, 0}), column({127, -127}), options);
  EXPECT_NEAR(o.out[0], 127.0 * (255 - 1) / (255 + 255 * std::exp(-6)), 1e-4);
  options.p_scale = PScale::kRunningMax127;  // 127 e^-6 = 0.31
  o = run_emulation(q, column({6, 0}), column({127, -127}), options);
  EXPECT_NEAR(o.out[0], 127.0 / (1 + std::exp(-6)), 1e-4);
}

// The window leaves keys 1, 2, 3: blocks {1} and {2, 3}, not {1, 2} and {3}.
TEST(Emulation, KeyBlocksStartAtMultiples) {
  EmulationOptions options = accurate_options(false);
  options.softmax_scale = 1.0F;
  options.smooth_k = false;
  options.kv_block = 2;
  options.mask.window_left = 2;
  options.normalizer = Normalizer::kMixed;
  const Output o =
      run_emulation(column({1}), column({9, 0, 6, 0}), column({99, 127, 127, -127}), options);
  const double first = 255 * std::exp(-6);  // unrounded, alone in its block
  EXPECT_NEAR(o.out[0], 127 * (first + 255 - 1) / (first + 255 + 1), 1e-4);
}

// t = s + log2 r: a V token of a 64th of the norm, 3 nats above, rounds 255 e^-(ln 64 - 3) = 80.
TEST(Emulation, TokenScalesOfVAreFoldedBeforeTheMaximum) {
  const Tensor q = column({1});
  EmulationOptions options = accurate_options(false);
  options.softmax_scale = 1.0F;
  options.smooth_k = false;
  options.normalizer = Normalizer::kMixed;
  const Tensor k = column({3, 0}), v = column({127.0F / 64, -127});
  const double code = std::nearbyint(255 * std::exp(3.0) / 64);
  ASSERT_EQ(code, 80);
  // r = 2^-6 is at the threshold: by its code; so is the other.
  Output o = run_emulation(q, k, v, options);
  EXPECT_NEAR(o.out[0], 127 * (code - 255) / (code * 64 + 255), 1e-9);
  // One step of the scale's grid below the threshold: unrounded.
  const Tensor below = column({127.0F / 64 * (1 - 0x1p-20F), -127});
  o = run_emulation(q, k, below, options);
  EXPECT_NEAR(o.out[0], 127 * (code - 255) / (255 * std::exp(3.0) + 255), 1e-3);
  options.normalizer = Normalizer::kFloat;
  o = run_emulation(q, k, v, options);
  EXPECT_NEAR(o.out[0], 127 * (code - 255) / (255 * std::exp(3.0) + 255), 1e-3);
  EXPECT_NEAR(o.lse[0], 3 + std::log1p(std::exp(-3)), 1e-5);
}

// A zero V token with most of the mass: it must not use up the range of P, and must count in l.
TEST(Emulation, ZeroValueTokens) {
  EmulationOptions options = accurate_options(false);
  options.softmax_scale = 1.0F;
  options.smooth_k = false;
  const Output o =
      run_emulation(column({1}), column({1, 0, -1}), column({0, 1.27F, 0.64F}), options);
  const double code = std::nearbyint(255 * std::exp(-1) * 64 / 127);
  const double l = 255 * (std::exp(1) + 1 + std::exp(-1));
  // The scale of the zeros, 1, is not the reference of the others, 0.01 and below.
  // What rounding took, of the zero token (2^-20 of the scale) and of the last, counts at the mean.
  const double residual = 255 * std::exp(1) * 0x1p-20 + 255 * std::exp(-1) * 64 / 127 - code;
  const double mean = 1.27 * 2 / 3;
  EXPECT_NEAR(o.out[0], (255 * 1.27 + code * 1.27 + residual * mean) / l, 1e-6);
  EXPECT_NEAR(o.lse[0], std::log(std::exp(1) + 1 + std::exp(-1)), 1e-6);
  options.residual_mean = false;
  const Output without =
      run_emulation(column({1}), column({1, 0, -1}), column({0, 1.27F, 0.64F}), options);
  EXPECT_NEAR(without.out[0], (255 * 1.27 + code * 1.27) / l, 1e-6);
  options.residual_mean = true;
  const Output zeros = run_emulation(column({1}), column({8, 0}), column({0, 0}), options);
  EXPECT_EQ(zeros.out[0], 0);
  EXPECT_NEAR(zeros.lse[0], 8 + std::log1p(std::exp(-8)), 1e-5);
}

// Of two causal rows only the last one sees the whole block: the other must not learn its mean.
TEST(Emulation, ResidualOnlyWhereTheWholeBlockIsSeen) {
  EmulationOptions options = accurate_options(false);
  options.softmax_scale = 1.0F;
  options.smooth_k = false;
  options.mask.causal = true;
  const Tensor q = column({1, 1, 1}), k = column({0, -6.5F, -6.5F}), v = column({1, -1, 1});
  const Output with = run_emulation(q, k, v, options);
  options.residual_mean = false;
  const Output without = run_emulation(q, k, v, options);
  EXPECT_EQ(with.out[0], without.out[0]);
  EXPECT_EQ(with.out[1], without.out[1]);
  // Both small weights, 255 e^-6.5 = 0.38, round to 0; a third of V's mean is theirs.
  const double w = 255 * std::exp(-6.5);
  EXPECT_NEAR(with.out[2] - without.out[2], 2 * w / 3 / (255 + 2 * w), 1e-6);
}

TEST(Emulation, HalfRoundsPToBfloat16) {
  EmulationOptions options = mode_options(Mode::kHalf);
  options.softmax_scale = 1.0F;
  options.smooth_k = false;
  const Output o = run_emulation(column({1}), column({1, 0}), column({1, -1}), options);
  const double p = 0.3671875;  // bfloat16 of 0.36788
  EXPECT_NEAR(o.out[0], (1 - p) / (1 + std::exp(-1)), 1e-6);
}

TEST(Emulation, Fp8RoundsP) {
  EmulationOptions options = mode_options(Mode::kFp8);
  options.softmax_scale = 1.0F;
  Output o = run_emulation(column({1}), column({1, 0}), column({1, -1}), options);
  const double p = 96;  // e4m3 of 256 / e = 94.18, between 88 and 96
  EXPECT_NEAR(o.out[0], (256 - p) / (256 + 256 * std::exp(-1)), 1e-6);
  options.fp8_format = Fp8Format::kE5m2Raw;
  o = run_emulation(column({1}), column({1, 0}), column({1, -1}), options);
  // e5m2 of 1/e is 0.375; (1 - 0.375) / (1 + 1/e) = 0.4569, stored as 0.4375.
  EXPECT_EQ(o.out[0], 0.4375);
}

// The largest magnitude becomes 448: with a scale of 1, 17 lies between 16 and 18.
TEST(Emulation, Fp8ScalesByTheTensor) {
  EmulationOptions options = mode_options(Mode::kFp8);
  options.softmax_scale = 1.0F;
  const Output o = run_emulation(column({1}), column({0, 200}), column({448, 17}), options);
  EXPECT_NEAR(o.out[0], 16, 1e-9);
}

// A float V poisons the rows that see it, even where its weight vanishes, and no others.
TEST(Emulation, FloatValuesPoisonTheRowsThatSeeThem) {
  for (const auto format : {Fp8Format::kE4m3Tensor, Fp8Format::kE5m2Raw}) {
    for (const Mode mode : {Mode::kHalf, Mode::kFp8}) {
      EmulationOptions options = mode_options(mode);
      options.softmax_scale = 1.0F;
      options.fp8_format = format;
      options.mask.causal = true;
      const Output o = run_emulation(column({1, 1}), column({1000, 0}), column({1, kNan}), options);
      EXPECT_TRUE(std::isnan(o.out[1]));
      EXPECT_TRUE(std::isnan(o.lse[1]));
      EXPECT_TRUE(std::isfinite(o.lse[0]));
      // One scale for the whole head: its NaN reaches the first row too.
      const bool one_scale = mode == Mode::kFp8 && format == Fp8Format::kE4m3Tensor;
      EXPECT_EQ(std::isnan(o.out[0]), one_scale);
    }
  }
}

// Smoothing and the mean of a quantized K change the LSE by what they took away, the output not.
TEST(Emulation, SmoothingKeepsTheResult) {
  const Extents shape = {1, 200, 2, 64};
  const Tensor q = random_tensor(shape, 1), v = random_tensor(shape, 3);
  Tensor k = random_tensor(shape, 2);
  for (size_t i = 0; i < k.values.size(); ++i) k.values[i] += i % 64 < 6 ? 9.0F : 0.0F;
  const Output exact = run_exact(q, k, v);
  for (const bool score_grid : {false, true}) {
    EmulationOptions options = accurate_options(score_grid);
    const Output smooth = run_emulation(q, k, v, options);
    options.smooth_k = false;
    const Output plain = run_emulation(q, k, v, options);
    EXPECT_LT(rel_l2(smooth, exact), 0.6 * rel_l2(plain, exact));
    EXPECT_LT(error_report(smooth.lse, exact.lse).max_abs, 0.02);
  }
}

// Quantized by hand, with the mean kept, a call gives what it gives for floats.
TEST(Emulation, QuantizedOperandsEqualFloatOnes) {
  const int64_t seqlen = 70, heads = 2, dim = 5;
  const Extents shape = {1, seqlen, heads, dim};
  const Tensor q = random_tensor(shape, 1), k = random_tensor(shape, 2),
               v = random_tensor(shape, 3);
  for (const auto granularity : {Granularity::kToken, Granularity::kTensor, Granularity::kChannel,
                                 Granularity::kBlock, Granularity::kBlockChannel}) {
    // Codes and scales with the memory order [head, seq], the channels two apart.
    struct Store {
      std::vector<int8_t> codes;
      Tensor scale = Tensor({0, 0, 0, 0});
      Tensor mean = Tensor({0, 0, 0, 0});
      QuantizedView view;
    };
    const auto quantize_tensor = [&](const Tensor& x, const QuantSpec& spec, bool smooth) {
      Store store;
      store.codes.assign(static_cast<size_t>(heads * seqlen * dim * 2), 99);
      const bool by_channel = spec.granularity == Granularity::kChannel ||
                              spec.granularity == Granularity::kBlockChannel;
      const int64_t width = by_channel ? dim : 1;
      const int64_t groups = group_count(spec, dim, seqlen) / width;
      store.scale = Tensor({1, groups, heads, width});
      store.mean = Tensor({1, 1, heads, dim});
      for (int64_t h = 0; h < heads; ++h) {
        Tokens tokens = gather(x.view(), 0, h, 0, seqlen);
        if (smooth) {
          const std::vector<float> mean = channel_mean(tokens);
          for (int64_t d = 0; d < dim; ++d) {
            store.mean.at(0, 0, h, d) = mean[static_cast<size_t>(d)];
            for (int64_t j = 0; j < seqlen; ++j) tokens.token(j)[d] -= store.mean.at(0, 0, h, d);
          }
        }
        const Quantized quantized = quantize_tokens(tokens, spec, seqlen);
        for (int64_t j = 0; j < seqlen; ++j) {
          for (int64_t d = 0; d < dim; ++d) {
            store.codes[static_cast<size_t>(((h * seqlen + j) * dim + d) * 2)] =
                static_cast<int8_t>(quantized.codes.token(j)[d]);
          }
        }
        for (int64_t group = 0; group < groups; ++group) {
          for (int64_t d = 0; d < width; ++d) {
            store.scale.at(0, group, h, d) =
                static_cast<float>(quantized.scale[static_cast<size_t>(group * width + d)]);
          }
        }
      }
      store.view.codes = {
          store.codes.data(), DType::kInt8, {}, shape, {0, 2 * dim, 2 * dim * seqlen, 2}};
      store.view.scale = store.scale.view();
      store.view.spec = spec;
      if (smooth) store.view.mean = store.mean.view();
      return store;
    };
    const Store k8 = quantize_tensor(k, {}, true);
    const Store v8 = quantize_tensor(v, {granularity, 64}, false);
    const Store q8 = quantize_tensor(q, {}, false);
    for (const bool score_grid : {false, true}) {
      EmulationOptions options = accurate_options(score_grid);
      options.kv_block = 64;
      options.v_granularity = granularity;
      const Output wanted = run_emulation(q, k, v, options);
      ASSERT_TRUE(wanted.status.ok());
      const Output mixed = run_emulation({q.view(), k8.view, v8.view}, shape, options);
      ASSERT_TRUE(mixed.status.ok()) << mixed.status.message();
      EXPECT_EQ(mixed.out, wanted.out);
      EXPECT_EQ(mixed.lse, wanted.lse);
      const Output all = run_emulation({q8.view, k8.view, v8.view}, shape, options);
      ASSERT_TRUE(all.status.ok()) << all.status.message();
      EXPECT_EQ(all.out, wanted.out);
      EXPECT_NEAR(all.lse[0], wanted.lse[0], 1e-2);  // the mean meets the rounded q
    }
  }
}

TEST(Emulation, SampledRowsAndHeadsEqualAll) {
  const Tensor q = random_tensor({2, 9, 4, 16}, 1), k = random_tensor({2, 80, 2, 16}, 2),
               v = random_tensor({2, 80, 2, 16}, 3);
  for (EmulationOptions options : all_options()) {
    options.kv_block = 64;
    options.mask = {.causal = true};
    const Output all = run_emulation(q, k, v, options);
    Output some = allocate(q.shape, -99);
    const std::array<int64_t, 2> rows = {7, 2};
    ASSERT_TRUE(emulation({q.view(), k.view(), v.view()}, options, some.out, {}, {}, rows).ok());
    for (size_t i = 0; i < some.lse.size(); ++i) {
      const size_t position = i / 4 % 9;
      const bool sampled = position == 7 || position == 2;
      for (size_t d = 0; d < 16; ++d) {
        ASSERT_EQ(some.out[i * 16 + d], sampled ? all.out[i * 16 + d] : -99);
      }
    }
    // Heads 2 and 3 read kv head 1.
    const auto heads = [](const Tensor& x, int64_t first, int64_t count) {
      ConstTensorView view = x.view();
      view.data = x.values.data() + first * x.shape[3];
      view.shape[2] = count;
      return view;
    };
    const Output half =
        run_emulation({heads(q, 2, 2), heads(k, 1, 1), heads(v, 1, 1)}, {2, 9, 2, 16}, options);
    for (size_t row = 0; row < half.lse.size(); ++row) {
      EXPECT_EQ(half.lse[row], all.lse[row / 2 * 4 + 2 + row % 2]);
    }
  }
}

TEST(Emulation, RowsWithoutVisibleKey) {
  const Tensor q = random_tensor({1, 5, 1, 4}, 1), kv = random_tensor({1, 2, 1, 4}, 2);
  for (EmulationOptions options : all_options()) {
    options.mask = {.causal = true};
    const Output o = run_emulation(q, kv, kv, options);
    ASSERT_TRUE(o.status.ok());
    EXPECT_EQ(o.lse[2], -kInf);
    EXPECT_TRUE(std::isfinite(o.lse[3]));
    EXPECT_EQ(o.out[8], 0);
    EXPECT_EQ(o.bound[8], 0);
    EXPECT_NE(o.out[12], 0);
  }
}

// Keys that no query sees may hold anything: means and scales look past them. With a window of 10,
// three rows see keys [27, 40) from the bottom right and [0, 3) from the top left.
TEST(Emulation, InvisibleKeysChangeNothing) {
  const Tensor q = random_tensor({1, 3, 1, 8}, 1), k = random_tensor({1, 40, 1, 8}, 2),
               v = random_tensor({1, 40, 1, 8}, 3);
  for (EmulationOptions options : all_options()) {
    for (const auto granularity : {Granularity::kToken, Granularity::kTensor}) {
      for (const auto align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
        options.v_granularity = granularity;
        options.kv_block = 16;
        options.mask = {.causal = true, .align = align, .window_left = 10};
        const Output wanted = run_emulation(q, k, v, options);
        ASSERT_TRUE(std::isfinite(wanted.out[0]));
        const int64_t neighbour = align == CausalAlign::kBottomRight ? 26 : 3;
        Tensor k_other = k, v_other = v;
        for (int64_t d = 0; d < 8; ++d) {
          k_other.at(0, neighbour, 0, d) = kNan;
          v_other.at(0, neighbour, 0, d) = 1e6F;
          k_other.at(0, 20, 0, d) = -1e6F;
          v_other.at(0, 20, 0, d) = kNan;
        }
        const Output got = run_emulation(q, k_other, v_other, options);
        EXPECT_EQ(got.out, wanted.out);
        EXPECT_EQ(got.lse, wanted.lse);
        EXPECT_EQ(got.bound, wanted.bound);
      }
    }
  }
}

TEST(Emulation, PoisonReachesTheRowsThatSeeIt) {
  const Extents shape = {1, 4, 2, 3};
  const Tensor x = random_tensor(shape, 1);
  Tensor bad = x;
  bad.at(0, 2, 0, 1) = kNan;
  Tensor infinite = x;
  infinite.at(0, 2, 0, 1) = std::numeric_limits<float>::infinity();
  const auto row_is_nan = [](const Output& o, size_t i, size_t h) {
    return std::isnan(o.out[(i * 2 + h) * 3]) && std::isnan(o.out[(i * 2 + h) * 3 + 2]);
  };
  for (const bool score_grid : {false, true}) {
    EmulationOptions options = accurate_options(score_grid);
    options.mask = {.causal = true};
    for (const Tensor& poisoned : {bad, infinite}) {
      for (const bool smooth : {false, true}) {
        options.smooth_k = smooth;
        const Output by_q = run_emulation(poisoned, x, x, options);
        const Output by_k = run_emulation(x, poisoned, x, options);
        const Output by_v = run_emulation(x, x, poisoned, options);
        for (size_t i = 0; i < 4; ++i) {
          EXPECT_EQ(row_is_nan(by_q, i, 0), i == 2);
          EXPECT_EQ(std::isnan(by_q.lse[i * 2]), i == 2);
          EXPECT_EQ(row_is_nan(by_k, i, 0), i >= 2);
          EXPECT_EQ(std::isnan(by_k.lse[i * 2]), i >= 2);
          EXPECT_EQ(row_is_nan(by_v, i, 0), i >= 2);
          for (const Output* o : {&by_q, &by_k, &by_v}) {
            EXPECT_TRUE(std::isfinite(o->out[(i * 2 + 1) * 3]));
            EXPECT_TRUE(std::isfinite(o->lse[i * 2 + 1]));
          }
        }
      }
    }
    options.v_granularity = Granularity::kTensor;
    const Output by_tensor = run_emulation(x, x, bad, options);
    EXPECT_TRUE(row_is_nan(by_tensor, 0, 0) && row_is_nan(by_tensor, 3, 0));
    EXPECT_TRUE(std::isfinite(by_tensor.out[3]));
    options.v_granularity = Granularity::kBlock;
    options.kv_block = 2;
    const Output by_block = run_emulation(x, x, bad, options);
    EXPECT_TRUE(std::isfinite(by_block.out[0]) && std::isfinite(by_block.out[6]));
    EXPECT_TRUE(row_is_nan(by_block, 2, 0));
  }
}

// Scores beyond float32 saturate: those above the range are equal, those below weigh nothing.
TEST(Emulation, ScoresSaturate) {
  for (EmulationOptions options : all_options()) {
    if (options.mode == Mode::kFp8) continue;  // its scores are not float32
    options.softmax_scale = 1.0F;
    options.smooth_k = false;
    const Output o =
        run_emulation(column({1e30F}), column({1e30F, -1e30F, 1e31F}), column({5, 5, -5}), options);
    EXPECT_EQ(o.out[0], 0);
    EXPECT_LT(o.bound[0], 1e-4);
    EXPECT_TRUE(std::isfinite(o.lse[0]));
  }
}

// One key far above the others decides, however coarse float32 is up there.
TEST(Emulation, BoundKnowsThatALoneMaximumIsExact) {
  EmulationOptions options = accurate_options(false);
  options.softmax_scale = 1.0F;
  options.smooth_k = false;
  options.kv_block = 2;
  const Output o =
      run_emulation(column({1e4F}), column({3, 1e4F, 2e4F, -1}), column({1, 2, 3, 4}), options);
  EXPECT_NEAR(o.out[0], 3, 1e-5);
  EXPECT_LT(o.bound[0], 1e-5);
  // Two keys closer than the rounding of their scores: anything may come out, and the bound says
  // so.
  const Output tie = run_emulation(column({1e4F}), column({2e4F, 2e4F}), column({1, 3}), options);
  EXPECT_GT(tie.bound[0], 0.5);
}

// Targets of the study at 2k tokens of N(0, 1), with the same inputs for every mode.
TEST(Emulation, QualityOnNormalData) {
  const int64_t seqlen_k = 2048, dim = 64;
  const Tensor q = random_tensor({1, 16, 1, dim}, 1), k = random_tensor({1, seqlen_k, 1, dim}, 2),
               v = random_tensor({1, seqlen_k, 1, dim}, 3);
  const Output exact = run_exact(q, k, v);
  const double accurate = rel_l2(run_emulation(q, k, v, mode_options(Mode::kAccurate)), exact);
  const double half = rel_l2(run_emulation(q, k, v, mode_options(Mode::kHalf)), exact);
  const double paper = rel_l2(run_emulation(q, k, v, mode_options(Mode::kPaper)), exact);
  const double e4m3 = rel_l2(run_emulation(q, k, v, mode_options(Mode::kFp8)), exact);
  EmulationOptions options = mode_options(Mode::kFp8);
  options.fp8_format = Fp8Format::kE5m2Raw;
  const double e5m2 = rel_l2(run_emulation(q, k, v, options), exact);
  EXPECT_LT(half, 0.012);
  EXPECT_GT(half, 0.004);
  EXPECT_LT(accurate, 0.018);
  EXPECT_LT(half, accurate);
  EXPECT_LT(accurate, paper);
  EXPECT_LT(paper, 0.045);
  EXPECT_GT(e4m3, 0.04);
  EXPECT_LT(e4m3, 0.07);
  EXPECT_GT(e5m2, 1.5 * e4m3);

  options = accurate_options(false);
  const double token255 = rel_l2(run_emulation(q, k, v, options), exact);
  options.v_granularity = Granularity::kTensor;
  const double local255 = rel_l2(run_emulation(q, k, v, options), exact);
  options.p_scale = PScale::kRunningMax255;
  const double running255 = rel_l2(run_emulation(q, k, v, options), exact);
  options.p_scale = PScale::kRunningMax127;
  const double running127 = rel_l2(run_emulation(q, k, v, options), exact);
  EXPECT_LT(local255, running255);
  EXPECT_LT(running255, running127);
  EXPECT_LT(token255, local255);
}

TEST(Emulation, BlockLocalWinsMoreTheLongerTheSequence) {
  const auto errors = [](int64_t seqlen_k) {
    const Tensor q = random_tensor({1, 8, 1, 32}, 1), k = random_tensor({1, seqlen_k, 1, 32}, 2),
                 v = random_tensor({1, seqlen_k, 1, 32}, 3);
    const Output exact = run_exact(q, k, v);
    EmulationOptions options = accurate_options(false);
    options.v_granularity = Granularity::kTensor;
    options.kv_block = 128;
    const double local = rel_l2(run_emulation(q, k, v, options), exact);
    options.p_scale = PScale::kRunningMax255;
    return std::pair(local, rel_l2(run_emulation(q, k, v, options), exact));
  };
  const auto [local_short, running_short] = errors(512);
  const auto [local_long, running_long] = errors(16384);
  EXPECT_GT(running_long / local_long, running_short / local_short);
  EXPECT_GT(running_long, 1.2 * local_long);
}

TEST(Emulation, BadArgumentsNameThemselves) {
  const Tensor x({1, 4, 1, 2});
  Output o = allocate(x.shape);
  const auto message = [&](const AttentionInputs& inputs, const EmulationOptions& options) {
    const Status status = emulation(inputs, options, o.out, o.lse, o.bound);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  const AttentionInputs floats = {x.view(), x.view(), x.view()};
  EXPECT_EQ(message(floats, mode_options(Mode::kExact)),
            "options.mode=exact must be accurate, paper, half or fp8");
  EmulationOptions options = mode_options(Mode::kAccurate);
  options.kv_block = 0;
  EXPECT_EQ(message(floats, options), "options.kv_block=0 must be positive");

  const std::vector<int8_t> codes(8, 1);
  const Tensor token_scale({1, 4, 1, 1}, 1), block_scale({1, 2, 1, 1}, 1);
  const auto quantized = [&](const Tensor& scale, const QuantSpec& spec) {
    return QuantizedView{bshd(static_cast<const void*>(codes.data()), DType::kInt8, x.shape),
                         scale.view(), spec, std::nullopt};
  };
  EXPECT_EQ(message({quantized(block_scale, {Granularity::kBlock, 2}), x.view(), x.view()},
                    mode_options(Mode::kAccurate)),
            "q.spec.granularity must be token");
  options.kv_block = 128;
  EXPECT_EQ(
      message({x.view(), x.view(), quantized(block_scale, {Granularity::kBlock, 2})}, options),
      "v.spec.block=2 must equal options.kv_block=128");
  EXPECT_EQ(message({x.view(), x.view(), quantized(block_scale, {Granularity::kBlock, 0})},
                    mode_options(Mode::kAccurate)),
            "v.spec.block=0 must be positive");
  EXPECT_EQ(
      message({x.view(), x.view(), quantized(block_scale, {})}, mode_options(Mode::kAccurate)),
      "v.scale.shape=[1, 2, 1, 1] must be [1, 4, 1, 1]");
  EXPECT_EQ(message({x.view(), x.view(), quantized(token_scale, {})}, mode_options(Mode::kPaper)),
            "v.spec.granularity must be tensor in mode paper");
  EXPECT_EQ(message({x.view(), x.view(), quantized(token_scale, {})}, mode_options(Mode::kHalf)),
            "v must be float in modes half and fp8");
  EXPECT_EQ(message({quantized(token_scale, {}), x.view(), x.view()}, mode_options(Mode::kFp8)),
            "q and k must be float in mode fp8");
  Status status =
      emulation(floats, mode_options(Mode::kAccurate), o.out, {}, std::span(o.bound).first(2));
  EXPECT_EQ(status.message(), "out_bound.size()=2 must be 8");
}

}  // namespace
}  // namespace attn8::reference::testing
