// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "arguments.hpp"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>

namespace attn8::python {
namespace {

/// DLPack's device types that this library knows: kDLCPU, kDLCUDA, kDLCUDAHost.
constexpr int kDlpackCpu = 1;
constexpr int kDlpackCuda = 2;
constexpr int kDlpackCudaHost = 3;

[[noreturn]] void raise_of_package(const char* name, const std::string& text) {
  const nb::object type = nb::module_::import_("attn8.errors").attr(name);
  PyErr_SetString(type.ptr(), text.c_str());
  throw nb::python_error();
}

/// The text of a status without the C++ path of an option: "options.mask.window_left" is
/// "window_left" in Python.
std::string python_text(std::string text) {
  for (const std::string_view prefix : {"options.mask.", "options.", "context."}) {
    if (text.starts_with(prefix)) return text.substr(prefix.size());
  }
  return text;
}

std::string class_name(nb::handle object) {
  return nb::cast<std::string>(nb::handle(object.type()).attr("__name__"));
}

/// nanobind's casters may leave a Python error behind when they refuse; none of them is ours.
template <class T>
bool try_cast(nb::handle object, T& out, bool convert) {
  const bool done = nb::try_cast<T>(object, out, convert);
  if (!done) PyErr_Clear();
  return done;
}

/// An attribute, or an invalid handle where there is none.
nb::object attribute(nb::handle object, const char* name) {
  PyObject* found = PyObject_GetAttrString(object.ptr(), name);
  if (found == nullptr) PyErr_Clear();
  return nb::steal(found);
}

/// What DLPack does not say of a torch tensor: that it requires grad, and that its memory holds the
/// negatives of its numbers.
void check_tensor(nb::handle object, const std::string& name) {
  const nb::object grad = attribute(object, "requires_grad");
  if (!grad.is_valid()) return;
  if (grad.ptr() == Py_True) {
    raise_value_error(name, class_name(object) + " that requires grad",
                      "one that does not: attn8 has no backward pass (torch.no_grad(), detach())");
  }
  const nb::object is_neg = attribute(object, "is_neg");
  if (is_neg.is_valid() && is_neg().ptr() == Py_True) {
    raise_value_error(name, class_name(object) + " with torch's negative bit",
                      "one without it (resolve_neg())");
  }
}

std::optional<DType> to_dtype(const nb::dlpack::dtype& dtype) {
  using nb::dlpack::dtype_code;
  if (dtype.lanes != 1) return std::nullopt;
  const auto is = [&](dtype_code code, int bits) {
    return dtype.code == static_cast<uint8_t>(code) && dtype.bits == bits;
  };
  if (is(dtype_code::Float, 32)) return DType::kFloat32;
  if (is(dtype_code::Float, 16)) return DType::kFloat16;
  if (is(dtype_code::Bfloat, 16)) return DType::kBFloat16;
  if (is(dtype_code::Int, 8)) return DType::kInt8;
  if (is(dtype_code::Int, 32)) return DType::kInt32;
  if (is(dtype_code::Bool, 8)) return DType::kBool;
  return std::nullopt;
}

template <class T>
T parse(nb::handle object, const char* name, Result<T> (*parse_name)(std::string_view) noexcept) {
  Result<T> value = parse_name(to_text(object, name));
  check(value.status());
  return value.value();
}

}  // namespace

void raise(const Status& status) {
  const std::string text = python_text(status.message());
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
      throw nb::value_error(text.c_str());
    case StatusCode::kUnsupported:
      raise_of_package("UnsupportedError", text);
    case StatusCode::kUnavailable:
      raise_of_package("UnavailableError", text);
    case StatusCode::kOutOfMemory:
      PyErr_SetString(PyExc_MemoryError, text.c_str());
      throw nb::python_error();
    case StatusCode::kOk:
    case StatusCode::kDeviceError:
    case StatusCode::kInternal:
      break;
  }
  PyErr_SetString(PyExc_RuntimeError, text.c_str());
  throw nb::python_error();
}

void check(const Status& status) {
  if (!status.ok()) raise(status);
}

void raise_type_error(const std::string& name, const std::string& got, const std::string& want) {
  throw nb::type_error((name + ": got " + got + ", want " + want).c_str());
}

