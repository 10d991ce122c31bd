// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/quantization.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace attn8::reference {
namespace {

bool has_scale(float max_abs) { return max_abs / 127.0F >= std::numeric_limits<float>::min(); }

}  // namespace

int64_t group_of(const QuantSpec& spec, int64_t head_dim, int64_t j, int64_t d) {
  switch (spec.granularity) {
    case Granularity::kToken:
      return j;
    case Granularity::kTensor:
      return 0;
    case Granularity::kChannel:
      return d;
    case Granularity::kBlock:
      return j / spec.block;
    case Granularity::kBlockChannel:
      return j / spec.block * head_dim + d;
  }
  return 0;
}

int64_t group_count(const QuantSpec& spec, int64_t head_dim, int64_t seqlen) {
  return seqlen == 0 ? 0 : group_of(spec, head_dim, seqlen - 1, head_dim - 1) + 1;
}

float scale_of(float max_abs) {
  if (!std::isfinite(max_abs)) return std::numeric_limits<float>::quiet_NaN();
  if (!has_scale(max_abs)) return 1.0F;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(max_abs / 127.0F) & ~UINT32_C(7));
}

float code_of(float x, float scale, float max_abs) {
  if (std::isnan(scale) || !has_scale(max_abs)) return 0.0F;
  return std::clamp(std::nearbyint(x / scale), -127.0F, 127.0F);
}

std::vector<float> channel_mean(const Tokens& tokens) {
  constexpr int64_t kChunk = 4096;
  const int64_t last = tokens.first + tokens.count;
  std::vector<float> mean;
  for (int64_t d = 0; d < tokens.head_dim; ++d) {
    double sum = 0;
    for (int64_t chunk = tokens.first; chunk < last; chunk += kChunk) {
      double chunk_sum = 0;
      for (int64_t j = chunk; j < std::min(chunk + kChunk, last); ++j) {
        chunk_sum += tokens.token(j)[d];
      }
      sum += chunk_sum;
    }
    // What poisons one token does not reach the others through the mean.
    const auto rounded = static_cast<float>(sum / static_cast<double>(tokens.count));
    mean.push_back(std::isfinite(rounded) ? rounded : 0.0F);
  }
  return mean;
}

Quantized quantize_tokens(const Tokens& tokens, const QuantSpec& spec, int64_t seqlen) {
  const int64_t head_dim = tokens.head_dim;
  const int64_t last = tokens.first + tokens.count;
  const auto groups = static_cast<size_t>(group_count(spec, head_dim, seqlen));

  // NaN where a group holds a NaN or an Inf: once there, it stays.
  std::vector<float> max_abs(groups, 0.0F);
  for (int64_t j = tokens.first; j < last; ++j) {
    for (int64_t d = 0; d < head_dim; ++d) {
      const float x = std::abs(tokens.token(j)[d]);
      float& group_max = max_abs[static_cast<size_t>(group_of(spec, head_dim, j, d))];
      if (!std::isfinite(x)) group_max = std::numeric_limits<float>::quiet_NaN();
      if (x > group_max) group_max = x;
    }
  }
  std::vector<float> scale(groups);
  for (size_t g = 0; g < groups; ++g) scale[g] = scale_of(max_abs[g]);

  Quantized result = {Tokens(tokens.first, tokens.count, head_dim), {scale.begin(), scale.end()}};
  for (int64_t j = tokens.first; j < last; ++j) {
    for (int64_t d = 0; d < head_dim; ++d) {
      const auto g = static_cast<size_t>(group_of(spec, head_dim, j, d));
      result.codes.token(j)[d] = code_of(tokens.token(j)[d], scale[g], max_abs[g]);
    }
  }
  return result;
}

Quantized gather_quantized(const QuantizedView& x, int64_t b, int64_t h, KeyRange tokens) {
  const Extents& scale = x.scale.shape;
  Quantized result = {gather(x.codes, b, h, tokens.first, tokens.last), {}};
  for (int64_t group = 0; group < scale[1]; ++group) {
    for (int64_t d = 0; d < scale[3]; ++d) result.scale.push_back(load(x.scale, b, group, h, d));
  }
  return result;
}

}  // namespace attn8::reference
