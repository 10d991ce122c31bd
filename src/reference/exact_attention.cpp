// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "attn8/reference.hpp"
#include "reference/element.hpp"
#include "reference/problem.hpp"

namespace attn8::reference {
namespace {

// One row: out [head_dim], and its LSE as the result. NaN and Inf take the way IEEE arithmetic
// gives them.
double exact_row(const Problem& problem, const double* q, const Tokens& k, const Tokens& v,
                 KeyRange keys, std::vector<double>& scores, std::vector<double>& sum,
                 double* out) {
  for (int64_t d = 0; d < problem.head_dim; ++d) out[d] = 0;
  if (keys.empty()) return -std::numeric_limits<double>::infinity();

  double max = -std::numeric_limits<double>::infinity();
  for (int64_t j = keys.first; j < keys.last; ++j) {
    const double s = problem.softmax_scale * dot(q, k.token(j), k.stride);
    scores[static_cast<size_t>(j - keys.first)] = s;
    if (s > max) max = s;
  }
  double l = 0;
  sum.assign(static_cast<size_t>(v.stride), 0.0);
  for (int64_t j = keys.first; j < keys.last; ++j) {
    const double p = std::exp(scores[static_cast<size_t>(j - keys.first)] - max);
    l += p;
    add_scaled(sum.data(), p, v.token(j), v.stride);
  }
  for (int64_t d = 0; d < problem.head_dim; ++d) out[d] = sum[static_cast<size_t>(d)] / l;
  return max + std::log(l);
}

void exact(const Problem& problem, const ConstTensorView& q, const ConstTensorView& k,
           const ConstTensorView& v, std::span<double> out, std::span<double> lse) {
  const int64_t group = problem.nheads_q / problem.nheads_k;
  const KeyRange visible = problem.visible;
  std::vector<double> scores(static_cast<size_t>(visible.last - visible.first));
  std::vector<double> sum;
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
          const int64_t row = problem.row_index(b, i, h);
          const double row_lse =
              exact_row(problem, q_row.data(), k_tokens, v_tokens, problem.visible_to(i), scores,
                        sum, out.data() + row * problem.head_dim);
          if (!lse.empty()) lse[static_cast<size_t>(row)] = row_lse;
        }
      }
    }
  }
}

}  // namespace

Status exact_attention(const ConstTensorView& q, const ConstTensorView& k, const ConstTensorView& v,
                       std::optional<float> softmax_scale, const Mask& mask, std::span<double> out,
                       std::span<double> lse, Rows rows) noexcept {
  try {
    Problem problem;
    Status status = make_problem({q, k, v}, softmax_scale, mask, out, lse, {}, rows, problem);
    if (status.ok()) exact(problem, q, k, v, out, lse);
    return status;
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "out of memory"};
  }
}

}  // namespace attn8::reference
