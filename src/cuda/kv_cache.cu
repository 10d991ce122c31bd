// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "append.hpp"
#include "attn8/cuda.hpp"
#include "attn8/cuda_kv_cache.hpp"
#include "plan.hpp"

/// The paged cache behind attn8/cuda_kv_cache.hpp.
namespace attn8 {

struct CudaKvCache::State {
  CudaKvCacheOptions options;
  int device = 0;
  int multiprocessors = 0;
  const cuda::AttendEntry* entry = nullptr;          ///< without softcap
  const cuda::AttendEntry* softcap_entry = nullptr;  ///< with it; as wide
  CudaMemory memory;
  cuda::Pages pages = {};
  size_t bytes_per_page = 0;

  [[nodiscard]] int packed_dim() const { return entry->head_dim; }
  [[nodiscard]] int row_bytes() const { return cuda::packed_row_bytes(entry->head_dim); }
};

namespace {

using cuda::AttendParams;
using cuda::Weights;

template <class Kernel, class Params>
__global__ void __launch_bounds__(Kernel::kThreads)
    cache_kernel(const __grid_constant__ Params params) {
  Kernel::run(params);
}

template <class Kernel, class Params>
void launch(const Params& params, int64_t x, int64_t y, cudaStream_t stream) {
  if (x <= 0 || y <= 0) return;
  cache_kernel<Kernel, Params><<<dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
                                 Kernel::kThreads, Kernel::kSharedBytes, stream>>>(params);
}

Status invalid(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }

std::string text(const Extents& e) {
  return "[" + std::to_string(e[0]) + ", " + std::to_string(e[1]) + ", " + std::to_string(e[2]) +
         ", " + std::to_string(e[3]) + "]";
}

Status check_shape(const char* name, const ConstTensorView& view, const Extents& want) {
  if (view.shape == want) return {};
  return invalid(std::string(name) + ".shape=" + text(view.shape) + ", want " + text(want));
}

Status check_tokens(const char* name, const ConstTensorView& view, int device) {
  if (!is_float(view.dtype)) {
    return invalid(std::string(name) + ".dtype=" + std::string(to_string(view.dtype)) +
                   ", want float32, float16 or bfloat16");
  }
  if (view.shape[0] * view.shape[1] * view.shape[2] * view.shape[3] == 0) return {};
  return cuda::check_memory(view.data, name, device);
}

int table_value(const ConstTensorView& view, int64_t i, int64_t j = 0) {
  return static_cast<const int32_t*>(view.data)[i * view.strides[0] + j * view.strides[1]];
}

/// What the tables of a call say on the host.
struct Call {
  int batch = 0, max_pages = 0;
  bool ragged = false;
  bool on_host = false;
  int seqlen = 0;     ///< of a sequence; of a ragged batch the most
  int64_t total = 0;  ///< tokens of the call
};

/// Where the checked tables lie in the workspace, then what follows them.
struct Layout {
  size_t table = 0, seqlens = 0, cu = 0, bad = 0, raw = 0, sums = 0, q = 0, q_scale = 0,
         lse_shift = 0, split_out = 0, split_lse = 0, bytes = 0;
};

class Bytes {
 public:
  size_t take(int64_t bytes) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(std::max<int64_t>(bytes, 0)) + 255) / 256 * 256;
    return at;
  }
  [[nodiscard]] size_t total() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

cuda::Division division_of(const CudaKvCache::State& s, const Call& call, int64_t nheads_q) {
  return cuda::divide(*s.entry, call.batch, static_cast<int>(nheads_q), s.pages.nheads_k,
                      call.seqlen, static_cast<int64_t>(call.max_pages) << s.pages.page_shift,
                      s.multiprocessors);
}

/// Rows of an image of Q.
int64_t rows_of(const Call& call, int group) {
  if (!call.ragged)
    return cuda::round_up(static_cast<int64_t>(call.seqlen) * group, cuda::kSequencePad);
  return cuda::ragged_row(call.total * group, call.batch) + cuda::kRaggedRows;
}

int append_chunks(const Call& call) {
  return (call.seqlen + cuda::kAppendChunk - 1) / cuda::kAppendChunk;
}

Layout lay_out(const CudaKvCache::State& s, const Call& call, int64_t heads) {
  const int64_t ints = 4;
  Bytes bytes;
  Layout at;
  at.table = bytes.take(ints * call.batch * call.max_pages);
  at.seqlens = bytes.take(ints * call.batch);
  at.cu = bytes.take(ints * (call.batch + 1));
  at.bad = bytes.take(ints * call.batch);
  at.raw =
      bytes.take(ints * (static_cast<int64_t>(call.batch) * call.max_pages + 2 * call.batch + 1));
  const cuda::Division division = division_of(s, call, heads);
  const int64_t images = (call.ragged ? 1 : call.batch) * (heads / division.group);
  const int64_t rows = images * rows_of(call, division.group);
  at.q = bytes.take(rows * s.row_bytes());
  at.q_scale = bytes.take(rows * 4);
  at.lse_shift = bytes.take(rows * 4);
  if (division.splits > 1) {
    const int64_t parts = division.splits * call.total * heads;
    at.split_out =
        bytes.take(parts * cuda::split_row_floats(static_cast<int>(s.options.head_dim)) * 4);
    at.split_lse = bytes.take(parts * 4);
  }
  // An append and attention share what follows the tables.
  const auto tables = static_cast<int64_t>(at.q);
  at.sums = at.q;
  at.bytes = std::max(bytes.total(),
                      static_cast<size_t>(tables + int64_t{8} * call.batch * s.pages.nheads_k *
                                                       append_chunks(call) * s.row_bytes()));
  return at;
}

Status check_int32(const char* name, const ConstTensorView& view, bool on_host, int device) {
  if (view.dtype != DType::kInt32) {
    return invalid(std::string(name) + ".dtype=" + std::string(to_string(view.dtype)) +
                   ", want int32");
  }
  if ((view.device.type == DeviceType::kCpu) != on_host) {
    return invalid(std::string(name) + ".device differs from block_table.device");
  }
  return on_host ? Status() : cuda::check_memory(view.data, name, device);
}

/// Lengths and pages of tables that lie on the host.
Status check_on_host(const CudaKvCache::State& s, const CudaKvTables& tables, const Call& call,
                     bool appends) {
  for (int b = 0; b < call.batch; ++b) {
    const std::string at = "[" + std::to_string(b) + "]";
    int64_t added = call.seqlen;
    if (call.ragged) {
      const int64_t first = table_value(*tables.cu_seqlens, b);
      const int64_t last = table_value(*tables.cu_seqlens, b + 1);
      added = last - first;
      if (first < 0 || last < first || last > call.total) {
        return invalid("cu_seqlens" + at + "=" + std::to_string(first) + " and then " +
                       std::to_string(last) + ", want them not to decrease, from 0 to " +
                       std::to_string(call.total));
      }
      if (added > call.seqlen) {
        return invalid("max_seqlen=" + std::to_string(call.seqlen) + ", sequence " +
                       std::to_string(b) + " has " + std::to_string(added) + " tokens");
      }
    }
    const int64_t seqlen = table_value(tables.cache_seqlens, b);
    const int64_t end = seqlen + (appends ? added : 0);
    const int64_t room = static_cast<int64_t>(call.max_pages) << s.pages.page_shift;
    if (seqlen < 0 || end > room) {
      return invalid("cache_seqlens" + at + "=" + std::to_string(seqlen) +
                     (appends ? " and " + std::to_string(added) + " more" : "") +
                     ", block_table has room for " + std::to_string(room));
    }
    for (int64_t page = 0; page << s.pages.page_shift < end; ++page) {
      const int value = table_value(tables.block_table, b, page);
      if (value < 0 || value >= s.pages.num_pages) {
        return invalid("block_table[" + std::to_string(b) + ", " + std::to_string(page) +
                       "]=" + std::to_string(value) + ", there are " +
                       std::to_string(s.pages.num_pages) + " pages");
      }
    }
  }
  return {};
}

/// The shapes of a call; not what the tables hold.
Result<Call> call_of(const CudaKvCache::State& s, const Extents& tokens,
                     const CudaKvTables& tables) {
  Call call;
  const Extents& table = tables.block_table.shape;
  if (table[0] < 1 || table[1] < 1 || table[2] != 1 || table[3] != 1 || table[0] > 65535 ||
      table[1] > cuda::kNoLimit / 4 >> s.pages.page_shift) {
    return invalid("block_table.shape=" + text(table) + ", want [batch, max_pages, 1, 1]");
  }
  call.batch = static_cast<int>(table[0]);
  call.max_pages = static_cast<int>(table[1]);
  call.ragged = tables.cu_seqlens.has_value();
  call.on_host = tables.block_table.device.type == DeviceType::kCpu;
  const int64_t want_batch = call.ragged ? 1 : call.batch;
  if (tokens[0] != want_batch || tokens[1] < 0 || tokens[1] > cuda::kNoLimit / 4) {
    return invalid("tokens of shape " + text(tokens) + ", want shape[0]=" +
                   std::to_string(want_batch) + (call.ragged ? " with cu_seqlens" : ""));
  }
  if (tokens[2] * call.batch > 65535) {
    return Status(StatusCode::kUnsupported, "tokens of shape " + text(tokens) + " in " +
                                                std::to_string(call.batch) +
                                                " sequences, CUDA takes batch * heads up to 65535");
  }
  call.total = tokens[0] * tokens[1];
  call.seqlen = static_cast<int>(tokens[1]);
  if (tables.max_seqlen < 0) {
    return invalid("max_seqlen=" + std::to_string(tables.max_seqlen) + ", want 0 or more");
  }
  if (call.ragged && tables.max_seqlen > 0) {
    call.seqlen = static_cast<int>(std::min<int64_t>(call.seqlen, tables.max_seqlen));
  }
  return call;
}

/// Checks the tables and enqueues what makes them safe to use.
Status prepare_tables(const CudaKvCache::State& s, const CudaKvTables& tables, const Call& call,
                      bool appends, const Layout& at, std::span<std::byte> workspace,
                      cudaStream_t stream) {
  if (workspace.size() < at.bytes) {
    return invalid("workspace has " + std::to_string(workspace.size()) + " bytes, want " +
                   std::to_string(at.bytes));
  }
  if (reinterpret_cast<uintptr_t>(workspace.data()) % 256 != 0) {
    return invalid("workspace.data() wants an alignment of 256 bytes");
  }
  Status checks[] = {
      check_shape("cache_seqlens", tables.cache_seqlens, {call.batch, 1, 1, 1}),
      call.ragged ? check_shape("cu_seqlens", *tables.cu_seqlens, {call.batch + 1, 1, 1, 1})
                  : Status(),
      check_int32("block_table", tables.block_table, call.on_host, s.device),
      check_int32("cache_seqlens", tables.cache_seqlens, call.on_host, s.device),
      call.ragged ? check_int32("cu_seqlens", *tables.cu_seqlens, call.on_host, s.device)
                  : Status(),
      cuda::check_memory(workspace.data(), "workspace", s.device)};
  for (Status& check : checks) {
    if (!check.ok()) return check;
  }
  if (call.on_host) {
    if (Status status = check_on_host(s, tables, call, appends); !status.ok()) return status;
  }
  const auto ints_at = [&](size_t offset) {
    return reinterpret_cast<int*>(workspace.data() + offset);
  };
  cuda::TablesParams p{};
  p.block_table = static_cast<const int*>(tables.block_table.data);
  p.block_table_stride_batch = tables.block_table.strides[0];
  p.block_table_stride_page = tables.block_table.strides[1];
  p.cache_seqlens = static_cast<const int*>(tables.cache_seqlens.data);
  p.cache_seqlens_stride = tables.cache_seqlens.strides[0];
  if (call.ragged) {
    p.cu_seqlens = static_cast<const int*>(tables.cu_seqlens->data);
    p.cu_seqlens_stride = tables.cu_seqlens->strides[0];
  }
  if (call.on_host) {
    std::vector<int> raw;
    for (int b = 0; b < call.batch; ++b) {
      for (int page = 0; page < call.max_pages; ++page) {
        raw.push_back(table_value(tables.block_table, b, page));
      }
    }
    for (int b = 0; b < call.batch; ++b) raw.push_back(table_value(tables.cache_seqlens, b));
    for (int b = 0; call.ragged && b <= call.batch; ++b) {
      raw.push_back(table_value(*tables.cu_seqlens, b));
    }
    // Copied before the call returns, because the memory is pageable.
    const cudaError_t error = cudaMemcpyAsync(ints_at(at.raw), raw.data(), raw.size() * 4,
                                              cudaMemcpyHostToDevice, stream);
    if (error != cudaSuccess) return cuda::device_status(error, "cudaMemcpyAsync");
    p.block_table = ints_at(at.raw);
    p.block_table_stride_batch = call.max_pages;
    p.block_table_stride_page = 1;
    p.cache_seqlens = p.block_table + static_cast<int64_t>(call.batch) * call.max_pages;
    p.cache_seqlens_stride = 1;
    if (call.ragged) {
      p.cu_seqlens = p.cache_seqlens + call.batch;
      p.cu_seqlens_stride = 1;
    }
  }
  p.batch = call.batch;
  p.max_pages = call.max_pages;
  p.num_pages = s.pages.num_pages;
  p.page_shift = s.pages.page_shift;
  p.seqlen = call.seqlen;
  p.max_seqlen = call.seqlen;
  p.total = static_cast<int>(call.total);
  p.appends = appends;
  p.checked_table = ints_at(at.table);
  p.checked_seqlens = ints_at(at.seqlens);
  p.checked_cu = ints_at(at.cu);
  p.bad = ints_at(at.bad);
  launch<cuda::CheckTables>(p, call.batch, 1, stream);
  return cuda::device_status(cudaGetLastError(), "launching the kernel that checks the tables");
}

template <class Visit>
void for_float(DType dtype, const Visit& visit) {
  using cuda::Source;
  if (dtype == DType::kFloat32) return visit(std::integral_constant<Source, Source::kFloat32>());
  if (dtype == DType::kFloat16) return visit(std::integral_constant<Source, Source::kFloat16>());
  visit(std::integral_constant<Source, Source::kBFloat16>());
}

template <int kRowBytes, int kPackedDim>
void launch_append(const cuda::AppendParams& p, DType dtype, const Call& call,
                   cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(call.batch) * p.pages.nheads_k;
  // A sequence may begin and end inside a group.
  const int64_t groups = (call.seqlen + cuda::kKeyGroup - 1) / cuda::kKeyGroup + 1;
  for_float(dtype, [&](auto source) {
    if (p.smooth_k) {
      launch<cuda::AppendSums<source(), kRowBytes>>(p, p.chunks, heads, stream);
    }
    launch<cuda::AppendMean<kRowBytes>>(p, heads, 1, stream);
    launch<cuda::AppendTokens<source(), kRowBytes, kPackedDim>>(p, groups, heads, stream);
  });
}

Status check_context(const CudaKvCache::State& s, const Context& context) {
  if (context.device.type == DeviceType::kCuda && context.device.index == s.device) return {};
  return invalid("context.device differs from the device of the cache, cuda " +
                 std::to_string(s.device));
}

Status check_options(const CudaKvCacheOptions& o) {
  if (o.nheads_k < 1 || o.nheads_k > 65535) {
    return invalid("options.nheads_k=" + std::to_string(o.nheads_k) + ", want 1 to 65535");
  }
  if (o.head_dim < 1 || o.head_dim > 256) {
    return invalid("options.head_dim=" + std::to_string(o.head_dim) + ", want 1 to 256");
  }
  if (o.page_size < 256 || o.page_size > 65536 || (o.page_size & (o.page_size - 1)) != 0) {
    return invalid("options.page_size=" + std::to_string(o.page_size) +
                   ", want a power of two from 256 to 65536");
  }
  if (o.num_pages < 1 || o.num_pages > cuda::kNoLimit / o.nheads_k) {
    return invalid("options.num_pages=" + std::to_string(o.num_pages) + ", want 1 to " +
                   std::to_string(cuda::kNoLimit / o.nheads_k));
  }
  return {};
}

}  // namespace

