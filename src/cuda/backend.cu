// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "backend.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "plan.hpp"

namespace attn8::cuda {

namespace {

/// For what an allocation of the host's throws.
Status out_of_memory() noexcept { return {StatusCode::kOutOfMemory, {}}; }

Status unsupported(std::string message) { return {StatusCode::kUnsupported, std::move(message)}; }

const ConstTensorView& view_of(const Operand& operand) {
  const auto* quantized = std::get_if<QuantizedView>(&operand);
  return quantized != nullptr ? quantized->codes : *std::get_if<ConstTensorView>(&operand);
}

std::string shape_text(const Extents& e) {
  return "[" + std::to_string(e[0]) + ", " + std::to_string(e[1]) + ", " + std::to_string(e[2]) +
         ", " + std::to_string(e[3]) + "]";
}

Status check_input(const Operand& operand, const char* name, const Extents& shape, DType dtype,
                   int device) {
  const ConstTensorView& view = view_of(operand);
  if (view.shape != shape || view.dtype != dtype) {
    return {StatusCode::kInvalidArgument,
            std::string(name) + " is " + std::string(to_string(view.dtype)) +
                shape_text(view.shape) + ", want what the plan was made for: " +
                std::string(to_string(dtype)) + shape_text(shape)};
  }
  if (shape[0] * shape[1] * shape[2] * shape[3] == 0) return {};
  return check_memory(view.data, name, device);
}

/// The tensors beside q, k and v: those that the plan was made with, in device memory.
Status check_others(const AttentionInputs& inputs, const Plan::State& s) {
  if (InputsPresent::of(inputs) != s.inputs) {
    return {StatusCode::kInvalidArgument,
            "inputs do not have the optional tensors that the plan was made with"};
  }
  if (s.inputs.attn_mask && (inputs.attn_mask->dtype != s.mask_type ||
                             (s.converts_mask() && inputs.attn_mask->shape != s.mask_shape))) {
    return {StatusCode::kInvalidArgument,
            "attn_mask is " + std::string(to_string(inputs.attn_mask->dtype)) +
                shape_text(inputs.attn_mask->shape) + ", want what the plan was made for: " +
                std::string(to_string(s.mask_type)) + shape_text(s.mask_shape)};
  }
  const std::pair<const std::optional<ConstTensorView>&, const char*> views[] = {
      {inputs.attn_mask, "attn_mask"},
      {inputs.alibi_slopes, "alibi_slopes"},
      {inputs.sinks, "sinks"},
      {inputs.seqlens_k, "seqlens_k"},
      {inputs.leftpad_k, "leftpad_k"}};
  for (const auto& [view, name] : views) {
    if (!view.has_value() || view->data == nullptr) continue;
    if (Status status = check_memory(view->data, name, s.device); !status.ok()) return status;
  }
  return {};
}

/// Stride of an axis that one element may stand for.
int64_t broadcast_stride(const ConstTensorView& view, size_t axis) {
  return view.shape[axis] == 1 ? 0 : view.strides[axis];
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

ScoreChanges changes_of(const Plan::State& s, const AttentionInputs& inputs, char* workspace) {
  const double log2e = 1.4426950408889634;
  ScoreChanges changes{};
  if (s.softcap != 0) {
    changes.softcap = static_cast<float>(s.softcap * log2e);
    changes.softcap_rate = static_cast<float>(2 / static_cast<double>(s.softcap));
  }
  changes.position_offset = s.position_offset;
  if (inputs.alibi_slopes.has_value()) {
    const ConstTensorView& slopes = *inputs.alibi_slopes;
    changes.alibi_slopes = static_cast<const float*>(slopes.data);
    changes.alibi_stride_batch = broadcast_stride(slopes, 0);
    changes.alibi_stride_head = slopes.strides[2];
  }
  if (inputs.attn_mask.has_value()) {
    ConstTensorView mask = *inputs.attn_mask;
    if (s.converts_mask()) {
      mask = bshd(static_cast<const void*>(workspace + s.workspace.attn_mask), DType::kFloat32,
                  s.mask_shape, mask.device);
    }
    changes.attn_mask = static_cast<const float*>(mask.data);
    changes.attn_mask_stride_batch = broadcast_stride(mask, 0);
    changes.attn_mask_stride_row = broadcast_stride(mask, 1);
    changes.attn_mask_stride_head = broadcast_stride(mask, 2);
    changes.attn_mask_stride_key = broadcast_stride(mask, 3);
  }
  return changes;
}

Workspace lay_out(const Plan::State& s) {
  const auto q_heads = static_cast<size_t>(s.batch()) * s.kernel_heads();
  const auto kv_heads = static_cast<size_t>(s.batch()) * s.nheads_k();
  const size_t row_bytes = s.row_bytes();
  const size_t packed_dim = s.packed_dim();
  const size_t chunks = (s.last_key - s.first_key + 255) / 256;
  Workspace w{};
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    const size_t offset = at;
    at += aligned(bytes);
    return offset;
  };
  w.q = take(q_heads * s.rows_q * row_bytes);
  w.k = take(kv_heads * s.rows_k * row_bytes);
  w.v = take(kv_heads * s.rows_k * packed_dim * s.value_bytes());
  w.q_scale = take(q_heads * s.rows_q * 4);
  w.key_constants = take(kv_heads * s.rows_k * 2 * 4);
  w.v_scale = take(kv_heads * packed_dim * 4);
  w.lse_shift = take(q_heads * s.rows_q * 4);
  w.k_mean = take(kv_heads * row_bytes * 4);
  w.token_scale = take(kv_heads * s.rows_k * 4);
  w.panel_scale = take(kv_heads * (s.rows_k / kPanelKeys) * 4);
  w.partial = take(kv_heads * chunks * row_bytes * 8);  // doubles
  if (s.converts_mask()) {
    w.attn_mask = take(
        static_cast<size_t>(s.mask_shape[0] * s.mask_shape[1] * s.mask_shape[2] * s.mask_shape[3]) *
        4);
  }
  if (s.division.splits > 1) {
    const size_t rows = static_cast<size_t>(s.batch()) * s.seqlen_q() * s.nheads_q();
    w.split_out = take(s.division.splits * rows * split_row_floats(s.head_dim_v()) * 4);
    w.split_lse = take(s.division.splits * rows * 4);
  }
  w.bytes = at;
  return w;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) noexcept {
  error_ = cudaGetDevice(&previous_);
  if (error_ == cudaSuccess && previous_ != device) {
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
}
DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(previous_);
}

Status device_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  StatusCode code = StatusCode::kDeviceError;
  if (error == cudaErrorMemoryAllocation) code = StatusCode::kOutOfMemory;
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice ||
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDevice) {
    code = StatusCode::kUnavailable;
  }
  return {code, std::string(what) + ": " + cudaGetErrorString(error)};
}

