// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// How far a kernel may be from the emulation
// ------------------------------------------
// Write u = 2^-24 for the unit roundoff of float32, x for a value here and x' for the kernel's.
//
// Scores. a_ij is exact. softmax_scale, its product with log2(e), the product with sq_i, the one
// with sk_j and the last one round once each, so |s' - s| <= 6 u |s|. Folding V adds the rounding
// of r_j (1.45 u in log2 units), that of log2 (2 u |log2 r_j|) and that of the sum (u |t|). Where
// products are not integers, a float32 dot product over D channels adds (D + 2) u ||q|| ||k||.
// Call the sum e_j. A score that saturates does so in both: e_j = 0.
//
// Maxima. t'_j lies in [t_j - e_j, t_j + e_j], so the kernel's maximum of a block lies in
// [max_j(t_j - e_j), max_j(t_j + e_j)], and likewise the running one. The gap of key j below the
// maximum therefore lies in [max(0, lower - t_j - e_j), max(0, upper_j - t_j + e_j)], with upper_j
// the upper end over the *other* keys: a key that no other can reach has gap 0 in the kernel too.
//
// Exponentials. 2^-gap has a relative error of at most kExp2RelativeError, and of u (gap + 16) from
// rounding its argument, at most 8 binades from the maximum where R is folded into it; 2^0 is
// exact. Below 2^-126, where float32 has no normal numbers, it may stop anywhere from 0 to 2^-126.
// This gives intervals [w_lo, w_hi] around w, and the same for the factors a and b.
//
// Codes. Rounding is monotonic, so code' lies in [round(w_lo), round(w_hi)]; `flip` is the larger
// distance of the ends from the code. It is 0 except for the few keys within a relative 2^-17 or so
// of a rounding boundary. The integer sum over a block moves by at most sum_j flip_j |v_jd|. Where
// P and V are floats, adding n keys in float32, in any order, adds (n + 2) u sum_j p_j |v_jd|.
//
// The residual rho = sum_j (w_j - code_j) moves by sum_j (|w' - w| + flip_j) and (n + 20) u sum_j
// |w_j - code_j|; times the mean V of the block that moves O.
//
// Recurrences. With A = |x' - x| for a factor x, each step
//     O <- a O + b C   moves  E_O to  a_hi E_O + A_a |O| + b_hi E_C + A_b |C| + 4 u (|O'| + |C'|)
// (conversion to float32, the products with b and the V scale, the multiply-add), and l likewise,
// where E_L sums |w' - w| / r_j, or flip_j / r_j for the keys that enter by their code, and
// (n + 5) u L for the float32 sum.
//
// Result. O'/l' - O/l = (O' - O - out (l' - l)) / l', so
//     |out' - out| <= (E_O + |out| E_l) / (l - E_l) + 6 u |out|.
// Other terms in u^2 are left out; the rounded-up constants hold them.

#include "reference/emulation_row.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <tuple>
#include <utility>

#include "reference/fp8.hpp"

