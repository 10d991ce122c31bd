// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "merge_states.hpp"

#include <span>
#include <string>

#include "core/device_plan.hpp"
#include "plan.hpp"

/// attn8::merge_states() on a CUDA device.
namespace attn8 {
namespace {

using cuda::StateLse;
using cuda::StateOut;

/// Kernel parameters end at 32,764 bytes: 80 for each part.
constexpr size_t kMostStates = 256;
/// Most calls have few parts, and parameters are copied with every launch.
constexpr size_t kFewStates = 16;

template <int kMaxStates>
__global__ void __launch_bounds__(cuda::MergeStates<kMaxStates>::kThreads)
    merge_states_kernel(const __grid_constant__ cuda::MergeStatesParams<kMaxStates> params) {
  cuda::MergeStates<kMaxStates>::run(params);
}

StateOut out_of(const ConstTensorView& view) {
  StateOut out{};
  out.data = const_cast<void*>(view.data);
  out.type = cuda::element_of(view.dtype);
  const size_t bytes = 4 * dtype_bytes(view.dtype);
  out.vectors = view.strides[3] == 1 && reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
  for (size_t axis = 0; axis < 4; ++axis) {
    out.strides[axis] = view.strides[axis];
    out.vectors =
        out.vectors && (axis == 3 || view.shape[axis] == 1 || view.strides[axis] % 4 == 0);
  }
  return out;
}

StateLse lse_of(const ConstTensorView& view) {
  return {static_cast<float*>(const_cast<void*>(view.data)),
          {view.strides[0], view.strides[1], view.strides[2]}};
}

template <int kMaxStates>
Status enqueue(std::span<const AttentionState> states, const AttentionOutputs& merged,
               cudaStream_t stream) {
  using Kernel = cuda::MergeStates<kMaxStates>;
  const Extents& shape = merged.out.shape;
  cuda::MergeStatesParams<kMaxStates> p{};
  p.out = out_of(merged.out);
  if (merged.lse) p.lse = lse_of(*merged.lse);
  p.rows = shape[0] * shape[1] * shape[2];
  p.count = static_cast<int>(states.size());
  p.seqlen_q = static_cast<int>(shape[1]);
  p.nheads = static_cast<int>(shape[2]);
  p.head_dim = static_cast<int>(shape[3]);
  for (size_t i = 0; i < states.size(); ++i) {
    p.outs[i] = out_of(states[i].out);
    p.lses[i] = lse_of(states[i].lse);
  }
  const auto blocks = static_cast<unsigned>((p.rows + Kernel::kRows - 1) / Kernel::kRows);
  merge_states_kernel<kMaxStates><<<blocks, Kernel::kThreads, Kernel::kSharedBytes, stream>>>(p);
  return cuda::device_status(cudaGetLastError(), "launching the merge kernel");
}

}  // namespace

Status merge_states_on_cuda(std::span<const AttentionState> states, const AttentionOutputs& merged,
                            int32_t device, void* stream) noexcept try {
  if (const Result<cuda::Kernels> kernels = cuda::kernels_of(device); !kernels.ok()) {
    // Says more, where it is the device that is missing.
    const Result<cuda::DeviceInfo> info = cuda::device_info(device);
    return info.ok() ? kernels.status() : info.status();
  }
  if (states.size() > kMostStates) {
    return {StatusCode::kUnsupported, "states got " + std::to_string(states.size()) +
                                          ", the CUDA kernel merges up to " +
                                          std::to_string(kMostStates)};
  }
  const Extents& shape = merged.out.shape;
  constexpr int64_t kMostInts = int64_t{1} << 31;
  if (shape[0] * shape[1] * shape[2] >= kMostInts * 4 || shape[3] >= kMostInts) {
    return {StatusCode::kUnsupported,
            "merged.out, the CUDA kernel wants under 2^33 rows of under 2^31 channels"};
  }
  const auto check = [&](const ConstTensorView& view, const std::string& name) -> Status {
    for (const int64_t extent : view.shape) {
      if (extent == 0) return {};
    }
    return cuda::check_memory(view.data, name.c_str(), device);
  };
  if (Status status = check(merged.out, "merged.out"); !status.ok()) return status;
  if (merged.lse) {
    if (Status status = check(*merged.lse, "merged.lse"); !status.ok()) return status;
  }
  for (size_t i = 0; i < states.size(); ++i) {
    const std::string name = "states[" + std::to_string(i) + "]";
    if (Status status = check(states[i].out, name + ".out"); !status.ok()) return status;
    if (Status status = check(states[i].lse, name + ".lse"); !status.ok()) return status;
  }
  if (shape[0] * shape[1] * shape[2] == 0) return {};
  const cuda::DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cuda::device_status(guard.error(), "cudaSetDevice");
  const auto to = static_cast<cudaStream_t>(stream);
  return states.size() <= kFewStates ? enqueue<kFewStates>(states, merged, to)
                                     : enqueue<kMostStates>(states, merged, to);
} catch (...) {
  return {StatusCode::kOutOfMemory, {}};
}

}  // namespace attn8
