// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
//
// One step of a serving engine in one call: a prompt, a chunk of a longer prompt and two decode
// steps, packed one after the other, and how far their attention is from float64.
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "attn8/attn8.hpp"

int main() {
  using attn8::DType;
  using attn8::Extents;
  // Sequence i has queries [cu_seqlens_q[i], cu_seqlens_q[i + 1]) and keys likewise: 100 queries of
  // 100 keys, 64 of 300, 1 of 777, 1 of 12.
  const std::vector<int32_t> cu_seqlens_q = {0, 100, 164, 165, 166};
  const std::vector<int32_t> cu_seqlens_k = {0, 100, 400, 1177, 1189};
  const Extents q_shape = {1, cu_seqlens_q.back(), 8, 64};  // [1, total_q, nheads_q, head_dim]
  const Extents k_shape = {1, cu_seqlens_k.back(), 2, 64};  // [1, total_k, nheads_k, head_dim]

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto filled = [&](const Extents& shape) {
    std::vector<float> x(static_cast<size_t>(shape[1] * shape[2] * shape[3]));
    for (float& value : x) value = normal(random);
    return x;
  };
  const std::vector<float> q = filled(q_shape);
  const std::vector<float> k = filled(k_shape);
  const std::vector<float> v = filled(k_shape);
  std::vector<float> out(q.size());

  attn8::AttentionInputs inputs = {.q = attn8::bshd(q.data(), DType::kFloat32, q_shape),
                                   .k = attn8::bshd(k.data(), DType::kFloat32, k_shape),
                                   .v = attn8::bshd(v.data(), DType::kFloat32, k_shape)};
  inputs.cu_seqlens_q = attn8::bshd(cu_seqlens_q.data(), DType::kInt32, {5, 1, 1, 1});
  inputs.cu_seqlens_k = attn8::bshd(cu_seqlens_k.data(), DType::kInt32, {5, 1, 1, 1});
  // Causal is bottom-right: the last query of a sequence sees its last key.
  const attn8::AttentionOptions options = {.mask = {.causal = true}};
  const attn8::AttentionOutputs outputs = {attn8::bshd(out.data(), DType::kFloat32, q_shape)};
  std::vector<double> exact(out.size());
  attn8::Status status = attn8::attention(inputs, outputs, options, attn8::Context::cpu(2));
  if (status.ok()) status = attn8::reference::exact_attention(inputs, options, exact, {});
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    return 1;
  }
  const std::vector<double> result(out.begin(), out.end());
  const double error = attn8::reference::error_report(result, exact).rel_l2;
  // 2 %: docs/numerics.md promises 1.6 % for normal data where every key is visible.
  std::printf("relative L2 error over 4 sequences: %.2f %%\n", 100 * error);
  return error < 0.02 ? 0 : 1;
}
