// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// attn8.h over the C++ API: copies structs in and out, and turns a Status into a number and a text.
// What an argument may be is the C++ API's to say; only NULL and struct_size are judged here.
#include <algorithm>
#include <array>
#include <cstddef>
#include <new>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "attn8/attn8.h"
#include "attn8/attn8.hpp"
#include "core/c_api.hpp"
#include "core/c_structs.hpp"
#include "core/message.hpp"
#include "core/plan_state.hpp"
#include "core/validate.hpp"

struct attn8_plan {
  attn8::AttentionPlan value;
};

namespace attn8 {
namespace {

using namespace c_api;      // NOLINT: written for this file
using namespace c_structs;  // NOLINT

/// Whether the numbers of attn8.h are those of the C++ enumerations.
template <class E>
constexpr bool same(E value, int32_t number) {
  return static_cast<int32_t>(value) == number;
}
static_assert(same(StatusCode::kOk, ATTN8_OK) &&
              same(StatusCode::kInvalidArgument, ATTN8_INVALID_ARGUMENT) &&
              same(StatusCode::kUnsupported, ATTN8_UNSUPPORTED) &&
              same(StatusCode::kUnavailable, ATTN8_UNAVAILABLE) &&
              same(StatusCode::kOutOfMemory, ATTN8_OUT_OF_MEMORY) &&
              same(StatusCode::kDeviceError, ATTN8_DEVICE_ERROR) &&
              same(StatusCode::kInternal, ATTN8_INTERNAL));
static_assert(same(DType::kFloat32, ATTN8_FLOAT32) && same(DType::kFloat16, ATTN8_FLOAT16) &&
              same(DType::kBFloat16, ATTN8_BFLOAT16) && same(DType::kInt8, ATTN8_INT8) &&
              same(DType::kInt32, ATTN8_INT32) && same(DType::kBool, ATTN8_BOOL));
static_assert(same(DeviceType::kCpu, ATTN8_CPU) && same(DeviceType::kCuda, ATTN8_CUDA));
static_assert(same(Isa::kScalar, ATTN8_ISA_SCALAR) && same(Isa::kAvx2, ATTN8_ISA_AVX2) &&
              same(Isa::kAvxVnni, ATTN8_ISA_AVX_VNNI) &&
              same(Isa::kAvx512Vnni, ATTN8_ISA_AVX512_VNNI));
static_assert(same(Mode::kAccurate, ATTN8_ACCURATE) && same(Mode::kPaper, ATTN8_PAPER) &&
              same(Mode::kHalf, ATTN8_HALF) && same(Mode::kExact, ATTN8_EXACT) &&
              same(Mode::kFp8, ATTN8_FP8));
static_assert(same(Granularity::kToken, ATTN8_PER_TOKEN) &&
              same(Granularity::kTensor, ATTN8_PER_TENSOR) &&
              same(Granularity::kChannel, ATTN8_PER_CHANNEL) &&
              same(Granularity::kBlock, ATTN8_PER_BLOCK) &&
              same(Granularity::kBlockChannel, ATTN8_PER_BLOCK_CHANNEL));
static_assert(same(Mean::kNone, ATTN8_MEAN_NONE) && same(Mean::kCompute, ATTN8_MEAN_COMPUTE) &&
              same(Mean::kGiven, ATTN8_MEAN_GIVEN));
static_assert(same(CausalAlign::kBottomRight, ATTN8_BOTTOM_RIGHT) &&
              same(CausalAlign::kTopLeft, ATTN8_TOP_LEFT));
static_assert(same(Fp8Format::kE4m3Tensor, ATTN8_FP8_E4M3_TENSOR) &&
              same(Fp8Format::kE5m2Raw, ATTN8_FP8_E5M2_RAW));

/// Without a destructor and without an allocation, so that it works in a thread that is ending and
/// when there is no memory. Longer texts are cut; those of this library are shorter.
thread_local std::array<char, 512> last_error = {};

}  // namespace

attn8_status c_api::finish(const Status& status) noexcept {
  std::string_view text = status.message();
  if (!status.ok() && text.empty()) text = to_string(status.code());
  text = text.substr(0, last_error.size() - 1);
  *std::copy(text.begin(), text.end(), last_error.begin()) = '\0';
  return static_cast<attn8_status>(status.code());
}

namespace {

attn8_context_params default_context_params() noexcept {
  attn8_context_params params = {};
  params.threads = 1;
  params.isa = ATTN8_ISA_BEST;
  return params;
}

attn8_attention_params default_attention_params() noexcept {
  attn8_attention_params params = {};
  params.window_left = -1;
  params.window_right = -1;
  params.smooth_k = 1;
  return params;
}

struct Problem {
  AttentionInputs inputs;
  AttentionOutputs outputs;
  AttentionOptions options;
  std::vector<Mode> head_modes;  ///< what options.head_modes views
};

Status read_inputs(const attn8_tensor* q, const attn8_tensor* k, const attn8_tensor* v,
                   AttentionInputs& inputs) {
  ATTN8_RETURN_IF_ERROR(read_operand("q", q, inputs.q));
  ATTN8_RETURN_IF_ERROR(read_operand("k", k, inputs.k));
  return read_operand("v", v, inputs.v);
}

Status read_problem(const attn8_tensor* q, const attn8_tensor* k, const attn8_tensor* v,
                    const attn8_tensor* out, const attn8_tensor* lse, Problem& problem) {
  ATTN8_RETURN_IF_ERROR(read_inputs(q, k, v, problem.inputs));
  ATTN8_RETURN_IF_ERROR(read_plain("out", out, problem.outputs.out));
  return read_optional("lse", lse, problem.outputs.lse);
}

/// The options, and the operands that params name, of a problem whose q, k and v are there.
Status read_params(const attn8_attention_params* in, Problem& problem) {
  if (in == nullptr) return {};
  attn8_attention_params params = default_attention_params();
  ATTN8_RETURN_IF_ERROR(read("params", in, kUnit, params));
  AttentionOptions& options = problem.options;
  options.mode = enumerator<Mode>(params.mode);
  if (params.has_softmax_scale != 0) options.softmax_scale = params.softmax_scale;
  options.mask = {params.causal != 0, enumerator<CausalAlign>(params.causal_align),
                  params.window_left, params.window_right};
  options.kv_block = params.kv_block;
  options.v_granularity = enumerator<Granularity>(params.v_granularity);
  options.smooth_k = params.smooth_k != 0;
  options.check_finite = params.check_finite != 0;
  options.fp8_format = enumerator<Fp8Format>(params.fp8_format);
  options.softcap = params.softcap;
  options.mask.q_offset = params.q_offset;
  options.mask.k_offset = params.k_offset;
  ATTN8_RETURN_IF_ERROR(read_head_modes(params.head_modes, params.head_modes_count,
                                        data_view(problem.inputs.k).shape[2], problem.head_modes));
  options.head_modes = problem.head_modes;
  return read_scores(params.scores, problem.inputs);
}

/// A dense tensor; `order` names its dimensions in memory from the innermost to the outermost.
Status dense(attn8_tensor* tensor, uint32_t struct_size, const void* data, int32_t dtype,
             const int64_t* shape, const std::array<int, 4>& order) {
  if (shape == nullptr) return invalid("shape got NULL");
  attn8_tensor value = {};
  value.dtype = dtype;
  value.data = const_cast<void*>(data);  // only outputs are written, and theirs came as void*
  int64_t stride = 1;
  for (const int dim : order) {
    const int64_t extent = shape[dim];
    if (extent < 0) return invalid("shape[", dim, "] got ", extent, ", wants >= 0");
    value.shape[dim] = extent;
    value.strides[dim] = stride;
    if (__builtin_mul_overflow(stride, extent, &stride)) {
      return invalid("shape[", dim, "] got ", extent, ", more elements than 64 bits count");
    }
  }
  return initialize("tensor", value, tensor, struct_size, offsetof(attn8_tensor, quantization));
}

}  // namespace
}  // namespace attn8

