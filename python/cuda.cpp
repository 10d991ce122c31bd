// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
//
// Calls on CUDA tensors: on the caller's stream, in memory of the caller's framework, without
// waiting for the device; attn8/cuda.py says how they get here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.hpp"
#include "attn8/attn8.hpp"

namespace attn8::python {
namespace {

Context to_cuda_context(nb::handle device, nb::handle stream) {
  const auto address = static_cast<uintptr_t>(to_int(stream, "stream"));
  return Context::cuda(to_int32(device, "device"),
                       reinterpret_cast<void*>(address));  // NOLINT(performance-no-int-to-ptr)
}

}  // namespace

Context to_place(nb::handle threads, nb::handle target) {
  if (target.is_none()) return to_context(threads, nb::none());
  if (!PyTuple_Check(target.ptr()) || nb::len(target) != 3) {
    raise_type_error("target", describe(target), "None or (device, stream, allocate)");
  }
  return to_cuda_context(target[0], target[1]);
}

namespace {

/// Memory of allocate(bytes), an int8 array on the device. It may be given back as soon as the call
/// is enqueued, because the framework reuses it in the order of the stream.
class Workspace {
 public:
  Workspace(const nb::callable& allocate, size_t bytes)
      : array_(import_array(allocate(bytes), "workspace", 1, true)), bytes_(bytes) {}
  [[nodiscard]] std::span<std::byte> span() const {
    return {static_cast<std::byte*>(array_.data), bytes_};
  }

