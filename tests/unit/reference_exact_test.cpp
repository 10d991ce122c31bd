// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "reference_tensor.hpp"

namespace attn8::reference::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

Tensor make(const Extents& shape, std::vector<float> values) {
  Tensor tensor(shape);
  EXPECT_EQ(tensor.values.size(), values.size());
  tensor.values = std::move(values);
  return tensor;
}

TEST(ExactAttention, TwoKeysByHand) {
  const Tensor q = make({1, 1, 1, 1}, {1});
  const Tensor k = make({1, 2, 1, 1}, {0, std::log(3.0F)});
  const Tensor v = make({1, 2, 1, 1}, {4, 8});
  const Output o = run_exact(q, k, v, {}, 1.0F);
  ASSERT_TRUE(o.status.ok()) << o.status.message();
  EXPECT_NEAR(o.out[0], 0.25 * 4 + 0.75 * 8, 1e-6);
  EXPECT_NEAR(o.lse[0], std::log(4.0), 1e-6);
}

TEST(ExactAttention, DefaultScaleIsOneOverRootOfHeadDim) {
  const Tensor q = make({1, 1, 1, 4}, {1, 1, 1, 1});
  const Tensor k = make({1, 1, 1, 4}, {1, 2, 3, 4});
  const Tensor v = make({1, 1, 1, 4}, {5, 6, 7, 8});
  const Output o = run_exact(q, k, v);
  EXPECT_NEAR(o.lse[0], 10.0 / 2.0, 1e-12);
  EXPECT_EQ(o.out, (std::vector<double>{5, 6, 7, 8}));
}

TEST(ExactAttention, EqualLogitsGiveTheMeanOfVisibleValues) {
  const Tensor q = random_tensor({1, 3, 1, 2}, 1);
  const Tensor k({1, 5, 1, 2});
  const Tensor v = make({1, 5, 1, 2}, {1, 10, 2, 20, 3, 30, 4, 40, 5, 50});
  const Output bottom = run_exact(q, k, v, {.causal = true});
  EXPECT_NEAR(bottom.out[0], 2, 1e-12);    // row 0 sees keys 0, 1, 2
  EXPECT_NEAR(bottom.out[2], 2.5, 1e-12);  // row 1 sees keys 0 .. 3
  EXPECT_NEAR(bottom.out[5], 30, 1e-12);   // row 2 sees all
  EXPECT_NEAR(bottom.lse[1], std::log(4.0), 1e-12);
  const Output top = run_exact(q, k, v, {.causal = true, .align = CausalAlign::kTopLeft});
  EXPECT_NEAR(top.out[0], 1, 1e-12);
  EXPECT_NEAR(top.out[5], 20, 1e-12);
}

TEST(ExactAttention, HugeScoresPickOneKey) {
  const Tensor q = make({1, 1, 1, 1}, {1e19F});
  const Tensor k = make({1, 3, 1, 1}, {-1e19F, 1e19F, 0});
  const Tensor v = make({1, 3, 1, 1}, {1, 2, 3});
  const Output o = run_exact(q, k, v, {}, 1.0F);
  EXPECT_EQ(o.out[0], 2);
  EXPECT_NEAR(o.lse[0], 1e38, 1e32);
}

