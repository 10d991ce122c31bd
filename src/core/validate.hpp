// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>
#include <string_view>

#include "attn8/attention.hpp"
#include "attn8/kv_cache.hpp"
#include "attn8/merge.hpp"
#include "attn8/quantize.hpp"

namespace attn8 {

/// THE validation: every check of an argument and every message stands behind these functions.
/// Of a call on the CPU.
Status validate_context(const Context& context) noexcept;
/// `device`: where the context wants the tensors.
Status validate_attention(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                          const AttentionOptions& options, Device device) noexcept;
/// Of what was validated: the values of lengths and of alibi_slopes, in host memory.
Status validate_score_values(const AttentionInputs& inputs) noexcept;
/// Of tensors that validate_attention() took: outputs share no memory with inputs or each other.
Status validate_no_overlap(const AttentionInputs& inputs, const AttentionOutputs& outputs) noexcept;
Status validate_quantize(const ConstTensorView& x, const QuantSpec& spec,
                         const ConstTensorView& codes, const ConstTensorView& scale, Mean mean_use,
                         const std::optional<TensorView>& mean) noexcept;
Status validate_dequantize(const QuantizedView& x, const ConstTensorView& out) noexcept;
Status validate_scale_shape(const Extents& x, const QuantSpec& spec) noexcept;
Status validate_merge(std::span<const AttentionState> states, const AttentionOutputs& merged,
                      Device device) noexcept;

Status validate_kv_cache(const KvCacheOptions& options) noexcept;
/// Of a cache whose head_dim_v is resolved, as of the next.
Status validate_kv_append(const KvCacheOptions& options, const ConstTensorView& k,
                          const ConstTensorView& v) noexcept;
Status validate_kv_attention(const KvCacheOptions& cache, int64_t sequences, const Operand& q,
                             std::span<const int32_t> cu_seqlens_q, const AttentionOutputs& outputs,
                             const KvCacheAttentionOptions& options) noexcept;
/// Where `sequences` packed sequences begin in the `total` tokens of `tensor`.
Status validate_cu_seqlens(std::string_view name, int64_t sequences, std::string_view tensor,
                           int64_t total, std::span<const int32_t> cu_seqlens) noexcept;
/// Of packed sequences, once their lengths are at hand: whether attn_mask has the keys of the
/// longest.
Status validate_ragged_mask(const std::optional<ConstTensorView>& attn_mask,
                            int64_t longest) noexcept;

/// kInvalidArgument naming the first element that is a NaN or an Inf.
Status validate_finite(std::string_view name, const ConstTensorView& x) noexcept;

}  // namespace attn8
