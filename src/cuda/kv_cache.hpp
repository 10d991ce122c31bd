// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "append.hpp"
#include "attn8/cuda.hpp"
#include "attn8/cuda_kv_cache.hpp"
#include "plan.hpp"

/// What the paged cache (kv_cache.cu) and the tables of its calls (kv_tables.cu) share.
namespace attn8 {

struct CudaKvCache::State {
  CudaKvCacheOptions options;
  int device = 0;
  int multiprocessors = 0;
  /// As wide as each other: of plain scores, with softcap, and with attn_mask and ALiBi.
  const cuda::AttendEntry* entry = nullptr;
  const cuda::AttendEntry* softcap_entry = nullptr;
  const cuda::AttendEntry* biased_entry = nullptr;
  /// For few queries, of plain scores; nullptr where there is none as wide.
  const cuda::AttendEntry* decode_entry = nullptr;
  CudaMemory memory;
  cuda::Pages pages = {};
  size_t bytes_per_page = 0;

  [[nodiscard]] int packed_dim() const { return entry->head_dim; }
  [[nodiscard]] int row_bytes() const { return cuda::packed_row_bytes(entry->head_dim); }
};

namespace cuda {

template <class Kernel, class Params>
__global__ void __launch_bounds__(Kernel::kThreads)
    cache_kernel(const __grid_constant__ Params params) {
  Kernel::run(params);
}

template <class Kernel, class Params>
void launch_cache(const Params& params, int64_t x, int64_t y, cudaStream_t stream) {
  if (x <= 0 || y <= 0) return;
  cache_kernel<Kernel, Params><<<dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
                                 Kernel::kThreads, Kernel::kSharedBytes, stream>>>(params);
}

inline Status invalid(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}
/// "[1, 2, 3, 4]".
std::string text(const Extents& extents);
/// kInvalidArgument unless the view has this shape.
Status check_shape(const char* name, const ConstTensorView& view, const Extents& want);

/// What the tables of a call say on the host.
struct CacheCall {
  int batch = 0, max_pages = 0;
  bool ragged = false;
  bool on_host = false;
  int seqlen = 0;        ///< of a sequence; of a ragged batch the most
  int64_t total = 0;     ///< tokens of the call
  int64_t max_keys = 0;  ///< that a sequence may have: of its pages, and of attn_mask
};

/// Where the checked tables lie in the workspace, then what follows them.
struct CacheLayout {
  size_t table = 0, seqlens = 0, cu = 0, bad = 0, raw = 0, sums = 0, q = 0, q_scale = 0,
         lse_shift = 0, split_out = 0, split_lse = 0, bytes = 0;
};

/// The kernel of plain scores.
const AttendEntry& plain_entry(const CudaKvCache::State& s, const CacheCall& call,
                               int64_t nheads_q);
Division division_of(const CudaKvCache::State& s, const AttendEntry& entry, const CacheCall& call,
                     int64_t nheads_q);
/// Rows of an image of Q.
int64_t rows_of(const CacheCall& call, int group);
int append_chunks(const CacheCall& call);
/// The workspace of a call with this many heads, whichever kernel attends.
CacheLayout lay_out(const CudaKvCache::State& s, const CacheCall& call, int64_t heads);

/// The shapes of a call; not what the tables hold.
Result<CacheCall> call_of(const CudaKvCache::State& s, const Extents& tokens,
                          const CudaKvTables& tables);
/// Checks the tables and enqueues what makes them safe to use.
Status prepare_tables(const CudaKvCache::State& s, const CudaKvTables& tables,
                      const CacheCall& call, bool appends, const CacheLayout& at,
                      std::span<std::byte> workspace, cudaStream_t stream);

}  // namespace cuda
}  // namespace attn8
