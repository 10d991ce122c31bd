// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// A C interface to attention on the CPU for benchmarks/peers, which owns the tensors and times
// other libraries beside it.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <new>

#include "attn8/attn8.hpp"

namespace {

using attn8::DType;
using attn8::Extents;

constexpr std::align_val_t kWorkspaceAlignment{64};

struct Handle {
  attn8::AttentionInputs inputs;
  attn8::AttentionOutputs outputs;
  attn8::AttentionPlan plan;
  std::byte* workspace;
};

}  // namespace

extern "C" {

/// Mirrored by Shape in libraries/attn8_library.py. Tensors are dense [batch, heads, seqlen,
/// head_dim]; dtype and mode as attn8::DType and attn8::Mode; out is float32.
struct Attn8PeersShape {
  int64_t batch, nheads_q, nheads_k, seqlen_q, seqlen_k, head_dim;
  int32_t dtype, mode, causal, threads;
};

/// nullptr and a line in `error` when there is no plan. The tensors must outlive the handle.
ATTN8_API void* attn8_peers_make(const Attn8PeersShape* p, const void* q, const void* k,
                                 const void* v, float* out, char* error, size_t error_bytes) {
  const Extents q_shape = {p->batch, p->seqlen_q, p->nheads_q, p->head_dim};
  const Extents k_shape = {p->batch, p->seqlen_k, p->nheads_k, p->head_dim};
  const auto dtype = static_cast<DType>(p->dtype);
  const attn8::AttentionInputs inputs = {.q = attn8::bhsd(q, dtype, q_shape),
                                         .k = attn8::bhsd(k, dtype, k_shape),
                                         .v = attn8::bhsd(v, dtype, k_shape)};
  const attn8::AttentionOutputs outputs = {.out = attn8::bhsd(out, DType::kFloat32, q_shape)};
  const auto plan = attn8::AttentionPlan::make(
      inputs, outputs,
      {.mode = static_cast<attn8::Mode>(p->mode), .mask = {.causal = p->causal != 0}},
      attn8::Context::cpu(p->threads));
  if (!plan.ok()) {
    std::snprintf(error, error_bytes, "%s", plan.status().message().c_str());
    return nullptr;
  }
  auto* workspace =
      static_cast<std::byte*>(::operator new(plan.value().workspace_bytes(), kWorkspaceAlignment));
  return new Handle{inputs, outputs, plan.value(), workspace};
}

/// Computes once; 0 on success.
ATTN8_API int attn8_peers_run(void* handle, double* quantize_ms, double* attention_ms) {
  const auto& h = *static_cast<Handle*>(handle);
  attn8::RunTimes times;
  const attn8::Status status =
      h.plan.run(h.inputs, h.outputs, {h.workspace, h.plan.workspace_bytes()}, &times);
  *quantize_ms = times.quantize_ms;
  *attention_ms = times.attention_ms;
  return static_cast<int>(status.code());
}

/// Name of the kernel; lives as long as the handle.
ATTN8_API const char* attn8_peers_kernel(const void* handle) {
  return static_cast<const Handle*>(handle)->plan.kernel().data();
}

ATTN8_API void attn8_peers_free(void* handle) {
  auto* h = static_cast<Handle*>(handle);
  ::operator delete(h->workspace, kWorkspaceAlignment);
  delete h;
}

}  // extern "C"
