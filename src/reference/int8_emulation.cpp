// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <numbers>
#include <string>
#include <vector>

#include "attn8/reference.hpp"
#include "reference/emulation_row.hpp"
#include "reference/fp8.hpp"
#include "reference/problem.hpp"
#include "reference/quantization.hpp"
#include "reference/score_changes.hpp"
#include "reference/sequences.hpp"
#include "reference/v_fold.hpp"

namespace attn8::reference {
namespace {

constexpr double kFloatMax = std::numeric_limits<float>::max();

// Whether attention() computes `accurate` on the score grid.
constexpr bool kAccurateOnScoreGrid = true;

bool on_grid(const EmulationOptions& options) {
  return options.mode == Mode::kAccurate && options.score_grid;
}

bool is_quantized(const Operand& operand) { return std::holds_alternative<QuantizedView>(operand); }

Status check_options(const AttentionInputs& inputs, const EmulationOptions& options) {
  const auto invalid = [](std::string message) {
    return Status(StatusCode::kInvalidArgument, std::move(message));
  };
  if (options.mode == Mode::kExact) {
    return invalid("options.mode=exact must be accurate, paper, half or fp8");
  }
  if (options.kv_block < 1) {
    return invalid("options.kv_block=" + std::to_string(options.kv_block) + " must be positive");
  }
  if (on_grid(options) && options.p_scale != PScale::kBlockLocal255) {
    return invalid("options.p_scale must be kBlockLocal255 with options.score_grid");
  }
  if (on_grid(options) && options.normalizer != Normalizer::kFloat) {
    return invalid("options.normalizer must be kFloat with options.score_grid");
  }
  const auto is_token = [](const Operand& operand) {
    const auto* x = std::get_if<QuantizedView>(&operand);
    return x == nullptr || x->spec.granularity == Granularity::kToken;
  };
  if (!is_token(inputs.q)) return invalid("q.spec.granularity must be token");
  if (!is_token(inputs.k)) return invalid("k.spec.granularity must be token");
  if (options.mode == Mode::kFp8 && (is_quantized(inputs.q) || is_quantized(inputs.k))) {
    return invalid("q and k must be float in mode fp8");
  }
  const auto* v = std::get_if<QuantizedView>(&inputs.v);
  if (v == nullptr) return {};
  if (options.mode == Mode::kHalf || options.mode == Mode::kFp8) {
    return invalid("v must be float in modes half and fp8");
  }
  if (options.mode == Mode::kPaper && v->spec.granularity != Granularity::kTensor) {
    return invalid("v.spec.granularity must be tensor in mode paper");
  }
  const bool by_block = v->spec.granularity == Granularity::kBlock ||
                        v->spec.granularity == Granularity::kBlockChannel;
  if (by_block && v->spec.block != options.kv_block) {
    return invalid("v.spec.block=" + std::to_string(v->spec.block) +
                   " must equal options.kv_block=" + std::to_string(options.kv_block));
  }
  return {};
}

Arithmetic arithmetic_of(const EmulationOptions& options) {
  Arithmetic arithmetic;
  arithmetic.kv_block = options.kv_block;
  switch (options.mode) {
    case Mode::kPaper:
      arithmetic.p_range = 127;
      arithmetic.normalizer = Normalizer::kCodes;
      break;
    case Mode::kHalf:
      arithmetic.p_format = PFormat::kBfloat16;
      break;
    case Mode::kFp8:
      if (options.fp8_format == Fp8Format::kE4m3Tensor) {
        arithmetic.p_format = PFormat::kE4m3;
        arithmetic.p_range = 256;
      } else {
        arithmetic.p_format = PFormat::kE5m2;
      }
      break;
    case Mode::kAccurate:
    case Mode::kExact:
      arithmetic.p_range = options.p_scale == PScale::kRunningMax127 ? 127 : 255;
      arithmetic.local_max = options.p_scale == PScale::kBlockLocal255;
      arithmetic.normalizer = options.normalizer;
      arithmetic.residual_mean = options.residual_mean;
      break;
  }
  return arithmetic;
}

float max_abs(const Tokens& tokens) {
  float largest = 0;
  for (const float x : tokens.values) {
    if (!std::isfinite(x)) return std::numeric_limits<float>::quiet_NaN();
    largest = std::max(largest, std::abs(x));
  }
  return largest;
}

// Values of FP8 and the scale that multiplies them: max / 448 for e4m3, none for e5m2.
float round_to_fp8(Tokens& tokens, Fp8Format format) {
  if (format == Fp8Format::kE5m2Raw) {
    for (float& x : tokens.values) x = static_cast<float>(round_e5m2(x));
    return 1.0F;
  }
  const float scale = max_abs(tokens) / 448.0F;
  if (std::isnan(scale)) return scale;
  if (scale < std::numeric_limits<float>::min()) {
    std::fill(tokens.values.begin(), tokens.values.end(), 0.0F);
    return 1.0F;
  }
  for (float& x : tokens.values) x = static_cast<float>(round_e4m3(x / scale));
  return scale;
}

std::vector<double> norms(const Tokens& tokens) {
  std::vector<double> norm;
  for (int64_t j = tokens.first; j < tokens.first + tokens.count; ++j) {
    double sum = 0;
    for (int64_t d = 0; d < tokens.stride; ++d) {
      sum += static_cast<double>(tokens.token(j)[d]) * tokens.token(j)[d];
    }
    norm.push_back(std::sqrt(sum));
  }
  return norm;
}

// Scales of K for tokens [first, first + count) out of those of the whole sequence.
std::vector<double> token_scales(const Quantized& x) {
  const auto first = x.scale.begin() + x.codes.first;
  std::vector<double> scales(first, first + x.codes.count);
  constexpr double kMaxKeyScale = 0x1p104;
  for (double& scale : scales) {
    if (scale > kMaxKeyScale) scale = kMaxKeyScale;  // a NaN stays
  }
  return scales;
}

bool is_finite(const Tokens& tokens, int64_t j) {
  const float* token = tokens.token(j);
  return std::all_of(token, token + tokens.head_dim, [](float x) { return std::isfinite(x); });
}

// The operands of one call, prepared head by head.
class Operands {
 public:
  Operands(const Problem& problem, const AttentionInputs& inputs, const EmulationOptions& options)
      : problem_(problem), inputs_(inputs), options_(options) {
    // As docs/numerics.md defines it: the product is rounded to float32, at most its largest
    // number.
    const double octaves = options.softcap == 0
                               ? std::numbers::log2e
                               : 2 * std::numbers::log2e / static_cast<double>(options.softcap);
    constexpr double kLargest = std::numeric_limits<float>::max();
    scale_log2_ = static_cast<float>(
        std::clamp(static_cast<double>(problem.softmax_scale) * octaves, -kLargest, kLargest));
  }

