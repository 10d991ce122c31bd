// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <span>

#include "attn8/attention.hpp"
#include "attn8/context.hpp"
#include "attn8/export.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

namespace attn8 {

/// Attention of some queries over a part of their keys: what attention() wrote.
struct AttentionState {
  ConstTensorView out;  ///< [batch, seqlen_q, nheads_q, head_dim] float32, float16 or bfloat16
  ConstTensorView lse;  ///< [batch, seqlen_q, nheads_q, 1] float32
};

/// Merges the attention of the same queries over disjoint sets of keys into that over all of them,
/// row by row (how FlashInfer, arXiv:2501.01005, composes attention states):
///   lse = ln sum_i exp(lse_i)
///   out = sum_i exp(lse_i - lse) out_i
/// Any order of the parts gives the same result up to rounding.
///   states  any number of parts; dtypes and strides may differ from part to part
///   merged  as of attention(), shapes as the parts'; lse may be left out. Each may be the very
///           tensor of a part (same data, dtype, strides), else does not overlap the parts
/// A part whose lse is -inf saw no key: its out is not read. A row that no part has keys for, every
/// row when there are no parts, is 0 with LSE -inf; one with a single such part is that part, bit
/// for bit (rounded to the type of merged.out). A NaN in lse or out of a part stays a NaN.
/// Weights and LSE are computed in float64 and rounded once, sums over parts in float32: with n
/// parts, |error| <= (n + 2) 2^-24 sum_i w_i |out_i| and the rounding to the type of merged.out.
/// The LSE that comes in counts as exact; its own rounding moves a weight by up to |lse_i| 2^-24.
/// On a CUDA device it only enqueues on context.stream and can be captured into a CUDA graph; there
/// are at most 256 parts there.
/// Errors: kInvalidArgument names the argument; kUnsupported (more parts than a device takes),
/// kUnavailable, kDeviceError. Thread-safe; results do not depend on context.threads or on the ISA,
/// those of a device differ by roundings.
ATTN8_API Status merge_states(std::span<const AttentionState> states,
                              const AttentionOutputs& merged, const Context& context) noexcept;

}  // namespace attn8
