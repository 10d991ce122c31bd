// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
//
// attn8._core: arrays to views, status to exception, the GIL released in between. What users call,
// with its documentation, is Python: functional.py, quantization.py, reference.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
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

namespace attn8::python {
namespace {

/// out and lse of one call. lse is [batch, nheads_q, seqlen_q] in every layout.
AttentionOutputs to_outputs(nb::handle out, nb::handle lse, Layout layout, Arrays& keep) {
  const Arrays read = keep;
  keep.push_back(import_array(out, "out", 4, true));
  AttentionOutputs outputs{view_of(keep.back(), layout), std::nullopt};
  check_apart(outputs.out, "out", read);
  if (!lse.is_none()) {
    keep.push_back(import_array(lse, "lse", 3, true));
    const Array& array = keep.back();
    const AnyArray& handle = array.handle;
    TensorView view{array.data, array.dtype, array.device, {}, {}};
    view.shape = {static_cast<int64_t>(handle.shape(0)), static_cast<int64_t>(handle.shape(2)),
                  static_cast<int64_t>(handle.shape(1)), 1};
    view.strides = {handle.stride(0), handle.stride(2), handle.stride(1), 1};
    check_apart(view, "lse", read);
    outputs.lse = view;
  }
  return outputs;
}

void attention(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
               nb::handle layout_name, nb::handle mode, nb::handle softmax_scale, nb::handle causal,
               nb::handle align, nb::handle window_size, nb::handle kv_block,
               nb::handle v_granularity, nb::handle smooth_k, nb::handle check_finite,
               nb::handle fp8_format, nb::handle threads, nb::handle isa) {
  const Layout layout = to_layout(layout_name);
  const AttentionOptions options =
      to_options(mode, softmax_scale, causal, align, window_size, kv_block, v_granularity, smooth_k,
                 check_finite, fp8_format);
  const Context context = to_context(threads, isa);
  Arrays keep;
  keep.reserve(11);  // three operands of at most three arrays, out, lse
  const AttentionInputs inputs{to_operand(q, "q", layout, keep), to_operand(k, "k", layout, keep),
                               to_operand(v, "v", layout, keep)};
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

/// Rows [first, last) of a packed array [total, nheads, head_dim] as one sequence of a batch of 1.
TensorView sequence(const Array& array, int64_t first, int64_t last) {
  const AnyArray& handle = array.handle;
  TensorView view{array.data, array.dtype, array.device, {}, {}};
  view.data = static_cast<std::byte*>(view.data) +
              first * handle.stride(0) * static_cast<int64_t>(dtype_bytes(array.dtype));
  view.shape = {1, last - first, static_cast<int64_t>(handle.shape(1)),
                static_cast<int64_t>(handle.shape(2))};
  view.strides = {0, handle.stride(0), handle.stride(1), handle.stride(2)};
  return view;
}

/// Starts of the sequences of a packed array, int32 [batch + 1]: from 0 to `total`, not falling.
std::vector<int64_t> to_starts(nb::handle object, const char* name, size_t total) {
  const Array array = import_array(object, name, 1, false);
  if (array.dtype != DType::kInt32) raise_type_error(name, describe(object), "dtype int32");
  if (array.device.type != DeviceType::kCpu) raise_value_error(name, "device cuda", "the CPU");
  const size_t count = array.handle.shape(0);
  if (count == 0) raise_value_error(name, "no element", "batch + 1 of them");
  std::vector<int64_t> starts(count);
  for (size_t i = 0; i < count; ++i) {
    starts[i] =
        static_cast<const int32_t*>(array.data)[static_cast<int64_t>(i) * array.handle.stride(0)];
    if (starts[i] < (i == 0 ? 0 : starts[i - 1])) {
      raise_value_error(name, std::to_string(starts[i]) + " at " + std::to_string(i),
                        "numbers from 0 that do not fall");
    }
  }
  if (starts.front() != 0 || starts.back() != static_cast<int64_t>(total)) {
    raise_value_error(name, std::to_string(starts.front()) + " to " + std::to_string(starts.back()),
                      "0 to " + std::to_string(total) + ", the number of tokens");
  }
  return starts;
}

void attention_varlen(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                      nb::handle cu_seqlens_q, nb::handle cu_seqlens_k, nb::handle mode,
                      nb::handle softmax_scale, nb::handle causal, nb::handle align,
                      nb::handle window_size, nb::handle kv_block, nb::handle v_granularity,
                      nb::handle smooth_k, nb::handle check_finite, nb::handle fp8_format,
                      nb::handle threads, nb::handle isa) {
  const AttentionOptions options =
      to_options(mode, softmax_scale, causal, align, window_size, kv_block, v_granularity, smooth_k,
                 check_finite, fp8_format);
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
  const auto tokens = static_cast<int64_t>(read[0].handle.shape(0));
  check_apart(sequence(out_array, 0, tokens), "out", read);
  std::optional<Array> lse_array;
  if (!lse.is_none()) {
    lse_array = import_array(lse, "lse", 2, true);
    if (lse_array->handle.shape(1) != read[0].handle.shape(0)) {
      raise_value_error("lse", std::to_string(lse_array->handle.shape(1)) + " tokens",
                        std::to_string(read[0].handle.shape(0)) + ", as q");
    }
  }
  const std::vector<int64_t> q_starts =
      to_starts(cu_seqlens_q, "cu_seqlens_q", read[0].handle.shape(0));
  const std::vector<int64_t> k_starts =
      to_starts(cu_seqlens_k, "cu_seqlens_k", read[1].handle.shape(0));
  if (q_starts.size() != k_starts.size()) {
    raise_value_error("cu_seqlens_k", std::to_string(k_starts.size()) + " numbers",
                      std::to_string(q_starts.size()) + ", as cu_seqlens_q");
  }
  Status status;
  {
    const nb::gil_scoped_release release;
    for (size_t i = 0; i + 1 < q_starts.size() && status.ok(); ++i) {
      const auto part = [&](const Array& array, const std::vector<int64_t>& starts) {
        return sequence(array, starts[i], starts[i + 1]);
      };
      AttentionOutputs outputs{part(out_array, q_starts), std::nullopt};
      if (lse_array.has_value()) {
        const AnyArray& handle = lse_array->handle;  // [nheads_q, total_q]
        TensorView view{static_cast<float*>(lse_array->data) + q_starts[i] * handle.stride(1),
                        lse_array->dtype,
                        lse_array->device,
                        {},
                        {}};
        view.shape = {1, q_starts[i + 1] - q_starts[i], static_cast<int64_t>(handle.shape(0)), 1};
        view.strides = {0, handle.stride(1), handle.stride(0), 1};
        outputs.lse = view;
      }
      status = attn8::attention(
          {ConstTensorView(part(read[0], q_starts)), ConstTensorView(part(read[1], k_starts)),
           ConstTensorView(part(read[2], k_starts))},
          outputs, options, context);
    }
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

/// A new NumPy array that owns `values`.
nb::object to_numpy(std::vector<double>&& values, const std::vector<size_t>& shape) {
  auto* held = new std::vector<double>(std::move(values));
  const nb::capsule owner(held,
                          [](void* p) noexcept { delete static_cast<std::vector<double>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, double>(held->data(), shape.size(), shape.data(), owner));
}

/// Sequence positions of queries, an int32 array; None: all.
std::vector<int64_t> to_rows(nb::handle rows) {
  if (rows.is_none()) return {};
  const Array array = import_array(rows, "rows", 1, false);
  if (array.dtype != DType::kInt32) raise_type_error("rows", describe(rows), "dtype int32");
  std::vector<int64_t> values(array.handle.shape(0));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] =
        static_cast<const int32_t*>(array.data)[static_cast<int64_t>(i) * array.handle.stride(0)];
  }
  if (values.empty()) raise_value_error("rows", "no row", "at least one, or None for all");
  return values;
}

const Extents& shape_of(const Operand& operand) {
  const auto* quantized = std::get_if<QuantizedView>(&operand);
  return quantized != nullptr ? quantized->codes.shape : std::get<ConstTensorView>(operand).shape;
}

/// (out [batch, seqlen_q, nheads_q, head_dim], lse [batch, seqlen_q, nheads_q], bound as out),
/// float64. `exact`: exact_attention, whose bound is empty.
nb::tuple reference_attention(nb::handle q, nb::handle k, nb::handle v, nb::handle layout_name,
                              nb::handle rows, nb::handle exact, nb::handle mode,
                              nb::handle softmax_scale, nb::handle causal, nb::handle align,
                              nb::handle window_size, nb::handle kv_block, nb::handle v_granularity,
                              nb::handle smooth_k, nb::handle fp8_format) {
  const Layout layout = to_layout(layout_name);
  const bool is_exact = to_bool(exact, "exact");
  const AttentionOptions options =
      to_options(mode, softmax_scale, causal, align, window_size, kv_block, v_granularity, smooth_k,
                 nb::cast(false), fp8_format);
  Arrays keep;
  keep.reserve(9);
  const AttentionInputs inputs{to_operand(q, "q", layout, keep), to_operand(k, "k", layout, keep),
                               to_operand(v, "v", layout, keep)};
  const std::vector<int64_t> positions = to_rows(rows);
  if (is_exact && (!std::holds_alternative<ConstTensorView>(inputs.q) ||
                   !std::holds_alternative<ConstTensorView>(inputs.k) ||
                   !std::holds_alternative<ConstTensorView>(inputs.v))) {
    raise_type_error("q, k, v", "a QuantizedTensor", "float arrays");
  }
  const Extents& shape = shape_of(inputs.q);
  std::vector<size_t> lse_shape;
  for (size_t i = 0; i < 3; ++i) lse_shape.push_back(static_cast<size_t>(shape[i]));
  std::vector<size_t> out_shape = lse_shape;
  out_shape.push_back(static_cast<size_t>(shape[3]));
  const size_t tokens = lse_shape[0] * lse_shape[1] * lse_shape[2];
  std::vector<double> out(tokens * out_shape[3]);
  std::vector<double> lse(tokens);
  std::vector<double> bound(is_exact ? 0 : out.size());
  Status status;
  {
    const nb::gil_scoped_release release;
    status = is_exact
                 ? reference::exact_attention(
                       std::get<ConstTensorView>(inputs.q), std::get<ConstTensorView>(inputs.k),
                       std::get<ConstTensorView>(inputs.v), options.softmax_scale, options.mask,
                       out, lse, positions)
                 : reference::emulation(inputs, reference::emulation_options(options), out, lse,
                                        bound, positions);
  }
  check(status);
  return nb::make_tuple(to_numpy(std::move(out), out_shape), to_numpy(std::move(lse), lse_shape),
                        is_exact ? nb::none() : to_numpy(std::move(bound), out_shape));
}

using Doubles = nb::ndarray<nb::ro, double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

/// rel_l2, mean_rel, max_abs, cosine, mre.
std::tuple<double, double, double, double, double> error_report(const Doubles& out,
                                                                const Doubles& reference) {
  if (out.size() != reference.size()) {
    raise_value_error("reference", std::to_string(reference.size()) + " elements",
                      std::to_string(out.size()) + ", as out");
  }
  const reference::ErrorReport report =
      reference::error_report({out.data(), out.size()}, {reference.data(), reference.size()});
  return {report.rel_l2, report.mean_rel, report.max_abs, report.cosine, report.mre};
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

/// Adds a function all of whose arguments may be None: the checks above say what they want.
template <class Returned, class... Arguments>
void add(nb::module_& module, const char* name, Returned (*function)(Arguments...)) {
  module.def(name, function, ((void)sizeof(Arguments), nb::arg().none())...);
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
  add(module, "reference_attention", &reference_attention);
  module.def("error_report", &error_report);
  add(module, "address", &address);
  module.def("isas", &isas);
  module.def("best_isa", [] { return std::string(attn8::to_string(attn8::best_isa())); });
  module.def("version", [] { return std::string(attn8::version()); });
  module.attr("default_kv_block") = attn8::kDefaultKvBlock;
}
