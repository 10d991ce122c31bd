// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "attn8/attn8.hpp"

namespace attn8::python {

/// Longest row that is rotated; attention takes no longer ones.
inline constexpr int64_t kMaxRotatedDim = 256;

/// Multiplies every row (last dimension, 1 to kMaxRotatedDim) of `x` by the symmetric orthogonal
/// Hadamard matrix that attn8/rotation.py describes and writes it to `out`, of the same shape. Both
/// float32, float16 or bfloat16 on the CPU, any strides; `out` may be `x` itself, else it shares no
/// memory with it. Computed in float32, with the same bits for any strides, number of threads and
/// instruction set.
void rotate_rows(const TensorView& x, const TensorView& out, int32_t threads) noexcept;

/// What one call attends to, rotated where that is wanted, in memory of its own.
class Rotation {
 public:
  Rotation(bool wanted, int32_t threads) noexcept : wanted_(wanted), threads_(threads) {}

  /// `x` rotated; `x` itself where nothing is wanted, or the library is going to refuse it. Throws
  /// std::bad_alloc.
  TensorView of(const TensorView& x);
  /// Where attention is to write for finish() to rotate it into `out`. Throws std::bad_alloc.
  TensorView output(const TensorView& out);
  void finish() noexcept;

 private:
  bool wanted_;
  int32_t threads_;
  std::vector<std::unique_ptr<float[]>> memory_;
  std::optional<TensorView> computed_;
  TensorView out_;
};

}  // namespace attn8::python