using namespace attn8;  // NOLINT: what follows is attn8.h's side of it

extern "C" {

const char* attn8_version(void) { return version().data(); }

const char* attn8_last_error(void) { return last_error.data(); }

const char* attn8_status_name(attn8_status status) {
  return to_string(static_cast<StatusCode>(status)).data();
}

size_t attn8_isa_count(void) { return isa_support().size(); }

attn8_status attn8_isa_at(size_t index, int32_t* isa, int32_t* available, const char** name,
                          const char** reason) {
  return call([&]() -> Status {
    if (index >= isa_support().size()) {
      return invalid("index got ", index, ", wants below ", isa_support().size());
    }
    const IsaSupport& support = isa_support()[index];
    if (isa != nullptr) *isa = static_cast<int32_t>(support.isa);
    if (available != nullptr) *available = support.available ? 1 : 0;
    if (name != nullptr) *name = to_string(support.isa).data();
    if (reason != nullptr) *reason = support.available ? "" : support.reason.data();
    return {};
  });
}

attn8_status attn8_tensor_bshd(attn8_tensor* tensor, uint32_t struct_size, const void* data,
                               int32_t dtype, const int64_t shape[4]) {
  return call([&] { return dense(tensor, struct_size, data, dtype, shape, {3, 2, 1, 0}); });
}

attn8_status attn8_tensor_bhsd(attn8_tensor* tensor, uint32_t struct_size, const void* data,
                               int32_t dtype, const int64_t shape[4]) {
  return call([&] { return dense(tensor, struct_size, data, dtype, shape, {3, 1, 2, 0}); });
}

attn8_status attn8_quantization_init(attn8_quantization* quantization, uint32_t struct_size) {
  return call([&] {
    return initialize("quantization", attn8_quantization{}, quantization, struct_size,
                      offsetof(attn8_quantization, mean));
  });
}

attn8_status attn8_context_params_init(attn8_context_params* params, uint32_t struct_size) {
  return call(
      [&] { return initialize("params", default_context_params(), params, struct_size, kUnit); });
}

attn8_status attn8_context_create(const attn8_context_params* in, attn8_context** context) {
  return call([&]() -> Status {
    if (context == nullptr) return invalid("context got NULL");
    *context = nullptr;
    attn8_context_params params = default_context_params();
    if (in != nullptr) ATTN8_RETURN_IF_ERROR(read("params", in, kUnit, params));
    ATTN8_RETURN_IF_ERROR(check_reserved("params", params.reserved));
    Context value = Context::cpu(params.threads);
    value.device = {enumerator<DeviceType>(params.device_type), params.device_index};
    value.force_isa = params.isa != ATTN8_ISA_BEST;
    value.isa = enumerator<Isa>(params.isa);
    value.parallel_for = params.parallel_for;
    value.pool = params.pool;
    value.stream = params.stream;
    // Whether there is such a CUDA device, a plan finds out.
    if (value.device.type != DeviceType::kCuda) ATTN8_RETURN_IF_ERROR(validate_context(value));
    *context = new attn8_context{value};
    return {};
  });
}

void attn8_context_destroy(attn8_context* context) { delete context; }

attn8_status attn8_scale_shape(const int64_t x_shape[4], int32_t granularity, int32_t block,
                               int64_t shape[4]) {
  return call([&]() -> Status {
    if (x_shape == nullptr) return invalid("x_shape got NULL");
    if (shape == nullptr) return invalid("shape got NULL");
    const QuantSpec spec = {enumerator<Granularity>(granularity), block};
    const Extents x = {x_shape[0], x_shape[1], x_shape[2], x_shape[3]};
    ATTN8_RETURN_IF_ERROR(validate_scale_shape(x, spec));
    const Extents result = scale_shape(x, spec);
    std::copy(result.begin(), result.end(), shape);
    return {};
  });
}

attn8_status attn8_quantize_params_init(attn8_quantize_params* params, uint32_t struct_size) {
  return call(
      [&] { return initialize("params", attn8_quantize_params{}, params, struct_size, kUnit); });
}

attn8_status attn8_quantize(const attn8_tensor* x, const attn8_tensor* codes,
                            const attn8_tensor* scale, const attn8_tensor* mean,
                            const attn8_quantize_params* in, const attn8_context* context) {
  return call([&]() -> Status {
    TensorView x_view, codes_view, scale_view;
    std::optional<TensorView> mean_view;
    attn8_quantize_params params = {};
    ATTN8_RETURN_IF_ERROR(read_plain("x", x, x_view));
    ATTN8_RETURN_IF_ERROR(read_plain("codes", codes, codes_view));
    ATTN8_RETURN_IF_ERROR(read_plain("scale", scale, scale_view));
    ATTN8_RETURN_IF_ERROR(read_optional("mean", mean, mean_view));
    if (in != nullptr) ATTN8_RETURN_IF_ERROR(read("params", in, kUnit, params));
    const QuantSpec spec = {enumerator<Granularity>(params.granularity), params.block};
    return quantize(x_view, spec, codes_view, scale_view, context_of(context),
                    enumerator<Mean>(params.mean_use), mean_view);
  });
}

attn8_status attn8_dequantize(const attn8_tensor* x, const attn8_tensor* out,
                              const attn8_context* context) {
  return call([&]() -> Status {
    Operand operand;
    TensorView out_view;
    ATTN8_RETURN_IF_ERROR(read_operand("x", x, operand));
    ATTN8_RETURN_IF_ERROR(read_plain("out", out, out_view));
    const auto* quantized = std::get_if<QuantizedView>(&operand);
    if (quantized == nullptr) return invalid("x.quantization got NULL");
    return dequantize(*quantized, out_view, context_of(context));
  });
}

attn8_status attn8_score_operands_init(attn8_score_operands* scores, uint32_t struct_size) {
  return call(
      [&] { return initialize("scores", attn8_score_operands{}, scores, struct_size, kUnit); });
}

attn8_status attn8_attention_params_init(attn8_attention_params* params, uint32_t struct_size) {
  return call(
      [&] { return initialize("params", default_attention_params(), params, struct_size, kUnit); });
}

attn8_status attn8_attention(const attn8_tensor* q, const attn8_tensor* k, const attn8_tensor* v,
                             const attn8_tensor* out, const attn8_tensor* lse,
                             const attn8_attention_params* params, const attn8_context* context) {
  return call([&]() -> Status {
    Problem problem;
    ATTN8_RETURN_IF_ERROR(read_problem(q, k, v, out, lse, problem));
    ATTN8_RETURN_IF_ERROR(read_params(params, problem));
    return attention(problem.inputs, problem.outputs, problem.options, context_of(context));
  });
}

attn8_status attn8_plan_create(const attn8_tensor* q, const attn8_tensor* k, const attn8_tensor* v,
                               const attn8_tensor* out, const attn8_tensor* lse,
                               const attn8_attention_params* params, const attn8_context* context,
                               attn8_plan** plan) {
  return call([&]() -> Status {
    if (plan == nullptr) return invalid("plan got NULL");
    *plan = nullptr;
    Problem problem;
    ATTN8_RETURN_IF_ERROR(read_problem(q, k, v, out, lse, problem));
    ATTN8_RETURN_IF_ERROR(read_params(params, problem));
    Result<AttentionPlan> made =
        AttentionPlan::make(problem.inputs, problem.outputs, problem.options, context_of(context));
    if (!made.ok()) return made.status();
    *plan = new attn8_plan{std::move(made).value()};
    return {};
  });
}

void attn8_plan_destroy(attn8_plan* plan) { delete plan; }

size_t attn8_plan_workspace_bytes(const attn8_plan* plan) {
  return plan != nullptr ? plan->value.workspace_bytes() : 0;
}

const char* attn8_plan_kernel(const attn8_plan* plan) {
  return plan != nullptr ? plan->value.kernel().data() : "";
}

int32_t attn8_plan_isa(const attn8_plan* plan) {
  return plan != nullptr ? static_cast<int32_t>(plan->value.isa()) : -1;
}

int32_t attn8_plan_kv_block(const attn8_plan* plan) {
  return plan != nullptr ? plan->value.kv_block() : -1;
}

int32_t attn8_plan_v_granularity(const attn8_plan* plan) {
  return plan != nullptr ? static_cast<int32_t>(plan->value.v_granularity()) : -1;
}

attn8_status attn8_plan_run(const attn8_plan* plan, const attn8_tensor* q, const attn8_tensor* k,
                            const attn8_tensor* v, const attn8_tensor* out, const attn8_tensor* lse,
                            void* workspace, size_t workspace_bytes, attn8_run_times* times) {
  return attn8_plan_run_with_scores(plan, q, k, v, nullptr, out, lse, workspace, workspace_bytes,
                                    times);
}

attn8_status attn8_plan_run_with_scores(const attn8_plan* plan, const attn8_tensor* q,
                                        const attn8_tensor* k, const attn8_tensor* v,
                                        const attn8_score_operands* scores, const attn8_tensor* out,
                                        const attn8_tensor* lse, void* workspace,
                                        size_t workspace_bytes, attn8_run_times* times) {
  return call([&]() -> Status {
    if (plan == nullptr) return invalid("plan got NULL");
    if (times != nullptr) ATTN8_RETURN_IF_ERROR(check_size("times", times->struct_size, kUnit));
    Problem problem;
    ATTN8_RETURN_IF_ERROR(read_problem(q, k, v, out, lse, problem));
    ATTN8_RETURN_IF_ERROR(read_scores(scores, problem.inputs));
    const size_t bytes = workspace != nullptr ? workspace_bytes : 0;
    RunTimes spent;
    ATTN8_RETURN_IF_ERROR(plan->value.run(problem.inputs, problem.outputs,
                                          {static_cast<std::byte*>(workspace), bytes}, &spent));
    if (times != nullptr) {
      attn8_run_times result = {};
      result.quantize_ms = spent.quantize_ms;
      result.attention_ms = spent.attention_ms;
      write(result, times);
    }
    return {};
  });
}

attn8_status attn8_merge_states(const attn8_tensor* const* outs, const attn8_tensor* const* lses,
                                size_t count, const attn8_tensor* out, const attn8_tensor* lse,
                                const attn8_context* context) {
  return call([&]() -> Status {
    if (count > 0 && outs == nullptr) return invalid("outs got NULL");
    if (count > 0 && lses == nullptr) return invalid("lses got NULL");
    std::vector<AttentionState> states;
    for (size_t i = 0; i < count; ++i) {
      const std::string at = "[" + std::to_string(i) + "]";
      TensorView part_out, part_lse;
      ATTN8_RETURN_IF_ERROR(read_plain("outs" + at, outs[i], part_out));
      ATTN8_RETURN_IF_ERROR(read_plain("lses" + at, lses[i], part_lse));
      states.push_back({part_out, part_lse});
    }
    AttentionOutputs merged;
    ATTN8_RETURN_IF_ERROR(read_plain("out", out, merged.out));
    ATTN8_RETURN_IF_ERROR(read_optional("lse", lse, merged.lse));
    return merge_states(states, merged, context_of(context));
  });
}

attn8_status attn8_reference_attention(const attn8_tensor* q, const attn8_tensor* k,
                                       const attn8_tensor* v, const attn8_attention_params* params,
                                       double* out, size_t out_count, double* lse,
                                       size_t lse_count) {
  return call([&]() -> Status {
    TensorView q_view, k_view, v_view;
    Problem problem;
    AttentionInputs& inputs = problem.inputs;
    ATTN8_RETURN_IF_ERROR(read_plain("q", q, q_view));
    ATTN8_RETURN_IF_ERROR(read_plain("k", k, k_view));
    ATTN8_RETURN_IF_ERROR(read_plain("v", v, v_view));
    inputs.q = q_view;
    inputs.k = k_view;
    inputs.v = v_view;
    ATTN8_RETURN_IF_ERROR(read_params(params, problem));
    const AttentionOptions& options = problem.options;
    // The oracle trusts shapes more than attention() does; the mode matters to quantized operands
    // only.
    TensorView as_out = q_view;
    as_out.data = out;
    as_out.dtype = DType::kFloat32;
    as_out.shape[3] = v_view.shape[3];
    as_out.strides = {1, 1, 1, 1};
    ATTN8_RETURN_IF_ERROR(validate_attention(inputs, {as_out}, options, {}));
    ATTN8_RETURN_IF_ERROR(validate_score_values(inputs));
    if (lse == nullptr && lse_count != 0) return invalid("lse got NULL, lse_count ", lse_count);
    const Extents& shape = as_out.shape;
    const auto rows = static_cast<size_t>(shape[0] * shape[1] * shape[2]);
    const size_t elements = rows * static_cast<size_t>(shape[3]);
    if (out_count != elements) {
      return invalid("out_count got ", out_count, ", wants ", elements);
    }
    if (lse != nullptr && lse_count != rows) {
      return invalid("lse_count got ", lse_count, ", wants ", rows);
    }
    if (elements == 0) return {};
    return reference::exact_attention(inputs, options, {out, out_count}, {lse, lse_count});
  });
}

attn8_status attn8_compare(const double* out, const double* reference, size_t count,
                           attn8_error_report* report) {
  return call([&]() -> Status {
    if (report == nullptr) return invalid("report got NULL");
    ATTN8_RETURN_IF_ERROR(check_size("report", report->struct_size, kUnit));
    if (count > 0 && out == nullptr) return invalid("out got NULL");
    if (count > 0 && reference == nullptr) return invalid("reference got NULL");
    const reference::ErrorReport error = reference::error_report({out, count}, {reference, count});
    attn8_error_report result = {};
    result.rel_l2 = error.rel_l2;
    result.mean_rel = error.mean_rel;
    result.max_abs = error.max_abs;
    result.cosine = error.cosine;
    result.mre = error.mre;
    write(result, report);
    return {};
  });
}

}  // extern "C"
