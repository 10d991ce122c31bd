// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <variant>

#include "attn8/context.hpp"
#include "attn8/export.hpp"
#include "attn8/quantize.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

namespace attn8 {

/// The numeric modes of docs/numerics.md.
enum class Mode : uint8_t {
  kAccurate,  ///< INT8 Q, K, V; u8 P scaled per (row, key block). What users run.
  kPaper,     ///< INT8 throughout as Algorithm 1 of arXiv:2409.16997: P in [0, 127] relative to the
              ///< running maximum, one V scale per (batch, kv head), no smoothing
  kHalf,      ///< INT8 Q and K as kAccurate; P and V in bfloat16
  kExact,     ///< float32 flash attention
  kFp8,       ///< FP8 in software, for error studies only; slow
};

/// "accurate", "paper", "half", "exact", "fp8".
ATTN8_API std::string_view to_string(Mode mode) noexcept;
ATTN8_API Result<Mode> parse_mode(std::string_view name) noexcept;

/// Which diagonal a causal mask or a window is measured from when seqlen_q != seqlen_k.
///   seqlen_q = 2, seqlen_k = 4    kBottomRight   kTopLeft
///                                   1 1 1 0       1 0 0 0
///                                   1 1 1 1       1 1 0 0
/// kBottomRight is flash-attn's, kTopLeft torch SDPA's.
enum class CausalAlign : uint8_t { kBottomRight, kTopLeft };

/// Query i sees key j when, with
///   p = i + q_offset - k_offset + (align == kBottomRight ? seqlen_k - seqlen_q : 0):
///   j <= p (causal), j >= p - window_left (window_left >= 0), j <= p + window_right
///   (window_right >= 0). A window of -1 is unlimited.
/// For the part of a longer sequence that holds its queries from q_offset on and its keys from
/// k_offset on, kTopLeft gives the mask of the whole one.
struct Mask {
  bool causal = false;
  CausalAlign align = CausalAlign::kBottomRight;
  int64_t window_left = -1;
  int64_t window_right = -1;
  int64_t q_offset = 0;  ///< in [-2^48, 2^48]
  int64_t k_offset = 0;  ///< in [-2^48, 2^48]
};

/// FP8 flavour of Mode::kFp8.
enum class Fp8Format : uint8_t {
  kE4m3Tensor,  ///< e4m3, one scale per (batch, head): amax / 448
  kE5m2Raw,     ///< e5m2 without a scale, the baseline of arXiv:2409.16997
};

struct AttentionOptions {
  Mode mode = Mode::kAccurate;
  /// Mode of each kv head and of the query heads that read it, in place of `mode`; empty, or
  /// [nheads_k]. Copied by AttentionPlan::make(). docs/precision.md.
  std::span<const Mode> head_modes = {};
  std::optional<float> softmax_scale = std::nullopt;  ///< finite; nullopt: 1/sqrt(head_dim)
  Mask mask = {};
  /// Keys per block of the online softmax: a multiple of 64 in [64, 512]; 0: default_kv_block().
  /// Part of the result's definition: it decides how P is rounded.
  int32_t kv_block = 0;
  /// Scales of V where V arrives as float (Mode::kAccurate only; kPaper is always kTensor).
  Granularity v_granularity = Granularity::kToken;
  /// Subtract the mean of K over its visible tokens before quantizing float K (kAccurate, kHalf).
  bool smooth_k = true;
  /// Scores s become softcap * tanh(s / softcap); finite, 0: they stay. Before attn_mask and ALiBi.
  float softcap = 0;
  /// Return kInvalidArgument naming tensor and index when a float input holds a NaN or an Inf.
  bool check_finite = false;
  Fp8Format fp8_format = Fp8Format::kE4m3Tensor;
};

/// kv_block that 0 stands for.
inline constexpr int32_t kDefaultKvBlock = 256;

/// A float tensor, or one already quantized. Float operands of INT8 modes are quantized by the
/// call.
using Operand = std::variant<ConstTensorView, QuantizedView>;

/// q [batch, seqlen_q, nheads_q, head_dim]
/// k [batch, seqlen_k, nheads_k, head_dim]
/// v [batch, seqlen_k, nheads_k, head_dim_v]
/// 1 <= head_dim, head_dim_v <= 256; nheads_k divides nheads_q (query head h reads kv head
/// h / (nheads_q / nheads_k)); batch and lengths may be 0. Floats: float32, float16 or bfloat16,
/// any strides, one type each. All on Context::device.
/// Quantized operands: q and k with Granularity::kToken (kAccurate, kHalf, kPaper); v with any
/// granularity in kAccurate (kBlock and kBlockChannel with block == kv_block), kTensor in kPaper.
///
/// The others change scores or what counts (docs/numerics.md, *Score changes*); any strides:
/// attn_mask     [batch or 1, seqlen_q or 1, nheads_q or 1, seqlen_k or 1], where 1 stands for all.
///               kBool: false hides the key from the query. float32, float16, bfloat16: added to
///               the score, in nats; -2^100 and below hides, a NaN makes the row NaN.
/// alibi_slopes  [batch or 1, 1, nheads_q, 1] float32, finite: -slope * |p - j| is added, with p of
///               Mask.
/// sinks         [1, 1, nheads_q, 1] float32: a score of a key without a value, in nats, that every
///               query of the head sees; counts in the LSE.
/// seqlens_k     [batch, 1, 1, 1] int32 in [0, seqlen_k]: keys from there on do not exist; stands
///               for seqlen_k in Mask.
/// leftpad_k     [batch, 1, 1, 1] int32 in [0, seqlens_k]: keys before it count for nothing.
///
/// cu_seqlens_q, cu_seqlens_k  [sequences + 1, 1, 1, 1] int32, both or neither: sequences of any
/// lengths (prompts, chunks and single tokens mixed) lie one after the other, and sequence i is
/// rows [cu_seqlens_q[i], cu_seqlens_q[i + 1]) of q, out and lse against tokens [cu_seqlens_k[i],
/// cu_seqlens_k[i + 1]) of k and v. Both run from 0 to the tensor's length and do not decrease;
/// batch is 1. Every sequence gets the bits it would get alone. Then
///   attn_mask     is [1, seqlen_q or 1, nheads_q or 1, keys or 1]: a row of it for each row of q,
///                 its keys counted from the start of the row's sequence, at least as many as the
///                 longest sequence has;
///   alibi_slopes  is [sequences or 1, 1, nheads_q, 1];
///   seqlens_k, leftpad_k and a V quantized by block are refused. On the CPU only.
struct AttentionInputs {
  Operand q, k, v;
  std::optional<ConstTensorView> attn_mask = std::nullopt;
  std::optional<ConstTensorView> alibi_slopes = std::nullopt;
  std::optional<ConstTensorView> sinks = std::nullopt;
  std::optional<ConstTensorView> seqlens_k = std::nullopt;
  std::optional<ConstTensorView> leftpad_k = std::nullopt;
  std::optional<ConstTensorView> cu_seqlens_q = std::nullopt;
  std::optional<ConstTensorView> cu_seqlens_k = std::nullopt;
};

/// out [batch, seqlen_q, nheads_q, head_dim_v], float32, float16 or bfloat16, any strides, may not
///     overlap an input (run() refuses what does). A row with no visible key is 0.
/// lse [batch, seqlen_q, nheads_q, 1] float32, any strides: natural logarithm of the softmax
///     denominator; of a row with no visible key -inf, or its sink.
struct AttentionOutputs {
  TensorView out;
  std::optional<TensorView> lse = std::nullopt;
};

/// Where the time of one run went; wall-clock. All 0 on a CUDA device, which run() does not wait
/// for.
struct RunTimes {
  double quantize_ms = 0;   ///< quantizing, smoothing and packing K and V
  double attention_ms = 0;  ///< everything after
};

/// A validated problem: shapes, dtypes and options are checked once by make(); run() may be called
/// many times, with any data of the planned shapes and dtypes (strides and the shape of attn_mask
/// may change), from any thread. Immutable, cheap to copy.
class ATTN8_API AttentionPlan {
 public:
  /// Errors: kInvalidArgument (a broken rule above), kUnsupported, kUnavailable (forced ISA or
  /// device missing), kOutOfMemory. The message names argument, got and wanted.
  static Result<AttentionPlan> make(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                                    const AttentionOptions& options,
                                    const Context& context) noexcept;

