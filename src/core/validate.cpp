// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/validate.hpp"

#include <cmath>
#include <string>

#include "core/element.hpp"
#include "core/kernel_table.hpp"
#include "core/message.hpp"
#include "core/quant_math.hpp"
#include "core/view_checks.hpp"

namespace attn8 {
namespace {

Status check_kv_block(std::string_view name, int32_t kv_block) {
  if (kv_block < 64 || kv_block > 512 || kv_block % 64 != 0) {
    return invalid(name, " got ", kv_block, ", wants a multiple of 64 in [64, 512]");
  }
  return {};
}

}  // namespace

Status validate_context(const Context& context) noexcept {
  if (context.device.type != DeviceType::kCpu) {
    return failure(StatusCode::kUnsupported, "context.device got ", text(context.device),
                   ", this call runs on cpu only");
  }
  if (context.threads < 1) return invalid("context.threads got ", context.threads, ", wants >= 1");
  if (context.force_isa) {
    for (const IsaSupport& support : isa_support()) {
      if (support.isa != context.isa) continue;
      if (support.available) return {};
      return failure(StatusCode::kUnavailable, "isa ", to_string(context.isa),
                     " is not available: ", support.reason);
    }
    return invalid("context.isa is not a value of attn8::Isa");
  }
  return {};
}

Status validate_quantize(const ConstTensorView& x, const QuantSpec& spec,
                         const ConstTensorView& codes, const ConstTensorView& scale, Mean mean_use,
                         const std::optional<TensorView>& mean) noexcept {
  return guarded([&]() -> Status {
    ATTN8_RETURN_IF_ERROR(check_view("x", x, false));
    ATTN8_RETURN_IF_ERROR(check_float("x", x));
    ATTN8_RETURN_IF_ERROR(check_spec("spec", spec));
    ATTN8_RETURN_IF_ERROR(check_view("codes", codes, true));
    ATTN8_RETURN_IF_ERROR(check_type("codes", codes, DType::kInt8));
    ATTN8_RETURN_IF_ERROR(check_shape("codes", codes, x.shape, ", as x"));
    ATTN8_RETURN_IF_ERROR(check_view("scale", scale, true));
    ATTN8_RETURN_IF_ERROR(check_type("scale", scale, DType::kFloat32));
    ATTN8_RETURN_IF_ERROR(
        check_shape("scale", scale, scale_shape(x.shape, spec), " for this granularity"));
    if (static_cast<int>(mean_use) > static_cast<int>(Mean::kGiven)) {
      return invalid("mean_use is not a value of attn8::Mean");
    }
    if (mean_use == Mean::kNone) return {};
    if (!mean.has_value()) return invalid("mean is not set, mean_use wants it");
    ATTN8_RETURN_IF_ERROR(check_view("mean", *mean, mean_use == Mean::kCompute));
    ATTN8_RETURN_IF_ERROR(check_type("mean", *mean, DType::kFloat32));
    return check_shape("mean", *mean, {x.shape[0], 1, x.shape[2], x.shape[3]}, "");
  });
}

Status validate_dequantize(const QuantizedView& x, const ConstTensorView& out) noexcept {
  return guarded([&]() -> Status {
    ATTN8_RETURN_IF_ERROR(check_quantized("x", x));
    ATTN8_RETURN_IF_ERROR(check_view("out", out, true));
    ATTN8_RETURN_IF_ERROR(check_float("out", out));
    return check_shape("out", out, x.codes.shape, ", as x.codes");
  });
}

Status validate_scale_shape(const Extents& x, const QuantSpec& spec) noexcept {
  return guarded([&]() -> Status {
    // One broadcast byte: of the checks of a view only those of its extents remain.
    const std::byte one{};
    ATTN8_RETURN_IF_ERROR(
        check_view("x", {&one, DType::kInt8, Device{}, x, Extents{0, 0, 0, 0}}, false));
    return check_spec("spec", spec);
  });
}

Status validate_merge(std::span<const AttentionState> states, const AttentionOutputs& merged,
                      Device device) noexcept {
  return guarded([&]() -> Status {
    const Extents& shape = merged.out.shape;
    const Extents lse_shape = {shape[0], shape[1], shape[2], 1};
    ATTN8_RETURN_IF_ERROR(check_view("merged.out", merged.out, true, device));
    ATTN8_RETURN_IF_ERROR(check_float("merged.out", merged.out));
    if (merged.lse.has_value()) {
      ATTN8_RETURN_IF_ERROR(check_view("merged.lse", *merged.lse, true, device));
      ATTN8_RETURN_IF_ERROR(check_type("merged.lse", *merged.lse, DType::kFloat32));
      ATTN8_RETURN_IF_ERROR(check_shape("merged.lse", *merged.lse, lse_shape, ""));
    }
    for (size_t i = 0; i < states.size(); ++i) {
      const std::string name = "states[" + std::to_string(i) + "]";
      ATTN8_RETURN_IF_ERROR(check_view(name + ".out", states[i].out, false, device));
      ATTN8_RETURN_IF_ERROR(check_float(name + ".out", states[i].out));
      ATTN8_RETURN_IF_ERROR(check_shape(name + ".out", states[i].out, shape, ", as merged.out"));
      ATTN8_RETURN_IF_ERROR(check_view(name + ".lse", states[i].lse, false, device));
      ATTN8_RETURN_IF_ERROR(check_type(name + ".lse", states[i].lse, DType::kFloat32));
      ATTN8_RETURN_IF_ERROR(check_shape(name + ".lse", states[i].lse, lse_shape, ""));
    }
    return {};
  });
}

Status validate_kv_cache(const KvCacheOptions& options) noexcept {
  if (options.nheads_k < 1) {
    return invalid("options.nheads_k got ", options.nheads_k, ", wants >= 1");
  }
  if (options.head_dim < 1 || options.head_dim > 256) {
    return invalid("options.head_dim got ", options.head_dim, ", wants 1 to 256");
  }
  if (options.head_dim_v < 0 || options.head_dim_v > 256) {
    return invalid("options.head_dim_v got ", options.head_dim_v, ", wants 0 to 256");
  }
  ATTN8_RETURN_IF_ERROR(check_kv_block("options.page_size", options.page_size));
  constexpr int64_t kMaxPages = std::numeric_limits<int32_t>::max();
  if (options.max_pages < 1 || options.max_pages > kMaxPages) {
    return invalid("options.max_pages got ", options.max_pages, ", wants 1 to ", kMaxPages);
  }
  // A page is at most 512 tokens of 2 * 256 codes and what belongs to them.
  int64_t blocks = 0;
  if (__builtin_mul_overflow(options.max_pages, options.nheads_k, &blocks) ||
      blocks > kMaxBytes / (int64_t{1} << 20)) {
    return invalid("options.max_pages=", options.max_pages, " of nheads_k=", options.nheads_k,
                   " heads asks for over 2^28 blocks");
  }
  return {};
}

Status validate_kv_append(const KvCacheOptions& options, const ConstTensorView& k,
                          const ConstTensorView& v) noexcept {
  return guarded([&]() -> Status {
    ATTN8_RETURN_IF_ERROR(check_view("k", k, false));
    ATTN8_RETURN_IF_ERROR(check_float("k", k));
    ATTN8_RETURN_IF_ERROR(
        check_shape("k", k, {1, k.shape[1], options.nheads_k, options.head_dim}, ", as the cache"));
    ATTN8_RETURN_IF_ERROR(check_view("v", v, false));
    ATTN8_RETURN_IF_ERROR(check_float("v", v));
    return check_shape("v", v, {1, k.shape[1], options.nheads_k, options.head_dim_v},
                       options.head_dim_v == options.head_dim ? ", as k" : ", as k and head_dim_v");
  });
}

Status validate_finite(std::string_view name, const ConstTensorView& x) noexcept {
  for (int64_t b = 0; b < x.shape[0]; ++b) {
    for (int64_t s = 0; s < x.shape[1]; ++s) {
      for (int64_t h = 0; h < x.shape[2]; ++h) {
        for (int64_t d = 0; d < x.shape[3]; ++d) {
          const int64_t i =
              b * x.strides[0] + s * x.strides[1] + h * x.strides[2] + d * x.strides[3];
          float value = 0;
          if (x.dtype == DType::kFloat32) {
            value = static_cast<const float*>(x.data)[i];
          } else {
            const uint16_t bits = static_cast<const uint16_t*>(x.data)[i];
            value = x.dtype == DType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
          }
          if (!std::isfinite(value)) {
            return invalid(name, "[", b, ", ", s, ", ", h, ", ", d, "] got ", value,
                           ", wants finite numbers");
          }
        }
      }
    }
  }
  return {};
}

}  // namespace attn8
