// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "support/kernel_case.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

namespace attn8::testing {

std::string KernelCase::name() const {
  std::ostringstream text;
  text << to_string(options.mode) << " b" << batch << " q" << seqlen_q << " k" << seqlen_k << " h"
       << nheads_q << "/" << nheads_k << " d" << head_dim << " v_"
       << to_string(options.v_granularity) << (options.mask.causal ? " causal" : "")
       << (options.mask.align == CausalAlign::kTopLeft ? " top_left" : "") << " window "
       << options.mask.window_left << "," << options.mask.window_right << " kv_block "
       << options.kv_block << " " << to_string(dtype) << " data " << static_cast<int>(data)
       << " memory " << static_cast<int>(memory) << " head_dim_v " << out_dim() << " softcap "
       << options.softcap << " mask " << static_cast<int>(scores.attn_mask)
       << (scores.alibi_slopes ? " alibi" : "") << (scores.sinks ? " sinks" : "")
       << (scores.seqlens_k ? " seqlens_k" : "") << (scores.leftpad_k ? " leftpad_k" : "");
  return text.str();
}

AttentionInputs KernelInputs::operands() const {
  AttentionInputs inputs = {q.view(), k.view(), v.view()};
  const auto view = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<ConstTensorView>(tensor->view()) : std::nullopt;
  };
  inputs.attn_mask = view(attn_mask);
  inputs.alibi_slopes = view(alibi_slopes);
  inputs.sinks = view(sinks);
  inputs.seqlens_k = view(seqlens_k);
  inputs.leftpad_k = view(leftpad_k);
  return inputs;
}

namespace {

std::optional<Tensor> make_mask(const KernelCase& c) {
  const auto noise = [&c](int64_t b, int64_t s, int64_t h, int64_t d) {
    return normal_at(c.seed + 3, static_cast<uint64_t>(((b * 521 + s) * 31 + h) * 40009 + d));
  };
  constexpr double kMinusInf = -std::numeric_limits<double>::infinity();
  std::optional<Tensor> mask;
  switch (c.scores.attn_mask) {
    case MaskKind::kNone:
      break;
    case MaskKind::kBool:
      mask.emplace(DType::kBool, Extents{c.batch, c.seqlen_q, c.nheads_q, c.seqlen_k}, c.memory);
      mask->fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        return s != 1 && noise(b, s, h, d) > -0.4 ? 1.0 : 0.0;
      });
      break;
    case MaskKind::kBoolKeys:
      mask.emplace(DType::kBool, Extents{c.batch, 1, 1, c.seqlen_k}, c.memory);
      mask->fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        return noise(b, s, h, d) > 0 ? 1.0 : 0.0;
      });
      break;
    case MaskKind::kAdded:
      mask.emplace(c.scores.mask_dtype, Extents{1, c.seqlen_q, c.nheads_q, c.seqlen_k}, c.memory);
      mask->fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        const double x = noise(b, s, h, d);
        return x < -1.5 ? kMinusInf : 2 * x;
      });
      break;
    case MaskKind::kAddedRows:
      mask.emplace(c.scores.mask_dtype, Extents{c.batch, c.seqlen_q, 1, 1}, c.memory);
      mask->fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
        return s == 2 ? kMinusInf : noise(b, s, h, d);
      });
      break;
  }
  return mask;
}

