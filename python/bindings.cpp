// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
//
// attn8._core: arrays to views, status to exception, the GIL released in between. What users call,
// with its documentation, is Python: functional.py, quantization.py, reference.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "arguments.hpp"
#include "attn8/attn8.hpp"
#include "rotation.hpp"

namespace attn8::python {
namespace {

void attention(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
               nb::handle layout_name, nb::handle mode, nb::handle softmax_scale, nb::handle causal,
               nb::handle align, nb::handle window_size, nb::handle kv_block,
               nb::handle v_granularity, nb::handle smooth_k, nb::handle check_finite,
               nb::handle fp8_format, nb::handle threads, nb::handle isa, nb::handle changes,
               nb::handle head_modes) {
  const Layout layout = to_layout(layout_name);
  AttentionOptions options = to_options(mode, softmax_scale, causal, align, window_size, kv_block,
                                        v_granularity, smooth_k, check_finite, fp8_format);
  const std::vector<Mode> modes = to_head_modes(head_modes);
  options.head_modes = modes;
  const Context context = to_context(threads, isa);
  Arrays keep;
  keep.reserve(16);  // three operands of at most three arrays, five of changes, out, lse
  AttentionInputs inputs{to_operand(q, "q", layout, keep), to_operand(k, "k", layout, keep),
                         to_operand(v, "v", layout, keep)};
  add_changes(changes, inputs, options, keep);
  const AttentionOutputs outputs = to_outputs(out, lse, layout, keep);
  Status status;
  {
    const nb::gil_scoped_release release;
    status = attn8::attention(inputs, outputs, options, context);
  }
  check(status);
}

/// Shortest time in seconds that attn8::attention() itself takes with default options: what a call
/// from Python is compared with.
double attention_seconds(nb::handle q, nb::handle k, nb::handle v, nb::handle out,
                         nb::handle repeats) {
  Arrays keep;
  keep.reserve(4);
  const AttentionInputs inputs{to_operand(q, "q", Layout::kBshd, keep),
                               to_operand(k, "k", Layout::kBshd, keep),
                               to_operand(v, "v", Layout::kBshd, keep)};
  const AttentionOutputs outputs = to_outputs(out, nb::none(), Layout::kBshd, keep);
  const int64_t count = to_int(repeats, "repeats");
  double shortest = std::numeric_limits<double>::infinity();
  Status status;
  {
    const nb::gil_scoped_release release;
    for (int64_t i = 0; i < count && status.ok(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      status = attn8::attention(inputs, outputs, {}, Context::cpu(1));
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      shortest = std::min(shortest, taken.count());
    }
  }
  check(status);
  return shortest;
}

void attention_varlen(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                      nb::handle cu_seqlens_q, nb::handle cu_seqlens_k, nb::handle mode,
                      nb::handle softmax_scale, nb::handle causal, nb::handle align,
                      nb::handle window_size, nb::handle kv_block, nb::handle v_granularity,
                      nb::handle smooth_k, nb::handle check_finite, nb::handle fp8_format,
                      nb::handle threads, nb::handle isa, nb::handle changes,
                      nb::handle head_modes) {
  AttentionOptions options = to_options(mode, softmax_scale, causal, align, window_size, kv_block,
                                        v_granularity, smooth_k, check_finite, fp8_format);
  const std::vector<Mode> modes = to_head_modes(head_modes);
  options.head_modes = modes;
  const Context context = to_context(threads, isa);
  const Arrays read = {import_array(q, "q", 3, false), import_array(k, "k", 3, false),
                       import_array(v, "v", 3, false)};
  if (read[2].handle.shape(0) != read[1].handle.shape(0)) {
    raise_value_error("v", std::to_string(read[2].handle.shape(0)) + " tokens",
                      std::to_string(read[1].handle.shape(0)) + ", as k");
  }
  const Array out_array = import_array(out, "out", 3, true);
  if (out_array.handle.shape(0) != read[0].handle.shape(0)) {
    raise_value_error("out", std::to_string(out_array.handle.shape(0)) + " tokens",
                      std::to_string(read[0].handle.shape(0)) + ", as q");
  }
  AttentionInputs inputs{packed_view(read[0]), packed_view(read[1]), packed_view(read[2])};
  Arrays changes_kept;
  add_changes(changes, inputs, options, changes_kept);
  AttentionOutputs outputs{packed_view(out_array), std::nullopt};
  check_apart(outputs.out, "out", read);
  std::optional<Array> lse_array;
  if (!lse.is_none()) {
    lse_array = import_array(lse, "lse", 2, true);
    if (lse_array->handle.shape(1) != read[0].handle.shape(0)) {
      raise_value_error("lse", std::to_string(lse_array->handle.shape(1)) + " tokens",
                        std::to_string(read[0].handle.shape(0)) + ", as q");
    }
    outputs.lse = packed_lse(*lse_array);
  }
  const std::vector<int32_t> q_starts =
      to_starts(cu_seqlens_q, "cu_seqlens_q", read[0].handle.shape(0));
  const std::vector<int32_t> k_starts =
      to_starts(cu_seqlens_k, "cu_seqlens_k", read[1].handle.shape(0));
  if (q_starts.size() != k_starts.size()) {
    raise_value_error("cu_seqlens_k", std::to_string(k_starts.size()) + " numbers",
                      std::to_string(q_starts.size()) + ", as cu_seqlens_q");
  }
  const Extents numbers = {std::ssize(q_starts), 1, 1, 1};
  inputs.cu_seqlens_q = bshd(q_starts.data(), DType::kInt32, numbers);
  inputs.cu_seqlens_k = bshd(k_starts.data(), DType::kInt32, numbers);
  Status status;
  {
    const nb::gil_scoped_release release;
    status = attn8::attention(inputs, outputs, options, context);
  }
  check(status);
}

/// Lists of outs and of lses, one of each per part.
void merge_states(nb::handle outs, nb::handle lses, nb::handle out, nb::handle lse,
                  nb::handle layout_name, nb::handle threads, nb::handle target) {
  const Layout layout = to_layout(layout_name);
  const Context context = to_place(threads, target);
  const auto out_list = to_list(outs, "outs");
  const auto lse_list = to_list(lses, "lses");
  if (nb::len(lse_list) != nb::len(out_list)) {
    raise_value_error("lses", std::to_string(nb::len(lse_list)) + " of them",
                      std::to_string(nb::len(out_list)) + ", as outs");
  }
  Arrays keep;
  std::vector<AttentionState> states;
  for (size_t i = 0; i < nb::len(out_list); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    keep.push_back(import_array(out_list[i], "outs" + index, 4, false));
    AttentionState state;
    state.out = view_of(keep.back(), layout);
    keep.push_back(import_array(lse_list[i], "lses" + index, 3, false));
    state.lse = lse_view(keep.back());
    states.push_back(state);
  }
  const AttentionOutputs merged = to_outputs(out, lse, layout, keep);
  Status status;
  {
    const nb::gil_scoped_release release;
    status = attn8::merge_states(states, merged, context);
  }
  check(status);
}

void quantize(nb::handle x, nb::handle codes, nb::handle scale, nb::handle mean,
              nb::handle mean_use, nb::handle layout_name, nb::handle granularity, nb::handle block,
              nb::handle threads) {
  const Layout layout = to_layout(layout_name);
  const Context context = to_context(threads, nb::none());
  QuantSpec spec;
  Result<Granularity> parsed = parse_granularity(to_text(granularity, "granularity"));
  check(parsed.status());
  spec.granularity = parsed.value();
  spec.block = to_int32(block, "block");
  const std::string use_name = to_text(mean_use, "mean_use");
  const Mean use = use_name == "compute" ? Mean::kCompute
                   : use_name == "given" ? Mean::kGiven
                                         : Mean::kNone;
  const Arrays read = {import_array(x, "x", 4, false)};
  if (!is_float(read[0].dtype)) {
    raise_type_error("x", describe(x), "float32, float16 or bfloat16");
  }
  const Array codes_array = import_array(codes, "codes", 4, true);
  const Array scale_array = import_array(scale, "scale", 4, true);
  const TensorView codes_view = view_of(codes_array, layout);
  const TensorView scale_view = view_of(scale_array, layout);
  check_apart(codes_view, "codes", read);
  check_apart(scale_view, "scale", read);
  Array mean_array;
  std::optional<TensorView> mean_view;
  if (!mean.is_none()) {
    mean_array = import_array(mean, "mean", 4, use == Mean::kCompute);
    mean_view = view_of(mean_array, layout);
  }
  Status status;
  {
    const nb::gil_scoped_release release;
    status = attn8::quantize(view_of(read[0], layout), spec, codes_view, scale_view, context, use,
                             mean_view);
  }
  check(status);
}

void dequantize(nb::handle x, nb::handle out, nb::handle layout_name, nb::handle threads) {
  const Layout layout = to_layout(layout_name);
  const Context context = to_context(threads, nb::none());
  Arrays keep;
  keep.reserve(4);
  const QuantizedView view = to_quantized(x, "x", layout, keep);
  const Array out_array = import_array(out, "out", 4, true);
  const TensorView out_view = view_of(out_array, layout);
  check_apart(out_view, "out", keep);
  Status status;
  {
    const nb::gil_scoped_release release;
    status = attn8::dequantize(view, out_view, context);
  }
  check(status);
}

/// x rotated, to out [.., head_dim], which may be x itself.
void rotate(nb::handle x, nb::handle out, nb::handle threads) {
  const Context context = to_context(threads, nb::none());
  const Arrays read = {import_array(x, "x", 4, false)};
  const Array written = import_array(out, "out", 4, true);
  const TensorView from = view_of(read[0], Layout::kBshd);
  const TensorView to = view_of(written, Layout::kBshd);
  for (const auto& [view, name, handle] : {std::tuple(from, "x", x), std::tuple(to, "out", out)}) {
    if (!is_float(view.dtype)) {
      raise_type_error(name, describe(handle), "float32, float16 or bfloat16");
    }
    if (view.device.type != DeviceType::kCpu) raise_value_error(name, "device cuda", "the CPU");
  }
  if (from.shape[3] < 1 || from.shape[3] > kMaxRotatedDim) {
    raise_value_error("x", "head_dim " + std::to_string(from.shape[3]), "1 to 256");
  }
  if (to.shape != from.shape) raise_value_error("out", "another shape", "that of x");
  const bool same = to.data == from.data && to.dtype == from.dtype && to.strides == from.strides;
  if (!same) check_apart(to, "out", read);
  const nb::gil_scoped_release release;
  rotate_rows(from, to, context.threads);
}

/// (name, available, why not) of every instruction set, best first.
std::vector<std::tuple<std::string, bool, std::string>> isas() {
  std::vector<std::tuple<std::string, bool, std::string>> found;
  for (const IsaSupport& support : isa_support()) {
    found.emplace_back(to_string(support.isa), support.available, support.reason);
  }
  return found;
}

/// Where the first element of an array lies as the library sees it: proves that nothing is copied.
uintptr_t address(nb::handle array) {
  return reinterpret_cast<uintptr_t>(import_array(array, "array", 4, false).data);
}

}  // namespace
}  // namespace attn8::python

NB_MODULE(_core, module) {
  using namespace attn8::python;  // NOLINT: the functions above, in one list
  add(module, "attention", &attention);
  add(module, "attention_seconds", &attention_seconds);
  add(module, "attention_varlen", &attention_varlen);
  add(module, "quantize", &quantize);
  add(module, "dequantize", &dequantize);
  add(module, "merge_states", &merge_states);
  add(module, "rotate", &rotate);
  add_reference(module);
  add_kv_cache(module);
  add_cuda(module);
  add(module, "address", &address);
  module.def("isas", &isas);
  module.def("best_isa", [] { return std::string(attn8::to_string(attn8::best_isa())); });
  module.def("version", [] { return std::string(attn8::version()); });
  module.attr("default_kv_block") = attn8::kDefaultKvBlock;
}
