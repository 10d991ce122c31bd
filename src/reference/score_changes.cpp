// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/score_changes.hpp"

#include <cmath>
#include <string>

#include "reference/element.hpp"

namespace attn8::reference {
namespace {

using MaybeView = std::optional<ConstTensorView>;

Status check_extents(const std::string& name, const ConstTensorView& x, const Extents& wanted,
                     const std::array<bool, 4>& may_be_one) {
  for (size_t a = 0; a < 4; ++a) {
    if (x.shape[a] == wanted[a] || (may_be_one[a] && x.shape[a] == 1)) continue;
    return {StatusCode::kInvalidArgument, name + ".shape[" + std::to_string(a) +
                                              "]=" + std::to_string(x.shape[a]) + " must be " +
                                              std::to_string(wanted[a])};
  }
  if (x.data == nullptr && wanted[0] * wanted[1] * wanted[2] * wanted[3] != 0) {
    return {StatusCode::kInvalidArgument, name + ".data=nullptr must hold data"};
  }
  return {};
}

Status check_dtype(const std::string& name, const ConstTensorView& x, bool good) {
  if (good) return {};
  return {StatusCode::kInvalidArgument,
          name + ".dtype=" + std::string(to_string(x.dtype)) + " is not one it may have"};
}

int64_t int_at(const ConstTensorView& x, int64_t b) {
  return static_cast<const int32_t*>(x.data)[b * x.strides[0]];
}

// Element of a view that an extent of 1 repeats.
float broadcast_load(const ConstTensorView& x, int64_t b, int64_t s, int64_t h, int64_t d) {
  const auto at = [&x](size_t axis, int64_t i) { return x.shape[axis] == 1 ? 0 : i; };
  b = at(0, b);
  s = at(1, s);
  h = at(2, h);
  d = at(3, d);
  if (x.dtype == DType::kBool) {
    const int64_t i = b * x.strides[0] + s * x.strides[1] + h * x.strides[2] + d * x.strides[3];
    return static_cast<const uint8_t*>(x.data)[i] != 0 ? 0.0F
                                                       : -std::numeric_limits<float>::infinity();
  }
  return load(x, b, s, h, d);
}

ConstTensorView one_batch(ConstTensorView x, int64_t b) {
  if (x.shape[0] != 1 && x.data != nullptr) {
    const int64_t bytes = b * x.strides[0] * static_cast<int64_t>(dtype_bytes(x.dtype));
    x.data = static_cast<const char*>(x.data) + bytes;
  }
  x.shape[0] = 1;
  return x;
}

Operand one_batch(const Operand& operand, int64_t b, int64_t tokens) {
  if (const auto* x = std::get_if<ConstTensorView>(&operand)) {
    ConstTensorView part = one_batch(*x, b);
    part.shape[1] = tokens;
    return part;
  }
  QuantizedView part = std::get<QuantizedView>(operand);
  part.codes = one_batch(part.codes, b);
  part.codes.shape[1] = tokens;
  part.scale = one_batch(part.scale, b);
  if (part.spec.granularity == Granularity::kToken) part.scale.shape[1] = tokens;
  if (part.spec.granularity == Granularity::kBlock ||
      part.spec.granularity == Granularity::kBlockChannel) {
    part.scale.shape[1] = (tokens + part.spec.block - 1) / part.spec.block;
  }
  if (part.mean) part.mean = one_batch(*part.mean, b);
  return part;
}

}  // namespace

Status check_score_operands(const AttentionInputs& inputs, const Problem& problem) {
  const int64_t batch = problem.batch;
  Status status;
  if (const MaybeView& x = inputs.attn_mask) {
    status = check_extents("attn_mask", *x,
                           {batch, problem.seqlen_q, problem.nheads_q, problem.seqlen_k},
                           {true, true, true, true});
    if (status.ok()) {
      status = check_dtype("attn_mask", *x, x->dtype == DType::kBool || is_float(x->dtype));
    }
  }
  if (const MaybeView& x = inputs.alibi_slopes; x && status.ok()) {
    status = check_extents("alibi_slopes", *x, {batch, 1, problem.nheads_q, 1},
                           {true, false, false, false});
    if (status.ok()) status = check_dtype("alibi_slopes", *x, x->dtype == DType::kFloat32);
  }
  if (const MaybeView& x = inputs.sinks; x && status.ok()) {
    status = check_extents("sinks", *x, {1, 1, problem.nheads_q, 1}, {});
    if (status.ok()) status = check_dtype("sinks", *x, x->dtype == DType::kFloat32);
  }
  for (const auto* x : {&inputs.seqlens_k, &inputs.leftpad_k}) {
    if (!*x || !status.ok()) continue;
    const std::string name = x == &inputs.seqlens_k ? "seqlens_k" : "leftpad_k";
    status = check_extents(name, **x, {batch, 1, 1, 1}, {});
    if (status.ok()) status = check_dtype(name, **x, (*x)->dtype == DType::kInt32);
  }
  for (int64_t b = 0; status.ok() && b < batch; ++b) {
    const Lengths lengths = lengths_of(inputs, b, problem.seqlen_k);
    if (lengths.seqlen_k < 0 || lengths.seqlen_k > problem.seqlen_k || lengths.leftpad_k < 0 ||
        lengths.leftpad_k > lengths.seqlen_k) {
      return {StatusCode::kInvalidArgument,
              "seqlens_k and leftpad_k must hold 0 <= leftpad_k <= seqlens_k <= seqlen_k"};
    }
  }
  return status;
}

void read_row_changes(const Problem& problem, const AttentionInputs& inputs, int64_t b, int64_t i,
                      int64_t h, KeyRange keys, RowChanges& changes) {
  constexpr float kHides = -0x1p100F;
  changes.first = keys.first;
  changes.mask.clear();
  changes.distance.clear();
  for (int64_t j = keys.first; inputs.attn_mask && j < keys.last; ++j) {
    const float added = broadcast_load(*inputs.attn_mask, b, i, h, j);
    changes.mask.push_back(added < kHides ? -std::numeric_limits<float>::infinity() : added);
  }
  if (inputs.alibi_slopes) {
    changes.slope = broadcast_load(*inputs.alibi_slopes, b, 0, h, 0);
    for (int64_t j = keys.first; j < keys.last; ++j) {
      changes.distance.push_back(std::abs(static_cast<double>(problem.position_of(i) - j)));
    }
  }
  if (inputs.sinks) changes.sink = broadcast_load(*inputs.sinks, 0, 0, h, 0);
}

Lengths lengths_of(const AttentionInputs& inputs, int64_t b, int64_t seqlen_k) {
  return {inputs.seqlens_k ? int_at(*inputs.seqlens_k, b) : seqlen_k,
          inputs.leftpad_k ? int_at(*inputs.leftpad_k, b) : 0};
}

AttentionInputs sequence_of(const AttentionInputs& inputs, int64_t b, int64_t seqlen_k) {
  const auto tokens = [](const Operand& operand) {
    const auto* x = std::get_if<ConstTensorView>(&operand);
    return x != nullptr ? x->shape[1] : std::get<QuantizedView>(operand).codes.shape[1];
  };
  AttentionInputs part = {one_batch(inputs.q, b, tokens(inputs.q)),
                          one_batch(inputs.k, b, seqlen_k), one_batch(inputs.v, b, seqlen_k)};
  if (inputs.attn_mask) {
    part.attn_mask = one_batch(*inputs.attn_mask, b);
    if (part.attn_mask->shape[3] != 1) part.attn_mask->shape[3] = seqlen_k;
  }
  if (inputs.alibi_slopes) part.alibi_slopes = one_batch(*inputs.alibi_slopes, b);
  part.sinks = inputs.sinks;
  return part;
}

}  // namespace attn8::reference