void make_score_operands(const KernelCase& c, KernelInputs& inputs) {
  inputs.attn_mask = make_mask(c);
  if (c.scores.alibi_slopes) {
    inputs.alibi_slopes.emplace(DType::kFloat32, Extents{c.batch, 1, c.nheads_q, 1});
    inputs.alibi_slopes->fill([&](int64_t b, int64_t, int64_t h, int64_t) {
      return std::exp2(-static_cast<double>(h + b + 1) * 2);
    });
  }
  if (c.scores.sinks) {
    inputs.sinks.emplace(DType::kFloat32, Extents{1, 1, c.nheads_q, 1});
    inputs.sinks->fill(
        [](int64_t, int64_t, int64_t h, int64_t) { return 2.5 - static_cast<double>(h); });
  }
  if (c.scores.seqlens_k) {
    inputs.seqlens_k.emplace(DType::kInt32, Extents{c.batch, 1, 1, 1});
    inputs.seqlens_k->fill([&](int64_t b, int64_t, int64_t, int64_t) {
      return static_cast<double>(c.seqlen_k - (b * 37) % (c.seqlen_k + 1));
    });
  }
  if (c.scores.leftpad_k) {
    inputs.leftpad_k.emplace(DType::kInt32, Extents{c.batch, 1, 1, 1});
    inputs.leftpad_k->fill([&](int64_t b, int64_t, int64_t, int64_t) {
      const int64_t length = c.seqlen_k - (c.scores.seqlens_k ? (b * 37) % (c.seqlen_k + 1) : 0);
      return static_cast<double>((b + 1) * 29 % (length + 1));
    });
  }
}

}  // namespace

KernelInputs make_inputs(const KernelCase& c) {
  KernelInputs inputs{Tensor(c.dtype, {c.batch, c.seqlen_q, c.nheads_q, c.head_dim}, c.memory),
                      Tensor(c.dtype, {c.batch, c.seqlen_k, c.nheads_k, c.head_dim}, c.memory),
                      Tensor(c.dtype, {c.batch, c.seqlen_k, c.nheads_k, c.out_dim()}, c.memory)};
  make_score_operands(c, inputs);
  const auto one_hot = [](int64_t, int64_t s, int64_t, int64_t d) {
    return s % 32 == d ? 1.0 : 0.0;
  };
  switch (c.data) {
    case Data::kZeros:
      for (Tensor* t : {&inputs.q, &inputs.k, &inputs.v}) {
        t->fill([](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
      }
      break;
    case Data::kOneHot:
      for (Tensor* t : {&inputs.q, &inputs.k, &inputs.v}) t->fill(one_hot);
      break;
    case Data::kEqual:
      inputs.q.fill_normal(c.seed);
      inputs.k.fill([](int64_t, int64_t, int64_t, int64_t d) { return d % 3 - 1.0; });
      inputs.v.fill_normal(c.seed + 2);
      break;
    default:
      inputs.q.fill_normal(c.seed);
      inputs.k.fill_normal(c.seed + 1);
      inputs.v.fill_normal(c.seed + 2);
  }
  const auto scale_rows = [&](Tensor& t, auto factor) {
    const Tensor source = t;
    t.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      return source.get(b, s, h, d) * factor(s);
    });
  };
  if (c.data == Data::kOutliers) {
    for (Tensor* t : {&inputs.q, &inputs.k, &inputs.v}) {
      scale_rows(*t, [](int64_t s) { return s % 7 == 3 ? 40.0 : 1.0; });
    }
  }
  if (c.data == Data::kHuge) {
    // 1e18 squared, times 64 terms, comes within a factor of a few of the largest float32.
    const double huge = c.dtype == DType::kFloat16 ? 100 : 1e18;
    scale_rows(inputs.q, [=](int64_t) { return huge; });
    scale_rows(inputs.k, [=](int64_t) { return huge; });
  }
  if (c.data == Data::kSink) {
    // The first keys draw most of the attention and carry almost no V, one of them none at all.
    inputs.k.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      const double x =
          normal_at(c.seed + 1, static_cast<uint64_t>((b * 131 + s * 7 + h) * 263 + d));
      return s < 3 ? 1.5 + 0.2 * x : x;
    });
    inputs.q.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      return 0.8 + normal_at(c.seed, static_cast<uint64_t>((b * 131 + s * 7 + h) * 263 + d));
    });
    scale_rows(inputs.v, [](int64_t s) { return s == 1 ? 0.0 : s < 3 ? 0.01 : 1.0; });
  }
  return inputs;
}

