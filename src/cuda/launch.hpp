// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_runtime.h>

#include "params.hpp"

/// Kernel entries: what backend.cu knows of a compiled attention kernel. The files that define them
/// are written by CMake (instances.cmake), one kernel each.
namespace attn8::cuda {

enum class Family : int32_t {
  kSm80,
  kSm90,
  kDecode,  ///< of few queries, on every chip
};

struct AttendEntry {
  const char* name;  ///< "attend_<weights>[_<scores>]_<family>_d<head_dim>"
  Family family;
  Weights weights;
  Scores scores;
  int head_dim;  ///< packed_head_dim of what it computes
  int kv_block;
  int rows;       ///< query rows per block
  int step_keys;  ///< that a block takes at a time, whole key blocks
  int resident;   ///< blocks of a multiprocessor that keys are divided among
  int threads;
  size_t shared_bytes;
  const void* function;  ///< takes one AttendParams
};

#if defined(__CUDACC__)
template <class Kernel, int kMinBlocks>
__global__ void __launch_bounds__(Kernel::kThreads, kMinBlocks)
    attend_kernel(const __grid_constant__ AttendParams p) {
  Kernel::run(p);
}

template <class Kernel, int kMinBlocks>
AttendEntry attend_entry(const char* name, Family family, Weights weights, Scores scores) {
  constexpr int step_keys = [] {
    if constexpr (requires { Kernel::kStepKeys; }) return Kernel::kStepKeys;
    return Kernel::kKvBlock;
  }();
  return {name,
          family,
          weights,
          scores,
          Kernel::kHeadDim,
          Kernel::kKvBlock,
          Kernel::kRows,
          step_keys,
          family == Family::kDecode ? kMinBlocks : 1,
          Kernel::kThreads,
          Kernel::kSharedBytes,
          reinterpret_cast<const void*>(&attend_kernel<Kernel, kMinBlocks>)};
}
#endif

}  // namespace attn8::cuda