std::vector<std::string> kernel_images() {
  std::vector<std::string> names;
  for (const AttendEntry& entry : attend_entries()) names.emplace_back(entry.name);
  return names;
}

Result<int> device_count() noexcept try {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return Status(StatusCode::kUnavailable,
                  std::string("no CUDA device can be used: ") + cudaGetErrorString(error));
  }
  return count;
} catch (...) {
  return out_of_memory();
}

Result<DeviceInfo> device_info(int device) noexcept try {
  const Result<int> count = device_count();
  if (!count.ok()) return count.status();
  if (device < 0 || device >= count.value()) {
    return Status(StatusCode::kUnavailable, "device=" + std::to_string(device) + ", there are " +
                                                std::to_string(count.value()) + " CUDA devices");
  }
  const Result<Kernels> kernels = kernels_of(device);
  if (!kernels.ok()) return kernels.status();
  cudaDeviceProp properties{};
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return device_status(error, "cudaGetDeviceProperties");
  return DeviceInfo{properties.name, properties.major, properties.minor,
                    properties.multiProcessorCount,
                    kernels.value() == Kernels::kSm90 ? "sm90a" : "sm80"};
} catch (...) {
  return out_of_memory();
}

Result<Plan> Plan::make(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                        const AttentionOptions& options, int device, Kernels kernels) noexcept try {
  const ConstTensorView& q = view_of(inputs.q);
  const ConstTensorView& k = view_of(inputs.k);
  const ConstTensorView& v = view_of(inputs.v);
  auto state = std::make_shared<State>();
  State& s = *state;
  s.device = device;
  const Result<DeviceInfo> info = device_info(s.device);
  if (!info.ok()) return info.status();

  s.q_shape = q.shape;
  s.k_shape = k.shape;
  s.q_type = q.dtype;
  s.k_type = k.dtype;
  s.v_type = v.dtype;
  s.out_type = outputs.out.dtype;
  s.has_lse = outputs.lse.has_value();
  s.v_shape = v.shape;
  s.out_shape = {q.shape[0], q.shape[1], q.shape[2], v.shape[3]};
  s.inputs = InputsPresent::of(inputs);
  s.softcap = options.softcap;
  if (s.inputs.attn_mask) {
    s.mask_shape = inputs.attn_mask->shape;
    s.mask_type = inputs.attn_mask->dtype;
  }
  if (Extents{v.shape[0], v.shape[1], v.shape[2], k.shape[3]} != k.shape ||
      k.shape[0] != q.shape[0] || k.shape[3] != q.shape[3] || outputs.out.shape != s.out_shape) {
    return Status(StatusCode::kInvalidArgument,
                  "q " + shape_text(q.shape) + ", k " + shape_text(k.shape) + ", v " +
                      shape_text(v.shape) + " and out " + shape_text(outputs.out.shape) +
                      " do not fit together");
  }
  if (k.shape[2] <= 0 || q.shape[2] % k.shape[2] != 0) {
    return Status(StatusCode::kInvalidArgument,
                  "k.shape[2]=" + std::to_string(k.shape[2]) +
                      " must divide q.shape[2]=" + std::to_string(q.shape[2]));
  }
  for (const ConstTensorView* view : {&q, &v}) {
    if (view->shape[3] >= 1 && view->shape[3] <= 256) continue;
    return unsupported(std::string(view == &q ? "q" : "v") +
                       ".shape[3]=" + std::to_string(view->shape[3]) +
                       ", the CUDA kernels want a head_dim of 1 to 256");
  }
  if (q.shape[1] > kNoLimit / 4 || k.shape[1] > kNoLimit / 4 || q.shape[0] * q.shape[2] > 65535) {
    return unsupported(
        "q " + shape_text(q.shape) +
        ", the CUDA kernels want sequences up to 2^28 and batch * heads up to 65535");
  }
  if (!is_float(outputs.out.dtype)) {
    return Status(StatusCode::kInvalidArgument,
                  "out.dtype=" + std::string(to_string(outputs.out.dtype)) +
                      ", want float32, float16 or bfloat16");
  }

  const auto* v_quantized = std::get_if<QuantizedView>(&inputs.v);
  s.v_granularity = options.mode == Mode::kPaper ? Granularity::kTensor
                    : v_quantized != nullptr     ? v_quantized->spec.granularity
                                                 : options.v_granularity;
  Weights weights = Weights::kFolded;
  if (options.mode == Mode::kPaper) {
    weights = Weights::kPaper;
  } else if (options.mode == Mode::kHalf) {
    weights = Weights::kHalf;
  } else if (options.mode != Mode::kAccurate) {
    return unsupported("mode=" + std::string(to_string(options.mode)) +
                       ", the CUDA backend has accurate, half and paper");
  } else if (s.v_granularity == Granularity::kTensor || s.v_granularity == Granularity::kChannel) {
    weights = Weights::kPlain;
  } else if (s.v_granularity != Granularity::kToken) {
    return unsupported("v_granularity=" + std::string(to_string(s.v_granularity)) +
                       ", the CUDA backend has token, tensor and channel");
  }
  // Kernels for softcap alone there are of the usual weights; the others' do all that changes
  // scores.
  const bool all_changes = s.inputs.attn_mask || s.inputs.alibi_slopes ||
                           weights == Weights::kPlain || weights == Weights::kPaper;
  const bool changed = options.softcap != 0 || s.inputs.attn_mask || s.inputs.alibi_slopes;
  const Scores scores = !changed      ? Scores::kPlain
                        : all_changes ? Scores::kBiased
                                      : Scores::kSoftcap;
  const auto* k_quantized = std::get_if<QuantizedView>(&inputs.k);

  const bool own_lengths = s.inputs.seqlens_k || s.inputs.leftpad_k;
  s.bottom_right = s.inputs.seqlens_k && options.mask.align == CausalAlign::kBottomRight;
  const int64_t shift =
      options.mask.q_offset - options.mask.k_offset +
      (options.mask.align == CausalAlign::kBottomRight && !s.bottom_right ? k.shape[1] - q.shape[1]
                                                                          : 0);
  if (s.inputs.alibi_slopes && std::abs(shift) > kNoLimit / 4) {
    return unsupported("mask.q_offset - mask.k_offset=" +
                       std::to_string(options.mask.q_offset - options.mask.k_offset) +
                       ", with alibi_slopes on CUDA at most 2^28 apart");
  }
  s.position_offset = s.inputs.alibi_slopes ? static_cast<int>(shift) : 0;
  const MaskOffsets offsets = mask_offsets(options.mask, shift);
  s.first_offset = offsets.first;
  s.last_offset = offsets.last;
  const int64_t seqlen_k = k.shape[1];
  s.first_key = static_cast<int>(std::clamp<int64_t>(s.first_offset, 0, seqlen_k));
  s.last_key =
      static_cast<int>(std::clamp<int64_t>(q.shape[1] + s.last_offset, s.first_key, seqlen_k));
  if (own_lengths) {
    s.first_key = 0;
    s.last_key = q.shape[1] > 0 ? static_cast<int>(seqlen_k) : 0;
  }
  s.rows_k = static_cast<int>(round_up(seqlen_k, kSequencePad));
  s.has_mean = k_quantized != nullptr
                   ? k_quantized->mean.has_value()
                   : options.smooth_k && options.mode != Mode::kPaper && s.last_key > s.first_key;
  s.softmax_scale = options.softmax_scale.value_or(
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.shape[3]))));

  int64_t rows = kManyRows;
  if (kernels == Kernels::kBest) {
    kernels = info.value().family == "sm90a" ? Kernels::kSm90 : Kernels::kSm80;
    rows = q.shape[1] * (q.shape[2] / k.shape[2]);
  }
  const int widest = std::max(s.head_dim(), s.head_dim_v());
  s.entry = find_entry(kernels, weights, scores, widest, rows);
  if (s.entry != nullptr && options.kv_block != 0 && options.kv_block != s.entry->kv_block) {
    s.entry = find_entry(kernels, weights, scores, widest, kManyRows);
  }
  if (s.entry == nullptr && changed) {
    return unsupported(
        "softcap, attn_mask and alibi_slopes with mode=" + std::string(to_string(options.mode)) +
        ", v_granularity=" + std::string(to_string(s.v_granularity)) +
        " and head_dim=" + std::to_string(std::max(s.head_dim(), s.head_dim_v())) +
        ", on CUDA such modes want at most 128");
  }
  if (s.entry == nullptr) {
    return Status(StatusCode::kUnavailable,
                  "this build has no CUDA kernel for head_dim=" + std::to_string(q.shape[3]) +
                      " on " + info.value().name);
  }
  if (options.kv_block != 0 && options.kv_block != s.entry->kv_block) {
    return unsupported("kv_block=" + std::to_string(options.kv_block) + ", " + s.entry->name +
                       " has " + std::to_string(s.entry->kv_block));
  }
  s.division = divide(*s.entry, s.batch(), s.nheads_q(), s.nheads_k(), s.seqlen_q(), s.seqlen_k(),
                      info.value().multiprocessors);
  s.rows_q = static_cast<int>(round_up(s.seqlen_q() * s.division.group, kSequencePad));
  s.workspace = lay_out(s);

  if (Status status = make_ready(*s.entry, s.device, info.value().name); !status.ok())
    return status;
  return Plan(std::move(state));
} catch (...) {
  return out_of_memory();
}

