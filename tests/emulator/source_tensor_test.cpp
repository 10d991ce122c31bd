// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/source_tensor.hpp"
#include "emulator/emulator.hpp"
#include "emulator/float16.hpp"

/// Rows of a caller's tensor as the quantize kernels load them, against one element at a time.
namespace attn8::cuda::testing {
namespace {

constexpr int kRows = 3;
constexpr int kLanes = 32;

struct Strides {
  int head_dim;
  int64_t row, channel;
  bool vectors;
};
const Strides kStrides[] = {{64, 64, 1, true},    {256, 264, 1, true}, {64, -64, 1, true},
                            {64, 0, 1, true},     {61, 61, 1, false},  {64, 200, 3, false},
                            {90, -90, 1, false},  {96, 1, -40, false}, {1, 8, 1, false},
                            {128, 130, 1, false}, {100, 7, 0, false}};

template <Source kSource>
constexpr int kBytes = kSource == Source::kFloat32 ? 4
                       : kSource == Source::kCodes ? 1
                                                   : 2;

template <Source kSource>
float element(const uint8_t* bytes) {
  uint16_t half = 0;
  std::memcpy(&half, bytes, kBytes<kSource> == 2 ? 2 : 1);
  if constexpr (kSource == Source::kCodes) return static_cast<int8_t>(bytes[0]);
  if constexpr (kSource == Source::kFloat16) return emulator::half_value(half);
  if constexpr (kSource == Source::kBFloat16) return std::bit_cast<float>(uint32_t{half} << 16);
  float value = 0;
  std::memcpy(&value, bytes, 4);
  return value;
}

template <Source kSource>
void check(const Strides& s) {
  SCOPED_TRACE(::testing::Message()
               << "head_dim " << s.head_dim << ", strides " << s.row << ", " << s.channel);
  // Whole, so that any signs of strides stay inside; only elements the rows have may be touched.
  constexpr int64_t kCentre = 16384;
  alignas(16) static uint8_t data[2 * kCentre * 4];
  std::mt19937 random(7);
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(random() & 0x7B);  // finite halves
  SourceTensor x{};
  x.data = data + kCentre * kBytes<kSource>;
  x.stride_row = s.row;
  x.stride_channel = s.channel;
  x.vectors = s.vectors;
  x.head_dim = s.head_dim;
  std::vector<float> got(kRows * kLanes * 8, -1.0f);
  emulator::Config config;
  config.threads = kLanes;
  config.buffers = {{"x", data, sizeof data, false},
                    {"got", got.data(), got.size() * sizeof(float), true}};
  const emulator::Report report = emulator::run(config, {}, [&] {
    const int lane = ptx::thread_index();
    EightChannels<kSource> rows[kRows];
    load_rows<kSource>(
        x, lane, [&](int i) { return i == 1 ? kNoRow : x.offset(0, i, 0); }, rows);
    for (int i = 0; i < kRows; ++i) {
      float values[8];
      rows[i].widen(values);
      for (int c = 0; c < 8; ++c) ptx::st_global(&got[(i * kLanes + lane) * 8 + c], values[c]);
    }
  });
  ASSERT_TRUE(report.ok) << report.error;
  for (int i = 0; i < kRows; ++i) {
    for (int channel = 0; channel < kLanes * 8; ++channel) {
      const int64_t at = kCentre + i * s.row + channel * s.channel;
      const float want =
          i == 1 || channel >= s.head_dim ? 0.0f : element<kSource>(data + at * kBytes<kSource>);
      ASSERT_EQ(got[i * kLanes * 8 + channel], want) << "row " << i << ", channel " << channel;
    }
  }
}

template <Source kSource>
void check_all() {
  for (const Strides& strides : kStrides) check<kSource>(strides);
}

TEST(SourceTensor, Float32) { check_all<Source::kFloat32>(); }
TEST(SourceTensor, Float16) { check_all<Source::kFloat16>(); }
TEST(SourceTensor, BFloat16) { check_all<Source::kBFloat16>(); }
TEST(SourceTensor, Codes) { check_all<Source::kCodes>(); }

}  // namespace
}  // namespace attn8::cuda::testing
