// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attn8/attention.hpp"
#include "reference/element.hpp"
#include "reference/problem.hpp"

/// The section "Scales and codes" of docs/numerics.md, a second time.
namespace attn8::reference {

/// Group of element (token j, channel d) of one (batch, head), as an index into the scales of
/// Granularity's documentation taken as [seq or blocks or 1][dim or 1].
int64_t group_of(const QuantSpec& spec, int64_t head_dim, int64_t j, int64_t d);

/// Number of groups for tokens [0, seqlen).
int64_t group_count(const QuantSpec& spec, int64_t head_dim, int64_t seqlen);

/// max|group| / 127 with its low 3 bits cleared; 1 for a group too small to have a scale; NaN when
/// max_abs is NaN or Inf.
float scale_of(float max_abs);

/// round-half-even(x / scale) in [-127, 127]; 0 for a scale of NaN and for a group without a scale.
float code_of(float x, float scale, float max_abs);

/// Mean over the tokens of each channel, rounded to float32; 0 where that is not finite, or where
/// there are no tokens.
std::vector<float> channel_mean(const Tokens& tokens);

/// Codes of one (batch, head) and the scales of its groups (1 where no token of `codes` falls).
struct Quantized {
  Tokens codes;
  std::vector<double> scale;  // [group_count]
};

/// `seqlen` is that of the whole tensor, so that groups are counted from token 0.
Quantized quantize_tokens(const Tokens& tokens, const QuantSpec& spec, int64_t seqlen);

/// Tokens [first, last) of a quantized operand.
Quantized gather_quantized(const QuantizedView& x, int64_t b, int64_t h, KeyRange tokens);

}  // namespace attn8::reference
