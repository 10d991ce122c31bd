// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "attn8/attention.hpp"
#include "attn8/merge.hpp"

namespace attn8 {

/// What AttentionPlan asks of a backend other than the CPU. Immutable, thread-safe.
class DevicePlan {
 public:
  DevicePlan() = default;
  DevicePlan(const DevicePlan&) = delete;
  DevicePlan& operator=(const DevicePlan&) = delete;
  virtual ~DevicePlan() = default;

  [[nodiscard]] virtual size_t workspace_bytes() const noexcept = 0;
  [[nodiscard]] virtual std::string_view kernel() const noexcept = 0;
  [[nodiscard]] virtual int32_t kv_block() const noexcept = 0;

  /// Enqueues on `stream`. Inputs and outputs have passed validation and fit the plan; the
  /// workspace is large enough.
  virtual Status run(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                     std::byte* workspace, void* stream) const noexcept = 0;
};

/// A plan for the CUDA device of context.device, of a problem that has passed validation. In
/// src/cuda where that is built; else in core/no_cuda.cpp, where it is kUnavailable.
Result<std::shared_ptr<const DevicePlan>> make_cuda_plan(const AttentionInputs& inputs,
                                                         const AttentionOutputs& outputs,
                                                         const AttentionOptions& options,
                                                         int32_t device) noexcept;

/// merge_states() of what has passed validation, enqueued on `stream`. Likewise in two places.
Status merge_states_on_cuda(std::span<const AttentionState> states, const AttentionOutputs& merged,
                            int32_t device, void* stream) noexcept;

}  // namespace attn8
