// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bench.hpp"
#include "failure.hpp"
#include "flags.hpp"
#include "measure.hpp"
#include "parallel.hpp"
#include "peak.hpp"
#include "report_speed.hpp"
#include "study.hpp"
#include "verify.hpp"

namespace attn8::app {
namespace {

/// The message of the Failure that `body` throws; "" when it throws none.
template <class Body>
std::string rejection(const Body& body) {
  try {
    body();
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "";
}

TEST(ExitCode, TellsBadInputFromWhatTheMachineLacks) {
  EXPECT_EQ(exit_code(StatusCode::kOk), 0);
  EXPECT_EQ(exit_code(StatusCode::kInternal), 1);
  EXPECT_EQ(exit_code(StatusCode::kInvalidArgument), 2);
  EXPECT_EQ(exit_code(StatusCode::kUnsupported), 2);
  EXPECT_EQ(exit_code(StatusCode::kUnavailable), 3);
}

TEST(ParseIntegers, TakesExactlyTheirNumber) {
  EXPECT_EQ(parse_integers("--w", "3,-1", 2, "L,R"), (std::vector<int64_t>{3, -1}));
  for (const char* bad :
       {"", "3", "3,", ",3", "3,4,5", "3,x", "3, 4", "3,4 ", "3,1e2", "3,99999999999999999999"}) {
    EXPECT_EQ(rejection([&] { parse_integers("--w", bad, 2, "L,R"); }),
              "--w: got '" + std::string(bad) + "', want L,R");
  }
}

TEST(ParseShape, ChecksEveryNumber) {
  EXPECT_EQ(parse_shape("--shape", "2,8,4,1,100,64").list(),
            (std::vector<int64_t>{2, 8, 4, 1, 100, 64}));
  EXPECT_NE(rejection([] { parse_shape("--shape", "1,8,3,1,1,64"); }).find("got 3 kv heads"),
            std::string::npos);
  EXPECT_NE(rejection([] { parse_shape("--shape", "1,1,1,0,1,64"); }).find("at least 1"),
            std::string::npos);
  EXPECT_NE(rejection([] {
              parse_shape("--shape", "1,1,1,1,2000000000,2000000000");
            }).find("at most 2^40 elements"),
            std::string::npos);
}

TEST(VisiblePairs, CountWhatADrawnMaskShows) {
  for (const int64_t seqlen_q : {0, 1, 3, 6}) {
    for (const int64_t seqlen_k : {0, 1, 4, 6, 9}) {
      for (const Mask& mask :
           {Mask{}, Mask{true, CausalAlign::kBottomRight, -1, -1},
            Mask{true, CausalAlign::kTopLeft, -1, -1}, Mask{false, CausalAlign::kBottomRight, 1, 2},
            Mask{true, CausalAlign::kTopLeft, 0, 5}, Mask{false, CausalAlign::kTopLeft, -1, 0}}) {
        double drawn = 0;
        for (int64_t i = 0; i < seqlen_q; ++i) {
          for (int64_t j = 0; j < seqlen_k; ++j) {
            const int64_t p = mask.align == CausalAlign::kBottomRight ? i + seqlen_k - seqlen_q : i;
            drawn += (!mask.causal || j <= p) &&
                             (mask.window_left < 0 || j >= p - mask.window_left) &&
                             (mask.window_right < 0 || j <= p + mask.window_right)
                         ? 1
                         : 0;
          }
        }
        EXPECT_EQ(visible_pairs(seqlen_q, seqlen_k, mask), drawn)
            << seqlen_q << " " << seqlen_k << " " << mask.causal;
      }
    }
  }
}

TEST(SpreadPositions, HoldBothEndsAndRise) {
  EXPECT_EQ(spread_positions(3, 8), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_EQ(spread_positions(100, 3), (std::vector<int64_t>{0, 49, 99}));
  EXPECT_EQ(spread_positions(100, 1), (std::vector<int64_t>{99}));
  EXPECT_TRUE(spread_positions(0, 4).empty());
}

TEST(Median, IsTheMiddleOrTheMeanOfTheTwoMiddles) {
  EXPECT_EQ(median({5, 1, 9}), 5);
  EXPECT_EQ(median({4, 1, 9, 2}), 3);
  EXPECT_EQ(median({}), 0);
}

TEST(ParallelCases, RunEachOnceAndHandOnTheFirstFailure) {
  std::vector<std::atomic<int>> seen(100);
  parallel_cases(100, 4, [&](int64_t i) { ++seen[static_cast<size_t>(i)]; });
  for (const auto& count : seen) EXPECT_EQ(count, 1);
  EXPECT_THROW(parallel_cases(100, 4,
                              [](int64_t i) {
                                if (i == 7) throw std::runtime_error("seven");
                              }),
               std::runtime_error);
}

TEST(Oracles, SampledRowsAreThoseOfTheWholeOutput) {
  const Qkv qkv = make_qkv("normal", 3, {2, 4, 2, 9, 20, 16});
  const Mask causal = {true, CausalAlign::kBottomRight, -1, -1};
  const Sample all = Sample::spread(qkv.shape(), 100, 100);
  const Sample some = {{{1, 3}}, {2, 8}};
  const auto whole = exact_rows(qkv, std::nullopt, causal, all, 2);
  const auto part = exact_rows(qkv, std::nullopt, causal, some, 2);
  ASSERT_EQ(whole.size(), 2U * 4 * 9 * 16);
  ASSERT_EQ(part.size(), 2U * 16);
  for (size_t r = 0; r < 2; ++r) {
    for (size_t d = 0; d < 16; ++d) {
      const size_t row = static_cast<size_t>(some.rows[r]);
      EXPECT_EQ(part[r * 16 + d], whole[((1 * 4 + 3) * 9 + row) * 16 + d]);
    }
  }
}

TEST(Oracles, EveryModeIsNearerToItsEmulationThanToTheExactResult) {
  const Qkv qkv = make_qkv("normal", 3, {1, 4, 2, 40, 300, 64});
  const Sample sample = Sample::spread(qkv.shape(), 40, 4);
  const Context context = Context::cpu(2);
  const auto exact = exact_rows(qkv, std::nullopt, {}, sample, 2);
  for (const NamedMode& mode : compared_modes()) {
    const auto out = mode_rows(qkv, mode.options, context, sample);
    const auto emulated = emulated_rows(qkv, reference::emulation_options(mode.options), sample, 2);
    const double to_emulation = reference::error_report(out, emulated).rel_l2;
    const double to_exact = reference::error_report(out, exact).rel_l2;
    EXPECT_GT(to_exact, 1e-3) << mode.name;
    EXPECT_LT(to_emulation, 0.2 * to_exact) << mode.name;
  }
}

TEST(Recipe, UnknownNamesAreRefusedWithTheKnownOnes) {
  const std::string line = rejection([] { make_qkv("none", 1, {1, 1, 1, 1, 1, 1}); });
  EXPECT_NE(line.find("got 'none'"), std::string::npos);
  EXPECT_NE(line.find("normal"), std::string::npos);
}

TEST(Study, GridsHoldTheDefaultOnce) {
  const auto is_default = [](const StudyConfig& config) {
    const auto a = config.options;
    const auto b = default_config().options;
    return a.v_granularity == b.v_granularity && a.p_scale == b.p_scale &&
           a.normalizer == b.normalizer && a.smooth_k == b.smooth_k && a.kv_block == b.kv_block &&
           a.residual_mean == b.residual_mean && a.score_grid == b.score_grid;
  };
  for (const auto& grid : {main_grid(), full_grid()}) {
    EXPECT_EQ(std::count_if(grid.begin(), grid.end(), is_default), 1);
  }
  EXPECT_EQ(baselines().size(), 4U);
}

TEST(Verify, SweepTouchesEveryValueOfEveryAxis) {
  const auto cases = verify_cases(Mode::kAccurate, false);
  const auto any = [&](auto&& test) { return std::any_of(cases.begin(), cases.end(), test); };
  for (const int64_t length : {1, 2, 3, 31, 33, 127, 501, 511, 513}) {
    EXPECT_TRUE(any([&](const VerifyCase& c) { return c.shape.seqlen_q == length; })) << length;
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    EXPECT_TRUE(any([&](const VerifyCase& c) { return c.dtype == dtype; }));
  }
  for (const auto data :
       {Data::kNormal, Data::kZeros, Data::kOneHot, Data::kOutliers, Data::kHuge}) {
    EXPECT_TRUE(any([&](const VerifyCase& c) { return c.data == data; }));
  }
  for (const bool causal : {true, false}) {
    for (const auto align : {CausalAlign::kTopLeft, CausalAlign::kBottomRight}) {
      EXPECT_TRUE(any([&](const VerifyCase& c) {
        return c.options.mask.causal == causal && c.options.mask.align == align;
      }));
    }
  }
  EXPECT_GT(verify_cases(Mode::kAccurate, true).size(), 4 * cases.size());
}

TEST(Bench, RatesFollowFromTheirParts) {
  const Qkv qkv = make_qkv("normal", 1, {1, 2, 1, 64, 128, 32});
  BenchOptions how;
  how.repeats = 2;
  how.peak_ms = 0.5;
  const BenchResult result = bench(qkv, {}, Context::cpu(1), how);
  EXPECT_NEAR(result.gops * result.median_ms * 1e6, 4.0 * 2 * 32 * 64 * 128, 1);
  EXPECT_LE(result.min_ms, result.median_ms);
  EXPECT_EQ(result.repeats, 2);
  EXPECT_FALSE(result.bytes_per_s.has_value());
  ASSERT_TRUE(result.rel_l2.has_value());
  EXPECT_GT(*result.rel_l2, 1e-4);
  EXPECT_LT(*result.rel_l2, 0.1);
  const bool has_peak = find_peak(best_isa(), Mode::kAccurate).has_value();
  EXPECT_EQ(result.peak_fraction.has_value(), has_peak);
  if (has_peak) {
    EXPECT_GT(*result.peak_fraction, 0);
  }
}

TEST(Bench, DecodeIsMeasuredAgainstMemory) {
  const Qkv qkv = make_qkv("normal", 1, {1, 2, 1, 1, 256, 32});
  BenchOptions how;
  how.repeats = 1;
  how.rows = 0;
  how.peak_ms = 0.5;
  const BenchResult result = bench(qkv, {}, Context::cpu(1), how);
  ASSERT_TRUE(result.bytes_per_s.has_value());
  // A byte per code and a float per token, of K and of V.
  const double kv_bytes = 2.0 * 256 * (32 + 4);
  EXPECT_NEAR(*result.bytes_per_s * result.median_ms * 1e-3, kv_bytes, 1e-6 * kv_bytes);
  EXPECT_NEAR(result.ops_per_byte, 4.0 * 2 * 32 * 256 / (kv_bytes + 2 * 2 * 32 * 4), 1e-9);
  EXPECT_GT(*result.stream_fraction, 0);
}

TEST(Ceilings, NameEveryMultiplyAddOnce) {
  for (const IsaSupport& support : isa_support()) {
    if (!support.available) continue;
    const Ceilings ceilings = measure_ceilings(support.isa, 1);
    EXPECT_GT(ceilings.bytes_per_s, 0);
    std::set<std::string_view> names;
    for (const auto& rate : ceilings.rates) {
      EXPECT_GT(rate.gops, 0);
      EXPECT_TRUE(names.insert(rate.name).second);
    }
    const auto exact = find_peak(support.isa, Mode::kExact);
    EXPECT_EQ(exact.has_value(), find_peak(support.isa, Operands::kFloat32).has_value());
    if (exact) {
      EXPECT_TRUE(names.contains(exact->name));
    }
  }
}

TEST(Report, PeersAreShownFromTheirJsonOnly) {
  const auto page_of = [](const std::string& text) {
    HtmlPage page("t");
    peers_section(page, text);
    return page.str();
  };
  const std::string page = page_of(
      R"({"machine": {"cpu": "a CPU"}, "records": [
        {"library": "other", "variant": "v", "case": "c", "threads": 1, "median_ms": 20,
         "ratio": 2.5, "rel_l2": 0.01},
        {"library": "attn8", "variant": "accurate", "case": "c", "threads": 1, "median_ms": 8,
         "ratio": 1, "rel_l2": 0.02}]})");
  EXPECT_NE(page.find("20.0 ms (2.50; 1.00 %)"), std::string::npos);
  EXPECT_NE(page.find("8.00 ms (1.00; 2.00 %)"), std::string::npos);
  EXPECT_NE(page.find("a CPU"), std::string::npos);
  for (const char* nothing : {"", "{", "[]", "{}", R"({"records": 1})", R"({"records": []})"}) {
    EXPECT_EQ(page_of(nothing), page_of("")) << nothing;
  }
}

}  // namespace
}  // namespace attn8::app