KernelResult run_kernel(const KernelCase& c, const AttentionInputs& inputs, Isa isa) {
  KernelResult result{Tensor(c.out_dtype, {c.batch, c.seqlen_q, c.nheads_q, c.out_dim()}, c.memory),
                      Tensor(DType::kFloat32, {c.batch, c.seqlen_q, c.nheads_q, 1}, c.memory)};
  const AttentionOutputs outputs{result.out.view(), result.lse.view()};
  const Context context = Context::with_isa(isa, c.threads);
  Result<AttentionPlan> plan = AttentionPlan::make(inputs, outputs, c.options, context);
  EXPECT_TRUE(plan.ok()) << c.name() << ": " << plan.status().message();
  if (!plan.ok()) return result;
  result.kernel = plan.value().kernel();
  EXPECT_EQ(plan.value().isa(), isa) << c.name();
  EXPECT_NE(plan.value().kernel().find(to_string(isa)), std::string_view::npos)
      << plan.value().kernel();
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  const size_t bytes = plan.value().workspace_bytes();
  std::vector<Line> workspace((bytes + 63) / 64);
  std::memset(static_cast<void*>(workspace.data()), 0xff, workspace.size() * 64);  // NaNs
  const Status status = plan.value().run(
      inputs, outputs, {reinterpret_cast<std::byte*>(workspace.data()), workspace.size() * 64});
  EXPECT_TRUE(status.ok()) << c.name() << ": " << status.message();
  return result;
}

namespace {

/// Half a unit in the last place of the output type, relative, and its smallest step.
std::pair<double, double> output_rounding(DType dtype) {
  if (dtype == DType::kFloat16) return {0x1p-11, 0x1p-25};
  if (dtype == DType::kBFloat16) return {0x1p-8, 0x1p-134};
  return {0x1p-24, 0x1p-150};
}

/// Bound of a float32 kernel against float64: see expect_matches_oracle().
struct FloatBound {
  double relative_weight = 0;
  double largest_v = 0;
};

FloatBound float_bound(const KernelCase& c, const AttentionInputs& inputs) {
  // A float32 dot product of D terms errs by at most (D + 2) 2^-24 sum |q k|; in nats that is
  // delta, plus 2^-20 for exp2 and the score's own rounding. Weights err by delta above and below
  // the division, float32 sums by 2^-24 per key.
  FloatBound bound;
  double magnitude = 0;
  const auto& q = *std::get_if<ConstTensorView>(&inputs.q);
  const auto largest_norm = [](const ConstTensorView& x) {
    double largest = 0;
    for (int64_t b = 0; b < x.shape[0]; ++b) {
      for (int64_t s = 0; s < x.shape[1]; ++s) {
        for (int64_t h = 0; h < x.shape[2]; ++h) {
          double sum = 0;
          for (int64_t d = 0; d < x.shape[3]; ++d) {
            const auto* p = static_cast<const float*>(x.data) + b * x.strides[0] +
                            s * x.strides[1] + h * x.strides[2] + d * x.strides[3];
            sum += static_cast<double>(*p) * static_cast<double>(*p);
          }
          largest = std::max(largest, sum);
        }
      }
    }
    return std::sqrt(largest);
  };
  const auto& k = *std::get_if<ConstTensorView>(&inputs.k);
  const auto& v = *std::get_if<ConstTensorView>(&inputs.v);
  magnitude = largest_norm(q) * largest_norm(k);  // Cauchy-Schwarz: >= sum |q k|
  const double scale = std::fabs(static_cast<double>(
      c.options.softmax_scale.value_or(1 / std::sqrt(static_cast<float>(c.head_dim)))));
  const double delta =
      (static_cast<double>(c.head_dim) + 8) * 0x1p-24 * magnitude * scale + 0x1p-20;
  // What attn_mask and ALiBi add rounds too; -Inf adds nothing.
  double added = 0;
  if (inputs.attn_mask && inputs.attn_mask->dtype == DType::kFloat32) added += 16;
  if (inputs.alibi_slopes) added += static_cast<double>(c.seqlen_k + c.seqlen_q);
  bound.relative_weight =
      2 * delta + 0x1p-20 * added + (static_cast<double>(c.seqlen_k) + 8) * 0x1p-24;
  bound.largest_v = largest_norm(v);
  return bound;
}

}  // namespace

