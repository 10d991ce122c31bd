// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <string_view>

#include "attn8/quantize.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

/// What validate.cpp and validate_attention.cpp say of a single view. Each may throw
/// std::bad_alloc; see guarded().
namespace attn8 {

/// More bytes than any address space: keeps every offset of a view far from overflow.
inline constexpr int64_t kMaxBytes = int64_t{1} << 48;

std::string text(const Extents& shape);
std::string text(Device device);

/// Extents, strides and pointer of a view that will be read (or, when written, be distinct
/// elements) on `device`.
Status check_view(std::string_view name, const ConstTensorView& view, bool written,
                  Device device = {});
Status check_float(std::string_view name, const ConstTensorView& view);
Status check_type(std::string_view name, const ConstTensorView& view, DType wanted);
Status check_shape(std::string_view name, const ConstTensorView& view, const Extents& wanted,
                   std::string_view why);
Status check_spec(std::string_view name, const QuantSpec& spec);
Status check_quantized(const std::string& name, const QuantizedView& x, Device device = {});

/// Turns a failed allocation of a message into a status.
template <class Check>
Status guarded(Check check) noexcept {
  try {
    return check();
  } catch (...) {
    return Status(StatusCode::kOutOfMemory, {});
  }
}

}  // namespace attn8
