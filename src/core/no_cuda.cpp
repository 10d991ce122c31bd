// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "attn8/cuda.hpp"
#include "attn8/cuda_kv_cache.hpp"
#include "core/device_plan.hpp"
#include "core/message.hpp"

/// The CUDA backend of a build without it; src/cuda/public.cu is the other.
#if !defined(ATTN8_HAS_CUDA)

namespace attn8 {
namespace {

Status not_built() noexcept {
  return failure(StatusCode::kUnavailable,
                 "context.device got cuda, this build has no CUDA kernels (CMake: ATTN8_CUDA=ON)");
}

}  // namespace

Result<std::shared_ptr<const DevicePlan>> make_cuda_plan(const AttentionInputs&,
                                                         const AttentionOutputs&,
                                                         const AttentionOptions&,
                                                         int32_t) noexcept {
  return not_built();
}

Status merge_states_on_cuda(std::span<const AttentionState>, const AttentionOutputs&, int32_t,
                            void*) noexcept {
  return not_built();
}

CudaSupport cuda_support() noexcept {
  CudaSupport support;
  support.reason = not_built().message();
  return support;
}

CudaMemory::CudaMemory(CudaMemory&&) noexcept = default;
CudaMemory& CudaMemory::operator=(CudaMemory&&) noexcept = default;
CudaMemory::~CudaMemory() = default;
Result<CudaMemory> CudaMemory::allocate(size_t, int32_t) noexcept { return not_built(); }
Status CudaMemory::upload(const void*) noexcept { return not_built(); }
Status CudaMemory::download(void*) const noexcept { return not_built(); }
Status cuda_synchronize(int32_t) noexcept { return not_built(); }

struct CudaKvCache::State {
  CudaKvCacheOptions options;
};
Result<size_t> CudaKvCache::memory_bytes(const CudaKvCacheOptions&, const Context&) noexcept {
  return not_built();
}
Result<CudaKvCache> CudaKvCache::make(const CudaKvCacheOptions&, const Context&) noexcept {
  return not_built();
}
size_t CudaKvCache::workspace_bytes(const Extents&, const CudaKvTables&) const noexcept {
  return 0;
}
Status CudaKvCache::append(const ConstTensorView&, const ConstTensorView&, const CudaKvTables&,
                           std::span<std::byte>, const Context&) const noexcept {
  return not_built();
}
Status CudaKvCache::attend(const ConstTensorView&, const CudaKvTables&, const AttentionOutputs&,
                           const CudaKvAttentionOptions&, std::span<std::byte>,
                           const Context&) const noexcept {
  return not_built();
}
const CudaKvCacheOptions& CudaKvCache::options() const noexcept { return state_->options; }
size_t CudaKvCache::bytes_per_page() const noexcept { return 0; }

}  // namespace attn8

#endif
