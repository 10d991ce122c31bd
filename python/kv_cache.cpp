// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
//
// The paged cache; attn8/kv_cache.py documents it. The GIL is released wherever a call may wait for
// another thread's.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/operators.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.hpp"
#include "attn8/attn8.hpp"
#include "rotation.hpp"

namespace attn8::python {
namespace {

KvCache make_kv_cache(nb::handle nheads_k, nb::handle head_dim, nb::handle head_dim_v,
                      nb::handle page_size, nb::handle max_pages, nb::handle smooth_k) {
  KvCacheOptions options;
  options.nheads_k = to_int(nheads_k, "nheads_k");
  options.head_dim = to_int(head_dim, "head_dim");
  options.head_dim_v = to_int(head_dim_v, "head_dim_v");
  options.page_size = to_int32(page_size, "page_size");
  options.max_pages = to_int(max_pages, "max_pages");
  options.smooth_k = to_bool(smooth_k, "smooth_k");
  Result<KvCache> cache = KvCache::make(options);
  check(cache.status());
  return cache.value();
}

KvSequence to_sequence(nb::handle object, const std::string& name) {
  if (!nb::isinstance<KvSequence>(object)) {
    raise_type_error(name, describe(object), "a KVSequence");
  }
  return nb::cast<KvSequence>(object);
}

/// Runs a call of the cache without the GIL; the value of its result, or the exception.
template <class Body>
auto without_gil(Body body) {
  auto result = [&] {
    const nb::gil_scoped_release release;
    return body();
  }();
  if constexpr (std::is_same_v<decltype(result), Status>) {
    check(result);
  } else {
    check(result.status());
    return result.value();
  }
}

std::vector<KvSequence> to_sequences(nb::handle object) {
  const nb::list names = to_list(object, "sequences");
  std::vector<KvSequence> sequences;
  for (size_t i = 0; i < nb::len(names); ++i) {
    sequences.push_back(to_sequence(names[i], "sequences[" + std::to_string(i) + "]"));
  }
  return sequences;
}

/// Starts of the tokens of each sequence; None: the same number for each.
std::vector<int32_t> starts_of(nb::handle cu_seqlens, const char* name, const char* tokens,
                               size_t total, size_t sequences) {
  if (!cu_seqlens.is_none()) return to_starts(cu_seqlens, name, total);
  if (sequences == 0 ? total != 0 : total % sequences != 0) {
    raise_value_error(tokens, std::to_string(total) + " tokens",
                      "a multiple of " + std::to_string(sequences) +
                          ", the number of sequences, where " + name + " is None");
  }
  if (total > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    raise_value_error(tokens, std::to_string(total) + " tokens", "fewer than 2^31");
  }
  std::vector<int32_t> starts;
  for (size_t i = 0; i <= sequences; ++i) {
    starts.push_back(static_cast<int32_t>(sequences == 0 ? 0 : total / sequences * i));
  }
  return starts;
}

/// sequence: one, or a list of them.
void append(KvCache& cache, nb::handle sequence, nb::handle k, nb::handle v, nb::handle cu_seqlens,
            nb::handle rotate, nb::handle threads, nb::handle isa) {
  const bool one = !nb::isinstance<nb::list>(sequence);
  const KvSequence to = one ? to_sequence(sequence, "sequence") : KvSequence();
  const std::vector<KvSequence> all = one ? std::vector<KvSequence>() : to_sequences(sequence);
  const Context context = to_context(threads, isa);
  const Array k_array = import_array(k, "k", 3, false);
  const Array v_array = import_array(v, "v", 3, false);
  std::vector<int32_t> starts;
  if (!one) starts = starts_of(cu_seqlens, "cu_seqlens", "k", k_array.handle.shape(0), all.size());
  Rotation rotation(to_bool(rotate, "rotate"), context.threads);
  without_gil([&] {
    const ConstTensorView k_view = rotation.of(packed_view(k_array));
    const ConstTensorView v_view = rotation.of(packed_view(v_array));
    return one ? cache.append(to, k_view, v_view, context)
               : cache.append(all, k_view, v_view, starts, context);
  });
}

void attend(const KvCache& cache, nb::handle sequences, nb::handle q, nb::handle cu_seqlens_q,
            nb::handle out, nb::handle lse, nb::handle softmax_scale, nb::handle causal,
            nb::handle align, nb::handle window_size, nb::handle mode, nb::handle head_modes,
            nb::handle changes, nb::handle rotate, nb::handle threads, nb::handle isa) {
  KvCacheAttentionOptions options;
  options.mode = to_mode(mode);
  const std::vector<Mode> modes = to_head_modes(head_modes);
  options.head_modes = modes;
  options.softmax_scale = to_optional_float(softmax_scale, "softmax_scale");
  options.mask = to_mask(causal, align, window_size);
  AttentionInputs changed;
  AttentionOptions changed_options;
  Arrays read;
  add_changes(changes, changed, changed_options, read);
  options.softcap = changed_options.softcap;
  options.attn_mask = changed.attn_mask;
  options.alibi_slopes = changed.alibi_slopes;
  options.sinks = changed.sinks;
  const Context context = to_context(threads, isa);
  const std::vector<KvSequence> of = to_sequences(sequences);
  read.push_back(import_array(q, "q", 3, false));
  const Array q_array = read.back();
  if (!is_float(q_array.dtype)) raise_type_error("q", describe(q), "float32, float16 or bfloat16");
  const size_t total = q_array.handle.shape(0);
  const std::vector<int32_t> starts =
      starts_of(cu_seqlens_q, "cu_seqlens_q", "q", total, of.size());
  const Array out_array = import_array(out, "out", 3, true);
  AttentionOutputs outputs;
  outputs.out = packed_view(out_array);
  check_apart(outputs.out, "out", read);
  std::optional<Array> lse_array;
  if (!lse.is_none()) {
    lse_array = import_array(lse, "lse", 2, true);
    outputs.lse = packed_lse(*lse_array);
    check_apart(*outputs.lse, "lse", read);
  }
  Rotation rotation(to_bool(rotate, "rotate"), context.threads);
  without_gil([&] {
    const AttentionOutputs computed = {rotation.output(outputs.out), outputs.lse};
    Status status =
        cache.attend(of, rotation.of(packed_view(q_array)), starts, computed, options, context);
    if (status.ok()) rotation.finish();
    return status;
  });
}

/// sequences, pages_used, pages_free, bytes_used, bytes_per_page.
std::tuple<int64_t, int64_t, int64_t, size_t, size_t> usage(const KvCache& cache) {
  const KvCacheUsage found = cache.usage();
  return {found.sequences, found.pages_used, found.pages_free, found.bytes_used,
          found.bytes_per_page};
}

std::string text_of(const KvSequence& sequence) {
  return "KVSequence(" + std::to_string(sequence.id) + " of cache " +
         std::to_string(sequence.cache) + ")";
}

}  // namespace

void add_kv_cache(nb::module_& module) {
  nb::class_<KvSequence>(module, "KVSequence")
      .def(nb::self == nb::self)
      .def("__hash__", [](const KvSequence& s) { return nb::hash(nb::make_tuple(s.cache, s.id)); })
      .def("__repr__", &text_of);
  nb::class_<KvCache>(module, "KvCache")
      .def("create", [](KvCache& cache) { return without_gil([&] { return cache.create(); }); })
      .def("append", &append, nb::arg().none(), nb::arg().none(), nb::arg().none(),
           nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none())
      .def(
          "fork",
          [](KvCache& cache, nb::handle parent, nb::handle length) {
            const KvSequence of = to_sequence(parent, "parent");
            const int64_t tokens = to_int(length, "length");
            return without_gil([&] { return cache.fork(of, tokens); });
          },
          nb::arg().none(), nb::arg().none())
      .def(
          "truncate",
          [](KvCache& cache, nb::handle sequence, nb::handle length) {
            const KvSequence of = to_sequence(sequence, "sequence");
            const int64_t tokens = to_int(length, "length");
            without_gil([&] { return cache.truncate(of, tokens); });
          },
          nb::arg().none(), nb::arg().none())
      .def(
          "free",
          [](KvCache& cache, nb::handle sequence) {
            const KvSequence of = to_sequence(sequence, "sequence");
            without_gil([&] { return cache.free(of); });
          },
          nb::arg().none())
      .def(
          "length",
          [](const KvCache& cache, nb::handle sequence) {
            const KvSequence of = to_sequence(sequence, "sequence");
            return without_gil([&] { return cache.length(of); });
          },
          nb::arg().none())
      .def("usage", &usage)
      .def("attend", &attend, nb::arg().none(), nb::arg().none(), nb::arg().none(),
           nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(),
           nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(),
           nb::arg().none(), nb::arg().none());
  add(module, "make_kv_cache", &make_kv_cache);
}

}  // namespace attn8::python