namespace attn8::reference {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kExp2RelativeError = 0x1p-18;
constexpr double kSmallestPower = 0x1p-126;
constexpr double kFloatMax = std::numeric_limits<float>::max();
constexpr double kInf = std::numeric_limits<double>::infinity();

// Error of rounding a value of at most this magnitude to float32, subnormal ones included.
double rounding(double magnitude) { return std::max(kUnit * magnitude, 0x1p-150); }

double round_p(PFormat format, double w) {
  switch (format) {
    case PFormat::kInteger:
      return std::nearbyint(w);
    case PFormat::kBfloat16:
      return round_bfloat16(w);
    case PFormat::kE4m3:
      return round_e4m3(w);
    case PFormat::kE5m2:
      return round_e5m2(w);
  }
  return w;
}

// What a kernel may have where this file has `value`.
struct Interval {
  double lower, upper;
  [[nodiscard]] double error(double value) const {
    return std::max({upper - value, value - lower, 0.0});
  }
};

// range * 2^-gap for any gap in [gap_min, gap_max], both cut at 0.
Interval exp2_interval(double range, double gap_min, double gap_max) {
  if (!(gap_max > 0)) return {range, range};
  const double gap = std::max(gap_min, 0.0);
  // Beyond 2^10 binades the weight is 0 whatever the error.
  const auto error = [](double x) {
    return kExp2RelativeError + kUnit * (std::min(x, 0x1p10) + 16);
  };
  return {range * std::exp2(-gap_max) * std::max(0.0, 1 - error(gap_max)),
          range * std::max(std::exp2(-gap) * (1 + error(gap)), kSmallestPower)};
}

struct Score {
  double value, error;
};

// softcap tanh(s / softcap) in log2 units, from the argument x of the kernels' tanh(x ln 2 / 2)
// less what smoothing took, which may be `error` units of 2^-24 off; and how far a kernel's may be
// off. The slope of tanh is 1 - tanh^2, its float32 value 2^-21 off.
std::pair<double, double> capped(const RowChanges& changes, double x, double error) {
  const double mean = changes.mean_score * 2 * std::numbers::log2e / changes.softcap;
  const double softcap = changes.softcap * std::numbers::log2e;
  const double half_ln2 = std::numbers::ln2 / 2;
  x += mean;
  error += 2 * std::abs(mean) + std::abs(x);
  const double nearest = std::max(0.0, std::abs(x) - kUnit * error);
  const double slope = 1 - std::pow(std::tanh(nearest * half_ln2), 2);
  const double s = softcap * std::tanh(x * half_ln2);
  return {s, softcap * (half_ln2 * slope * error + 0x1p-21 / kUnit) + 2 * std::abs(s)};
}

// t of key j in log2 units. Overflows of float32 saturate; a NaN stays one.
Score score(const KeyValues& kv, const Query& query, int64_t j) {
  const auto n = static_cast<size_t>(j - kv.k.first);
  double product = dot(query.q.data(), kv.k.token(j), kv.k.stride) * kv.k_scale[n];
  if (std::abs(product) > kFloatMax) product = std::copysign(kInf, product);
  const double raw = product * query.factor;
  double s = std::clamp(raw, -kFloatMax, kFloatMax);
  const bool saturates = std::abs(raw) > kFloatMax * (1 + 8 * kUnit);
  double error = saturates ? 0 : 6 * std::abs(s);
  if (!kv.k_norm.empty()) {
    error += static_cast<double>(kv.k.head_dim + 2) * query.norm * kv.k_norm[n] *
             std::abs(kv.k_scale[n] * query.factor);
  }
  const RowChanges& changes = query.changes;
  if (changes.softcap != 0) std::tie(s, error) = capped(changes, s, error);

  const double log2_r = std::log2(kv.r[n]);
  double t = s + log2_r;
  if (log2_r != 0) error += 1.45 + 2 * std::abs(log2_r) + std::abs(t);

  const double added = changes.mask_at(j) * std::numbers::log2e;
  const double slanted = changes.slope * changes.distance_at(j) * std::numbers::log2e;
  if (added != 0 || slanted != 0) {
    t = std::clamp(t + added - slanted, -kFloatMax, kFloatMax);
    error += 4 * (std::abs(added) + std::abs(slanted)) + std::abs(t);
  }
  return {t, kUnit * error};
}

// A maximum and the interval of a kernel's.
struct Max {
  double value = -kInf, lower = -kInf, upper = -kInf;
};

Max larger(const Max& x, const Max& y) {
  return {std::max(x.value, y.value), std::max(x.lower, y.lower), std::max(x.upper, y.upper)};
}

// Factor that brings what is relative to `from` to what is relative to larger(from, other); 1 where
// nothing needs to be brought anywhere.
struct Rescale {
  double factor = 1;
  Interval kernel = {1, 1};
  Rescale() = default;
  Rescale(const Max& from, const Max& other)
      : factor(std::exp2(from.value - std::max(from.value, other.value))),
        kernel(exp2_interval(1, other.lower - from.upper, other.upper - from.lower)) {}
  [[nodiscard]] double error() const { return kernel.error(factor); }
};

// A sum and the distance of a kernel's from it.
struct Sum {
  double value = 0, error = 0;
};

Sum online_step(const Rescale& a, const Sum& old, const Rescale& b, const Sum& added) {
  const double old_error = a.kernel.upper * old.error + a.error() * std::abs(old.value);
  const double added_error = b.kernel.upper * added.error + b.error() * std::abs(added.value);
  const double old_part = a.factor * old.value, added_part = b.factor * added.value;
  const double rounded = std::abs(old_part) + old_error + std::abs(added_part) + added_error;
  return {old_part + added_part, old_error + added_error + 4 * rounding(rounded)};
}

void add_scaled_abs(std::vector<double>& sum, double weight, const float* v) {
  for (size_t d = 0; d < sum.size(); ++d) sum[d] += weight * std::abs(v[d]);
}

}  // namespace

