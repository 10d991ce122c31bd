// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "verify.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "attn8/reference.hpp"
#include "failure.hpp"

namespace attn8::app {
namespace {

/// What the kernels are compared with, dense [batch, seq, head, dim] and [batch, seq, head].
struct Oracle {
  std::vector<double> exact;     ///< float64 attention
  std::vector<double> expected;  ///< the emulation; for kExact float64 attention
  std::vector<double> bound;     ///< how far a right kernel may be from `expected`
  std::vector<double> lse;
  std::vector<double> lse_bound;
  double largest_v = 0;
};

/// Largest relative error of rounding to bfloat16: half a unit in the eighth bit.
constexpr double kBfloat16Rounding = 0x1p-8;

/// Hash of splitmix64: well mixed bits of a counter.
uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

size_t row_count(const Shape& s) { return static_cast<size_t>(s.batch * s.seqlen_q * s.nheads_q); }

Qkv case_data(const VerifyCase& one) {
  Qkv qkv = make_qkv("normal", 7, one.shape);
  for (HostTensor* tensor : {&qkv.q, &qkv.k, &qkv.v}) {
    const bool is_v = tensor == &qkv.v;
    const auto dim = static_cast<size_t>(one.shape.head_dim);
    const auto values = tensor->floats();
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t token = i / dim;
      switch (one.data) {
        case Data::kNormal:
          break;
        case Data::kZeros:
          values[i] = 0;
          break;
        case Data::kOneHot:
          values[i] = i % dim == token % dim ? 1.0F : 0.0F;
          break;
        case Data::kOutliers:
          if (token % 7 == 3) values[i] *= 100;
          break;
        case Data::kHuge:
          // 1e18 squared times 64 is within a factor of five of the largest float.
          if (!is_v) values[i] *= one.options.mode == Mode::kExact ? 5.5F : 1e18F;
          break;
      }
    }
  }
  return one.dtype == DType::kFloat32 ? std::move(qkv) : convert(qkv, one.dtype);
}

/// Largest relative error of rounding to the output type, and half of its smallest step.
std::pair<double, double> output_rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {0x1p-11, 0x1p-25};
    case DType::kBFloat16:
      return {0x1p-8, 0x1p-134};
    default:
      return {0x1p-24, 0x1p-150};
  }
}

/// Largest sum_d |scale q_d k_jd| over the keys, for every row, dense [batch, seq, head]: what the
/// rounding of scores in float32 is relative to.
std::vector<double> score_magnitudes(const VerifyCase& one, const Qkv& qkv) {
  const Shape& s = one.shape;
  const double scale = std::fabs(static_cast<double>(
      one.options.softmax_scale.value_or(1 / std::sqrt(static_cast<float>(s.head_dim)))));
  const auto dim = static_cast<size_t>(s.head_dim);
  std::vector<double> magnitudes(row_count(s));
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.nheads_q; ++h) {
      const int64_t kv_head = h / (s.nheads_q / s.nheads_k);
      const auto q = gather_rows(slice_heads(qkv.q.view(), b, h, 1), {});
      const auto k = gather_rows(slice_heads(qkv.k.view(), b, kv_head, 1), {});
      for (int64_t i = 0; i < s.seqlen_q; ++i) {
        double& largest = magnitudes[static_cast<size_t>((b * s.seqlen_q + i) * s.nheads_q + h)];
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          double sum = 0;
          for (size_t d = 0; d < dim; ++d) {
            sum += std::fabs(q[static_cast<size_t>(i) * dim + d] *
                             k[static_cast<size_t>(j) * dim + d]);
          }
          largest = std::max(largest, scale * sum);
        }
      }
    }
  }
  return magnitudes;
}

double largest_magnitude(const ConstTensorView& x) {
  double largest = 0;
  for (const double value : gather_rows(x, {})) largest = std::max(largest, std::fabs(value));
  return largest;
}

/// Fills the bounds the emulation does not give: of the LSE, and for kExact of the output.
/// A float32 dot product of D terms errs by at most (D + 8) 2^-24 of its magnitude, the rounding of
/// the score itself included; smoothing doubles the magnitude (K and its mean). exp2 errs by 2^-18,
/// a sum by 2^-24 per key. A relative error of delta in the weights moves the output by at most
/// 2 delta max|v|: once through the numerator, once through the denominator.
void set_bounds(const VerifyCase& one, const Qkv& qkv, Oracle& oracle) {
  const auto dim = static_cast<double>(one.shape.head_dim);
  const auto keys = static_cast<double>(one.shape.seqlen_k);
  const auto magnitudes = score_magnitudes(one, qkv);
  const bool exact = one.options.mode == Mode::kExact;
  const bool half = one.options.mode == Mode::kHalf;
  const double v_max = exact || half ? largest_magnitude(qkv.v.view()) : 0;
  oracle.largest_v = v_max;
  for (size_t row = 0; row < magnitudes.size(); ++row) {
    const double delta = (dim + 8) * 0x1p-23 * magnitudes[row] + 0x1p-18 + (keys + 8) * 0x1p-24;
    oracle.lse_bound[row] = 2 * delta + 0x1p-22 * std::fabs(oracle.lse[row]);
    if (!exact) continue;
    const auto begin = oracle.bound.begin() + static_cast<std::ptrdiff_t>(row) * one.shape.head_dim;
    std::fill(begin, begin + one.shape.head_dim, 2 * delta * v_max);
  }
}

