// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "attn8/quantize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "core/element.hpp"
#include "core/kernel_table.hpp"
#include "core/message.hpp"
#include "core/quant_math.hpp"
#include "core/validate.hpp"
#include "cpu/parallel.hpp"
#include "cpu/run.hpp"

namespace attn8 {
namespace {

/// Rows of any length go through this many elements at a time.
constexpr int64_t kPiece = 256;

/// One call of quantize(). Heads are the unit of parallel work: the groups of a head may span all
/// of its tokens.
class Quantizer {
 public:
  Quantizer(const KernelTable& table, const ConstTensorView& x, const QuantSpec& spec,
            const TensorView& codes, const TensorView& scale, Mean mean_use,
            const TensorView* mean) noexcept
      : table_(table),
        x_(x),
        spec_(spec),
        codes_(codes),
        scale_(scale),
        mean_use_(mean_use),
        mean_(mean) {}

  void run_head(int64_t batch, int64_t head) const noexcept {
    if (mean_use_ == Mean::kCompute) compute_mean(batch, head);
    const int64_t seqlen = x_.shape[1];
    const int64_t dim = x_.shape[3];
    const bool per_channel = by_channel(spec_.granularity);
    const int64_t step = spec_.granularity == Granularity::kToken ? 1
                         : by_block(spec_.granularity)            ? spec_.block
                                                                  : std::max<int64_t>(seqlen, 1);
    // A tensor without tokens still has scales for its tensor or channels: those of zeros.
    const int64_t groups = scale_.shape[1];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = std::min(seqlen, g * step);
      const int64_t end = std::min(seqlen, begin + step);
      if (per_channel) {
        for (int64_t d = 0; d < dim; d += kPiece) {
          quantize_channels(batch, head, g, begin, end, d, std::min(kPiece, dim - d));
        }
      } else {
        quantize_group(batch, head, g, begin, end);
      }
    }
  }

 private:
  void load(int64_t batch, int64_t seq, int64_t head, int64_t dim, int64_t n,
            float* row) const noexcept {
    table_.load_row(cpu::element(x_, batch, seq, head, dim), x_.dtype, x_.strides[3],
                    static_cast<int>(n), row);
    if (mean_use_ == Mean::kNone) return;
    float mean[kPiece];
    for (int64_t i = 0; i < n; ++i) mean[i] = cpu::float_at(*mean_, batch, 0, head, dim + i);
    table_.subtract(row, mean, static_cast<int>(n), row);
  }

  void compute_mean(int64_t batch, int64_t head) const noexcept {
    const int64_t seqlen = x_.shape[1];
    for (int64_t d = 0; d < x_.shape[3]; d += kPiece) {
      const int64_t n = std::min(kPiece, x_.shape[3] - d);
      double total[kPiece] = {};
      for (int64_t begin = 0; begin < seqlen; begin += kMeanChunk) {
        double sums[kPiece] = {};
        const int64_t count = std::min(kMeanChunk, seqlen - begin);
        table_.add_rows(cpu::token_rows(x_, batch, begin, count, head, d, n), sums);
        for (int64_t i = 0; i < n; ++i) total[i] += sums[i];
      }
      for (int64_t i = 0; i < n; ++i) {
        const auto mean = static_cast<float>(total[i] / static_cast<double>(seqlen));
        *reinterpret_cast<float*>(cpu::element(*mean_, batch, 0, head, d + i)) =
            std::isfinite(mean) ? mean : 0.0f;
      }
    }
  }

  void store_codes(int64_t batch, int64_t seq, int64_t head, int64_t dim, int64_t n,
                   const int8_t* row) const noexcept {
    auto* out = reinterpret_cast<int8_t*>(cpu::element(codes_, batch, seq, head, dim));
    for (int64_t i = 0; i < n; ++i) out[i * codes_.strides[3]] = row[i];
  }

  void store_scale(int64_t batch, int64_t group, int64_t head, int64_t dim,
                   float scale) const noexcept {
    *reinterpret_cast<float*>(cpu::element(scale_, batch, group, head, dim)) = scale;
  }

