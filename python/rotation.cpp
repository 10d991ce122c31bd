// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "rotation.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <new>

#include "core/element.hpp"

// One function, compiled for several instruction sets; which one runs is decided when the module is
// loaded. None changes a bit: there are only sums, and products by +-1.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ATTN8_FOR_EACH_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ATTN8_FOR_EACH_ISA
#endif

namespace attn8::python {
namespace {

constexpr int64_t kRowsPerTask = 32;  // 32 KB of floats at most: they stay in the L1 cache
/// Fewer floats than this take less time than threads take to start.
constexpr int64_t kLeastForThreads = int64_t{1} << 16;

using Lanes [[gnu::vector_size(64)]] = float;
constexpr int64_t kLanes = 16;

/// Each block of `block` floats (a power of 2) times the matrix of +-1, then `scale`.
ATTN8_FOR_EACH_ISA void transform(float* x, int64_t blocks, int64_t block, float scale) {
  constexpr Lanes kSign1 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  constexpr Lanes kSign2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  constexpr Lanes kSign4 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  constexpr Lanes kSign8 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  for (; blocks > 0; --blocks, x += block) {
    int64_t half = 1;  // butterflies of neighbours at this distance come next
    if (block >= kLanes) {
      for (int64_t i = 0; i < block; i += kLanes) {
        Lanes y;
        std::memcpy(&y, x + i, sizeof y);
        y = y * kSign1 +
            __builtin_shufflevector(y, y, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        y = y * kSign2 +
            __builtin_shufflevector(y, y, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        y = y * kSign4 +
            __builtin_shufflevector(y, y, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
        y = y * kSign8 +
            __builtin_shufflevector(y, y, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
        std::memcpy(x + i, &y, sizeof y);
      }
      half = kLanes;
    }
    for (; half < block; half *= 2) {
      for (int64_t first = 0; first < block; first += 2 * half) {
        for (int64_t i = first; i < first + half; ++i) {
          const float a = x[i];
          const float b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
      }
    }
    for (int64_t i = 0; i < block; ++i) x[i] *= scale;
  }
}

std::byte* row_of(const TensorView& x, int64_t row) {
  const int64_t head = row % x.shape[2];
  const int64_t token = row / x.shape[2] % x.shape[1];
  const int64_t batch = row / x.shape[2] / x.shape[1];
  const int64_t offset = batch * x.strides[0] + token * x.strides[1] + head * x.strides[2];
  return static_cast<std::byte*>(x.data) + offset * static_cast<int64_t>(dtype_bytes(x.dtype));
}

void load(const TensorView& x, int64_t row, float* to) {
  const std::byte* from = row_of(x, row);
  const int64_t dim = x.shape[3];
  const int64_t stride = x.strides[3];
  if (x.dtype == DType::kFloat32) {
    const auto* values = reinterpret_cast<const float*>(from);
    if (stride == 1) {
      std::copy_n(values, dim, to);
    } else {
      for (int64_t i = 0; i < dim; ++i) to[i] = values[i * stride];
    }
    return;
  }
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  if (x.dtype == DType::kFloat16) {
    for (int64_t i = 0; i < dim; ++i) to[i] = float16_to_float(bits[i * stride]);
  } else {
    for (int64_t i = 0; i < dim; ++i) to[i] = bfloat16_to_float(bits[i * stride]);
  }
}

void store(const float* from, const TensorView& x, int64_t row) {
  std::byte* to = row_of(x, row);
  const int64_t dim = x.shape[3];
  const int64_t stride = x.strides[3];
  if (x.dtype == DType::kFloat32) {
    auto* values = reinterpret_cast<float*>(to);
    if (stride == 1) {
      std::copy_n(from, dim, values);
    } else {
      for (int64_t i = 0; i < dim; ++i) values[i * stride] = from[i];
    }
    return;
  }
  auto* bits = reinterpret_cast<uint16_t*>(to);
  if (x.dtype == DType::kFloat16) {
    for (int64_t i = 0; i < dim; ++i) bits[i * stride] = float_to_float16(from[i]);
  } else {
    for (int64_t i = 0; i < dim; ++i) bits[i * stride] = float_to_bfloat16(from[i]);
  }
}

int64_t rows_of(const TensorView& x) { return x.shape[0] * x.shape[1] * x.shape[2]; }

bool can_rotate(const TensorView& x) {
  return is_float(x.dtype) && x.device.type == DeviceType::kCpu && x.shape[3] >= 1 &&
         x.shape[3] <= kMaxRotatedDim;
}

/// A float32 view of the shape of `x`, contiguous; `memory` gets what it lies in.
TensorView allocate_like(const TensorView& x, std::vector<std::unique_ptr<float[]>>& memory) {
  TensorView view = x;
  view.dtype = DType::kFloat32;
  int64_t count = 1;  // of a view with strides of 0 it has no bound
  for (size_t i = 4; i > 0; --i) {
    view.strides[i - 1] = count;
    if (__builtin_mul_overflow(count, x.shape[i - 1], &count)) throw std::bad_alloc();
  }
  memory.emplace_back(new float[static_cast<size_t>(count)]);
  view.data = memory.back().get();
  return view;
}

}  // namespace

void rotate_rows(const TensorView& x, const TensorView& out, int32_t threads) noexcept {
  const int64_t dim = x.shape[3];
  const int64_t rows = rows_of(x);
  if (rows * dim == 0) return;
  const int64_t block = dim & -dim;  // its lowest bit: the largest power of 2 that divides it
  const float scale = 1.0F / std::sqrt(static_cast<float>(block));
  const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) \
    num_threads(threads) if (threads > 1 && rows * dim >= kLeastForThreads)
#endif
  for (int64_t task = 0; task < tasks; ++task) {
    alignas(64) std::array<float, kRowsPerTask * kMaxRotatedDim> held;
    const int64_t first = task * kRowsPerTask;
    const int64_t count = std::min(kRowsPerTask, rows - first);
    for (int64_t i = 0; i < count; ++i) load(x, first + i, held.data() + i * dim);
    transform(held.data(), count * dim / block, block, scale);
    for (int64_t i = 0; i < count; ++i) store(held.data() + i * dim, out, first + i);
  }
  static_cast<void>(threads);  // without OpenMP
}

TensorView Rotation::of(const TensorView& x) {
  if (!wanted_ || !can_rotate(x)) return x;
  const TensorView rotated = allocate_like(x, memory_);
  rotate_rows(x, rotated, threads_);
  return rotated;
}

TensorView Rotation::output(const TensorView& out) {
  if (!wanted_ || !can_rotate(out)) return out;
  out_ = out;
  computed_ = allocate_like(out, memory_);
  return *computed_;
}

void Rotation::finish() noexcept {
  if (computed_.has_value()) rotate_rows(*computed_, out_, threads_);
}

}  // namespace attn8::python