  void prepare_keys(int64_t b, int64_t hk) {
    prepare_k(b, hk);
    prepare_v(b, hk);
  }

  void prepare_queries(int64_t b, int64_t h) {
    if (options_.mode != Mode::kFp8) return;
    fp8_queries_ = gather(std::get<ConstTensorView>(inputs_.q), b, h, 0, problem_.seqlen_q);
    fp8_query_scale_ = round_to_fp8(fp8_queries_, options_.fp8_format);
  }

  // Row i of head h, and what smoothing took from its scores: softmax_scale q.mean.
  Query query(int64_t b, int64_t i, int64_t h, double& mean_score) const {
    Tokens row;
    double scale = 1;
    std::vector<double> widened;  // q itself
    if (options_.mode == Mode::kFp8) {
      row = Tokens(i, 1, problem_.head_dim);
      std::copy_n(fp8_queries_.token(i), row.stride, row.token(i));
      scale = fp8_query_scale_;
    } else if (const auto* q = std::get_if<QuantizedView>(&inputs_.q)) {
      row = gather(q->codes, b, h, i, i + 1);
      scale = load(q->scale, b, i, h, 0);
      for (const float code : row.values) {
        widened.push_back(static_cast<float>(code * scale));
      }
    } else {
      Tokens values = gather(std::get<ConstTensorView>(inputs_.q), b, h, i, i + 1);
      values.first = 0;
      Quantized quantized = quantize_tokens(values, {Granularity::kToken}, 1);
      row = std::move(quantized.codes);
      scale = quantized.scale[0];
      widened.assign(values.values.begin(), values.values.end());
    }
    mean_score = 0;
    for (size_t d = 0; d < k_mean_.size(); ++d) mean_score += widened[d] * k_mean_[d];
    mean_score *= problem_.softmax_scale;

    Query query;
    query.q.assign(row.values.begin(), row.values.end());
    query.factor = std::clamp(scale * scale_log2_, -kFloatMax, kFloatMax);
    query.grid_factor =
        std::clamp((options_.softcap == 0 ? 64 : 1) * static_cast<float>(scale) * scale_log2_,
                   -std::numeric_limits<float>::max(), std::numeric_limits<float>::max());
    for (const double x : query.q) query.norm += x * x;
    query.norm = std::sqrt(query.norm);
    return query;
  }