void raise_value_error(const std::string& name, const std::string& got, const std::string& want) {
  throw nb::value_error((name + ": got " + got + ", want " + want).c_str());
}

std::string describe(nb::handle object) {
  std::string text = class_name(object);
  constexpr size_t kLongest = 60;  // keeps the message one short line whatever was passed
  if (PyUnicode_Check(object.ptr()) || PyLong_Check(object.ptr()) || PyFloat_Check(object.ptr())) {
    PyObject* shown = PyObject_Repr(object.ptr());  // an int of over 4300 digits has none
    if (shown == nullptr) {
      PyErr_Clear();
      return text;
    }
    const std::string value = nb::cast<std::string>(nb::steal(shown));
    return text + " " + (value.size() > kLongest ? value.substr(0, kLongest) + "..." : value);
  }
  PyObject* dtype = PyObject_GetAttrString(object.ptr(), "dtype");
  if (dtype == nullptr) {
    PyErr_Clear();
    return text;
  }
  const nb::object held = nb::steal(dtype);
  PyObject* shown = PyObject_Str(held.ptr());
  if (shown == nullptr) {
    PyErr_Clear();
    return text;
  }
  const std::string value = nb::cast<std::string>(nb::steal(shown));
  return text + " of dtype " + (value.size() > kLongest ? value.substr(0, kLongest) : value);
}

bool to_bool(nb::handle object, const char* name) {
  bool value = false;
  if (!try_cast(object, value, false)) raise_type_error(name, describe(object), "a bool");
  return value;
}

int64_t to_int(nb::handle object, const char* name) {
  if (PyBool_Check(object.ptr()) || !PyIndex_Check(object.ptr())) {
    raise_type_error(name, describe(object), "an int");
  }
  PyObject* index = PyNumber_Index(object.ptr());
  if (index == nullptr) {
    PyErr_Clear();
    raise_type_error(name, describe(object), "an int");
  }
  const nb::object held = nb::steal(index);
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(held.ptr(), &overflow);
  if (overflow != 0) raise_value_error(name, describe(held), "an int of 64 bits");
  return value;
}

int32_t to_int32(nb::handle object, const char* name) {
  const int64_t value = to_int(object, name);
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    raise_value_error(name, std::to_string(value), "an int of 32 bits");
  }
  return static_cast<int32_t>(value);
}

std::optional<float> to_optional_float(nb::handle object, const char* name) {
  if (object.is_none()) return std::nullopt;
  double value = 0;
  if (PyBool_Check(object.ptr()) || PyUnicode_Check(object.ptr()) ||
      !try_cast(object, value, true)) {
    raise_type_error(name, describe(object), "a float or None");
  }
  return static_cast<float>(value);
}

std::string to_text(nb::handle object, const char* name) {
  if (!PyUnicode_Check(object.ptr())) raise_type_error(name, describe(object), "a str");
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (text == nullptr) {  // a lone surrogate
    PyErr_Clear();
    raise_value_error(name, "str that is not UTF-8", "a name");
  }
  return {text, static_cast<size_t>(size)};
}

nb::list to_list(nb::handle object, const char* name) {
  if (!PyList_Check(object.ptr())) raise_type_error(name, describe(object), "a list");
  return nb::borrow<nb::list>(object);
}

Layout to_layout(nb::handle object) {
  const std::string name = to_text(object, "layout");
  if (name == "bshd") return Layout::kBshd;
  if (name == "bhsd") return Layout::kBhsd;
  raise_value_error("layout", describe(object), "'bshd' or 'bhsd'");
}

