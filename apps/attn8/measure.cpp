// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "measure.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <span>
#include <utility>

#include "failure.hpp"
#include "parallel.hpp"
#include "recipes.hpp"

namespace attn8::app {
namespace {

/// The part of a broadcast operand for one batch entry and head.
ConstTensorView slice_broadcast(ConstTensorView x, int64_t batch, int64_t head) {
  return slice_heads(x, x.shape[0] == 1 ? 0 : batch, x.shape[2] == 1 ? 0 : head, 1);
}

/// Operands of one query head: q [1, seqlen_q, 1, dim], k and v [1, seqlen_k, 1, dim].
AttentionInputs head_inputs(const Qkv& qkv, int64_t batch, int64_t head) {
  const int64_t group = qkv.q.shape()[2] / qkv.k.shape()[2];
  AttentionInputs inputs = {slice_heads(qkv.q.view(), batch, head, 1),
                            slice_heads(qkv.k.view(), batch, head / group, 1),
                            slice_heads(qkv.v.view(), batch, head / group, 1)};
  const AttentionInputs all = qkv.inputs();
  if (all.attn_mask) inputs.attn_mask = slice_broadcast(*all.attn_mask, batch, head);
  if (all.alibi_slopes) inputs.alibi_slopes = slice_broadcast(*all.alibi_slopes, batch, head);
  if (all.sinks) inputs.sinks = slice_broadcast(*all.sinks, batch, head);
  return inputs;
}

using HeadOracle =
    std::function<Status(const AttentionInputs&, std::span<double> out, reference::Rows rows)>;

/// Runs the oracle over the heads of the sample in parallel; the rows are split too when there are
/// fewer heads than threads.
std::vector<double> oracle_rows(const Qkv& qkv, const Sample& sample, int32_t threads,
                                const HeadOracle& oracle) {
  const auto heads = static_cast<int64_t>(sample.heads.size());
  const auto rows = static_cast<int64_t>(sample.rows.size());
  const int64_t dim = qkv.v.shape()[3];
  if (heads == 0 || rows == 0) return {};
  const int64_t parts = std::clamp<int64_t>(threads / heads, 1, rows);
  std::vector<double> result(static_cast<size_t>(heads * rows * dim));
  parallel_cases(heads * parts, threads, [&](int64_t i) {
    const int64_t head = i / parts;
    const int64_t begin = (i % parts) * rows / parts;
    const int64_t end = (i % parts + 1) * rows / parts;
    const auto [batch, query_head] = sample.heads[static_cast<size_t>(head)];
    const reference::Rows part =
        std::span(sample.rows)
            .subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
    std::vector<double> out(static_cast<size_t>(qkv.q.shape()[1] * dim));
    require(oracle(head_inputs(qkv, batch, query_head), out, part));
    for (int64_t r = begin; r < end; ++r) {
      const auto* row = out.data() + sample.rows[static_cast<size_t>(r)] * dim;
      std::copy(row, row + dim, result.data() + (head * rows + r) * dim);
    }
  });
  return result;
}

}  // namespace

std::string Shape::label() const {
  return fmt::format("{}x{}x{} {}x{} d{}", batch, nheads_q, nheads_k, seqlen_q, seqlen_k, head_dim);
}

double visible_pairs(int64_t seqlen_q, int64_t seqlen_k, const Mask& mask) {
  const int64_t shift = mask.align == CausalAlign::kBottomRight ? seqlen_k - seqlen_q : 0;
  int64_t pairs = 0;
  for (int64_t i = 0; i < seqlen_q; ++i) {
    const int64_t diagonal = i + shift;
    int64_t first = 0;
    int64_t last = seqlen_k - 1;
    if (mask.causal) last = std::min(last, diagonal);
    if (mask.window_left >= 0) first = std::max(first, diagonal - mask.window_left);
    if (mask.window_right >= 0) last = std::min(last, diagonal + mask.window_right);
    pairs += std::max<int64_t>(0, last - first + 1);
  }
  return static_cast<double>(pairs);
}

AttentionInputs Qkv::inputs() const {
  AttentionInputs inputs = {q.view(), k.view(), v.view()};
  if (attn_mask) inputs.attn_mask = std::as_const(*attn_mask).view();
  if (alibi_slopes) inputs.alibi_slopes = std::as_const(*alibi_slopes).view();
  if (sinks) inputs.sinks = std::as_const(*sinks).view();
  return inputs;
}

Shape Qkv::shape() const {
  return {q.shape()[0], q.shape()[2], k.shape()[2], q.shape()[1], k.shape()[1], q.shape()[3]};
}

Qkv make_qkv(const std::string& recipe, uint64_t seed, const Shape& shape) {
  const Recipe* found = find_recipe(recipe);
  if (found == nullptr) {
    std::string names;
    for (const Recipe& one : recipes()) names += fmt::format(" {}", one.name);
    fail(StatusCode::kInvalidArgument,
         fmt::format("--recipe: got '{}', want one of:{}", recipe, names));
  }
  const Extents q = {shape.batch, shape.seqlen_q, shape.nheads_q, shape.head_dim};
  const Extents k = {shape.batch, shape.seqlen_k, shape.nheads_k, shape.head_dim};
  Qkv qkv = {HostTensor(DType::kFloat32, q), HostTensor(DType::kFloat32, k),
             HostTensor(DType::kFloat32, k)};
  fill(
      *found, seed,
      {shape.batch, shape.seqlen_q, shape.seqlen_k, shape.nheads_q, shape.nheads_k, shape.head_dim},
      qkv.q.floats(), qkv.k.floats(), qkv.v.floats(), true);
  return qkv;
}

Qkv convert(const Qkv& qkv, DType dtype) {
  return {convert(qkv.q.view(), dtype), convert(qkv.k.view(), dtype), convert(qkv.v.view(), dtype)};
}

Runner::Runner(const Qkv& qkv, const AttentionOptions& options, const Context& context,
               bool with_lse, Layout layout, std::optional<DType> out_dtype)
    : device_(context.device), inputs_(qkv.inputs()), with_lse_(with_lse) {
  const Extents& q = qkv.q.shape();
  const Extents shape = {q[0], q[1], q[2], qkv.v.shape()[3]};
  out_ = HostTensor(out_dtype.value_or(qkv.q.dtype()), shape, layout);
  if (with_lse) lse_ = HostTensor(DType::kFloat32, {shape[0], shape[1], shape[2], 1}, layout);
  if (device_.type == DeviceType::kCuda) copy_to_cuda(qkv);
  plan_ = take(AttentionPlan::make(inputs_, outputs(), options, context));
  if (device_.type == DeviceType::kCuda) {
    cuda_.push_back(take(CudaMemory::allocate(plan_->workspace_bytes(), device_.index)));
  } else {
    workspace_ = AlignedBytes(plan_->workspace_bytes());
  }
}

void Runner::copy_to_cuda(const Qkv& qkv) {
  for (const HostTensor* tensor : {&qkv.q, &qkv.k, &qkv.v}) {
    cuda_.push_back(take(CudaMemory::allocate(tensor->size_bytes(), device_.index)));
    require(cuda_.back().upload(tensor->data()));
  }
  for (const HostTensor* tensor : {&out_, &lse_}) {
    cuda_.push_back(take(CudaMemory::allocate(tensor->size_bytes(), device_.index)));
  }
  const auto view = [&](const HostTensor& tensor, size_t i) {
    ConstTensorView result = tensor.view();
    result.data = cuda_[i].data();
    result.device = device_;
    return result;
  };
  inputs_ = {view(qkv.q, 0), view(qkv.k, 1), view(qkv.v, 2)};
}

RunTimes Runner::run() {
  if (device_.type == DeviceType::kCuda) return run_on_cuda();
  RunTimes times;
  require(plan_->run(inputs_, outputs(), workspace_.span(), &times));
  return times;
}

RunTimes Runner::run_on_cuda() {
  require(cuda_synchronize(device_.index));
  const auto begin = std::chrono::steady_clock::now();
  require(plan_->run(inputs_, outputs(), {cuda_[5].data(), cuda_[5].size()}));
  require(cuda_synchronize(device_.index));
  const std::chrono::duration<double, std::milli> elapsed =
      std::chrono::steady_clock::now() - begin;
  require(cuda_[3].download(out_.data()));
  if (with_lse_) require(cuda_[4].download(lse_.data()));
  return {0, elapsed.count()};
}

AttentionOutputs Runner::outputs() {
  AttentionOutputs outputs = {out_.view()};
  if (with_lse_) outputs.lse = lse_.view();
  if (device_.type == DeviceType::kCuda) {
    outputs.out.data = cuda_[3].data();
    outputs.out.device = device_;
    if (with_lse_) {
      outputs.lse->data = cuda_[4].data();
      outputs.lse->device = device_;
    }
  }
  return outputs;
}

std::vector<int64_t> spread_positions(int64_t count, int64_t wanted) {
  std::vector<int64_t> positions;
  if (count <= wanted) {
    for (int64_t i = 0; i < count; ++i) positions.push_back(i);
  } else if (wanted == 1) {
    positions.push_back(count - 1);
  } else {
    for (int64_t i = 0; i < wanted; ++i) positions.push_back(i * (count - 1) / (wanted - 1));
  }
  return positions;
}

Sample Sample::spread(const Shape& shape, int64_t max_rows, int64_t max_heads) {
  Sample sample;
  sample.rows = spread_positions(shape.seqlen_q, max_rows);
  for (const int64_t i : spread_positions(shape.batch * shape.nheads_q, max_heads)) {
    sample.heads.emplace_back(i / shape.nheads_q, i % shape.nheads_q);
  }
  return sample;
}

std::vector<double> gather(const ConstTensorView& x, const Sample& sample) {
  std::vector<double> result;
  for (const auto& [batch, head] : sample.heads) {
    const auto rows = gather_rows(slice_heads(x, batch, head, 1), sample.rows);
    result.insert(result.end(), rows.begin(), rows.end());
  }
  return result;
}

std::vector<double> exact_rows(const Qkv& qkv, const AttentionOptions& options,
                               const Sample& sample, int32_t threads) {
  return oracle_rows(qkv, sample, threads,
                     [&](const AttentionInputs& head, std::span<double> out, reference::Rows rows) {
                       return reference::exact_attention(head, options, out, {}, rows);
                     });
}

std::vector<double> exact_rows(const Qkv& qkv, std::optional<float> softmax_scale, const Mask& mask,
                               const Sample& sample, int32_t threads) {
  AttentionOptions options;
  options.softmax_scale = softmax_scale;
  options.mask = mask;
  return exact_rows(qkv, options, sample, threads);
}

std::vector<double> emulated_rows(const Qkv& qkv, const reference::EmulationOptions& options,
                                  const Sample& sample, int32_t threads) {
  return oracle_rows(qkv, sample, threads,
                     [&](const AttentionInputs& head, std::span<double> out, reference::Rows rows) {
                       return reference::emulation(head, options, out, {}, {}, rows);
                     });
}

std::vector<double> mode_rows(const Qkv& qkv, const AttentionOptions& options,
                              const Context& context, const Sample& sample) {
  if (options.mode == Mode::kFp8) {
    return emulated_rows(qkv, reference::emulation_options(options), sample, context.threads);
  }
  Runner runner(qkv, options, context, false, Layout::kBshd, DType::kFloat32);
  runner.run();
  return gather(runner.out().view(), sample);
}

std::vector<NamedMode> compared_modes() {
  std::vector<NamedMode> modes = {{"accurate", {}, 0},
                                  {"half", {}, 2},
                                  {"paper", {}, 1},
                                  {"fp8_e4m3", {}, 3},
                                  {"fp8_e5m2", {}, 5}};
  modes[1].options.mode = Mode::kHalf;
  modes[2].options.mode = Mode::kPaper;
  modes[3].options.mode = Mode::kFp8;
  modes[4].options.mode = Mode::kFp8;
  modes[4].options.fp8_format = Fp8Format::kE5m2Raw;
  return modes;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const size_t middle = values.size() / 2;
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(middle),
                   values.end());
  if (values.size() % 2 == 1) return values[middle];
  return (values[middle] +
          *std::max_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(middle))) /
         2;
}

}  // namespace attn8::app
