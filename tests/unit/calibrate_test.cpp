// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "calibrate.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <string>

#include "failure.hpp"

namespace attn8::app {
namespace {

std::string failure_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.status().code(), StatusCode::kInvalidArgument);
    return failure.status().message();
  }
  return "nothing thrown";
}

TEST(Calibrate, NamesOfEntries) {
  const auto expect_name = [](const char* name, const char* model, int64_t layer, int64_t head) {
    const EntryName parsed = parse_entry_name("--data", name);
    EXPECT_EQ(parsed.model, model) << name;
    EXPECT_EQ(parsed.layer, layer) << name;
    EXPECT_EQ(parsed.first_kv_head, head) << name;
  };
  expect_name("smollm2.layer.05.kv1", "smollm2", 5, 1);
  expect_name("layer.29", "", 29, 0);
  expect_name("a.b.layer.7", "a.b", 7, 0);
  for (const char* name : {"qkv", "layer", "layer.x", "smollm2.layer.-1"}) {
    EXPECT_EQ(failure_of([&] { parse_entry_name("--data", name); }),
              "--data: entry '" + std::string(name) +
                  "' wants a name like MODEL.layer.05.kv1 or layer.05");
  }
}

/// The worst head goes first, to half where that helps and to exact where it does not or no longer.
TEST(Calibrate, SpendsTheBudgetOnTheWorst) {
  const std::vector<HeadError> start = {
      {.layer = 0, .kv_head = 0, .reference = 100, .accurate = 1, .half = 0.5},
      {.layer = 0, .kv_head = 1, .reference = 100, .accurate = 16, .half = 4},
      {.layer = 3, .kv_head = 0, .reference = 200, .accurate = 8, .half = 9},
  };
  EXPECT_DOUBLE_EQ(total_error(start), std::sqrt(25.0 / 400));
  const auto modes = [&](double budget) {
    std::vector<HeadError> heads = start;
    spend_budget(budget, heads);
    EXPECT_LE(total_error(heads), budget);
    return std::vector{heads[0].mode, heads[1].mode, heads[2].mode};
  };
  using enum Mode;
  EXPECT_EQ(modes(0.25), (std::vector{kAccurate, kAccurate, kAccurate}));
  EXPECT_EQ(modes(0.2), (std::vector{kAccurate, kHalf, kAccurate}));  // 13 / 400
  EXPECT_EQ(modes(0.12), (std::vector{kAccurate, kHalf, kExact}));    // 5 / 400
  EXPECT_EQ(modes(0.06), (std::vector{kAccurate, kExact, kExact}));   // 1 / 400
  EXPECT_EQ(modes(0.04), (std::vector{kHalf, kExact, kExact}));       // 0.5 / 400
  EXPECT_EQ(modes(0), (std::vector{kExact, kExact, kExact}));
}

/// Errors of kv heads from runs: exact is 0 from itself, and two captures add up.
TEST(Calibrate, MeasuresEachKvHead) {
  const RealTensors sample("--data", default_sample_path());
  std::vector<HeadError> heads;
  for (int captures = 1; captures <= 2; ++captures) {
    for (size_t i = 0; i < sample.size(); ++i) {
      const EntryName name = parse_entry_name("--data", sample.name(i));
      if (name.model == "smollm2") measure_entry(name, sample.read(i), Context(), heads);
    }
  }
  ASSERT_EQ(heads.size(), 5U);
  EXPECT_EQ(heads[2].layer, 10);
  EXPECT_EQ(heads[2].kv_head, 1);
  std::vector<HeadError> once;
  const RealEntry entry = sample.read(3);  // the entries of minilm come first
  measure_entry(parse_entry_name("--data", sample.name(3)), entry, Context(), once);
  ASSERT_EQ(once.size(), 1U);
  EXPECT_EQ(once[0].layer, 0);
  EXPECT_DOUBLE_EQ(heads[0].reference, 2 * once[0].reference);
  EXPECT_DOUBLE_EQ(heads[0].accurate, 2 * once[0].accurate);
  for (const HeadError& head : heads) {
    EXPECT_GT(head.accurate, head.half);
    EXPECT_GT(head.half, 0);
    EXPECT_LT(head.accurate, 0.01 * head.reference);
  }
}

class PolicyFile : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = ::testing::TempDir() + "attn8_policy_" + std::to_string(getpid()) + ".json";
  }
  void TearDown() override { std::remove(path_.c_str()); }
  [[nodiscard]] std::string refused(const std::string& text) const {
    std::ofstream(path_) << text;
    return failure_of([&] { read_policy("--policy", path_); });
  }
  std::string path_;
};

TEST_F(PolicyFile, ReadsWhatItWrites) {
  HeadPolicy policy;
  policy.model = "m";
  policy.heads = {{{2, 1}, Mode::kHalf}, {{2, 0}, Mode::kExact}, {{11, 3}, Mode::kExact}};
  std::ofstream(path_) << policy.json().dump(1);
  const HeadPolicy read = read_policy("--policy", path_);
  EXPECT_EQ(read.model, "m");
  EXPECT_EQ(read.heads, policy.heads);
  EXPECT_EQ(read.mode(2, 1), Mode::kHalf);
  EXPECT_EQ(read.mode(2, 2), Mode::kAccurate);
  EXPECT_EQ(read.modes(2, 3), (std::vector{Mode::kExact, Mode::kHalf, Mode::kAccurate}));
  EXPECT_TRUE(read.modes(11, 3).empty());  // its kv head 3 is not there
  EXPECT_TRUE(read.modes(0, 3).empty());
}

TEST_F(PolicyFile, RefusesWhatIsNone) {
  const std::string none = "--policy: '" + path_ +
                           "': is not a policy, want JSON with format 'attn8-head-policy', version "
                           "1, default 'accurate' and heads";
  const std::string head = R"({"format":"attn8-head-policy","version":1,"default":"accurate",)";
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("{}"),
        head + R"("heads":3})",
        std::string(
            R"({"format":"attn8-head-policy","version":2,"default":"accurate","heads":[]})"),
        std::string(R"({"format":"attn8-head-policy","version":1,"default":"half","heads":[]})")}) {
    EXPECT_EQ(refused(text), none) << text;
  }
  for (const char* entry :
       {"3", R"({"layer":0,"kv_head":0})", R"({"layer":-1,"kv_head":0,"mode":"half"})",
        R"({"layer":0.5,"kv_head":0,"mode":"half"})", R"({"layer":0,"kv_head":0,"mode":"paper"})",
        R"({"layer":99999999999,"kv_head":0,"mode":"half"})"}) {
    EXPECT_EQ(refused(head + "\"heads\":[" + entry + "]}"),
              "--policy: '" + path_ +
                  "': heads[0] wants a layer and a kv_head from 0 to 1048576 and a mode of "
                  "accurate, half, exact")
        << entry;
  }
  const std::string one = R"({"layer":4,"kv_head":2,"mode":"half"})";
  EXPECT_EQ(refused(head + "\"heads\":[" + one + "," + one + "]}"),
            "--policy: '" + path_ + "': heads[1] names layer 4, kv_head 2 again");
}

}  // namespace
}  // namespace attn8::app