Oracle run_oracles(const VerifyCase& one, const Qkv& qkv,
                   const reference::EmulationOptions& emulation) {
  const size_t rows = row_count(one.shape);
  const size_t elements = rows * static_cast<size_t>(one.shape.head_dim);
  Oracle oracle;
  oracle.exact.resize(elements);
  oracle.bound.resize(elements);
  oracle.lse.resize(rows);
  oracle.lse_bound.resize(rows);
  require(reference::exact_attention(qkv.q.view(), qkv.k.view(), qkv.v.view(),
                                     one.options.softmax_scale, one.options.mask, oracle.exact,
                                     oracle.lse));
  oracle.expected = oracle.exact;
  if (one.options.mode != Mode::kExact) {
    require(
        reference::emulation(qkv.inputs(), emulation, oracle.expected, oracle.lse, oracle.bound));
  }
  set_bounds(one, qkv, oracle);
  return oracle;
}

/// Worst |got - want| / bound; infinity where one is finite and the other is not.
struct Worst {
  double ratio = 0;
  size_t index = 0;
  double got = 0, want = 0, bound = 0;

  void add(size_t i, double got_i, double want_i, double bound_i) {
    double r = 0;
    if (got_i == want_i || (std::isnan(got_i) && std::isnan(want_i))) {
      r = 0;
    } else if (std::isfinite(got_i) && std::isfinite(want_i)) {
      r = std::fabs(got_i - want_i) / bound_i;
    } else {
      r = HUGE_VAL;
    }
    if (r > ratio) *this = {r, i, got_i, want_i, bound_i};
  }
  [[nodiscard]] std::string text(std::string_view what) const {
    return fmt::format("{}[{}]={:.9g}, oracle {:.9g}, bound {:.3g}", what, index, got, want, bound);
  }
};

/// Every row of every head, dense [batch, seq, head, dim] like the oracles.
std::vector<double> dense(const ConstTensorView& x) {
  ConstTensorView swapped = x;  // gather_rows writes heads before rows
  std::swap(swapped.shape[1], swapped.shape[2]);
  std::swap(swapped.strides[1], swapped.strides[2]);
  return gather_rows(swapped, {});
}

VerifyOutcome compare(const VerifyCase& one, const Oracle& oracle, const Runner& runner) {
  VerifyOutcome outcome;
  const auto out = dense(runner.out().view());
  const auto lse = dense(runner.lse().view());
  const auto [relative, smallest] = output_rounding(one.dtype);
  // `exact` of bfloat16 where the CPU multiplies pairs of it: P is rounded. `half` on CUDA: weights
  // are rounded relative to a power of two, by the emulation relative to the largest.
  const std::string_view kernel = runner.plan().kernel();
  const bool rounds_p =
      kernel.find("_bfloat16_") != std::string_view::npos ||
      (kernel.starts_with("attend_half") && kernel.find("_sm80_") != std::string_view::npos);
  const double p_rounding = rounds_p ? kBfloat16Rounding : 0;
  Worst worst_out;
  for (size_t i = 0; i < out.size(); ++i) {
    const double rounding = relative * (std::fabs(oracle.expected[i]) + oracle.bound[i]) + smallest;
    worst_out.add(i, out[i], oracle.expected[i],
                  oracle.bound[i] + rounding + p_rounding * oracle.largest_v);
  }
  Worst worst_lse;
  for (size_t i = 0; i < lse.size(); ++i) {
    worst_lse.add(i, lse[i], oracle.lse[i], oracle.lse_bound[i]);
  }
  outcome.out_ratio = worst_out.ratio;
  outcome.lse_ratio = worst_lse.ratio;
  outcome.rel_l2 = reference::error_report(out, oracle.exact).rel_l2;
  outcome.rel_l2_emulation = reference::error_report(oracle.expected, oracle.exact).rel_l2;
  if (worst_out.ratio > 1) {
    outcome.failure = worst_out.text("out");
  } else if (worst_lse.ratio > 1) {
    outcome.failure = worst_lse.text("lse");
  } else if (outcome.rel_l2 > 1.1 * outcome.rel_l2_emulation + relative + p_rounding + 1e-5) {
    outcome.failure = fmt::format("relative L2 error {:.3g}, want at most 1.1 x {:.3g}",
                                  outcome.rel_l2, outcome.rel_l2_emulation);
  }
  return outcome;
}

