// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <string>

#include "core/message.hpp"
#include "core/overlap.hpp"
#include "core/plan_state.hpp"
#include "core/quant_math.hpp"
#include "core/validate.hpp"
#include "core/view_checks.hpp"

namespace attn8 {
namespace {

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

Status check_softmax_scale(std::optional<float> softmax_scale) {
  if (softmax_scale.has_value() && !std::isfinite(*softmax_scale)) {
    return invalid("options.softmax_scale got ", *softmax_scale, ", wants a finite number");
  }
  return {};
}

Status check_softcap(float softcap) {
  // The bounds keep softmax_scale / softcap and 64 log2(e) softcap far from the ends of float32.
  if (softcap == 0 || (softcap >= 0x1p-20f && softcap <= 0x1p20f)) return {};
  return invalid("options.softcap got ", softcap, ", wants 0 or 2^-20 to 2^20");
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
  for (const auto& [name, offset] :
       {std::pair<const char*, int64_t>{"q_offset", mask.q_offset}, {"k_offset", mask.k_offset}}) {
    if (offset >= -kMaxBytes && offset <= kMaxBytes) continue;
    return invalid("options.mask.", name, " got ", offset, ", wants -2^48 to 2^48");
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
  ATTN8_RETURN_IF_ERROR(check_softcap(options.softcap));
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
  if (v != Extents{k[0], k[1], k[2], v[3]}) {
    return invalid("v.shape got ", text(v), ", wants k.shape=", text(k), " but for head_dim_v");
  }
  if (q[3] < 1 || q[3] > 256) return invalid("q.shape[3]=", q[3], " (head_dim) wants 1 to 256");
  if (v[3] < 1 || v[3] > 256) return invalid("v.shape[3]=", v[3], " (head_dim_v) wants 1 to 256");
  if (q[2] < 1) return invalid("q.shape[2]=", q[2], " (nheads_q) wants >= 1");
  if (k[2] < 1) return invalid("k.shape[2]=", k[2], " (nheads_k) wants >= 1");
  if (q[2] % k[2] != 0) {
    return invalid("k.shape[2]=", k[2], " (nheads_k) must divide q.shape[2]=", q[2], " (nheads_q)");
  }
  return {};
}

/// Each of the first `count` extents is `wanted`'s or 1.
Status check_broadcast(std::string_view name, const ConstTensorView& view, const Extents& wanted,
                       std::string_view why) {
  for (size_t i = 0; i < 4; ++i) {
    if (view.shape[i] == wanted[i] || view.shape[i] == 1) continue;
    return invalid(name, ".shape got ", text(view.shape), ", wants ", text(wanted), why,
                   ", each also 1");
  }
  return {};
}

/// What changes the scores of queries of shape q against seqlen_k keys. sequences: that
/// alibi_slopes may tell apart.
Status check_score_operands(const AttentionInputs& inputs, const Extents& q, int64_t sequences,
                            int64_t seqlen_k, Device device) {
  if (const auto& mask = inputs.attn_mask; mask.has_value()) {
    ATTN8_RETURN_IF_ERROR(check_view("attn_mask", *mask, false, device));
    if (mask->dtype != DType::kBool && !is_float(mask->dtype)) {
      return invalid("attn_mask.dtype got ", to_string(mask->dtype),
                     ", wants bool, float32, float16 or bfloat16");
    }
    ATTN8_RETURN_IF_ERROR(check_broadcast("attn_mask", *mask, {q[0], q[1], q[2], seqlen_k},
                                          " (batch, seqlen_q, nheads_q, seqlen_k)"));
  }
  if (const auto& slopes = inputs.alibi_slopes; slopes.has_value()) {
    ATTN8_RETURN_IF_ERROR(check_view("alibi_slopes", *slopes, false, device));
    ATTN8_RETURN_IF_ERROR(check_type("alibi_slopes", *slopes, DType::kFloat32));
    if (slopes->shape != Extents{1, 1, q[2], 1}) {
      ATTN8_RETURN_IF_ERROR(
          check_shape("alibi_slopes", *slopes, {sequences, 1, q[2], 1}, " or a first extent of 1"));
    }
  }
  if (const auto& sinks = inputs.sinks; sinks.has_value()) {
    ATTN8_RETURN_IF_ERROR(check_view("sinks", *sinks, false, device));
    ATTN8_RETURN_IF_ERROR(check_type("sinks", *sinks, DType::kFloat32));
    ATTN8_RETURN_IF_ERROR(check_shape("sinks", *sinks, {1, 1, q[2], 1}, ""));
  }
  return {};
}

Status check_int32(std::string_view name, const ConstTensorView& view, int64_t count,
                   Device device) {
  ATTN8_RETURN_IF_ERROR(check_view(name, view, false, device));
  ATTN8_RETURN_IF_ERROR(check_type(name, view, DType::kInt32));
  return check_shape(name, view, {count, 1, 1, 1}, "");
}

/// The lengths of sequences: seqlens_k, leftpad_k, cu_seqlens_q and cu_seqlens_k.
Status check_lengths(const AttentionInputs& inputs, const Extents& q, Device device) {
  if (inputs.seqlens_k.has_value()) {
    ATTN8_RETURN_IF_ERROR(check_int32("seqlens_k", *inputs.seqlens_k, q[0], device));
  }
  if (inputs.leftpad_k.has_value()) {
    ATTN8_RETURN_IF_ERROR(check_int32("leftpad_k", *inputs.leftpad_k, q[0], device));
  }
  if (inputs.cu_seqlens_q.has_value() != inputs.cu_seqlens_k.has_value()) {
    return invalid(inputs.cu_seqlens_q.has_value() ? "cu_seqlens_q" : "cu_seqlens_k",
                   " is set alone, wants cu_seqlens_q and cu_seqlens_k");
  }
  if (!inputs.cu_seqlens_q.has_value()) return {};
  const int64_t count = std::max<int64_t>(1, inputs.cu_seqlens_q->shape[0]);
  ATTN8_RETURN_IF_ERROR(check_int32("cu_seqlens_q", *inputs.cu_seqlens_q, count, device));
  ATTN8_RETURN_IF_ERROR(check_int32("cu_seqlens_k", *inputs.cu_seqlens_k, count, device));
  if (q[0] != 1) {
    return invalid("q.shape[0]=", q[0], " (batch) wants 1 with cu_seqlens_q: [1, total, ...]");
  }
  if (inputs.seqlens_k.has_value() || inputs.leftpad_k.has_value()) {
    return invalid(inputs.seqlens_k.has_value() ? "seqlens_k" : "leftpad_k",
                   " is set beside cu_seqlens_k, wants one of the two");
  }
  if (const auto* v = std::get_if<QuantizedView>(&inputs.v);
      v != nullptr && by_block(v->spec.granularity)) {
    return invalid("v.spec.granularity got ", to_string(v->spec.granularity),
                   ", wants token, tensor or channel with cu_seqlens_k");
  }
  return {};
}

/// Offsets [0, sequences] of packed sequences in host memory: from 0 to total, not decreasing.
template <class At>
Status check_offsets(std::string_view name, int64_t sequences, std::string_view tensor,
                     int64_t total, const At& at) {
  if (at(0) != 0 || at(sequences) != total) {
    return invalid(name, " runs from ", at(0), " to ", at(sequences), ", wants 0 to ", tensor,
                   ".shape[1]=", total);
  }
  for (int64_t i = 1; i <= sequences; ++i) {
    if (at(i) >= at(i - 1)) continue;
    return invalid(name, "[", i, "]=", at(i), " wants at least the ", at(i - 1), " before it");
  }
  return {};
}

int64_t int_at(const ConstTensorView& view, int64_t i) {
  return static_cast<const int32_t*>(view.data)[i * view.strides[0]];
}

/// The values of cu_seqlens_q and cu_seqlens_k, and whether attn_mask has the keys they want.
Status check_ragged_values(const AttentionInputs& inputs) {
  if (!inputs.cu_seqlens_q.has_value()) return {};
  const ConstTensorView& cu_seqlens_q = *inputs.cu_seqlens_q;
  const ConstTensorView& cu_seqlens_k = *inputs.cu_seqlens_k;
  const int64_t sequences = cu_seqlens_q.shape[0] - 1;
  ATTN8_RETURN_IF_ERROR(check_offsets("cu_seqlens_q", sequences, "q", data_view(inputs.q).shape[1],
                                      [&](int64_t i) { return int_at(cu_seqlens_q, i); }));
  ATTN8_RETURN_IF_ERROR(check_offsets("cu_seqlens_k", sequences, "k", data_view(inputs.k).shape[1],
                                      [&](int64_t i) { return int_at(cu_seqlens_k, i); }));
  int64_t longest = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    longest = std::max(longest, int_at(cu_seqlens_k, i + 1) - int_at(cu_seqlens_k, i));
  }
  return validate_ragged_mask(inputs.attn_mask, longest);
}

/// out and lse of a call with queries of shape q.
Status check_outputs(const AttentionOutputs& outputs, const Extents& q, int64_t head_dim_v,
                     Device device = {}) {
  ATTN8_RETURN_IF_ERROR(check_view("out", outputs.out, true, device));
  ATTN8_RETURN_IF_ERROR(check_float("out", outputs.out));
  ATTN8_RETURN_IF_ERROR(check_shape("out", outputs.out, {q[0], q[1], q[2], head_dim_v},
                                    head_dim_v == q[3] ? ", as q" : ", as q and head_dim_v"));
  if (!outputs.lse.has_value()) return {};
  ATTN8_RETURN_IF_ERROR(check_view("lse", *outputs.lse, true, device));
  ATTN8_RETURN_IF_ERROR(check_type("lse", *outputs.lse, DType::kFloat32));
  return check_shape("lse", *outputs.lse, {q[0], q[1], q[2], 1}, "");
}

/// The modes of attention over a cache, and whether q suits them.
Status check_kv_modes(const KvCacheOptions& cache, const Operand& q,
                      const KvCacheAttentionOptions& options) {
  const std::span<const Mode> modes = options.head_modes;
  if (!modes.empty() && static_cast<int64_t>(modes.size()) != cache.nheads_k) {
    return invalid("options.head_modes got ", modes.size(),
                   " modes, wants nheads_k=", cache.nheads_k);
  }
  for (const Mode mode : modes.empty() ? std::span(&options.mode, 1) : modes) {
    AttentionOptions of_mode;
    of_mode.mode = mode;
    ATTN8_RETURN_IF_ERROR(check_options(of_mode));
    if (mode == Mode::kPaper || mode == Mode::kFp8) {
      return failure(StatusCode::kUnsupported, "options.mode got ", to_string(mode),
                     ", a cache of INT8 tokens wants accurate, half or exact");
    }
    ATTN8_RETURN_IF_ERROR(check_operand("q", q, of_mode));
  }
  return {};
}

/// kInvalidArgument when out or lse shares memory with what `input` names.
Status check_apart(const AttentionOutputs& outputs, std::string_view name,
                   const ConstTensorView& input) {
  if (overlap(outputs.out, input))
    return invalid("out overlaps ", name, ", wants memory of its own");
  if (outputs.lse.has_value() && overlap(*outputs.lse, input)) {
    return invalid("lse overlaps ", name, ", wants memory of its own");
  }
  return {};
}

Status check_apart(const AttentionOutputs& outputs, const std::string& name,
                   const Operand& operand) {
  const auto* quantized = std::get_if<QuantizedView>(&operand);
  if (quantized == nullptr) {
    return check_apart(outputs, std::string_view(name), *std::get_if<ConstTensorView>(&operand));
  }
  ATTN8_RETURN_IF_ERROR(check_apart(outputs, std::string_view(name + ".codes"), quantized->codes));
  ATTN8_RETURN_IF_ERROR(check_apart(outputs, std::string_view(name + ".scale"), quantized->scale));
  if (!quantized->mean.has_value()) return {};
  return check_apart(outputs, std::string_view(name + ".mean"), *quantized->mean);
}

}  // namespace

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
    const Extents v = shape_of(inputs.v);
    ATTN8_RETURN_IF_ERROR(check_shapes(q, shape_of(inputs.k), v));
    ATTN8_RETURN_IF_ERROR(check_lengths(inputs, q, device));
    // Of packed sequences: how many keys attn_mask has to have, their lengths say.
    const bool ragged = inputs.cu_seqlens_q.has_value();
    const int64_t mask_keys =
        ragged && inputs.attn_mask.has_value() ? inputs.attn_mask->shape[3] : v[1];
    ATTN8_RETURN_IF_ERROR(check_score_operands(inputs, q, sequences_of(inputs), mask_keys, device));
    return check_outputs(outputs, q, v[3], device);
  });
}