void expect_matches_oracle(const KernelCase& c, const AttentionInputs& inputs,
                           const KernelResult& result, Isa isa) {
  const auto rows = static_cast<size_t>(c.batch * c.seqlen_q * c.nheads_q);
  const auto dim = static_cast<size_t>(c.out_dim());
  std::vector<double> out(rows * dim);
  std::vector<double> lse(rows);
  std::vector<double> bound(rows * dim);
  std::vector<double> lse_bound(rows);
  if (c.options.mode == Mode::kExact) {
    const Status status = reference::exact_attention(inputs, c.options, out, lse);
    ASSERT_TRUE(status.ok()) << status.message();
    const FloatBound limit = float_bound(c, inputs);
    for (size_t i = 0; i < out.size(); ++i) bound[i] = limit.relative_weight * limit.largest_v;
    for (size_t i = 0; i < rows; ++i) {
      lse_bound[i] = limit.relative_weight + 0x1p-21 * std::fabs(lse[i]);
    }
  } else {
    const Status status =
        reference::emulation(inputs, reference::emulation_options(c.options), out, lse, bound);
    ASSERT_TRUE(status.ok()) << status.message();
    for (size_t i = 0; i < rows; ++i) {
      // exp2 errs by 2^-18, a float32 sum by 2^-24 per key, a score by a few 2^-24 of its size.
      lse_bound[i] =
          0x1p-17 + static_cast<double>(c.seqlen_k) * 0x1p-24 + 0x1p-20 * (std::fabs(lse[i]) + 1);
    }
  }
  const auto [relative, step] = output_rounding(c.out_dtype);
  const std::vector<double> got = result.out.values();
  const std::vector<double> got_lse = result.lse.values();
  double worst = 0;
  size_t at = 0;
  const auto excess = [](double value, double wanted, double limit) {
    if (std::isnan(value) || std::isnan(wanted)) {
      return std::isnan(value) && std::isnan(wanted) ? 0.0
                                                     : std::numeric_limits<double>::infinity();
    }
    if (value == wanted) return 0.0;
    return std::fabs(value - wanted) / limit;
  };
  for (size_t i = 0; i < out.size(); ++i) {
    // A block whose maximum lies 126 octaves below the running one counts as if it lay there.
    constexpr double kUnderflow = 0x1p-100;
    const double limit = bound[i] + relative * std::fabs(out[i]) + step + kUnderflow;
    const double ratio = excess(got[i], out[i], limit);
    if (!(ratio <= worst)) {
      worst = ratio;
      at = i;
    }
  }
  if (!out.empty()) {
    EXPECT_LE(worst, 1) << to_string(isa) << " " << c.name() << ": out[" << at << "] got "
                        << got[at] << ", emulation " << out[at] << ", bound " << bound[at];
  }
  for (size_t i = 0; i < rows; ++i) {
    ASSERT_LE(excess(got_lse[i], lse[i], lse_bound[i]), 1)
        << to_string(isa) << " " << c.name() << ": lse[" << i << "] got " << got_lse[i]
        << ", emulation " << lse[i] << ", bound " << lse_bound[i];
  }
}

KernelResult check_kernel(const KernelCase& c, Isa isa) {
  const KernelInputs inputs = make_inputs(c);
  KernelResult result = run_kernel(c, inputs.operands(), isa);
  expect_matches_oracle(c, inputs.operands(), result, isa);
  return result;
}

}  // namespace attn8::testing
