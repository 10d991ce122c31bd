// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "attn8/reference.hpp"
#include "failure.hpp"
#include "soak.hpp"
#include "soak_model.hpp"

namespace attn8::app {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr auto kDim = static_cast<size_t>(kSoakHeadDim);
constexpr size_t kRow = kSoakHeads * kDim;  // of a token

double ratio(double got, double want, double bound) {
  if (got == want) return 0;
  const double r = std::fabs(got - want) / bound;
  return std::isnan(r) ? std::numeric_limits<double>::infinity() : r;
}

/// K or V of a sequence by the rules of docs/numerics.md, written down once more.
struct Stored {
  std::vector<int8_t> codes;   // [keys][heads][dim]
  std::vector<float> scale;    // [keys][heads]
  std::vector<float> decoded;  // codes * scale

  explicit Stored(size_t keys)
      : codes(keys * kRow), scale(keys * kSoakHeads), decoded(keys * kRow) {}

  /// values: [heads][dim] of one token, all finite.
  void set(size_t key, std::span<const float> values) {
    for (size_t h = 0; h < kSoakHeads; ++h) {
      const auto head = values.subspan(h * kDim, kDim);
      float largest = 0;
      for (const float x : head) largest = std::max(largest, std::fabs(x));
      float step = largest / 127.0F;
      const bool zero = step < std::numeric_limits<float>::min();
      // The low 3 bits of the significand are 0.
      step = zero ? 1.0F : std::bit_cast<float>(std::bit_cast<uint32_t>(step) / 8 * 8);
      scale[key * kSoakHeads + h] = step;
      for (size_t d = 0; d < kDim; ++d) {
        const float code = zero ? 0.0F : std::nearbyint(head[d] / step);
        codes[key * kRow + h * kDim + d] = static_cast<int8_t>(code);
        decoded[key * kRow + h * kDim + d] = code * step;
      }
    }
  }

  [[nodiscard]] QuantizedView view() const {
    const auto keys = static_cast<int64_t>(scale.size()) / kSoakHeads;
    return {bshd(codes.data(), DType::kInt8, {1, keys, kSoakHeads, kSoakHeadDim}),
            bshd(scale.data(), DType::kFloat32, {1, keys, kSoakHeads, 1}),
            {Granularity::kToken}};
  }
};

std::vector<float> prompt_mean(const SoakSequence& sequence, const SoakTokens& tokens) {
  std::vector<float> mean(kRow);
  if (sequence.prompt().empty()) return mean;
  for (size_t e = 0; e < kRow; ++e) {
    double sum = 0;
    for (const uint64_t token : sequence.prompt()) sum += tokens.k(token)[e];
    mean[e] = static_cast<float>(sum / static_cast<double>(sequence.prompt().size()));
  }
  return mean;
}

/// attn_mask of the sequence's rows with the window in it: in a cache also what a window hides
/// from all queries counts for a page's mean V, as what a mask hides does.
std::vector<float> whole_mask(const SoakScores& scores, int64_t first_row, int64_t rows,
                              int64_t keys) {
  std::vector<float> mask;  // [rows][query heads][keys]
  mask.reserve(static_cast<size_t>(rows * kSoakQueryHeads * keys));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t h = 0; h < kSoakQueryHeads; ++h) {
      for (int64_t j = 0; j < keys; ++j) {
        mask.push_back(scores.in_window(i, rows, j, keys) ? scores.added(first_row + i, h, j)
                                                          : -kInfinity);
      }
    }
  }
  return mask;
}

}  // namespace

SoakScores::SoakScores(std::mt19937_64& random, int64_t rows, int64_t keys) {
  const auto one_in = [&](uint64_t n) { return random() % n == 0; };
  const auto uniform = [&](float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random);
  };
  if (one_in(16)) mode_ = Mode::kHalf;
  mask_.causal = !one_in(4);
  if (one_in(8)) {
    mask_.window_left = static_cast<int64_t>(random() % 200);
    if (one_in(2)) mask_.window_right = static_cast<int64_t>(random() % 20);
  }
  if (one_in(8)) softcap_ = uniform(5, 50);
  if (one_in(8)) {
    for (int64_t h = 0; h < kSoakQueryHeads; ++h) alibi_slopes_.push_back(uniform(0, 0.5F));
  }
  if (one_in(8)) {
    for (int64_t h = 0; h < kSoakQueryHeads; ++h) sinks_.push_back(uniform(-5, 5));
  }
  if (!one_in(8) || keys == 0) return;
  mask_shape_ = {1, one_in(4) ? 1 : rows, one_in(2) ? 1 : kSoakQueryHeads,
                 one_in(8) ? 1 : keys + static_cast<int64_t>(random() % 3)};
  const auto size = static_cast<size_t>(mask_shape_[1] * mask_shape_[2] * mask_shape_[3]);
  if (one_in(2)) {
    mask_dtype_ = DType::kBool;
    mask_bools_.resize(size);
    for (uint8_t& seen : mask_bools_) seen = one_in(3) ? 0 : 1;
  } else {
    mask_floats_.resize(size);
    for (float& x : mask_floats_) x = one_in(8) ? -kInfinity : uniform(-4, 4);
  }
}

KvCacheAttentionOptions SoakScores::options() const {
  KvCacheAttentionOptions options;
  options.mode = mode_;
  options.mask = mask_;
  options.softcap = softcap_;
  constexpr Extents kPerHead = {1, 1, kSoakQueryHeads, 1};
  if (!alibi_slopes_.empty()) {
    options.alibi_slopes = bshd(alibi_slopes_.data(), DType::kFloat32, kPerHead);
  }
  if (!sinks_.empty()) options.sinks = bshd(sinks_.data(), DType::kFloat32, kPerHead);
  if (!mask_bools_.empty()) options.attn_mask = bshd(mask_bools_.data(), DType::kBool, mask_shape_);
  if (!mask_floats_.empty()) {
    options.attn_mask = bshd(mask_floats_.data(), DType::kFloat32, mask_shape_);
  }
  return options;
}

