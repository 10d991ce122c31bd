// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/export.hpp"
#include "attn8/status.hpp"

/// CUDA devices as attn8 sees them, and device memory for callers who have no CUDA runtime of their
/// own. AttentionPlan runs on a device when Context::device says so and every tensor lies there.
/// Nothing here or there touches CUDA before the first call that needs it: a program with the CUDA
/// backend starts and works on a machine without a driver.
namespace attn8 {

/// One device of this process.
struct CudaDevice {
  int32_t index = 0;             ///< what Device::index takes
  std::string name;              ///< the driver's, for example "NVIDIA H200"
  int32_t major = 0, minor = 0;  ///< compute capability
  int32_t multiprocessors = 0;
  std::string_view kernels;  ///< "sm90a" or "sm80": the kernels it runs; empty when it can run none
  std::string reason;        ///< why it can run none
};

/// What this build and this machine offer.
struct CudaSupport {
  bool built = false;                      ///< the library was built with ATTN8_CUDA
  std::vector<std::string> kernel_images;  ///< kernels in this build: "attend_folded_sm90_d128"...
  std::vector<CudaDevice> devices;         ///< empty without a driver or a device
  std::string reason;                      ///< why there is no device; empty when there is one
};

/// Asks the driver. Thread-safe.
ATTN8_API CudaSupport cuda_support() noexcept;

/// Memory of one device, freed by the destructor. Movable, not copyable.
class ATTN8_API CudaMemory {
 public:
  CudaMemory() noexcept = default;
  CudaMemory(CudaMemory&& other) noexcept;
  CudaMemory& operator=(CudaMemory&& other) noexcept;
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;
  ~CudaMemory();  // NOLINT(performance-trivially-destructible): not where CUDA is built

  /// Errors: kUnavailable (no CUDA in this build, no driver, no such device), kOutOfMemory.
  static Result<CudaMemory> allocate(size_t bytes, int32_t device) noexcept;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] size_t size() const noexcept { return size_; }

  /// Copies size() bytes from or to host memory, after everything enqueued on the default stream;
  /// they return when the copy is done. kDeviceError with what the device reports, kernels of
  /// earlier calls included.
  Status upload(const void* host) noexcept;
  Status download(void* host) const noexcept;

 private:
  CudaMemory(std::byte* data, size_t size, int32_t device) noexcept
      : data_(data), size_(size), device_(device) {}
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  int32_t device_ = 0;
};

/// Waits for everything enqueued on the device.
ATTN8_API Status cuda_synchronize(int32_t device) noexcept;

}  // namespace attn8
