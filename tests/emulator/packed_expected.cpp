// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cmath>

#include "emulator/float16.hpp"
#include "emulator/packed_problem.hpp"

/// What a kernel must produce from codes and scales: docs/numerics.md in float64.
namespace attn8::cuda::testing {
namespace {

/// Where row `row` of the inputs' order lies in the packed images.
size_t packed_row(const Shape& s, const Packed& packed, size_t row, int group) {
  const auto heads = static_cast<size_t>(s.nheads_q);
  const auto queries = static_cast<size_t>(s.seqlen_q);
  const auto shared = static_cast<size_t>(group);
  const size_t head = row / (queries * heads) * heads + row % heads;
  const size_t query = row / heads % queries;
  return head / shared * static_cast<size_t>(packed.rows_q) + query * shared + head % shared;
}

/// Log2 units: what a score becomes, and how far float32 may be off.
struct Changed {
  double t, error;
};
Changed change(const Shape& s, double t, double shift, int b, int head, int row, int key) {
  const double log2e = 1.4426950408889634;
  // A float32 score is off by half an ulp per operation, 3 operations, as is its weight, and by up
  // to 2 ulp for what AttendSm80::exact_with_magic() takes from its row's scale.
  double error = 1e-6 + 4e-7 * std::fabs(t);
  if (s.softcap != 0) {
    const double cap = s.softcap * log2e;
    t = cap * std::tanh((t + shift * log2e) / cap);
    error += 1e-6 * cap + 2e-7 * std::fabs(shift);
  }
  if (s.attn_mask) {
    t += Shape::added(head, row, key) * log2e;
    error += 2e-7 * std::fabs(t);
  }
  if (s.alibi) {
    const double bias = Shape::slope(head) * log2e * std::abs(row + s.position_offset(b) - key);
    t -= bias;
    error += 2e-7 * (bias + std::fabs(t));
  }
  return {t, error};
}

double bfloat16_of(double x) {
  return std::bit_cast<float>(uint32_t{emulator::bfloat16_bits(static_cast<float>(x))} << 16);
}

}  // namespace

double expected_shift(const Shape& s, const Packed& packed, size_t row, int group) {
  if (s.softcap != 0) return 0;  // it is in the scores
  return packed.lse_shift[packed_row(s, packed, row, group)];
}

Expected expected(const Shape& s, const Quantized& z, const Packed& packed, Weights weights,
                  int kv_block, int group) {
  const bool half = weights == Weights::kHalf;
  const int dim = s.head_dim;
  const double levels = weights == Weights::kPaper ? 127 : 255;
  const double score_scale = static_cast<float>(1.4426950408889634 / std::sqrt(double(dim)));
  Expected e;
  e.out.assign(z.q.size(), 0.0);
  e.bound.assign(z.q.size(), 0.0);
  e.lse.assign(z.q_scale.size(), -INFINITY);
  std::vector<double> t(kv_block);
  std::vector<double> t_error(kv_block);
  std::vector<double> block(dim);
  std::vector<double> slack(dim);
  for (size_t row = 0; row < z.q_scale.size(); ++row) {
    const int b = static_cast<int>(row / (static_cast<size_t>(s.seqlen_q) * s.nheads_q));
    const int i = static_cast<int>(row / s.nheads_q % s.seqlen_q);
    const int h = static_cast<int>(row % s.nheads_q);
    const int kv = h / (s.nheads_q / s.nheads_k);
    double maximum = -INFINITY;
    double sum = 0;
    double code_sum = 0;
    std::vector<double> out(dim, 0.0);
    std::vector<double> bound(dim, 0.0);
    for (int begin = 0; begin < s.seqlen_k; begin += kv_block) {
      const int end = std::min(s.seqlen_k, begin + kv_block);
      double m_block = -INFINITY;
      for (int j = begin; j < end; ++j) {
        const size_t token = (static_cast<size_t>(b) * s.seqlen_k + j) * s.nheads_k + kv;
        t[j - begin] = -INFINITY;
        if (!s.sees(i, j, b)) continue;
        int product = 0;
        for (int d = 0; d < dim; ++d) product += z.q[row * dim + d] * z.k[token * dim + d];
        const double shift = packed.lse_shift[packed_row(s, packed, row, group)];
        const Changed changed = change(
            s, static_cast<double>(product) * z.k_scale[token] * z.q_scale[row] * score_scale,
            shift, b, h, i, j);
        const double log2_ratio = std::log2(static_cast<double>(z.ratio[token]));
        t[j - begin] = changed.t + log2_ratio;
        t_error[j - begin] = changed.error + 2e-7 * std::fabs(log2_ratio);
        m_block = std::max(m_block, t[j - begin]);
      }
      if (m_block == -INFINITY) continue;
      if (half) m_block = std::ceil(m_block);  // weights are relative to powers of two
      const double m_new = std::max(maximum, m_block);
      const double a = std::exp2(maximum - m_new);
      const double m_used = weights == Weights::kPaper || half ? m_new : m_block;
      const double factor = std::exp2(m_used - m_new);
      std::fill(block.begin(), block.end(), 0.0);
      std::fill(slack.begin(), slack.end(), 0.0);
      double block_sum = 0;
      double block_codes = 0;
      for (int j = begin; j < end; ++j) {
        const size_t token = (static_cast<size_t>(b) * s.seqlen_k + j) * s.nheads_k + kv;
        const double weight = std::exp2(t[j - begin] - m_used);
        const double error = weight == 0 ? 0 : t_error[j - begin];
        if (half) {
          const double code = bfloat16_of(weight);
          const double flip = std::max(std::fabs(bfloat16_of(weight * (1 + error)) - code),
                                       std::fabs(bfloat16_of(weight * (1 - error)) - code));
          block_sum += weight;
          for (int d = 0; d < dim; ++d) {
            const double v = std::bit_cast<float>(uint32_t{z.v_half[token * dim + d]} << 16);
            block[d] += code * v;
            // Sums of products in float32, in an order of the hardware's.
            slack[d] += (flip + (error + 1e-5) * code) * std::fabs(v);
          }
          continue;
        }
        const double code = std::nearbyint(levels * weight);
        block_sum += weight / z.ratio[token];
        block_codes += code;
        const double off = levels * weight * error;
        const bool near = std::fabs(levels * weight - std::floor(levels * weight) - 0.5) < off;
        for (int d = 0; d < dim; ++d) {
          block[d] += code * z.v[token * dim + d];
          slack[d] += (near ? 1.0 : 0.0) * std::fabs(double(z.v[token * dim + d])) +
                      (weights == Weights::kPaper && near ? 1.0 : 0.0) * 127 +
                      error * code * std::fabs(double(z.v[token * dim + d]));
        }
      }
      for (int d = 0; d < dim; ++d) {
        out[d] = a * out[d] + factor * block[d];
        bound[d] = a * bound[d] + factor * slack[d];
      }
      sum = a * sum + factor * block_sum;
      code_sum = a * code_sum + factor * block_codes;
      maximum = m_new;
    }
    if (maximum == -INFINITY) {
      if (s.sinks) e.lse[row] = Shape::sink(h) - expected_shift(s, packed, row, group);
      continue;
    }
    const double normalizer = weights == Weights::kPaper ? code_sum : half ? sum : levels * sum;
    // The LSE without what smoothing took away, which a sink is beside.
    double lse = std::log(sum) + maximum * std::log(2.0);
    double kept = 1;
    if (s.sinks) {
      const double whole = lse + expected_shift(s, packed, row, group);
      const double sink = std::exp(Shape::sink(h) - whole);  // relative to `sum`
      // It joins what normalizes, which in `paper` are the rounded weights.
      kept = 1 / (1 + sink * (weights == Weights::kPaper ? levels * sum / code_sum : 1));
      lse += std::log1p(sink);
    }
    for (int d = 0; d < dim; ++d) {
      const double scale = z.v_scale[(static_cast<size_t>(b) * s.nheads_k + kv) * dim + d];
      e.out[row * dim + d] = kept * out[d] / normalizer * scale;
      e.bound[row * dim + d] =
          (bound[d] / normalizer + 4e-6 * std::fabs(out[d]) / normalizer) * scale + 1e-30;
    }
    e.lse[row] = lse;
  }
  return e;
}

}  // namespace attn8::cuda::testing
