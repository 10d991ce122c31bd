// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
// Vectors of 64 bytes are passed between functions of this file only.
#pragma GCC diagnostic ignored "-Wpsabi"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "core/kernel_table.hpp"
#include "core/packed_layout.hpp"
#include "cpu/isa/simd_scalar.hpp"
#include "support/kernel_case.hpp"

// The exp2 of the kernels: on the scalar vocabulary directly, of which the vector ISAs give the
// same bits, and on each ISA through the softmax of two keys.

namespace attn8::scalar {
namespace {
#include "cpu/kernels/online_softmax-inl.hpp"
}  // namespace
}  // namespace attn8::scalar

namespace attn8::testing {
namespace {

template <int kDegree, int kScale>
float exp2_of(float x) {
  float lanes[16];
  scalar::store(lanes, scalar::exp2_scaled<kDegree, kScale>(scalar::broadcast(x)));
  for (const float lane : lanes) {
    EXPECT_EQ(std::bit_cast<uint32_t>(lane), std::bit_cast<uint32_t>(lanes[0]));
  }
  return lanes[0];
}

/// Largest relative error over [-126, 0] and where.
template <int kDegree, int kScale>
void expect_error_at_most(double bound) {
  double worst = 0;
  double at = 0;
  // Every 1499th float of the range (a prime: all low bits take part), in vectors of 16.
  const uint32_t first = std::bit_cast<uint32_t>(-0x1p-40f);
  const uint32_t last = std::bit_cast<uint32_t>(-126.0f);
  for (uint32_t bits = first; bits < last;) {
    float x[16];
    for (float& lane : x) {
      lane = std::bit_cast<float>(bits < last ? bits : last);
      bits += 1499;
    }
    float y[16];
    scalar::store(y, scalar::exp2_scaled<kDegree, kScale>(scalar::load(x)));
    for (int i = 0; i < 16; ++i) {
      const double wanted = kScale * std::exp2(static_cast<double>(x[i]));
      const double error = std::fabs(static_cast<double>(y[i]) - wanted) / wanted;
      if (!(error <= worst)) {
        worst = error;
        at = static_cast<double>(x[i]);
      }
    }
  }
  EXPECT_LE(worst, bound) << "degree " << kDegree << " scale " << kScale << " at " << at;
  EXPECT_GE(worst, bound / 16) << "the stated bound is far from what happens";
}

/// The errors stated where exp2_scaled() is defined.
TEST(Exp2, RelativeError) {
  expect_error_at_most<4, 127>(3.0e-6);
  expect_error_at_most<4, 255>(3.0e-6);
  expect_error_at_most<5, 1>(2.0e-7);
}

TEST(Exp2, IsExactAtIntegers) {
  for (int n = 0; n >= -126; --n) {
    const auto x = static_cast<float>(n);
    const double power = std::ldexp(1.0, n);
    EXPECT_EQ(static_cast<double>(exp2_of<5, 1>(x)), power) << n;
    EXPECT_EQ(static_cast<double>(exp2_of<4, 127>(x)), 127 * power) << n;
    EXPECT_EQ(static_cast<double>(exp2_of<4, 255>(x)), 255 * power) << n;
  }
  EXPECT_EQ((exp2_of<4, 255>(-0.0f)), 255.0f);
}

/// Everything below -126, minus infinity included, counts as -126; a NaN stays one.
TEST(Exp2, EndsOfTheRange) {
  for (const float x : {-126.0f, -126.00001f, -127.0f, -1e10f, -std::numeric_limits<float>::max(),
                        -std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ((exp2_of<5, 1>(x)), 0x1p-126f) << x;
    EXPECT_EQ((exp2_of<4, 255>(x)), 255 * 0x1p-126f) << x;
  }
  EXPECT_TRUE(std::isnan((exp2_of<5, 1>(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isnan((exp2_of<4, 127>(std::numeric_limits<float>::quiet_NaN()))));
}

/// Close to 0 the polynomial may round up, but never to the next code: codes stay within 8 bits.
TEST(Exp2, NeverExceedsTheTop) {
  for (int i = 0; i < 200000; ++i) {
    const auto x = static_cast<float>(-i * 0x1p-24);
    ASSERT_LE((exp2_of<4, 255>(x)), 255.0005f) << x;
    ASSERT_LE((exp2_of<4, 127>(x)), 127.0003f) << x;
  }
}

class Exp2OfIsa : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(Exp2OfIsa);

/// Two keys with scores 0 and x, V 0 and 1: the output is 2^x / (1 + 2^x) in log2 units. Enough
/// (batch) copies of the pair for every x; float32 scores, degree 5.
TEST_P(Exp2OfIsa, SoftmaxOfTwoKeys) {
  constexpr int64_t kCount = 4000;
  Tensor q(DType::kFloat32, {kCount, 1, 1, 1});
  Tensor k(DType::kFloat32, {kCount, 2, 1, 1});
  Tensor v(DType::kFloat32, {kCount, 2, 1, 1});
  Tensor out(DType::kFloat32, {kCount, 1, 1, 1});
  Tensor lse(DType::kFloat32, {kCount, 1, 1, 1});
  q.fill([](int64_t, int64_t, int64_t, int64_t) { return 1; });
  k.fill([](int64_t b, int64_t s, int64_t, int64_t) {
    return s == 0 ? 0.0 : -static_cast<double>(b) * 80 / kCount;
  });
  v.fill([](int64_t, int64_t s, int64_t, int64_t) { return s; });
  AttentionOptions options;
  options.mode = Mode::kExact;
  options.softmax_scale = 1.0f;
  const Status status = attention({q.view(), k.view(), v.view()}, {out.view(), lse.view()}, options,
                                  Context::with_isa(GetParam()));
  ASSERT_TRUE(status.ok()) << status.message();
  for (int64_t b = 0; b < kCount; ++b) {
    const double x = k.get(b, 1, 0, 0);
    const double weight = std::exp(x);
    // The score in log2 units is rounded twice (log2 e and the product): 2 * 2^-24 of its size;
    // 2e-7 is exp2's error, which the sum and the division add 3 roundings to.
    const double bound = 2 * 0x1p-24 * std::fabs(x) + 2e-7 + 3 * 0x1p-24;
    ASSERT_NEAR(out.get(b, 0, 0, 0), weight / (1 + weight), bound * weight / (1 + weight)) << x;
    ASSERT_NEAR(lse.get(b, 0, 0, 0), std::log1p(weight), 4e-7) << x;
  }
}

/// The codes of P: of two keys, the one at the maximum with V 0 and the other with V 1, so that the
/// output is code / (127 + code).
TEST_P(Exp2OfIsa, CodesOfTwoKeys) {
  constexpr int64_t kCount = 2000;
  Tensor q(DType::kFloat32, {kCount, 1, 1, 1});
  q.fill([](int64_t, int64_t, int64_t, int64_t) { return 127; });
  Tensor k(DType::kFloat32, {kCount, 2, 1, 1});
  k.fill([](int64_t b, int64_t s, int64_t, int64_t) {
    return s == 0 ? 0.0 : -static_cast<double>(b + 1) * 10 / kCount;
  });
  Tensor v(DType::kFloat32, {kCount, 2, 1, 1});
  v.fill([](int64_t, int64_t s, int64_t, int64_t) { return s; });
  Tensor out(DType::kFloat32, {kCount, 1, 1, 1});
  AttentionOptions options;
  options.mode = Mode::kPaper;
  options.softmax_scale = 1.0f / 127;
  const Status status = attention({q.view(), k.view(), v.view()}, {out.view()}, options,
                                  Context::with_isa(GetParam()));
  ASSERT_TRUE(status.ok()) << status.message();
  int checked = 0;
  for (int64_t b = 0; b < kCount; ++b) {
    const double weight = 127 * std::exp(k.get(b, 1, 0, 0));
    const double code = std::nearbyint(weight);
    // 127 * 3e-6 of exp2, and scores whose K scale has its low bits cleared.
    if (std::fabs(weight - std::floor(weight) - 0.5) < 1e-2) continue;
    ++checked;
    ASSERT_NEAR(out.get(b, 0, 0, 0), code / (127 + code), 1e-5) << b;
  }
  EXPECT_GT(checked, kCount * 9 / 10);
}

}  // namespace
}  // namespace attn8::testing