VerifyOutcome verify_isa(const VerifyCase& one, const Qkv& qkv, const Oracle& oracle, Isa isa) {
  Runner runner(qkv, one.options, Context::with_isa(isa, 1), true, one.out_layout);
  if (runner.plan().isa() != isa) {
    VerifyOutcome outcome;
    outcome.failure = fmt::format("ran on {}", to_string(runner.plan().isa()));
    return outcome;
  }
  runner.run();
  VerifyOutcome outcome = compare(one, oracle, runner);
  Runner threaded(qkv, one.options, Context::with_isa(isa, 3), true, one.out_layout);
  threaded.run();
  const bool same =
      std::memcmp(runner.out().data(), threaded.out().data(), runner.out().size_bytes()) == 0 &&
      std::memcmp(runner.lse().data(), threaded.lse().data(), runner.lse().size_bytes()) == 0;
  if (!same && outcome.failure.empty()) {
    outcome.failure = "one and three threads give different bits";
  }
  return outcome;
}

struct Quantized {
  HostTensor codes, scale, mean;
};

Quantized quantize_on(Isa isa, const ConstTensorView& x, const QuantSpec& spec) {
  Quantized result = {HostTensor(DType::kInt8, x.shape),
                      HostTensor(DType::kFloat32, scale_shape(x.shape, spec)),
                      HostTensor(DType::kFloat32, {x.shape[0], 1, x.shape[2], x.shape[3]})};
  require(quantize(x, spec, result.codes.view(), result.scale.view(), Context::with_isa(isa),
                   Mean::kCompute, result.mean.view()));
  return result;
}

bool same_bytes(const HostTensor& a, const HostTensor& b) {
  return a.size_bytes() == b.size_bytes() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

}  // namespace

std::string VerifyCase::label() const {
  static constexpr std::array<std::string_view, 5> kNames = {"normal", "zeros", "one_hot",
                                                             "outliers", "huge"};
  const Mask& mask = options.mask;
  return fmt::format("{} {} {} v {} kv_block {}{}{}{} data {}", shape.label(),
                     to_string(options.mode), to_string(dtype), to_string(options.v_granularity),
                     options.kv_block, mask.causal ? " causal" : "",
                     mask.align == CausalAlign::kTopLeft ? " top_left" : "",
                     mask.window_left >= 0 || mask.window_right >= 0
                         ? fmt::format(" window {},{}", mask.window_left, mask.window_right)
                         : "",
                     kNames[static_cast<size_t>(data)]);
}

std::vector<VerifyCase> verify_cases(Mode mode, bool full) {
  using enum CausalAlign;
  constexpr std::array<int64_t, 13> kLengths = {1,  2,   3,   31,  33,  63, 64,
                                                65, 127, 501, 511, 512, 513};
  constexpr std::array<int64_t, 10> kHeadDims = {64, 128, 1, 32, 96, 3, 80, 256, 61, 192};
  constexpr std::array<std::array<int64_t, 2>, 3> kHeads = {{{1, 1}, {8, 2}, {3, 1}}};
  constexpr std::array<DType, 3> kTypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  constexpr std::array<Granularity, 5> kGranularities = {Granularity::kToken, Granularity::kTensor,
                                                         Granularity::kChannel, Granularity::kBlock,
                                                         Granularity::kBlockChannel};
  constexpr std::array<Data, 8> kData = {Data::kNormal,   Data::kNormal, Data::kOutliers,
                                         Data::kOneHot,   Data::kNormal, Data::kZeros,
                                         Data::kOutliers, Data::kHuge};
  constexpr std::array<int32_t, 4> kBlocks = {0, 64, 128, 256};
  const std::array<Mask, 9> masks = {{{},
                                      {true, kBottomRight, -1, -1},
                                      {true, kTopLeft, -1, -1},
                                      {false, kBottomRight, 5, 0},
                                      {false, kTopLeft, 17, 3},
                                      {true, kBottomRight, 16, -1},
                                      {true, kTopLeft, 100, -1},
                                      {false, kBottomRight, -1, 7},
                                      {false, kTopLeft, 0, 0}}};

  std::vector<VerifyCase> cases;
  uint64_t n = 0;
  for (const int64_t length : kLengths) {
    for (int pair = 0; pair < 4; ++pair) {
      for (const Mask& mask : masks) {
        const uint64_t i = n++;
        if (!full && i % 5 != static_cast<uint64_t>(mode) % 5) continue;
        // Independent picks on every axis, so that over the sweep all pairs of values meet.
        const auto pick = [&](uint64_t axis, size_t choices) {
          return mix(i * 16 + axis + (static_cast<uint64_t>(mode) << 32)) % choices;
        };
        VerifyCase one;
        const auto& heads = kHeads[pick(0, kHeads.size())];
        one.shape = {pick(1, 8) == 0 ? 2 : 1,
                     heads[0],
                     heads[1],
                     length,
                     length,
                     kHeadDims[pick(2, kHeadDims.size())]};
        if (pair == 1) one.shape.seqlen_q = 1 + static_cast<int64_t>(pick(3, 7));
        if (pair == 2) one.shape.seqlen_k = 1 + static_cast<int64_t>(pick(3, 130));
        if (pair == 3) one.shape.seqlen_k = length + 64 + static_cast<int64_t>(pick(3, 17));
        one.options.mode = mode;
        one.options.mask = mask;
        one.options.kv_block = kBlocks[pick(4, kBlocks.size())];
        one.options.smooth_k = pick(5, 4) != 0;
        if (mode == Mode::kAccurate) {
          one.options.v_granularity = kGranularities[pick(6, kGranularities.size())];
        }
        if (pick(7, 8) == 0) one.options.softmax_scale = 0.7F;
        one.dtype = kTypes[pick(8, kTypes.size())];
        one.data = kData[pick(9, kData.size())];
        // Neither 1e18 nor its square fits in float16.
        if (one.data == Data::kHuge && one.dtype == DType::kFloat16) one.dtype = DType::kFloat32;
        one.out_layout = pick(10, 2) == 0 ? Layout::kBshd : Layout::kBhsd;
        cases.push_back(one);
      }
    }
  }
  return cases;
}

