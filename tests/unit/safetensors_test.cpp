// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "safetensors.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "failure.hpp"
#include "real_tensors.hpp"

namespace attn8::app {
namespace {

class Safetensors : public testing::Test {
 protected:
  ~Safetensors() override { std::filesystem::remove(path_); }

  const std::string& write(const std::string& header, const std::string& data) {
    const uint64_t length = header.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    std::ofstream(path_, std::ios::binary) << bytes << header << data;
    return path_;
  }
  std::string rejection(const std::string& header, const std::string& data) {
    try {
      const SafetensorsFile file("--qkv", write(header, data));
    } catch (const Failure& failure) {
      EXPECT_EQ(failure.status().code(), StatusCode::kInvalidArgument);
      EXPECT_EQ(std::string(failure.what()).find('\n'), std::string::npos);
      return failure.what();
    }
    return "";
  }

  std::string path_ = testing::TempDir() + "attn8_" +
                      testing::UnitTest::GetInstance()->current_test_info()->name() +
                      ".safetensors";
};

/// Header entry of a tensor.
std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  int begin, int end) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + ",\"data_offsets\":[" +
         std::to_string(begin) + "," + std::to_string(end) + "]}";
}

TEST_F(Safetensors, ReadsEveryTypeAndTheMetadata) {
  const std::string header = R"({"__metadata__":{"a.causal":"true","causal":"false"},)" +
                             entry("a.q", "F32", "[1,1,1,1]", 0, 4) + "," +
                             entry("a.k", "F16", "[1,1,2,1]", 4, 8) + "," +
                             entry("a.v", "BF16", "[1,2,1,1]", 8, 12) + "," +
                             entry("codes", "I8", "[1,1,1,1]", 12, 13) + "}   ";
  const std::string data("\x00\x00\x80\x3F\x00\x3C\x00\xC0\x80\x3F\x00\x40\x81", 13);
  const SafetensorsFile file("--qkv", write(header, data));
  EXPECT_EQ(file.tensors().size(), 4U);
  EXPECT_EQ(gather_rows(file.read("a.q").view(), {}), std::vector<double>{1});
  EXPECT_EQ(gather_rows(file.read("a.k").view(), {}), (std::vector<double>{1, -2}));
  EXPECT_EQ(gather_rows(file.read("a.v").view(), {}), (std::vector<double>{1, 2}));
  EXPECT_EQ(static_cast<int8_t>(*file.read("codes").data()), -127);
  EXPECT_EQ(file.qkv_prefixes(), std::vector<std::string>{"a."});
  EXPECT_EQ(file.find_metadata("a.", "causal"), "true");
  EXPECT_EQ(file.find_metadata("b.", "causal"), "false");
  EXPECT_EQ(file.find_metadata("a.", "other"), std::nullopt);
  EXPECT_THROW(static_cast<void>(file.read("b.q")), Failure);
}

TEST_F(Safetensors, LayoutGivesTheAxesTheirMeaning) {
  const std::string data(24, '\0');
  const SafetensorsFile file("--qkv",
                             write("{" + entry("q", "F32", "[1,2,3,1]", 0, 24) + "}", data));
  EXPECT_EQ(file.read("q", Layout::kBshd).shape(), (Extents{1, 2, 3, 1}));
  EXPECT_EQ(file.read("q", Layout::kBhsd).shape(), (Extents{1, 3, 2, 1}));
}

