// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstring>

#include "attn8/attention.hpp"
#include "attn8/cuda_kv_cache.hpp"
#include "cuda/backend.hpp"

/// A C interface to the CUDA backend for benchmarks/gpu/bench.py, which owns the tensors and times
/// torch beside it.

namespace {

using attn8::ConstTensorView;
using attn8::DType;
using attn8::Extents;
using attn8::Operand;
using attn8::QuantizedView;

struct PlanHandle {
  attn8::cuda::Plan plan;
  attn8::AttentionInputs inputs;
  attn8::AttentionOutputs outputs;
};

int report(const attn8::Status& status, char* error, int error_bytes) {
  std::snprintf(error, error_bytes, "%s", status.message().c_str());
  return static_cast<int>(status.code());
}

}  // namespace

/// Mirrored by Pages in attn8_gpu.py. Tokens are dense [batch, seqlen, heads, head_dim].
extern "C" struct Attn8GpuPages {
  int32_t batch, max_pages, seqlen, nheads, head_dim, dtype, causal;
  void* block_table;    // int32 [batch, max_pages] on the device
  void* cache_seqlens;  // int32 [batch] on the device
};

namespace {

constexpr attn8::Device kDevice{attn8::DeviceType::kCuda, 0};

attn8::CudaKvTables tables_of(const Attn8GpuPages& p) {
  attn8::CudaKvTables tables;
  tables.block_table = ConstTensorView(p.block_table, DType::kInt32, kDevice,
                                       {p.batch, p.max_pages, 1, 1}, {p.max_pages, 1, 1, 1});
  tables.cache_seqlens =
      ConstTensorView(p.cache_seqlens, DType::kInt32, kDevice, {p.batch, 1, 1, 1}, {1, 1, 1, 1});
  return tables;
}

ConstTensorView tokens_of(const Attn8GpuPages& p, const void* data) {
  return attn8::bshd(data, static_cast<DType>(p.dtype), {p.batch, p.seqlen, p.nheads, p.head_dim},
                     kDevice);
}

}  // namespace

