// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "attn8/reference.hpp"

/// Sizes, mask and validation that both oracles share.
namespace attn8::reference {

/// Keys [first, last).
struct KeyRange {
  int64_t first = 0;
  int64_t last = 0;
  [[nodiscard]] bool empty() const { return first >= last; }
};

struct Problem {
  int64_t batch = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t nheads_q = 0;
  int64_t nheads_k = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  float softmax_scale = 0;
  Mask mask = {};
  int64_t leftpad_k = 0;      ///< keys before it do not count
  std::vector<int64_t> rows;  ///< sequence positions to compute
  KeyRange visible;           ///< [k_lo, k_hi): visible to at least one query of the call

  /// Where query i stands among the keys.
  [[nodiscard]] int64_t position_of(int64_t i) const;
  /// Keys that query i sees by the mask; empty() when there are none.
  [[nodiscard]] KeyRange visible_to(int64_t i) const;
  /// Index of row (b, i, h) in lse; times head_dim_v: in out.
  [[nodiscard]] int64_t row_index(int64_t b, int64_t i, int64_t h) const {
    return (b * seqlen_q + i) * nheads_q + h;
  }
};

/// Checks shapes and types of the operands, the mask, the scale, the spans and the rows, and fills
/// `problem`, whose leftpad_k is set. `out_bound` may be empty as `lse` may.
Status make_problem(const AttentionInputs& inputs, std::optional<float> softmax_scale,
                    const Mask& mask, std::span<double> out, std::span<double> lse,
                    std::span<double> out_bound, Rows rows, Problem& problem);

}  // namespace attn8::reference
