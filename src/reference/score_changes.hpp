// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/problem.hpp"

/// Softcap, attn_mask, ALiBi and sinks, read element by element.
namespace attn8::reference {

/// Changes to the scores of one query, in nats. Vectors are indexed by key - first.
struct RowChanges {
  double softcap = 0;     ///< 0: none
  double mean_score = 0;  ///< what smoothing took from every score, where softcap wants it back
  int64_t first = 0;
  std::vector<float> mask;       // [keys] added; -Inf hides; empty: none
  std::vector<double> distance;  // [keys] |p - j|; empty: no ALiBi
  float slope = 0;
  double sink = -std::numeric_limits<double>::infinity();  ///< relative to the scores of the keys

  [[nodiscard]] bool hides(int64_t j) const {
    return !mask.empty() &&
           mask[static_cast<size_t>(j - first)] == -std::numeric_limits<float>::infinity();
  }
  [[nodiscard]] float mask_at(int64_t j) const {
    return mask.empty() ? 0.0F : mask[static_cast<size_t>(j - first)];
  }
  [[nodiscard]] double distance_at(int64_t j) const {
    return distance.empty() ? 0.0 : distance[static_cast<size_t>(j - first)];
  }
};

/// Shapes and types of what changes scores; the values of the lengths too.
Status check_score_operands(const AttentionInputs& inputs, const Problem& problem);

/// Fills what the operands say of query i of head h for the keys of its range; softcap and
/// mean_score stay.
void read_row_changes(const Problem& problem, const AttentionInputs& inputs, int64_t b, int64_t i,
                      int64_t h, KeyRange keys, RowChanges& changes);

/// Keys of sequence b.
struct Lengths {
  int64_t seqlen_k = 0;
  int64_t leftpad_k = 0;
};
Lengths lengths_of(const AttentionInputs& inputs, int64_t b, int64_t seqlen_k);

/// Sequence b alone with its first seqlen_k keys, without seqlens_k and leftpad_k.
AttentionInputs sequence_of(const AttentionInputs& inputs, int64_t b, int64_t seqlen_k);

}  // namespace attn8::reference