Result<CudaKvCache> CudaKvCache::make(const CudaKvCacheOptions& options,
                                      const Context& context) noexcept try {
  if (Status status = check_options(options); !status.ok()) return status;
  if (context.device.type != DeviceType::kCuda) {
    return invalid("context.device is the cpu, want a CUDA device (KvCache is for the cpu)");
  }
  const Result<cuda::DeviceInfo> info = cuda::device_info(context.device.index);
  if (!info.ok()) return info.status();
  const Result<cuda::Kernels> kernels = cuda::kernels_of(context.device.index);
  if (!kernels.ok()) return kernels.status();
  auto state = std::make_shared<State>();
  State& s = *state;
  s.options = options;
  s.device = context.device.index;
  s.multiprocessors = info.value().multiprocessors;
  // The width with both kernels.
  s.softcap_entry = cuda::find_entry(kernels.value(), Weights::kFolded, cuda::Scores::kSoftcap,
                                     static_cast<int>(options.head_dim));
  if (s.softcap_entry != nullptr) {
    s.entry = cuda::find_entry(kernels.value(), Weights::kFolded, cuda::Scores::kPlain,
                               s.softcap_entry->head_dim);
  }
  if (s.entry == nullptr || s.entry->head_dim != s.softcap_entry->head_dim) {
    return Status(StatusCode::kUnavailable,
                  "this build has no CUDA kernel for head_dim=" + std::to_string(options.head_dim));
  }
  for (const cuda::AttendEntry* entry : {s.entry, s.softcap_entry}) {
    if (Status status = cuda::make_ready(*entry, s.device, info.value().name); !status.ok()) {
      return status;
    }
  }
  const size_t tokens = static_cast<size_t>(options.nheads_k) * options.page_size;
  const size_t k_bytes = tokens * s.row_bytes();
  const size_t v_bytes = tokens * s.packed_dim();
  const size_t constant_bytes = tokens * 2 * 4;
  const size_t mean_bytes = static_cast<size_t>(options.nheads_k) * s.row_bytes() * 4;
  s.bytes_per_page = k_bytes + v_bytes + constant_bytes + mean_bytes;
  Result<CudaMemory> memory = CudaMemory::allocate(s.bytes_per_page * options.num_pages, s.device);
  if (!memory.ok()) return memory.status();
  s.memory = std::move(memory).value();
  char* at = reinterpret_cast<char*>(s.memory.data());
  // Constants first, because they are the ones that tokens which were never written need cleared.
  s.pages.key_constants = reinterpret_cast<float*>(at);
  s.pages.k_mean = reinterpret_cast<float*>(at += constant_bytes * options.num_pages);
  s.pages.k = reinterpret_cast<int8_t*>(at += mean_bytes * options.num_pages);
  s.pages.v = reinterpret_cast<int8_t*>(at += k_bytes * options.num_pages);
  s.pages.nheads_k = static_cast<int>(options.nheads_k);
  s.pages.num_pages = static_cast<int>(options.num_pages);
  while (1 << s.pages.page_shift < options.page_size) ++s.pages.page_shift;
  const cuda::DeviceGuard guard(s.device);
  if (guard.error() != cudaSuccess) return cuda::device_status(guard.error(), "cudaSetDevice");
  cudaError_t error = cudaMemset(s.memory.data(), 0, s.memory.size());
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error != cudaSuccess) return cuda::device_status(error, "cudaMemset");
  return CudaKvCache(std::move(state));
} catch (...) {
  return Status(StatusCode::kOutOfMemory, {});
}

