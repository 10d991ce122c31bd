// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/head_parts.hpp"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>

#include "core/message.hpp"
#include "core/slices.hpp"

namespace attn8 {

AttentionInputs part_of(const AttentionInputs& inputs, int64_t first, int64_t count,
                        int64_t group) noexcept {
  AttentionInputs part = inputs;
  part.q = slice(inputs.q, 2, first * group, count * group);
  part.k = slice(inputs.k, 2, first, count);
  part.v = slice(inputs.v, 2, first, count);
  // Only attn_mask may have one head for all; the others have one if there is one.
  for (std::optional<ConstTensorView>* view : {&part.attn_mask, &part.alibi_slopes, &part.sinks}) {
    if (view->has_value()) *view = slice_or_all(**view, 2, first * group, count * group);
  }
  return part;
}

AttentionOutputs part_of(const AttentionOutputs& outputs, int64_t first, int64_t count,
                         int64_t group) noexcept {
  AttentionOutputs part = outputs;
  part.out = slice(outputs.out, 2, first * group, count * group);
  if (outputs.lse.has_value()) part.lse = slice(*outputs.lse, 2, first * group, count * group);
  return part;
}

std::vector<HeadStretch> stretches_of(std::span<const Mode> head_modes) {
  std::vector<HeadStretch> stretches;
  for (size_t head = 0; head < head_modes.size(); ++head) {
    if (head == 0 || head_modes[head] != head_modes[head - 1]) {
      stretches.push_back({static_cast<int64_t>(head), 0, head_modes[head]});
    }
    ++stretches.back().count;
  }
  return stretches;
}

Status plan_parts(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                  const AttentionOptions& options, const Context& context,
                  AttentionPlan::State& plan) {
  const std::span<const Mode> modes = options.head_modes;
  if (static_cast<int64_t>(modes.size()) != plan.nheads_k) {
    return invalid("options.head_modes got ", modes.size(),
                   " modes, wants nheads_k=", plan.nheads_k);
  }
  const int64_t group = plan.nheads_q / plan.nheads_k;
  AttentionOptions part_options = options;
  part_options.head_modes = {};
  // run() looks at the whole tensors, and no device lets it.
  part_options.check_finite = options.check_finite && context.device.type != DeviceType::kCpu;
  for (const auto& [first, count, mode] : stretches_of(modes)) {
    part_options.mode = mode;
    Result<AttentionPlan> made =
        AttentionPlan::make(part_of(inputs, first, count, group),
                            part_of(outputs, first, count, group), part_options, context);
    if (!made.ok()) return made.status();
    const AttentionPlan& part = made.value();
    if (plan.kernel.find(part.kernel()) == std::string::npos) {
      plan.kernel += (plan.kernel.empty() ? "" : "+") + std::string(part.kernel());
    }
    plan.layout.total = std::max(plan.layout.total, part.workspace_bytes());
    plan.parts.push_back({first, count, part});
  }
  plan.options.kv_block = plan.parts.front().plan.kv_block();
  return {};
}

Status run_parts(const AttentionPlan::State& plan, const AttentionInputs& inputs,
                 const AttentionOutputs& outputs, std::span<std::byte> workspace,
                 RunTimes* times) noexcept {
  const int64_t group = plan.nheads_q / plan.nheads_k;
  for (const HeadPart& part : plan.parts) {
    RunTimes spent;
    Status status =
        part.plan.run(part_of(inputs, part.first, part.count, group),
                      part_of(outputs, part.first, part.count, group), workspace, &spent);
    if (!status.ok()) return status;
    if (times != nullptr) {
      times->quantize_ms += spent.quantize_ms;
      times->attention_ms += spent.attention_ms;
    }
  }
  return {};
}

}  // namespace attn8
