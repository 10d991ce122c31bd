// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "emulator/emulator.hpp"
#include "emulator/planted_kernels.hpp"

/// The emulator catches what it is for. Each planted bug names what must catch it in each mode of
/// completion: the error line, the wrong result, the conflict counter, or nothing where that mode
/// cannot see the bug (late and early complement each other; the attention tests run all three).
/// The same file is built with ThreadSanitizer, where the correct kernels must be silent and the
/// ordering bugs must be found.
namespace attn8::cuda::planted {
namespace {

using emulator::Async;
using emulator::Config;
using emulator::Report;

constexpr int kSeqlenK = 300;
constexpr int kOffset = kSeqlenK - kRows;

struct Problem {
  std::vector<int8_t> q, k;
  std::vector<int> out, expected;

  Problem() : q(kRows * kHeadDim), k(kSeqlenK * kHeadDim), out(kRows, -1), expected(kRows) {
    std::mt19937 random(7);
    for (int8_t& x : q) x = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    for (int8_t& x : k) x = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j <= i + kOffset && j < kSeqlenK; ++j) {
        int dot = 0;
        for (int d = 0; d < kHeadDim; ++d) dot += q[i * kHeadDim + d] * k[j * kHeadDim + d];
        expected[i] += 1 + dot;
      }
    }
  }
  Params params() { return {q.data(), k.data(), out.data(), kSeqlenK, kOffset}; }
  std::vector<emulator::Buffer> buffers() {
    return {{"q", q.data(), q.size(), false},
            {"k", k.data(), k.size(), false},
            {"out", out.data(), out.size() * sizeof(int), true}};
  }
};

/// One line on how the run ended: "ok", "wrong result", "bank conflicts" or the error.
std::string verdict(const Report& report, const Problem& problem) {
  if (!report.ok) return report.error;
  if (problem.out != problem.expected) return "wrong result";
  return report.stats.bank_conflicts() > 0 ? "bank conflicts" : "ok";
}

template <Sm80Bug kBug>
std::string run_sm80(Async async, uint64_t seed) {
  Problem problem;
  const Params params = problem.params();
  const Config config{Sm80<kBug>::kThreads, Sm80<kBug>::kSharedBytes, async, seed,
                      problem.buffers()};
  return verdict(emulator::run(config, {}, [&] { Sm80<kBug>::run(params); }), problem);
}

template <Sm90Bug kBug>
std::string run_sm90(Async async, uint64_t seed) {
  Problem problem;
  const Params params = problem.params();
  ptx::TensorMap map;
  map.base = problem.k.data();
  map.rank = 3;
  for (int i = 0; i < 3; ++i) {
    map.shape[i] = i == 0 ? kHeadDim : i == 1 ? kSeqlenK : 1;
    map.stride_bytes[i] = i == 0 ? 1 : i == 1 ? kHeadDim : kHeadDim * kSeqlenK;
    map.box[i] = i == 0 ? kHeadDim : i == 1 ? kKvBlock : 1;
  }
  map.swizzle = Sm90<kBug>::Tile::kSpan;
  const Config config{Sm90<kBug>::kThreads, Sm90<kBug>::kSharedBytes, async, seed,
                      problem.buffers()};
  return verdict(emulator::run(config, {}, [&] { Sm90<kBug>::run(params, map); }), problem);
}

/// What must come out in each mode; several alternatives are separated by '|'. A ThreadSanitizer
/// build may notice a race first in any mode but kEarly, where `early_tsan` must come out.
struct Expected {
  std::string late, early, random;
  std::string early_tsan = early;
};

bool matches(const std::string& verdict, const std::string& alternatives) {
  size_t begin = 0;
  while (begin <= alternatives.size()) {
    const size_t end = std::min(alternatives.find('|', begin), alternatives.size());
    const std::string want = alternatives.substr(begin, end - begin);
    if (want == "ok" ? verdict == want : verdict.find(want) != std::string::npos) return true;
    begin = end + 1;
  }
  return false;
}

template <class Run>
void check(Run run, const Expected& expected) {
  const std::string race = emulator::finds_races() ? "|data race" : "";
  const std::pair<Async, std::string> modes[] = {
      {Async::kLate, expected.late == "ok" ? "ok" : expected.late + race},
      {Async::kEarly, emulator::finds_races() ? expected.early_tsan : expected.early},
      {Async::kRandom, expected.random == "ok" ? "ok" : expected.random + race}};
  // Reports cost seconds in a ThreadSanitizer build.
  const uint64_t seeds = emulator::finds_races() ? 1 : 3;
  for (const auto& [async, want] : modes) {
    uint64_t passed = 0;
    for (uint64_t seed = 0; seed < seeds; ++seed) {
      const std::string got = run(async, seed);
      passed += got == "ok" ? 1 : 0;
      EXPECT_TRUE(matches(got, want)) << "mode " << static_cast<int>(async) << " seed " << seed
                                      << "\n  got:  " << got << "\n  want: " << want;
    }
  }
}

template <Sm80Bug kBug>
void check_sm80(const Expected& expected) {
  check([](Async async, uint64_t seed) { return run_sm80<kBug>(async, seed); }, expected);
}
template <Sm90Bug kBug>
void check_sm90(const Expected& expected) {
  check([](Async async, uint64_t seed) { return run_sm90<kBug>(async, seed); }, expected);
}

TEST(PlantedSm80, None) { check_sm80<Sm80Bug::kNone>({"ok", "ok", "ok"}); }

