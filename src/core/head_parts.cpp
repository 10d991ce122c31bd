// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/head_parts.hpp"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "core/message.hpp"

namespace attn8 {
namespace {

/// Heads [first, first + count) of a view, or all of one that has a single head for all.
template <class View>
View heads_of(View view, int64_t first, int64_t count, bool one_for_all = false) noexcept {
  if (one_for_all) return view;
  // Where there are no elements there may be no memory.
  if (view.data != nullptr) {
    using Byte = std::conditional_t<std::is_same_v<View, TensorView>, std::byte, const std::byte>;
    view.data = static_cast<Byte*>(view.data) +
                first * view.strides[2] * static_cast<int64_t>(dtype_bytes(view.dtype));
  }
  view.shape[2] = count;
  return view;
}

Operand heads_of(const Operand& operand, int64_t first, int64_t count) noexcept {
  const auto* view = std::get_if<ConstTensorView>(&operand);
  if (view != nullptr) return heads_of(*view, first, count);
  QuantizedView part = *std::get_if<QuantizedView>(&operand);
  part.codes = heads_of(part.codes, first, count);
  part.scale = heads_of(part.scale, first, count);
  if (part.mean.has_value()) part.mean = heads_of(*part.mean, first, count);
  return part;
}

/// The part of kv heads [first, first + count), `group` query heads each.
AttentionInputs part_of(const AttentionInputs& inputs, int64_t first, int64_t count,
                        int64_t group) noexcept {
  AttentionInputs part = inputs;
  part.q = heads_of(inputs.q, first * group, count * group);
  part.k = heads_of(inputs.k, first, count);
  part.v = heads_of(inputs.v, first, count);
  for (std::optional<ConstTensorView>* view : {&part.attn_mask, &part.alibi_slopes, &part.sinks}) {
    // Only attn_mask may have one head for all; the others have one there if there is one.
    if (view->has_value()) {
      *view = heads_of(**view, first * group, count * group, (*view)->shape[2] == 1);
    }
  }
  return part;
}

AttentionOutputs part_of(const AttentionOutputs& outputs, int64_t first, int64_t count,
                         int64_t group) noexcept {
  AttentionOutputs part = outputs;
  part.out = heads_of(outputs.out, first * group, count * group);
  if (outputs.lse.has_value()) part.lse = heads_of(*outputs.lse, first * group, count * group);
  return part;
}

}  // namespace

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
  for (size_t first = 0; first < modes.size();) {
    const Mode mode = modes[first];
    const auto end =
        static_cast<size_t>(std::find_if(modes.begin() + static_cast<std::ptrdiff_t>(first),
                                         modes.end(), [&](Mode other) { return other != mode; }) -
                            modes.begin());
    const auto begin = static_cast<int64_t>(first);
    const auto count = static_cast<int64_t>(end - first);
    part_options.mode = mode;
    Result<AttentionPlan> made =
        AttentionPlan::make(part_of(inputs, begin, count, group),
                            part_of(outputs, begin, count, group), part_options, context);
    if (!made.ok()) return made.status();
    const AttentionPlan& part = made.value();
    if (plan.kernel.find(part.kernel()) == std::string::npos) {
      plan.kernel += (plan.kernel.empty() ? "" : "+") + std::string(part.kernel());
    }
    plan.layout.total = std::max(plan.layout.total, part.workspace_bytes());
    plan.parts.push_back({begin, count, part});
    first = end;
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
