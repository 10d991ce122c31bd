// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "recipes.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace attn8::app {
namespace {

struct Qkv {
  std::vector<float> q, k, v;
};

Qkv make(const std::string& name, const RecipeShape& shape, uint64_t seed = 1, bool half = false) {
  const auto size = [&](int64_t seqlen, int64_t heads) {
    return static_cast<size_t>(shape.batch * seqlen * heads * shape.head_dim);
  };
  Qkv qkv = {std::vector<float>(size(shape.seqlen_q, shape.nheads_q)),
             std::vector<float>(size(shape.seqlen_k, shape.nheads_k)),
             std::vector<float>(size(shape.seqlen_k, shape.nheads_k))};
  const Recipe* recipe = find_recipe(name);
  EXPECT_NE(recipe, nullptr) << name;
  if (recipe != nullptr) fill(*recipe, seed, shape, qkv.q, qkv.k, qkv.v, half);
  return qkv;
}

// Mean, variance and fourth moment.
struct Moments {
  double mean = 0, variance = 0, fourth = 0;
};
Moments moments(const std::vector<float>& x) {
  Moments m;
  const auto n = static_cast<double>(x.size());
  for (const float value : x) m.mean += value / n;
  for (const float value : x) {
    const double centred = value - m.mean;
    m.variance += centred * centred / n;
    m.fourth += centred * centred * centred * centred / n;
  }
  return m;
}

TEST(Recipes, NamesAreUniqueAndFound) {
  std::set<std::string> names;
  for (const Recipe& recipe : recipes()) {
    EXPECT_TRUE(names.insert(std::string(recipe.name)).second) << recipe.name;
    EXPECT_EQ(find_recipe(recipe.name), &recipe);
    EXPECT_FALSE(recipe.description.empty());
  }
  for (const char* name : {"normal", "uniform", "llm", "sink", "peaky"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
  EXPECT_EQ(find_recipe("gaussian"), nullptr);
}

TEST(Recipes, NormalHasTheMomentsOfN01) {
  const Qkv qkv = make("normal", {1, 2000, 2000, 1, 1, 64});
  for (const auto* x : {&qkv.q, &qkv.k, &qkv.v}) {
    // 128000 numbers: standard errors 0.0028, 0.004 and 0.027.
    const Moments m = moments(*x);
    EXPECT_NEAR(m.mean, 0, 0.012);
    EXPECT_NEAR(m.variance, 1, 0.016);
    EXPECT_NEAR(m.fourth, 3, 0.12);
  }
  double product = 0;
  for (size_t i = 0; i < qkv.q.size(); ++i) product += qkv.q[i] * qkv.k[i];
  EXPECT_NEAR(product / static_cast<double>(qkv.q.size()), 0, 0.012);
  // P(|x| > 3) = 0.0027: 346 +- 19 of 128000.
  const auto beyond =
      std::count_if(qkv.q.begin(), qkv.q.end(), [](float value) { return std::abs(value) > 3; });
  EXPECT_NEAR(static_cast<double>(beyond), 346, 80);
}

TEST(Recipes, UniformFillsItsInterval) {
  const Qkv qkv = make("uniform", {1, 1000, 1000, 1, 1, 64});
  const Moments m = moments(qkv.v);
  EXPECT_NEAR(m.mean, 0, 0.005);
  EXPECT_NEAR(m.variance, 1.0 / 12, 0.002);
  const auto [low, high] = std::minmax_element(qkv.v.begin(), qkv.v.end());
  EXPECT_GE(*low, -0.5F);
  EXPECT_LE(*high, 0.5F);
  EXPECT_LT(*low, -0.499F);
  EXPECT_GT(*high, 0.499F);
}

// The same seed gives these bits everywhere: only correctly rounded operations take part.
TEST(Recipes, BitsAreTheSameOnEveryPlatform) {
  const auto hash = [](const Qkv& qkv) {
    uint64_t state = 0xCBF29CE484222325;  // FNV-1a over the words
    for (const auto* x : {&qkv.q, &qkv.k, &qkv.v}) {
      for (const float value : *x) {
        state = (state ^ std::bit_cast<uint32_t>(value)) * 0x100000001B3;
      }
    }
    return state;
  };
  const RecipeShape shape = {2, 5, 40, 4, 2, 24};
  EXPECT_EQ(hash(make("normal", shape)), UINT64_C(4374355172904142882));
  EXPECT_EQ(hash(make("uniform", shape)), UINT64_C(6497756337756641200));
  EXPECT_EQ(hash(make("sink", shape)), UINT64_C(8125554359777581719));
  EXPECT_NE(hash(make("normal", shape, 2)), hash(make("normal", shape, 1)));
}

TEST(Recipes, RowsDoNotDependOnTheLengths) {
  for (const Recipe& recipe : recipes()) {
    const std::string name(recipe.name);
    const Qkv small = make(name, {1, 3, 20, 1, 1, 16});
    const Qkv large = make(name, {1, 9, 31, 1, 1, 16});
    const bool sink = name.starts_with("sink");
    EXPECT_TRUE(std::equal(small.q.begin(), small.q.end(), large.q.begin())) << name;
    EXPECT_TRUE(std::equal(small.v.begin(), small.v.end(), large.v.begin())) << name;
    const auto first = sink ? 4 * 16 : 0;  // the sinks are placed above the row maxima
    EXPECT_TRUE(std::equal(small.k.begin() + first, small.k.end(), large.k.begin() + first))
        << name;
  }
}

TEST(Recipes, HeadsDoNotDependOnHowManyThereAre) {
  const Qkv one = make("llm", {1, 4, 6, 2, 1, 8});
  const Qkv many = make("llm", {2, 4, 6, 4, 2, 8});
  for (size_t s = 0; s < 6; ++s) {
    for (size_t d = 0; d < 8; ++d) {
      EXPECT_EQ(one.k[s * 8 + d], many.k[s * 16 + d]);
      EXPECT_NE(one.k[s * 8 + d], many.k[s * 16 + 8 + d]);    // the other head
      EXPECT_NE(one.k[s * 8 + d], many.k[(6 + s) * 16 + d]);  // the other batch entry
      if (s < 4) {
        EXPECT_EQ(one.q[s * 16 + d], many.q[s * 32 + d]);
      }
    }
  }
}

TEST(Recipes, AnEmptySpanIsNotFilled) {
  const RecipeShape shape = {1, 2, 8, 1, 1, 4};
  const Qkv whole = make("sink", shape);
  std::vector<float> v(whole.v.size());
  fill(*find_recipe("sink"), 1, shape, {}, {}, v);
  EXPECT_EQ(v, whole.v);
}

TEST(Recipes, LanguageModelKHasSixChannelsOfLargeMean) {
  const int64_t seqlen = 500, dim = 64;
  const Qkv qkv = make("llm", {1, 1, seqlen, 1, 1, dim});
  int large = 0;
  for (int64_t d = 0; d < dim; ++d) {
    double mean = 0;
    for (int64_t j = 0; j < seqlen; ++j) mean += qkv.k[static_cast<size_t>(j * dim + d)] / 500.0;
    if (std::abs(mean) > 5) ++large;
    EXPECT_LT(std::abs(mean), 14);
  }
  EXPECT_EQ(large, 6);
}

TEST(Recipes, SinksStandAboveTheRowMaxima) {
  const int64_t seqlen_q = 200, seqlen_k = 2000;
  const size_t dim = 64;
  for (const auto& [name, nats, v_factor] :
       {std::tuple("sink", 8.0, 0.05), std::tuple("sink_4nats", 4.0, 0.05),
        std::tuple("sink_v0.3", 8.0, 0.3)}) {
    const Qkv qkv = make(name, {1, seqlen_q, seqlen_k, 1, 1, static_cast<int64_t>(dim)});
    const Qkv plain = make("llm", {1, 0, seqlen_k, 1, 1, static_cast<int64_t>(dim)});
    double above = 0;
    for (size_t i = 0; i < 200; ++i) {
      double sink = 0, max = -1e30;
      for (size_t j = 0; j < 2000; ++j) {
        double s = 0;
        for (size_t d = 0; d < dim; ++d) s += qkv.q[i * dim + d] * qkv.k[j * dim + d];
        s /= 8;  // sqrt(dim)
        if (j < 4) {
          sink += s / 4;
        } else {
          max = std::max(max, s);
        }
      }
      above += (sink - max) / 200;
    }
    // The position is set by 16 other rows whose logits spread by a few nats.
    EXPECT_NEAR(above, nats, 2.5) << name;
    for (size_t d = 0; d < 4 * dim; ++d) {
      const auto factor = static_cast<double>(qkv.v[d]) / static_cast<double>(plain.v[d]);
      ASSERT_TRUE(std::abs(factor - v_factor) < 1e-4 || std::abs(factor - v_factor / 6) < 1e-4);
    }
    EXPECT_EQ(qkv.v[5 * dim], plain.v[5 * dim]);
  }
}

TEST(Recipes, RoundingToFloat16) {
  const Qkv plain = make("llm", {1, 4, 300, 1, 1, 64});
  const Qkv rounded = make("llm", {1, 4, 300, 1, 1, 64}, 1, true);
  int moved = 0;
  for (size_t i = 0; i < plain.k.size(); ++i) {
    const float x = plain.k[i], y = rounded.k[i];
    if (x != y) ++moved;
    // Half a unit of 11 bits, or of 2^-24 below the smallest normal number.
    ASSERT_LE(std::abs(x - y), std::max(std::abs(x) * 0x1p-11F, 0x1p-25F));
    ASSERT_EQ(std::nearbyint(y * 0x1p24F), y * 0x1p24F);
    if (std::abs(y) >= 0x1p-14F) {
      ASSERT_EQ(std::bit_cast<uint32_t>(y) & 0x1FFFU, 0U);
    }
  }
  EXPECT_GT(moved, 1000);
}

}  // namespace
}  // namespace attn8::app
