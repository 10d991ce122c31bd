// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/v_fold.hpp"

#include <algorithm>
#include <cmath>

namespace attn8::reference {
namespace {

bool is_zero(const Tokens& tokens, int64_t j) {
  const float* token = tokens.token(j);
  return std::all_of(token, token + tokens.head_dim, [](float code) { return code == 0; });
}

// The largest scale of tokens [from, to) that are neither zero nor poisoned; 0 without any.
double largest_scale(const Quantized& v, int64_t from, int64_t to) {
  double result = 0;
  for (int64_t j = from; j < to; ++j) {
    const double scale = v.scale[static_cast<size_t>(j)];
    if (scale > result && !is_zero(v.codes, j)) result = scale;
  }
  return result;
}

}  // namespace

FloatFold fold_into_float_scores(const Quantized& v, int64_t kv_block) {
  constexpr double kZeroTokenRatio = 0x1p-20, kMinRatio = 0x1p-100;
  const Tokens& codes = v.codes;
  const int64_t last = codes.first + codes.count;
  FloatFold fold;
  const double v_ref = largest_scale(v, codes.first, last);
  if (v_ref > 0) fold.v_ref = v_ref;
  for (int64_t begin = codes.first / kv_block * kv_block; begin < last; begin += kv_block) {
    const int64_t from = std::max(begin, codes.first), to = std::min(begin + kv_block, last);
    const double block_largest = largest_scale(v, from, to);
    const double zero_scale = kZeroTokenRatio * (block_largest > 0 ? block_largest : fold.v_ref);
    for (int64_t j = from; j < to; ++j) {
      const double scale = v.scale[static_cast<size_t>(j)];
      const double used = !std::isnan(scale) && is_zero(codes, j) ? zero_scale : scale;
      // A float32 quotient: it decides which keys enter the denominator by their code.
      const auto r = static_cast<float>(used) / static_cast<float>(fold.v_ref);
      fold.r.push_back(std::isnan(r) ? r : std::max<double>(r, kMinRatio));
    }
  }
  return fold;
}

GridFold fold_into_score_grid(Quantized& v, int64_t kv_block, int64_t seqlen) {
  constexpr float kMinRatio = 0x1p-16F;
  constexpr float kZeroRatio = 0x1p-6F;
  Tokens& codes = v.codes;
  const int64_t last = codes.first + codes.count;
  GridFold fold;
  fold.v_block.assign(static_cast<size_t>((seqlen + kv_block - 1) / kv_block), 1.0);
  for (int64_t begin = codes.first / kv_block * kv_block; begin < last; begin += kv_block) {
    const int64_t from = std::max(begin, codes.first), to = std::min(begin + kv_block, last);
    double& v_block = fold.v_block[static_cast<size_t>(begin / kv_block)];
    const double largest = largest_scale(v, from, to);
    if (largest > 0) v_block = largest;
    for (int64_t j = from; j < to; ++j) {
      const auto scale = static_cast<float>(v.scale[static_cast<size_t>(j)]);
      float r = scale / static_cast<float>(v_block);
      if (std::isnan(r)) {
        fold.g.push_back(r);
        fold.weight.push_back(0);
        continue;
      }
      if (is_zero(codes, j)) r = kZeroRatio;
      if (r < kMinRatio) {
        const float shrink = r * 0x1p16F;
        for (int64_t d = 0; d < codes.head_dim; ++d) {
          codes.token(j)[d] = std::nearbyint(codes.token(j)[d] * shrink);
        }
        r = kMinRatio;
      }
      fold.g.push_back(static_cast<float>(64 * std::log2(static_cast<double>(r))));
      fold.weight.push_back(static_cast<int64_t>(std::nearbyint(256.0F / r)));
    }
  }
  return fold;
}

}  // namespace attn8::reference
