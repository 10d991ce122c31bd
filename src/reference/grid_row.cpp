// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// A row of `accurate` on the score grid
// -------------------------------------
// T is a float32 chain of three operations that leaves a kernel no choice, and from it the weights,
// the codes and the sums S, L and R of a block are integers: a kernel has the same ones. F, mu_d
// and every power of two are the same numbers too. What a kernel rounds and this file does not:
// (u = 2^-24; kTiny = 2^-149 is what float32 cannot hold near zero, in the unit of O, v_ref)
//
//   bv: v_block / v_ref, beta times it               2 u and kTiny (beta + 1), times |x|
//   x_d: S beyond 2^24, the multiply-add             u |S| + u |x|
//   x_d of block_channel: the two of bv, here        2 u |x| and kTiny (beta + 1) |x|
//   O: the multiply-add                              u of the new value
//   l: L to float32, the multiply-add                u beta L + u of the new value
//   result: a division, or a product with the reciprocal; the scale    3 u and kTiny
//
// A kernel may cut the blocks of a row into parts, each with its own O, l and reference, and add
// them up. A term then goes through at most one addition more than here: sums count with the
// magnitudes of their terms, of which no part has more, and once more in the end. The parts'
// references may put other blocks out of reach: at most kReach of the largest, each.
//
// Errors of O and l move with the reference as the values do. With E for an error,
//     |out' - out| <= (E_O 2^15 + |out| E_l) / (l - E_l) + 4 u |out|.
// One u more than counted, here and in x, holds the terms in u^2.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <optional>

#include "reference/emulation_row.hpp"

namespace attn8::reference {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kTiny = 0x1p-149;
constexpr double kReach = 0x1p-100;               // smaller factors are 0
constexpr int64_t kOctave = 64;                   // steps of the grid
constexpr int64_t kHidden = -(int64_t{1} << 40);  // steps of a key that attn_mask hides
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Floor division by an octave.
int64_t octaves(int64_t steps) { return steps >> 6; }

// 2^exponent, 0 where it is too small to matter.
double power(int64_t exponent) {
  const double factor = std::exp2(static_cast<double>(exponent));
  return factor < kReach ? 0 : factor;
}

// 2^(steps / 64): the fraction of an octave rounded to float32.
double scale_of_steps(int64_t steps) {
  const int64_t whole = octaves(steps);
  const double fraction = static_cast<double>(steps - whole * kOctave) / kOctave;
  return static_cast<float>(std::exp2(fraction)) * power(whole);
}

// y: the weight of a key `distance` steps below the maximum, in units of 1 / (255 * 256).
int64_t weight_of(int64_t distance) {
  static const auto kWeights = [] {
    std::array<int64_t, kOctave> weights;
    for (size_t f = 0; f < weights.size(); ++f) {
      weights[f] = std::llround(65280 * std::exp2(-static_cast<double>(f) / kOctave));
    }
    return weights;
  }();
  constexpr int64_t kFirstZero = 16 * kOctave;
  if (distance >= kFirstZero) return 0;
  return kWeights[static_cast<size_t>(distance % kOctave)] >> octaves(distance);
}

// tanh(x ln 2 / 2) as the kernels' float32 operations give it: from 2^-|x| by a polynomial of
// degree 5 in the distance to the nearest integer.
float tanh_of_octaves(float x) {
  if (std::isnan(x)) return x;  // of a poisoned token
  constexpr std::array<float, 5> kCoefficients = {0x1.62e42ap-1F, 0x1.ebf9bcp-3F, 0x1.c6b752p-5F,
                                                  0x1.3cea88p-7F, 0x1.5bba12p-10F};
  const float exponent = std::max(-126.0F, -std::abs(x));
  const float whole = std::nearbyint(exponent);
  float power = kCoefficients[4];
  for (size_t i = 4; i-- > 0;) power = std::fma(power, exponent - whole, kCoefficients[i]);
  power = std::fma(power, exponent - whole, 1.0F);
  power = std::ldexp(power, static_cast<int>(whole));
  const float magnitude = (1 - power) / (1 + power);
  return x < 0 ? -magnitude : magnitude;
}

// What attn_mask and ALiBi add to a score, in steps.
float bias(const RowChanges& changes, int64_t j) {
  constexpr auto kUnit64 = static_cast<float>(64 * std::numbers::log2e);
  return std::fma(-(changes.slope * kUnit64), static_cast<float>(changes.distance_at(j)),
                  changes.mask_at(j) * kUnit64);
}

// T of key j; nothing where an operand is poisoned.
std::optional<int64_t> score(const KeyValues& kv, const Query& query, int64_t j) {
  constexpr float kLargest = 0x1p30F;
  const RowChanges& changes = query.changes;
  const auto n = static_cast<size_t>(j - kv.k.first);
  // An integer below 2^23, so exact.
  const auto product = static_cast<float>(dot(query.q.data(), kv.k.token(j), kv.k.stride));
  const float scaled = product * static_cast<float>(kv.k_scale[n]);
  float t = std::fma(scaled, query.grid_factor, kv.g[n]);
  if (changes.softcap != 0) {
    const auto mean =
        static_cast<float>(changes.mean_score * 2 * std::numbers::log2e / changes.softcap);
    const auto softcap = static_cast<float>(changes.softcap * 64 * std::numbers::log2e);
    t = std::fma(tanh_of_octaves(std::fma(scaled, query.grid_factor, mean)), softcap, kv.g[n]);
  }
  t += bias(changes, j);
  if (std::isnan(t)) return std::nullopt;
  return static_cast<int64_t>(std::nearbyint(std::clamp(t, -kLargest, kLargest)));
}

// A sum over blocks, and the distance of a kernel's from it.
struct Sum {
  double value = 0, error = 0;
  double magnitude = 0;   // of all that was added
  double unweighted = 0;  // the same without beta

