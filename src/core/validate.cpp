// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/validate.hpp"

#include <cmath>
#include <limits>
#include <string>

#include "core/element.hpp"
#include "core/kernel_table.hpp"
#include "core/message.hpp"
#include "core/plan_state.hpp"
#include "core/quant_math.hpp"

namespace attn8 {
namespace {

/// More bytes than any address space: keeps every offset of a view far from overflow.
constexpr int64_t kMaxBytes = int64_t{1} << 48;

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

/// Extents, strides and pointer of a view that will be read (or, when written, be distinct
/// elements) on `device`.
Status check_view(std::string_view name, const ConstTensorView& view, bool written,
                  Device device = {}) {
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

Status check_quantized(const std::string& name, const QuantizedView& x, Device device = {}) {
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

/// One of q, k, v: its own consistency and whether the mode takes it in this form.
Status check_operand(const std::string& name, const Operand& operand,
                     const AttentionOptions& options, Device device = {}) {
  const bool is_v = name == "v";
  const Mode mode = options.mode;
  const auto* quantized = std::get_if<QuantizedView>(&operand);
  if (quantized == nullptr) {
    const ConstTensorView& view = *std::get_if<ConstTensorView>(&operand);
    ATTN8_RETURN_IF_ERROR(check_view(name, view, false, device));
    return check_float(name, view);
  }
  if (mode == Mode::kExact || mode == Mode::kFp8 || (mode == Mode::kHalf && is_v)) {
    return invalid(name, " got int8 codes, mode ", to_string(mode), " wants float");
  }
  ATTN8_RETURN_IF_ERROR(check_quantized(name, *quantized, device));
  const Granularity granularity = quantized->spec.granularity;
  if (!is_v && granularity != Granularity::kToken) {
    return invalid(name, ".spec.granularity got ", to_string(granularity), ", wants token");
  }
  if (name != "k" && quantized->mean.has_value()) {
    return invalid(name, ".mean is set, only k may have had its mean subtracted");
  }
  if (is_v && mode == Mode::kPaper && granularity != Granularity::kTensor) {
    return invalid("v.spec.granularity got ", to_string(granularity), ", mode paper wants tensor");
  }
  const int32_t kv_block = options.kv_block == 0 ? kDefaultKvBlock : options.kv_block;
  if (is_v && by_block(granularity) && quantized->spec.block != kv_block) {
    return invalid("v.spec.block got ", quantized->spec.block, ", wants kv_block=", kv_block);
  }
  return {};
}

Status check_kv_block(std::string_view name, int32_t kv_block) {
  if (kv_block < 64 || kv_block > 512 || kv_block % 64 != 0) {
    return invalid(name, " got ", kv_block, ", wants a multiple of 64 in [64, 512]");
  }
  return {};
}

Status check_softmax_scale(std::optional<float> softmax_scale) {
  if (softmax_scale.has_value() && !std::isfinite(*softmax_scale)) {
    return invalid("options.softmax_scale got ", *softmax_scale, ", wants a finite number");
  }
  return {};
}

Status check_mask(const Mask& mask) {
  if (static_cast<int>(mask.align) > static_cast<int>(CausalAlign::kTopLeft)) {
    return invalid("options.mask.align is not a value of attn8::CausalAlign");
  }
  if (mask.window_left < -1) {
    return invalid("options.mask.window_left got ", mask.window_left, ", wants >= -1");
  }
  if (mask.window_right < -1) {
    return invalid("options.mask.window_right got ", mask.window_right, ", wants >= -1");
  }
  return {};
}

Status check_options(const AttentionOptions& options) {
  if (static_cast<int>(options.mode) > static_cast<int>(Mode::kFp8)) {
    return invalid("options.mode is not a value of attn8::Mode");
  }
  if (static_cast<int>(options.v_granularity) > static_cast<int>(Granularity::kBlockChannel)) {
    return invalid("options.v_granularity is not a value of attn8::Granularity");
  }
  if (static_cast<int>(options.fp8_format) > static_cast<int>(Fp8Format::kE5m2Raw)) {
    return invalid("options.fp8_format is not a value of attn8::Fp8Format");
  }
  ATTN8_RETURN_IF_ERROR(check_mask(options.mask));
  ATTN8_RETURN_IF_ERROR(check_softmax_scale(options.softmax_scale));
  const int32_t kv_block = options.kv_block;
  if (kv_block != 0 && (kv_block < 64 || kv_block > 512 || kv_block % 64 != 0)) {
    return invalid("options.kv_block got ", kv_block, ", wants 0 or a multiple of 64 in [64, 512]");
  }
  return {};
}

Status check_shapes(const Extents& q, const Extents& k, const Extents& v) {
  if (k[0] != q[0])
    return invalid("k.shape[0]=", k[0], " must equal q.shape[0]=", q[0], " (batch)");
  if (k[3] != q[3]) {
    return invalid("k.shape[3]=", k[3], " must equal q.shape[3]=", q[3], " (head_dim)");
  }
  if (v != k) return invalid("v.shape got ", text(v), ", wants k.shape=", text(k));
  if (q[3] < 1 || q[3] > 256) return invalid("q.shape[3]=", q[3], " (head_dim) wants 1 to 256");
  if (q[2] < 1) return invalid("q.shape[2]=", q[2], " (nheads_q) wants >= 1");
  if (k[2] < 1) return invalid("k.shape[2]=", k[2], " (nheads_k) wants >= 1");
  if (q[2] % k[2] != 0) {
    return invalid("k.shape[2]=", k[2], " (nheads_k) must divide q.shape[2]=", q[2], " (nheads_q)");
  }
  return {};
}

/// out and lse of a call with queries of shape q.
Status check_outputs(const AttentionOutputs& outputs, const Extents& q, Device device = {}) {
  ATTN8_RETURN_IF_ERROR(check_view("out", outputs.out, true, device));
  ATTN8_RETURN_IF_ERROR(check_float("out", outputs.out));
  ATTN8_RETURN_IF_ERROR(check_shape("out", outputs.out, q, ", as q"));
  if (!outputs.lse.has_value()) return {};
  ATTN8_RETURN_IF_ERROR(check_view("lse", *outputs.lse, true, device));
  ATTN8_RETURN_IF_ERROR(check_type("lse", *outputs.lse, DType::kFloat32));
  return check_shape("lse", *outputs.lse, {q[0], q[1], q[2], 1}, "");
}

/// Turns a failed allocation of a message into a status.
template <class Check>
Status guarded(Check check) noexcept {
  try {
    return check();
  } catch (...) {
    return Status(StatusCode::kOutOfMemory, {});
  }
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

Status validate_attention(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                          const AttentionOptions& options, Device device) noexcept {
  return guarded([&]() -> Status {
    ATTN8_RETURN_IF_ERROR(check_options(options));
    ATTN8_RETURN_IF_ERROR(check_operand("q", inputs.q, options, device));
    ATTN8_RETURN_IF_ERROR(check_operand("k", inputs.k, options, device));
    ATTN8_RETURN_IF_ERROR(check_operand("v", inputs.v, options, device));
    const auto shape_of = [](const Operand& operand) {
      const auto* quantized = std::get_if<QuantizedView>(&operand);
      return quantized != nullptr ? quantized->codes.shape
                                  : std::get_if<ConstTensorView>(&operand)->shape;
    };
    const Extents q = shape_of(inputs.q);
    ATTN8_RETURN_IF_ERROR(check_shapes(q, shape_of(inputs.k), shape_of(inputs.v)));
    return check_outputs(outputs, q, device);
  });
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

Status validate_merge(std::span<const AttentionState> states,
                      const AttentionOutputs& merged) noexcept {
  return guarded([&]() -> Status {
    const Extents& shape = merged.out.shape;
    const Extents lse_shape = {shape[0], shape[1], shape[2], 1};
    ATTN8_RETURN_IF_ERROR(check_view("merged.out", merged.out, true));
    ATTN8_RETURN_IF_ERROR(check_float("merged.out", merged.out));
    if (merged.lse.has_value()) {
      ATTN8_RETURN_IF_ERROR(check_view("merged.lse", *merged.lse, true));
      ATTN8_RETURN_IF_ERROR(check_type("merged.lse", *merged.lse, DType::kFloat32));
      ATTN8_RETURN_IF_ERROR(check_shape("merged.lse", *merged.lse, lse_shape, ""));
    }
    for (size_t i = 0; i < states.size(); ++i) {
      const std::string name = "states[" + std::to_string(i) + "]";
      ATTN8_RETURN_IF_ERROR(check_view(name + ".out", states[i].out, false));
      ATTN8_RETURN_IF_ERROR(check_float(name + ".out", states[i].out));
      ATTN8_RETURN_IF_ERROR(check_shape(name + ".out", states[i].out, shape, ", as merged.out"));
      ATTN8_RETURN_IF_ERROR(check_view(name + ".lse", states[i].lse, false));
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
    return check_shape("v", v, k.shape, ", as k");
  });
}

Status validate_kv_attention(const KvCacheOptions& cache, int64_t sequences, const Operand& q,
                             std::span<const int32_t> cu_seqlens_q, const AttentionOutputs& outputs,
                             const KvCacheAttentionOptions& options) noexcept {
  return guarded([&]() -> Status {
    ATTN8_RETURN_IF_ERROR(check_softmax_scale(options.softmax_scale));
    ATTN8_RETURN_IF_ERROR(check_mask(options.mask));
    ATTN8_RETURN_IF_ERROR(check_operand("q", q, {}));
    const Extents& shape = data_view(q).shape;
    if (shape[0] != 1 || shape[3] != cache.head_dim) {
      return invalid("q.shape got ", text(shape), ", wants [1, total, nheads_q, ", cache.head_dim,
                     "]");
    }
    if (shape[2] < 1 || shape[2] % cache.nheads_k != 0) {
      return invalid("q.shape[2]=", shape[2],
                     " (nheads_q) wants a multiple of nheads_k=", cache.nheads_k);
    }
    const auto wanted = static_cast<size_t>(sequences) + 1;
    if (cu_seqlens_q.size() != wanted) {
      return invalid("cu_seqlens_q got ", cu_seqlens_q.size(), " entries, wants ", wanted);
    }
    if (cu_seqlens_q.front() != 0 || cu_seqlens_q.back() != shape[1]) {
      return invalid("cu_seqlens_q runs from ", cu_seqlens_q.front(), " to ", cu_seqlens_q.back(),
                     ", wants 0 to q.shape[1]=", shape[1]);
    }
    for (size_t i = 1; i < wanted; ++i) {
      if (cu_seqlens_q[i] >= cu_seqlens_q[i - 1]) continue;
      return invalid("cu_seqlens_q[", i, "]=", cu_seqlens_q[i], " wants at least the ",
                     cu_seqlens_q[i - 1], " before it");
    }
    return check_outputs(outputs, shape);
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