Status validate_no_overlap(const AttentionInputs& inputs,
                           const AttentionOutputs& outputs) noexcept {
  return guarded([&]() -> Status {
    ATTN8_RETURN_IF_ERROR(check_apart(outputs, "q", inputs.q));
    ATTN8_RETURN_IF_ERROR(check_apart(outputs, "k", inputs.k));
    ATTN8_RETURN_IF_ERROR(check_apart(outputs, "v", inputs.v));
    for (const auto& [name, input] : {std::pair<const char*, const std::optional<ConstTensorView>&>{
                                          "attn_mask", inputs.attn_mask},
                                      {"alibi_slopes", inputs.alibi_slopes},
                                      {"sinks", inputs.sinks},
                                      {"seqlens_k", inputs.seqlens_k},
                                      {"leftpad_k", inputs.leftpad_k},
                                      {"cu_seqlens_q", inputs.cu_seqlens_q},
                                      {"cu_seqlens_k", inputs.cu_seqlens_k}}) {
      if (input.has_value()) {
        ATTN8_RETURN_IF_ERROR(check_apart(outputs, std::string_view(name), *input));
      }
    }
    if (outputs.lse.has_value() && overlap(outputs.out, *outputs.lse)) {
      return invalid("lse overlaps out, wants memory of its own");
    }
    return {};
  });
}

