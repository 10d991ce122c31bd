// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <tuple>

#include "plan.hpp"

/// Which kernel computes a call, how it is divided over the grid, and its launch.
namespace attn8::cuda {

#define ATTN8_CUDA_INSTANCE(name) AttendEntry name();
#include "instances.inc"
#undef ATTN8_CUDA_INSTANCE

std::span<const AttendEntry> attend_entries() {
  static const AttendEntry table[] = {
#define ATTN8_CUDA_INSTANCE(name) name(),
#include "instances.inc"
#undef ATTN8_CUDA_INSTANCE
  };
  return table;
}

const AttendEntry* find_entry(Kernels kernels, Weights weights, Scores scores, int head_dim,
                              int64_t rows) {
  const AttendEntry* best = nullptr;
  const auto worse = [&](const AttendEntry& entry) {
    const bool asked = kernels == Kernels::kSm90;
    return std::tuple(entry.family != Family::kDecode, asked && entry.family != Family::kSm90,
                      entry.head_dim);
  };
  for (const AttendEntry& entry : attend_entries()) {
    if (entry.weights != weights || entry.scores != scores || entry.head_dim < head_dim) continue;
    if (kernels != Kernels::kSm90 && entry.family == Family::kSm90) continue;
    if (entry.family == Family::kDecode && rows > entry.rows) continue;
    if (best == nullptr || worse(entry) < worse(*best)) best = &entry;
  }
  return best;
}

Result<Kernels> kernels_of(int device) {
  int major = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return device_status(error, "cudaDeviceGetAttribute");
  if (major < 8) {
    return Status(StatusCode::kUnavailable, "device " + std::to_string(device) +
                                                " has compute capability " + std::to_string(major) +
                                                ".x, the CUDA kernels want 8.0 or later");
  }
  const bool has_sm90 = std::any_of(attend_entries().begin(), attend_entries().end(),
                                    [](const AttendEntry& e) { return e.family == Family::kSm90; });
  return major == 9 && has_sm90 ? Kernels::kSm90 : Kernels::kSm80;
}

Status check_memory(const void* data, const char* name, int device) {
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, data);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return device_status(error, name);
  }
  if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
    return {StatusCode::kInvalidArgument, std::string(name) +
                                              ".data is host memory, want memory of CUDA device " +
                                              std::to_string(device)};
  }
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != device) {
    return {StatusCode::kInvalidArgument, std::string(name) + ".data is on CUDA device " +
                                              std::to_string(attributes.device) + ", want " +
                                              std::to_string(device)};
  }
  return {};
}

