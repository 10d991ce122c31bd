// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "recipes.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numbers>
#include <vector>

namespace attn8::app {
namespace {

// What the recipes of a language model's shape do differently from each other.
struct Profile {
  enum class Kind : uint8_t { kNormal, kUniform, kLanguageModel } kind = Kind::kLanguageModel;
  double q_factor = 1;
  bool sink = false;
  double sink_v = 0.05;  ///< factor of the V of the sinks
  double sink_nats = 8;  ///< logit of the sinks above the mean of the row maxima
};

constexpr std::array kRecipes = {
    Recipe{"normal", "q, k, v of N(0, 1)"},
    Recipe{"uniform", "q, k, v uniform in [-0.5, 0.5)"},
    Recipe{"llm",
           "like a language model's: K with channels of large mean, correlated tokens, "
           "uneven V"},
    Recipe{"sink", "llm with an attention sink: 4 tokens, 8 nats above the row maxima, V x0.05"},
    Recipe{"sink_v1", "sink with V x1"},
    Recipe{"sink_v0.3", "sink with V x0.3"},
    Recipe{"sink_v0.01", "sink with V x0.01"},
    Recipe{"sink_4nats", "sink only 4 nats above the row maxima"},
    Recipe{"peaky", "llm with q x4"},
};
constexpr std::array<Profile, kRecipes.size()> kProfiles = {
    Profile{.kind = Profile::Kind::kNormal},
    Profile{.kind = Profile::Kind::kUniform},
    Profile{},
    Profile{.sink = true},
    Profile{.sink = true, .sink_v = 1},
    Profile{.sink = true, .sink_v = 0.3},
    Profile{.sink = true, .sink_v = 0.01},
    Profile{.sink = true, .sink_nats = 4},
    Profile{.q_factor = 4},
};

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014): the
// counter times its odd increment, finalized.
constexpr uint64_t kIncrement = 0x9E3779B97F4A7C15;
constexpr uint64_t finalize(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// Streams of one head. Each number of a stream is found without those before it.
enum class Stream : uint64_t { kQ, kK, kV, kKWalk, kVWalk, kChannels, kOutliers, kProbes };

class Random {
 public:
  Random(uint64_t seed, uint64_t batch, uint64_t head, Stream stream)
      : key_(finalize(finalize(finalize(seed + kIncrement) + batch * kIncrement) +
                      (head * 16 + static_cast<uint64_t>(stream)) * kIncrement)) {}

  // Number i of row `row`: 64 random bits.
  [[nodiscard]] uint64_t bits(uint64_t row, uint64_t i) const {
    return finalize(finalize(key_ + row * kIncrement) + (i + 1) * kIncrement);
  }
  [[nodiscard]] double uniform(uint64_t row, uint64_t i) const {
    return static_cast<double>(bits(row, i) >> 11) * 0x1p-53;
  }
  // N(0, 1), one per element of `row_values`.
  void normal(uint64_t row, std::span<double> row_values) const;

 private:
  uint64_t key_;
};

// ln x for a positive normal x: x = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh(z) with
// z = (m - 1) / (m + 1), |z| < 0.172. The first term left out is 2 z^17 / 17 < 2e-14.
double natural_log(double x) {
  constexpr uint64_t kSqrtHalf = 0x3FE6A09E667F3BCD;
  const auto bits = std::bit_cast<uint64_t>(x);
  const auto exponent = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  const auto m = std::bit_cast<double>(bits - (static_cast<uint64_t>(exponent) << 52));
  const double z = (m - 1) / (m + 1), z2 = z * z;
  double series = 1.0 / 15;
  for (const double divisor : {13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0}) {
    series = series * z2 + 1 / divisor;
  }
  return 2 * z * series + static_cast<double>(exponent) * std::numbers::ln2;
}

struct Point {
  double x, y;
};

// The point of the unit circle at `turn` 2^-32 turns. Taylor series on an eighth of a turn to each
// side of the quarter's middle; the first term left out of the sine is x^15 / 15! < 3e-14.
Point on_circle(uint32_t turn) {
  const uint32_t quarter = (turn + (1U << 29)) >> 30;
  const auto offset = static_cast<int32_t>(turn - (quarter << 30));
  const double x = static_cast<double>(offset) * (std::numbers::pi * 0x1p-31);
  const double x2 = x * x;
  double sine = 1, cosine = 1;
  for (const double n : {13.0, 11.0, 9.0, 7.0, 5.0, 3.0}) sine = 1 - sine * x2 / (n * (n - 1));
  for (const double n : {14.0, 12.0, 10.0, 8.0, 6.0, 4.0, 2.0}) {
    cosine = 1 - cosine * x2 / (n * (n - 1));
  }
  sine *= x;
  switch (quarter & 3) {
    case 0:
      return {cosine, sine};
    case 1:
      return {-sine, cosine};
    case 2:
      return {-cosine, -sine};
    default:
      return {sine, -cosine};
  }
}

// Box-Muller: 64 random bits give a radius and an angle, so two numbers.
void Random::normal(uint64_t row, std::span<double> row_values) const {
  for (size_t i = 0; i < row_values.size(); i += 2) {
    const uint64_t random = bits(row, i / 2);
    const double u = (static_cast<double>(random >> 32) + 0.5) * 0x1p-32;
    const double radius = std::sqrt(-2 * natural_log(u));
    const Point point = on_circle(static_cast<uint32_t>(random));
    row_values[i] = radius * point.x;
    if (i + 1 < row_values.size()) row_values[i + 1] = radius * point.y;
  }
}

// x to the nearest value of binary16, ties to even, for |x| below its largest.
float through_float16(float x) {
  if (std::abs(x) < 0x1p-14F) return std::copysign(std::abs(x) + 0.5F - 0.5F, x);
  const auto bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((bits + 0xFFFU + ((bits >> 13) & 1U)) & ~0x1FFFU);
}

// Rows of one head inside a dense [batch, seq, head, dim] tensor.
class Head {
 public:
  Head(std::span<float> tensor, int64_t batch, int64_t head, int64_t seqlen, int64_t nheads,
       int64_t head_dim, bool round_to_float16)
      : data_(tensor.empty() ? nullptr
                             : tensor.data() + (batch * seqlen * nheads + head) * head_dim),
        stride_(nheads * head_dim),
        seqlen_(tensor.empty() ? 0 : seqlen),
        round_(round_to_float16) {}

  [[nodiscard]] int64_t seqlen() const { return seqlen_; }
  void store(int64_t row, std::span<const double> values) const {
    float* out = data_ + row * stride_;
    for (size_t d = 0; d < values.size(); ++d) {
      const auto x = static_cast<float>(values[d]);
      out[d] = round_ ? through_float16(x) : x;
    }
  }

 private:
  float* data_;
  int64_t stride_, seqlen_;
  bool round_;
};

void fill_plain(const Profile& profile, const Random& random, int64_t head_dim, const Head& head) {
  std::vector<double> row(static_cast<size_t>(head_dim));
  for (int64_t i = 0; i < head.seqlen(); ++i) {
    const auto n = static_cast<uint64_t>(i);
    if (profile.kind == Profile::Kind::kUniform) {
      for (size_t d = 0; d < row.size(); ++d) row[d] = random.uniform(n, d) - 0.5;
    } else {
      random.normal(n, row);
    }
    head.store(i, row);
  }
}

// First-order autoregressive process of unit variance over the tokens of each channel.
class Walk {
 public:
  Walk(const Random& random, int64_t head_dim)
      : random_(random),
        step_(static_cast<size_t>(head_dim)),
        state_(static_cast<size_t>(head_dim)) {}

  // Tokens in order from 0 on.
  std::span<const double> next() {
    constexpr double kCorrelation = 0.9;
    const double innovation = std::sqrt(1 - kCorrelation * kCorrelation);
    random_.normal(row_, step_);
    for (size_t d = 0; d < state_.size(); ++d) {
      state_[d] = row_ == 0 ? step_[d] : kCorrelation * state_[d] + innovation * step_[d];
    }
    ++row_;
    return state_;
  }

 private:
  const Random& random_;
  uint64_t row_ = 0;
  std::vector<double> step_, state_;
};

// One kv head of the recipes shaped like a language model, with the query heads that read it.
class LanguageModelHead {
 public:
  LanguageModelHead(const Profile& profile, uint64_t seed, int64_t batch, int64_t head,
                    int64_t head_dim)
      : profile_(profile),
        seed_(seed),
        batch_(static_cast<uint64_t>(batch)),
        head_(static_cast<uint64_t>(head)),
        q_mean_(static_cast<size_t>(head_dim)),
        k_bias_(q_mean_.size()),
        v_mean_(q_mean_.size()),
        v_factor_(q_mean_.size()) {
    const Random random = stream(Stream::kChannels);
    random.normal(0, q_mean_);
    for (double& x : q_mean_) x *= 0.8 * profile.q_factor;
    random.normal(1, v_mean_);
    for (double& x : v_mean_) x *= 0.3;
    for (size_t d = 0; d < v_factor_.size(); ++d) v_factor_[d] = 0.6 + 0.8 * random.uniform(2, d);
    // Six channels with a mean of +-10 x [0.7, 1.3), as far as there are that many.
    const size_t biased = std::min<size_t>(6, k_bias_.size());
    for (uint64_t n = 0, chosen = 0; chosen < biased; ++n) {
      const uint64_t bits = random.bits(3, n);
      double& bias = k_bias_[static_cast<size_t>((bits >> 1) % k_bias_.size())];
      if (bias != 0) continue;
      bias = (bits & 1 ? 10 : -10) * (0.7 + 0.6 * random.uniform(4, n));
      ++chosen;
    }
  }

  void fill_q(uint64_t q_head, const Head& out) const {
    const Random random(seed_, batch_, q_head, Stream::kQ);
    std::vector<double> row(q_mean_.size());
    for (int64_t i = 0; i < out.seqlen(); ++i) {
      query(random, static_cast<uint64_t>(i), row);
      out.store(i, row);
    }
  }

  void fill_k(const Head& out) const {
    const Random noise = stream(Stream::kK), steps = stream(Stream::kKWalk);
    Walk walk(steps, static_cast<int64_t>(k_bias_.size()));
    std::vector<double> row(k_bias_.size());
    const std::vector<std::vector<double>> probes = probe_queries();
    std::vector<double> row_max(probes.size(), -1e300);
    std::vector<std::vector<double>> first_keys;
    for (int64_t j = 0; j < out.seqlen(); ++j) {
      noise.normal(static_cast<uint64_t>(j), row);
      const std::span<const double> state = walk.next();
      for (size_t d = 0; d < row.size(); ++d) row[d] = 0.7 * row[d] + 0.7 * state[d] + k_bias_[d];
      out.store(j, row);
      if (profile_.sink) raise_maxima(probes, row, row_max);
      if (profile_.sink && j < kSinks) first_keys.push_back(row);
    }
    if (profile_.sink) store_sinks(row_max, first_keys, out);
  }

  void fill_v(const Head& out) const {
    const Random noise = stream(Stream::kV), steps = stream(Stream::kVWalk);
    const Random outliers = stream(Stream::kOutliers);
    Walk walk(steps, static_cast<int64_t>(v_mean_.size()));
    std::vector<double> row(v_mean_.size());
    for (int64_t j = 0; j < out.seqlen(); ++j) {
      noise.normal(static_cast<uint64_t>(j), row);
      const std::span<const double> state = walk.next();
      double token_factor = outliers.uniform(static_cast<uint64_t>(j), 0) < 0.005 ? 6 : 1;
      if (profile_.sink && j < kSinks) token_factor = profile_.sink_v;
      for (size_t d = 0; d < row.size(); ++d) {
        row[d] = (0.5 * row[d] + 0.5 * state[d] + v_mean_[d]) * v_factor_[d] * token_factor;
      }
      out.store(j, row);
    }
  }

 private:
  static constexpr int64_t kSinks = 4;
  static constexpr uint64_t kProbes = 16;  // rows that stand for all when the sinks are placed

  [[nodiscard]] Random stream(Stream stream) const { return {seed_, batch_, head_, stream}; }

  void query(const Random& random, uint64_t i, std::span<double> row) const {
    random.normal(i, row);
    for (size_t d = 0; d < row.size(); ++d) {
      row[d] = 1.6 * profile_.q_factor * row[d] + q_mean_[d];
    }
  }

  [[nodiscard]] std::vector<std::vector<double>> probe_queries() const {
    std::vector<std::vector<double>> probes;
    if (!profile_.sink) return probes;
    const Random random = stream(Stream::kProbes);
    for (uint64_t i = 0; i < kProbes; ++i) {
      probes.emplace_back(q_mean_.size());
      query(random, i, probes.back());
    }
    return probes;
  }

  static void raise_maxima(const std::vector<std::vector<double>>& probes,
                           std::span<const double> k, std::vector<double>& row_max) {
    for (size_t i = 0; i < probes.size(); ++i) {
      // Four sums: one would be a chain of additions.
      std::array<double, 4> sum = {};
      for (size_t d = 0; d < k.size(); ++d) sum[d % 4] += probes[i][d] * k[d];
      row_max[i] = std::max(row_max[i], (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }

  // Moves the first keys along the mean query until the mean over rows of their logit is what is
  // wanted.
  void store_sinks(const std::vector<double>& row_max, std::vector<std::vector<double>>& keys,
                   const Head& out) const {
    double mean_max = 0, norm2 = 0;
    for (const double x : row_max) mean_max += x / static_cast<double>(row_max.size());
    for (const double x : q_mean_) norm2 += x * x;
    const double root_dim = std::sqrt(static_cast<double>(q_mean_.size()));
    const double wanted = mean_max + profile_.sink_nats * root_dim;  // before softmax_scale
    for (size_t j = 0; j < keys.size(); ++j) {
      double score = 0;
      for (size_t d = 0; d < q_mean_.size(); ++d) score += q_mean_[d] * keys[j][d];
      for (size_t d = 0; d < q_mean_.size(); ++d) {
        keys[j][d] += (wanted - score) * q_mean_[d] / norm2;
      }
      out.store(static_cast<int64_t>(j), keys[j]);
    }
  }

  const Profile& profile_;
  uint64_t seed_, batch_, head_;
  std::vector<double> q_mean_, k_bias_, v_mean_, v_factor_;  // [head_dim]
};

}  // namespace

std::span<const Recipe> recipes() noexcept { return kRecipes; }

const Recipe* find_recipe(std::string_view name) noexcept {
  const auto* found = std::find_if(kRecipes.begin(), kRecipes.end(),
                                   [name](const Recipe& recipe) { return recipe.name == name; });
  return found == kRecipes.end() ? nullptr : found;
}

void fill(const Recipe& recipe, uint64_t seed, const RecipeShape& shape, std::span<float> q,
          std::span<float> k, std::span<float> v, bool round_to_float16) {
  const auto index = static_cast<size_t>(
      std::find_if(kRecipes.begin(), kRecipes.end(),
                   [&](const Recipe& other) { return other.name == recipe.name; }) -
      kRecipes.begin());
  if (index == kRecipes.size()) return;
  const Profile& profile = kProfiles[index];
  const int64_t group = shape.nheads_q / shape.nheads_k;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const auto head_of = [&](std::span<float> tensor, int64_t head, int64_t seqlen, int64_t heads) {
      return Head(tensor, b, head, seqlen, heads, shape.head_dim, round_to_float16);
    };
    for (int64_t h = 0; h < shape.nheads_k; ++h) {
      const Head k_head = head_of(k, h, shape.seqlen_k, shape.nheads_k);
      const Head v_head = head_of(v, h, shape.seqlen_k, shape.nheads_k);
      const auto plain = [&](Stream stream, int64_t head, const Head& out) {
        fill_plain(profile,
                   Random(seed, static_cast<uint64_t>(b), static_cast<uint64_t>(head), stream),
                   shape.head_dim, out);
      };
      if (profile.kind == Profile::Kind::kLanguageModel) {
        const LanguageModelHead model(profile, seed, b, h, shape.head_dim);
        model.fill_k(k_head);
        model.fill_v(v_head);
        for (int64_t hq = h * group; hq < (h + 1) * group; ++hq) {
          model.fill_q(static_cast<uint64_t>(hq), head_of(q, hq, shape.seqlen_q, shape.nheads_q));
        }
        continue;
      }
      plain(Stream::kK, h, k_head);
      plain(Stream::kV, h, v_head);
      for (int64_t hq = h * group; hq < (h + 1) * group; ++hq) {
        plain(Stream::kQ, hq, head_of(q, hq, shape.seqlen_q, shape.nheads_q));
      }
    }
  }
}

}  // namespace attn8::app
