// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "attn8/attention.hpp"
#include "attn8/reference.hpp"
#include "core/element.hpp"
#include "core/head_parts.hpp"
#include "core/message.hpp"
#include "core/plan_state.hpp"
#include "core/validate.hpp"

namespace attn8 {
namespace {

OperandKind kind_of(const Operand& operand) noexcept {
  return {std::holds_alternative<QuantizedView>(operand), data_view(operand).dtype};
}

/// Mode::kFp8 has no kernel: the emulation computes it in float64.
Status run_emulation(const AttentionPlan::State& plan, const AttentionInputs& inputs,
                     const AttentionOutputs& outputs) noexcept {
  try {
    const auto rows = static_cast<size_t>(plan.batch * plan.seqlen_q * plan.nheads_q);
    std::vector<double> out(rows * static_cast<size_t>(plan.head_dim_v));
    std::vector<double> lse(plan.with_lse ? rows : 0);
    reference::EmulationOptions options = reference::emulation_options(plan.options);
    options.softmax_scale = plan.softmax_scale;
    if (Status status = reference::emulation(inputs, options, out, lse, {}); !status.ok()) {
      return status;
    }
    const auto offset = [](const TensorView& view, int64_t b, int64_t s, int64_t h, int64_t d) {
      return b * view.strides[0] + s * view.strides[1] + h * view.strides[2] + d * view.strides[3];
    };
    size_t row = 0;
    for (int64_t b = 0; b < plan.batch; ++b) {
      for (int64_t s = 0; s < plan.seqlen_q; ++s) {
        for (int64_t h = 0; h < plan.nheads_q; ++h, ++row) {
          for (int64_t d = 0; d < plan.head_dim_v; ++d) {
            const auto value = static_cast<float>(
                out[row * static_cast<size_t>(plan.head_dim_v) + static_cast<size_t>(d)]);
            const int64_t i = offset(outputs.out, b, s, h, d);
            if (outputs.out.dtype == DType::kFloat32) {
              static_cast<float*>(outputs.out.data)[i] = value;
            } else {
              static_cast<uint16_t*>(outputs.out.data)[i] = outputs.out.dtype == DType::kFloat16
                                                                ? float_to_float16(value)
                                                                : float_to_bfloat16(value);
            }
          }
          if (plan.with_lse) {
            static_cast<float*>(outputs.lse->data)[offset(*outputs.lse, b, s, h, 0)] =
                static_cast<float>(lse[row]);
          }
        }
      }
    }
    return {};
  } catch (...) {
    return Status(StatusCode::kOutOfMemory, {});
  }
}

/// Whether a run's operands are what the plan was made for; strides may differ.
Status check_same_problem(const AttentionPlan::State& plan, const AttentionInputs& inputs,
                          const AttentionOutputs& outputs) noexcept {
  const auto same_kind = [](const OperandKind& planned, const Operand& operand) {
    const OperandKind kind = kind_of(operand);
    return kind.quantized == planned.quantized && kind.dtype == planned.dtype;
  };
  const Extents q = data_view(inputs.q).shape;
  const Extents k = data_view(inputs.k).shape;
  if (q != Extents{plan.batch, plan.seqlen_q, plan.nheads_q, plan.head_dim} ||
      k != Extents{plan.batch, plan.seqlen_k, plan.nheads_k, plan.head_dim} ||
      data_view(inputs.v).shape[3] != plan.head_dim_v) {
    return invalid("inputs do not have the shapes the plan was made for");
  }
  if (!same_kind(plan.q, inputs.q) || !same_kind(plan.k, inputs.k) ||
      !same_kind(plan.v, inputs.v) || outputs.lse.has_value() != plan.with_lse ||
      (inputs.seqlens_k.has_value() || inputs.leftpad_k.has_value()) != plan.changes_lengths ||
      inputs.cu_seqlens_q.has_value() != plan.ragged || sequences_of(inputs) != plan.sequences) {
    return invalid("operands do not have the dtypes, lengths and outputs the plan was made for");
  }
  if (const auto* v = std::get_if<QuantizedView>(&inputs.v);
      v != nullptr && v->spec.granularity != plan.v_granularity) {
    return invalid("v.spec.granularity is not the one the plan was made for");
  }
  return {};
}

Status plan_on_device(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                      const AttentionOptions& options, AttentionPlan::State& plan) {
  if (plan.ragged) {
    return failure(StatusCode::kUnsupported,
                   "cu_seqlens_q is set, on cuda it is CudaKvCache that takes packed sequences");
  }
  if (options.check_finite) {
    return failure(StatusCode::kUnsupported,
                   "options.check_finite got true, device memory is not read by the host");
  }
  auto device_plan = make_cuda_plan(inputs, outputs, options, plan.context.device.index);
  if (!device_plan.ok()) return device_plan.status();
  plan.device_plan = std::move(device_plan).value();
  plan.kernel = plan.device_plan->kernel();
  plan.options.kv_block = plan.device_plan->kv_block();
  plan.layout.total = plan.device_plan->workspace_bytes();
  return {};
}

}  // namespace

Result<AttentionPlan> AttentionPlan::make(const AttentionInputs& inputs,
                                          const AttentionOutputs& outputs,
                                          const AttentionOptions& all_options,
                                          const Context& context) noexcept {
  // What the heads share; their modes are for plan_parts().
  AttentionOptions options = all_options;
  options.head_modes = {};
  if (!all_options.head_modes.empty()) options.mode = all_options.head_modes.front();
  const bool on_cpu = context.device.type == DeviceType::kCpu;
  if (on_cpu) {
    if (Status status = validate_context(context); !status.ok()) return status;
  }
  if (Status status = validate_attention(inputs, outputs, options, context.device); !status.ok()) {
    return status;
  }
  try {
    auto plan = std::make_shared<State>();
    const Extents& q = data_view(inputs.q).shape;
    const Extents& k = data_view(inputs.k).shape;
    plan->batch = q[0];
    plan->seqlen_q = q[1];
    plan->nheads_q = q[2];
    plan->head_dim = q[3];
    plan->head_dim_v = data_view(inputs.v).shape[3];
    plan->seqlen_k = k[1];
    plan->nheads_k = k[2];
    plan->q = kind_of(inputs.q);
    plan->k = kind_of(inputs.k);
    plan->v = kind_of(inputs.v);
    plan->options = options;
    plan->context = context;
    plan->with_lse = outputs.lse.has_value();
    if (options.kv_block == 0) plan->options.kv_block = kDefaultKvBlock;
    plan->softmax_scale = options.softmax_scale.value_or(
        static_cast<float>(1.0 / std::sqrt(static_cast<double>(plan->head_dim))));
    const auto* v = std::get_if<QuantizedView>(&inputs.v);
    plan->v_granularity = v != nullptr                   ? v->spec.granularity
                          : options.mode == Mode::kPaper ? Granularity::kTensor
                                                         : options.v_granularity;
    plan->options.v_granularity = plan->v_granularity;
    plan->keys = visible_union(options.mask, plan->seqlen_q, plan->seqlen_k);
    plan->changes_lengths = inputs.seqlens_k.has_value() || inputs.leftpad_k.has_value();
    plan->ragged = inputs.cu_seqlens_q.has_value();
    plan->sequences = sequences_of(inputs);
    // Where the diagonal of a sequence lies is data.
    if (plan->changes_lengths || plan->ragged) {
      plan->keys = {0, plan->seqlen_q > 0 ? plan->seqlen_k : 0};
    }
    if (!all_options.head_modes.empty()) {
      plan->table =
          on_cpu ? find_kernel_table(context.force_isa ? context.isa : best_isa()) : nullptr;
      Status status = plan_parts(inputs, outputs, all_options, context, *plan);
      if (!status.ok()) return status;
      return AttentionPlan(std::move(plan));
    }
    if (!on_cpu) {
      Status status = plan_on_device(inputs, outputs, options, *plan);
      if (!status.ok()) return status;
      return AttentionPlan(std::move(plan));
    }
    if (options.mode == Mode::kFp8) {
      plan->kernel = "emulation_fp8";
      return AttentionPlan(std::move(plan));
    }
    const Isa isa = context.force_isa ? context.isa : best_isa();
    plan->table = find_kernel_table(isa);
    if (plan->table == nullptr) {
      return failure(StatusCode::kInternal, "isa ", to_string(isa), " has no kernel table");
    }
    plan->kernel = std::string("attend_") + std::string(to_string(options.mode)) +
                   (plan->exact_bfloat16() ? "_bfloat16_" : "_") + std::string(to_string(isa)) +
                   "_d" + std::to_string(plan->head_dim);
    if (Status status = cpu::lay_out(*plan); !status.ok()) return status;
    return AttentionPlan(std::move(plan));
  } catch (...) {
    return Status(StatusCode::kOutOfMemory, {});
  }
}

size_t AttentionPlan::workspace_bytes() const noexcept { return state_->layout.total; }
std::string_view AttentionPlan::kernel() const noexcept { return state_->kernel; }
int32_t AttentionPlan::kv_block() const noexcept { return state_->options.kv_block; }
Granularity AttentionPlan::v_granularity() const noexcept { return state_->v_granularity; }
Isa AttentionPlan::isa() const noexcept {
  return state_->table != nullptr ? state_->table->isa : Isa::kScalar;
}

Status AttentionPlan::run(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                          std::span<std::byte> workspace, RunTimes* times) const noexcept {
  const State& plan = *state_;
  if (Status status = validate_attention(inputs, outputs, plan.options, plan.context.device);
      !status.ok()) {
    return status;
  }
  if (Status status = check_same_problem(plan, inputs, outputs); !status.ok()) return status;
  if (Status status = validate_no_overlap(inputs, outputs); !status.ok()) return status;
  if (workspace.size() < plan.layout.total) {
    return invalid("workspace got ", workspace.size(), " bytes, wants ", plan.layout.total);
  }
  const bool on_cpu = plan.context.device.type == DeviceType::kCpu;
  const uintptr_t alignment = on_cpu ? 64 : 256;
  if (plan.layout.total > 0 && reinterpret_cast<uintptr_t>(workspace.data()) % alignment != 0) {
    return invalid("workspace.data() wants an alignment of ", alignment, " bytes");
  }
  if (plan.options.check_finite) {
    for (const auto& [name, operand] : {std::pair<const char*, const Operand&>{"q", inputs.q},
                                        {"k", inputs.k},
                                        {"v", inputs.v}}) {
      const auto* view = std::get_if<ConstTensorView>(&operand);
      if (view == nullptr) continue;
      if (Status status = validate_finite(name, *view); !status.ok()) return status;
    }
  }
  if (times != nullptr) *times = {};
  // On a device these are read by the kernels alone, which keep within the plan's lengths.
  if (on_cpu) {
    if (Status status = validate_score_values(inputs); !status.ok()) return status;
  }
  if (plan.batch == 0 || plan.seqlen_q == 0) return {};
  if (!plan.parts.empty()) return run_parts(plan, inputs, outputs, workspace, times);
  if (plan.device_plan != nullptr) {
    return plan.device_plan->run(inputs, outputs, workspace.data(), plan.context.stream);
  }
  if (plan.options.mode == Mode::kFp8) return run_emulation(plan, inputs, outputs);
  return cpu::run(plan, inputs, outputs, workspace.data(), times);
}

Status attention(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                 const AttentionOptions& options, const Context& context) noexcept {
  if (context.device.type != DeviceType::kCpu) {
    return failure(StatusCode::kUnsupported,
                   "context.device got cuda, attention() allocates no device memory: "
                   "use AttentionPlan with a workspace");
  }
  Result<AttentionPlan> plan = AttentionPlan::make(inputs, outputs, options, context);
  if (!plan.ok()) return plan.status();
  const size_t bytes = plan.value().workspace_bytes();
  struct Free {
    void operator()(std::byte* p) const noexcept { ::operator delete (p, std::align_val_t{64}); }
  };
  const std::unique_ptr<std::byte, Free> workspace(
      static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64}, std::nothrow)));
  if (workspace == nullptr) {
    return failure(StatusCode::kOutOfMemory, "workspace of ", bytes, " bytes");
  }
  return plan.value().run(inputs, outputs, {workspace.get(), bytes});
}

}  // namespace attn8
