// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda/attend_decode.hpp"
#include "cuda/attend_sm80.hpp"
#include "cuda/attend_sm90.hpp"
#include "emulator/packed_problem.hpp"

/// Leaves out every wait, barrier and fence of the attention kernels, one at a time, and expects
/// the emulator to notice: what orders the kernels is needed, and its loss would not go unseen.
namespace attn8::cuda::testing {
namespace {

using emulator::Async;
using emulator::Sync;
using emulator::SyncSite;

template <class Kernel>
class Mutant {
 public:
  Mutant(const Shape& shape, Weights weights)
      : shape_(shape),
        inputs_(random_inputs(shape, 29)),
        quantized_(quantize(inputs_, weights, weights != Weights::kPaper, Kernel::kKvBlock)),
        packed_(pack(inputs_, quantized_, weights)),
        expected_(expected(shape, quantized_, packed_, weights, Kernel::kKvBlock)) {}

  /// "ok", "wrong result" or the emulator's error.
  std::string run(const SyncSite& skip, Async async, uint64_t seed) {
    std::vector<float> out;
    std::vector<float> lse;
    const AttendParams params = attend_params(shape_, packed_, out, lse);
    emulator::Config config;
    config.threads = Kernel::kThreads;
    config.shared_bytes = Kernel::kSharedBytes;
    config.async = async;
    config.seed = seed;
    config.skip = skip;
    const int tiles = (shape_.seqlen_q + Kernel::kRows - 1) / Kernel::kRows;
    const emulator::Report report = emulator::run(
        config, {tiles, shape_.batch * shape_.nheads_q, 1}, [&] { Kernel::run(params); });
    if (!report.ok) return report.error;
    sites_ = report.sync_sites;
    for (size_t i = 0; i < out.size(); ++i) {
      // Written so that a NaN is wrong.
      if (!(std::fabs(out[i] - expected_.out[i]) <= expected_.bound[i])) return "wrong result";
    }
    return "ok";
  }

  /// Sites whose loss nothing notices, one line each.
  std::string survivors() {
    EXPECT_EQ(run({}, Async::kRandom, 0), "ok");
    const std::vector<SyncSite> sites = sites_;
    EXPECT_GE(sites.size(), 4u);
    std::string names;
    for (const SyncSite& site : sites) {
      // Lanes of a warp that run on alone seldom come to different results.
      if (site.sync == Sync::kWarpBarrier && !emulator::finds_races()) continue;
      if (!noticed(site)) names += std::string(names.empty() ? "" : ", ") + to_string(site.sync);
    }
    return names;
  }

 private:
  bool noticed(const SyncSite& site) {
    constexpr uint64_t kSeeds = 4;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      for (const Async async : {Async::kLate, Async::kEarly, Async::kRandom}) {
        if (run(site, async, seed) != "ok") return true;
      }
    }
    return false;
  }

  Shape shape_;
  Inputs inputs_;
  Quantized quantized_;
  Packed packed_;
  Expected expected_;
  std::vector<SyncSite> sites_;
};

/// Six visited blocks of keys, masked ones first and last, so that both loops run and the stages
/// are reused after either.
Shape six_blocks(int kv_block, int head_dim) {
  Shape shape;
  shape.seqlen_q = 40;
  shape.seqlen_k = 7 * kv_block - 20;
  shape.head_dim = head_dim;
  shape.causal = true;
  shape.window_left = 5 * kv_block;
  return shape;
}

TEST(AttendSync, EverySm80SyncIsNeeded) {
  using Kernel = AttendSm80<64, 128, 4, Weights::kFolded>;
  // The last wait only leaves nothing in flight when the block ends.
  EXPECT_EQ(Mutant<Kernel>(six_blocks(128, 64), Weights::kFolded).survivors(),
            "cp.async.wait_group");
}

TEST(AttendSync, EveryDecodeSyncIsNeeded) {
  using Kernel = AttendDecode<64, 2, 2, Weights::kFolded>;
  EXPECT_EQ(Mutant<Kernel>(six_blocks(128, 64), Weights::kFolded).survivors(), "");
}

TEST(AttendSync, EverySm90SyncIsNeeded) {
  using Kernel = AttendSm90<64, 256, Weights::kFolded>;
  // In both loops: a warpgroup's wait for its turn, since turns are for speed alone, and the warp
  // barrier before V is released, since only wgmma reads V and its wait covers the warp.
  EXPECT_EQ(Mutant<Kernel>(six_blocks(256, 64), Weights::kFolded).survivors(),
            emulator::finds_races() ? "bar, bar.warp.sync, bar, bar.warp.sync" : "bar, bar");
}

}  // namespace
}  // namespace attn8::cuda::testing
