// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#include "attn8/context.hpp"
#include "attn8/export.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

namespace attn8 {

/// Which elements of one (batch, head) share a scale. Shape of the scale tensor (float32) for
/// x [batch, seq, head, dim], with blocks = ceil(seq / block):
///   kToken         [batch, seq, head, 1]
///   kTensor        [batch, 1, head, 1]
///   kChannel       [batch, 1, head, dim]
///   kBlock         [batch, blocks, head, 1]
///   kBlockChannel  [batch, blocks, head, dim]
enum class Granularity : uint8_t { kToken, kTensor, kChannel, kBlock, kBlockChannel };

/// "token", "tensor", "channel", "block", "block_channel".
ATTN8_API std::string_view to_string(Granularity granularity) noexcept;
ATTN8_API Result<Granularity> parse_granularity(std::string_view name) noexcept;

struct QuantSpec {
  Granularity granularity = Granularity::kToken;
  int32_t block = 0;  ///< tokens per block, > 0; read only by kBlock and kBlockChannel
};

/// Shape of the scale tensor for x of this shape.
ATTN8_API Extents scale_shape(const Extents& x, const QuantSpec& spec) noexcept;

/// Quantized tensor: x ~ codes * scale (+ mean). codes: int8 in [-127, 127]; -128 never appears.
/// `scale` always multiplies codes (what FlashAttention-3 calls descale).
struct QuantizedView {
  ConstTensorView codes;  ///< [batch, seq, head, dim] int8
  ConstTensorView scale;  ///< scale_shape(codes.shape, spec) float32, every value > 0 or NaN
  QuantSpec spec = {};
  /// K only: what was subtracted before quantizing, [batch, 1, head, dim] float32. Attention adds
  /// softmax_scale * q.mean to the LSE; the output does not change.
  std::optional<ConstTensorView> mean = std::nullopt;
};

/// How quantize() treats the mean over the tokens of each (batch, head).
enum class Mean : uint8_t {
  kNone,     ///< subtract nothing
  kCompute,  ///< compute it into `mean`, then subtract it (K smoothing)
  kGiven,    ///< subtract what `mean` holds (a cache with a frozen mean)
};

/// Symmetric INT8 quantization, the rules of docs/numerics.md: scale = max|group| / 127 in float32
/// with its low 3 mantissa bits cleared, codes = round-half-even(x / scale).
///   x      [batch, seq, head, dim] float32, float16 or bfloat16, any strides
///   codes  same shape, int8, any strides; must not overlap x
///   scale  scale_shape(x.shape, spec), float32, any strides
///   mean   [batch, 1, head, dim] float32, any strides; read or written as `mean_use` says
/// A group of zeros (or one whose scale would be below the smallest normal float) gets scale 1 and
/// codes 0; a group that holds a NaN or an Inf gets scale NaN and codes 0.
/// Errors: kInvalidArgument names the argument. Thread-safe; results do not depend on
/// context.threads or on the ISA.
ATTN8_API Status quantize(const ConstTensorView& x, const QuantSpec& spec, const TensorView& codes,
                          const TensorView& scale, const Context& context,
                          Mean mean_use = Mean::kNone,
                          const std::optional<TensorView>& mean = std::nullopt) noexcept;

/// out = codes * scale (+ mean), rounded to out's type: float32, float16 or bfloat16.
ATTN8_API Status dequantize(const QuantizedView& x, const TensorView& out,
                            const Context& context) noexcept;

}  // namespace attn8
