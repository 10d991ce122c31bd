// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

#include "attn8/reference.hpp"

/// Small owning tensors for the tests of the oracles.
namespace attn8::reference::testing {

struct Tensor {
  Extents shape;
  std::vector<float> values;  // [batch, seq, head, dim], dense

  explicit Tensor(const Extents& shape_in, float fill = 0)
      : shape(shape_in),
        values(static_cast<size_t>(shape[0] * shape[1] * shape[2] * shape[3]), fill) {}

  float& at(int64_t b, int64_t s, int64_t h, int64_t d) {
    return values[static_cast<size_t>(((b * shape[1] + s) * shape[2] + h) * shape[3] + d)];
  }
  [[nodiscard]] ConstTensorView view() const {
    return bshd(static_cast<const void*>(values.data()), DType::kFloat32, shape);
  }
};

/// Normal numbers from a linear congruential generator.
inline Tensor random_tensor(const Extents& shape, uint64_t seed) {
  Tensor tensor(shape);
  uint64_t state = seed * 2 + 1;
  const auto uniform = [&state] {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (static_cast<double>(state >> 33) + 0.5) / 2147483648.0;
  };
  for (float& x : tensor.values) {
    const double radius = std::sqrt(-2 * std::log(uniform()));
    x = static_cast<float>(radius * std::cos(2 * std::numbers::pi * uniform()));
  }
  return tensor;
}

struct Output {
  Status status;
  std::vector<double> out, lse, bound;
};

inline Output allocate(const Extents& q, double fill = 0) {
  const auto rows = static_cast<size_t>(q[0] * q[1] * q[2]);
  const size_t elements = rows * static_cast<size_t>(q[3]);
  return {Status(), std::vector<double>(elements, fill), std::vector<double>(rows, fill),
          std::vector<double>(elements, fill)};
}

inline Output run_exact(const Tensor& q, const Tensor& k, const Tensor& v, const Mask& mask = {},
                        std::optional<float> softmax_scale = std::nullopt, Rows rows = {}) {
  Output o = allocate(q.shape);
  o.status = exact_attention(q.view(), k.view(), v.view(), softmax_scale, mask, o.out, o.lse, rows);
  return o;
}

inline Output run_emulation(const AttentionInputs& inputs, const Extents& q_shape,
                            const EmulationOptions& options, Rows rows = {}) {
  Output o = allocate(q_shape);
  o.status = emulation(inputs, options, o.out, o.lse, o.bound, rows);
  return o;
}

inline Output run_emulation(const Tensor& q, const Tensor& k, const Tensor& v,
                            const EmulationOptions& options, Rows rows = {}) {
  return run_emulation({q.view(), k.view(), v.view()}, q.shape, options, rows);
}

/// The mask of attention.hpp, key by key.
inline bool sees(const Mask& mask, int64_t seqlen_q, int64_t seqlen_k, int64_t i, int64_t j) {
  const int64_t p = mask.align == CausalAlign::kBottomRight ? i + seqlen_k - seqlen_q : i;
  if (mask.causal && j > p) return false;
  if (mask.window_left >= 0 && j < p - mask.window_left) return false;
  return mask.window_right < 0 || j <= p + mask.window_right;
}

}  // namespace attn8::reference::testing