  [[nodiscard]] const KeyValues& key_values() const { return kv_; }

 private:
  void prepare_k(int64_t b, int64_t hk) {
    const KeyRange visible = problem_.visible;
    k_mean_.clear();
    kv_.k_norm.clear();
    if (const auto* k = std::get_if<QuantizedView>(&inputs_.k)) {
      Quantized quantized = gather_quantized(*k, b, hk, visible);
      kv_.k_scale = token_scales(quantized);
      kv_.k = std::move(quantized.codes);
      for (int64_t d = 0; k->mean && d < problem_.head_dim; ++d) {
        k_mean_.push_back(load(*k->mean, b, 0, hk, d));
      }
      return;
    }
    Tokens tokens =
        gather(std::get<ConstTensorView>(inputs_.k), b, hk, visible.first, visible.last);
    if (options_.mode == Mode::kFp8) {
      kv_.k_scale.assign(static_cast<size_t>(tokens.count),
                         round_to_fp8(tokens, options_.fp8_format));
      kv_.k_norm = norms(tokens);
      kv_.k = std::move(tokens);
      return;
    }
    if (options_.smooth_k && options_.mode != Mode::kPaper) {
      k_mean_ = channel_mean(tokens);
      for (int64_t j = visible.first; j < visible.last; ++j) {
        for (int64_t d = 0; d < problem_.head_dim; ++d) {
          tokens.token(j)[d] -= k_mean_[static_cast<size_t>(d)];
        }
      }
    }
    Quantized quantized = quantize_tokens(tokens, {Granularity::kToken}, problem_.seqlen_k);
    kv_.k_scale = token_scales(quantized);
    kv_.k = std::move(quantized.codes);
  }

