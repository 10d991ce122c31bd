// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <span>

#include "attn8/attention.hpp"
#include "attn8/export.hpp"
#include "attn8/quantize.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

/// Slow, plain-loop oracles in float64. They share no code with the kernels: masks, rounding and
/// scales are written a second time here on purpose.
namespace attn8::reference {

/// How P becomes an integer.
enum class PScale : uint8_t {
  kRunningMax127,  ///< round(127 exp(s - running max)), the paper's
  kRunningMax255,  ///< round(255 exp(s - running max))
  kBlockLocal255,  ///< round(255 exp(s - max of this key block)), `accurate`
};

/// What the softmax denominator of kAccurate sums (docs/numerics.md).
enum class Normalizer : uint8_t {
  kFloat,  ///< the weights before rounding: `accurate`
  kCodes,  ///< the rounded weights, so that what rounding loses is lost on both sides
  kMixed,  ///< the rounded weights, but unrounded ones for tokens with r below 2^-6
};

/// One point of the study's design space. emulation_options(AttentionOptions) gives the modes.
struct EmulationOptions {
  Mode mode = Mode::kAccurate;  ///< kAccurate, kPaper, kHalf or kFp8
  std::optional<float> softmax_scale = std::nullopt;
  Mask mask = {};
  float softcap = 0;
  int32_t kv_block = kDefaultKvBlock;
  Granularity v_granularity = Granularity::kToken;
  bool smooth_k = true;
  PScale p_scale = PScale::kBlockLocal255;
  Normalizer normalizer = Normalizer::kFloat;
  /// Give back what rounding took from the weights of a block, times the block's mean V.
  bool residual_mean = true;
  /// kAccurate with scores on a grid of 1/64 octave and integer weights; needs kBlockLocal255 and
  /// kFloat. Without it scores are float32, as the CUDA kernels have them. The other modes do not
  /// look at it.
  bool score_grid = true;
  Fp8Format fp8_format = Fp8Format::kE4m3Tensor;
};

/// The options that emulate what attention() does for `options`.
ATTN8_API EmulationOptions emulation_options(const AttentionOptions& options) noexcept;

/// Rows of q to compute: every row of every head when empty, else only these sequence positions
/// (each in [0, seqlen_q)) of every (batch, head); the others are left untouched.
using Rows = std::span<const int64_t>;

/// softmax(scale * Q K^T) V in float64 with plain loops.
///   inputs  float operands (float32, float16, bfloat16, any strides) and what changes scores
///   out     [batch, seqlen_q, nheads_q, head_dim_v] doubles, dense, in that order
///   lse     [batch, seqlen_q, nheads_q] doubles, dense; may be empty
/// Of the options softmax_scale, mask and softcap count. A row with no visible key is 0 with LSE
/// -inf or its sink. Single-threaded. Errors: kInvalidArgument when the spans do not have the size
/// the shapes ask for.
ATTN8_API Status exact_attention(const AttentionInputs& inputs, const AttentionOptions& options,
                                 std::span<double> out, std::span<double> lse,
                                 Rows rows = {}) noexcept;
/// The same without options.
ATTN8_API Status exact_attention(const ConstTensorView& q, const ConstTensorView& k,
                                 const ConstTensorView& v, std::optional<float> softmax_scale,
                                 const Mask& mask, std::span<double> out, std::span<double> lse,
                                 Rows rows = {}) noexcept;

/// The mode's arithmetic in float64 except for the codes and the rounding of P: what a kernel must
/// reproduce. Operands may be float (quantized here, independently of the library) or quantized.
///   out, lse as for exact_attention
///   out_bound  [batch, seqlen_q, nheads_q, head_dim_v] doubles, dense; may be empty: how far a
///              kernel may be from `out`. On the score grid: its float32 sums over blocks
///              (grid_row.cpp). Else also the float32 rounding of scores and every P code so close
///              to a rounding boundary that the kernel may round it the other way
///              (emulation_row.cpp)
///   lse        of the weights before they are rounded to P
ATTN8_API Status emulation(const AttentionInputs& inputs, const EmulationOptions& options,
                           std::span<double> out, std::span<double> lse,
                           std::span<double> out_bound, Rows rows = {}) noexcept;

/// Error of `out` against a reference; all over every element compared.
struct ErrorReport {
  double rel_l2 = 0;     ///< ||o - r|| / ||r||, the headline
  double mean_rel = 0;   ///< mean|o - r| / mean|r|
  double max_abs = 0;    ///< max|o - r|
  double cosine = 1;     ///< o.r / (||o|| ||r||)
  double mre = 0;        ///< mean(|o - r| / (|r| + 1e-5)) over all elements
  double mre_last4 = 0;  ///< the same over the last four elements only, as the script published
                         ///< with arXiv:2409.16997 computes it; never a headline
  int64_t elements = 0;
};

/// `out` and `reference` hold the same number of doubles. Both all-zero gives zero error.
ATTN8_API ErrorReport error_report(std::span<const double> out,
                                   std::span<const double> reference) noexcept;

}  // namespace attn8::reference
