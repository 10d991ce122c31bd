// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <span>

#include "core/head_parts.hpp"
#include "kv_cache/state.hpp"

namespace attn8::kv_cache {

/// A validated call of KvCache::attend(), its sequences locked for reading.
struct AttendBatch {
  const KvCache::State& cache;
  std::span<const std::shared_ptr<Sequence>> sequences;
  std::span<const int32_t> cu_seqlens_q;
  const KvCacheAttentionOptions& options;
  const Context& context;
  float softmax_scale;
};

/// attention() in `half` or `exact` over the K and V that the pages of `heads` stand for, sequence
/// by sequence. inputs (but for k and v) and outputs are of these heads. Throws std::bad_alloc.
Status attend_dequantized(const AttendBatch& batch, const HeadStretch& heads,
                          const AttentionInputs& inputs, const AttentionOutputs& outputs);

}  // namespace attn8::kv_cache