TEST_F(Safetensors, RefusesEveryDamage) {
  const std::string four(4, '\0');
  const std::string good = entry("q", "F32", "[1]", 0, 4);
  EXPECT_EQ(rejection("{" + good + "}", four), "");
  EXPECT_NE(rejection("{" + good, four).find("not a JSON object"), std::string::npos);
  EXPECT_NE(rejection("[1]", four).find("not a JSON object"), std::string::npos);
  EXPECT_NE(rejection("{" + good + "}", "").find("want it inside the 0 data bytes"),
            std::string::npos);
  EXPECT_NE(rejection("{" + good + "}", four + "x").find("1 bytes after its tensors"),
            std::string::npos);
  EXPECT_NE(rejection("{" + good + "," + good + "}", four).find("names 'q' twice"),
            std::string::npos);
  EXPECT_NE(rejection("{" + entry("q", "F33", "[1]", 0, 4) + "}", four).find("unknown dtype"),
            std::string::npos);
  EXPECT_NE(rejection("{" + entry("q", "F32", "[2]", 0, 4) + "}", four).find("want 8"),
            std::string::npos);
  EXPECT_NE(rejection("{" + entry("q", "F32", "[-1]", 0, 4) + "}", four).find("bad shape"),
            std::string::npos);
  EXPECT_NE(rejection("{" + entry("q", "F32", "[1.5]", 0, 4) + "}", four).find("bad shape"),
            std::string::npos);
  EXPECT_NE(rejection("{" + entry("q", "F32", "[9000000000,9000000000]", 0, 4) + "}", four)
                .find("too large"),
            std::string::npos);
  EXPECT_NE(rejection("{" + entry("q", "F32", "[1]", 4, 8) + "}", four + four).find("a gap"),
            std::string::npos);
  EXPECT_NE(
      rejection("{" + good + "," + entry("k", "F32", "[1]", 0, 4) + "}", four).find("overlap"),
      std::string::npos);
  EXPECT_NE(rejection(R"({"q":{"dtype":"F32","shape":[1]}})", four).find("lacks"),
            std::string::npos);
  EXPECT_NE(rejection(R"({"__metadata__":{"a":1},)" + good + "}", four).find("not a string"),
            std::string::npos);
  EXPECT_NE(rejection("{}", four).find("after its tensors"), std::string::npos);
}

TEST_F(Safetensors, RefusesALengthBeyondTheFile) {
  std::ofstream(path_, std::ios::binary) << "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F{}";
  EXPECT_THROW(SafetensorsFile("--qkv", path_), Failure);
  std::ofstream(path_, std::ios::binary | std::ios::trunc) << "short";
  EXPECT_THROW(SafetensorsFile("--qkv", path_), Failure);
}

TEST_F(Safetensors, RealEntriesCarryTheirMaskAndScale) {
  const std::string header =
      R"({"__metadata__":{"m.l.causal":"true","m.l.softmax_scale":"0.25"},)" +
      entry("m.l.q", "F32", "[1,1,2,1]", 0, 8) + "," + entry("m.l.k", "F32", "[1,1,1,1]", 8, 12) +
      "," + entry("m.l.v", "F32", "[1,1,1,1]", 12, 16) + "}";
  const RealTensors tensors("--qkv", write(header, std::string(16, '\0')));
  ASSERT_EQ(tensors.size(), 1U);
  const RealEntry one = tensors.read(0);
  EXPECT_EQ(one.name, "m.l");
  EXPECT_TRUE(one.mask.causal);
  EXPECT_EQ(one.softmax_scale, 0.25F);
  EXPECT_EQ(one.qkv.shape().list(), (std::vector<int64_t>{1, 2, 1, 1, 1, 1}));
}

TEST_F(Safetensors, RealEntriesThatDoNotFitAreRefused) {
  const auto read = [&](const std::string& metadata, const std::string& v_shape, int v_end) {
    const std::string header =
        "{\"__metadata__\":{" + metadata + "}," + entry("q", "F32", "[1,1,2,1]", 0, 8) + "," +
        entry("k", "F32", "[1,1,1,1]", 8, 12) + "," + entry("v", "F32", v_shape, 12, v_end) + "}";
    const RealTensors tensors("--qkv",
                              write(header, std::string(static_cast<size_t>(v_end), '\0')));
    return tensors.read(0);
  };
  EXPECT_NO_THROW(read("", "[1,1,1,1]", 16));
  EXPECT_THROW(read("", "[1,2,1,1]", 20), Failure);
  EXPECT_THROW(read(R"("causal":"maybe")", "[1,1,1,1]", 16), Failure);
  EXPECT_THROW(read(R"("softmax_scale":"0,5")", "[1,1,1,1]", 16), Failure);
}

TEST(RealSample, IsReadableFromTheSourceTree) {
  const RealTensors tensors("--data", default_sample_path());
  EXPECT_GE(tensors.size(), 8U);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const RealEntry one = tensors.read(i);
    EXPECT_TRUE(one.softmax_scale.has_value()) << one.name;
    EXPECT_EQ(one.mask.causal, one.name.starts_with("smollm2")) << one.name;
  }
}

}  // namespace
}  // namespace attn8::app