bool SoakScores::in_window(int64_t query, int64_t queries, int64_t key, int64_t keys) const {
  const int64_t position = keys - queries + query;
  return (mask_.window_left < 0 || key >= position - mask_.window_left) &&
         (mask_.window_right < 0 || key <= position + mask_.window_right);
}

float SoakScores::added(int64_t row, int64_t head, int64_t key) const {
  if (mask_bools_.empty() && mask_floats_.empty()) return 0;
  const auto at = [&](size_t axis, int64_t i) { return mask_shape_[axis] == 1 ? 0 : i; };
  const auto index = static_cast<size_t>(
      (at(1, row) * mask_shape_[2] + at(2, head)) * mask_shape_[3] + at(3, key));
  if (mask_dtype_ == DType::kBool) return mask_bools_[index] != 0 ? 0 : -kInfinity;
  return mask_floats_[index];
}

bool SoakScores::has_window_or_mask() const {
  return mask_.window_left >= 0 || !mask_bools_.empty() || !mask_floats_.empty();
}

std::string SoakScores::label() const {
  return fmt::format("{}{}{}{}{}{}{}", to_string(mode_), mask_.causal ? " causal" : "",
                     mask_.window_left >= 0
                         ? fmt::format(" window {},{}", mask_.window_left, mask_.window_right)
                         : "",
                     softcap_ > 0 ? fmt::format(" softcap {}", softcap_) : "",
                     alibi_slopes_.empty() ? "" : " alibi", sinks_.empty() ? "" : " sinks",
                     mask_bools_.empty() && mask_floats_.empty() ? "" : " attn_mask");
}

SoakRatios compare_with_oracle(const SoakSequence& sequence, const SoakTokens& tokens,
                               const ConstTensorView& q, const ConstTensorView& out,
                               const ConstTensorView& lse, const SoakScores& scores,
                               int64_t first_row) {
  const auto keys = static_cast<size_t>(sequence.length());
  const std::vector<float> mean = prompt_mean(sequence, tokens);
  Stored k(keys);
  Stored v(keys);
  std::vector<float> smooth(kRow);
  for (size_t key = 0; key < keys; ++key) {
    const auto from = tokens.k(sequence.tokens()[key]);
    for (size_t e = 0; e < kRow; ++e) smooth[e] = from[e] - mean[e];
    k.set(key, smooth);
    v.set(key, tokens.v(sequence.tokens()[key]));
  }
  QuantizedView k_view = k.view();
  k_view.mean = bshd(mean.data(), DType::kFloat32, {1, 1, kSoakHeads, kSoakHeadDim});

  const KvCacheAttentionOptions changes = scores.options();
  AttentionInputs inputs = {q, k_view, v.view()};
  if (changes.mode == Mode::kHalf) {
    inputs.v = bshd(v.decoded.data(), DType::kFloat32, v.view().codes.shape);
  }
  inputs.alibi_slopes = changes.alibi_slopes;
  inputs.sinks = changes.sinks;
  std::vector<float> mask;
  if (scores.has_window_or_mask() && keys > 0) {
    mask = whole_mask(scores, first_row, q.shape[1], sequence.length());
    inputs.attn_mask =
        bshd(mask.data(), DType::kFloat32, {1, q.shape[1], kSoakQueryHeads, sequence.length()});
  }
  AttentionOptions options = {.mode = changes.mode,
                              .mask = {.causal = changes.mask.causal},
                              .kv_block = kSoakPageSize,
                              .smooth_k = false};
  options.softcap = changes.softcap;
  const auto rows = static_cast<size_t>(q.shape[1] * q.shape[2]);
  std::vector<double> want(rows * kDim);
  std::vector<double> want_lse(rows);
  std::vector<double> bound(rows * kDim);
  require(
      reference::emulation(inputs, reference::emulation_options(options), want, want_lse, bound));

  const double softmax_scale = 1 / std::sqrt(static_cast<double>(kDim));
  SoakRatios worst;
  for (size_t row = 0; row < rows; ++row) {
    const auto token = static_cast<int64_t>(row) / q.shape[2];
    const auto head = static_cast<int64_t>(row) % q.shape[2];
    const auto at = [&](const ConstTensorView& x) {
      return static_cast<const float*>(x.data) + token * x.strides[1] + head * x.strides[2];
    };
    double magnitude = 0;  // of the score of the mean
    const auto kv_head = static_cast<size_t>(head / (kSoakQueryHeads / kSoakHeads));
    for (size_t d = 0; d < kDim; ++d) {
      magnitude += std::fabs(static_cast<double>(at(q)[d]) * mean[kv_head * kDim + d]);
      const double value = want[row * kDim + d];
      // The float32 that out is rounded to, and a block 126 octaves down, which counts as if there.
      worst.out = std::max(
          worst.out,
          ratio(at(out)[d], value, bound[row * kDim + d] + 0x1p-24 * std::fabs(value) + 0x1p-100));
    }
    magnitude *= softmax_scale;
    // exp2 errs by 2^-18, a float32 sum by 2^-24 per term, a score by a few 2^-24 of its size.
    const double value = want_lse[row];
    const double lse_bound = 0x1p-17 + static_cast<double>(keys) * 0x1p-24 +
                             static_cast<double>(kDim + 8) * 0x1p-24 * magnitude +
                             0x1p-19 * (std::fabs(value) + magnitude + 1);
    worst.lse = std::max(worst.lse, ratio(at(lse)[0], value, lse_bound));
  }
  return worst;
}

}  // namespace attn8::app
