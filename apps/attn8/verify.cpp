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
};

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

/// Half a unit in the last place of the output type, relative, and its smallest step.
std::pair<double, double> output_rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {0x1p-11, 0x1p-25};
    case DType::kBFloat16:
      return {0x1p-9, 0x1p-134};
    default:
      return {0x1p-24, 0x1p-150};
  }
}

/// Bounds of a float32 kernel against float64 attention. A float32 dot product of D terms errs by
/// at most (D + 2) 2^-24 sum|q k|; delta is that in nats, plus the rounding of the score itself
/// and 2^-18 for exp2. Weights err by delta on both sides of the division, sums by 2^-24 per key.
void exact_bounds(const VerifyCase& one, const Qkv& qkv, Oracle& oracle) {
  const Shape& s = one.shape;
  const double scale = std::fabs(static_cast<double>(
      one.options.softmax_scale.value_or(1 / std::sqrt(static_cast<float>(s.head_dim)))));
  const auto keys = static_cast<double>(s.seqlen_k);
  const auto dim = static_cast<size_t>(s.head_dim);
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.nheads_q; ++h) {
      const int64_t kv_head = h / (s.nheads_q / s.nheads_k);
      const auto q = gather_rows(slice_heads(qkv.q.view(), b, h, 1), {});
      const auto k = gather_rows(slice_heads(qkv.k.view(), b, kv_head, 1), {});
      const auto v = gather_rows(slice_heads(qkv.v.view(), b, kv_head, 1), {});
      double v_max = 0;
      for (const double value : v) v_max = std::max(v_max, std::fabs(value));
      for (int64_t i = 0; i < s.seqlen_q; ++i) {
        double magnitude = 0;
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          double sum = 0;
          for (size_t d = 0; d < dim; ++d) {
            sum += std::fabs(q[static_cast<size_t>(i) * dim + d] *
                             k[static_cast<size_t>(j) * dim + d]);
          }
          magnitude = std::max(magnitude, sum);
        }
        const double delta =
            (static_cast<double>(s.head_dim) + 8) * 0x1p-24 * magnitude * scale + 0x1p-18;
        const double relative = 2 * delta + (keys + 8) * 0x1p-24;
        const auto row = static_cast<size_t>((b * s.seqlen_q + i) * s.nheads_q + h);
        for (size_t d = 0; d < dim; ++d) oracle.bound[row * dim + d] = relative * v_max;
        oracle.lse_bound[row] = relative + 0x1p-21 * std::fabs(oracle.lse[row]);
      }
    }
  }
}

Oracle run_oracles(const VerifyCase& one, const Qkv& qkv) {
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
  if (one.options.mode == Mode::kExact) {
    oracle.expected = oracle.exact;
    exact_bounds(one, qkv, oracle);
    return oracle;
  }
  oracle.expected.resize(elements);
  require(reference::emulation(qkv.inputs(), reference::emulation_options(one.options),
                               oracle.expected, oracle.lse, oracle.bound));
  for (size_t row = 0; row < rows; ++row) {
    // Weights of float32: 2^-18 for exp2 and 2^-24 per key of the sum, each rounding of a score
    // near its size; the mean of K adds a float32 dot product of that size again.
    oracle.lse_bound[row] = 0x1p-17 + static_cast<double>(one.shape.seqlen_k) * 0x1p-24 +
                            0x1p-19 * std::fabs(oracle.lse[row]);
  }
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
  Worst worst_out;
  for (size_t i = 0; i < out.size(); ++i) {
    const double rounding = relative * (std::fabs(oracle.expected[i]) + oracle.bound[i]) + smallest;
    worst_out.add(i, out[i], oracle.expected[i], oracle.bound[i] + rounding);
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
  } else if (outcome.rel_l2 > 1.1 * outcome.rel_l2_emulation + relative + 1e-5) {
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
  const Mask& mask = options.mask;
  return fmt::format("{} {} {} v {} kv_block {}{}{}{} data {}", shape.label(),
                     to_string(options.mode), to_string(dtype), to_string(options.v_granularity),
                     options.kv_block, mask.causal ? " causal" : "",
                     mask.align == CausalAlign::kTopLeft ? " top_left" : "",
                     mask.window_left >= 0 || mask.window_right >= 0
                         ? fmt::format(" window {},{}", mask.window_left, mask.window_right)
                         : "",
                     static_cast<int>(data));
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
  size_t n = 0;
  for (const int64_t length : kLengths) {
    for (int pair = 0; pair < 4; ++pair) {
      for (const Mask& mask : masks) {
        // Every axis turns at a pace of its own (all coprime to the others' lengths), so that over
        // the sweep all pairs of values meet.
        const size_t i = n++;
        if (!full && i % 5 != static_cast<size_t>(mode) % 5) continue;
        VerifyCase one;
        const auto& heads = kHeads[i % 3];
        one.shape = {i % 11 == 0 ? 2 : 1,
                     heads[0],
                     heads[1],
                     length,
                     length,
                     kHeadDims[(i * 7 + i / 10) % 10]};
        if (pair == 1) one.shape.seqlen_q = 1 + static_cast<int64_t>(i % 7);
        if (pair == 2) one.shape.seqlen_k = 1 + static_cast<int64_t>(i % 130);
        if (pair == 3) one.shape.seqlen_k = length + 64 + static_cast<int64_t>(i % 17);
        one.options.mode = mode;
        one.options.mask = mask;
        one.options.kv_block = kBlocks[(i + i / 4) % 4];
        one.options.smooth_k = i % 4 != 1;
        if (mode == Mode::kAccurate) one.options.v_granularity = kGranularities[(i + i / 5) % 5];
        if (i % 13 == 5) one.options.softmax_scale = 0.7F;
        one.dtype = kTypes[(i + i / 3) % 3];
        one.data = kData[(i + i / 8) % 8];
        // Neither 1e18 nor its square fits in float16.
        if (one.data == Data::kHuge && one.dtype == DType::kFloat16) one.dtype = DType::kFloat32;
        one.out_layout = i % 2 == 0 ? Layout::kBshd : Layout::kBhsd;
        cases.push_back(one);
      }
    }
  }
  return cases;
}

std::vector<VerifyOutcome> verify_case(const VerifyCase& one, std::span<const Isa> isas) {
  const Qkv qkv = case_data(one);
  const Oracle oracle = run_oracles(one, qkv);
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