std::vector<VerifyOutcome> verify_case(const VerifyCase& one, std::span<const Isa> isas) {
  const Qkv qkv = case_data(one);
  const Oracle oracle = run_oracles(one, qkv, reference::emulation_options(one.options));
  std::vector<VerifyOutcome> outcomes;
  for (const Isa isa : isas) {
    try {
      outcomes.push_back(verify_isa(one, qkv, oracle, isa));
    } catch (const Failure& failure) {
      outcomes.emplace_back();
      outcomes.back().failure = failure.what();
    }
  }
  return outcomes;
}

VerifyOutcome verify_on_device(const VerifyCase& one, const Context& context) {
  VerifyOutcome outcome;
  try {
    const Qkv qkv = case_data(one);
    AttentionOptions options = one.options;
    options.kv_block = 0;  // the kernels'
    Runner runner(qkv, options, context, true, one.out_layout);
    runner.run();
    options.kv_block = runner.plan().kv_block();
    // What docs/numerics.md says the CUDA kernels do otherwise.
    reference::EmulationOptions emulation = reference::emulation_options(options);
    emulation.score_grid = false;
    emulation.residual_mean = false;
    outcome = compare(one, run_oracles(one, qkv, emulation), runner);
  } catch (const Failure& failure) {
    const bool unsupported = failure.status().code() == StatusCode::kUnsupported;
    (unsupported ? outcome.unsupported : outcome.failure) = failure.what();
  }
  return outcome;
}

std::vector<std::string> verify_quantize(std::span<const Isa> isas) {
  std::vector<std::string> failures;
  for (const int64_t length : {1, 33, 501}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      VerifyCase one;
      one.shape = {1, 3, 3, length, length, length == 33 ? 61 : 64};
      one.dtype = dtype;
      one.data = Data::kOutliers;
      const Qkv qkv = case_data(one);
      for (const auto granularity :
           {Granularity::kToken, Granularity::kTensor, Granularity::kChannel, Granularity::kBlock,
            Granularity::kBlockChannel}) {
        const QuantSpec spec = {granularity, 64};
        const Quantized want = quantize_on(Isa::kScalar, qkv.k.view(), spec);
        const auto* codes = reinterpret_cast<const int8_t*>(want.codes.data());
        if (std::count(codes, codes + want.codes.size_bytes(), -128) != 0) {
          failures.push_back(fmt::format("{} {}: a code is -128, want [-127, 127]",
                                         to_string(granularity), to_string(dtype)));
        }
        for (const Isa isa : isas) {
          const Quantized got = quantize_on(isa, qkv.k.view(), spec);
          if (!same_bytes(got.codes, want.codes) || !same_bytes(got.scale, want.scale) ||
              !same_bytes(got.mean, want.mean)) {
            failures.push_back(fmt::format("{} {} length {}: {} differs from scalar",
                                           to_string(granularity), to_string(dtype), length,
                                           to_string(isa)));
          }
        }
      }
    }
  }
  return failures;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const IsaSupport& support : isa_support()) {
    if (support.available) isas.push_back(support.isa);
  }
  return isas;
}

}  // namespace attn8::app
