// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <vector>

#include "attn8/attention.hpp"
#include "attn8/context.hpp"
#include "host_tensor.hpp"

namespace attn8::app {

/// What a multiply-add multiplies.
enum class Operands : unsigned char { kInt8, kBFloat16, kFloat32 };

/// A multiply-add instruction.
struct Peak {
  std::string_view name;              ///< for example "vpdpbusd zmm"
  void (*burst)(int64_t iterations);  ///< keeps the unit busy
  double ops_per_iteration;           ///< multiplications and additions
};

/// The ISA's fastest multiply-add of such operands (INT8 is widened to s16 where bytes have none);
/// nothing where this CPU has none or no micro-kernel measures it.
std::optional<Peak> find_peak(Isa isa, Operands operands);

/// The instruction that bounds a mode: INT8 with integer Q K^T, float32 in Mode::kExact.
std::optional<Peak> find_peak(Isa isa, Mode mode);

/// Rate of the burst on `threads` threads at once for about `milliseconds`, in 10^9 operations/s.
double measure_peak_gops(const Peak& peak, int32_t threads, double milliseconds = 10);

/// Memory read bandwidth: each thread reads its own part of a buffer several times larger than the
/// caches, as four streams side by side, which is faster than one.
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

/// What bounds every kernel of an ISA on so many threads.
struct Ceilings {
  struct Rate {
    std::string_view name;
    double gops = 0;
  };
  int32_t threads = 1;
  std::vector<Rate> rates;  ///< of every multiply-add find_peak() knows, INT8 first
  double bytes_per_s = 0;   ///< Stream

  [[nodiscard]] nlohmann::ordered_json json() const;
};

/// Medians of a few measurements of each, taken in turns.
Ceilings measure_ceilings(Isa isa, int32_t threads);

}  // namespace attn8::app