extern "C" {

/// Mirrored by Problem in bench.py. Tensors are dense [batch, heads, seqlen, head_dim] (torch's
/// order); dtype as attn8::DType.
struct Attn8GpuProblem {
  int32_t batch, seqlen_q, seqlen_k, nheads_q, nheads_k, head_dim;
  int32_t dtype, out_dtype, mode, v_granularity;
  int32_t causal, top_left, window_left, window_right, smooth_k, kernels;
  float softcap;
};

/// nullptr and a line in `error` when there is no plan. `lse` may be nullptr.
__attribute__((visibility("default"))) void* attn8_gpu_plan(const Attn8GpuProblem* p, void* q,
                                                            void* k, void* v, void* out, void* lse,
                                                            char* error, int error_bytes) {
  const attn8::Device device{attn8::DeviceType::kCuda, 0};
  const Extents q_shape = {p->batch, p->seqlen_q, p->nheads_q, p->head_dim};
  const Extents k_shape = {p->batch, p->seqlen_k, p->nheads_k, p->head_dim};
  const Extents lse_shape = {p->batch, p->seqlen_q, p->nheads_q, 1};
  const auto dtype = static_cast<DType>(p->dtype);
  const attn8::AttentionInputs inputs = {
      Operand(ConstTensorView(attn8::bhsd(q, dtype, q_shape, device))),
      Operand(ConstTensorView(attn8::bhsd(k, dtype, k_shape, device))),
      Operand(ConstTensorView(attn8::bhsd(v, dtype, k_shape, device)))};
  attn8::AttentionOutputs outputs;
  outputs.out = attn8::bhsd(out, static_cast<DType>(p->out_dtype), q_shape, device);
  if (lse != nullptr) outputs.lse = attn8::bhsd(lse, DType::kFloat32, lse_shape, device);
  attn8::AttentionOptions options;
  options.mode = static_cast<attn8::Mode>(p->mode);
  options.v_granularity = static_cast<attn8::Granularity>(p->v_granularity);
  options.mask.causal = p->causal != 0;
  options.mask.align =
      p->top_left != 0 ? attn8::CausalAlign::kTopLeft : attn8::CausalAlign::kBottomRight;
  options.mask.window_left = p->window_left;
  options.mask.window_right = p->window_right;
  options.smooth_k = p->smooth_k != 0;
  options.softcap = p->softcap;
  auto plan = attn8::cuda::Plan::make(inputs, outputs, options, device.index,
                                      static_cast<attn8::cuda::Kernels>(p->kernels));
  if (!plan.ok()) {
    report(plan.status(), error, error_bytes);
    return nullptr;
  }
  return new PlanHandle{plan.value(), inputs, outputs};
}

__attribute__((visibility("default"))) void attn8_gpu_free(void* handle) {
  delete static_cast<PlanHandle*>(handle);
}
__attribute__((visibility("default"))) uint64_t attn8_gpu_workspace_bytes(const void* handle) {
  return static_cast<const PlanHandle*>(handle)->plan.workspace_bytes();
}
__attribute__((visibility("default"))) int attn8_gpu_kv_block(const void* handle) {
  return static_cast<const PlanHandle*>(handle)->plan.kv_block();
}
__attribute__((visibility("default"))) void attn8_gpu_kernel(const void* handle, char* name,
                                                             int bytes) {
  const auto kernel = static_cast<const PlanHandle*>(handle)->plan.kernel();
  std::snprintf(name, bytes, "%.*s", static_cast<int>(kernel.size()), kernel.data());
}
__attribute__((visibility("default"))) int attn8_gpu_pack(const void* handle, void* workspace,
                                                          void* stream, char* error, int bytes) {
  const auto* h = static_cast<const PlanHandle*>(handle);
  return report(h->plan.pack(h->inputs, workspace, stream), error, bytes);
}
__attribute__((visibility("default"))) int attn8_gpu_attend(const void* handle, void* workspace,
                                                            void* stream, char* error, int bytes) {
  const auto* h = static_cast<const PlanHandle*>(handle);
  return report(h->plan.attend(h->inputs, h->outputs, workspace, stream), error, bytes);
}

/// A paged cache.
__attribute__((visibility("default"))) void* attn8_gpu_cache(int nheads_k, int head_dim,
                                                             int num_pages, char* error,
                                                             int bytes) {
  auto cache =
      attn8::CudaKvCache::make({.nheads_k = nheads_k, .head_dim = head_dim, .num_pages = num_pages},
                               attn8::Context::cuda(0));
  if (!cache.ok()) {
    report(cache.status(), error, bytes);
    return nullptr;
  }
  return new attn8::CudaKvCache(cache.value());
}
__attribute__((visibility("default"))) void attn8_gpu_cache_free(void* cache) {
  delete static_cast<attn8::CudaKvCache*>(cache);
}

__attribute__((visibility("default"))) uint64_t attn8_gpu_cache_workspace(const void* cache,
                                                                          const Attn8GpuPages* p) {
  return static_cast<const attn8::CudaKvCache*>(cache)->workspace_bytes(
      {p->batch, p->seqlen, p->nheads, p->head_dim}, tables_of(*p));
}
__attribute__((visibility("default"))) int attn8_gpu_cache_append(const void* cache,
                                                                  const Attn8GpuPages* p, void* k,
                                                                  void* v, void* workspace,
                                                                  void* stream, char* error,
                                                                  int bytes) {
  const auto* c = static_cast<const attn8::CudaKvCache*>(cache);
  const attn8::CudaKvTables tables = tables_of(*p);
  const Extents shape = {p->batch, p->seqlen, p->nheads, p->head_dim};
  return report(c->append(tokens_of(*p, k), tokens_of(*p, v), tables,
                          {static_cast<std::byte*>(workspace), c->workspace_bytes(shape, tables)},
                          attn8::Context::cuda(0, stream)),
                error, bytes);
}
__attribute__((visibility("default"))) int attn8_gpu_cache_attend(const void* cache,
                                                                  const Attn8GpuPages* p, void* q,
                                                                  void* out, void* workspace,
                                                                  void* stream, char* error,
                                                                  int bytes) {
  const auto* c = static_cast<const attn8::CudaKvCache*>(cache);
  const attn8::CudaKvTables tables = tables_of(*p);
  const Extents shape = {p->batch, p->seqlen, p->nheads, p->head_dim};
  attn8::AttentionOutputs outputs;
  outputs.out = attn8::bshd(out, static_cast<DType>(p->dtype), shape, kDevice);
  return report(c->attend(tokens_of(*p, q), tables, outputs, {.mask = {.causal = p->causal != 0}},
                          {static_cast<std::byte*>(workspace), c->workspace_bytes(shape, tables)},
                          attn8::Context::cuda(0, stream)),
                error, bytes);
}

}  // extern "C"