const CudaKvCacheOptions& CudaKvCache::options() const noexcept { return state_->options; }
size_t CudaKvCache::bytes_per_page() const noexcept { return state_->bytes_per_page; }

size_t CudaKvCache::workspace_bytes(const Extents& tokens,
                                    const CudaKvTables& tables) const noexcept try {
  const Result<Call> call = call_of(*state_, tokens, tables);
  // What is wrong with the shapes append() and attend() say.
  if (!call.ok() || tokens[2] % state_->options.nheads_k != 0) return 0;
  return lay_out(*state_, call.value(), tokens[2]).bytes;
} catch (...) {
  return 0;
}

Status CudaKvCache::append(const ConstTensorView& k, const ConstTensorView& v,
                           const CudaKvTables& tables, std::span<std::byte> workspace,
                           const Context& context) const noexcept try {
  const State& s = *state_;
  const Result<Call> result = call_of(s, k.shape, tables);
  if (!result.ok()) return result.status();
  const Call& call = result.value();
  const Extents want = {k.shape[0], k.shape[1], s.options.nheads_k, s.options.head_dim};
  Status checks[] = {check_context(s, context), check_shape("k", k, want),
                     check_shape("v", v, want), check_tokens("k", k, s.device),
                     check_tokens("v", v, s.device)};
  for (Status& check : checks) {
    if (!check.ok()) return check;
  }
  if (v.dtype != k.dtype) {
    return invalid("v.dtype=" + std::string(to_string(v.dtype)) + ", want that of k, " +
                   std::string(to_string(k.dtype)));
  }
  const cuda::DeviceGuard guard(s.device);
  if (guard.error() != cudaSuccess) return cuda::device_status(guard.error(), "cudaSetDevice");
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const Layout at = lay_out(s, call, s.options.nheads_k);
  if (Status status = prepare_tables(s, tables, call, true, at, workspace, stream); !status.ok()) {
    return status;
  }
  if (call.total == 0) return {};
  const auto ints_at = [&](size_t offset) {
    return reinterpret_cast<const int*>(workspace.data() + offset);
  };
  cuda::AppendParams p{};
  p.k = cuda::source_of(k);
  p.v = cuda::source_of(v);
  p.pages = s.pages;
  p.block_table = ints_at(at.table);
  p.max_pages = call.max_pages;
  p.seqlens = ints_at(at.seqlens);
  p.cu = call.ragged ? ints_at(at.cu) : nullptr;
  p.bad = ints_at(at.bad);
  p.smooth_k = s.options.smooth_k;
  p.sums = reinterpret_cast<double*>(workspace.data() + at.sums);
  p.chunks = append_chunks(call);
  if (s.packed_dim() == 64) {
    launch_append<64, 64>(p, k.dtype, call, stream);
  } else if (s.packed_dim() == 128) {
    launch_append<128, 128>(p, k.dtype, call, stream);
  } else {
    launch_append<256, 256>(p, k.dtype, call, stream);
  }
  return cuda::device_status(cudaGetLastError(), "launching the append kernels");
} catch (...) {
  return {StatusCode::kOutOfMemory, {}};
}

