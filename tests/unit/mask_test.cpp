// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/mask.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

namespace attn8::testing {
namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

/// The rule of attention.hpp, key by key.
bool sees(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k, int64_t row, int64_t key) {
  const int64_t p = mask.align == CausalAlign::kTopLeft ? row : row + seqlen_k - seqlen_q;
  if (mask.causal && key > p) return false;
  if (mask.window_left >= 0 && p - key > mask.window_left) return false;
  if (mask.window_right >= 0 && key - p > mask.window_right) return false;
  return true;
}

std::string text(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k) {
  std::ostringstream out;
  out << (mask.causal ? "causal " : "")
      << (mask.align == CausalAlign::kTopLeft ? "top_left " : "bottom_right ") << "window "
      << mask.window_left << "," << mask.window_right << " seqlen_q " << seqlen_q << " seqlen_k "
      << seqlen_k;
  return out.str();
}

/// Every row and the union against the rule applied to each pair.
void check(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k) {
  int64_t lo = seqlen_k;
  int64_t hi = 0;
  for (int64_t row = 0; row < seqlen_q; ++row) {
    const KeyRange range = visible_range(mask, seqlen_q, seqlen_k, row);
    ASSERT_GE(range.lo, 0) << text(mask, seqlen_q, seqlen_k);
    ASSERT_LE(range.hi, seqlen_k) << text(mask, seqlen_q, seqlen_k);
    for (int64_t key = 0; key < seqlen_k; ++key) {
      const bool wanted = sees(mask, seqlen_q, seqlen_k, row, key);
      ASSERT_EQ(range.lo <= key && key < range.hi, wanted)
          << text(mask, seqlen_q, seqlen_k) << " row " << row << " key " << key << " got ["
          << range.lo << ", " << range.hi << ")";
      if (wanted) {
        lo = std::min(lo, key);
        hi = std::max(hi, key + 1);
      }
    }
    if (range.empty()) {
      ASSERT_EQ(range.lo, 0) << text(mask, seqlen_q, seqlen_k);
      ASSERT_EQ(range.hi, 0) << text(mask, seqlen_q, seqlen_k);
    }
  }
  const KeyRange all = visible_union(mask, seqlen_q, seqlen_k);
  ASSERT_EQ(all.lo, lo < hi ? lo : 0) << text(mask, seqlen_q, seqlen_k);
  ASSERT_EQ(all.hi, lo < hi ? hi : 0) << text(mask, seqlen_q, seqlen_k);
}

template <class Visit>
void for_each_shape_and_align(Visit visit) {
  for (const CausalAlign align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
    for (const bool causal : {false, true}) {
      for (int64_t seqlen_q = 0; seqlen_q <= 7; ++seqlen_q) {
        for (int64_t seqlen_k = 0; seqlen_k <= 7; ++seqlen_k) {
          visit(Mask{causal, align, -1, -1}, seqlen_q, seqlen_k);
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(Mask, EverySmallProblem) {
  for_each_shape_and_align([](Mask mask, int64_t seqlen_q, int64_t seqlen_k) {
    for (mask.window_left = -1; mask.window_left <= 8; ++mask.window_left) {
      for (mask.window_right = -1; mask.window_right <= 8; ++mask.window_right) {
        check(mask, seqlen_q, seqlen_k);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  });
}

/// A window of the largest integer, or of one less, is no window at all.
TEST(Mask, HugeWindowsDoNotOverflow) {
  for_each_shape_and_align([](Mask mask, int64_t seqlen_q, int64_t seqlen_k) {
    for (const int64_t left : {int64_t{-1}, int64_t{1}, kHuge - 1, kHuge}) {
      for (const int64_t right : {int64_t{-1}, int64_t{1}, kHuge - 1, kHuge}) {
        const auto unlimited = [](int64_t window) { return window > 100 ? -1 : window; };
        Mask wanted = mask;
        wanted.window_left = unlimited(left);
        wanted.window_right = unlimited(right);
        mask.window_left = left;
        mask.window_right = right;
        for (int64_t row = 0; row < seqlen_q; ++row) {
          const KeyRange got = visible_range(mask, seqlen_q, seqlen_k, row);
          const KeyRange same = visible_range(wanted, seqlen_q, seqlen_k, row);
          ASSERT_EQ(got.lo, same.lo) << text(mask, seqlen_q, seqlen_k);
          ASSERT_EQ(got.hi, same.hi) << text(mask, seqlen_q, seqlen_k);
        }
        const KeyRange got = visible_union(mask, seqlen_q, seqlen_k);
        const KeyRange same = visible_union(wanted, seqlen_q, seqlen_k);
        ASSERT_EQ(got.lo, same.lo) << text(mask, seqlen_q, seqlen_k);
        ASSERT_EQ(got.hi, same.hi) << text(mask, seqlen_q, seqlen_k);
      }
    }
  });
}

/// The picture in attention.hpp.
TEST(Mask, CausalDiagonals) {
  Mask mask;
  mask.causal = true;
  EXPECT_EQ(visible_range(mask, 2, 4, 0).hi, 3);
  EXPECT_EQ(visible_range(mask, 2, 4, 1).hi, 4);
  mask.align = CausalAlign::kTopLeft;
  EXPECT_EQ(visible_range(mask, 2, 4, 0).hi, 1);
  EXPECT_EQ(visible_range(mask, 2, 4, 1).hi, 2);
}

}  // namespace
}  // namespace attn8::testing
