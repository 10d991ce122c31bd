// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attn8/kv_cache.hpp"
#include "support/tensors.hpp"

namespace attn8::testing {

/// What a sequence of a cache must hold: its tokens as they were appended, and the K mean that its
/// first append froze. Quantizes with plain loops of its own.
class ModelSequence {
 public:
  /// dim_v 0: dim.
  ModelSequence(int64_t heads, int64_t dim, bool smooth_k, int64_t dim_v = 0)
      : heads_(heads), dim_(dim), dim_v_(dim_v == 0 ? dim : dim_v), smooth_k_(smooth_k) {}

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
    /// The same plus the mean.
    [[nodiscard]] Tensor restored() const;
  };
  [[nodiscard]] Quantized k() const { return quantized(k_, dim_, smooth_k_ && !k_.empty()); }
  [[nodiscard]] Quantized v() const { return quantized(v_, dim_v_, false); }
  [[nodiscard]] int64_t dim_v() const { return dim_v_; }

 private:
  [[nodiscard]] Quantized quantized(const std::vector<float>& x, int64_t dim, bool with_mean) const;

  int64_t heads_, dim_, dim_v_;
  bool smooth_k_;
  std::vector<float> k_, v_;  // [tokens][heads][dim], of V dim_v
  std::vector<float> mean_;   // [heads][dim]
};

struct Attended {
  Tensor out, lse;
};

/// What attend() must give for rows [first, first + rows) of the queries of a batch, which belong
/// to this sequence: attention() over what the model says is stored, in the modes and with the
/// score operands of the batch.
Attended attend_model(const ModelSequence& model, const Tensor& q, int64_t first, int64_t rows,
                      int32_t page_size, const KvCacheAttentionOptions& options,
                      const Context& context);

/// Every row of x [1, tokens, heads, dim] quantized and back.
Tensor through_codes(const Tensor& x);

}  // namespace attn8::testing