  void prepare_v(int64_t b, int64_t hk) {
    const KeyRange visible = problem_.visible;
    const int64_t head_dim = problem_.head_dim_v;
    const int64_t kv_block = options_.kv_block;
    const int64_t blocks = (problem_.seqlen_k + kv_block - 1) / kv_block;
    kv_.r.assign(static_cast<size_t>(visible.last - visible.first), 1.0);
    kv_.v_scale.assign(static_cast<size_t>(blocks * head_dim), 1.0);
    kv_.g.assign(kv_.r.size(), 0.0F);
    kv_.weight.assign(kv_.r.size(), 256);

    if (options_.mode == Mode::kHalf || options_.mode == Mode::kFp8) {
      kv_.v = gather(std::get<ConstTensorView>(inputs_.v), b, hk, visible.first, visible.last);
      for (int64_t j = visible.first; j < visible.last; ++j) {
        // As a NaN scale does elsewhere, it poisons the rows that see it.
        if (!is_finite(kv_.v, j)) kv_.r[static_cast<size_t>(j - visible.first)] = std::nan("");
      }
      if (options_.mode == Mode::kHalf) {
        for (float& x : kv_.v.values) x = static_cast<float>(round_bfloat16(x));
      } else {
        const double scale = round_to_fp8(kv_.v, options_.fp8_format);
        std::fill(kv_.v_scale.begin(), kv_.v_scale.end(), scale);
      }
      return;
    }

    QuantSpec spec = {options_.mode == Mode::kPaper ? Granularity::kTensor : options_.v_granularity,
                      options_.kv_block};
    Quantized quantized;
    if (const auto* v = std::get_if<QuantizedView>(&inputs_.v)) {
      spec = v->spec;
      quantized = gather_quantized(*v, b, hk, visible);
    } else {
      quantized = quantize_tokens(
          gather(std::get<ConstTensorView>(inputs_.v), b, hk, visible.first, visible.last), spec,
          problem_.seqlen_k);
    }
    if (spec.granularity == Granularity::kToken && on_grid(options_)) {
      GridFold fold = fold_into_score_grid(quantized, kv_block, problem_.seqlen_k);
      kv_.g = std::move(fold.g);
      kv_.weight = std::move(fold.weight);
      for (size_t at = 0; at < kv_.v_scale.size(); ++at) {
        kv_.v_scale[at] = fold.v_block[at / static_cast<size_t>(head_dim)];
      }
    } else if (spec.granularity == Granularity::kToken) {
      FloatFold fold = fold_into_float_scores(quantized, kv_block);
      kv_.r = std::move(fold.r);
      std::fill(kv_.v_scale.begin(), kv_.v_scale.end(), fold.v_ref);
    } else {
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t d = 0; d < head_dim; ++d) {
          kv_.v_scale[static_cast<size_t>(block * head_dim + d)] =
              quantized.scale[static_cast<size_t>(group_of(spec, head_dim, block * kv_block, d))];
        }
      }
    }
    kv_.v = std::move(quantized.codes);
    average_values(blocks);
    kv_.v_ref = 0;
    for (const double scale : kv_.v_scale) {
      if (std::isfinite(scale)) kv_.v_ref = std::max(kv_.v_ref, scale);
    }
  }

  // Means of the codes of each key block over the visible keys, a float32 quotient.
  void average_values(int64_t blocks) {
    const int64_t head_dim = problem_.head_dim_v;
    const int64_t kv_block = options_.kv_block;
    kv_.v_mean.assign(static_cast<size_t>(blocks * head_dim), 0.0);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = std::max(block * kv_block, problem_.visible.first);
      const int64_t to = std::min((block + 1) * kv_block, problem_.visible.last);
      for (int64_t d = 0; from < to && d < head_dim; ++d) {
        double sum = 0;  // of integers: exact
        for (int64_t j = from; j < to; ++j) sum += kv_.v.token(j)[d];
        kv_.v_mean[static_cast<size_t>(block * head_dim + d)] =
            static_cast<float>(sum) / static_cast<float>(to - from);
      }
    }
  }

  const Problem& problem_;
  const AttentionInputs& inputs_;
  const EmulationOptions& options_;
  float scale_log2_ = 0;
  KeyValues kv_;
  std::vector<float> k_mean_;  // [head_dim], or empty where nothing was subtracted
  Tokens fp8_queries_;
  double fp8_query_scale_ = 1;
};

// The paper's baseline stores its output as e5m2. A kernel's value anywhere within the bound may
// round to a neighbour.
void round_output_to_e5m2(int64_t head_dim, double* out, double* bound) {
  for (int64_t d = 0; d < head_dim; ++d) {
    const double rounded = round_e5m2(out[d]);
    if (bound != nullptr) {
      bound[d] = std::max(round_e5m2(out[d] + bound[d]) - rounded,
                          rounded - round_e5m2(out[d] - bound[d]));
    }
    out[d] = rounded;
  }
}

