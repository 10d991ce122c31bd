// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "support/tensors.hpp"

namespace attn8::testing {

/// What a sequence of a cache must hold: its tokens as they were appended, and the K mean that its
/// first append froze. Quantizes with plain loops of its own.
class ModelSequence {
 public:
  ModelSequence(int64_t heads, int64_t dim, bool smooth_k)
      : heads_(heads), dim_(dim), smooth_k_(smooth_k) {}

  /// k, v as KvCache::append takes them.
  void append(const Tensor& k, const Tensor& v);
  void truncate(int64_t length);
  [[nodiscard]] int64_t length() const { return static_cast<int64_t>(k_.size()) / (heads_ * dim_); }
  /// Whether a token holds a NaN or an Inf.
  [[nodiscard]] bool poisoned() const;

  struct Quantized {
    Tensor codes, scale, mean;
    bool with_mean = false;
    [[nodiscard]] QuantizedView view() const;
    /// codes * scale as float32; softmax does not see the mean.
    [[nodiscard]] Tensor dequantized() const;
  };
  [[nodiscard]] Quantized k() const { return quantized(k_, smooth_k_ && !k_.empty()); }
  [[nodiscard]] Quantized v() const { return quantized(v_, false); }

 private:
  [[nodiscard]] Quantized quantized(const std::vector<float>& x, bool with_mean) const;

  int64_t heads_, dim_;
  bool smooth_k_;
  std::vector<float> k_, v_;  // [tokens][heads][dim]
  std::vector<float> mean_;   // [heads][dim]
};

/// Every row of x [1, tokens, heads, dim] quantized and back.
Tensor through_codes(const Tensor& x);

}  // namespace attn8::testing