Status validate_kv_attention(const KvCacheOptions& cache, int64_t sequences, const Operand& q,
                             std::span<const int32_t> cu_seqlens_q, const AttentionOutputs& outputs,
                             const KvCacheAttentionOptions& options) noexcept {
  return guarded([&]() -> Status {
    ATTN8_RETURN_IF_ERROR(check_softmax_scale(options.softmax_scale));
    ATTN8_RETURN_IF_ERROR(check_softcap(options.softcap));
    ATTN8_RETURN_IF_ERROR(check_mask(options.mask));
    ATTN8_RETURN_IF_ERROR(check_kv_modes(cache, q, options));
    const Extents& shape = data_view(q).shape;
    if (shape[0] != 1 || shape[3] != cache.head_dim) {
      return invalid("q.shape got ", text(shape), ", wants [1, total, nheads_q, ", cache.head_dim,
                     "]");
    }
    if (shape[2] < 1 || shape[2] % cache.nheads_k != 0) {
      return invalid("q.shape[2]=", shape[2],
                     " (nheads_q) wants a multiple of nheads_k=", cache.nheads_k);
    }
    AttentionInputs scores = {q, q, q};
    scores.attn_mask = options.attn_mask;
    scores.alibi_slopes = options.alibi_slopes;
    scores.sinks = options.sinks;
    // How many keys there are, validate_ragged_mask() sees.
    const int64_t keys = options.attn_mask.has_value() ? options.attn_mask->shape[3] : 0;
    ATTN8_RETURN_IF_ERROR(check_score_operands(scores, shape, 1, keys, {}));
    ATTN8_RETURN_IF_ERROR(validate_score_values(scores));
    ATTN8_RETURN_IF_ERROR(
        validate_cu_seqlens("cu_seqlens_q", sequences, "q", shape[1], cu_seqlens_q));
    ATTN8_RETURN_IF_ERROR(check_outputs(outputs, shape, cache.head_dim_v));
    return validate_no_overlap(scores, outputs);
  });
}

