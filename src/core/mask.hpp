// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>

#include "attn8/attention.hpp"

namespace attn8 {

/// Keys [lo, hi); empty when lo >= hi, and then lo == hi == 0.
struct KeyRange {
  int64_t lo = 0;
  int64_t hi = 0;
  [[nodiscard]] constexpr bool empty() const noexcept { return lo >= hi; }
};

/// Where query 0 stands among the keys: p of Mask for i = 0.
constexpr int64_t first_position(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k) noexcept {
  return mask.q_offset - mask.k_offset +
         (mask.align == CausalAlign::kBottomRight ? seqlen_k - seqlen_q : 0);
}

/// The keys that query `row` sees. Every mask of attn8 that needs no data is such an interval.
constexpr KeyRange visible_range(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k,
                                 int64_t row) noexcept {
  const int64_t diagonal = row + first_position(mask, seqlen_q, seqlen_k);
  int64_t lo = 0;
  int64_t hi = seqlen_k;
  // Compared before adding, so that windows near the largest integer do not overflow.
  if (mask.causal) hi = std::min(hi, diagonal + 1);
  if (mask.window_right >= 0 && mask.window_right < seqlen_k - diagonal - 1) {
    hi = std::min(hi, diagonal + mask.window_right + 1);
  }
  if (mask.window_left >= 0 && mask.window_left < diagonal) lo = diagonal - mask.window_left;
  if (lo >= hi) return {0, 0};
  return {lo, hi};
}

/// The keys that at least one query sees; both ends of visible_range grow with the row.
constexpr KeyRange visible_union(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k) noexcept {
  if (seqlen_q <= 0 || seqlen_k <= 0) return {0, 0};
  const int64_t offset = first_position(mask, seqlen_q, seqlen_k);
  // Rows whose diagonal lies before key 0 see nothing when causal or bounded on the right; start
  // from the first row that can see a key and end with the last one.
  KeyRange all = {seqlen_k, 0};
  int64_t first = 0;
  int64_t last = seqlen_q - 1;
  const int64_t reach_right = mask.causal ? 0 : mask.window_right;
  if (reach_right >= 0 && offset < -reach_right) first = std::min(last, -offset - reach_right);
  if (mask.window_left >= 0 && mask.window_left < seqlen_q) {
    const int64_t last_seeing = seqlen_k - 1 - offset + mask.window_left;
    last = std::max<int64_t>(0, std::min(last, last_seeing));
  }
  for (const int64_t row : {first, last}) {
    const KeyRange range = visible_range(mask, seqlen_q, seqlen_k, row);
    if (range.empty()) continue;
    all.lo = std::min(all.lo, range.lo);
    all.hi = std::max(all.hi, range.hi);
  }
  if (all.lo >= all.hi) return {0, 0};
  return all;
}

/// What is left of a range whose keys before `leftpad` do not count.
constexpr KeyRange without_padding(KeyRange range, int64_t leftpad) noexcept {
  range.lo = std::max(range.lo, leftpad);
  return range.empty() ? KeyRange{} : range;
}

}  // namespace attn8
