// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "attn8/attn8.hpp"

/// Owning tensors in every layout a caller may have.
namespace attn8::testing {

enum class Memory : uint8_t {
  kBshd,
  kBhsd,
  kStrided,   ///< gaps between all dims, the last one included; starts off the allocation's start
  kReversed,  ///< negative strides along seq and dim
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, const Extents& shape, Memory memory = Memory::kBshd);

  /// Rounds to the tensor's type (nearest even); int8 takes the integer.
  void set(int64_t b, int64_t s, int64_t h, int64_t d, double value);
  [[nodiscard]] double get(int64_t b, int64_t s, int64_t h, int64_t d) const;
  void fill(const std::function<double(int64_t b, int64_t s, int64_t h, int64_t d)>& value);
  /// Independent normal numbers; element (b, s, h, d) depends on the seed and its place only.
  void fill_normal(uint64_t seed, double sigma = 1);

  [[nodiscard]] TensorView view();
  [[nodiscard]] ConstTensorView view() const;
  [[nodiscard]] const Extents& shape() const { return shape_; }
  [[nodiscard]] DType dtype() const { return dtype_; }
  /// All bytes, the gaps included.
  [[nodiscard]] const std::vector<std::byte>& bytes() const { return bytes_; }
  /// The elements as doubles, dense [batch, seq, head, dim].
  [[nodiscard]] std::vector<double> values() const;

 private:
  [[nodiscard]] std::byte* address(int64_t b, int64_t s, int64_t h, int64_t d);
  [[nodiscard]] const std::byte* address(int64_t b, int64_t s, int64_t h, int64_t d) const;

  DType dtype_ = DType::kFloat32;
  Extents shape_ = {0, 0, 0, 0};
  Extents strides_ = {0, 0, 0, 0};
  int64_t start_ = 0;
  std::vector<std::byte> bytes_;
};

/// Entries [first, first + count) of a view along an axis.
template <class View>
View stretch(View x, size_t axis, int64_t first, int64_t count) {
  using Byte = std::conditional_t<std::is_same_v<View, TensorView>, std::byte, const std::byte>;
  x.data = static_cast<Byte*>(x.data) +
           first * x.strides[axis] * static_cast<int64_t>(dtype_bytes(x.dtype));
  x.shape[axis] = count;
  return x;
}

/// A normal number that is a function of its arguments.
double normal_at(uint64_t seed, uint64_t index);

}  // namespace attn8::testing
