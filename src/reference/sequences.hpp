// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <span>

#include "reference/problem.hpp"
#include "reference/score_changes.hpp"

namespace attn8::reference {

/// Whether cu_seqlens_q and cu_seqlens_k can be walked: shapes, types, values; and every other
/// operand has the tokens and rows they speak of.
Status check_packed(const AttentionInputs& inputs);

/// The stretch of rows of q, out and lse that is sequence `i` of packed ones, and that of its keys.
struct PackedSequence {
  int64_t first_query = 0, queries = 0;
  int64_t first_key = 0, keys = 0;
};
int64_t packed_queries(const AttentionInputs& inputs);  ///< of all of them
PackedSequence packed_sequence(const AttentionInputs& inputs, int64_t i);
/// Its operands alone, without cu_seqlens_q and cu_seqlens_k.
AttentionInputs operands_of(const AttentionInputs& inputs, int64_t i,
                            const PackedSequence& sequence);

/// make_problem(), then the Status compute(problem, inputs, out, lse, out_bound): once, or where
/// sequences have lengths of their own, for each of them alone.
template <class Compute>
Status for_each_sequence(const AttentionInputs& inputs, std::optional<float> softmax_scale,
                         const Mask& mask, std::span<double> out, std::span<double> lse,
                         std::span<double> out_bound, Rows rows, Compute compute) {
  if (inputs.cu_seqlens_q || inputs.cu_seqlens_k) {
    Status status = check_packed(inputs);
    if (status.ok() && !rows.empty()) {
      return {StatusCode::kInvalidArgument, "rows must be empty with cu_seqlens_q"};
    }
    const int64_t sequences = status.ok() ? inputs.cu_seqlens_q->shape[0] - 1 : 0;
    for (int64_t i = 0; i < sequences && status.ok(); ++i) {
      const PackedSequence sequence = packed_sequence(inputs, i);
      const AttentionInputs part = operands_of(inputs, i, sequence);
      const auto own = [&](std::span<double> span) {
        const size_t row = span.size() / static_cast<size_t>(packed_queries(inputs));
        return span.subspan(static_cast<size_t>(sequence.first_query) * row,
                            static_cast<size_t>(sequence.queries) * row);
      };
      if (sequence.queries == 0) continue;
      Problem problem;
      status = make_problem(part, softmax_scale, mask, own(out), own(lse), own(out_bound), rows,
                            problem);
      if (status.ok()) status = compute(problem, part, own(out), own(lse), own(out_bound));
    }
    return status;
  }
  Problem all;
  Status status = make_problem(inputs, softmax_scale, mask, out, lse, out_bound, rows, all);
  if (!status.ok()) return status;
  if (!inputs.seqlens_k && !inputs.leftpad_k) {
    return compute(all, inputs, out, lse, out_bound);
  }
  const auto part_of = [&all](std::span<double> span, int64_t b) {
    const size_t size = span.size() / static_cast<size_t>(all.batch);
    return span.subspan(static_cast<size_t>(b) * size, size);
  };
  for (int64_t b = 0; b < all.batch; ++b) {
    const Lengths lengths = lengths_of(inputs, b, all.seqlen_k);
    const AttentionInputs part = sequence_of(inputs, b, lengths.seqlen_k);
    Problem problem;
    problem.leftpad_k = lengths.leftpad_k;
    status = make_problem(part, softmax_scale, mask, part_of(out, b), part_of(lse, b),
                          part_of(out_bound, b), rows, problem);
    if (status.ok()) {
      status = compute(problem, part, part_of(out, b), part_of(lse, b), part_of(out_bound, b));
    }
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace attn8::reference
