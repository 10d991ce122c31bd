// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cuda/merge_states.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "emulator/emulator.hpp"
#include "emulator/float16.hpp"

/// The kernel behind merge_states() on a device, against the formula in float64.
namespace attn8::cuda {
namespace {

constexpr int kBatch = 2;
constexpr int kQueries = 3;
constexpr int kHeads = 2;
constexpr int kRowCount = kBatch * kQueries * kHeads;

uint16_t bits_of(float x, Element type) {
  return type == Element::kFloat16 ? emulator::half_bits(x) : emulator::bfloat16_bits(x);
}
float value_of(uint16_t bits, Element type) {
  return type == Element::kFloat16 ? emulator::half_value(bits)
                                   : std::bit_cast<float>(uint32_t{bits} << 16);
}

/// A state in [batch, query, head, channel] order: of a part, or of the result.
struct State {
  Element type;
  int head_dim;
  bool apart;                   ///< channels lie two apart
  std::vector<float> wide;      // float32
  std::vector<uint16_t> small;  // float16, bfloat16
  std::vector<float> lse;       // [rows]

  State(Element element, int dim, bool strided = false)
      : type(element), head_dim(dim), apart(strided), lse(kRowCount, NAN) {
    const size_t count = static_cast<size_t>(kRowCount) * dim * (apart ? 2 : 1);
    if (type == Element::kFloat32) {
      wide.assign(count, NAN);
    } else {
      small.assign(count, bits_of(NAN, type));
    }
  }
  [[nodiscard]] size_t at(int row, int channel) const {
    return (static_cast<size_t>(row) * head_dim + channel) * (apart ? 2 : 1);
  }
  [[nodiscard]] float get(int row, int channel) const {
    return type == Element::kFloat32 ? wide[at(row, channel)]
                                     : value_of(small[at(row, channel)], type);
  }
  void set(int row, int channel, float x) {
    if (type == Element::kFloat32) {
      wide[at(row, channel)] = x;
    } else {
      small[at(row, channel)] = bits_of(x, type);
    }
  }
  void randomize(unsigned seed, float spread) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int row = 0; row < kRowCount; ++row) {
      lse[row] = spread * normal(random);
      for (int c = 0; c < head_dim; ++c) set(row, c, normal(random));
    }
  }
  /// A row that saw no key; nothing may read what stands there.
  void empty(int row) {
    lse[row] = -INFINITY;
    for (int c = 0; c < head_dim; ++c) set(row, c, NAN);
  }

  [[nodiscard]] StateOut out_view() {
    const int64_t step = apart ? 2 : 1;
    const int64_t head = head_dim * step;
    const bool wide_type = type == Element::kFloat32;
    return {wide_type ? static_cast<void*>(wide.data()) : small.data(),
            {kQueries * kHeads * head, kHeads * head, head, step},
            type,
            !apart && head_dim % 4 == 0};
  }
  [[nodiscard]] StateLse lse_view() { return {lse.data(), {kQueries * kHeads, kHeads, 1}}; }
  [[nodiscard]] emulator::Buffer out_buffer(bool written) const {
    return type == Element::kFloat32
               ? emulator::Buffer{"out", wide.data(), wide.size() * 4, written}
               : emulator::Buffer{"out", small.data(), small.size() * 2, written};
  }
};

template <int kMaxStates>
emulator::Report run_merge(std::vector<State>& parts, State& result,
                           const emulator::SyncSite& skip = {}) {
  MergeStatesParams<kMaxStates> p{};
  p.out = result.out_view();
  p.lse = result.lse_view();
  p.rows = kRowCount;
  p.count = static_cast<int>(parts.size());
  p.seqlen_q = kQueries;
  p.nheads = kHeads;
  p.head_dim = result.head_dim;
  emulator::Config config;
  config.threads = MergeStates<kMaxStates>::kThreads;
  config.shared_bytes = MergeStates<kMaxStates>::kSharedBytes;
  config.skip = skip;
  for (size_t i = 0; i < parts.size(); ++i) {
    p.outs[i] = parts[i].out_view();
    p.lses[i] = parts[i].lse_view();
    if (&parts[i] == &result) continue;
    config.buffers.push_back(parts[i].out_buffer(false));
    config.buffers.push_back({"lse", parts[i].lse.data(), parts[i].lse.size() * 4, false});
  }
  config.buffers.push_back(result.out_buffer(true));
  config.buffers.push_back({"merged lse", result.lse.data(), result.lse.size() * 4, true});
  const int blocks =
      (kRowCount + MergeStates<kMaxStates>::kRows - 1) / MergeStates<kMaxStates>::kRows;
  return emulator::run(config, {blocks, 1, 1}, [&] { MergeStates<kMaxStates>::run(p); });
}
template <int kMaxStates>
void merge(std::vector<State>& parts, State& result) {
  const emulator::Report report = run_merge<kMaxStates>(parts, result);
  ASSERT_TRUE(report.ok) << report.error;
}

