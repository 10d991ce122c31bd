// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda/attend_sm80.hpp"
#include "cuda/attend_sm90.hpp"
#include "emulator/packed_problem.hpp"

/// The attention kernels in the emulator against docs/numerics.md in float64.
namespace attn8::cuda::testing {
namespace {

using emulator::Async;

template <class Kernel>
emulator::Report run_kernel(const AttendParams& params, const Shape& shape, Async async,
                            unsigned seed) {
  emulator::Config config;
  config.threads = Kernel::kThreads;
  config.shared_bytes = Kernel::kSharedBytes;
  config.async = async;
  config.seed = seed;
  const int tiles = (shape.seqlen_q + Kernel::kRows - 1) / Kernel::kRows;
  return emulator::run(config, {tiles, shape.batch * shape.nheads_q, 1},
                       [&] { Kernel::run(params); });
}

template <class Kernel>
void check(const Shape& shape, Weights weights, Async async, float q_size = 1.0f) {
  SCOPED_TRACE(::testing::Message() << "async " << static_cast<int>(async));
  const Inputs inputs = random_inputs(shape, 17, q_size);
  const bool smooth = weights != Weights::kPaper;
  const Quantized quantized = quantize(inputs, weights, smooth, Kernel::kKvBlock);
  const Packed packed = pack(inputs, quantized);
  const Expected want = expected(shape, quantized, weights, Kernel::kKvBlock);
  std::vector<float> out;
  std::vector<float> lse;
  const AttendParams params = attend_params(shape, packed, out, lse);
  const emulator::Report report = run_kernel<Kernel>(params, shape, async, 5);
  ASSERT_TRUE(report.ok) << report.error;
  EXPECT_EQ(report.stats.ldmatrix_conflicts, 0u);
  double worst = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const double error = std::fabs(out[i] - want.out[i]);
    ASSERT_LE(error, want.bound[i])
        << "element " << i << ": got " << out[i] << ", want " << want.out[i];
    worst = std::max(worst, error);
  }
  const auto q_row = [&](size_t row) {
    const size_t batch = row / (static_cast<size_t>(shape.seqlen_q) * shape.nheads_q);
    const size_t head = batch * shape.nheads_q + row % shape.nheads_q;
    return head * packed.rows_q + row / shape.nheads_q % shape.seqlen_q;
  };
  for (size_t row = 0; row < lse.size(); ++row) {
    const double expect = want.lse[row] + packed.lse_shift[q_row(row)];
    if (std::isinf(want.lse[row])) {
      EXPECT_EQ(lse[row], -INFINITY);
    } else {
      ASSERT_NEAR(lse[row], expect, 2e-5 * (1 + std::fabs(expect))) << "row " << row;
    }
  }
}

template <class Kernel>
void check_all(const Shape& shape, Weights weights) {
  for (const Async async : {Async::kLate, Async::kEarly, Async::kRandom}) {
    check<Kernel>(shape, weights, async);
  }
}

// {batch, nheads_q, nheads_k, seqlen_q, seqlen_k, head_dim, causal, top_left, left, right}
const Shape kOdd = {1, 1, 1, 33, 300, 64, false, false, -1, -1};
const Shape kCausal = {1, 2, 1, 70, 333, 64, true, false, -1, -1};
const Shape kWindow = {1, 1, 1, 100, 501, 64, false, true, 40, 130};

Shape with_dim(Shape shape, int head_dim) {
  shape.head_dim = head_dim;
  return shape;
}

TEST(AttendSm80, FoldedD64) {
  using Kernel = AttendSm80<64, 128, 4, Weights::kFolded>;
  for (const Shape& shape : {kOdd, kCausal, kWindow}) check_all<Kernel>(shape, Weights::kFolded);
}
TEST(AttendSm80, FoldedD128) {
  check_all<AttendSm80<128, 128, 8, Weights::kFolded>>(with_dim(kCausal, 128), Weights::kFolded);
}
TEST(AttendSm80, FoldedD96And256) {
  check<AttendSm80<96, 128, 8, Weights::kFolded>>(with_dim(kCausal, 96), Weights::kFolded,
                                                  Async::kRandom);
  check<AttendSm80<256, 128, 8, Weights::kFolded>>(with_dim(kOdd, 256), Weights::kFolded,
                                                   Async::kRandom);
}
TEST(AttendSm80, PlainAndPaper) {
  check_all<AttendSm80<64, 128, 4, Weights::kPlain>>(kCausal, Weights::kPlain);
  check_all<AttendSm80<64, 128, 4, Weights::kPaper>>(kCausal, Weights::kPaper);
}

TEST(AttendSm90, FoldedD64) {
  using Kernel = AttendSm90<64, 256, Weights::kFolded>;
  for (const Shape& shape : {kOdd, kCausal, kWindow}) check_all<Kernel>(shape, Weights::kFolded);
}
TEST(AttendSm90, FoldedD128) {
  using Kernel = AttendSm90<128, 256, Weights::kFolded>;
  check_all<Kernel>(with_dim({1, 1, 1, 130, 900, 128, true, false, -1, -1}, 128), Weights::kFolded);
}
TEST(AttendSm90, FoldedD96And256) {
  check<AttendSm90<96, 256, Weights::kFolded>>(with_dim(kCausal, 96), Weights::kFolded,
                                               Async::kRandom);
  check<AttendSm90<256, 128, Weights::kFolded>>(with_dim(kOdd, 256), Weights::kFolded,
                                                Async::kRandom);
}
TEST(AttendSm90, PlainAndPaper) {
  check_all<AttendSm90<64, 256, Weights::kPlain>>(kCausal, Weights::kPlain);
  check_all<AttendSm90<64, 256, Weights::kPaper>>(kCausal, Weights::kPaper);
}

/// Scores far beyond what 2^score holds in float, where warps do their rows again.
TEST(AttendSm80, HugeScores) {
  using Kernel = AttendSm80<64, 128, 4, Weights::kFolded>;
  check<Kernel>(kCausal, Weights::kFolded, Async::kRandom, 100.0f);
  check<Kernel>(kWindow, Weights::kFolded, Async::kRandom, 3000.0f);
}
TEST(AttendSm90, HugeScores) {
  check<AttendSm90<64, 256, Weights::kFolded>>(kCausal, Weights::kFolded, Async::kRandom, 100.0f);
  check<AttendSm90<64, 256, Weights::kPlain>>(kWindow, Weights::kPlain, Async::kRandom, 3000.0f);
  check<AttendSm90<64, 256, Weights::kPaper>>(kOdd, Weights::kPaper, Async::kRandom, 100.0f);
}

/// The quantize and pack kernels against plain loops: codes and scales are equal.
void check_pack(const Shape& shape, Weights weights, bool smooth_k, int kv_block) {
  Inputs inputs = random_inputs(shape, 23);
  // A token of zeros in V, and one that only a NaN makes special.
  const size_t row = static_cast<size_t>(shape.nheads_k) * shape.head_dim;
  for (int d = 0; d < shape.head_dim; ++d) inputs.v[3 * row + d] = 0;
  const Quantized quantized = quantize(inputs, weights, smooth_k, kv_block);
  const Packed want = pack(inputs, quantized);
  Packed got = pack(inputs, quantized);
  std::fill(got.q.begin(), got.q.end(), int8_t{99});
  std::fill(got.k.begin(), got.k.end(), int8_t{99});
  std::fill(got.v.begin(), got.v.end(), int8_t{99});
  std::fill(got.q_scale.begin(), got.q_scale.end(), -7.0f);
  ASSERT_EQ(pack_with_kernels(inputs, weights, smooth_k, kv_block, Async::kRandom, got), "");
  EXPECT_EQ(got.q, want.q);
  EXPECT_EQ(got.k, want.k);
  EXPECT_EQ(got.v, want.v);
  EXPECT_EQ(got.q_scale, want.q_scale);
  const int dim = packed_head_dim(shape.head_dim);
  for (size_t i = 0; i < want.v_scale.size(); ++i) {
    if (static_cast<int>(i) % dim < shape.head_dim) {
      EXPECT_EQ(got.v_scale[i], want.v_scale[i]) << i;
    }
  }
  for (size_t i = 0; i < want.lse_shift.size(); ++i) {
    EXPECT_NEAR(got.lse_shift[i], want.lse_shift[i], 1e-5);
  }
  const int which_count = weights == Weights::kFolded ? 2 : 1;
  for (int head = 0; head < shape.batch * shape.nheads_k; ++head) {
    for (int key = 0; key < shape.seqlen_k; ++key) {
      for (int which = 0; which < which_count; ++which) {
        const size_t at =
            static_cast<size_t>(head) * want.rows_k * 2 + key_constant_offset(key, which);
        EXPECT_FLOAT_EQ(got.key_constants[at], want.key_constants[at]) << key << ' ' << which;
      }
    }
  }
}

TEST(Quantize, PacksAsPlainLoops) {
  check_pack({2, 4, 2, 37, 301, 64, true, false, -1, -1}, Weights::kFolded, true, 256);
  check_pack({1, 2, 1, 5, 130, 96, false, false, -1, -1}, Weights::kFolded, true, 128);
  check_pack({1, 1, 1, 40, 200, 128, false, false, 20, 30}, Weights::kPlain, true, 128);
  check_pack({1, 1, 1, 40, 200, 128, false, false, -1, -1}, Weights::kPaper, false, 128);
  check_pack({1, 1, 1, 3, 20, 256, false, false, -1, -1}, Weights::kFolded, true, 128);
}

}  // namespace
}  // namespace attn8::cuda::testing
