// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attn8/attn8.hpp"

namespace attn8::python {

namespace nb = nanobind;

/// Python's exception for a failed status; the text is the status's own. Needs the GIL.
[[noreturn]] void raise(const Status& status);
/// Raises unless `status` is ok.
void check(const Status& status);

/// TypeError or ValueError "NAME: got ..., want ...".
[[noreturn]] void raise_type_error(const std::string& name, const std::string& got,
                                   const std::string& want);
[[noreturn]] void raise_value_error(const std::string& name, const std::string& got,
                                    const std::string& want);

/// "str 'x'", "ndarray of dtype int64", "list": what an error says it got.
std::string describe(nb::handle object);

/// Scalars from Python objects; anything of another type is a TypeError that names the argument.
bool to_bool(nb::handle object, const char* name);
int64_t to_int(nb::handle object, const char* name);
int32_t to_int32(nb::handle object, const char* name);
std::optional<float> to_optional_float(nb::handle object, const char* name);
std::string to_text(nb::handle object, const char* name);

/// A list; what else there is, is a TypeError.
nb::list to_list(nb::handle object, const char* name);

/// How the memory of rank-4 arrays is named in Python.
enum class Layout : uint8_t { kBshd, kBhsd };
Layout to_layout(nb::handle object);

using AnyArray = nb::ndarray<nb::ro>;

/// A borrowed array of any framework: the handle keeps its memory alive.
struct Array {
  AnyArray handle;
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = {};
};

/// Imports an array by DLPack or the buffer protocol, without a copy. Errors: TypeError for what is
/// no array, does not share its memory, or has an element type of no DType; ValueError for a tensor
/// that requires grad, a wrong rank, or memory that is not aligned to its elements.
Array import_array(nb::handle object, const std::string& name, size_t rank, bool written);

/// The rank-4 view, in the logical order [batch, seq, head, dim].
TensorView view_of(const Array& array, Layout layout);

/// Arrays that stay alive while a call uses them.
using Arrays = std::vector<Array>;

/// A float array, or the tuple (codes, scale, granularity, block, mean or None).
Operand to_operand(nb::handle object, const std::string& name, Layout layout, Arrays& keep);
QuantizedView to_quantized(nb::handle object, const std::string& name, Layout layout, Arrays& keep);

/// Raises ValueError when the memory of `written` may overlap that of any array in `read`.
void check_apart(const TensorView& written, const char* name, const Arrays& read);

/// View of an LSE array [batch, nheads_q, seqlen_q], which has that order in every layout.
TensorView lse_view(const Array& array);
/// out and lse (None: not wanted) of one call; neither may share memory with the arrays in `keep`.
AttentionOutputs to_outputs(nb::handle out, nb::handle lse, Layout layout, Arrays& keep);

/// A packed array [total, nheads, head_dim] as a batch of 1.
TensorView packed_view(const Array& array);
/// Likewise its LSE [nheads_q, total].
TensorView packed_lse(const Array& array);
/// Starts of the sequences of a packed array, int32 [batch + 1]: from 0 to `total`, not falling.
std::vector<int32_t> to_starts(nb::handle object, const char* name, size_t total);

/// Which keys a query sees.
Mask to_mask(nb::handle causal, nb::handle align, nb::handle window_size);
/// Options of attention() in the order the Python side passes them.
AttentionOptions to_options(nb::handle mode, nb::handle softmax_scale, nb::handle causal,
                            nb::handle align, nb::handle window_size, nb::handle kv_block,
                            nb::handle v_granularity, nb::handle smooth_k, nb::handle check_finite,
                            nb::handle fp8_format);

/// What changes scores or hides keys: None, or (softcap, attn_mask, alibi_slopes, sinks, seqlens_k,
/// leftpad_k, q_offset, k_offset), arrays or None as attn8/scores.py shapes them.
void add_changes(nb::handle changes, AttentionInputs& inputs, AttentionOptions& options,
                 Arrays& keep);

Mode to_mode(nb::handle object);
/// Modes of the kv heads: a list or tuple of names; None: none.
std::vector<Mode> to_head_modes(nb::handle object);

/// CPU context; `isa` is None or a name.
Context to_context(nb::handle threads, nb::handle isa);
/// Where a call runs that needs no workspace: `target` is None for the CPU, or the (device, stream,
/// allocate) of attn8/cuda.py.
Context to_place(nb::handle threads, nb::handle target);

/// Adds a function all of whose arguments may be None: the checks above say what they want.
template <class Returned, class... Arguments>
void add(nb::module_& module, const char* name, Returned (*function)(Arguments...)) {
  module.def(name, function, ((void)sizeof(Arguments), nb::arg().none())...);
}

/// The same for a method of a class.
template <class Class, class Returned, class Self, class... Arguments>
void add_method(nb::class_<Class>& type, const char* name, Returned (*method)(Self, Arguments...)) {
  type.def(name, method, ((void)sizeof(Arguments), nb::arg().none())...);
}

/// What stands in a file of its own joins the module here.
void add_cuda(nb::module_& module);
void add_kv_cache(nb::module_& module);
void add_reference(nb::module_& module);

}  // namespace attn8::python
