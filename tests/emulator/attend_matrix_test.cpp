// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cuda/attend_decode.hpp"
#include "cuda/attend_sm80.hpp"
#include "cuda/attend_sm90.hpp"
#include "emulator/packed_problem.hpp"

/// Every instance of the attention kernels over random small problems: odd lengths, both causal
/// alignments, windows, grouped heads, rows without a key; each in every mode of completion, with
/// all global memory fenced in and no bank conflict allowed.
namespace attn8::cuda::testing {
namespace {

using emulator::Async;

Shape random_shape(int head_dim, int kv_block, unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int bound) { return static_cast<int>(random() % bound); };
  // Around the sizes at which tiles, key groups and blocks end.
  const int lengths_k[] = {1, 15, 17, kv_block - 1, kv_block, kv_block + 1, 2 * kv_block + 37};
  const int lengths_q[] = {1, 2, 16, 63, 65};
  Shape shape;
  shape.head_dim = head_dim - (seed % 3 == 0 ? 8 : 0);
  shape.batch = 1 + below(2);
  shape.nheads_k = 1 + below(2);
  shape.nheads_q = shape.nheads_k * (1 + below(2));
  shape.seqlen_q = lengths_q[below(5)];
  shape.seqlen_k = lengths_k[below(7)];
  shape.causal = below(2) == 0;
  shape.top_left = below(2) == 0;
  if (below(3) == 0) shape.window_left = below(kv_block + 40);
  if (!shape.causal && below(3) == 0) shape.window_right = below(kv_block);
  return shape;
}

std::string describe(const Shape& s) {
  return ::testing::PrintToString(std::vector<int>{s.batch, s.nheads_q, s.nheads_k, s.seqlen_q,
                                                   s.seqlen_k, s.head_dim, s.causal, s.top_left,
                                                   s.window_left, s.window_right}) +
         " = batch, nheads_q, nheads_k, seqlen_q, seqlen_k, head_dim, causal, top_left, window";
}

template <class T>
emulator::Buffer buffer(const char* name, const std::vector<T>& data, bool writable = false) {
  return {name, data.data(), data.size() * sizeof(T), writable};
}

template <class Kernel>
void check(const Shape& shape, Weights weights, Async async, unsigned seed) {
  SCOPED_TRACE(describe(shape));
  const Inputs inputs = random_inputs(shape, seed);
  const Quantized quantized =
      quantize(inputs, weights, weights != Weights::kPaper, Kernel::kKvBlock);
  const Packed packed = pack(inputs, quantized, weights);
  const Expected want = expected(shape, quantized, packed, weights, Kernel::kKvBlock);
  std::vector<float> out;
  std::vector<float> lse;
  const AttendParams params = attend_params(shape, packed, out, lse);
  emulator::Config config;
  config.threads = Kernel::kThreads;
  config.shared_bytes = Kernel::kSharedBytes;
  config.async = async;
  config.seed = seed;
  config.buffers = {buffer("q", packed.q),
                    buffer("k", packed.k),
                    buffer("v", packed.v),
                    buffer("q_scale", packed.q_scale),
                    buffer("key_constants", packed.key_constants),
                    buffer("v_scale", packed.v_scale),
                    buffer("lse_shift", packed.lse_shift),
                    buffer("slopes", packed.slopes),
                    buffer("sinks", packed.sinks),
                    buffer("out", out, true),
                    buffer("lse", lse, true)};
  const int tiles = (shape.seqlen_q + Kernel::kRows - 1) / Kernel::kRows;
  const emulator::Report report =
      emulator::run(config, {tiles, shape.batch * shape.nheads_q, 1}, [&] { Kernel::run(params); });
  ASSERT_TRUE(report.ok) << report.error;
  EXPECT_EQ(report.stats.ldmatrix_conflicts, 0u);
  EXPECT_EQ(report.stats.cp_async_conflicts, 0u);
  for (size_t i = 0; i < out.size(); ++i) {
    ASSERT_LE(std::fabs(out[i] - want.out[i]), want.bound[i]) << "out[" << i << "]=" << out[i];
  }
  for (size_t row = 0; row < lse.size(); ++row) {
    // A row without a key has an LSE of -inf.
    if (std::isinf(want.lse[row])) {
      ASSERT_EQ(lse[row], -INFINITY) << row;
    } else {
      const double expect = want.lse[row] + expected_shift(shape, packed, row);
      ASSERT_NEAR(lse[row], expect, 2e-5 * (1 + std::fabs(expect))) << row;
    }
  }
}

template <class Kernel>
void check_random_shapes(Weights weights) {
  constexpr unsigned kShapes = 9;
  for (unsigned seed = 0; seed < kShapes; ++seed) {
    const Shape shape = random_shape(Kernel::kHeadDim, Kernel::kKvBlock, seed);
    check<Kernel>(shape, weights, static_cast<Async>(seed % 3), seed);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

template <Weights kWeights>
void check_sm80() {
  check_random_shapes<AttendSm80<64, 128, 4, kWeights>>(kWeights);
  check_random_shapes<AttendSm80<96, 128, 8, kWeights>>(kWeights);
  check_random_shapes<AttendSm80<128, 128, 8, kWeights>>(kWeights);
  check_random_shapes<AttendSm80<256, 128, 8, kWeights>>(kWeights);
}
template <Weights kWeights>
void check_sm90() {
  check_random_shapes<AttendSm90<64, 256, kWeights>>(kWeights);
  check_random_shapes<AttendSm90<96, 256, kWeights>>(kWeights);
  check_random_shapes<AttendSm90<128, 256, kWeights>>(kWeights);
  check_random_shapes<AttendSm90<256, 128, kWeights>>(kWeights);
}

template <Weights kWeights>
void check_decode() {
  check_random_shapes<AttendDecode<64, 4, 2, kWeights>>(kWeights);
  check_random_shapes<AttendDecode<96, 2, 2, kWeights>>(kWeights);
  check_random_shapes<AttendDecode<128, 2, 2, kWeights>>(kWeights);
}

TEST(AttendMatrix, DecodeFolded) { check_decode<Weights::kFolded>(); }
TEST(AttendMatrix, DecodePlain) { check_decode<Weights::kPlain>(); }
TEST(AttendMatrix, Sm80Folded) { check_sm80<Weights::kFolded>(); }
TEST(AttendMatrix, Sm80Plain) { check_sm80<Weights::kPlain>(); }
TEST(AttendMatrix, Sm80Paper) { check_sm80<Weights::kPaper>(); }
TEST(AttendMatrix, Sm90Folded) { check_sm90<Weights::kFolded>(); }
TEST(AttendMatrix, Sm90Plain) { check_sm90<Weights::kPlain>(); }
TEST(AttendMatrix, Sm90Paper) { check_sm90<Weights::kPaper>(); }

}  // namespace
}  // namespace attn8::cuda::testing
