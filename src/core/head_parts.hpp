// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "attn8/attention.hpp"
#include "core/plan_state.hpp"

/// Attention whose kv heads run in different modes: one plan per stretch of heads of one mode, over
/// views of their part of the tensors.
namespace attn8 {

struct HeadStretch {
  int64_t first = 0;  ///< kv head
  int64_t count = 0;
  Mode mode = Mode::kAccurate;
};

/// The longest stretches of one mode. Throws std::bad_alloc.
std::vector<HeadStretch> stretches_of(std::span<const Mode> head_modes);

/// What belongs to kv heads [first, first + count), `group` query heads each.
AttentionInputs part_of(const AttentionInputs& inputs, int64_t first, int64_t count,
                        int64_t group) noexcept;
AttentionOutputs part_of(const AttentionOutputs& outputs, int64_t first, int64_t count,
                         int64_t group) noexcept;

/// Fills parts, kernel and workspace of a plan for options.head_modes. The whole problem is
/// validated; every part checks what its own mode takes. Throws std::bad_alloc.
Status plan_parts(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                  const AttentionOptions& options, const Context& context,
                  AttentionPlan::State& plan);

/// Runs them, one after the other in the one workspace.
Status run_parts(const AttentionPlan::State& plan, const AttentionInputs& inputs,
                 const AttentionOutputs& outputs, std::span<std::byte> workspace,
                 RunTimes* times) noexcept;

}  // namespace attn8