// Every mask on every pair of small lengths, against weights computed from the boolean matrix.
TEST(ExactAttention, Masks) {
  for (const int64_t seqlen_q : {1, 2, 3, 5}) {
    for (const int64_t seqlen_k : {1, 2, 4, 6}) {
      const Tensor q = random_tensor({1, seqlen_q, 1, 3}, 7);
      Tensor k = random_tensor({1, seqlen_k, 1, 3}, 8), v = random_tensor({1, seqlen_k, 1, 3}, 9);
      Tensor query = q;
      for (const bool causal : {false, true}) {
        for (const auto align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
          for (const int64_t left : {INT64_C(-1), INT64_C(0), INT64_C(2), INT64_MAX}) {
            for (const int64_t right : {INT64_C(-1), INT64_C(0), INT64_C(1), INT64_MAX}) {
              const Mask mask = {causal, align, left, right};
              const Output o = run_exact(q, k, v, mask, 0.7F);
              ASSERT_TRUE(o.status.ok());
              for (int64_t i = 0; i < seqlen_q; ++i) {
                double l = 0;
                std::array<double, 3> sum = {};
                for (int64_t j = 0; j < seqlen_k; ++j) {
                  // The clipped windows below stand for INT64_MAX without overflow.
                  const Mask clipped = {causal, align, std::min<int64_t>(left, 100),
                                        std::min<int64_t>(right, 100)};
                  if (!sees(clipped, seqlen_q, seqlen_k, i, j)) continue;
                  double s = 0;
                  for (int64_t d = 0; d < 3; ++d) {
                    s += static_cast<double>(query.at(0, i, 0, d)) * k.at(0, j, 0, d);
                  }
                  const double p = std::exp(static_cast<double>(0.7F) * s);
                  l += p;
                  for (int64_t d = 0; d < 3; ++d) {
                    sum[static_cast<size_t>(d)] += p * v.at(0, j, 0, d);
                  }
                }
                const auto row = static_cast<size_t>(i);
                for (size_t d = 0; d < 3; ++d) {
                  const double wanted = l > 0 ? sum[d] / l : 0;
                  ASSERT_NEAR(o.out[row * 3 + d], wanted, 1e-12)
                      << "seqlen_q=" << seqlen_q << " seqlen_k=" << seqlen_k << " i=" << i
                      << " causal=" << causal << " left=" << left << " right=" << right;
                }
                if (l > 0) {
                  ASSERT_NEAR(o.lse[row], std::log(l), 1e-12);
                } else {
                  ASSERT_EQ(o.lse[row], -kInf);
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(ExactAttention, QueryHeadsReadTheirKvHead) {
  const int64_t seqlen = 5, dim = 4;
  const Tensor q = random_tensor({2, seqlen, 6, dim}, 1);
  const Tensor k = random_tensor({2, seqlen, 2, dim}, 2);
  const Tensor v = random_tensor({2, seqlen, 2, dim}, 3);
  const Output all = run_exact(q, k, v, {.causal = true});
  for (int64_t h = 0; h < 6; ++h) {
    const auto head = [](const Tensor& x, int64_t index) {
      ConstTensorView view = x.view();
      view.data = x.values.data() + index * x.shape[3];
      view.shape[2] = 1;
      return view;
    };
    Output one = allocate({2, seqlen, 1, dim});
    ASSERT_TRUE(exact_attention(head(q, h), head(k, h / 3), head(v, h / 3), std::nullopt,
                                {.causal = true}, one.out, one.lse)
                    .ok());
    for (size_t row = 0; row < one.lse.size(); ++row) {
      const size_t wide = row * 6 + static_cast<size_t>(h);
      EXPECT_EQ(one.lse[row], all.lse[wide]);
      for (size_t d = 0; d < 4; ++d) EXPECT_EQ(one.out[row * 4 + d], all.out[wide * 4 + d]);
    }
  }
}

// float16 and bfloat16 hold these values exactly, so every layout gives the same bits.
TEST(ExactAttention, TypesAndStrides) {
  const Extents shape = {1, 4, 2, 3};
  Tensor x(shape);
  for (size_t i = 0; i < x.values.size(); ++i) {
    x.values[i] = (static_cast<float>(i) - 11.0F) * 0.125F;
  }
  const Output wanted = run_exact(x, x, x);

  // Reversed in sequence and channel, gaps between channels, bfloat16.
  std::vector<uint16_t> bfloat16(4 * 2 * 3 * 2, 0x7FC1);
  std::vector<uint16_t> float16(4 * 2 * 3);
  for (int64_t s = 0; s < 4; ++s) {
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t d = 0; d < 3; ++d) {
        const float value = x.at(0, s, h, d);
        const auto reversed = static_cast<size_t>(((3 - s) * 2 + h) * 6 + 2 * (2 - d));
        bfloat16[reversed] = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
        // value = n / 8 with |n| < 2048: binary16 n * 2^-3 by its fields.
        const int n = static_cast<int>(std::abs(value) * 8);
        uint16_t half = 0;
        if (n != 0) {
          const int exponent = std::bit_width(static_cast<unsigned>(n)) - 1;
          half =
              static_cast<uint16_t>(((exponent - 3 + 15) << 10) | ((n << (10 - exponent)) & 0x3FF));
        }
        if (value < 0) half |= 0x8000;
        float16[static_cast<size_t>((h * 4 + s) * 3 + d)] = half;
      }
    }
  }
  const ConstTensorView reversed(bfloat16.data() + (3 * 2 * 6) + 4, DType::kBFloat16, {}, shape,
                                 {0, -12, 6, -2});
  const ConstTensorView by_head =
      bhsd(static_cast<const void*>(float16.data()), DType::kFloat16, shape);
  Output got = allocate(shape);
  ASSERT_TRUE(
      exact_attention(reversed, by_head, x.view(), std::nullopt, {}, got.out, got.lse).ok());
  EXPECT_EQ(got.out, wanted.out);
  EXPECT_EQ(got.lse, wanted.lse);
}

TEST(ExactAttention, SampledRowsEqualAllRowsAndTouchNothingElse) {
  const Tensor q = random_tensor({2, 6, 2, 3}, 4), k = random_tensor({2, 7, 1, 3}, 5),
               v = random_tensor({2, 7, 1, 3}, 6);
  const Output all = run_exact(q, k, v, {.causal = true});
  Output some = allocate(q.shape, -99);
  const std::array<int64_t, 2> rows = {4, 1};
  ASSERT_TRUE(exact_attention(q.view(), k.view(), v.view(), std::nullopt, {.causal = true},
                              some.out, some.lse, rows)
                  .ok());
  for (size_t i = 0; i < some.lse.size(); ++i) {
    const size_t position = i / 2 % 6;
    const bool sampled = position == 4 || position == 1;
    EXPECT_EQ(some.lse[i], sampled ? all.lse[i] : -99);
    EXPECT_EQ(some.out[i * 3 + 1], sampled ? all.out[i * 3 + 1] : -99);
  }
}

TEST(ExactAttention, NanReachesTheRowsThatSeeIt) {
  Tensor q = random_tensor({1, 4, 1, 2}, 1), k = random_tensor({1, 4, 1, 2}, 2),
         v = random_tensor({1, 4, 1, 2}, 3);
  k.at(0, 2, 0, 1) = std::numeric_limits<float>::quiet_NaN();
  const Output o = run_exact(q, k, v, {.causal = true});
  EXPECT_TRUE(std::isfinite(o.out[3]) && std::isfinite(o.lse[1]));
  EXPECT_TRUE(std::isnan(o.out[4]) && std::isnan(o.lse[2]));
  EXPECT_TRUE(std::isnan(o.out[7]) && std::isnan(o.lse[3]));
}

TEST(ExactAttention, EmptyShapes) {
  const Output no_keys =
      run_exact(random_tensor({1, 2, 1, 3}, 1), Tensor({1, 0, 1, 3}), Tensor({1, 0, 1, 3}));
  ASSERT_TRUE(no_keys.status.ok());
  EXPECT_EQ(no_keys.out, std::vector<double>(6, 0.0));
  EXPECT_EQ(no_keys.lse, std::vector<double>(2, -kInf));
  EXPECT_TRUE(
      run_exact(Tensor({0, 2, 1, 3}), Tensor({0, 2, 1, 3}), Tensor({0, 2, 1, 3})).status.ok());
  EXPECT_TRUE(
      run_exact(Tensor({1, 0, 1, 3}), Tensor({1, 2, 1, 3}), Tensor({1, 2, 1, 3})).status.ok());
}

TEST(ExactAttention, BadArgumentsNameThemselves) {
  const Tensor q({1, 2, 4, 3}), k({1, 5, 2, 3});
  const auto message = [&](const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                           const Mask& mask = {}, std::optional<float> scale = std::nullopt) {
    const Output o = run_exact(q_in, k_in, v_in, mask, scale);
    EXPECT_EQ(o.status.code(), StatusCode::kInvalidArgument);
    return o.status.message();
  };
  EXPECT_EQ(message(q, Tensor({1, 5, 3, 3}), k), "k.shape[2]=3 must divide q.shape[2]=4");
  EXPECT_EQ(message(q, k, Tensor({1, 4, 2, 3})), "v.shape=[1, 4, 2, 3] must be [1, 5, 2, 3]");
  EXPECT_EQ(message(q, Tensor({2, 5, 2, 3}), k), "k.shape=[2, 5, 2, 3] must be [1, 5, 2, 3]");
  EXPECT_EQ(message(Tensor({1, 1, 1, 257}), k, k), "q.shape[3]=257 must be in [1, 256]");
  EXPECT_EQ(message(q, k, k, {.window_left = -2}), "mask.window_left=-2 must be -1 or more");
  EXPECT_EQ(message(q, k, k, {}, std::numeric_limits<float>::infinity()),
            "softmax_scale must be finite");

  Output o = allocate(q.shape);
  const auto run = [&](const ConstTensorView& q_view, std::span<double> out, std::span<double> lse,
                       Rows rows) {
    return exact_attention(q_view, k.view(), k.view(), std::nullopt, {}, out, lse, rows).message();
  };
  EXPECT_EQ(run(q.view(), std::span(o.out).first(3), o.lse, {}), "out.size()=3 must be 24");
  EXPECT_EQ(run(q.view(), o.out, std::span(o.lse).first(3), {}), "lse.size()=3 must be 8");
  const std::array<int64_t, 2> rows = {0, 2};
  EXPECT_EQ(run(q.view(), o.out, o.lse, rows), "rows[1]=2 must be in [0, 2)");
  ConstTensorView bad = q.view();
  bad.data = nullptr;
  EXPECT_EQ(run(bad, o.out, o.lse, {}), "q.data=nullptr must hold data");
  bad = q.view();
  bad.dtype = DType::kInt8;
  EXPECT_EQ(run(bad, o.out, o.lse, {}),
            "q.dtype must be float32, float16 or bfloat16 when not quantized");
  bad = q.view();
  bad.shape[1] = -1;
  EXPECT_EQ(run(bad, o.out, o.lse, {}), "q.shape[1]=-1 must not be negative");
}

}  // namespace
}  // namespace attn8::reference::testing