Array import_array(nb::handle object, const std::string& name, size_t rank, bool written) {
  check_tensor(object, name);
  Array array;
  if (written) {
    nb::ndarray<> writable;
    if (!try_cast(object, writable, false)) {
      AnyArray readable;
      if (try_cast(object, readable, false)) {
        raise_value_error(name, "read-only " + class_name(object), "an array to write to");
      }
      raise_type_error(name, describe(object), "an array that is written to through DLPack");
    }
    array.handle = AnyArray(writable);
  } else if (!try_cast(object, array.handle, false)) {
    raise_type_error(name, describe(object),
                     "an array that shares its memory through DLPack (NumPy, torch, JAX, ...)");
  }
  const AnyArray& handle = array.handle;
  const std::optional<DType> dtype = to_dtype(handle.dtype());
  if (!dtype.has_value()) {
    raise_type_error(
        name, describe(object),
        "float32, float16 or bfloat16 (codes: int8, lengths: int32, masks: also bool)");
  }
  array.dtype = *dtype;
  if (handle.ndim() != rank) {
    raise_value_error(name, std::to_string(handle.ndim()) + " dimensions", std::to_string(rank));
  }
  switch (handle.device_type()) {
    case kDlpackCpu:
    case kDlpackCudaHost:
      break;
    case kDlpackCuda:
      array.device = {DeviceType::kCuda, handle.device_id()};
      break;
    default:
      raise_value_error(name, "device type " + std::to_string(handle.device_type()) + " of DLPack",
                        "the CPU");
  }
  array.data = const_cast<void*>(handle.data());  // NOLINT: what is written came in writable
  if (reinterpret_cast<uintptr_t>(array.data) % dtype_bytes(array.dtype) != 0) {
    raise_value_error(name, "memory that is not aligned to its elements", "an aligned array");
  }
  return array;
}

TensorView view_of(const Array& array, Layout layout) {
  TensorView view;
  view.data = array.data;
  view.dtype = array.dtype;
  view.device = array.device;
  constexpr std::array<std::array<size_t, 4>, 2> kOrder = {{{0, 1, 2, 3}, {0, 2, 1, 3}}};
  for (size_t i = 0; i < 4; ++i) {
    const size_t from = kOrder[static_cast<size_t>(layout)][i];
    view.shape[i] = static_cast<int64_t>(array.handle.shape(from));
    view.strides[i] = array.handle.stride(from);
  }
  return view;
}

QuantizedView to_quantized(nb::handle object, const std::string& name, Layout layout,
                           Arrays& keep) {
  constexpr size_t kFields = 5;
  if (!PyTuple_Check(object.ptr()) || nb::len(object) != kFields) {
    raise_type_error(name, describe(object), "(codes, scale, granularity, block, mean)");
  }
  const auto fields = nb::borrow<nb::tuple>(object);
  const auto part = [&](size_t i, const char* suffix) {
    keep.push_back(import_array(fields[i], name + suffix, 4, false));
    return view_of(keep.back(), layout);
  };
  QuantizedView view;
  view.codes = part(0, ".codes");
  view.scale = part(1, ".scale");
  view.spec.granularity = parse(fields[2], "granularity", parse_granularity);
  view.spec.block = to_int32(fields[3], "block");
  if (!fields[4].is_none()) view.mean = part(4, ".mean");
  return view;
}

Operand to_operand(nb::handle object, const std::string& name, Layout layout, Arrays& keep) {
  if (PyTuple_Check(object.ptr())) return to_quantized(object, name, layout, keep);
  keep.push_back(import_array(object, name, 4, false));
  const Array& array = keep.back();
  if (!is_float(array.dtype)) {
    raise_type_error(name, describe(object), "float32, float16, bfloat16 or a QuantizedTensor");
  }
  return ConstTensorView(view_of(array, layout));
}

void check_apart(const TensorView& written, const char* name, const Arrays& read) {
  struct Range {
    uintptr_t first, last;  // bytes; equal when empty
  };
  const auto range = [](const void* data, size_t bytes, size_t rank, auto&& shape, auto&& stride) {
    const auto start = reinterpret_cast<uintptr_t>(data);
    int64_t low = 0;
    int64_t high = static_cast<int64_t>(bytes);
    for (size_t i = 0; i < rank; ++i) {
      if (shape(i) == 0) return Range{start, start};
      const int64_t reach =
          (static_cast<int64_t>(shape(i)) - 1) * stride(i) * static_cast<int64_t>(bytes);
      (reach < 0 ? low : high) += reach;
    }
    return Range{start + static_cast<uintptr_t>(low), start + static_cast<uintptr_t>(high)};
  };
  const Range out = range(
      written.data, dtype_bytes(written.dtype), 4, [&](size_t i) { return written.shape[i]; },
      [&](size_t i) { return written.strides[i]; });
  for (const Array& array : read) {
    const AnyArray& handle = array.handle;
    const Range in = range(
        array.data, dtype_bytes(array.dtype), handle.ndim(),
        [&](size_t i) { return handle.shape(i); }, [&](size_t i) { return handle.stride(i); });
    if (in.first < out.last && out.first < in.last && in.first != in.last &&
        out.first != out.last) {
      raise_value_error(name, "memory that overlaps an input's", "memory of its own");
    }
  }
}

