// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "npy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "failure.hpp"

namespace attn8::app {
namespace {

class Npy : public testing::Test {
 protected:
  Npy() { std::filesystem::create_directories(directory_); }
  ~Npy() override { std::filesystem::remove_all(directory_); }

  std::string write(const std::string& bytes) {
    const std::string path = directory_ + "/x.npy";
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }
  /// A version 1.0 file with this dictionary and these bytes of data.
  static std::string file(const std::string& header, const std::string& data) {
    std::string bytes = "\x93NUMPY";
    bytes += {'\x01', '\x00', static_cast<char>(header.size() & 0xFF),
              static_cast<char>(header.size() >> 8)};
    return bytes + header + data;
  }
  static std::string floats(const std::vector<float>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
  }
  /// The message with which reading these bytes fails; "" when it does not.
  std::string rejection(const std::string& bytes) {
    try {
      read_npy("--q", write(bytes));
    } catch (const Failure& failure) {
      EXPECT_EQ(failure.status().code(), StatusCode::kInvalidArgument);
      EXPECT_EQ(std::string(failure.what()).find('\n'), std::string::npos);
      return failure.what();
    }
    return "";
  }

  std::string directory_ = testing::TempDir() + "attn8_npy_" +
                           testing::UnitTest::GetInstance()->current_test_info()->name();
};

double at(const HostTensor& x, int64_t b, int64_t s, int64_t h, int64_t d) {
  return load_float(element_address(x.view(), b, s, h, d), x.dtype());
}

constexpr const char* kShape =
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3, 1), }\n";

TEST_F(Npy, ReadsBothLayoutsAndBothOrders) {
  const std::string data = floats({0, 1, 2, 3, 4, 5});
  const HostTensor bshd = read_npy_tensor("--q", write(file(kShape, data)), Layout::kBshd);
  EXPECT_EQ(bshd.shape(), (Extents{1, 2, 3, 1}));
  EXPECT_EQ(at(bshd, 0, 1, 2, 0), 5);
  EXPECT_EQ(at(bshd, 0, 0, 1, 0), 1);

  const HostTensor bhsd = read_npy_tensor("--q", write(file(kShape, data)), Layout::kBhsd);
  EXPECT_EQ(bhsd.shape(), (Extents{1, 3, 2, 1}));
  EXPECT_EQ(at(bhsd, 0, 2, 0, 0), 2);  // head 0, position 2

  const std::string fortran = "{'descr':'<f4','shape':(1,2,3,1),'fortran_order':True}";
  const HostTensor f = read_npy_tensor("--q", write(file(fortran, data)), Layout::kBshd);
  EXPECT_EQ(at(f, 0, 1, 0, 0), 1);
  EXPECT_EQ(at(f, 0, 0, 1, 0), 2);
}

TEST_F(Npy, ReadsFormatTwoAndFloat16) {
  const std::string header = "{'descr': '<f2', 'fortran_order': False, 'shape': (2,)}";
  std::string bytes = "\x93NUMPY";
  bytes += {'\x02', '\x00', static_cast<char>(header.size()), '\0', '\0', '\0'};
  bytes += header + std::string("\x00\x3C\x00\xC0", 4);  // 1 and -2
  const NpyArray array = read_npy("--q", write(bytes));
  ASSERT_EQ(array.shape, std::vector<int64_t>{2});
  EXPECT_EQ(array.dtype, DType::kFloat16);
  EXPECT_EQ(load_float(array.bytes.data(), array.dtype), 1);
  EXPECT_EQ(load_float(array.bytes.data() + 2, array.dtype), -2);
}

TEST_F(Npy, AcceptsAnEmptyArray) {
  const std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 0, 3, 1), }\n";
  EXPECT_EQ(read_npy_tensor("--q", write(file(header, "")), Layout::kBshd).shape()[1], 0);
}

TEST_F(Npy, RefusesEveryDamage) {
  const std::string data = floats({0, 1, 2, 3, 4, 5});
  EXPECT_EQ(rejection(file(kShape, data)), "");
  EXPECT_NE(rejection("").find("--q: '"), std::string::npos);
  EXPECT_NE(rejection("PK\x03\x04 something else").find("does not begin as"), std::string::npos);
  EXPECT_NE(rejection("\x93NUMPY\x03" + std::string(20, '\0')).find("format 3.0"),
            std::string::npos);
  EXPECT_NE(rejection(file(kShape, data.substr(1))).find("is truncated: 23 bytes"),
            std::string::npos);
  EXPECT_NE(rejection(file(kShape, data + "x")).find("trailing data: 25 bytes"), std::string::npos);
  EXPECT_NE(rejection(file(kShape, data).substr(0, 30)).find("is truncated"), std::string::npos);
  const auto header = [&](const std::string& text) { return rejection(file(text, data)); };
  EXPECT_NE(header("{'descr': '<i8', 'fortran_order': False, 'shape': (6,)}").find("dtype '<i8'"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '>f4', 'fortran_order': False, 'shape': (6,)}").find("dtype '>f4'"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '<f4', 'fortran_order': False, 'shape': (-6,)}").find("shape (-6)"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '<f4', 'fortran_order': False, 'shape': ()}").find("has 0 axes"),
            std::string::npos);
  EXPECT_NE(
      header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,2,3)}").find("has 5 axes"),
      std::string::npos);
  EXPECT_NE(header("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}")
                .find("too many elements"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '<f4', 'fortran_order': False}").find("a missing key"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '<f4', 'fortran_order': False, 'shape': (6,), 'more': 1}")
                .find("key 'more'"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '<f4', 'fortran_order': 0, 'shape': (6,)}").find("True or False"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '<f4', 'fortran_order': False, 'shape': (six,)}")
                .find("not a tuple of integers"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '<f4', 'fortran_order': False, 'shape': (6,)} {}").find("text after"),
            std::string::npos);
  EXPECT_NE(header("{'descr': '<f4").find("unfinished string"), std::string::npos);
}