double emulate_row(const Arithmetic& arithmetic, const KeyValues& kv, const Query& query,
                   KeyRange keys, RowScratch& scratch, double* out, double* bound) {
  const int64_t head_dim = kv.v.head_dim;
  const int64_t kv_block = arithmetic.kv_block;
  const double range = arithmetic.p_range;
  const bool want_bound = bound != nullptr;
  std::vector<Sum> numerator(static_cast<size_t>(head_dim));  // O
  Sum denominator;                                            // l
  double weights = 0;  // the denominator before rounding, over R
  Max running;

  for (int64_t begin = keys.first / kv_block * kv_block; begin < keys.last; begin += kv_block) {
    const int64_t first = std::max(begin, keys.first);
    const int64_t last = std::min(begin + kv_block, keys.last);
    const auto n = static_cast<size_t>(last - first);
    scratch.t.resize(n);
    scratch.t_error.resize(n);
    Max block;
    double second_upper = -kInf;  // of t + error; block.upper is the largest
    bool hides_one = false;
    for (size_t u = 0; u < n; ++u) {
      if (query.changes.hides(first + static_cast<int64_t>(u))) {
        hides_one = true;
        scratch.t[u] = -kInf;
        scratch.t_error[u] = 0;
        continue;
      }
      const auto [t, error] = score(kv, query, first + static_cast<int64_t>(u));
      if (std::isnan(t)) {
        std::fill_n(out, head_dim, t);
        if (want_bound) std::fill_n(bound, head_dim, t);
        return t;
      }
      scratch.t[u] = t;
      scratch.t_error[u] = error;
      second_upper = std::max(second_upper, std::min(block.upper, t + error));
      block = larger(block, {t, t - error, t + error});
    }
    if (block.value == -kInf) continue;  // attn_mask hides all of it
    const Max updated = larger(running, block);
    const Max& reference = arithmetic.local_max ? block : updated;

    scratch.sum.assign(static_cast<size_t>(kv.v.stride), 0.0);
    scratch.sum_error.assign(static_cast<size_t>(kv.v.stride), 0.0);
    Sum block_denominator;
    Sum residual;
    double residual_magnitude = 0;
    double block_weights = 0;
    for (size_t u = 0; u < n; ++u) {
      const int64_t j = first + static_cast<int64_t>(u);
      const double t = scratch.t[u], t_error = scratch.t_error[u];
      if (query.changes.hides(j)) continue;
      const double r = kv.r[static_cast<size_t>(j - kv.k.first)];
      const double w = range * std::exp2(t - reference.value);
      const double code = round_p(arithmetic.p_format, w);
      if (code != 0) add_scaled(scratch.sum.data(), code, kv.v.token(j), kv.v.stride);
      block_weights += w / range / r;
      residual.value += w - code;
      residual_magnitude += std::abs(w - code);
      const bool sums_code = arithmetic.sums_code(r);
      block_denominator.value += (sums_code ? code : w) / r;
      if (!want_bound) continue;

      double others = t + t_error == block.upper ? second_upper : block.upper;
      if (!arithmetic.local_max) others = std::max(others, running.upper);
      const Interval kernel =
          exp2_interval(range, reference.lower - t - t_error, others - t + t_error);
      const double flip = Interval{round_p(arithmetic.p_format, kernel.lower),
                                   round_p(arithmetic.p_format, std::min(kernel.upper, range))}
                              .error(code);
      block_denominator.error += (sums_code ? flip : kernel.error(w)) / r;
      residual.error += kernel.error(w) + flip;
      if (flip != 0) add_scaled_abs(scratch.sum_error, flip, kv.v.token(j));
      if (!arithmetic.integer()) {
        add_scaled_abs(scratch.sum_error, static_cast<double>(n + 2) * kUnit * code, kv.v.token(j));
      }
    }
    block_denominator.error += static_cast<double>(n + 5) * kUnit * block_denominator.value;
    residual.error += static_cast<double>(n + 20) * kUnit * residual_magnitude;
    // A row that does not see the whole block must not learn its mean.
    if (!arithmetic.residual_mean || hides_one ||
        !kv.holds_whole_block(begin, kv_block, {first, last})) {
      residual = {};
    }

    const Rescale a(running, block);
    const Rescale b = arithmetic.local_max ? Rescale(block, running) : Rescale();
    weights = a.factor * weights + b.factor * block_weights;
    denominator = online_step(a, denominator, b, block_denominator);
    for (int64_t d = 0; d < head_dim; ++d) {
      const auto at = static_cast<size_t>(begin / kv_block * head_dim + d);
      const double mean = arithmetic.residual_mean ? kv.v_mean[at] : 0.0;
      const Sum sum = {scratch.sum[static_cast<size_t>(d)] + residual.value * mean,
                       scratch.sum_error[static_cast<size_t>(d)] + residual.error * std::abs(mean)};
      Sum& total = numerator[static_cast<size_t>(d)];
      total = online_step(a, total, b, {kv.v_scale[at] * sum.value, kv.v_scale[at] * sum.error});
    }
    running = updated;
  }

  const double sink = query.changes.sink * std::numbers::log2e;
  const double over = sink - running.value;
  if (running.value == -kInf || over > 900) {  // nothing, or beside the sink nothing, counts
    for (int64_t d = 0; d < head_dim; ++d) {
      const double total = numerator[static_cast<size_t>(d)].value;
      out[d] = std::isnan(total) ? total : 0;  // but for a NaN
      if (want_bound) bound[d] = std::isnan(total) ? total : 0x1p-149;
    }
    return sink;
  }
  if (sink != -kInf) {
    const double weight = std::exp2(over);
    weights += weight;
    denominator.value += range * weight;
    denominator.error += range * weight * kUnit *
                         (8 + 4 * std::abs(query.changes.sink) + 2 * std::abs(running.value));
    denominator.error += range * weight * (running.upper - running.lower);
  }

  for (int64_t d = 0; d < head_dim; ++d) {
    const Sum& total = numerator[static_cast<size_t>(d)];
    out[d] = total.value / denominator.value;
    if (!want_bound) continue;
    const double least_l = denominator.value - denominator.error;
    const double moved = total.error + std::abs(out[d]) * denominator.error;
    bound[d] = least_l > 0 ? moved / least_l + 6 * rounding(std::abs(out[d])) : kInf;
    if (over > 100) bound[d] += std::abs(out[d]);  // the sink may overflow float32: 0 then
  }
  return std::log2(weights) + running.value;
}

}  // namespace attn8::reference