/// The bound of merge.hpp, and half a step of the result's type.
void expect_merged(const std::vector<State>& parts, const State& got) {
  const double n = static_cast<double>(parts.size());
  const double step = got.type == Element::kFloat32   ? 0x1p-24
                      : got.type == Element::kFloat16 ? 0x1p-11
                                                      : 0x1p-8;
  for (int row = 0; row < kRowCount; ++row) {
    double sum = 0;
    for (const State& part : parts) sum += std::exp(static_cast<double>(part.lse[row]));
    if (sum == 0) {
      EXPECT_EQ(got.lse[row], -INFINITY);
    } else {
      EXPECT_NEAR(got.lse[row], std::log(sum), 0x1.1p-24 * std::fabs(std::log(sum)) + 1e-12);
    }
    for (int c = 0; c < got.head_dim; ++c) {
      double want = 0;
      double magnitude = 0;
      for (const State& part : parts) {
        if (part.lse[row] == -INFINITY) continue;
        const double term = std::exp(static_cast<double>(part.lse[row])) / sum * part.get(row, c);
        want += term;
        magnitude += std::fabs(term);
      }
      const double bound = (n + 2) * 0x1p-24 * magnitude + 1.01 * step * std::fabs(want) + 0x1p-25;
      ASSERT_LE(std::fabs(got.get(row, c) - want), bound) << "row " << row << " channel " << c;
    }
  }
}

constexpr Element kTypes[] = {Element::kFloat32, Element::kFloat16, Element::kBFloat16};

TEST(MergeStatesKernel, MatchesFloat64) {
  unsigned seed = 0;
  for (const int head_dim : {1, 62, 64, 132}) {
    for (const int count : {1, 3, 16}) {
      std::vector<State> parts;
      for (int i = 0; i < count; ++i, ++seed) {
        parts.emplace_back(kTypes[seed % 3], head_dim, seed % 4 == 1);
        parts.back().randomize(seed, seed % 2 == 0 ? 1.0f : 15.0f);
        if (i > 0) parts.back().empty(static_cast<int>(seed) % kRowCount);
      }
      for (const Element type : kTypes) {
        State result(type, head_dim, count == 3);
        ASSERT_NO_FATAL_FAILURE(merge<16>(parts, result));
        ASSERT_NO_FATAL_FAILURE(expect_merged(parts, result)) << head_dim << " " << count;
      }
    }
  }
}

TEST(MergeStatesKernel, MorePartsThanLanes) {
  std::vector<State> parts;
  for (unsigned i = 0; i < 70; ++i) {
    parts.emplace_back(kTypes[i % 3], 20);
    parts.back().randomize(100 + i, 2);
  }
  State result(Element::kFloat32, 20);
  ASSERT_NO_FATAL_FAILURE(merge<256>(parts, result));
  expect_merged(parts, result);
}

TEST(MergeStatesKernel, OneSeenPartComesThroughBitForBit) {
  for (const Element type : kTypes) {
    std::vector<State> parts(3, State(type, 36));
    parts[1].randomize(7, 3);
    parts[1].set(2, 5, -0.0f);
    for (int row = 0; row < kRowCount; ++row) {
      parts[0].empty(row);
      parts[2].empty(row);
    }
    State result(type, 36);
    ASSERT_NO_FATAL_FAILURE(merge<16>(parts, result));
    // Bits, which tell -0 from 0.
    const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
    EXPECT_TRUE(std::ranges::equal(result.wide, parts[1].wide, {}, bits, bits));
    EXPECT_EQ(result.small, parts[1].small);
    EXPECT_EQ(result.lse, parts[1].lse);
  }
}

TEST(MergeStatesKernel, WithoutPartsOrKeysRowsAreZero) {
  for (const int count : {0, 2}) {
    std::vector<State> parts(count, State(Element::kFloat16, 8));
    for (State& part : parts) {
      for (int row = 0; row < kRowCount; ++row) part.empty(row);
    }
    State result(Element::kFloat32, 8);
    ASSERT_NO_FATAL_FAILURE(merge<16>(parts, result));
    for (const float x : result.wide) EXPECT_EQ(std::bit_cast<uint32_t>(x), 0u);
    for (const float x : result.lse) EXPECT_EQ(x, -INFINITY);
  }
}

TEST(MergeStatesKernel, NanStaysInItsRow) {
  std::vector<State> parts(2, State(Element::kFloat32, 8));
  parts[0].randomize(1, 1);
  parts[1].randomize(2, 1);
  parts[0].lse[3] = NAN;
  parts[1].set(5, 6, NAN);
  State result(Element::kBFloat16, 8);
  ASSERT_NO_FATAL_FAILURE(merge<16>(parts, result));
  for (int row = 0; row < kRowCount; ++row) {
    EXPECT_EQ(std::isnan(result.lse[row]), row == 3) << row;
    for (int c = 0; c < 8; ++c) {
      EXPECT_EQ(std::isnan(result.get(row, c)), row == 3 || (row == 5 && c == 6)) << row << c;
    }
  }
}

TEST(MergeStatesKernel, TheResultMayBeAPart) {
  for (const Element type : kTypes) {
    std::vector<State> parts(3, State(type, 68));
    for (unsigned i = 0; i < 3; ++i) parts[i].randomize(30 + i, 2);
    const std::vector<State> before = parts;
    ASSERT_NO_FATAL_FAILURE(merge<16>(parts, parts[1]));
    expect_merged(before, parts[1]);
  }
}

TEST(MergeStatesKernel, EveryBarrierIsNeeded) {
  if (!emulator::finds_races()) GTEST_SKIP() << "merge_states_test_tsan finds races";
  std::vector<State> parts(40, State(Element::kFloat32, 132));
  for (unsigned i = 0; i < parts.size(); ++i) parts[i].randomize(50 + i, 2);
  const emulator::Report whole = run_merge<256>(parts, parts[1]);
  ASSERT_TRUE(whole.ok) << whole.error;
  EXPECT_EQ(whole.sync_sites.size(), 3u);
  for (size_t i = 0; i < whole.sync_sites.size(); ++i) {
    EXPECT_FALSE(run_merge<256>(parts, parts[1], whole.sync_sites[i]).ok) << "barrier " << i;
  }
}

}  // namespace
}  // namespace attn8::cuda
