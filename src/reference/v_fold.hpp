// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "reference/quantization.hpp"

/// V with one scale per token: what P absorbs of the scales (docs/numerics.md, `accurate`).
namespace attn8::reference {

/// For scores in float: r_j relative to one scale of the whole (batch, kv head).
struct FloatFold {
  std::vector<double> r;  // [count]; NaN for a poisoned token
  double v_ref = 1;
};

FloatFold fold_into_float_scores(const Quantized& v, int64_t kv_block);

/// For scores on the grid: r_j relative to the scale of the token's block.
struct GridFold {
  std::vector<float> g;         // [count] 64 log2 r_j; NaN for a poisoned token
  std::vector<int64_t> weight;  // [count] W_j = 256 / r_j, rounded
  std::vector<double> v_block;  // [blocks from key 0]; 1 where no token of `v` falls
};

/// Replaces the codes of tokens whose scale is below 2^-16 of the largest of their block.
GridFold fold_into_score_grid(Quantized& v, int64_t kv_block, int64_t seqlen);

}  // namespace attn8::reference
