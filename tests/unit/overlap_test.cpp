// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/overlap.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <set>
#include <vector>

namespace attn8::testing {
namespace {

alignas(64) std::byte memory[1 << 16];

ConstTensorView view_at(int64_t offset_bytes, DType dtype, const Extents& shape,
                        const Extents& strides) {
  return {memory + offset_bytes, dtype, {}, shape, strides};
}

std::set<int64_t> bytes_of(const ConstTensorView& x) {
  std::set<int64_t> bytes;
  const auto size = static_cast<int64_t>(dtype_bytes(x.dtype));
  for (int64_t b = 0; b < x.shape[0]; ++b) {
    for (int64_t s = 0; s < x.shape[1]; ++s) {
      for (int64_t h = 0; h < x.shape[2]; ++h) {
        for (int64_t d = 0; d < x.shape[3]; ++d) {
          const int64_t element =
              b * x.strides[0] + s * x.strides[1] + h * x.strides[2] + d * x.strides[3];
          for (int64_t i = 0; i < size; ++i) {
            bytes.insert(static_cast<const std::byte*>(x.data) - memory + element * size + i);
          }
        }
      }
    }
  }
  return bytes;
}

bool share(const ConstTensorView& a, const ConstTensorView& b) {
  const std::set<int64_t> in_a = bytes_of(a);
  for (const int64_t byte : bytes_of(b)) {
    if (in_a.contains(byte)) return true;
  }
  return false;
}

/// Small views of any shape and strides, negative and zero ones among them, against their bytes.
TEST(Overlap, IsSharingAByte) {
  std::mt19937_64 random(1);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  int sharing = 0;
  int interleaved = 0;
  for (int round = 0; round < 20000; ++round) {
    const auto make = [&] {
      Extents shape;
      Extents strides;
      for (size_t i = 0; i < 4; ++i) {
        shape[i] = below(3) == 0 ? below(5) : 1 + below(2);
        strides[i] = below(4) == 0 ? below(7) - 3 : (below(2) * 2 - 1) * (int64_t{1} << below(6));
      }
      const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kInt8};
      return view_at((1 << 15) + below(400), dtypes[below(3)], shape, strides);
    };
    const ConstTensorView a = make();
    const ConstTensorView b = make();
    const bool wanted = share(a, b);
    ASSERT_EQ(overlap(a, b), wanted) << "round " << round;
    ASSERT_EQ(overlap(b, a), wanted) << "round " << round;
    sharing += wanted ? 1 : 0;
    const std::set<int64_t> x = bytes_of(a);
    const std::set<int64_t> y = bytes_of(b);
    if (!wanted && !x.empty() && !y.empty() && *x.begin() < *y.rbegin() &&
        *y.begin() < *x.rbegin()) {
      ++interleaved;
    }
  }
  EXPECT_GT(sharing, 1000);
  EXPECT_GT(interleaved, 1000);
}

/// q, k, v and out as slices of one buffer, of any length: found in a few steps, and so is what is
/// wrong by one element.
TEST(Overlap, SlicesOfOneBuffer) {
  constexpr int64_t kSeq = int64_t{1} << 30;
  constexpr int64_t kHeads = 8;
  constexpr int64_t kDim = 64;
  constexpr int64_t kToken = 4 * kHeads * kDim;  // q, k, v, out
  const Extents strides = {kSeq * kToken, kToken, kDim, 1};
  const Extents shape = {2, kSeq, kHeads, kDim};
  for (int64_t part = 1; part < 4; ++part) {
    const ConstTensorView out = view_at(0, DType::kFloat16, shape, strides);
    const int64_t offset = part * kHeads * kDim * 2;
    EXPECT_FALSE(overlap(out, view_at(offset, DType::kFloat16, shape, strides))) << part;
    EXPECT_EQ(overlap(out, view_at(offset - 2, DType::kFloat16, shape, strides)), part == 1);
    EXPECT_EQ(overlap(out, view_at(offset + 2, DType::kFloat16, shape, strides)), part == 3);
  }
}

/// The stride of a dimension of one element says nothing.
TEST(Overlap, StridesOfOneElement) {
  const Extents wild = {INT64_MAX, INT64_MIN, INT64_MAX / 2, -INT64_MAX};
  const ConstTensorView one = view_at(64, DType::kFloat32, {1, 1, 1, 1}, wild);
  EXPECT_TRUE(overlap(one, one));
  EXPECT_TRUE(overlap(one, view_at(66, DType::kFloat16, {1, 1, 1, 1}, wild)));
  EXPECT_FALSE(overlap(one, view_at(68, DType::kFloat32, {1, 1, 1, 1}, wild)));
}

}  // namespace
}  // namespace attn8::testing
