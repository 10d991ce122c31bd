// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/sequences.hpp"

#include <string>

namespace attn8::reference {
namespace {

int64_t int_at(const ConstTensorView& x, int64_t i) {
  return static_cast<const int32_t*>(x.data)[i * x.strides[0]];
}

const ConstTensorView& tokens_in(const Operand& operand) {
  const auto* x = std::get_if<ConstTensorView>(&operand);
  return x != nullptr ? *x : std::get<QuantizedView>(operand).codes;
}

// Entries [first, first + count) along an axis.
ConstTensorView stretch(ConstTensorView x, size_t axis, int64_t first, int64_t count) {
  const auto bytes = static_cast<int64_t>(dtype_bytes(x.dtype));
  if (count > 0) {
    x.data = static_cast<const std::byte*>(x.data) + first * x.strides[axis] * bytes;
  }
  x.shape[axis] = count;
  return x;
}

Operand stretch(const Operand& operand, int64_t first, int64_t count) {
  if (const auto* x = std::get_if<ConstTensorView>(&operand)) return stretch(*x, 1, first, count);
  QuantizedView part = std::get<QuantizedView>(operand);
  part.codes = stretch(part.codes, 1, first, count);
  if (part.spec.granularity == Granularity::kToken) {
    part.scale = stretch(part.scale, 1, first, count);
  }
  return part;
}

Status check_starts(const std::string& name, const ConstTensorView& starts, int64_t tokens) {
  bool good = starts.shape == Extents{starts.shape[0], 1, 1, 1} && starts.shape[0] >= 1 &&
              starts.dtype == DType::kInt32 && starts.data != nullptr && int_at(starts, 0) == 0 &&
              int_at(starts, starts.shape[0] - 1) == tokens;
  for (int64_t i = 1; good && i < starts.shape[0]; ++i) {
    good = int_at(starts, i - 1) <= int_at(starts, i);
  }
  if (good) return {};
  return {StatusCode::kInvalidArgument, name + " must be int32 that run from 0 to " +
                                            std::to_string(tokens) + " without decreasing"};
}

/// attn_mask and alibi_slopes have what every sequence asks of them.
Status check_shared_operands(const AttentionInputs& inputs) {
  const int64_t sequences = inputs.cu_seqlens_q->shape[0] - 1;
  if (inputs.attn_mask) {
    const Extents& shape = inputs.attn_mask->shape;
    bool good = shape[1] == 1 || shape[1] == packed_queries(inputs);
    for (int64_t i = 0; i < sequences; ++i) {
      good = good && (shape[3] == 1 || shape[3] >= packed_sequence(inputs, i).keys);
    }
    if (!good) {
      return {StatusCode::kInvalidArgument,
              "attn_mask must have a row for each of q, with the keys of the longest sequence"};
    }
  }
  if (inputs.alibi_slopes && inputs.alibi_slopes->shape[0] != 1 &&
      inputs.alibi_slopes->shape[0] != sequences) {
    return {StatusCode::kInvalidArgument, "alibi_slopes must have a row for each sequence"};
  }
  return {};
}

}  // namespace

int64_t packed_queries(const AttentionInputs& inputs) { return tokens_in(inputs.q).shape[1]; }

Status check_packed(const AttentionInputs& inputs) {
  if (!inputs.cu_seqlens_q || !inputs.cu_seqlens_k || inputs.seqlens_k || inputs.leftpad_k) {
    return {StatusCode::kInvalidArgument,
            "cu_seqlens_q and cu_seqlens_k must come together, without seqlens_k and leftpad_k"};
  }
  const Extents& k = tokens_in(inputs.k).shape;
  const Extents& v = tokens_in(inputs.v).shape;
  if (tokens_in(inputs.q).shape[0] != 1 || k[0] != 1 || v[0] != 1 || v[1] != k[1]) {
    return {StatusCode::kInvalidArgument,
            "q, k and v must be [1, total, ...] with cu_seqlens_q, v with the tokens of k"};
  }
  const auto* v_codes = std::get_if<QuantizedView>(&inputs.v);
  if (v_codes != nullptr && (v_codes->spec.granularity == Granularity::kBlock ||
                             v_codes->spec.granularity == Granularity::kBlockChannel)) {
    return {StatusCode::kInvalidArgument, "v must not be quantized by block with cu_seqlens_k"};
  }
  Status status = check_starts("cu_seqlens_q", *inputs.cu_seqlens_q, packed_queries(inputs));
  if (status.ok()) status = check_starts("cu_seqlens_k", *inputs.cu_seqlens_k, k[1]);
  if (status.ok() && inputs.cu_seqlens_q->shape[0] != inputs.cu_seqlens_k->shape[0]) {
    return {StatusCode::kInvalidArgument, "cu_seqlens_q and cu_seqlens_k must be of one length"};
  }
  return status.ok() ? check_shared_operands(inputs) : status;
}

PackedSequence packed_sequence(const AttentionInputs& inputs, int64_t i) {
  PackedSequence sequence;
  sequence.first_query = int_at(*inputs.cu_seqlens_q, i);
  sequence.queries = int_at(*inputs.cu_seqlens_q, i + 1) - sequence.first_query;
  sequence.first_key = int_at(*inputs.cu_seqlens_k, i);
  sequence.keys = int_at(*inputs.cu_seqlens_k, i + 1) - sequence.first_key;
  return sequence;
}

AttentionInputs operands_of(const AttentionInputs& inputs, int64_t i,
                            const PackedSequence& sequence) {
  AttentionInputs part = {stretch(inputs.q, sequence.first_query, sequence.queries),
                          stretch(inputs.k, sequence.first_key, sequence.keys),
                          stretch(inputs.v, sequence.first_key, sequence.keys)};
  if (inputs.attn_mask) {
    part.attn_mask = *inputs.attn_mask;
    if (part.attn_mask->shape[1] != 1) {
      part.attn_mask = stretch(*part.attn_mask, 1, sequence.first_query, sequence.queries);
    }
    // Its keys count from the start of the sequence.
    if (part.attn_mask->shape[3] != 1) part.attn_mask->shape[3] = sequence.keys;
  }
  if (inputs.alibi_slopes) {
    part.alibi_slopes = *inputs.alibi_slopes;
    if (part.alibi_slopes->shape[0] != 1) part.alibi_slopes = stretch(*part.alibi_slopes, 0, i, 1);
  }
  part.sinks = inputs.sinks;
  return part;
}

}  // namespace attn8::reference