  /// One scale for tokens [begin, end) and all channels.
  void quantize_group(int64_t batch, int64_t head, int64_t group, int64_t begin,
                      int64_t end) const noexcept {
    const int64_t dim = x_.shape[3];
    float row[kPiece];
    uint32_t bits = 0;
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t d = 0; d < dim; d += kPiece) {
        const int64_t n = std::min(kPiece, dim - d);
        load(batch, s, head, d, n, row);
        bits = std::max(bits, table_.max_abs_bits(row, static_cast<int>(n)));
      }
    }
    const float scale = scale_from_bits(bits);
    store_scale(batch, group, head, 0, scale);
    const bool zero = codes_are_zero(bits);
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t d = 0; d < dim; d += kPiece) {
        const int64_t n = std::min(kPiece, dim - d);
        int8_t codes[kPiece] = {};
        if (!zero) {
          load(batch, s, head, d, n, row);
          table_.encode(row, static_cast<int>(n), &scale, 0, codes);
        }
        store_codes(batch, s, head, d, n, codes);
      }
    }
  }

  /// A scale per channel for tokens [begin, end) and n channels from `dim`.
  void quantize_channels(int64_t batch, int64_t head, int64_t group, int64_t begin, int64_t end,
                         int64_t dim, int64_t n) const noexcept {
    float row[kPiece];
    uint32_t bits[kPiece] = {};
    for (int64_t s = begin; s < end; ++s) {
      load(batch, s, head, dim, n, row);
      table_.max_abs_bits_each(row, static_cast<int>(n), bits);
    }
    float divisor[kPiece];
    for (int64_t i = 0; i < n; ++i) {
      const float scale = scale_from_bits(bits[i]);
      store_scale(batch, group, head, dim + i, scale);
      divisor[i] = std::isnan(scale) ? 1.0f : scale;
    }
    for (int64_t s = begin; s < end; ++s) {
      load(batch, s, head, dim, n, row);
      for (int64_t i = 0; i < n; ++i) {
        if (codes_are_zero(bits[i])) row[i] = 0;
      }
      int8_t codes[kPiece];
      table_.encode(row, static_cast<int>(n), divisor, 1, codes);
      store_codes(batch, s, head, dim, n, codes);
    }
  }

  const KernelTable& table_;
  const ConstTensorView& x_;
  const QuantSpec& spec_;
  const TensorView& codes_;
  const TensorView& scale_;
  Mean mean_use_;
  const TensorView* mean_;
};

}  // namespace

Status quantize(const ConstTensorView& x, const QuantSpec& spec, const TensorView& codes,
                const TensorView& scale, const Context& context, Mean mean_use,
                const std::optional<TensorView>& mean) noexcept {
  if (Status status = validate_context(context); !status.ok()) return status;
  if (Status status = validate_quantize(x, spec, codes, scale, mean_use, mean); !status.ok()) {
    return status;
  }
  const KernelTable* table = find_kernel_table(context.force_isa ? context.isa : best_isa());
  if (table == nullptr) return failure(StatusCode::kInternal, "no kernel table");
  const Quantizer quantizer(*table, x, spec, codes, scale, mean_use,
                            mean.has_value() ? &*mean : nullptr);
  const int64_t heads = x.shape[2];
  cpu::for_each_task(context, x.shape[0] * heads, [&](int64_t task, int64_t) {
    quantizer.run_head(task / heads, task % heads);
  });
  return {};
}

Status dequantize(const QuantizedView& x, const TensorView& out, const Context& context) noexcept {
  if (Status status = validate_context(context); !status.ok()) return status;
  if (Status status = validate_dequantize(x, out); !status.ok()) return status;
  const KernelTable* table = find_kernel_table(context.force_isa ? context.isa : best_isa());
  if (table == nullptr) return failure(StatusCode::kInternal, "no kernel table");
  const Extents& shape = x.codes.shape;
  const Granularity granularity = x.spec.granularity;
  const bool per_channel = by_channel(granularity);
  cpu::for_each_task(context, shape[0] * shape[2], [&](int64_t task, int64_t) {
    const int64_t b = task / shape[2];
    const int64_t h = task % shape[2];
    for (int64_t s = 0; s < shape[1]; ++s) {
      const int64_t group = granularity == Granularity::kToken ? s
                            : by_block(granularity)            ? s / x.spec.block
                                                               : 0;
      for (int64_t d0 = 0; d0 < shape[3]; d0 += kPiece) {
        const int64_t n = std::min(kPiece, shape[3] - d0);
        float row[kPiece];
        for (int64_t i = 0; i < n; ++i) {
          const auto code =
              static_cast<float>(std::to_integer<int8_t>(*cpu::element(x.codes, b, s, h, d0 + i)));
          row[i] = code * cpu::float_at(x.scale, b, group, h, per_channel ? d0 + i : 0);
          if (x.mean.has_value()) row[i] += cpu::float_at(*x.mean, b, 0, h, d0 + i);
        }
        table->store_row(row, static_cast<int>(n), out.dtype, out.strides[3],
                         cpu::element(out, b, s, h, d0));
      }
    }
  });
  return {};
}

}  // namespace attn8
