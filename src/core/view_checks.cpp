// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/view_checks.hpp"

#include "core/message.hpp"
#include "core/quant_math.hpp"

namespace attn8 {

std::string text(const Extents& shape) {
  std::string result = "[";
  for (int i = 0; i < 4; ++i) {
    if (i > 0) result += ", ";
    result += std::to_string(shape[static_cast<size_t>(i)]);
  }
  return result + "]";
}

std::string text(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

Status check_view(std::string_view name, const ConstTensorView& view, bool written, Device device) {
  if (view.device.type != device.type ||
      (device.type == DeviceType::kCuda && view.device.index != device.index)) {
    return invalid(name, ".device got ", text(view.device), ", wants ", text(device),
                   ", as the context's");
  }
  int64_t reach = static_cast<int64_t>(dtype_bytes(view.dtype));
  if (reach == 0) return invalid(name, ".dtype is not a type of attn8::DType");
  bool empty = false;
  int64_t elements = 1;  // zero extents left out: products of the others must not overflow either
  for (size_t i = 0; i < 4; ++i) {
    const int64_t extent = view.shape[i];
    if (extent < 0) return invalid(name, ".shape=", text(view.shape), " wants no negative");
    empty = empty || extent == 0;
    if (extent > 0 &&
        (__builtin_mul_overflow(elements, extent, &elements) || elements > kMaxBytes)) {
      return invalid(name, ".shape=", text(view.shape), " has over 2^48 elements");
    }
  }
  if (empty) return {};
  for (size_t i = 0; i < 4; ++i) {
    int64_t span = 0;
    const int64_t stride = view.strides[i];
    if (__builtin_mul_overflow(stride < 0 ? -(stride + 1) : stride, view.shape[i] - 1, &span) ||
        span > kMaxBytes || (reach += span * 4) > kMaxBytes) {
      return invalid(name, ".shape=", text(view.shape), " with strides=", text(view.strides),
                     " reaches over 2^48 bytes");
    }
    if (written && view.strides[i] == 0 && view.shape[i] > 1) {
      return invalid(name, ".strides[", i, "]=0 wants distinct elements, because it is written");
    }
  }
  if (view.data == nullptr) return invalid(name, ".data got nullptr, wants ", text(view.shape));
  return {};
}

Status check_float(std::string_view name, const ConstTensorView& view) {
  if (!is_float(view.dtype)) {
    return invalid(name, ".dtype got ", to_string(view.dtype),
                   ", wants float32, float16 or bfloat16");
  }
  return {};
}

Status check_type(std::string_view name, const ConstTensorView& view, DType wanted) {
  if (view.dtype != wanted) {
    return invalid(name, ".dtype got ", to_string(view.dtype), ", wants ", to_string(wanted));
  }
  return {};
}

Status check_shape(std::string_view name, const ConstTensorView& view, const Extents& wanted,
                   std::string_view why) {
  if (view.shape != wanted) {
    return invalid(name, ".shape got ", text(view.shape), ", wants ", text(wanted), why);
  }
  return {};
}

Status check_spec(std::string_view name, const QuantSpec& spec) {
  if (static_cast<int>(spec.granularity) > static_cast<int>(Granularity::kBlockChannel)) {
    return invalid(name, ".granularity is not a value of attn8::Granularity");
  }
  if (by_block(spec.granularity) && spec.block <= 0)
    return invalid(name, ".block got ", spec.block, ", wants > 0");
  return {};
}

Status check_quantized(const std::string& name, const QuantizedView& x, Device device) {
  ATTN8_RETURN_IF_ERROR(check_view(name + ".codes", x.codes, false, device));
  ATTN8_RETURN_IF_ERROR(check_type(name + ".codes", x.codes, DType::kInt8));
  ATTN8_RETURN_IF_ERROR(check_spec(name + ".spec", x.spec));
  ATTN8_RETURN_IF_ERROR(check_view(name + ".scale", x.scale, false, device));
  ATTN8_RETURN_IF_ERROR(check_type(name + ".scale", x.scale, DType::kFloat32));
  ATTN8_RETURN_IF_ERROR(check_shape(name + ".scale", x.scale, scale_shape(x.codes.shape, x.spec),
                                    " for this granularity"));
  if (x.mean.has_value()) {
    ATTN8_RETURN_IF_ERROR(check_view(name + ".mean", *x.mean, false, device));
    ATTN8_RETURN_IF_ERROR(check_type(name + ".mean", *x.mean, DType::kFloat32));
    const Extents& s = x.codes.shape;
    ATTN8_RETURN_IF_ERROR(check_shape(name + ".mean", *x.mean, {s[0], 1, s[2], s[3]}, ""));
  }
  return {};
}

}  // namespace attn8