size_t Plan::workspace_bytes() const noexcept { return state_->workspace.bytes; }
std::string_view Plan::kernel() const noexcept { return state_->entry->name; }
int32_t Plan::kv_block() const noexcept { return state_->entry->kv_block; }

Status Plan::pack(const AttentionInputs& inputs, void* workspace, void* stream) const noexcept try {
  const State& s = *state_;
  const DeviceGuard guard(s.device);
  if (guard.error() != cudaSuccess) return device_status(guard.error(), "cudaSetDevice");
  const Status checks[] = {check_input(inputs.q, "q", s.q_shape, s.q_type, s.device),
                           check_input(inputs.k, "k", s.k_shape, s.k_type, s.device),
                           check_input(inputs.v, "v", s.v_shape, s.v_type, s.device),
                           check_others(inputs, s)};
  for (const Status& check : checks) {
    if (!check.ok()) return check;
  }
  return enqueue_pack(s, inputs, static_cast<char*>(workspace), static_cast<cudaStream_t>(stream));
} catch (...) {
  return out_of_memory();
}

Status Plan::attend(const AttentionInputs& inputs, const AttentionOutputs& outputs, void* workspace,
                    void* stream) const noexcept try {
  const State& s = *state_;
  if (s.q_shape[0] * s.q_shape[1] * s.q_shape[2] == 0) return {};
  const DeviceGuard guard(s.device);
  if (guard.error() != cudaSuccess) return device_status(guard.error(), "cudaSetDevice");
  const ConstTensorView out(outputs.out);
  if (out.shape != s.out_shape || out.dtype != s.out_type || outputs.lse.has_value() != s.has_lse) {
    return {StatusCode::kInvalidArgument, "outputs differ from those the plan was made for"};
  }
  const Status checks[] = {check_others(inputs, s), check_memory(out.data, "out", s.device),
                           s.has_lse ? check_memory(outputs.lse->data, "lse", s.device) : Status()};
  for (const Status& check : checks) {
    if (!check.ok()) return check;
  }

  char* base = static_cast<char*>(workspace);
  const auto floats_at = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
  AttendParams p{};
  p.q = reinterpret_cast<int8_t*>(base + s.workspace.q);
  p.k = reinterpret_cast<int8_t*>(base + s.workspace.k);
  p.v = reinterpret_cast<int8_t*>(base + s.workspace.v);
  p.q_scale = floats_at(s.workspace.q_scale);
  p.key_constants = floats_at(s.workspace.key_constants);
  p.v_scale = s.entry->weights == Weights::kHalf ? nullptr : floats_at(s.workspace.v_scale);
  const float* shift = s.needs_shift() ? floats_at(s.workspace.lse_shift) : nullptr;
  // With softcap it is part of the scores, and so of their LSE.
  p.lse_shift = s.softcap == 0 ? shift : nullptr;
  p.changes = changes_of(s, inputs, base);
  p.changes.score_shift = s.softcap == 0 ? nullptr : shift;
  if (s.inputs.sinks) {
    p.sinks = static_cast<const float*>(inputs.sinks->data);
    p.sinks_stride = inputs.sinks->strides[2];
  }
  if (s.inputs.seqlens_k) {
    p.seqlens_k = static_cast<const int*>(inputs.seqlens_k->data);
    p.seqlens_k_stride = inputs.seqlens_k->strides[0];
  }
  if (s.inputs.leftpad_k) {
    p.leftpad_k = static_cast<const int*>(inputs.leftpad_k->data);
    p.leftpad_k_stride = inputs.leftpad_k->strides[0];
  }
  set_out(p, out);
  if (s.has_lse) {
    p.lse = static_cast<float*>(outputs.lse->data);
    p.lse_stride_batch = outputs.lse->strides[0];
    p.lse_stride_row = outputs.lse->strides[1];
    p.lse_stride_head = outputs.lse->strides[2];
  }
  p.nheads_q = s.nheads_q();
  p.nheads_k = s.nheads_k();
  p.rows_q = s.rows_q;
  p.rows_k = s.rows_k;
  p.seqlen_q = s.seqlen_q();
  p.seqlen_k = s.seqlen_k();
  p.first_offset = s.first_offset;
  p.last_offset = s.last_offset;
  p.bottom_right = s.bottom_right;
  p.score_scale = score_scale_of(s.softmax_scale);
  return enqueue_attend(*s.entry, p, s.division, s.batch(), s.batch(),
                        floats_at(s.workspace.split_out), floats_at(s.workspace.split_lse),
                        static_cast<cudaStream_t>(stream));
} catch (...) {
  return out_of_memory();
}

Status Plan::run(const AttentionInputs& inputs, const AttentionOutputs& outputs, void* workspace,
                 void* stream) const noexcept {
  const Status status = pack(inputs, workspace, stream);
  return status.ok() ? attend(inputs, outputs, workspace, stream) : status;
}

}  // namespace attn8::cuda