  // By a power of two, or 0.
  void scale(double factor, double tiny) {
    value *= factor;
    magnitude *= factor;
    error = error * factor + (factor != 0 ? tiny : 0);
  }
  // beta * added, which may be `added_error` off, by a fused multiply-add in float32.
  void add(double beta, double added, double added_error, double tiny) {
    value += beta * added;
    magnitude += beta * std::abs(added);
    unweighted += std::abs(added);
    error += added_error + kUnit * magnitude + tiny;
  }
  // The distance once parts are put together; top is the largest beta.
  [[nodiscard]] double total_error(double top) const {
    return error + kUnit * magnitude + 2 * kReach * top * unweighted;
  }
};

}  // namespace

double emulate_grid_row(const Arithmetic& arithmetic, const KeyValues& kv, const Query& query,
                        KeyRange keys, RowScratch& scratch, double* out, double* bound) {
  constexpr double kWeightUnits = 0x1p15;  // of l, for one code of P
  constexpr int64_t kHeadroom = 60 * kOctave;
  const int64_t head_dim = kv.v.head_dim;
  const int64_t kv_block = arithmetic.kv_block;
  const double tiny = kTiny * kv.v_ref;
  std::vector<Sum> numerator(static_cast<size_t>(head_dim));  // O
  Sum denominator;                                            // l
  std::optional<int64_t> reference;
  double top = 0;  // the largest beta

  for (int64_t begin = keys.first / kv_block * kv_block; begin < keys.last; begin += kv_block) {
    const int64_t first = std::max(begin, keys.first);
    const int64_t last = std::min(begin + kv_block, keys.last);
    scratch.steps.clear();
    bool hides_one = false;
    for (int64_t j = first; j < last; ++j) {
      if (query.changes.hides(j)) {
        hides_one = true;
        scratch.steps.push_back(kHidden);
        continue;
      }
      const std::optional<int64_t> t = score(kv, query, j);
      if (!t) {
        std::fill_n(out, head_dim, kNan);
        if (bound != nullptr) std::fill_n(bound, head_dim, kNan);
        return kNan;
      }
      scratch.steps.push_back(*t);
    }
    const int64_t block_max = *std::max_element(scratch.steps.begin(), scratch.steps.end());
    if (block_max == kHidden) continue;

    // Below 2^39 per key: exact in 64 bits up to 2^24 keys per block.
    int64_t block_weight = 0;  // L
    int64_t residual = 0;      // R
    scratch.sum.assign(static_cast<size_t>(kv.v.stride), 0.0);
    for (int64_t j = first; j < last; ++j) {
      const int64_t y = weight_of(block_max - scratch.steps[static_cast<size_t>(j - first)]);
      const int64_t code = (y + 128) >> 8;
      block_weight += ((y + 1) >> 1) * kv.weight[static_cast<size_t>(j - kv.k.first)];
      residual += y - 256 * code;
      if (code != 0) {
        add_scaled(scratch.sum.data(), static_cast<double>(code), kv.v.token(j), kv.v.stride);
      }
    }
    if (!arithmetic.residual_mean || hides_one ||
        !kv.holds_whole_block(begin, kv_block, {first, last})) {
      residual = 0;
    }

    if (!reference) reference = octaves(block_max) * kOctave;
    if (block_max > *reference + kHeadroom) {
      const int64_t moved = octaves(block_max) * kOctave;
      const double factor = power(octaves(*reference - moved));
      for (Sum& sum : numerator) sum.scale(factor, tiny);
      denominator.scale(factor, 0);
      top *= factor;
      reference = moved;
    }
    const double beta = scale_of_steps(block_max - *reference);
    top = std::max(top, beta);
    const auto added_weight = static_cast<double>(block_weight);
    denominator.add(beta, added_weight, kUnit * beta * added_weight, 0);
    const double rho = static_cast<double>(residual) / 256;
    for (int64_t d = 0; d < head_dim; ++d) {
      const auto at = static_cast<size_t>(begin / kv_block * head_dim + d);
      const double sum = scratch.sum[static_cast<size_t>(d)];
      const double x = sum + rho * kv.v_mean[at];
      const double size = std::abs(x), scale = kv.v_scale[at];
      if (beta == 0 && !std::isfinite(scale)) continue;  // out of reach nothing poisons
      const double x_error = kUnit * (4 * size + (std::abs(sum) > 0x1p24 ? std::abs(sum) : 0));
      numerator[static_cast<size_t>(d)].add(
          beta, scale * x, beta * scale * x_error + tiny * (beta + 1) * size, tiny);
    }
  }

  const double sink = query.changes.sink * std::numbers::log2e;  // octaves
  if (!reference) {                                              // attn_mask hides every key
    std::fill_n(out, head_dim, 0.0);
    if (bound != nullptr) std::fill_n(bound, head_dim, 0.0);
    return sink;
  }
  const double over = sink - static_cast<double>(*reference) / kOctave;
  if (over > 900) {  // beside the sink nothing counts, but for a NaN
    for (int64_t d = 0; d < head_dim; ++d) {
      const bool poisoned = std::isnan(numerator[static_cast<size_t>(d)].value);
      out[d] = poisoned ? kNan : 0;
      if (bound != nullptr) bound[d] = poisoned ? kNan : kTiny + tiny;
    }
    return sink;
  }
  if (query.changes.sink != -std::numeric_limits<double>::infinity()) {
    // What a kernel rounds: the sink less what smoothing took, in nats, and the weight itself.
    const double weight = 255 * kWeightUnits * std::exp2(over);
    denominator.value += weight;
    denominator.error += weight * kUnit * (8 + 4 * std::abs(query.changes.sink));
  }

  for (int64_t d = 0; d < head_dim; ++d) {
    const Sum& total = numerator[static_cast<size_t>(d)];
    out[d] = total.value / (denominator.value / kWeightUnits);
    if (bound == nullptr) continue;
    const double size = std::abs(out[d]);
    const double l_error = denominator.total_error(top);
    const double moved = total.total_error(top) * kWeightUnits + size * l_error;
    bound[d] = moved / (denominator.value - l_error) + 4 * kUnit * size + tiny + kTiny;
    if (over > 100) bound[d] += size;  // the sink may overflow float32: 0 then
  }
  return std::log2(denominator.value / (255 * kWeightUnits)) +
         static_cast<double>(*reference) / kOctave;
}

}  // namespace attn8::reference
