// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
//
// The float64 oracles; attn8/reference.py documents them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "arguments.hpp"
#include "attn8/attn8.hpp"

namespace attn8::python {
namespace {

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
                              nb::handle smooth_k, nb::handle fp8_format, nb::handle changes) {
  const Layout layout = to_layout(layout_name);
  const bool is_exact = to_bool(exact, "exact");
  AttentionOptions options = to_options(mode, softmax_scale, causal, align, window_size, kv_block,
                                        v_granularity, smooth_k, nb::cast(false), fp8_format);
  Arrays keep;
  keep.reserve(14);
  AttentionInputs inputs{to_operand(q, "q", layout, keep), to_operand(k, "k", layout, keep),
                         to_operand(v, "v", layout, keep)};
  add_changes(changes, inputs, options, keep);
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
  out_shape.push_back(static_cast<size_t>(shape_of(inputs.v)[3]));
  const size_t tokens = lse_shape[0] * lse_shape[1] * lse_shape[2];
  std::vector<double> out(tokens * out_shape[3]);
  std::vector<double> lse(tokens);
  std::vector<double> bound(is_exact ? 0 : out.size());
  Status status;
  {
    const nb::gil_scoped_release release;
    status = is_exact ? reference::exact_attention(inputs, options, out, lse, positions)
                      : reference::emulation(inputs, reference::emulation_options(options), out,
                                             lse, bound, positions);
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

}  // namespace

void add_reference(nb::module_& module) {
  add(module, "reference_attention", &reference_attention);
  module.def("error_report", &error_report);
}

}  // namespace attn8::python
