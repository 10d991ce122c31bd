// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// CUDA in attn8.h over attn8/cuda.hpp and attn8/cuda_kv_cache.hpp, by the rules of c_api.cpp.
#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "attn8/cuda.hpp"
#include "attn8/cuda_kv_cache.hpp"
#include "core/c_api.hpp"
#include "core/c_structs.hpp"
#include "core/message.hpp"

struct attn8_cuda_memory {
  attn8::CudaMemory value;
};

struct attn8_cuda_kv_cache {
  attn8::CudaKvCache value;
};

namespace attn8 {
namespace {

using namespace c_api;      // NOLINT: written for this
using namespace c_structs;  // NOLINT

attn8_cuda_kv_cache_params default_cache_params() noexcept {
  attn8_cuda_kv_cache_params params = {};
  params.page_size = CudaKvCacheOptions{}.page_size;
  params.smooth_k = 1;
  return params;
}

Status read_cache_params(const attn8_cuda_kv_cache_params* in, CudaKvCacheOptions& options) {
  attn8_cuda_kv_cache_params params = default_cache_params();
  ATTN8_RETURN_IF_ERROR(read("params", in, kUnit, params));
  ATTN8_RETURN_IF_ERROR(check_reserved("params", params.reserved));
  options.nheads_k = params.nheads_k;
  options.head_dim = params.head_dim;
  options.page_size = params.page_size;
  options.num_pages = params.num_pages;
  options.smooth_k = params.smooth_k != 0;
  if (params.memory == nullptr && params.memory_bytes != 0) {
    return invalid("params.memory got NULL, params.memory_bytes ", params.memory_bytes);
  }
  options.memory = {static_cast<std::byte*>(params.memory), params.memory_bytes};
  return {};
}

/// As much of the text as there is room for, and zeros.
template <size_t kSize>
void copy_text(std::string_view text, char (&to)[kSize]) noexcept {
  const std::string_view kept = text.substr(0, kSize - 1);
  std::fill(std::copy(kept.begin(), kept.end(), to), to + kSize, '\0');
}

Status read_tables(const attn8_cuda_kv_tables* in, CudaKvTables& tables) {
  attn8_cuda_kv_tables from = {};
  ATTN8_RETURN_IF_ERROR(read("tables", in, kUnit, from));
  ATTN8_RETURN_IF_ERROR(check_reserved("tables", from.reserved));
  TensorView block_table, cache_seqlens;
  std::optional<TensorView> cu_seqlens;
  ATTN8_RETURN_IF_ERROR(read_plain("tables.block_table", from.block_table, block_table));
  ATTN8_RETURN_IF_ERROR(read_plain("tables.cache_seqlens", from.cache_seqlens, cache_seqlens));
  ATTN8_RETURN_IF_ERROR(read_optional("tables.cu_seqlens", from.cu_seqlens, cu_seqlens));
  tables.block_table = block_table;
  tables.cache_seqlens = cache_seqlens;
  if (cu_seqlens.has_value()) tables.cu_seqlens = *cu_seqlens;
  tables.max_seqlen = from.max_seqlen;
  return {};
}

Status to_options(const KvAttendParams& params, CudaKvAttentionOptions& options) {
  const KvCacheAttentionOptions& from = params.options;
  if (from.mode != Mode::kAccurate || !params.head_modes.empty()) {
    return failure(StatusCode::kUnsupported, "params sets mode or head_modes, ",
                   "the cache on CUDA is for ATTN8_ACCURATE");
  }
  options.softmax_scale = from.softmax_scale;
  options.mask = from.mask;
  options.softcap = from.softcap;
  options.attn_mask = from.attn_mask;
  options.alibi_slopes = from.alibi_slopes;
  options.sinks = from.sinks;
  return {};
}

std::span<std::byte> span_of(void* workspace, size_t bytes) noexcept {
  return {static_cast<std::byte*>(workspace), workspace != nullptr ? bytes : 0};
}

}  // namespace
}  // namespace attn8

using namespace attn8;  // NOLINT: what follows is attn8.h's side of it

