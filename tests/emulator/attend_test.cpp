// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda/attend_decode.hpp"
#include "cuda/attend_sm80.hpp"
#include "cuda/attend_sm90.hpp"
#include "cuda/merge_splits.hpp"
#include "emulator/packed_problem.hpp"

/// The attention kernels in the emulator against docs/numerics.md in float64.
namespace attn8::cuda::testing {
namespace {

using emulator::Async;

/// How a call is spread over the grid: heads of Q to an image, key blocks to a z (0: all).
struct Division {
  int group = 1;
  int split_blocks = 0;
};

/// Runs the kernel, and what joins its parts; `params` are those of an undivided call.
template <class Kernel>
emulator::Report run_kernel(const AttendParams& params, const Shape& shape, Async async,
                            unsigned seed, const Division& division = {}) {
  emulator::Config config;
  config.threads = Kernel::kThreads;
  config.shared_bytes = Kernel::kSharedBytes;
  config.async = async;
  config.seed = seed;
  AttendParams kernel = params;
  kernel.group = division.group;
  kernel.group_inverse = group_inverse_of(division.group);
  kernel.split_keys = division.split_blocks * Kernel::kKvBlock;
  kernel.nheads_q /= division.group;
  kernel.seqlen_q *= division.group;
  const int key_blocks = (shape.seqlen_k + Kernel::kKvBlock - 1) / Kernel::kKvBlock;
  const int splits = division.split_blocks == 0
                         ? 1
                         : (key_blocks + division.split_blocks - 1) / division.split_blocks;
  const int rows = shape.batch * shape.seqlen_q * shape.nheads_q;
  const int row_floats = shape.head_dim + shape.head_dim % 2;
  std::vector<float> out(static_cast<size_t>(splits) * rows * row_floats, NAN);
  std::vector<float> lse(static_cast<size_t>(splits) * rows, NAN);
  if (splits > 1) {
    kernel.sinks = nullptr;  // beside all parts, not each
    kernel.out = out.data();
    kernel.out_pairs = true;
    kernel.lse = lse.data();
    kernel.out_stride_head = row_floats;
    kernel.out_stride_row = static_cast<int64_t>(shape.nheads_q) * row_floats;
    kernel.out_stride_batch = kernel.out_stride_row * shape.seqlen_q;
    kernel.out_stride_split = static_cast<int64_t>(rows) * row_floats;
    kernel.lse_stride_split = rows;
  }
  const int tiles = (kernel.seqlen_q + Kernel::kRows - 1) / Kernel::kRows;
  emulator::Report report = emulator::run(config, {tiles, shape.batch * kernel.nheads_q, splits},
                                          [&] { Kernel::run(kernel); });
  if (!report.ok || splits == 1) return report;
  const MergeParams merge = {out.data(), lse.data(), splits, params};
  config.threads = MergeSplits::kThreads;
  config.shared_bytes = MergeSplits::kSharedBytes;
  const emulator::Report merged =
      emulator::run(config, {rows, 1, 1}, [&] { MergeSplits::run(merge, shape.batch); });
  if (!merged.ok) report = merged;
  return report;
}

template <class Kernel>
void check(const Shape& shape, Weights weights, Async async, float q_size = 1.0f,
           const Division& division = {}) {
  SCOPED_TRACE(::testing::Message()
               << "async " << static_cast<int>(async) << ", weights " << static_cast<int>(weights)
               << ", softcap " << shape.softcap << ", queries " << shape.seqlen_q << ", q_size "
               << q_size << ", key blocks per part " << division.split_blocks);
  const Inputs inputs = random_inputs(shape, 17, q_size);
  const bool smooth = weights != Weights::kPaper;
  const Quantized quantized = quantize(inputs, weights, smooth, Kernel::kKvBlock);
  const Packed packed = pack(inputs, quantized, weights, division.group);
  const Expected want =
      expected(shape, quantized, packed, weights, Kernel::kKvBlock, division.group);
  std::vector<float> out;
  std::vector<float> lse;
  const AttendParams params = attend_params(shape, packed, out, lse);
  const emulator::Report report = run_kernel<Kernel>(params, shape, async, 5, division);
  ASSERT_TRUE(report.ok) << report.error;
  EXPECT_EQ(report.stats.ldmatrix_conflicts, 0u);
  for (size_t i = 0; i < out.size(); ++i) {
    ASSERT_LE(std::fabs(out[i] - want.out[i]), want.bound[i])
        << "element " << i << ": got " << out[i] << ", want " << want.out[i];
  }
  for (size_t row = 0; row < lse.size(); ++row) {
    const double expect = want.lse[row] + expected_shift(shape, packed, row, division.group);
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

/// Outputs of 16 bits, eight channels to a store where rows allow it: those of float32, rounded.
template <class Kernel>
void check_rounded_outputs(const Shape& shape, bool eights, float q_size = 1.0f) {
  const Inputs inputs = random_inputs(shape, 31, q_size);
  const Quantized quantized = quantize(inputs, Weights::kFolded, true, Kernel::kKvBlock);
  const Packed packed = pack(inputs, quantized, Weights::kFolded);
  std::vector<float> out;
  std::vector<float> lse;
  AttendParams params = attend_params(shape, packed, out, lse);
  ASSERT_TRUE(run_kernel<Kernel>(params, shape, Async::kRandom, 3).ok);
  for (const Element type : {Element::kFloat16, Element::kBFloat16}) {
    // Rows of 16 bytes' alignment, and what lies between them stays as it is.
    const int stride = (shape.head_dim + 7) / 8 * 8;
    const size_t rows = out.size() / shape.head_dim;
    struct alignas(16) Eight {
      uint16_t values[8];
    };
    const Eight untouched = {{7, 7, 7, 7, 7, 7, 7, 7}};
    std::vector<Eight> rounded(rows * stride / 8, untouched);
    params.out = rounded.data();
    params.out_type = type;
    params.out_eights = eights;
    params.out_stride_head = stride;
    params.out_stride_row = int64_t{shape.nheads_q} * stride;
    params.out_stride_batch = params.out_stride_row * shape.seqlen_q;
    const emulator::Report report = run_kernel<Kernel>(params, shape, Async::kRandom, 3);
    ASSERT_TRUE(report.ok) << report.error;
    for (size_t row = 0; row < rows; ++row) {
      for (int channel = 0; channel < stride; ++channel) {
        const float value = channel < shape.head_dim ? out[row * shape.head_dim + channel] : 0;
        const uint32_t want =
            type == Element::kFloat16 ? ptx::pack_half2(value, 0) : ptx::pack_bfloat162(value, 0);
        ASSERT_EQ(rounded[(row * stride + channel) / 8].values[channel % 8],
                  channel < shape.head_dim ? want & 0xFFFF : 7)
            << "row " << row << ", channel " << channel;
      }
    }
  }
}
template <class Kernel>
void check_rounded_outputs() {
  const Shape shape = {2, 2, 1, 37, 300, Kernel::kHeadDim - 8, true, false, -1, -1};
  check_rounded_outputs<Kernel>(shape, true);
  check_rounded_outputs<Kernel>(shape, true, 100.0f);
  check_rounded_outputs<Kernel>(shape, false);
  check_rounded_outputs<Kernel>(with_dim(shape, Kernel::kHeadDim), true);
  check_rounded_outputs<Kernel>(with_dim(shape, Kernel::kHeadDim - 3), false);
}
TEST(AttendSm80, RoundedOutputs) {
  check_rounded_outputs<AttendSm80<64, 128, 4, Weights::kFolded>>();
  check_rounded_outputs<AttendSm80<96, 128, 8, Weights::kFolded>>();
}
TEST(AttendSm90, RoundedOutputs) {
  check_rounded_outputs<AttendSm90<64, 256, Weights::kFolded>>();
  check_rounded_outputs<AttendSm90<128, 256, Weights::kFolded>>();
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

/// Few queries: heads that share keys in one tile, keys divided over the grid; parts that a row
/// sees nothing of, and rows that see nothing at all.
template <class Kernel>
void check_divisions(int head_dim) {
  constexpr int kBlock = Kernel::kKvBlock;
  const Shape decode = {2, 6, 2, 1, 3 * kBlock + 20, head_dim, true, false, -1, -1};
  const Shape few = {1, 4, 1, 5, 2 * kBlock + 9, head_dim, true, false, kBlock, -1};
  const Shape more_queries_than_keys = {1, 2, 1, 40, 17, head_dim, true, false, -1, -1};
  check<Kernel>(decode, Weights::kFolded, Async::kRandom, 1.0f, {3, 0});
  check<Kernel>(decode, Weights::kFolded, Async::kLate, 1.0f, {3, 1});
  check<Kernel>(decode, Weights::kFolded, Async::kEarly, 1.0f, {1, 3});
  check<Kernel>(few, Weights::kFolded, Async::kRandom, 1.0f, {4, 1});
  check<Kernel>(few, Weights::kFolded, Async::kRandom, 100.0f, {4, 2});
  check<Kernel>(more_queries_than_keys, Weights::kFolded, Async::kRandom, 1.0f, {2, 1});
}
TEST(AttendSm80, DividedHeadsAndKeys) {
  check_divisions<AttendSm80<64, 128, 4, Weights::kFolded>>(64);
}
TEST(AttendSm90, DividedHeadsAndKeys) {
  check_divisions<AttendSm90<64, 256, Weights::kFolded>>(64);
}

/// Warps that take key blocks in turn: more and fewer blocks than warps and stages, parts with
/// blocks for some warps only, and rows that see nothing.
TEST(AttendDecode, Folded) {
  using Kernel = AttendDecode<64, 4, 2, Weights::kFolded>;
  for (const Shape& shape : {kOdd, kCausal, kWindow}) check_all<Kernel>(shape, Weights::kFolded);
  check_divisions<Kernel>(64);
  const Shape decode = {2, 6, 2, 1, 1100, 64, true, false, -1, -1};
  for (const Async async : {Async::kLate, Async::kEarly, Async::kRandom}) {
    check<Kernel>(decode, Weights::kFolded, async, 1.0f, {3, 0});
    check<Kernel>(decode, Weights::kFolded, async, 1.0f, {3, 5});
  }
}
TEST(AttendDecode, D96And128) {
  check_divisions<AttendDecode<128, 2, 2, Weights::kFolded>>(128);
  check_divisions<AttendDecode<96, 2, 2, Weights::kFolded>>(96);
  check_all<AttendDecode<128, 2, 2, Weights::kFolded>>(with_dim(kCausal, 121), Weights::kFolded);
}
TEST(AttendDecode, Plain) {
  check_all<AttendDecode<64, 4, 2, Weights::kPlain>>(kCausal, Weights::kPlain);
  check<AttendDecode<128, 2, 2, Weights::kPlain>>(with_dim(kWindow, 128), Weights::kPlain,
                                                  Async::kRandom, 1.0f, {1, 2});
}
/// The first warp does the rows of all again.
TEST(AttendDecode, HugeScores) {
  using Kernel = AttendDecode<64, 4, 2, Weights::kFolded>;
  check<Kernel>(kCausal, Weights::kFolded, Async::kRandom, 100.0f);
  check<Kernel>(kWindow, Weights::kFolded, Async::kRandom, 3000.0f);
}

/// Weights and V in bfloat16.
TEST(AttendSm80, Half) {
  using Kernel = AttendSm80<64, 64, 4, Weights::kHalf>;
  for (const Shape& shape : {kOdd, kCausal, kWindow}) check_all<Kernel>(shape, Weights::kHalf);
  check<Kernel>(kCausal, Weights::kHalf, Async::kRandom, 100.0f);
  check<Kernel>(kWindow, Weights::kHalf, Async::kRandom, 3000.0f);
  check<AttendSm80<96, 64, 8, Weights::kHalf>>(with_dim(kCausal, 90), Weights::kHalf,
                                               Async::kRandom);
  check<AttendSm80<128, 64, 8, Weights::kHalf>>(with_dim(kOdd, 121), Weights::kHalf,
                                                Async::kRandom);
  check<AttendSm80<256, 64, 8, Weights::kHalf>>(with_dim(kOdd, 256), Weights::kHalf,
                                                Async::kRandom);
}

/// What is done to scores: softcap, ALiBi, both; sinks; offsets of the positions.
template <class Kernel>
void check_changes(Weights weights) {
  Shape shape = {1, 4, 2, 70, 333, 61, true, false, -1, -1};
  shape.sinks = true;
  shape.q_offset = -9;
  const auto check_one = [&](float softcap, bool alibi, float q_size, const Division& division) {
    shape.softcap = softcap;
    shape.alibi = alibi;
    check<Kernel>(shape, weights, Async::kRandom, q_size, division);
  };
  check_one(20.0f, false, 1.0f, {});
  check_one(0, true, 1.0f, {});
  check_one(5.0f, true, 30.0f, {});
  shape.causal = false;
  shape.window_left = 40;
  shape.window_right = 25;
  check_one(50.0f, true, 3000.0f, {});
  shape.attn_mask = true;
  check_one(20.0f, false, 1.0f, {});
  shape.seqlen_q = 3;
  shape.window_left = 280;
  shape.q_offset = 11;
  // Codes of `paper` are relative to the largest weight so far, so that its keys stay undivided.
  check_one(20.0f, true, 1.0f, weights == Weights::kPaper ? Division{} : Division{2, 1});
  shape = {3, 2, 1, 20, 300, 64, true, false, -1, -1};
  shape.attn_mask = true;
  shape.sinks = true;
  shape.seqlens_k = {300, 5, 130};
  shape.leftpad_k = {140, 0, 129};
  check_one(0, true, 1.0f, {});
}
TEST(AttendSm80, ChangedScores) {
  check_changes<AttendSm80<64, 128, 4, Weights::kFolded, Scores::kBiased>>(Weights::kFolded);
  check_changes<AttendSm80<64, 64, 4, Weights::kHalf, Scores::kBiased>>(Weights::kHalf);
  check_changes<AttendSm80<64, 128, 4, Weights::kPlain, Scores::kBiased>>(Weights::kPlain);
  check_changes<AttendSm80<64, 128, 4, Weights::kPaper, Scores::kBiased>>(Weights::kPaper);
}
/// Where registers are few, pointers wait in shared memory.
TEST(AttendSm80, ChangedScoresD256) {
  using Kernel = AttendSm80<256, 128, 4, Weights::kFolded, Scores::kBiased>;
  Shape shape = {1, 2, 1, 70, 333, 250, true, false, -1, -1};
  shape.attn_mask = true;
  shape.alibi = true;
  shape.softcap = 20.0f;
  check_all<Kernel>(shape, Weights::kFolded);
  shape.seqlen_q = 3;
  check<Kernel>(shape, Weights::kFolded, Async::kRandom, 1.0f, {2, 1});
}
/// The kernels that know softcap alone.
template <class Kernel>
void check_softcap(Weights weights) {
  Shape shape = {1, 4, 2, 70, 333, 61, true, false, -1, -1};
  shape.softcap = 20.0f;
  check<Kernel>(shape, weights, Async::kRandom);
  shape.softcap = 50.0f;
  shape.sinks = true;
  check<Kernel>(shape, weights, Async::kRandom, 100.0f);
  shape.seqlen_q = 3;
  check<Kernel>(shape, weights, Async::kRandom, 1.0f, {2, 1});
}
TEST(AttendSm80, Softcap) {
  check_softcap<AttendSm80<64, 128, 4, Weights::kFolded, Scores::kSoftcap>>(Weights::kFolded);
  check_softcap<AttendSm80<64, 64, 4, Weights::kHalf, Scores::kSoftcap>>(Weights::kHalf);
}
TEST(AttendSm90, Softcap) {
  check_softcap<AttendSm90<64, 256, Weights::kFolded, Scores::kSoftcap>>(Weights::kFolded);
}

/// Sequences that are padded to one length, with keys that do not count at either end.
template <class Kernel>
void check_lengths(Weights weights) {
  Shape shape = {4, 2, 1, 40, 520, 64, true, false, -1, -1};
  shape.seqlens_k = {520, 0, 37, 300};
  check<Kernel>(shape, weights, Async::kRandom);
  shape.leftpad_k = {257, 0, 36, 300};
  check<Kernel>(shape, weights, Async::kRandom, 1.0f, {2, 1});
  shape.window_left = 20;
  shape.q_offset = -3;
  check<Kernel>(shape, weights, Async::kRandom, 100.0f);
  shape.causal = false;
  shape.top_left = true;
  check<Kernel>(shape, weights, Async::kRandom);
}
TEST(AttendSm80, Lengths) {
  check_lengths<AttendSm80<64, 128, 4, Weights::kFolded>>(Weights::kFolded);
}
TEST(AttendSm90, Lengths) {
  check_lengths<AttendSm90<64, 256, Weights::kFolded>>(Weights::kFolded);
}
TEST(AttendDecode, Lengths) {
  check_lengths<AttendDecode<64, 4, 2, Weights::kFolded>>(Weights::kFolded);
}

/// Sinks and offsets with the kernels that leave scores alone.
TEST(AttendSm80, SinksAndOffsets) {
  Shape shape = {2, 4, 2, 9, 200, 64, true, false, -1, -1};
  shape.sinks = true;
  shape.q_offset = -5;
  check<AttendSm80<64, 128, 4, Weights::kFolded>>(shape, Weights::kFolded, Async::kRandom, 1.0f,
                                                  {2, 1});
  check<AttendSm80<64, 128, 4, Weights::kPaper>>(shape, Weights::kPaper, Async::kRandom);
  check<AttendSm90<64, 256, Weights::kPlain>>(shape, Weights::kPlain, Async::kRandom);
  check<AttendDecode<64, 4, 2, Weights::kFolded>>(shape, Weights::kFolded, Async::kRandom, 1.0f,
                                                  {2, 2});
}

/// The quantize and pack kernels against plain loops: codes and scales are equal.
void check_pack(const Shape& shape, Weights weights, bool smooth_k, int kv_block, int group = 1) {
  Inputs inputs = random_inputs(shape, 23);
  // A token of zeros in V, and one that only a NaN makes special.
  const size_t row = static_cast<size_t>(shape.nheads_k) * shape.head_dim;
  for (int d = 0; d < shape.head_dim; ++d) inputs.v[3 * row + d] = 0;
  const Quantized quantized = quantize(inputs, weights, smooth_k, kv_block);
  const Packed want = pack(inputs, quantized, weights, group);
  Packed got = pack(inputs, quantized, weights, group);
  std::fill(got.q.begin(), got.q.end(), int8_t{99});
  std::fill(got.k.begin(), got.k.end(), int8_t{99});
  std::fill(got.v.begin(), got.v.end(), int8_t{99});
  std::fill(got.q_scale.begin(), got.q_scale.end(), -7.0f);
  ASSERT_EQ(pack_with_kernels(inputs, weights, smooth_k, kv_block, Async::kRandom, got, group), "");
  EXPECT_EQ(got.q, want.q);
  EXPECT_EQ(got.k, want.k);
  EXPECT_EQ(got.v, want.v);
  EXPECT_EQ(got.q_scale, want.q_scale);
  const int dim = packed_head_dim(shape.head_dim);
  for (size_t i = 0; i < want.v_scale.size(); ++i) {
    if (static_cast<int>(i) % dim < shape.head_dim && weights != Weights::kHalf) {
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
  check_pack({2, 6, 2, 41, 70, 64, true, false, -1, -1}, Weights::kFolded, true, 128, 3);
  check_pack({1, 4, 2, 1, 90, 128, true, false, -1, -1}, Weights::kFolded, true, 128, 2);
  Shape padded = {3, 2, 1, 20, 300, 64, true, false, 90, -1};
  padded.seqlens_k = {300, 0, 37};
  padded.leftpad_k = {280, 0, 5};
  check_pack(padded, Weights::kFolded, true, 128);
  check_pack({1, 2, 1, 5, 130, 91, false, false, -1, -1}, Weights::kFolded, true, 128);
  check_pack({1, 2, 2, 7, 70, 61, true, false, -1, -1}, Weights::kPlain, true, 128);
  check_pack({1, 2, 1, 5, 130, 90, false, false, -1, -1}, Weights::kHalf, true, 64);
  check_pack({1, 1, 1, 5, 65, 249, false, false, -1, -1}, Weights::kHalf, true, 64);
}

}  // namespace
}  // namespace attn8::cuda::testing
