// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
// Vectors of 64 bytes are passed between functions of this file only.
#pragma GCC diagnostic ignored "-Wpsabi"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <vector>

#include "core/kernel_table.hpp"
#include "core/packed_layout.hpp"
#include "cpu/isa/simd_scalar.hpp"
#include "support/kernel_case.hpp"

// The score grid of `accurate`: on the scalar vocabulary directly, and on each ISA through the
// softmax of two keys.

namespace attn8::scalar {
namespace {
#include "cpu/kernels/score_grid-inl.hpp"
}  // namespace
}  // namespace attn8::scalar

namespace attn8::testing {
namespace {

/// y of docs/numerics.md, from its formula.
int64_t expected_weight(uint32_t d) {
  if (d >= 1024) return 0;
  return std::llround(65280 * std::exp2(-static_cast<double>(d % 64) / 64)) >> (d / 64);
}

TEST(ScoreGrid, WeightsAreTheFormulas) {
  for (uint32_t d = 0; d < 70000; d += d < 2000 ? 1 : 997) {
    int32_t lanes[16];
    scalar::store(lanes, scalar::grid_weight(scalar::broadcast_i32(static_cast<int32_t>(d))));
    ASSERT_EQ(lanes[3], expected_weight(d)) << d;
  }
  int32_t lanes[16];
  scalar::store(lanes, scalar::grid_weight(scalar::broadcast_i32(-1)));  // as unsigned: far away
  EXPECT_EQ(lanes[0], 0);
}

TEST(ScoreGrid, PowersAreCorrectlyRounded) {
  for (int n = -100 * 64; n <= 60 * 64; ++n) {
    const auto wanted = static_cast<float>(std::exp2(n % 64 / 64.0 + n / 64));
    ASSERT_EQ(scalar::grid_power(n), wanted) << n;
  }
  EXPECT_EQ(scalar::grid_power(-100 * 64 - 1), 0.0f);
  EXPECT_EQ(scalar::grid_power(-1000000000), 0.0f);
}

TEST(ScoreGrid, ReferencesMoveInWholeOctavesOnly) {
  int32_t ref = scalar::kNoReference;
  float weight = -1;
  float rescale = -1;
  scalar::advance_reference(scalar::kHiddenScore, &ref, &weight, &rescale);
  EXPECT_EQ(ref, scalar::kNoReference);
  EXPECT_EQ(weight, 0.0f);
  EXPECT_EQ(rescale, 1.0f);
  scalar::advance_reference(-65, &ref, &weight, &rescale);
  EXPECT_EQ(ref, -128);
  EXPECT_EQ(weight, static_cast<float>(std::exp2(63 / 64.0)));
  scalar::advance_reference(-128 + 60 * 64, &ref, &weight, &rescale);
  EXPECT_EQ(ref, -128);
  EXPECT_EQ(rescale, 1.0f);
  EXPECT_EQ(weight, 0x1p60f);
  scalar::advance_reference(-128 + 60 * 64 + 1, &ref, &weight, &rescale);
  EXPECT_EQ(ref, -128 + 60 * 64);
  EXPECT_EQ(rescale, 0x1p-60f);
  scalar::advance_reference(1 << 30, &ref, &weight, &rescale);
  EXPECT_EQ(ref, 1 << 30);
  EXPECT_EQ(rescale, 0.0f);
}

class GridWeights : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(GridWeights);

/// Two keys whose scores lie d / 64 octaves apart, for every d up to where the weight is 0: the
/// denominator, and so the LSE, tells y to the last bit.
TEST_P(GridWeights, EveryDistance) {
  constexpr int64_t kQueries = 1040;
  // q . k is 127 code for key 0 and 0 for key 1; the scale of query i puts the product at i / 64.
  KernelCase c;
  c.seqlen_q = kQueries;
  c.seqlen_k = 2;
  c.head_dim = 16;
  c.options.smooth_k = false;
  c.options.softmax_scale = 1.0f;
  KernelInputs inputs = make_inputs(c);
  for (int64_t i = 0; i < kQueries; ++i) {
    for (int64_t d = 0; d < 16; ++d) {
      inputs.q.set(0, i, 0, d, d == 0 ? static_cast<double>(i) / 64 / std::numbers::log2e : 0);
    }
  }
  for (int64_t d = 0; d < 16; ++d) {
    inputs.k.set(0, 0, 0, d, d == 0 ? 1 : 0);
    inputs.k.set(0, 1, 0, d, 0);
    inputs.v.set(0, 0, 0, d, 1);
    inputs.v.set(0, 1, 0, d, 1);
  }
  const KernelResult result = run_kernel(c, inputs.operands(), GetParam());
  for (int64_t i = 0; i < kQueries; ++i) {
    const int64_t y = expected_weight(static_cast<uint32_t>(i));
    const int64_t sum = (65280 + 1) / 2 + (y + 1) / 2;
    const double wanted = std::log(static_cast<double>(sum) * 256 / (255.0 * 32768)) +
                          static_cast<double>(i) / 64 * std::numbers::ln2;
    ASSERT_NEAR(result.lse.get(0, i, 0, 0), wanted, 2e-6 * (1 + wanted)) << "d " << i;
  }
}

}  // namespace
}  // namespace attn8::testing
