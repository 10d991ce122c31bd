// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "emulator/product.hpp"

#include <bit>
#include <cstddef>
#include <vector>

#include "emulator/float16.hpp"

namespace attn8::emulator {
namespace {

/// Elements as int16 (products of int8 and uint8 fit) or float.
template <class Element, class Sum>
void multiply_elements(int m, int n, int k, const Element* a, const Element* b, uint32_t* d) {
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      Sum sum = 0;
      for (int l = 0; l < k; ++l) sum += static_cast<Sum>(a[i * k + l]) * b[j * k + l];
      if constexpr (sizeof(Sum) == 8) {
        d[i * n + j] = std::bit_cast<uint32_t>(static_cast<float>(sum));
      } else {
        d[i * n + j] = static_cast<uint32_t>(sum);
      }
    }
  }
}

}  // namespace

void multiply(Product product, int m, int n, const uint8_t* a, const uint8_t* b, uint32_t* d) {
  constexpr int kMaxRows = 64;
  constexpr int kMaxColumns = 256;
  if (is_16_bit(product)) {
    const auto value = [product](const uint8_t* bytes) {
      const auto bits = static_cast<uint16_t>(bytes[0] | bytes[1] << 8);
      return product == Product::kF16F16 ? half_value(bits)
                                         : std::bit_cast<float>(uint32_t{bits} << 16);
    };
    constexpr int kK = kProductBytes / 2;
    float a_values[kMaxRows * kK];
    float b_values[kMaxColumns * kK];
    for (int i = 0; i < m * kK; ++i) a_values[i] = value(a + 2 * i);
    for (int i = 0; i < n * kK; ++i) b_values[i] = value(b + 2 * i);
    // Sums of 16 products of halves are exact in double, those of bfloat16 nearly. The hardware
    // keeps fewer bits; how many is not documented, so results agree to float32 rounding only.
    multiply_elements<float, double>(m, n, kK, a_values, b_values, d);
    return;
  }
  int16_t a_values[kMaxRows * kProductBytes];
  int16_t b_values[kMaxColumns * kProductBytes];
  for (int i = 0; i < m * kProductBytes; ++i) {
    a_values[i] = product == Product::kU8S8 ? int16_t{a[i]} : int16_t{static_cast<int8_t>(a[i])};
  }
  for (int i = 0; i < n * kProductBytes; ++i) b_values[i] = static_cast<int8_t>(b[i]);
  multiply_elements<int16_t, int32_t>(m, n, kProductBytes, a_values, b_values, d);
}

uint32_t accumulate(Product product, uint32_t accumulator, uint32_t value) {
  if (!is_16_bit(product)) return accumulator + value;
  return std::bit_cast<uint32_t>(std::bit_cast<float>(accumulator) + std::bit_cast<float>(value));
}

const char* mma_name(Product product) {
  switch (product) {
    case Product::kS8S8:
      return "mma.s8.s8";
    case Product::kU8S8:
      return "mma.u8.s8";
    case Product::kBF16BF16:
      return "mma.bf16.bf16";
    case Product::kF16F16:
      break;
  }
  return "mma.f16.f16";
}

const char* wgmma_name(Product product) {
  switch (product) {
    case Product::kS8S8:
      return "wgmma.s8.s8";
    case Product::kU8S8:
      return "wgmma.u8.s8";
    case Product::kBF16BF16:
      return "wgmma.bf16.bf16";
    case Product::kF16F16:
      break;
  }
  return "wgmma.f16.f16";
}

}  // namespace attn8::emulator
