// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "attn8/reference.hpp"
#include "reference/element.hpp"
#include "reference/problem.hpp"
#include "reference/score_changes.hpp"
#include "reference/sequences.hpp"

namespace attn8::reference {
namespace {

// One row: out [head_dim_v], and its LSE as the result. NaN and Inf take the way IEEE arithmetic
// gives them, but a hidden key counts for nothing.
double exact_row(const Problem& problem, const RowChanges& changes, const double* q,
                 const Tokens& k, const Tokens& v, KeyRange keys, std::vector<double>& scores,
                 std::vector<double>& sum, double* out) {
  constexpr double kMinusInf = -std::numeric_limits<double>::infinity();
  std::fill_n(out, problem.head_dim_v, 0.0);
  double max = changes.sink;
  bool sees_one = false;
  for (int64_t j = keys.first; j < keys.last; ++j) {
    if (changes.hides(j)) continue;
    sees_one = true;
    double s = problem.softmax_scale * dot(q, k.token(j), k.stride);
    if (changes.softcap != 0) s = changes.softcap * std::tanh(s / changes.softcap);
    s += changes.mask_at(j) - changes.slope * changes.distance_at(j);
    scores[static_cast<size_t>(j - keys.first)] = s;
    if (s > max) max = s;
  }
  if (!sees_one || changes.sink == -kMinusInf) return changes.sink;
  double l = changes.sink == kMinusInf ? 0 : std::exp(changes.sink - max);
  sum.assign(static_cast<size_t>(v.stride), 0.0);
  for (int64_t j = keys.first; j < keys.last; ++j) {
    if (changes.hides(j)) continue;
    const double p = std::exp(scores[static_cast<size_t>(j - keys.first)] - max);
    l += p;
    add_scaled(sum.data(), p, v.token(j), v.stride);
  }
  for (int64_t d = 0; d < problem.head_dim_v; ++d) out[d] = sum[static_cast<size_t>(d)] / l;
  return max + std::log(l);
}

void exact(const Problem& problem, const AttentionInputs& inputs, float softcap,
           std::span<double> out, std::span<double> lse) {
  const auto& q = *std::get_if<ConstTensorView>(&inputs.q);
  const auto& k = *std::get_if<ConstTensorView>(&inputs.k);
  const auto& v = *std::get_if<ConstTensorView>(&inputs.v);
  const int64_t group = problem.nheads_q / problem.nheads_k;
  const KeyRange visible = problem.visible;
  std::vector<double> scores(static_cast<size_t>(visible.last - visible.first));
  std::vector<double> sum;
  RowChanges changes;
  changes.softcap = softcap;
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t hk = 0; hk < problem.nheads_k; ++hk) {
      const Tokens k_tokens = gather(k, b, hk, visible.first, visible.last);
      const Tokens v_tokens = gather(v, b, hk, visible.first, visible.last);
      std::vector<double> q_row(static_cast<size_t>(k_tokens.stride), 0.0);
      for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        for (const int64_t i : problem.rows) {
          for (int64_t d = 0; d < problem.head_dim; ++d) {
            q_row[static_cast<size_t>(d)] = load(q, b, i, h, d);
          }
          const KeyRange keys = problem.visible_to(i);
          read_row_changes(problem, inputs, b, i, h, keys, changes);
          const int64_t row = problem.row_index(b, i, h);
          const double row_lse = exact_row(problem, changes, q_row.data(), k_tokens, v_tokens, keys,
                                           scores, sum, out.data() + row * problem.head_dim_v);
          if (!lse.empty()) lse[static_cast<size_t>(row)] = row_lse;
        }
      }
    }
  }
}

}  // namespace

Status exact_attention(const AttentionInputs& inputs, const AttentionOptions& options,
                       std::span<double> out, std::span<double> lse, Rows rows) noexcept {
  try {
    for (const Operand* operand : {&inputs.q, &inputs.k, &inputs.v}) {
      if (std::holds_alternative<ConstTensorView>(*operand)) continue;
      return {StatusCode::kInvalidArgument, "q, k and v must be float"};
    }
    return for_each_sequence(
        inputs, options.softmax_scale, options.mask, out, lse, {}, rows,
        [&options](const Problem& problem, const AttentionInputs& part, std::span<double> part_out,
                   std::span<double> part_lse, std::span<double>) {
          exact(problem, part, options.softcap, part_out, part_lse);
          return Status();
        });
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "out of memory"};
  }
}

Status exact_attention(const ConstTensorView& q, const ConstTensorView& k, const ConstTensorView& v,
                       std::optional<float> softmax_scale, const Mask& mask, std::span<double> out,
                       std::span<double> lse, Rows rows) noexcept {
  AttentionOptions options;
  options.softmax_scale = softmax_scale;
  options.mask = mask;
  return exact_attention({q, k, v}, options, out, lse, rows);
}

}  // namespace attn8::reference
