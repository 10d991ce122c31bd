// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "emulator/device.hpp"

/// Matrix products of both tensor-core families.
namespace attn8::emulator {

/// Bytes of k that one instruction consumes: 32 of 8 bits or 16 of 16.
inline constexpr int kProductBytes = 32;

/// Whether elements have 16 bits and sums are floats; otherwise 8 bits and integers.
inline bool is_16_bit(Product product) {
  return product == Product::kF16F16 || product == Product::kBF16BF16;
}

/// a [m][32 bytes], b [n][32 bytes] -> d [m][n], as bits of int32 or float32.
void multiply(Product product, int m, int n, const uint8_t* a, const uint8_t* b, uint32_t* d);

/// Sum of an accumulator and a product, as bits: wrapping int32, or float32 rounded once.
uint32_t accumulate(Product product, uint32_t accumulator, uint32_t value);

/// Names of the warp and warpgroup instructions.
const char* mma_name(Product product);
const char* wgmma_name(Product product);

}  // namespace attn8::emulator
