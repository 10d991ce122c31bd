// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/problem.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <string>

#include "reference/score_changes.hpp"

namespace attn8::reference {
namespace {

Status invalid(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }

std::string extents_text(const Extents& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

Status check_memory(const std::string& name, const ConstTensorView& x) {
  int64_t elements = 1;
  for (size_t i = 0; i < x.shape.size(); ++i) {
    if (x.shape[i] < 0) {
      return invalid(name + ".shape[" + std::to_string(i) + "]=" + std::to_string(x.shape[i]) +
                     " must not be negative");
    }
    elements *= x.shape[i] != 0 ? 1 : 0;
  }
  if (x.device.type != DeviceType::kCpu) return invalid(name + ".device must be the CPU");
  if (elements != 0 && x.data == nullptr) return invalid(name + ".data=nullptr must hold data");
  return {};
}

Status check_shape(const std::string& name, const Extents& got, const Extents& wanted) {
  if (got == wanted) return {};
  return invalid(name + ".shape=" + extents_text(got) + " must be " + extents_text(wanted));
}

// Shape of the scales of x as the documentation of Granularity states it.
Extents shape_of_scale(const Extents& x, const QuantSpec& spec) {
  const auto [batch, seq, head, dim] = x;
  const int64_t blocks = spec.block > 0 ? (seq + spec.block - 1) / spec.block : 0;
  switch (spec.granularity) {
    case Granularity::kToken:
      return {batch, seq, head, 1};
    case Granularity::kTensor:
      return {batch, 1, head, 1};
    case Granularity::kChannel:
      return {batch, 1, head, dim};
    case Granularity::kBlock:
      return {batch, blocks, head, 1};
    case Granularity::kBlockChannel:
      return {batch, blocks, head, dim};
  }
  return {};
}

Status check_operand(const std::string& name, const Operand& operand) {
  if (const auto* x = std::get_if<ConstTensorView>(&operand)) {
    if (!is_float(x->dtype)) {
      return invalid(name + ".dtype must be float32, float16 or bfloat16 when not quantized");
    }
    return check_memory(name, *x);
  }
  const auto& x = std::get<QuantizedView>(operand);
  const bool by_block =
      x.spec.granularity == Granularity::kBlock || x.spec.granularity == Granularity::kBlockChannel;
  if (x.codes.dtype != DType::kInt8) return invalid(name + ".codes.dtype must be int8");
  if (x.scale.dtype != DType::kFloat32) return invalid(name + ".scale.dtype must be float32");
  if (by_block && x.spec.block <= 0) {
    return invalid(name + ".spec.block=" + std::to_string(x.spec.block) + " must be positive");
  }
  Status status = check_memory(name + ".codes", x.codes);
  if (status.ok()) {
    status = check_shape(name + ".scale", x.scale.shape, shape_of_scale(x.codes.shape, x.spec));
  }
  if (status.ok()) status = check_memory(name + ".scale", x.scale);
  if (status.ok() && x.mean) {
    if (x.mean->dtype != DType::kFloat32) return invalid(name + ".mean.dtype must be float32");
    const auto [batch, seq, head, dim] = x.codes.shape;
    status = check_shape(name + ".mean", x.mean->shape, {batch, 1, head, dim});
    if (status.ok()) status = check_memory(name + ".mean", *x.mean);
  }
  return status;
}

const Extents& shape_of(const Operand& operand) {
  const auto* x = std::get_if<ConstTensorView>(&operand);
  return x != nullptr ? x->shape : std::get<QuantizedView>(operand).codes.shape;
}

Status check_size(const std::string& name, size_t got, int64_t wanted) {
  if (got == static_cast<size_t>(wanted)) return {};
  return invalid(name + ".size()=" + std::to_string(got) + " must be " + std::to_string(wanted));
}

Status check_window(const std::string& name, int64_t got) {
  if (got >= -1) return {};
  return invalid("mask." + name + "=" + std::to_string(got) + " must be -1 or more");
}

}  // namespace

int64_t Problem::position_of(int64_t i) const {
  const bool bottom_right = mask.align == CausalAlign::kBottomRight;
  return i + mask.q_offset - mask.k_offset + (bottom_right ? seqlen_k - seqlen_q : 0);
}

KeyRange Problem::visible_to(int64_t i) const {
  const int64_t p = position_of(i);
  // Windows wider than the problem are cut to its size, so that no sum can overflow.
  const int64_t widest = seqlen_q + seqlen_k + std::abs(mask.q_offset - mask.k_offset);
  KeyRange range = {leftpad_k, seqlen_k};
  if (mask.causal) range.last = std::min(range.last, p + 1);
  if (mask.window_left >= 0)
    range.first = std::max(range.first, p - std::min(mask.window_left, widest));
  if (mask.window_right >= 0)
    range.last = std::min(range.last, p + std::min(mask.window_right, widest) + 1);
  return range.empty() ? KeyRange{} : range;
}

Status make_problem(const AttentionInputs& inputs, std::optional<float> softmax_scale,
                    const Mask& mask, std::span<double> out, std::span<double> lse,
                    std::span<double> out_bound, Rows rows, Problem& problem) {
  Status status = check_operand("q", inputs.q);
  if (status.ok()) status = check_operand("k", inputs.k);
  if (status.ok()) status = check_operand("v", inputs.v);
  if (!status.ok()) return status;

  const Extents& q = shape_of(inputs.q);
  const Extents& k = shape_of(inputs.k);
  problem.batch = q[0];
  problem.seqlen_q = q[1];
  problem.nheads_q = q[2];
  problem.head_dim = q[3];
  problem.seqlen_k = k[1];
  problem.nheads_k = k[2];
  problem.mask = mask;
  constexpr int64_t kMaxHeadDim = 256;
  if (problem.head_dim < 1 || problem.head_dim > kMaxHeadDim) {
    return invalid("q.shape[3]=" + std::to_string(problem.head_dim) + " must be in [1, 256]");
  }
  if (problem.nheads_q < 1) return invalid("q.shape[2]=0 must be at least 1");
  if (problem.nheads_k < 1 || problem.nheads_q % problem.nheads_k != 0) {
    return invalid("k.shape[2]=" + std::to_string(problem.nheads_k) +
                   " must divide q.shape[2]=" + std::to_string(problem.nheads_q));
  }
  problem.head_dim_v = shape_of(inputs.v)[3];
  if (problem.head_dim_v < 1 || problem.head_dim_v > kMaxHeadDim) {
    return invalid("v.shape[3]=" + std::to_string(problem.head_dim_v) + " must be in [1, 256]");
  }
  status = check_shape("k", k, {q[0], k[1], k[2], q[3]});
  if (status.ok())
    status = check_shape("v", shape_of(inputs.v), {k[0], k[1], k[2], problem.head_dim_v});
  if (status.ok()) status = check_score_operands(inputs, problem);
  if (status.ok()) status = check_window("window_left", mask.window_left);
  if (status.ok()) status = check_window("window_right", mask.window_right);
  if (!status.ok()) return status;

  problem.softmax_scale = softmax_scale.value_or(
      static_cast<float>(1 / std::sqrt(static_cast<double>(problem.head_dim))));
  if (!std::isfinite(problem.softmax_scale)) return invalid("softmax_scale must be finite");

  const int64_t lse_size = problem.batch * problem.seqlen_q * problem.nheads_q;
  status = check_size("out", out.size(), lse_size * problem.head_dim_v);
  if (status.ok() && !lse.empty()) status = check_size("lse", lse.size(), lse_size);
  if (status.ok() && !out_bound.empty()) {
    status = check_size("out_bound", out_bound.size(), lse_size * problem.head_dim_v);
  }
  if (!status.ok()) return status;

  problem.rows.assign(rows.begin(), rows.end());
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] >= 0 && rows[i] < problem.seqlen_q) continue;
    return invalid("rows[" + std::to_string(i) + "]=" + std::to_string(rows[i]) +
                   " must be in [0, " + std::to_string(problem.seqlen_q) + ")");
  }
  if (rows.empty()) {
    problem.rows.resize(static_cast<size_t>(problem.seqlen_q));
    std::iota(problem.rows.begin(), problem.rows.end(), int64_t{0});
  }

  problem.visible = {};
  for (int64_t i = 0; i < problem.seqlen_q; ++i) {
    const KeyRange range = problem.visible_to(i);
    if (range.empty()) continue;
    if (problem.visible.empty()) problem.visible = range;
    problem.visible.first = std::min(problem.visible.first, range.first);
    problem.visible.last = std::max(problem.visible.last, range.last);
  }
  return {};
}

}  // namespace attn8::reference