// A copy that completes at issue needs no wait, so the early mode is blind to a missing one.
TEST(PlantedSm80, NoWait) {
  check_sm80<Sm80Bug::kNoWait>({"which cp.async of thread", "ok", "which cp.async of thread"});
}
TEST(PlantedSm80, NoBarrier) {
  check_sm80<Sm80Bug::kNoBarrier>({"which cp.async of thread", "wrong result|never written",
                                   "which cp.async of thread|wrong result", "data race"});
}
TEST(PlantedSm80, OneBuffer) {
  check_sm80<Sm80Bug::kOneBuffer>({"which cp.async of thread", "wrong result",
                                   "which cp.async of thread|wrong result", "data race"});
}
TEST(PlantedSm80, NoSwizzle) {
  check_sm80<Sm80Bug::kNoSwizzle>({"bank conflicts", "bank conflicts", "bank conflicts"});
}
TEST(PlantedSm80, OtherSwizzle) {
  check_sm80<Sm80Bug::kOtherSwizzle>({"wrong result", "wrong result", "wrong result"});
}
TEST(PlantedSm80, MaskOffByOne) {
  check_sm80<Sm80Bug::kMaskOffByOne>({"wrong result", "wrong result", "wrong result"});
}
TEST(PlantedSm80, DivergentShuffle) {
  const std::string divergent = "divergent collective: this thread is at";
  check_sm80<Sm80Bug::kDivergentShuffle>({divergent, divergent, divergent});
}
TEST(PlantedSm80, MissingLane) {
  const std::string deadlock =
      "deadlock: threads 0-76 (warps 0-2) at barrier 0 (127 of 128 threads arrived); "
      "threads 77-77 (warps 2-2) exited; threads 78-127";
  check_sm80<Sm80Bug::kMissingLane>({deadlock, deadlock, deadlock});
}
TEST(PlantedSm80, TooSmallShared) {
  const std::string bounds = "are out of bounds (8192 bytes)";
  check_sm80<Sm80Bug::kTooSmallShared>({bounds, bounds, bounds});
}
TEST(PlantedSm80, ReadPastEnd) {
  const std::string bounds = "are out of bounds (19200 bytes)";
  check_sm80<Sm80Bug::kReadPastEnd>({bounds, bounds, bounds});
}

TEST(PlantedSm90, None) { check_sm90<Sm90Bug::kNone>({"ok", "ok", "ok"}); }

// The accumulators hold poison until the group completes.
TEST(PlantedSm90, NoWgmmaWait) {
  check_sm90<Sm90Bug::kNoWgmmaWait>({"wrong result", "ok", "wrong result|ok", "data race"});
}
TEST(PlantedSm90, NoWgmmaFence) {
  const std::string fence = "no wgmma.fence since";
  check_sm90<Sm90Bug::kNoWgmmaFence>({fence, fence, fence});
}
TEST(PlantedSm90, NoEmptyWait) {
  const std::string arrivals = "has all 1 arrivals of phase 0";
  check_sm90<Sm90Bug::kNoEmptyWait>(
      {arrivals, "deadlock", arrivals + "|deadlock", "deadlock|data race"});
}
TEST(PlantedSm90, EarlyRelease) {
  const std::string reading = "which a wgmma of warpgroup 1 may still be reading";
  check_sm90<Sm90Bug::kEarlyRelease>({reading, "ok", reading + "|ok", "data race"});
}
TEST(PlantedSm90, NoFullWait) {
  const std::string delivering = "which tma of thread 0 is still delivering";
  check_sm90<Sm90Bug::kNoFullWait>({delivering, "ok|never written",
                                    delivering + "|never written|ok", "data race|never written"});
}
TEST(PlantedSm90, NoProxyFence) {
  const std::string fence = "wrote without fence.proxy.async after it";
  check_sm90<Sm90Bug::kNoProxyFence>({fence, fence, fence});
}
TEST(PlantedSm90, WrongBytes) {
  const std::string deadlock = "0 of 1 arrivals and 16 bytes";
  check_sm90<Sm90Bug::kWrongBytes>({deadlock, deadlock, deadlock});
}
// The descriptor walks rows of twice the width, out of its stage and of the shared memory.
TEST(PlantedSm90, OtherSwizzle) {
  const std::string bounds = "out of bounds (12320 bytes)";
  const std::string delivering = "which tma of thread 0 is still delivering";
  const std::string want = bounds + "|never written|" + delivering;
  check_sm90<Sm90Bug::kOtherSwizzle>({want, want, want, want + "|data race"});
}
TEST(PlantedSm90, NoBarrierInit) {
  const std::string barrier = "mbarrier.arrive: no mbarrier at smem+12288|no mbarrier at smem";
  check_sm90<Sm90Bug::kNoBarrierInit>({barrier, barrier, barrier});
}
TEST(PlantedSm90, NoInitFence) {
  const std::string fence = "tma: no fence.mbarrier_init after the mbarrier at smem+12288";
  check_sm90<Sm90Bug::kNoInitFence>({fence, fence, fence});
}
// Mostly the initializing thread comes first all the same; happens-before knows better.
TEST(PlantedSm90, NoInitBarrier) {
  const std::string want =
      emulator::finds_races() ? "data race|no mbarrier at smem" : "ok|no mbarrier at smem";
  check_sm90<Sm90Bug::kNoInitBarrier>({want, want, want});
}
TEST(PlantedSm90, ForgottenGroup) {
  const std::string exit = "exit while a wgmma group is in flight";
  check_sm90<Sm90Bug::kForgottenGroup>({exit, exit, exit, exit + "|data race"});
}

}  // namespace
}  // namespace attn8::cuda::planted
