// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "attn8/tensor.hpp"

namespace attn8::app {

/// Bytes at a 64-byte boundary. Throws std::bad_alloc.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t size)
      : data_(static_cast<std::byte*>(::operator new (size + 64, std::align_val_t{64}))),
        size_(size) {}
  [[nodiscard]] std::byte* data() const noexcept { return data_.get(); }
  [[nodiscard]] size_t size() const noexcept { return size_; }
  [[nodiscard]] std::span<std::byte> span() const noexcept { return {data_.get(), size_}; }

 private:
  struct Free {
    void operator()(std::byte* data) const noexcept {
      ::operator delete (data, std::align_val_t{64});
    }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

/// Axis order of a tensor in memory and in files.
enum class Layout : uint8_t { kBshd, kBhsd };

/// A tensor that owns its memory. shape() is [batch, seq, head, dim] whatever the layout.
class HostTensor {
 public:
  HostTensor() = default;
  /// Uninitialized memory.
  HostTensor(DType dtype, const Extents& shape, Layout layout = Layout::kBshd);
  /// Adopts `bytes`, which holds the elements that `shape` and `strides` address.
  HostTensor(AlignedBytes bytes, DType dtype, const Extents& shape, const Extents& strides);

  [[nodiscard]] TensorView view() noexcept;
  [[nodiscard]] ConstTensorView view() const noexcept;
  [[nodiscard]] const Extents& shape() const noexcept { return shape_; }
  [[nodiscard]] DType dtype() const noexcept { return dtype_; }
  [[nodiscard]] size_t size_bytes() const noexcept { return bytes_.size(); }
  [[nodiscard]] std::byte* data() noexcept { return bytes_.data(); }
  [[nodiscard]] const std::byte* data() const noexcept { return bytes_.data(); }
  /// The elements in memory order; requires dtype() == kFloat32.
  [[nodiscard]] std::span<float> floats() noexcept;

 private:
  AlignedBytes bytes_;
  DType dtype_ = DType::kFloat32;
  Extents shape_ = {0, 0, 0, 0};
  Extents strides_ = {0, 0, 0, 0};
};

/// Product of the extents.
constexpr int64_t element_count(const Extents& shape) noexcept {
  return shape[0] * shape[1] * shape[2] * shape[3];
}

/// Address of the element at that place.
const std::byte* element_address(const ConstTensorView& x, int64_t batch, int64_t seq, int64_t head,
                                 int64_t dim) noexcept;

/// One float element, widened.
double load_float(const std::byte* address, DType dtype) noexcept;

/// The tensor in another float type, rounded to nearest even, dense in bshd order.
HostTensor convert(const ConstTensorView& x, DType dtype);

/// Sub-tensor of one batch entry and of `heads` heads from `head` on.
ConstTensorView slice_heads(const ConstTensorView& x, int64_t batch, int64_t head,
                            int64_t heads) noexcept;

/// Rows `rows` of every head of a float tensor as doubles, dense [batch, head, rows, dim]; every
/// row when `rows` is empty.
std::vector<double> gather_rows(const ConstTensorView& x, std::span<const int64_t> rows);

}  // namespace attn8::app
