// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

namespace attn8::app {

/// A distribution of synthetic q, k and v.
struct Recipe {
  std::string_view name;
  std::string_view description;  ///< one line
};

/// Every recipe; the plain ones first.
std::span<const Recipe> recipes() noexcept;

/// The recipe of that name; nullptr when there is none.
const Recipe* find_recipe(std::string_view name) noexcept;

/// Sizes of what fill() makes.
struct RecipeShape {
  int64_t batch = 1;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t nheads_q = 1;
  int64_t nheads_k = 1;  ///< divides nheads_q
  int64_t head_dim = 0;
};

/// Fills dense [batch, seq, head, dim] tensors; a span may be empty when its tensor is not wanted.
/// The numbers depend on the seed, the recipe and their place only: row i of a head is the same
/// whatever the lengths, so that a few query rows stand for a long sequence. The exception are the
/// sinks, whose keys are placed above the largest score over all seqlen_k keys. Only IEEE
/// additions, multiplications, divisions and square roots take part, so every platform gives the
/// same bits. Values are float32, rounded to what float16 holds when `round_to_float16`.
/// The recipes with structure (llm and on) assume softmax_scale = 1/sqrt(head_dim).
void fill(const Recipe& recipe, uint64_t seed, const RecipeShape& shape, std::span<float> q,
          std::span<float> k, std::span<float> v, bool round_to_float16 = false);

}  // namespace attn8::app