 private:
  Array array_;
  size_t bytes_;
};

nb::callable to_allocate(nb::handle object) {
  if (PyCallable_Check(object.ptr()) == 0) {
    raise_type_error("allocate", describe(object), "a function of a number of bytes");
  }
  return nb::borrow<nb::callable>(object);
}

void attention(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
               nb::handle layout_name, nb::handle mode, nb::handle softmax_scale, nb::handle causal,
               nb::handle align, nb::handle window_size, nb::handle kv_block,
               nb::handle v_granularity, nb::handle smooth_k, nb::handle check_finite,
               nb::handle fp8_format, nb::handle device, nb::handle stream, nb::handle allocate,
               nb::handle changes) {
  const Layout layout = to_layout(layout_name);
  AttentionOptions options = to_options(mode, softmax_scale, causal, align, window_size, kv_block,
                                        v_granularity, smooth_k, check_finite, fp8_format);
  const Context context = to_cuda_context(device, stream);
  const nb::callable allocate_bytes = to_allocate(allocate);
  Arrays keep;
  keep.reserve(16);  // three operands of at most three arrays, five of changes, out, lse
  AttentionInputs inputs{to_operand(q, "q", layout, keep), to_operand(k, "k", layout, keep),
                         to_operand(v, "v", layout, keep)};
  add_changes(changes, inputs, options, keep);
  const AttentionOutputs outputs = to_outputs(out, lse, layout, keep);
  const Result<AttentionPlan> plan = [&] {
    const nb::gil_scoped_release release;
    return AttentionPlan::make(inputs, outputs, options, context);
  }();
  check(plan.status());
  const Workspace workspace(allocate_bytes, plan.value().workspace_bytes());
  Status status;
  {
    const nb::gil_scoped_release release;
    status = plan.value().run(inputs, outputs, workspace.span());
  }
  check(status);
}

/// (built, why there is no device, [(name, compute capability, kernels, why it runs none)]).
std::tuple<bool, std::string,
           std::vector<std::tuple<std::string, std::string, std::string, std::string>>>
support() {
  const CudaSupport found = cuda_support();
  std::vector<std::tuple<std::string, std::string, std::string, std::string>> devices;
  for (const CudaDevice& device : found.devices) {
    devices.emplace_back(device.name,
                         std::to_string(device.major) + "." + std::to_string(device.minor),
                         device.kernels, device.reason);
  }
  return {found.built, found.reason, std::move(devices)};
}

/// A tensor whose dimensions come first among four.
ConstTensorView view_of_rank(nb::handle object, const char* name, size_t rank, Arrays& keep) {
  keep.push_back(import_array(object, name, rank, false));
  const Array& array = keep.back();
  TensorView view{array.data, array.dtype, array.device, {1, 1, 1, 1}, {0, 0, 0, 0}};
  for (size_t i = 0; i < rank; ++i) {
    view.shape[i] = static_cast<int64_t>(array.handle.shape(i));
    view.strides[i] = array.handle.stride(i);
  }
  return view;
}

/// With cu_seqlens tokens are [total, heads, head_dim], without [batch, seqlen, heads, head_dim].
TensorView tokens_view(nb::handle object, const char* name, bool ragged, bool written,
                       Arrays& keep) {
  keep.push_back(import_array(object, name, ragged ? 3 : 4, written));
  const Array& array = keep.back();
  return ragged ? sequence(array, 0, static_cast<int64_t>(array.handle.shape(0)))
                : view_of(array, Layout::kBshd);
}

CudaKvTables to_tables(nb::handle block_table, nb::handle cache_seqlens, nb::handle cu_seqlens,
                       nb::handle max_seqlen, Arrays& keep) {
  CudaKvTables tables;
  tables.block_table = view_of_rank(block_table, "block_table", 2, keep);
  tables.cache_seqlens = view_of_rank(cache_seqlens, "cache_seqlens", 1, keep);
  if (!cu_seqlens.is_none()) {
    tables.cu_seqlens = view_of_rank(cu_seqlens, "cu_seqlens", 1, keep);
  }
  tables.max_seqlen = to_int(max_seqlen, "max_seqlen");
  return tables;
}

CudaKvCache make_cache(nb::handle nheads_k, nb::handle head_dim, nb::handle page_size,
                       nb::handle num_pages, nb::handle smooth_k, nb::handle device) {
  CudaKvCacheOptions options;
  options.nheads_k = to_int(nheads_k, "nheads_k");
  options.head_dim = to_int(head_dim, "head_dim");
  options.page_size = to_int32(page_size, "page_size");
  options.num_pages = to_int(num_pages, "num_pages");
  options.smooth_k = to_bool(smooth_k, "smooth_k");
  const Context context = Context::cuda(to_int32(device, "device"));
  const Result<CudaKvCache> cache = [&] {
    const nb::gil_scoped_release release;
    return CudaKvCache::make(options, context);
  }();
  check(cache.status());
  return cache.value();
}

void append(const CudaKvCache& cache, nb::handle k, nb::handle v, nb::handle block_table,
            nb::handle cache_seqlens, nb::handle cu_seqlens, nb::handle max_seqlen,
            nb::handle device, nb::handle stream, nb::handle allocate) {
  const Context context = to_cuda_context(device, stream);
  const nb::callable allocate_bytes = to_allocate(allocate);
  Arrays keep;
  keep.reserve(8);
  const bool ragged = !cu_seqlens.is_none();
  const ConstTensorView k_view(tokens_view(k, "k", ragged, false, keep));
  const ConstTensorView v_view(tokens_view(v, "v", ragged, false, keep));
  const CudaKvTables tables = to_tables(block_table, cache_seqlens, cu_seqlens, max_seqlen, keep);
  const Workspace workspace(allocate_bytes, cache.workspace_bytes(k_view.shape, tables));
  Status status;
  {
    const nb::gil_scoped_release release;
    status = cache.append(k_view, v_view, tables, workspace.span(), context);
  }
  check(status);
}

void attend(const CudaKvCache& cache, nb::handle q, nb::handle out, nb::handle lse,
            nb::handle block_table, nb::handle cache_seqlens, nb::handle cu_seqlens,
            nb::handle max_seqlen, nb::handle softmax_scale, nb::handle causal, nb::handle align,
            nb::handle window_size, nb::handle softcap, nb::handle sinks, nb::handle alibi_slopes,
            nb::handle device, nb::handle stream, nb::handle allocate) {
  const Context context = to_cuda_context(device, stream);
  const nb::callable allocate_bytes = to_allocate(allocate);
  CudaKvAttentionOptions options;
  options.softmax_scale = to_optional_float(softmax_scale, "softmax_scale");
  options.mask = to_mask(causal, align, window_size);
  options.softcap = to_optional_float(softcap, "softcap").value_or(0.0F);
  Arrays keep;
  keep.reserve(8);
  const bool ragged = !cu_seqlens.is_none();
  const ConstTensorView q_view(tokens_view(q, "q", ragged, false, keep));
  const CudaKvTables tables = to_tables(block_table, cache_seqlens, cu_seqlens, max_seqlen, keep);
  if (!sinks.is_none()) {
    ConstTensorView view = view_of_rank(sinks, "sinks", 1, keep);
    std::swap(view.shape[0], view.shape[2]);
    std::swap(view.strides[0], view.strides[2]);
    options.sinks = view;
  }
  if (!alibi_slopes.is_none()) {
    ConstTensorView view = view_of_rank(alibi_slopes, "alibi_slopes", 2, keep);
    std::swap(view.shape[1], view.shape[2]);
    std::swap(view.strides[1], view.strides[2]);
    options.alibi_slopes = view;
  }
  AttentionOutputs outputs{tokens_view(out, "out", ragged, true, keep), std::nullopt};
  check_apart(outputs.out, "out", {keep.front()});
  if (!lse.is_none()) {
    keep.push_back(import_array(lse, "lse", ragged ? 2 : 3, true));
    const Array& array = keep.back();
    outputs.lse = ragged ? packed_lse(array, 0, static_cast<int64_t>(array.handle.shape(1)))
                         : lse_view(array);
  }
  const Workspace workspace(allocate_bytes, cache.workspace_bytes(q_view.shape, tables));
  Status status;
  {
    const nb::gil_scoped_release release;
    status = cache.attend(q_view, tables, outputs, options, workspace.span(), context);
  }
  check(status);
}

}  // namespace

void add_cuda(nb::module_& module) {
  add(module, "cuda_attention", &attention);
  module.def("cuda_support", &support);
  nb::class_<CudaKvCache> cache(module, "CudaKvCache");
  add_method(cache, "append", &append);
  add_method(cache, "attend", &attend);
  cache.def("bytes_per_page", &CudaKvCache::bytes_per_page);
  add(module, "make_cuda_kv_cache", &make_cache);
}

}  // namespace attn8::python