void emulate(const Problem& problem, const AttentionInputs& inputs, const EmulationOptions& options,
             std::span<double> out, std::span<double> lse, std::span<double> out_bound) {
  const Arithmetic arithmetic = arithmetic_of(options);
  const auto row_function = on_grid(options) ? emulate_grid_row : emulate_row;
  const int64_t group = problem.nheads_q / problem.nheads_k;
  const int64_t head_dim = problem.head_dim_v;
  Operands operands(problem, inputs, options);
  RowScratch scratch;
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t h = 0; h < problem.nheads_q; ++h) {
      if (h % group == 0) operands.prepare_keys(b, h / group);
      operands.prepare_queries(b, h);
      for (const int64_t i : problem.rows) {
        const int64_t row = problem.row_index(b, i, h);
        const KeyRange keys = problem.visible_to(i);
        double* row_out = out.data() + row * head_dim;
        double* row_bound = out_bound.empty() ? nullptr : out_bound.data() + row * head_dim;
        double row_lse = -std::numeric_limits<double>::infinity();
        if (keys.empty() && inputs.sinks) row_lse = load(*inputs.sinks, 0, 0, h, 0);
        if (keys.empty()) {
          std::fill_n(row_out, head_dim, 0.0);
          if (row_bound != nullptr) std::fill_n(row_bound, head_dim, 0.0);
        } else {
          double mean_score = 0;
          Query query = operands.query(b, i, h, mean_score);
          // Of a poisoned query: the row is NaN without it, but for one that attn_mask lets see
          // nothing.
          if (!std::isfinite(mean_score)) mean_score = 0;
          read_row_changes(problem, inputs, b, i, h, keys, query.changes);
          query.changes.softcap = options.softcap;
          if (options.softcap != 0) {
            // Softcap sees whole scores, and so the LSE is whole too.
            query.changes.mean_score = static_cast<float>(mean_score);
            mean_score = 0;
          }
          query.changes.sink -= mean_score;
          row_lse = std::numbers::ln2 * row_function(arithmetic, operands.key_values(), query, keys,
                                                     scratch, row_out, row_bound) +
                    mean_score;
          if (options.mode == Mode::kFp8 && options.fp8_format == Fp8Format::kE5m2Raw) {
            round_output_to_e5m2(head_dim, row_out, row_bound);
          }
        }
        if (!lse.empty()) lse[static_cast<size_t>(row)] = row_lse;
      }
    }
  }
}

}  // namespace

EmulationOptions emulation_options(const AttentionOptions& options) noexcept {
  EmulationOptions result;
  result.mode = options.mode;
  result.softmax_scale = options.softmax_scale;
  result.mask = options.mask;
  result.softcap = options.softcap;
  result.kv_block = options.kv_block == 0 ? kDefaultKvBlock : options.kv_block;
  result.fp8_format = options.fp8_format;
  const bool smooths = options.mode == Mode::kAccurate || options.mode == Mode::kHalf;
  result.smooth_k = smooths && options.smooth_k;
  if (options.mode == Mode::kPaper) {
    result.v_granularity = Granularity::kTensor;
    result.p_scale = PScale::kRunningMax127;
    result.normalizer = Normalizer::kCodes;
    result.residual_mean = false;
    result.score_grid = false;
  } else {
    result.v_granularity = options.v_granularity;
    result.p_scale = PScale::kBlockLocal255;
    result.normalizer = Normalizer::kFloat;
    result.residual_mean = options.mode == Mode::kAccurate;
    result.score_grid = options.mode == Mode::kAccurate && kAccurateOnScoreGrid;
  }
  return result;
}

Status emulation(const AttentionInputs& inputs, const EmulationOptions& options,
                 std::span<double> out, std::span<double> lse, std::span<double> out_bound,
                 Rows rows) noexcept {
  try {
    return for_each_sequence(
        inputs, options.softmax_scale, options.mask, out, lse, out_bound, rows,
        [&options](const Problem& problem, const AttentionInputs& part, std::span<double> part_out,
                   std::span<double> part_lse, std::span<double> part_bound) {
          Status status = check_options(part, options);
          if (status.ok()) emulate(problem, part, options, part_out, part_lse, part_bound);
          return status;
        });
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "out of memory"};
  }
}

}  // namespace attn8::reference
