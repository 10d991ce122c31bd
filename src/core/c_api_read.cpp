// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// From the structs of attn8.h to the operands of the C++ API.
#include <algorithm>
#include <iterator>

#include "core/c_api.hpp"
#include "core/c_structs.hpp"
#include "core/message.hpp"

namespace attn8 {

using namespace c_structs;  // NOLINT: written for this

namespace {

Status read_tensor(const std::string& name, const attn8_tensor* in, TensorView& view,
                   const attn8_quantization*& quantization) {
  attn8_tensor tensor = {};
  ATTN8_RETURN_IF_ERROR(read(name, in, offsetof(attn8_tensor, quantization), tensor));
  view.data = tensor.data;
  view.dtype = enumerator<DType>(tensor.dtype);
  view.device = {enumerator<DeviceType>(tensor.device_type), tensor.device_index};
  std::copy_n(tensor.shape, 4, view.shape.begin());
  std::copy_n(tensor.strides, 4, view.strides.begin());
  quantization = tensor.quantization;
  return {};
}

}  // namespace

Status c_api::read_plain(const std::string& name, const attn8_tensor* in, TensorView& view) {
  const attn8_quantization* quantization = nullptr;
  ATTN8_RETURN_IF_ERROR(read_tensor(name, in, view, quantization));
  if (quantization != nullptr) return invalid(name, ".quantization is set, wants NULL");
  return {};
}

Status c_api::read_optional(const std::string& name, const attn8_tensor* in,
                            std::optional<TensorView>& view) {
  if (in == nullptr) return {};
  return read_plain(name, in, view.emplace());
}

Status c_api::read_operand(const std::string& name, const attn8_tensor* in, Operand& operand) {
  TensorView view;
  const attn8_quantization* in_quantization = nullptr;
  ATTN8_RETURN_IF_ERROR(read_tensor(name, in, view, in_quantization));
  if (in_quantization == nullptr) {
    operand = ConstTensorView(view);
    return {};
  }
  attn8_quantization quantization = {};
  ATTN8_RETURN_IF_ERROR(read(name + ".quantization", in_quantization,
                             offsetof(attn8_quantization, mean), quantization));
  ATTN8_RETURN_IF_ERROR(check_reserved(name + ".quantization", quantization.reserved));
  TensorView scale;
  std::optional<TensorView> mean;
  ATTN8_RETURN_IF_ERROR(read_plain(name + ".scale", quantization.scale, scale));
  ATTN8_RETURN_IF_ERROR(read_optional(name + ".mean", quantization.mean, mean));
  QuantizedView quantized;
  quantized.codes = view;
  quantized.scale = scale;
  quantized.spec = {enumerator<Granularity>(quantization.granularity), quantization.block};
  if (mean.has_value()) quantized.mean = *mean;
  operand = quantized;
  return {};
}

Status c_api::read_scores(const attn8_score_operands* in, AttentionInputs& inputs) {
  if (in == nullptr) return {};
  attn8_score_operands scores = {};
  ATTN8_RETURN_IF_ERROR(read("scores", in, kUnit, scores));
  ATTN8_RETURN_IF_ERROR(check_reserved("scores", scores.reserved));
  struct Field {
    const char* name;
    const attn8_tensor* tensor;
    std::optional<ConstTensorView>& view;
  };
  for (const Field& field : {Field{"attn_mask", scores.attn_mask, inputs.attn_mask},
                             {"alibi_slopes", scores.alibi_slopes, inputs.alibi_slopes},
                             {"sinks", scores.sinks, inputs.sinks},
                             {"seqlens_k", scores.seqlens_k, inputs.seqlens_k},
                             {"leftpad_k", scores.leftpad_k, inputs.leftpad_k},
                             {"cu_seqlens_q", scores.cu_seqlens_q, inputs.cu_seqlens_q},
                             {"cu_seqlens_k", scores.cu_seqlens_k, inputs.cu_seqlens_k}}) {
    std::optional<TensorView> view;
    ATTN8_RETURN_IF_ERROR(read_optional(field.name, field.tensor, view));
    if (view.has_value()) field.view = *view;
  }
  return {};
}

Status c_api::read_head_modes(const int32_t* in, int64_t count, int64_t nheads_k,
                              std::vector<Mode>& head_modes) {
  if (count == 0) return {};
  // So much of the caller's memory is read.
  if (count != nheads_k || count < 0) {
    return invalid("options.head_modes got ", count, " modes, wants nheads_k=", nheads_k);
  }
  if (in == nullptr) return invalid("params.head_modes got NULL");
  std::transform(in, in + count, std::back_inserter(head_modes), enumerator<Mode>);
  return {};
}

}  // namespace attn8
