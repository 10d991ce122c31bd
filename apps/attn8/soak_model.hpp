// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "attn8/kv_cache.hpp"
#include "attn8/tensor.hpp"

namespace attn8::app {

/// K and V of every token there can be: a token is a number, and this says what it holds.
class SoakTokens {
 public:
  /// row: elements of a token, all kv heads.
  SoakTokens(uint64_t seed, int64_t row);
  [[nodiscard]] std::span<const float> k(uint64_t token) const { return row_at(2 * token); }
  [[nodiscard]] std::span<const float> v(uint64_t token) const { return row_at(2 * token + 1); }

 private:
  [[nodiscard]] std::span<const float> row_at(uint64_t index) const;
  size_t row_;
  std::vector<float> values_;
};

/// Pages as the rules of include/attn8/kv_cache.hpp count them; they hold nothing. Thread-safe.
class SoakPages {
 public:
  using Page = std::shared_ptr<void>;
  Page take();
  [[nodiscard]] int64_t used() const noexcept { return used_; }

 private:
  std::atomic<int64_t> used_ = 0;
};

/// What one sequence of the cache must be.
class SoakSequence {
 public:
  explicit SoakSequence(SoakPages& pages) : pages_(&pages) {}

  [[nodiscard]] int64_t length() const noexcept { return static_cast<int64_t>(tokens_.size()); }
  [[nodiscard]] std::span<const uint64_t> tokens() const noexcept { return tokens_; }
  /// The tokens of the first append, whose mean K is subtracted from all, whoever still has them.
  [[nodiscard]] std::span<const uint64_t> prompt() const noexcept { return prompt_; }

  /// Pages that the operation must find free.
  [[nodiscard]] int64_t append_wants(int64_t tokens) const;
  [[nodiscard]] int64_t fork_wants(int64_t length) const;
  [[nodiscard]] int64_t truncate_wants(int64_t length) const;

  void append(std::span<const uint64_t> tokens);
  [[nodiscard]] SoakSequence fork(int64_t length) const;
  void truncate(int64_t length);

 private:
  SoakPages* pages_;
  std::vector<uint64_t> tokens_;
  std::vector<uint64_t> prompt_;
  std::vector<SoakPages::Page> held_;
};

/// What changes the scores of one attend(), and the mode.
class SoakScores {
 public:
  /// rows: of the batch; keys: of its longest sequence.
  SoakScores(std::mt19937_64& random, int64_t rows, int64_t keys);
  /// Views into this.
  [[nodiscard]] KvCacheAttentionOptions options() const;
  /// Whether row `row` of a batch, query `query` of `queries` of a sequence of `keys`, may see
  /// `key` as far as the window goes.
  [[nodiscard]] bool in_window(int64_t query, int64_t queries, int64_t key, int64_t keys) const;
  /// What attn_mask adds, -inf where it hides; 0 without one.
  [[nodiscard]] float added(int64_t row, int64_t head, int64_t key) const;
  [[nodiscard]] bool has_window_or_mask() const;
  /// What it takes to say which case failed.
  [[nodiscard]] std::string label() const;

 private:
  Mode mode_ = Mode::kAccurate;
  Mask mask_;
  float softcap_ = 0;
  std::vector<float> alibi_slopes_, sinks_;
  DType mask_dtype_ = DType::kFloat32;
  Extents mask_shape_ = {};
  std::vector<float> mask_floats_;
  std::vector<uint8_t> mask_bools_;
};

/// How far a result is from the oracle, in bounds.
struct SoakRatios {
  double out = 0;
  double lse = 0;
};

/// Compares what attend() gave for q [1, rows, nheads_q, head_dim] of one sequence, rows
/// [first_row, first_row + rows) of its batch, with reference::emulation over what the model says
/// it holds.
SoakRatios compare_with_oracle(const SoakSequence& sequence, const SoakTokens& tokens,
                               const ConstTensorView& q, const ConstTensorView& out,
                               const ConstTensorView& lse, const SoakScores& scores,
                               int64_t first_row);

}  // namespace attn8::app
