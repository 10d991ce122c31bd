// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "soak_model.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "attn8/reference.hpp"
#include "failure.hpp"
#include "soak.hpp"

namespace attn8::app {
namespace {

/// Rows start anywhere in the table: 2^16 of them are as good as no repetition.
constexpr size_t kStarts = size_t{1} << 16;

int64_t pages_for(int64_t tokens) { return (tokens + kSoakPageSize - 1) / kSoakPageSize; }

uint64_t mix(uint64_t x) {  // the finalizer of SplitMix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

double ratio(double got, double want, double bound) {
  if (got == want) return 0;
  const double r = std::fabs(got - want) / bound;
  return std::isnan(r) ? std::numeric_limits<double>::infinity() : r;
}

}  // namespace

SoakTokens::SoakTokens(uint64_t seed, int64_t row)
    : row_(static_cast<size_t>(row)), values_(kStarts + row_) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < values_.size(); ++i) {
    // One stretch in eight is an outlier, and a bias is there for the K mean to remove.
    values_[i] = normal(random) * (i / 256 % 8 == 3 ? 20.0F : 1.0F) + (i % 5 == 0 ? 2.0F : 0.0F);
  }
}

std::span<const float> SoakTokens::row_at(uint64_t index) const {
  return {values_.data() + mix(index) % kStarts, row_};
}

SoakPages::Page SoakPages::take() {
  ++used_;
  return {static_cast<void*>(this), [this](void*) { --used_; }};
}

int64_t SoakSequence::append_wants(int64_t tokens) const {
  if (tokens == 0) return 0;
  const bool copies = length() % kSoakPageSize != 0 && held_.back().use_count() > 1;
  return pages_for(length() + tokens) - pages_for(length()) + (copies ? 1 : 0);
}

int64_t SoakSequence::fork_wants(int64_t length) const {
  return length % kSoakPageSize != 0 && length < this->length() ? 1 : 0;
}

int64_t SoakSequence::truncate_wants(int64_t length) const {
  if (length == this->length() || length % kSoakPageSize == 0) return 0;
  return held_[static_cast<size_t>(length / kSoakPageSize)].use_count() > 1 ? 1 : 0;
}

void SoakSequence::append(std::span<const uint64_t> tokens) {
  if (tokens.empty()) return;
  if (tokens_.empty()) prompt_.assign(tokens.begin(), tokens.end());
  if (length() % kSoakPageSize != 0 && held_.back().use_count() > 1) held_.back() = pages_->take();
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  while (std::ssize(held_) < pages_for(length())) held_.push_back(pages_->take());
}

SoakSequence SoakSequence::fork(int64_t length) const {
  SoakSequence child(*pages_);
  child.tokens_.assign(tokens_.begin(), tokens_.begin() + length);
  if (length > 0) child.prompt_ = prompt_;
  child.held_.assign(held_.begin(), held_.begin() + pages_for(length));
  if (fork_wants(length) > 0) child.held_.back() = pages_->take();
  return child;
}

void SoakSequence::truncate(int64_t length) {
  const bool copies = truncate_wants(length) > 0;
  tokens_.resize(static_cast<size_t>(length));
  held_.resize(static_cast<size_t>(pages_for(length)));
  if (copies) held_.back() = pages_->take();
  if (length == 0) prompt_.clear();
}

SoakRatios compare_with_oracle(const SoakSequence& sequence, const SoakTokens& tokens,
                               const ConstTensorView& q, const ConstTensorView& out,
                               const ConstTensorView& lse, bool causal) {
  constexpr auto kRow = static_cast<size_t>(kSoakHeads * kSoakHeadDim);
  const auto keys = static_cast<size_t>(sequence.length());
  std::vector<float> mean(kRow);
  for (size_t e = 0; e < kRow && keys > 0; ++e) {
    double sum = 0;
    for (const uint64_t token : sequence.prompt()) sum += tokens.k(token)[e];
    mean[e] = static_cast<float>(sum / static_cast<double>(sequence.prompt().size()));
  }
  std::vector<float> k(keys * kRow);
  std::vector<float> v(keys * kRow);
  for (size_t key = 0; key < keys; ++key) {
    const auto from = tokens.k(sequence.tokens()[key]);
    for (size_t e = 0; e < kRow; ++e) k[key * kRow + e] = from[e] - mean[e];
    std::ranges::copy(tokens.v(sequence.tokens()[key]), v.begin() + static_cast<long>(key * kRow));
  }
  const Extents shape = {1, sequence.length(), kSoakHeads, kSoakHeadDim};
  const auto rows = static_cast<size_t>(q.shape[1] * q.shape[2]);
  const auto dim = static_cast<size_t>(q.shape[3]);
  std::vector<double> want(rows * dim);
  std::vector<double> want_lse(rows);
  std::vector<double> bound(rows * dim);
  const AttentionOptions options = {
      .mask = {.causal = causal}, .kv_block = kSoakPageSize, .smooth_k = false};
  require(reference::emulation(
      {q, bshd(k.data(), DType::kFloat32, shape), bshd(v.data(), DType::kFloat32, shape)},
      reference::emulation_options(options), want, want_lse, bound));
  const double softmax_scale = 1 / std::sqrt(static_cast<double>(dim));
  SoakRatios worst;
  for (size_t row = 0; row < rows; ++row) {
    const auto token = static_cast<int64_t>(row) / q.shape[2];
    const auto head = static_cast<int64_t>(row) % q.shape[2];
    const auto at = [&](const ConstTensorView& x) {
      return static_cast<const float*>(x.data) + token * x.strides[1] + head * x.strides[2];
    };
    double mean_score = 0;
    double magnitude = 0;
    const auto kv_head = static_cast<size_t>(head / (kSoakQueryHeads / kSoakHeads));
    for (size_t d = 0; d < dim; ++d) {
      const double product = static_cast<double>(at(q)[d]) * mean[kv_head * dim + d];
      mean_score += product * softmax_scale;
      magnitude += std::fabs(product) * softmax_scale;
      const double value = want[row * dim + d];
      // The float32 that out is rounded to, and a block 126 octaves down, which counts as if there.
      worst.out = std::max(
          worst.out,
          ratio(at(out)[d], value, bound[row * dim + d] + 0x1p-24 * std::fabs(value) + 0x1p-100));
    }
    // exp2 errs by 2^-18, a float32 sum by 2^-24 per term, a score by a few 2^-24 of its size.
    const double value = want_lse[row] + mean_score;
    const double lse_bound = 0x1p-17 + static_cast<double>(keys) * 0x1p-24 +
                             static_cast<double>(dim + 8) * 0x1p-24 * magnitude +
                             0x1p-20 * (std::fabs(want_lse[row]) + std::fabs(value) + 1);
    worst.lse = std::max(worst.lse, ratio(at(lse)[0], value, lse_bound));
  }
  return worst;
}

}  // namespace attn8::app
