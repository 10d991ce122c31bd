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
               nb::handle changes, nb::handle head_modes) {
  const Layout layout = to_layout(layout_name);
  AttentionOptions options = to_options(mode, softmax_scale, causal, align, window_size, kv_block,
                                        v_granularity, smooth_k, check_finite, fp8_format);
  const std::vector<Mode> modes = to_head_modes(head_modes);
  options.head_modes = modes;
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
  return ragged ? packed_view(array) : view_of(array, Layout::kBshd);
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

/// The tokens of an append.
void append_views(const CudaKvCache& cache, const ConstTensorView& k, const ConstTensorView& v,
                  const CudaKvTables& tables, const nb::callable& allocate,
                  const Context& context) {
  const Workspace workspace(allocate, cache.workspace_bytes(k.shape, tables));
  Status status;
  {
    const nb::gil_scoped_release release;
    status = cache.append(k, v, tables, workspace.span(), context);
  }
  check(status);
}

void append(const CudaKvCache& cache, nb::handle k, nb::handle v, nb::handle block_table,
            nb::handle cache_seqlens, nb::handle cu_seqlens, nb::handle max_seqlen,
            nb::handle device, nb::handle stream, nb::handle allocate) {
  const Context context = to_cuda_context(device, stream);
  Arrays keep;
  keep.reserve(8);
  const bool ragged = !cu_seqlens.is_none();
  const ConstTensorView k_view(tokens_view(k, "k", ragged, false, keep));
  const ConstTensorView v_view(tokens_view(v, "v", ragged, false, keep));
  const CudaKvTables tables = to_tables(block_table, cache_seqlens, cu_seqlens, max_seqlen, keep);
  append_views(cache, k_view, v_view, tables, to_allocate(allocate), context);
}

/// A tensor [n, heads] or [heads] of one number per query head.
std::optional<ConstTensorView> per_head(nb::handle object, const char* name, size_t rank,
                                        Arrays& keep) {
  if (object.is_none()) return std::nullopt;
  ConstTensorView view = view_of_rank(object, name, rank, keep);
  std::swap(view.shape[rank - 1], view.shape[2]);
  std::swap(view.strides[rank - 1], view.strides[2]);
  return view;
}

CudaKvAttentionOptions to_cache_options(nb::handle softmax_scale, nb::handle causal,
                                        nb::handle align, nb::handle window_size,
                                        nb::handle softcap, nb::handle sinks,
                                        nb::handle alibi_slopes, Arrays& keep) {
  CudaKvAttentionOptions options;
  options.softmax_scale = to_optional_float(softmax_scale, "softmax_scale");
  options.mask = to_mask(causal, align, window_size);
  options.softcap = to_optional_float(softcap, "softcap").value_or(0.0F);
  options.sinks = per_head(sinks, "sinks", 1, keep);
  options.alibi_slopes = per_head(alibi_slopes, "alibi_slopes", 2, keep);
  return options;
}

/// `q_array`: what q views.
void attend_views(const CudaKvCache& cache, const ConstTensorView& q, const Array& q_array,
                  nb::handle out, nb::handle lse, bool ragged, const CudaKvTables& tables,
                  const CudaKvAttentionOptions& options, const nb::callable& allocate,
                  const Context& context, Arrays& keep) {
  AttentionOutputs outputs{tokens_view(out, "out", ragged, true, keep), std::nullopt};
  check_apart(outputs.out, "out", {q_array});
  if (!lse.is_none()) {
    keep.push_back(import_array(lse, "lse", ragged ? 2 : 3, true));
    const Array& array = keep.back();
    outputs.lse = ragged ? packed_lse(array) : lse_view(array);
  }
  const Workspace workspace(allocate, cache.workspace_bytes(q.shape, tables));
  Status status;
  {
    const nb::gil_scoped_release release;
    status = cache.attend(q, tables, outputs, options, workspace.span(), context);
  }
  check(status);
}

void attend(const CudaKvCache& cache, nb::handle q, nb::handle out, nb::handle lse,
            nb::handle block_table, nb::handle cache_seqlens, nb::handle cu_seqlens,
            nb::handle max_seqlen, nb::handle softmax_scale, nb::handle causal, nb::handle align,
            nb::handle window_size, nb::handle softcap, nb::handle sinks, nb::handle alibi_slopes,
            nb::handle attn_mask, nb::handle device, nb::handle stream, nb::handle allocate) {
  const Context context = to_cuda_context(device, stream);
  Arrays keep;
  keep.reserve(12);
  const bool ragged = !cu_seqlens.is_none();
  const ConstTensorView q_view(tokens_view(q, "q", ragged, false, keep));
  const Array q_array = keep.back();
  const CudaKvTables tables = to_tables(block_table, cache_seqlens, cu_seqlens, max_seqlen, keep);
  CudaKvAttentionOptions options = to_cache_options(softmax_scale, causal, align, window_size,
                                                    softcap, sinks, alibi_slopes, keep);
  if (!attn_mask.is_none()) {
    // [batch, heads, seqlen, keys], as attention() takes it.
    keep.push_back(import_array(attn_mask, "attn_mask", 4, false));
    options.attn_mask = ConstTensorView(view_of(keep.back(), Layout::kBhsd));
  }
  attend_views(cache, q_view, q_array, out, lse, ragged, tables, options, to_allocate(allocate),
               context, keep);
}

/// Attention of packed sequences by way of pages that last for this call: nothing is padded.
///   block_table  [batch, pages of the longest], of disjoint pages in [0, num_pages)
///   starts, lengths  [batch] tokens of each before the append, all 0, and after
void attention_in_pages(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                        nb::handle block_table, nb::handle starts, nb::handle lengths,
                        nb::handle cu_seqlens_q, nb::handle cu_seqlens_k, nb::handle max_seqlen_q,
                        nb::handle max_seqlen_k, nb::handle softmax_scale, nb::handle causal,
                        nb::handle align, nb::handle window_size, nb::handle softcap,
                        nb::handle sinks, nb::handle alibi_slopes, nb::handle smooth_k,
                        nb::handle num_pages, nb::handle device, nb::handle stream,
                        nb::handle allocate) {
  const Context context = to_cuda_context(device, stream);
  const nb::callable allocate_bytes = to_allocate(allocate);
  Arrays keep;
  keep.reserve(24);
  const ConstTensorView q_view(tokens_view(q, "q", true, false, keep));
  const Array q_array = keep.back();
  const ConstTensorView k_view(tokens_view(k, "k", true, false, keep));
  const ConstTensorView v_view(tokens_view(v, "v", true, false, keep));
  const CudaKvAttentionOptions options = to_cache_options(softmax_scale, causal, align, window_size,
                                                          softcap, sinks, alibi_slopes, keep);
  CudaKvCacheOptions cache_options;
  cache_options.nheads_k = k_view.shape[2];
  cache_options.head_dim = k_view.shape[3];
  cache_options.num_pages = to_int(num_pages, "num_pages");
  cache_options.smooth_k = to_bool(smooth_k, "smooth_k");
  const Result<size_t> bytes = CudaKvCache::memory_bytes(cache_options, context);
  check(bytes.status());
  const Workspace memory(allocate_bytes, bytes.value());
  cache_options.memory = memory.span();
  const Result<CudaKvCache> cache = CudaKvCache::make(cache_options, context);
  check(cache.status());
  append_views(cache.value(), k_view, v_view,
               to_tables(block_table, starts, cu_seqlens_k, max_seqlen_k, keep), allocate_bytes,
               context);
  attend_views(cache.value(), q_view, q_array, out, lse, true,
               to_tables(block_table, lengths, cu_seqlens_q, max_seqlen_q, keep), options,
               allocate_bytes, context, keep);
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
  add(module, "cuda_attention_in_pages", &attention_in_pages);
}

}  // namespace attn8::python
