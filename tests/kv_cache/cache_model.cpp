// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "kv_cache/cache_model.hpp"

#include <bit>
#include <cmath>
#include <limits>

namespace attn8::testing {

void ModelSequence::append(const Tensor& k, const Tensor& v) {
  const int64_t tokens = k.shape()[1];
  if (tokens == 0) return;
  if (length() == 0) {
    mean_.assign(static_cast<size_t>(heads_ * dim_), 0.0f);
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t d = 0; d < dim_; ++d) {
        double total = 0;  // the library adds up 4096 tokens at a time
        for (int64_t begin = 0; begin < tokens; begin += 4096) {
          double sum = 0;
          for (int64_t s = begin; s < std::min(begin + 4096, tokens); ++s) sum += k.get(0, s, h, d);
          total += sum;
        }
        const auto mean = static_cast<float>(total / static_cast<double>(tokens));
        if (std::isfinite(mean)) mean_[static_cast<size_t>(h * dim_ + d)] = mean;
      }
    }
  }
  for (int64_t s = 0; s < tokens; ++s) {
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t d = 0; d < dim_; ++d) {
        k_.push_back(static_cast<float>(k.get(0, s, h, d)));
        v_.push_back(static_cast<float>(v.get(0, s, h, d)));
      }
    }
  }
}

void ModelSequence::truncate(int64_t length) {
  k_.resize(static_cast<size_t>(length * heads_ * dim_));
  v_.resize(k_.size());
}

bool ModelSequence::poisoned() const {
  for (size_t i = 0; i < k_.size(); ++i) {
    if (!std::isfinite(k_[i]) || !std::isfinite(v_[i])) return true;
  }
  return false;
}

ModelSequence::Quantized ModelSequence::quantized(const std::vector<float>& x,
                                                  bool with_mean) const {
  const int64_t tokens = length();
  Quantized result{Tensor(DType::kInt8, {1, tokens, heads_, dim_}),
                   Tensor(DType::kFloat32, {1, tokens, heads_, 1}),
                   Tensor(DType::kFloat32, {1, 1, heads_, dim_}), with_mean};
  const auto mean = [&](int64_t h, int64_t d) {
    return with_mean ? mean_[static_cast<size_t>(h * dim_ + d)] : 0.0f;
  };
  result.mean.fill([&](int64_t, int64_t, int64_t h, int64_t d) { return mean(h, d); });
  for (int64_t s = 0; s < tokens; ++s) {
    for (int64_t h = 0; h < heads_; ++h) {
      float largest = 0;
      bool finite = true;
      std::vector<float> row;
      for (int64_t d = 0; d < dim_; ++d) {
        const float value = x[static_cast<size_t>((s * heads_ + h) * dim_ + d)] - mean(h, d);
        finite = finite && std::isfinite(value);
        largest = std::max(largest, std::fabs(value));
        row.push_back(value);
      }
      float scale = largest / 127.0f;
      const bool zero = scale < std::numeric_limits<float>::min();
      // The low 3 bits of the significand cleared.
      scale = zero ? 1.0f : std::bit_cast<float>(std::bit_cast<uint32_t>(scale) / 8 * 8);
      if (!finite) scale = std::numeric_limits<float>::quiet_NaN();
      result.scale.set(0, s, h, 0, scale);
      for (int64_t d = 0; d < dim_; ++d) {
        const float code =
            zero || !finite ? 0.0f : std::nearbyint(row[static_cast<size_t>(d)] / scale);
        result.codes.set(0, s, h, d, code);
      }
    }
  }
  return result;
}

QuantizedView ModelSequence::Quantized::view() const {
  QuantizedView view{codes.view(), scale.view(), {Granularity::kToken}};
  if (with_mean) view.mean = mean.view();
  return view;
}

Tensor ModelSequence::Quantized::dequantized() const {
  Tensor x(DType::kFloat32, codes.shape());
  x.fill([&](int64_t, int64_t s, int64_t h, int64_t d) {
    return codes.get(0, s, h, d) * scale.get(0, s, h, 0);
  });
  return x;
}

Tensor through_codes(const Tensor& x) {
  ModelSequence rows(x.shape()[2], x.shape()[3], false);
  rows.append(x, x);
  return rows.k().dequantized();
}

}  // namespace attn8::testing
