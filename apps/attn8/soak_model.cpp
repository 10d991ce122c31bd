// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "soak_model.hpp"

#include <algorithm>
#include <random>

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

}  // namespace attn8::app
