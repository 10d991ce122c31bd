// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/kernel_table.hpp"
#include "support/kernel_case.hpp"

// The functions of a kernel table that take several rows, against docs/numerics.md by hand.

namespace attn8::testing {
namespace {

/// Rows of a tensor whose rows and elements lie apart, and their values.
struct Rows {
  Rows(DType dtype, int64_t rows, int n, int64_t stride)
      : tensor(dtype, {1, rows, 2, n * stride}), span{}, values() {
    std::mt19937_64 random(static_cast<uint64_t>(rows * 1000 + n));
    std::normal_distribution<double> normal;
    tensor.fill([&](int64_t, int64_t row, int64_t, int64_t) {
      switch (row % 7) {
        case 2:
          return 0.0;
        case 3:
          return normal(random) * 1e-7;
        case 4:
          return normal(random) * 3e3;
        default:
          return normal(random) + 0.25;
      }
    });
    const ConstTensorView view = tensor.view();
    span = {view.data, dtype,  view.strides[1] * static_cast<int64_t>(dtype_bytes(dtype)),
            rows,      stride, n};
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < n; ++i) {
        values.push_back(static_cast<float>(tensor.get(0, r, 0, i * stride)));
      }
    }
  }

  Tensor tensor;
  RowSpan span;
  std::vector<float> values;  ///< [rows][n]
};

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

class RowsOf : public EachIsa {};

TEST_P(RowsOf, QuantizedAsDefined) {
  const KernelTable& table = *find_kernel_table(GetParam());
  for (const DType dtype : kTypes) {
    for (const int64_t stride : {1, 3}) {
      for (const int n : {1, 16, 17, 64, 72, 100, 128, 256}) {
        for (const int64_t count : {1, 4, 11}) {
          Rows rows(dtype, count, n, stride);
          std::vector<float> mean(static_cast<size_t>(n));
          for (int i = 0; i < n; ++i) mean[static_cast<size_t>(i)] = 0.01f * static_cast<float>(i);
          for (const bool smooth : {false, true}) {
            const int64_t padded = (n + 15) / 16 * 16;
            std::vector<int8_t> codes(static_cast<size_t>(count * padded), 99);
            std::vector<uint32_t> bits(static_cast<size_t>(count));
            table.quantize_rows(rows.span, smooth ? mean.data() : nullptr, codes.data(), padded,
                                bits.data());
            for (int64_t r = 0; r < count; ++r) {
              std::vector<float> x(static_cast<size_t>(n));
              float largest = 0;
              for (int i = 0; i < n; ++i) {
                x[i] = rows.values[r * n + i] - (smooth ? mean[i] : 0.0f);
                largest = std::max(largest, std::abs(x[i]));
              }
              ASSERT_EQ(std::bit_cast<float>(bits[r]), largest) << to_string(dtype) << " n " << n;
              const float scale =
                  std::bit_cast<float>(std::bit_cast<uint32_t>(largest / 127) / 8 * 8);
              for (int i = 0; i < padded; ++i) {
                const float code = i < n && largest > 0 ? std::nearbyint(x[i] / scale) : 0.0f;
                ASSERT_EQ(codes[r * padded + i], static_cast<int8_t>(code))
                    << to_string(dtype) << " n " << n << " row " << r << " element " << i;
              }
            }
          }
        }
      }
    }
  }
}

/// Quotients at and next to the halves between two codes, for scales of all lengths.
TEST_P(RowsOf, DividedToTheLastBit) {
  const KernelTable& table = *find_kernel_table(GetParam());
  std::mt19937 random(5);
  for (int i = 0; i < 4000; ++i) {
    const uint32_t mantissa = static_cast<uint32_t>(random()) >> 9 & (~0u << (3 + i % 20));
    const auto exponent = static_cast<uint32_t>(i % 2 == 0 ? 127 : 30 + random() % 190);
    const float scale = std::bit_cast<float>(exponent << 23 | mantissa);
    float x[48];
    for (int j = 0; j < 16; ++j) {
      const float half = (static_cast<float>(random() % 127) + 0.5f) * scale;
      x[3 * j] = half;
      x[3 * j + 1] = std::nextafter(half, 0.0f);
      x[3 * j + 2] = -std::nextafter(half, std::numeric_limits<float>::infinity());
    }
    int8_t codes[48];
    table.encode(x, 48, &scale, 0, codes);
    for (int j = 0; j < 48; ++j) {
      ASSERT_EQ(codes[j], static_cast<int8_t>(std::nearbyint(x[j] / scale)))
          << x[j] << " / " << scale;
    }
  }
}