Mask to_mask(nb::handle causal, nb::handle align, nb::handle window_size) {
  Mask mask;
  mask.causal = to_bool(causal, "causal");
  const std::string align_name = to_text(align, "align");
  if (align_name != "bottom_right" && align_name != "top_left") {
    raise_value_error("align", describe(align), "'bottom_right' or 'top_left'");
  }
  mask.align = align_name == "top_left" ? CausalAlign::kTopLeft : CausalAlign::kBottomRight;
  if (!PyTuple_Check(window_size.ptr()) && !PyList_Check(window_size.ptr())) {
    raise_type_error("window_size", describe(window_size), "(left, right)");
  }
  if (nb::len(window_size) != 2) {
    raise_value_error("window_size", std::to_string(nb::len(window_size)) + " numbers",
                      "(left, right)");
  }
  mask.window_left = to_int(window_size[0], "window_size[0]");
  mask.window_right = to_int(window_size[1], "window_size[1]");
  return mask;
}

AttentionOptions to_options(nb::handle mode, nb::handle softmax_scale, nb::handle causal,
                            nb::handle align, nb::handle window_size, nb::handle kv_block,
                            nb::handle v_granularity, nb::handle smooth_k, nb::handle check_finite,
                            nb::handle fp8_format) {
  AttentionOptions options;
  options.mode = to_mode(mode);
  options.softmax_scale = to_optional_float(softmax_scale, "softmax_scale");
  options.mask = to_mask(causal, align, window_size);
  options.kv_block = to_int32(kv_block, "kv_block");
  options.v_granularity = parse(v_granularity, "v_granularity", parse_granularity);
  options.smooth_k = to_bool(smooth_k, "smooth_k");
  options.check_finite = to_bool(check_finite, "check_finite");
  const std::string format = to_text(fp8_format, "fp8_format");
  if (format != "e4m3" && format != "e5m2") {
    raise_value_error("fp8_format", describe(fp8_format), "'e4m3' or 'e5m2'");
  }
  options.fp8_format = format == "e4m3" ? Fp8Format::kE4m3Tensor : Fp8Format::kE5m2Raw;
  return options;
}

TensorView lse_view(const Array& array) {
  const AnyArray& handle = array.handle;
  TensorView view{array.data, array.dtype, array.device, {}, {}};
  view.shape = {static_cast<int64_t>(handle.shape(0)), static_cast<int64_t>(handle.shape(2)),
                static_cast<int64_t>(handle.shape(1)), 1};
  view.strides = {handle.stride(0), handle.stride(2), handle.stride(1), 1};
  return view;
}

AttentionOutputs to_outputs(nb::handle out, nb::handle lse, Layout layout, Arrays& keep) {
  const Arrays read = keep;
  keep.push_back(import_array(out, "out", 4, true));
  AttentionOutputs outputs{view_of(keep.back(), layout), std::nullopt};
  check_apart(outputs.out, "out", read);
  if (!lse.is_none()) {
    keep.push_back(import_array(lse, "lse", 3, true));
    const TensorView view = lse_view(keep.back());
    check_apart(view, "lse", read);
    outputs.lse = view;
  }
  return outputs;
}

TensorView packed_view(const Array& array) {
  const AnyArray& handle = array.handle;
  TensorView view{array.data, array.dtype, array.device, {}, {}};
  view.shape = {1, static_cast<int64_t>(handle.shape(0)), static_cast<int64_t>(handle.shape(1)),
                static_cast<int64_t>(handle.shape(2))};
  view.strides = {0, handle.stride(0), handle.stride(1), handle.stride(2)};
  return view;
}

TensorView packed_lse(const Array& array) {
  const AnyArray& handle = array.handle;
  TensorView view{array.data, array.dtype, array.device, {}, {}};
  view.shape = {1, static_cast<int64_t>(handle.shape(1)), static_cast<int64_t>(handle.shape(0)), 1};
  view.strides = {0, handle.stride(1), handle.stride(0), 1};
  return view;
}

