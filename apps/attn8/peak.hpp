// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#include "attn8/attention.hpp"
#include "attn8/context.hpp"
#include "host_tensor.hpp"

namespace attn8::app {

/// The multiply-add instruction that bounds a mode on an ISA.
struct Peak {
  std::string_view name;              ///< for example "vpdpbusd zmm"
  void (*burst)(int64_t iterations);  ///< keeps the unit busy
  double ops_per_iteration;           ///< multiplications and additions
};

/// INT8 (or the widened s16) multiply-add for the modes with integer Q K^T, float32 FMA for
/// Mode::kExact; nothing for an ISA without a micro-kernel.
std::optional<Peak> find_peak(Isa isa, Mode mode);

/// Rate of the burst on `threads` threads at once for about `milliseconds`, in 10^9 operations/s.
double measure_peak_gops(const Peak& peak, int32_t threads, double milliseconds = 10);

/// Memory read bandwidth of the same threads: each reads its own part of a buffer several times
/// larger than the caches.
class Stream {
 public:
  Stream(Isa isa, int32_t threads);
  /// One pass over the buffer, in bytes per second.
  double measure();

 private:
  Isa isa_;
  int32_t threads_;
  AlignedBytes buffer_;
};

}  // namespace attn8::app