TEST_P(RowsOf, WithWhatHasNoScale) {
  const KernelTable& table = *find_kernel_table(GetParam());
  constexpr int kN = 32;
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // In each four rows, one that has a scale.
  const float last[] = {nan, inf, -inf, 1, 1e-38f, 1e-40f, 1, 3e38f};
  float x[8][kN];
  for (int r = 0; r < 8; ++r) {
    for (int i = 0; i < kN; ++i) x[r][i] = last[r] < 1e-30f ? 0.0f : 0.5f;
    x[r][kN - 1] = last[r];
  }
  int8_t codes[8][kN];
  uint32_t bits[8];
  table.quantize_rows({x, DType::kFloat32, sizeof(x[0]), 8, 1, kN}, nullptr, codes[0], kN, bits);
  for (int r = 0; r < 8; ++r) {
    const bool finite = std::isfinite(last[r]);
    EXPECT_EQ(bits[r] < 0x7f800000u, finite) << r;
    // 1e-38 / 127 is below the smallest normal number.
    EXPECT_EQ(codes[r][kN - 1], finite && last[r] >= 1e-30f ? 127 : 0) << r;
    EXPECT_EQ(codes[r][0], last[r] == 1 ? 64 : 0) << r;  // 63.5 to even
  }
}

/// Rounded to bfloat16 as float_to_bfloat16() does, whole rows at a time or not.
TEST_P(RowsOf, StoredAsBfloat16) {
  const KernelTable& table = *find_kernel_table(GetParam());
  std::mt19937 random(9);
  for (const bool with_nan : {false, true}) {
    for (const int64_t stride : {1, 2}) {
      for (const int n : {1, 16, 40, 128}) {
        std::vector<float> x(static_cast<size_t>(n));
        for (float& value : x) {
          // Any bits but those of a NaN, many of them halfway between two bfloat16.
          const uint32_t bits =
              static_cast<uint32_t>(random()) & (random() % 2 == 0 ? ~0u : ~0x7fffu);
          value =
              std::bit_cast<float>((bits & 0x7fffffffu) > 0x7f800000u ? bits & ~0x40000000u : bits);
        }
        if (with_nan) x[static_cast<size_t>(n / 2)] = std::bit_cast<float>(0xffffffffu);
        std::vector<uint16_t> out(static_cast<size_t>(n * stride));
        table.store_row(x.data(), n, DType::kBFloat16, stride, out.data());
        for (int i = 0; i < n; ++i) {
          const uint16_t got = out[i * stride];
          if (std::isnan(x[i])) {
            EXPECT_GT(got & 0x7fff, 0x7f80) << n;
            continue;
          }
          const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
          const uint32_t rest = bits & 0xffff;
          const uint32_t up = rest > 0x8000 || (rest == 0x8000 && (bits >> 16 & 1) != 0) ? 1 : 0;
          EXPECT_EQ(got, (bits >> 16) + up) << x[i];
        }
      }
    }
  }
}

TEST_P(RowsOf, AddedInOrder) {
  const KernelTable& table = *find_kernel_table(GetParam());
  for (const DType dtype : kTypes) {
    for (const int64_t stride : {1, 2}) {
      for (const int n : {1, 16, 40, 64, 100, 128, 256}) {
        Rows rows(dtype, 37, n, stride);
        std::vector<double> expected(static_cast<size_t>(n), 0.125);
        std::vector<double> sums = expected;
        for (int64_t r = 0; r < 37; ++r) {
          for (int i = 0; i < n; ++i) expected[i] += static_cast<double>(rows.values[r * n + i]);
        }
        table.add_rows(rows.span, sums.data());
        EXPECT_EQ(expected, sums) << to_string(dtype) << " n " << n << " stride " << stride;
      }
    }
  }
}

ATTN8_INSTANTIATE_EACH_ISA(RowsOf);

}  // namespace
}  // namespace attn8::testing
