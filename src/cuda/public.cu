// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "attn8/cuda.hpp"
#include "core/device_plan.hpp"
#include "plan.hpp"

/// The CUDA backend behind the library's own interface.
namespace attn8 {
namespace {

class CudaPlan final : public DevicePlan {
 public:
  explicit CudaPlan(cuda::Plan plan) noexcept : plan_(std::move(plan)) {}
  [[nodiscard]] size_t workspace_bytes() const noexcept override { return plan_.workspace_bytes(); }
  [[nodiscard]] std::string_view kernel() const noexcept override { return plan_.kernel(); }
  [[nodiscard]] int32_t kv_block() const noexcept override { return plan_.kv_block(); }
  Status run(const AttentionInputs& inputs, const AttentionOutputs& outputs, std::byte* workspace,
             void* stream) const noexcept override {
    return plan_.run(inputs, outputs, workspace, stream);
  }

 private:
  cuda::Plan plan_;
};

}  // namespace

Result<std::shared_ptr<const DevicePlan>> make_cuda_plan(const AttentionInputs& inputs,
                                                         const AttentionOutputs& outputs,
                                                         const AttentionOptions& options,
                                                         int32_t device) noexcept {
  try {
    Result<cuda::Plan> plan = cuda::Plan::make(inputs, outputs, options, device);
    if (!plan.ok()) return plan.status();
    return std::shared_ptr<const DevicePlan>(std::make_shared<CudaPlan>(std::move(plan).value()));
  } catch (...) {
    return Status(StatusCode::kOutOfMemory, {});
  }
}

CudaSupport cuda_support() noexcept {
  CudaSupport support;
  support.built = true;
  try {
    support.kernel_images = cuda::kernel_images();
    const Result<int> count = cuda::device_count();
    if (!count.ok()) support.reason = count.status().message();
    if (count.ok() && count.value() == 0) support.reason = "there is no CUDA device";
    for (int i = 0; count.ok() && i < count.value(); ++i) {
      CudaDevice& device = support.devices.emplace_back();
      device.index = i;
      const Result<cuda::DeviceInfo> info = cuda::device_info(i);
      if (!info.ok()) {
        device.reason = info.status().message();
        continue;
      }
      device.name = info.value().name;
      device.major = info.value().major;
      device.minor = info.value().minor;
      device.multiprocessors = info.value().multiprocessors;
      device.kernels = info.value().family;
    }
  } catch (...) {
    support = {};
    support.built = true;
  }
  return support;
}

CudaMemory::CudaMemory(CudaMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      device_(other.device_) {}
CudaMemory& CudaMemory::operator=(CudaMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(device_, other.device_);
  return *this;
}
CudaMemory::~CudaMemory() {
  if (data_ == nullptr) return;
  const cuda::DeviceGuard guard(device_);
  cudaFree(data_);
}

Result<CudaMemory> CudaMemory::allocate(size_t bytes, int32_t device) noexcept {
  const Result<cuda::DeviceInfo> info = cuda::device_info(device);
  if (!info.ok()) return info.status();
  const cuda::DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cuda::device_status(guard.error(), "cudaSetDevice");
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, std::max<size_t>(bytes, 1));
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cuda::device_status(error, "cudaMalloc");
  }
  return CudaMemory(static_cast<std::byte*>(data), bytes, device);
}

Status CudaMemory::upload(const void* host) noexcept {
  const cuda::DeviceGuard guard(device_);
  return cuda::device_status(cudaMemcpy(data_, host, size_, cudaMemcpyHostToDevice), "cudaMemcpy");
}
Status CudaMemory::download(void* host) const noexcept {
  const cuda::DeviceGuard guard(device_);
  return cuda::device_status(cudaMemcpy(host, data_, size_, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

Status cuda_synchronize(int32_t device) noexcept {
  const cuda::DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cuda::device_status(guard.error(), "cudaSetDevice");
  return cuda::device_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

}  // namespace attn8