Status make_ready(const AttendEntry& entry, int device, const std::string& device_name) {
  int shared_limit = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return device_status(error, "cudaDeviceGetAttribute");
  if (entry.shared_bytes > static_cast<size_t>(shared_limit)) {
    return {StatusCode::kUnsupported, std::string(entry.name) + " wants " +
                                          std::to_string(entry.shared_bytes) +
                                          " bytes of shared memory, " + device_name + " has " +
                                          std::to_string(shared_limit) + " per block"};
  }
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return device_status(guard.error(), "cudaSetDevice");
  error = cudaFuncSetAttribute(entry.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(entry.shared_bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();
    return device_status(error, entry.name);
  }
  return {};
}

MaskOffsets mask_offsets(const Mask& mask, int64_t shift) {
  const auto clamped = [](int64_t offset) {
    return static_cast<int>(std::clamp<int64_t>(offset, -kNoLimit, kNoLimit));
  };
  // Beyond any position, and safe to add to one.
  const auto window = [](int64_t keys) { return std::min<int64_t>(keys, int64_t{1} << 50); };
  int64_t right = mask.window_right;
  if (mask.causal) right = 0;
  return {mask.window_left < 0 ? -kNoLimit : clamped(shift - window(mask.window_left)),
          right < 0 ? kNoLimit : clamped(shift + window(right))};
}

float score_scale_of(float softmax_scale) {
  return static_cast<float>(static_cast<double>(softmax_scale) * 1.4426950408889634);
}

Element element_of(DType dtype) {
  return dtype == DType::kFloat32   ? Element::kFloat32
         : dtype == DType::kFloat16 ? Element::kFloat16
                                    : Element::kBFloat16;
}

void set_out(AttendParams& p, const ConstTensorView& out) {
  p.out = const_cast<void*>(out.data);
  p.out_stride_batch = out.strides[0];
  p.out_stride_row = out.strides[1];
  p.out_stride_head = out.strides[2];
  p.out_stride_channel = out.strides[3];
  p.out_type = element_of(out.dtype);
  p.head_dim = static_cast<int>(out.shape[3]);
  p.out_pairs = out.strides[3] == 1 &&
                reinterpret_cast<uintptr_t>(out.data) % (2 * dtype_bytes(out.dtype)) == 0;
  p.out_eights = p.out_pairs && dtype_bytes(out.dtype) == 2 && p.head_dim % 8 == 0 &&
                 reinterpret_cast<uintptr_t>(out.data) % 16 == 0;
  for (size_t axis = 0; axis < 3; ++axis) {
    p.out_pairs = p.out_pairs && (out.shape[axis] == 1 || out.strides[axis] % 2 == 0);
    p.out_eights = p.out_eights && (out.shape[axis] == 1 || out.strides[axis] % 8 == 0);
  }
}

Division divide(const AttendEntry& entry, int batch, int nheads_q, int nheads_k, int seqlen_q,
                int64_t seqlen_k, int multiprocessors) {
  Division d;
  const int group = nheads_k > 0 ? nheads_q / nheads_k : 1;
  if (static_cast<int64_t>(seqlen_q) * group <= entry.rows) d.group = group;
  // The codes of `paper` do not say how much a part counts.
  if (entry.weights == Weights::kPaper) return d;
  const int64_t tiles = (static_cast<int64_t>(seqlen_q) * d.group + entry.rows - 1) / entry.rows;
  const int64_t blocks = tiles * batch * (nheads_q / d.group);
  if (blocks == 0) return d;
  const int64_t steps = (seqlen_k + entry.step_keys - 1) / entry.step_keys;
  const int64_t room =
      std::min<int64_t>(static_cast<int64_t>(multiprocessors) * entry.resident / blocks, steps);
  if (room < 2) return d;
  const int64_t split_steps = (steps + room - 1) / room;
  d.split_keys = static_cast<int>(split_steps * entry.step_keys);
  d.splits = static_cast<int>((steps + split_steps - 1) / split_steps);
  return d;
}

Status enqueue_attend(const AttendEntry& entry, const AttendParams& p, const Division& division,
                      int batch, int out_batch, float* split_out, float* split_lse,
                      cudaStream_t stream) {
  AttendParams kernel = p;
  kernel.group = division.group;
  kernel.group_inverse = group_inverse_of(division.group);
  kernel.split_keys = division.split_keys;
  kernel.nheads_q = p.nheads_q / division.group;
  kernel.seqlen_q = p.seqlen_q * division.group;
  AttendParams merged = p;
  if (p.cu_seqlens_q != nullptr) merged.seqlen_q = p.total_q;
  if (division.splits > 1) {
    const int64_t dim = split_row_floats(p.head_dim);
    const int64_t heads = p.nheads_q;
    const int64_t rows = merged.seqlen_q;
    kernel.out = split_out;
    kernel.out_type = Element::kFloat32;
    kernel.out_pairs = true;
    kernel.out_eights = false;
    kernel.out_stride_channel = 1;
    kernel.sinks = nullptr;  // beside all parts, not each
    kernel.out_stride_head = dim;
    kernel.out_stride_row = heads * dim;
    kernel.out_stride_batch = rows * heads * dim;
    kernel.out_stride_split = out_batch * rows * heads * dim;
    kernel.lse = split_lse;
    kernel.lse_stride_head = 1;
    kernel.lse_stride_row = heads;
    kernel.lse_stride_batch = rows * heads;
    kernel.lse_stride_split = out_batch * rows * heads;
  }
  const dim3 grid((kernel.seqlen_q + entry.rows - 1) / entry.rows, batch * kernel.nheads_q,
                  division.splits);
  void* arguments[] = {&kernel};
  const cudaError_t error = cudaLaunchKernel(entry.function, grid, dim3(entry.threads), arguments,
                                             entry.shared_bytes, stream);
  if (error != cudaSuccess || division.splits == 1) return device_status(error, entry.name);
  return enqueue_merge({split_out, split_lse, division.splits, merged}, out_batch, stream);
}

}  // namespace attn8::cuda