Status validate_cu_seqlens(std::string_view name, int64_t sequences, std::string_view tensor,
                           int64_t total, std::span<const int32_t> cu_seqlens) noexcept {
  return guarded([&]() -> Status {
    const auto wanted = static_cast<size_t>(sequences) + 1;
    if (cu_seqlens.size() != wanted) {
      return invalid(name, " got ", cu_seqlens.size(), " entries, wants ", wanted);
    }
    return check_offsets(name, sequences, tensor, total,
                         [&](int64_t i) { return cu_seqlens[static_cast<size_t>(i)]; });
  });
}

Status validate_ragged_mask(const std::optional<ConstTensorView>& attn_mask,
                            int64_t longest) noexcept {
  if (!attn_mask.has_value() || attn_mask->shape[3] == 1 || attn_mask->shape[3] >= longest) {
    return {};
  }
  return invalid("attn_mask.shape[3]=", attn_mask->shape[3], " wants 1 or at least ", longest,
                 ", the tokens of the longest sequence");
}

Status validate_score_values(const AttentionInputs& inputs) noexcept {
  ATTN8_RETURN_IF_ERROR(guarded([&] { return check_ragged_values(inputs); }));
  const Extents& k = data_view(inputs.k).shape;
  for (int64_t b = 0; b < k[0]; ++b) {
    int64_t length = k[1];
    if (inputs.seqlens_k.has_value()) {
      length = int_at(*inputs.seqlens_k, b);
      if (length < 0 || length > k[1]) {
        return invalid("seqlens_k[", b, "] got ", length, ", wants 0 to seqlen_k=", k[1]);
      }
    }
    if (!inputs.leftpad_k.has_value()) continue;
    const int64_t leftpad = int_at(*inputs.leftpad_k, b);
    if (leftpad < 0 || leftpad > length) {
      return invalid("leftpad_k[", b, "] got ", leftpad, ", wants 0 to the sequence's ", length,
                     " keys");
    }
  }
  if (!inputs.alibi_slopes.has_value()) return {};
  const ConstTensorView& slopes = *inputs.alibi_slopes;
  for (int64_t b = 0; b < slopes.shape[0]; ++b) {
    for (int64_t h = 0; h < slopes.shape[2]; ++h) {
      const float slope =
          static_cast<const float*>(slopes.data)[b * slopes.strides[0] + h * slopes.strides[2]];
      if (std::isfinite(slope) && std::abs(slope) <= 0x1p20f) continue;
      return invalid("alibi_slopes[", b, ", 0, ", h, ", 0] got ", slope,
                     ", wants at most 2^20 in magnitude");
    }
  }
  return {};
}

}  // namespace attn8