TEST_F(Npy, NamesTheMissingFileAndTheWrongRank) {
  try {
    read_npy("--k", directory_ + "/missing.npy");
    FAIL() << "no failure";
  } catch (const Failure& failure) {
    EXPECT_NE(std::string(failure.what()).find("--k: '"), std::string::npos);
    EXPECT_NE(std::string(failure.what()).find("No such file"), std::string::npos);
  }
  const std::string flat = "{'descr': '<f4', 'fortran_order': False, 'shape': (6,)}";
  try {
    read_npy_tensor("--k", write(file(flat, floats({0, 1, 2, 3, 4, 5}))), Layout::kBhsd);
    FAIL() << "no failure";
  } catch (const Failure& failure) {
    EXPECT_NE(std::string(failure.what())
                  .find("has 1 axes of float32, want 4 of floats: [batch, head, seq, dim]"),
              std::string::npos);
  }
}

TEST_F(Npy, WhatIsWrittenReadsBackInEitherLayout) {
  for (const Layout layout : {Layout::kBshd, Layout::kBhsd}) {
    HostTensor x(DType::kFloat32, {2, 3, 2, 5});
    for (size_t i = 0; i < x.floats().size(); ++i) x.floats()[i] = static_cast<float>(i) * 0.5F;
    const std::string path = directory_ + "/out.npy";
    write_npy(OutputFile("--out", path), x.view(), layout);
    EXPECT_EQ(std::filesystem::file_size(path) % 4, 0U);
    const HostTensor y = read_npy_tensor("--q", path, layout);
    ASSERT_EQ(y.shape(), x.shape());
    EXPECT_EQ(gather_rows(y.view(), {}), gather_rows(x.view(), {}));
  }
}

TEST_F(Npy, DropsTheLastAxisOfAnLse) {
  HostTensor lse(DType::kFloat32, {1, 3, 2, 1});
  for (size_t i = 0; i < 6; ++i) lse.floats()[i] = static_cast<float>(i);
  const std::string path = directory_ + "/lse.npy";
  write_npy(OutputFile("--lse", path), lse.view(), Layout::kBhsd, 3);
  const NpyArray array = read_npy("--q", path);
  EXPECT_EQ(array.shape, (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(load_float(array.bytes.data() + 4, array.dtype), 2);  // head 0, position 1
}

TEST_F(Npy, AnOutputPathIsCheckedBeforeAndNothingPartialStays) {
  EXPECT_THROW(OutputFile("--out", directory_ + "/missing/x.npy"), Failure);
  EXPECT_THROW(OutputFile("--out", directory_), Failure);
  EXPECT_THROW(OutputFile("--out", ""), Failure);
  const OutputFile file("--out", directory_ + "/y.npy");
  EXPECT_TRUE(std::filesystem::is_empty(directory_));  // the probe leaves nothing
  file.write("abc");
  EXPECT_EQ(std::filesystem::file_size(directory_ + "/y.npy"), 3U);
}

TEST(HostTensor, RoundsFloat16AndBfloat16ToNearestEven) {
  HostTensor x(DType::kFloat32, {1, 1, 1, 8});
  const std::vector<float> values = {1.0F + 0x1p-11F,      // tie: down to 1
                                     1.0F + 3 * 0x1p-11F,  // tie: up to 1 + 2^-9
                                     65519.0F,             // largest that stays finite
                                     65520.0F,             // halfway to 2^16: infinity
                                     0x1p-25F,             // half of the smallest subnormal
                                     3 * 0x1p-25F,         // tie: up to 2 * 2^-24
                                     -0x1.ffcp-15F,        // tie: up to the smallest normal
                                     1.0F + 0x1p-8F};
  std::copy(values.begin(), values.end(), x.floats().begin());
  const auto half = gather_rows(convert(x.view(), DType::kFloat16).view(), {});
  EXPECT_EQ(half[0], 1.0);
  EXPECT_EQ(half[1], 1.0 + 0x1p-9);
  EXPECT_EQ(half[2], 65504.0);
  EXPECT_EQ(half[3], HUGE_VAL);
  EXPECT_EQ(half[4], 0.0);
  EXPECT_EQ(half[5], 0x1p-23);
  EXPECT_EQ(half[6], -0x1p-14);
  EXPECT_EQ(half[7], 1.0 + 0x1p-8);
  const auto brain = gather_rows(convert(x.view(), DType::kBFloat16).view(), {});
  EXPECT_EQ(brain[7], 1.0);  // tie: down
  EXPECT_EQ(brain[2], 65536.0);
}

}  // namespace
}  // namespace attn8::app