Status CudaKvCache::attend(const ConstTensorView& q, const CudaKvTables& tables,
                           const AttentionOutputs& outputs, const CudaKvAttentionOptions& options,
                           std::span<std::byte> workspace, const Context& context) const noexcept
    try {
  const State& s = *state_;
  const Result<Call> result = call_of(s, q.shape, tables);
  if (!result.ok()) return result.status();
  const Call& call = result.value();
  const int64_t heads = q.shape[2];
  if (heads < 1 || heads % s.options.nheads_k != 0) {
    return invalid("q.shape[2]=" + std::to_string(heads) +
                   ", want a multiple of nheads_k=" + std::to_string(s.options.nheads_k));
  }
  const ConstTensorView out(outputs.out);
  const Extents want = {q.shape[0], q.shape[1], heads, s.options.head_dim};
  const Extents want_lse = {q.shape[0], q.shape[1], heads, 1};
  Status checks[] = {
      check_context(s, context),
      check_shape("q", q, want),
      check_shape("out", out, want),
      outputs.lse ? check_shape("lse", ConstTensorView(*outputs.lse), want_lse) : Status(),
      options.sinks ? check_shape("sinks", *options.sinks, {1, 1, heads, 1}) : Status(),
      check_tokens("q", q, s.device),
      check_tokens("out", out, s.device)};
  for (Status& check : checks) {
    if (!check.ok()) return check;
  }
  for (const auto& [view, name] :
       {std::pair(outputs.lse ? std::optional<ConstTensorView>(*outputs.lse) : std::nullopt, "lse"),
        std::pair(options.sinks, "sinks")}) {
    if (!view.has_value()) continue;
    if (view->dtype != DType::kFloat32) {
      return invalid(std::string(name) + ".dtype=" + std::string(to_string(view->dtype)) +
                     ", want float32");
    }
    if (call.total == 0) continue;
    if (Status status = cuda::check_memory(view->data, name, s.device); !status.ok()) return status;
  }
  if (options.softcap != 0 && !(options.softcap >= 0x1p-20f && options.softcap <= 0x1p20f)) {
    return invalid("options.softcap=" + std::to_string(options.softcap) +
                   ", want 0 or 2^-20 to 2^20");
  }
  if (options.softmax_scale && !std::isfinite(*options.softmax_scale)) {
    return invalid("options.softmax_scale is not finite");
  }
  const int64_t offset_limit = int64_t{1} << 48;
  if (std::abs(options.mask.q_offset) > offset_limit ||
      std::abs(options.mask.k_offset) > offset_limit) {
    return invalid("options.mask.q_offset and k_offset want -2^48 to 2^48");
  }
  const cuda::DeviceGuard guard(s.device);
  if (guard.error() != cudaSuccess) return cuda::device_status(guard.error(), "cudaSetDevice");
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const Layout at = lay_out(s, call, heads);
  if (Status status = prepare_tables(s, tables, call, false, at, workspace, stream); !status.ok()) {
    return status;
  }
  if (call.total == 0) return {};

  std::byte* base = workspace.data();
  const auto ints_at = [&](size_t offset) { return reinterpret_cast<int*>(base + offset); };
  const auto floats_at = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
  const cuda::Division division = division_of(s, call, heads);
  const int64_t rows = rows_of(call, division.group);
  const int64_t images = (call.ragged ? 1 : call.batch) * (heads / division.group);
  const float softmax_scale = options.softmax_scale.value_or(
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(s.options.head_dim))));
  const bool needs_shift =
      s.options.smooth_k && (outputs.lse || options.sinks || options.softcap != 0);

  cuda::RowsParams q_rows{};
  q_rows.x = cuda::source_of(q);
  q_rows.codes = reinterpret_cast<int8_t*>(base + at.q);
  q_rows.rows = static_cast<int>(rows);
  q_rows.q_scale = floats_at(at.q_scale);
  q_rows.heads_per_mean = static_cast<int>(heads / s.options.nheads_k);
  q_rows.mean_channels = s.row_bytes();
  q_rows.softmax_scale = softmax_scale;
  q_rows.group = division.group;
  q_rows.cu_seqlens = call.ragged ? ints_at(at.cu) : nullptr;
  q_rows.bad = ints_at(at.bad);
  if (needs_shift) {
    q_rows.mean = s.pages.k_mean;
    q_rows.lse_shift = floats_at(at.lse_shift);
    q_rows.mean_pages = ints_at(at.table);
    q_rows.mean_pages_stride = call.max_pages;
  }
  if (call.ragged) {
    // Rows between sequences: scores of 0, whatever their codes are.
    const cudaError_t error = cudaMemsetAsync(q_rows.q_scale, 0, images * rows * 4, stream);
    if (error != cudaSuccess) return cuda::device_status(error, "cudaMemsetAsync");
  }
  const int64_t queries = call.ragged ? call.seqlen : (rows + division.group - 1) / division.group;
  cuda::enqueue_query_rows(q_rows, q.dtype, s.row_bytes(), queries, call.batch * heads, stream);

  AttendParams p{};
  p.q = q_rows.codes;
  p.k = s.pages.k;
  p.v = s.pages.v;
  p.q_scale = q_rows.q_scale;
  p.key_constants = s.pages.key_constants;
  cuda::set_out(p, out);
  if (outputs.lse) {
    p.lse = static_cast<float*>(outputs.lse->data);
    p.lse_stride_batch = outputs.lse->strides[0];
    p.lse_stride_row = outputs.lse->strides[1];
    p.lse_stride_head = outputs.lse->strides[2];
  }
  p.nheads_q = static_cast<int>(heads);
  p.nheads_k = static_cast<int>(s.options.nheads_k);
  p.rows_q = static_cast<int>(rows);
  p.rows_k = s.options.page_size;
  p.seqlen_q = call.seqlen;
  p.total_q = static_cast<int>(call.total);
  p.seqlen_k = static_cast<int>(std::min<int64_t>(
      static_cast<int64_t>(call.max_pages) << s.pages.page_shift, cuda::kNoLimit / 4));
  const cuda::MaskOffsets offsets =
      cuda::mask_offsets(options.mask, options.mask.q_offset - options.mask.k_offset);
  p.first_offset = offsets.first;
  p.last_offset = offsets.last;
  p.bottom_right = options.mask.align == CausalAlign::kBottomRight;
  p.score_scale = cuda::score_scale_of(softmax_scale);
  if (options.softcap != 0) {
    p.changes.softcap = static_cast<float>(options.softcap * 1.4426950408889634);
    p.changes.softcap_rate = static_cast<float>(2 / static_cast<double>(options.softcap));
    p.changes.score_shift = q_rows.lse_shift;
  } else {
    p.lse_shift = q_rows.lse_shift;
  }
  if (options.sinks) {
    p.sinks = static_cast<const float*>(options.sinks->data);
    p.sinks_stride = options.sinks->strides[2];
  }
  p.cu_seqlens_q = q_rows.cu_seqlens;
  p.seqlens_k = ints_at(at.seqlens);
  p.seqlens_k_stride = 1;
  p.block_table = ints_at(at.table);
  p.block_table_stride = call.max_pages;
  p.page_shift = s.pages.page_shift;
  return cuda::enqueue_attend(options.softcap != 0 ? *s.softcap_entry : *s.entry, p, division,
                              call.batch, call.ragged ? 1 : call.batch, floats_at(at.split_out),
                              floats_at(at.split_lse), stream);
} catch (...) {
  return {StatusCode::kOutOfMemory, {}};
}

}  // namespace attn8
