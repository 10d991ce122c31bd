// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

#include "attn8/export.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

namespace attn8 {

/// CPU instruction sets with kernels of their own, worst first.
enum class Isa : uint8_t {
  kScalar,      ///< portable C++, needs no instruction-set flag
  kAvx2,        ///< AVX2 + FMA + F16C
  kAvxVnni,     ///< AVX2 and 256-bit vpdpbusd: AVX-VNNI, or AVX512VL + AVX512-VNNI
  kAvx512Vnni,  ///< AVX-512 F/BW/VL/DQ/VBMI + VNNI
};

/// "scalar", "avx2", "avx_vnni", "avx512_vnni".
ATTN8_API std::string_view to_string(Isa isa) noexcept;

/// The ISA of that name, or kInvalidArgument listing the names there are.
ATTN8_API Result<Isa> parse_isa(std::string_view name) noexcept;

/// One compiled-in instruction set and whether this machine can run it.
struct IsaSupport {
  Isa isa;
  bool available;           ///< compiled in, and both CPU and OS support it
  std::string_view reason;  ///< why not; empty when available. Static storage.
};

/// Every ISA of the enumeration, best first. Static storage, thread-safe.
ATTN8_API std::span<const IsaSupport> isa_support() noexcept;

/// The best ISA this machine can run.
ATTN8_API Isa best_isa() noexcept;

/// Runs body(argument, i) for every i in [0, count), in any order, on any threads, and returns when
/// all are done. Lets a caller with its own thread pool replace OpenMP.
using ParallelFor = void (*)(void* pool, int64_t count, void (*body)(void* argument, int64_t i),
                             void* argument);

/// Where and how a call runs. A plain value; no globals stand behind it and nothing is read from
/// the environment.
struct Context {
  Device device = {};
  bool force_isa = false;  ///< use `isa` even when a better one is available
  Isa isa = Isa::kScalar;  ///< read only when force_isa
  int32_t threads = 1;     ///< >= 1; tasks that may run at the same time. Never changes results.
  ParallelFor parallel_for = nullptr;  ///< nullptr: OpenMP with `threads` threads
  void* pool = nullptr;                ///< first argument of parallel_for
  /// On a CUDA device: the cudaStream_t that run() enqueues on; nullptr is the default stream.
  /// There run() returns before the work is done and neither synchronizes nor allocates, so that it
  /// can be captured into a CUDA graph; the members about threads and ISA are not read.
  void* stream = nullptr;

  /// Context on the CPU with a given number of threads.
  static Context cpu(int32_t threads) noexcept {
    Context context;
    context.threads = threads;
    return context;
  }
  /// Context on a CUDA device.
  static Context cuda(int32_t index, void* stream = nullptr) noexcept {
    Context context;
    context.device = {DeviceType::kCuda, index};
    context.stream = stream;
    return context;
  }
  /// Context that insists on one ISA.
  static Context with_isa(Isa isa, int32_t threads = 1) noexcept {
    Context context;
    context.threads = threads;
    context.force_isa = true;
    context.isa = isa;
    return context;
  }
};

/// Library version, "major.minor.patch".
ATTN8_API std::string_view version() noexcept;

}  // namespace attn8