std::vector<int32_t> to_starts(nb::handle object, const char* name, size_t total) {
  const Array array = import_array(object, name, 1, false);
  if (array.dtype != DType::kInt32) raise_type_error(name, describe(object), "dtype int32");
  if (array.device.type != DeviceType::kCpu) raise_value_error(name, "device cuda", "the CPU");
  const size_t count = array.handle.shape(0);
  if (count == 0) raise_value_error(name, "no element", "batch + 1 of them");
  std::vector<int32_t> starts(count);
  for (size_t i = 0; i < count; ++i) {
    starts[i] =
        static_cast<const int32_t*>(array.data)[static_cast<int64_t>(i) * array.handle.stride(0)];
    if (starts[i] < (i == 0 ? 0 : starts[i - 1])) {
      raise_value_error(name, std::to_string(starts[i]) + " at " + std::to_string(i),
                        "numbers from 0 that do not fall");
    }
  }
  if (starts.front() != 0 || static_cast<size_t>(starts.back()) != total) {
    raise_value_error(name, std::to_string(starts.front()) + " to " + std::to_string(starts.back()),
                      "0 to " + std::to_string(total) + ", the number of tokens");
  }
  return starts;
}

void add_changes(nb::handle changes, AttentionInputs& inputs, AttentionOptions& options,
                 Arrays& keep) {
  if (changes.is_none()) return;
  constexpr size_t kFields = 8;
  if (!PyTuple_Check(changes.ptr()) || nb::len(changes) != kFields) {
    raise_type_error("changes", describe(changes), "None or a tuple of 8");
  }
  const auto fields = nb::borrow<nb::tuple>(changes);
  options.softcap = to_optional_float(fields[0], "softcap").value_or(0.0F);
  // An array of `rank` dimensions; places[i] is where its dimension i goes in the library's order
  // [batch, seqlen_q, nheads_q, seqlen_k], the others are 1.
  const auto view = [&](size_t field, const char* name, std::initializer_list<size_t> places) {
    std::optional<ConstTensorView> found;
    if (fields[field].is_none()) return found;
    keep.push_back(import_array(fields[field], name, places.size(), false));
    const Array& array = keep.back();
    TensorView placed{array.data, array.dtype, array.device, {1, 1, 1, 1}, {0, 0, 0, 0}};
    size_t from = 0;
    for (const size_t to : places) {
      placed.shape[to] = static_cast<int64_t>(array.handle.shape(from));
      placed.strides[to] = array.handle.stride(from);
      ++from;
    }
    found = placed;
    return found;
  };
  inputs.attn_mask = view(1, "attn_mask", {0, 2, 1, 3});
  inputs.alibi_slopes = view(2, "alibi_slopes", {0, 2});
  inputs.sinks = view(3, "sinks", {2});
  inputs.seqlens_k = view(4, "seqlens_k", {0});
  inputs.leftpad_k = view(5, "leftpad_k", {0});
  options.mask.q_offset = to_int(fields[6], "q_offset");
  options.mask.k_offset = to_int(fields[7], "k_offset");
}

Mode to_mode(nb::handle object) { return parse(object, "mode", parse_mode); }

std::vector<Mode> to_head_modes(nb::handle object) {
  std::vector<Mode> modes;
  if (object.is_none()) return modes;
  if (!PyTuple_Check(object.ptr()) && !PyList_Check(object.ptr())) {
    raise_type_error("head_modes", describe(object), "a list of modes, one for each kv head");
  }
  const auto names = nb::borrow<nb::sequence>(object);
  const size_t count = nb::len(names);
  if (count == 0) raise_value_error("head_modes", "none", "one for each kv head");
  for (size_t i = 0; i < count; ++i) {
    const std::string name = "head_modes[" + std::to_string(i) + "]";
    modes.push_back(parse(names[i], name.c_str(), parse_mode));
  }
  return modes;
}

Context to_context(nb::handle threads, nb::handle isa) {
  Context context;
  context.threads = to_int32(threads, "threads");
  constexpr int32_t kMostThreads = 4096;  // OpenMP ends the process when it cannot start a thread
  if (context.threads < 1 || context.threads > kMostThreads) {
    raise_value_error("threads", std::to_string(context.threads), "1 to 4096");
  }
  if (!isa.is_none()) {
    context.force_isa = true;
    context.isa = parse(isa, "isa", parse_isa);
  }
  return context;
}

}  // namespace attn8::python
