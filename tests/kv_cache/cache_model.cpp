// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "kv_cache/cache_model.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

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
      }
      for (int64_t d = 0; d < dim_v_; ++d) {
        v_.push_back(static_cast<float>(v.get(0, s, h, d)));
      }
    }
  }
}

void ModelSequence::truncate(int64_t length) {
  k_.resize(static_cast<size_t>(length * heads_ * dim_));
  v_.resize(static_cast<size_t>(length * heads_ * dim_v_));
}

bool ModelSequence::poisoned() const {
  const auto is_bad = [](float x) { return !std::isfinite(x); };
  return std::ranges::any_of(k_, is_bad) || std::ranges::any_of(v_, is_bad);
}

ModelSequence::Quantized ModelSequence::quantized(const std::vector<float>& x, int64_t dim,
                                                  bool with_mean) const {
  const int64_t tokens = length();
  Quantized result{Tensor(DType::kInt8, {1, tokens, heads_, dim}),
                   Tensor(DType::kFloat32, {1, tokens, heads_, 1}),
                   Tensor(DType::kFloat32, {1, 1, heads_, dim}), with_mean};
  const auto mean = [&](int64_t h, int64_t d) {
    return with_mean ? mean_[static_cast<size_t>(h * dim + d)] : 0.0f;
  };
  result.mean.fill([&](int64_t, int64_t, int64_t h, int64_t d) { return mean(h, d); });
  for (int64_t s = 0; s < tokens; ++s) {
    for (int64_t h = 0; h < heads_; ++h) {
      float largest = 0;
      bool finite = true;
      std::vector<float> row;
      for (int64_t d = 0; d < dim; ++d) {
        const float value = x[static_cast<size_t>((s * heads_ + h) * dim + d)] - mean(h, d);
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
      for (int64_t d = 0; d < dim; ++d) {
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

Tensor ModelSequence::Quantized::restored() const {
  Tensor x = dequantized();
  if (!with_mean) return x;
  const Tensor rounded = x;
  x.fill([&](int64_t, int64_t s, int64_t h, int64_t d) {
    return static_cast<float>(rounded.get(0, s, h, d)) + static_cast<float>(mean.get(0, 0, h, d));
  });
  return x;
}

namespace {

/// Entries [first, first + count) of x along an axis; where x has one for all, all of it.
Tensor part_of(const ConstTensorView& x, size_t axis, int64_t first, int64_t count) {
  if (x.shape[axis] == 1) first = 0, count = 1;
  Extents shape = x.shape;
  shape[axis] = count;
  Tensor part(x.dtype, shape);
  const auto bytes = static_cast<int64_t>(dtype_bytes(x.dtype));
  const TensorView to = part.view();
  for (int64_t s = 0; s < shape[1]; ++s) {
    for (int64_t h = 0; h < shape[2]; ++h) {
      for (int64_t d = 0; d < shape[3]; ++d) {
        std::array<int64_t, 3> at = {s, h, d};
        at[axis - 1] += first;
        std::memcpy(
            static_cast<std::byte*>(to.data) +
                (s * to.strides[1] + h * to.strides[2] + d * to.strides[3]) * bytes,
            static_cast<const std::byte*>(x.data) +
                (at[0] * x.strides[1] + at[1] * x.strides[2] + at[2] * x.strides[3]) * bytes,
            static_cast<size_t>(bytes));
      }
    }
  }
  return part;
}

/// All heads in one mode.
Attended attend_in(Mode mode, const ModelSequence& model, const Tensor& q, AttentionInputs inputs,
                   AttentionOptions options, const Context& context) {
  const ModelSequence::Quantized k = model.k();
  const ModelSequence::Quantized v = model.v();
  const Tensor k_floats = k.restored();
  const Tensor v_floats = v.dequantized();
  const Extents& shape = q.shape();
  Attended result = {Tensor(DType::kFloat32, {1, shape[1], shape[2], model.dim_v()}),
                     Tensor(DType::kFloat32, {1, shape[1], shape[2], 1})};
  options.mode = mode;
  inputs.q = q.view();
  if (mode == Mode::kExact) {
    inputs.k = k_floats.view();
  } else {
    inputs.k = k.view();
  }
  if (mode == Mode::kAccurate) {
    inputs.v = v.view();
  } else {
    inputs.v = v_floats.view();
  }
  const Status status = attention(inputs, {result.out.view(), result.lse.view()}, options, context);
  if (!status.ok()) throw std::runtime_error("attention(): " + status.message());
  return result;
}

}  // namespace

Attended attend_model(const ModelSequence& model, const Tensor& q, int64_t first, int64_t rows,
                      int32_t page_size, const KvCacheAttentionOptions& options,
                      const Context& context) {
  const Tensor own_q = part_of(q.view(), 1, first, rows);
  AttentionInputs inputs;
  inputs.alibi_slopes = options.alibi_slopes;
  inputs.sinks = options.sinks;
  Tensor mask;
  if (options.attn_mask.has_value()) {
    mask = part_of(part_of(*options.attn_mask, 1, first, rows).view(), 3, 0, model.length());
    inputs.attn_mask = mask.view();
  }
  AttentionOptions all = {.softmax_scale = options.softmax_scale,
                          .mask = options.mask,
                          .kv_block = page_size,
                          .smooth_k = false};
  all.softcap = options.softcap;
  if (options.head_modes.empty()) {
    return attend_in(options.mode, model, own_q, inputs, all, context);
  }
  const int64_t nheads_q = own_q.shape()[2];
  const int64_t group = nheads_q / std::ssize(options.head_modes);
  Attended result = attend_in(options.head_modes[0], model, own_q, inputs, all, context);
  for (int64_t h = group; h < nheads_q; ++h) {
    const Mode mode = options.head_modes[static_cast<size_t>(h / group)];
    const Attended one = attend_in(mode, model, own_q, inputs, all, context);
    for (int64_t s = 0; s < rows; ++s) {
      result.lse.set(0, s, h, 0, one.lse.get(0, s, h, 0));
      for (int64_t d = 0; d < model.dim_v(); ++d)
        result.out.set(0, s, h, d, one.out.get(0, s, h, d));
    }
  }
  return result;
}

Tensor through_codes(const Tensor& x) {
  ModelSequence rows(x.shape()[2], x.shape()[3], false);
  rows.append(x, x);
  return rows.k().dequantized();
}

}  // namespace attn8::testing