extern "C" {

int32_t attn8_cuda_device_count(void) {
  return static_cast<int32_t>(cuda_support().devices.size());
}

attn8_status attn8_cuda_device_at(int32_t index, attn8_cuda_device* device) {
  return call([&]() -> Status {
    if (device != nullptr) {
      ATTN8_RETURN_IF_ERROR(check_size("device", device->struct_size, sizeof(attn8_cuda_device)));
    }
    const CudaSupport support = cuda_support();
    if (support.devices.empty()) return {StatusCode::kUnavailable, support.reason};
    if (index < 0 || index >= static_cast<int64_t>(support.devices.size())) {
      return failure(StatusCode::kUnavailable, "index got ", index, ", there are ",
                     support.devices.size(), " CUDA devices");
    }
    const CudaDevice& from = support.devices[static_cast<size_t>(index)];
    if (from.kernels.empty()) return {StatusCode::kUnavailable, from.reason};
    if (device == nullptr) return {};
    attn8_cuda_device result = {};
    result.major = from.major;
    result.minor = from.minor;
    result.multiprocessors = from.multiprocessors;
    copy_text(from.name, result.name);
    copy_text(from.kernels, result.kernels);
    write(result, device);
    return {};
  });
}

attn8_status attn8_cuda_synchronize(int32_t device) {
  return call([&] { return cuda_synchronize(device); });
}

attn8_status attn8_cuda_memory_create(int32_t device, size_t bytes, attn8_cuda_memory** memory) {
  return call([&]() -> Status {
    if (memory == nullptr) return invalid("memory got NULL");
    *memory = nullptr;
    Result<CudaMemory> made = CudaMemory::allocate(bytes, device);
    if (!made.ok()) return made.status();
    *memory = new attn8_cuda_memory{std::move(made).value()};
    return {};
  });
}

void attn8_cuda_memory_destroy(attn8_cuda_memory* memory) { delete memory; }

void* attn8_cuda_memory_data(const attn8_cuda_memory* memory) {
  return memory != nullptr ? memory->value.data() : nullptr;
}

attn8_status attn8_cuda_memory_upload(attn8_cuda_memory* memory, const void* host) {
  return call([&]() -> Status {
    if (memory == nullptr) return invalid("memory got NULL");
    if (host == nullptr) return invalid("host got NULL");
    return memory->value.upload(host);
  });
}

attn8_status attn8_cuda_memory_download(const attn8_cuda_memory* memory, void* host) {
  return call([&]() -> Status {
    if (memory == nullptr) return invalid("memory got NULL");
    if (host == nullptr) return invalid("host got NULL");
    return memory->value.download(host);
  });
}

attn8_status attn8_cuda_kv_cache_params_init(attn8_cuda_kv_cache_params* params,
                                             uint32_t struct_size) {
  return call(
      [&] { return initialize("params", default_cache_params(), params, struct_size, kUnit); });
}

attn8_status attn8_cuda_kv_tables_init(attn8_cuda_kv_tables* tables, uint32_t struct_size) {
  return call(
      [&] { return initialize("tables", attn8_cuda_kv_tables{}, tables, struct_size, kUnit); });
}

attn8_status attn8_cuda_kv_cache_memory_bytes(const attn8_cuda_kv_cache_params* in,
                                              const attn8_context* context, size_t* bytes) {
  return call([&]() -> Status {
    if (bytes == nullptr) return invalid("bytes got NULL");
    CudaKvCacheOptions options;
    ATTN8_RETURN_IF_ERROR(read_cache_params(in, options));
    const Result<size_t> result = CudaKvCache::memory_bytes(options, context_of(context));
    if (!result.ok()) return result.status();
    *bytes = result.value();
    return {};
  });
}

attn8_status attn8_cuda_kv_cache_create(const attn8_cuda_kv_cache_params* in,
                                        const attn8_context* context, attn8_cuda_kv_cache** cache) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    *cache = nullptr;
    CudaKvCacheOptions options;
    ATTN8_RETURN_IF_ERROR(read_cache_params(in, options));
    Result<CudaKvCache> made = CudaKvCache::make(options, context_of(context));
    if (!made.ok()) return made.status();
    *cache = new attn8_cuda_kv_cache{std::move(made).value()};
    return {};
  });
}

void attn8_cuda_kv_cache_destroy(attn8_cuda_kv_cache* cache) { delete cache; }

size_t attn8_cuda_kv_cache_bytes_per_page(const attn8_cuda_kv_cache* cache) {
  return cache != nullptr ? cache->value.bytes_per_page() : 0;
}

attn8_status attn8_cuda_kv_cache_workspace_bytes(const attn8_cuda_kv_cache* cache,
                                                 const int64_t shape[4],
                                                 const attn8_cuda_kv_tables* in, size_t* bytes) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    if (shape == nullptr) return invalid("shape got NULL");
    if (bytes == nullptr) return invalid("bytes got NULL");
    CudaKvTables tables;
    ATTN8_RETURN_IF_ERROR(read_tables(in, tables));
    *bytes = cache->value.workspace_bytes({shape[0], shape[1], shape[2], shape[3]}, tables);
    return {};
  });
}

attn8_status attn8_cuda_kv_cache_append(const attn8_cuda_kv_cache* cache, const attn8_tensor* k,
                                        const attn8_tensor* v, const attn8_cuda_kv_tables* in,
                                        void* workspace, size_t workspace_bytes,
                                        const attn8_context* context) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    TensorView k_view, v_view;
    CudaKvTables tables;
    ATTN8_RETURN_IF_ERROR(read_plain("k", k, k_view));
    ATTN8_RETURN_IF_ERROR(read_plain("v", v, v_view));
    ATTN8_RETURN_IF_ERROR(read_tables(in, tables));
    return cache->value.append(k_view, v_view, tables, span_of(workspace, workspace_bytes),
                               context_of(context));
  });
}

attn8_status attn8_cuda_kv_cache_attend(const attn8_cuda_kv_cache* cache, const attn8_tensor* q,
                                        const attn8_cuda_kv_tables* in, const attn8_tensor* out,
                                        const attn8_tensor* lse,
                                        const attn8_kv_attention_params* params, void* workspace,
                                        size_t workspace_bytes, const attn8_context* context) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    TensorView q_view;
    AttentionOutputs outputs;
    CudaKvTables tables;
    KvAttendParams attend;
    CudaKvAttentionOptions options;
    ATTN8_RETURN_IF_ERROR(read_plain("q", q, q_view));
    ATTN8_RETURN_IF_ERROR(read_tables(in, tables));
    ATTN8_RETURN_IF_ERROR(read_plain("out", out, outputs.out));
    ATTN8_RETURN_IF_ERROR(read_optional("lse", lse, outputs.lse));
    ATTN8_RETURN_IF_ERROR(read_kv_attend_params(params, cache->value.options().nheads_k, attend));
    ATTN8_RETURN_IF_ERROR(to_options(attend, options));
    return cache->value.attend(q_view, tables, outputs, options,
                               span_of(workspace, workspace_bytes), context_of(context));
  });
}

}  // extern "C"
