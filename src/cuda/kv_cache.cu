// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "kv_cache.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

/// The paged cache behind attn8/cuda_kv_cache.hpp.
namespace attn8 {
namespace {

using cuda::AttendParams;
using cuda::CacheCall;
using cuda::CacheLayout;
using cuda::check_shape;
using cuda::invalid;
using cuda::launch_cache;
using cuda::Weights;

Status check_tokens(const char* name, const ConstTensorView& view, int device) {
  if (!is_float(view.dtype)) {
    return invalid(std::string(name) + ".dtype=" + std::string(to_string(view.dtype)) +
                   ", want float32, float16 or bfloat16");
  }
  if (view.shape[0] * view.shape[1] * view.shape[2] * view.shape[3] == 0) return {};
  return cuda::check_memory(view.data, name, device);
}

/// Of tokens of shape `q`, each axis whole or one element for all.
Status check_mask_shape(const ConstTensorView& mask, const Extents& q) {
  Extents want = {q[0], q[1], q[2], mask.shape[3]};
  for (size_t axis = 0; axis < 3; ++axis) {
    if (mask.shape[axis] == 1) want[axis] = 1;
  }
  return check_shape("attn_mask", mask, want);
}

template <class Visit>
void for_float(DType dtype, const Visit& visit) {
  using cuda::Source;
  if (dtype == DType::kFloat32) return visit(std::integral_constant<Source, Source::kFloat32>());
  if (dtype == DType::kFloat16) return visit(std::integral_constant<Source, Source::kFloat16>());
  visit(std::integral_constant<Source, Source::kBFloat16>());
}

template <int kRowBytes, int kPackedDim>
void launch_append(const cuda::AppendParams& p, DType dtype, const CacheCall& call,
                   cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(call.batch) * p.pages.nheads_k;
  // A sequence may begin and end inside a group.
  const int64_t groups = (call.seqlen + cuda::kKeyGroup - 1) / cuda::kKeyGroup + 1;
  for_float(dtype, [&](auto source) {
    if (p.smooth_k) {
      launch_cache<cuda::AppendSums<source(), kRowBytes>>(p, p.chunks, heads, stream);
    }
    launch_cache<cuda::AppendMean<kRowBytes>>(p, heads, 1, stream);
    launch_cache<cuda::AppendTokens<source(), kRowBytes, kPackedDim>>(p, groups, heads, stream);
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

/// Bytes of all pages of each kind.
struct PageBytes {
  size_t key_constants, k_mean, k, v;
};
PageBytes bytes_of(const CudaKvCache::State& s) {
  const size_t tokens = static_cast<size_t>(s.options.nheads_k) * s.options.page_size;
  const size_t mean_bytes = static_cast<size_t>(s.options.nheads_k) * s.row_bytes() * 4;
  const size_t pages = static_cast<size_t>(s.options.num_pages);
  return {tokens * 2 * 4 * pages, mean_bytes * pages, tokens * s.row_bytes() * pages,
          tokens * s.packed_dim() * pages};
}

/// Everything of a cache but its memory.
Status describe(const CudaKvCacheOptions& options, const Context& context, CudaKvCache::State& s) {
  if (Status status = check_options(options); !status.ok()) return status;
  if (context.device.type != DeviceType::kCuda) {
    return invalid("context.device is the cpu, want a CUDA device (KvCache is for the cpu)");
  }
  const Result<cuda::DeviceInfo> info = cuda::device_info(context.device.index);
  if (!info.ok()) return info.status();
  const Result<cuda::Kernels> kernels = cuda::kernels_of(context.device.index);
  if (!kernels.ok()) return kernels.status();
  s.options = options;
  s.device = context.device.index;
  s.multiprocessors = info.value().multiprocessors;
  // The width with all three kernels.
  const auto entry_of = [&](cuda::Scores scores, int64_t head_dim, int64_t rows) {
    return cuda::find_entry(kernels.value(), Weights::kFolded, scores, static_cast<int>(head_dim),
                            rows);
  };
  s.softcap_entry = entry_of(cuda::Scores::kSoftcap, options.head_dim, cuda::kManyRows);
  if (s.softcap_entry != nullptr) {
    s.entry = entry_of(cuda::Scores::kPlain, s.softcap_entry->head_dim, cuda::kManyRows);
    s.biased_entry = entry_of(cuda::Scores::kBiased, s.softcap_entry->head_dim, cuda::kManyRows);
  }
  const cuda::AttendEntry* const entries[] = {s.entry, s.softcap_entry, s.biased_entry};
  for (const cuda::AttendEntry* entry : entries) {
    if (entry != nullptr && entry->head_dim == s.softcap_entry->head_dim) continue;
    return {StatusCode::kUnavailable,
            "this build has no CUDA kernel for head_dim=" + std::to_string(options.head_dim)};
  }
  for (const cuda::AttendEntry* entry : entries) {
    if (Status status = cuda::make_ready(*entry, s.device, info.value().name); !status.ok()) {
      return status;
    }
  }
  const cuda::AttendEntry* decode = entry_of(cuda::Scores::kPlain, s.entry->head_dim, 1);
  if (decode->family == cuda::Family::kDecode && decode->head_dim == s.entry->head_dim) {
    if (Status status = cuda::make_ready(*decode, s.device, info.value().name); !status.ok()) {
      return status;
    }
    s.decode_entry = decode;
  }
  const PageBytes bytes = bytes_of(s);
  s.bytes_per_page = (bytes.key_constants + bytes.k_mean + bytes.k + bytes.v) / options.num_pages;
  return {};
}

}  // namespace

Result<size_t> CudaKvCache::memory_bytes(const CudaKvCacheOptions& options,
                                         const Context& context) noexcept try {
  State s;
  if (Status status = describe(options, context, s); !status.ok()) return status;
  return s.bytes_per_page * static_cast<size_t>(options.num_pages);
} catch (...) {
  return Status(StatusCode::kOutOfMemory, {});
}

Result<CudaKvCache> CudaKvCache::make(const CudaKvCacheOptions& options,
                                      const Context& context) noexcept try {
  auto state = std::make_shared<State>();
  State& s = *state;
  if (Status status = describe(options, context, s); !status.ok()) return status;
  const size_t total = s.bytes_per_page * static_cast<size_t>(options.num_pages);
  std::byte* data = options.memory.data();
  const bool allocates = options.memory.empty();
  if (allocates) {
    Result<CudaMemory> memory = CudaMemory::allocate(total, s.device);
    if (!memory.ok()) return memory.status();
    s.memory = std::move(memory).value();
    data = s.memory.data();
  } else {
    if (options.memory.size() < total || reinterpret_cast<uintptr_t>(data) % 256 != 0) {
      return invalid("options.memory got " + std::to_string(options.memory.size()) +
                     " bytes, want " + std::to_string(total) + ", 256-byte aligned");
    }
    if (Status status = cuda::check_memory(data, "options.memory", s.device); !status.ok()) {
      return status;
    }
  }
  const PageBytes bytes = bytes_of(s);
  char* at = reinterpret_cast<char*>(data);
  // Constants first, because they are the ones that tokens which were never written need cleared.
  s.pages.key_constants = reinterpret_cast<float*>(at);
  s.pages.k_mean = reinterpret_cast<float*>(at += bytes.key_constants);
  s.pages.k = reinterpret_cast<int8_t*>(at += bytes.k_mean);
  s.pages.v = reinterpret_cast<int8_t*>(at += bytes.k);
  s.pages.nheads_k = static_cast<int>(options.nheads_k);
  s.pages.num_pages = static_cast<int>(options.num_pages);
  while (1 << s.pages.page_shift < options.page_size) ++s.pages.page_shift;
  const cuda::DeviceGuard guard(s.device);
  if (guard.error() != cudaSuccess) return cuda::device_status(guard.error(), "cudaSetDevice");
  cudaError_t error = cudaSuccess;
  if (allocates) {
    error = cudaMemset(data, 0, total);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
  } else {
    error = cudaMemsetAsync(data, 0, bytes.key_constants + bytes.k_mean,
                            static_cast<cudaStream_t>(context.stream));
  }
  if (error != cudaSuccess) return cuda::device_status(error, "cudaMemset");
  return CudaKvCache(std::move(state));
} catch (...) {
  return Status(StatusCode::kOutOfMemory, {});
}

const CudaKvCacheOptions& CudaKvCache::options() const noexcept { return state_->options; }
size_t CudaKvCache::bytes_per_page() const noexcept { return state_->bytes_per_page; }

size_t CudaKvCache::workspace_bytes(const Extents& tokens,
                                    const CudaKvTables& tables) const noexcept try {
  const Result<CacheCall> call = cuda::call_of(*state_, tokens, tables);
  // What is wrong with the shapes append() and attend() say.
  if (!call.ok() || tokens[2] % state_->options.nheads_k != 0) return 0;
  return cuda::lay_out(*state_, call.value(), tokens[2]).bytes;
} catch (...) {
  return 0;
}

Status CudaKvCache::append(const ConstTensorView& k, const ConstTensorView& v,
                           const CudaKvTables& tables, std::span<std::byte> workspace,
                           const Context& context) const noexcept try {
  const State& s = *state_;
  const Result<CacheCall> result = cuda::call_of(s, k.shape, tables);
  if (!result.ok()) return result.status();
  const CacheCall& call = result.value();
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
  const CacheLayout at = cuda::lay_out(s, call, s.options.nheads_k);
  if (Status status = cuda::prepare_tables(s, tables, call, true, at, workspace, stream);
      !status.ok()) {
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
  p.chunks = cuda::append_chunks(call);
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
  Result<CacheCall> result = cuda::call_of(s, q.shape, tables);
  if (!result.ok()) return result.status();
  CacheCall& call = result.value();
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
      options.alibi_slopes && options.alibi_slopes->shape[0] != 1
          ? check_shape("alibi_slopes", *options.alibi_slopes, {call.batch, 1, heads, 1})
          : Status(),
      options.alibi_slopes && options.alibi_slopes->shape[0] == 1
          ? check_shape("alibi_slopes", *options.alibi_slopes, {1, 1, heads, 1})
          : Status(),
      options.attn_mask ? check_mask_shape(*options.attn_mask, q.shape) : Status(),
      check_tokens("q", q, s.device),
      check_tokens("out", out, s.device)};
  for (Status& check : checks) {
    if (!check.ok()) return check;
  }
  for (const auto& [view, name] :
       {std::pair(outputs.lse ? std::optional<ConstTensorView>(*outputs.lse) : std::nullopt, "lse"),
        std::pair(options.sinks, "sinks"), std::pair(options.alibi_slopes, "alibi_slopes"),
        std::pair(options.attn_mask, "attn_mask")}) {
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
  const int64_t position = options.mask.q_offset - options.mask.k_offset;
  if (options.alibi_slopes && std::abs(position) > cuda::kNoLimit / 4) {
    return Status(StatusCode::kUnsupported,
                  "options.mask.q_offset - k_offset=" + std::to_string(position) +
                      ", with alibi_slopes on CUDA at most 2^28 apart");
  }
  if (options.attn_mask && options.attn_mask->shape[3] != 1) {
    call.max_keys = std::min(call.max_keys, options.attn_mask->shape[3]);
  }
  const cuda::DeviceGuard guard(s.device);
  if (guard.error() != cudaSuccess) return cuda::device_status(guard.error(), "cudaSetDevice");
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const CacheLayout at = cuda::lay_out(s, call, heads);
  if (Status status = cuda::prepare_tables(s, tables, call, false, at, workspace, stream);
      !status.ok()) {
    return status;
  }
  if (call.total == 0) return {};

  std::byte* base = workspace.data();
  const auto ints_at = [&](size_t offset) { return reinterpret_cast<int*>(base + offset); };
  const auto floats_at = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
  const cuda::AttendEntry* entry = options.alibi_slopes || options.attn_mask ? s.biased_entry
                                   : options.softcap != 0                    ? s.softcap_entry
                                                          : &cuda::plain_entry(s, call, heads);
  // Those that change scores divide as the one that does not.
  const bool plain = entry != s.biased_entry && entry != s.softcap_entry;
  const cuda::Division division = cuda::division_of(s, plain ? *entry : *s.entry, call, heads);
  const int64_t rows = cuda::rows_of(call, division.group);
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
  const cuda::MaskOffsets offsets = cuda::mask_offsets(options.mask, position);
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
  if (options.alibi_slopes) {
    const ConstTensorView& slopes = *options.alibi_slopes;
    p.changes.position_offset = static_cast<int>(position);
    p.changes.alibi_slopes = static_cast<const float*>(slopes.data);
    p.changes.alibi_stride_batch = slopes.shape[0] == 1 ? 0 : slopes.strides[0];
    p.changes.alibi_stride_head = slopes.strides[2];
  }
  if (options.attn_mask) {
    const ConstTensorView& mask = *options.attn_mask;
    const auto stride = [&](size_t axis) { return mask.shape[axis] == 1 ? 0 : mask.strides[axis]; };
    p.changes.attn_mask = static_cast<const float*>(mask.data);
    p.changes.attn_mask_stride_batch = stride(0);
    p.changes.attn_mask_stride_row = stride(1);
    p.changes.attn_mask_stride_head = stride(2);
    p.changes.attn_mask_stride_key = stride(3);
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
  return cuda::enqueue_attend(*entry, p, division, call.batch, call.ragged ? 1 : call.batch,
                              floats_at(at.split_out), floats_at(at.split_lse), stream);
} catch (...) {
  return {StatusCode::kOutOfMemory, {}};
}

}  // namespace attn8
