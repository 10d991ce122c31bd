// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/attention.hpp"
#include "attn8/status.hpp"

/// The CUDA backend. Nothing here touches CUDA until the first call; without a driver or a device
/// every call says so with kUnavailable.
namespace attn8::cuda {

/// What a device of this process can run.
struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  ///< compute capability
  int multiprocessors = 0;
  std::string_view family;  ///< "sm90a" or "sm80": which kernels it uses
};

/// Names of the attention kernels in this build.
std::vector<std::string> kernel_images();
/// Devices there are; kUnavailable with the driver's reason when CUDA cannot start.
Result<int> device_count() noexcept;
/// kUnavailable when there is no such device or no kernel for it.
Result<DeviceInfo> device_info(int device) noexcept;

/// Kernels other than the device's own, for tests.
enum class Kernels : uint8_t { kBest, kSm80, kSm90 };

/// A validated attention problem on one device. Immutable and cheap to copy; run() may be called
/// from any thread.
///
/// Tensors are on `device`, any strides; rows of channels that are contiguous and 16-byte aligned
/// are read faster. Modes kAccurate (V granularity kToken, kTensor or kChannel), kPaper and kHalf.
/// What changes scores has head_dims up to 128 in kPaper and with V scales per tensor or channel.
/// kv_block is the kernel's: 0, or kv_block(). Everything else gives kUnsupported with the
/// argument's name.
class Plan {
 public:
  static Result<Plan> make(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                           const AttentionOptions& options, int device,
                           Kernels kernels = Kernels::kBest) noexcept;

  /// Device memory that the calls below need.
  [[nodiscard]] size_t workspace_bytes() const noexcept;
  [[nodiscard]] std::string_view kernel() const noexcept;
  [[nodiscard]] int32_t kv_block() const noexcept;

  /// Quantizes what is float and packs Q, K and V into `workspace`, then attends. `workspace`:
  /// workspace_bytes() of device memory, 256-byte aligned, not shared with a call that may still be
  /// running. Enqueues on `stream` (a cudaStream_t) and returns; nothing synchronizes or allocates,
  /// so that the calls can be captured into a CUDA graph. The same data give the same bits.
  Status run(const AttentionInputs& inputs, const AttentionOutputs& outputs, void* workspace,
             void* stream) const noexcept;

  /// The two halves of run(): K and V that stay the same need packing once.
  Status pack(const AttentionInputs& inputs, void* workspace, void* stream) const noexcept;
  /// Of `inputs` attend() reads what is no operand.
  Status attend(const AttentionInputs& inputs, const AttentionOutputs& outputs, void* workspace,
                void* stream) const noexcept;

  struct State;  ///< private to the backend

 private:
  explicit Plan(std::shared_ptr<const State> state) noexcept : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

}  // namespace attn8::cuda