  /// Bytes run() needs as workspace.
  [[nodiscard]] size_t workspace_bytes() const noexcept;
  /// "<op>_<mode>_<isa>_d<head_dim>", for example "attend_accurate_avx512_vnni_d128"; with
  /// head_modes those of the kernels that run, a + between them.
  [[nodiscard]] std::string_view kernel() const noexcept;
  [[nodiscard]] Isa isa() const noexcept;
  /// Keys per block that decide rounding, see AttentionOptions::kv_block.
  [[nodiscard]] int32_t kv_block() const noexcept;
  [[nodiscard]] Granularity v_granularity() const noexcept;

  /// Computes the attention. `workspace` holds at least workspace_bytes() bytes, 64-byte aligned,
  /// not shared with a concurrent run; its content before and after is of no interest. On a CUDA
  /// device it is device memory, 256-byte aligned, and the work is only enqueued (Context::stream).
  /// The same plan and data give the same bits for any number of threads.
  Status run(const AttentionInputs& inputs, const AttentionOutputs& outputs,
             std::span<std::byte> workspace, RunTimes* times = nullptr) const noexcept;

  struct State;  ///< private to the library

 private:
  explicit AttentionPlan(std::shared_ptr<const State> state) noexcept : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

/// Quantizes what is float, plans and runs, with a workspace of its own. On the CPU only.
ATTN8_API Status attention(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                           const AttentionOptions& options, const Context& context) noexcept;

}  // namespace attn8
