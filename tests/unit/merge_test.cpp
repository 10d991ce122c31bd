// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Result of attention over one part of the keys.
struct Part {
  Tensor out, lse;
  [[nodiscard]] AttentionState state() const { return {out.view(), lse.view()}; }
};

std::vector<AttentionState> states_of(const std::vector<Part>& parts) {
  std::vector<AttentionState> states;
  for (const Part& part : parts) states.push_back(part.state());
  return states;
}

Extents lse_shape(const Extents& out) { return {out[0], out[1], out[2], 1}; }

void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

/// Merged into new dense tensors.
Part merged(const std::vector<Part>& parts, const Extents& shape, DType dtype = DType::kFloat32,
            const Context& context = {}) {
  Part result{Tensor(dtype, shape), Tensor(DType::kFloat32, lse_shape(shape))};
  expect_ok(merge_states(states_of(parts), {result.out.view(), result.lse.view()}, context));
  return result;
}

/// A part of normal values and LSEs with this spread; every fifth row from `empty_from` on is empty
/// and its out not a number that may be read.
Part random_part(const Extents& shape, uint64_t seed, DType dtype, Memory memory, double spread,
                 int64_t empty_from) {
  Part part{Tensor(dtype, shape, memory), Tensor(DType::kFloat32, lse_shape(shape), memory)};
  part.out.fill_normal(seed);
  part.lse.fill_normal(seed + 1000, spread);
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t s = empty_from; s < shape[1]; s += 5) {
      for (int64_t h = 0; h < shape[2]; ++h) {
        part.lse.set(b, s, h, 0, -kInf);
        for (int64_t d = 0; d < shape[3]; ++d) part.out.set(b, s, h, d, kNan);
      }
    }
  }
  return part;
}

/// The merge in float64, from its formula, with what bounds a float32 one.
struct Oracle {
  double lse = -std::numeric_limits<double>::infinity();
  std::vector<double> out, magnitude;  // [head_dim]; magnitude: sum of w_i |out_i|
};

Oracle oracle_row(const std::vector<Part>& parts, int64_t b, int64_t s, int64_t h, int64_t dim) {
  Oracle row;
  row.out.assign(static_cast<size_t>(dim), 0.0);
  row.magnitude = row.out;
  for (const Part& part : parts) {  // pairwise: ln(e^x + e^y) = max + log1p(e^-|x - y|)
    const double lse = part.lse.get(b, s, h, 0);
    if (lse == -kInf) continue;
    row.lse = row.lse == -kInf
                  ? lse
                  : std::max(row.lse, lse) + std::log1p(std::exp(-std::fabs(row.lse - lse)));
  }
  for (const Part& part : parts) {
    const double lse = part.lse.get(b, s, h, 0);
    if (lse == -kInf) continue;
    for (size_t d = 0; d < row.out.size(); ++d) {
      const double term = std::exp(lse - row.lse) * part.out.get(b, s, h, static_cast<int64_t>(d));
      row.out[d] += term;
      row.magnitude[d] += std::fabs(term);
    }
  }
  return row;
}

double relative_rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

void for_each_row(const Extents& shape,
                  const std::function<void(int64_t, int64_t, int64_t)>& body) {
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t s = 0; s < shape[1]; ++s) {
      for (int64_t h = 0; h < shape[2]; ++h) body(b, s, h);
    }
  }
}

/// The bound that merge.hpp states, and half a step of the type. 2^-25 is half the smallest
/// float16; it also covers weights below the smallest normal float32.
void expect_matches_oracle(const std::vector<Part>& parts, const Part& got,
                           const std::string& what) {
  const Extents& shape = got.out.shape();
  const double n = static_cast<double>(parts.size());
  for_each_row(shape, [&](int64_t b, int64_t s, int64_t h) {
    const Oracle want = oracle_row(parts, b, s, h, shape[3]);
    const double lse = got.lse.get(b, s, h, 0);
    if (want.lse == -kInf) {
      EXPECT_EQ(lse, -kInf) << what;
    } else {
      EXPECT_LE(std::fabs(lse - want.lse), 0x1.01p-24 * std::fabs(want.lse)) << what;
    }
    for (int64_t d = 0; d < shape[3]; ++d) {
      const auto i = static_cast<size_t>(d);
      const double bound = (n + 2) * 0x1p-24 * want.magnitude[i] +
                           1.01 * relative_rounding(got.out.dtype()) * std::fabs(want.out[i]) +
                           (got.out.dtype() == DType::kFloat16 ? 0x1p-25 : 0x1p-120);
      ASSERT_LE(std::fabs(got.out.get(b, s, h, d) - want.out[i]), bound)
          << what << " at [" << b << ", " << s << ", " << h << ", " << d << "]";
    }
  });
}

TEST(MergeStates, MatchesFloat64) {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  const Memory memories[] = {Memory::kBshd, Memory::kBhsd, Memory::kStrided, Memory::kReversed};
  uint64_t seed = 1;
  for (const int64_t head_dim : {1, 20, 64, 300}) {
    for (const int parts_count : {1, 2, 3, 7}) {
      for (const double spread : {0.5, 20.0}) {
        const Extents shape = {2, 12, 3, head_dim};
        std::vector<Part> parts;
        for (int i = 0; i < parts_count; ++i, ++seed) {
          parts.push_back(
              random_part(shape, seed, dtypes[seed % 3], memories[seed % 4], spread, i % 5));
        }
        for (const DType dtype : dtypes) {
          expect_matches_oracle(parts, merged(parts, shape, dtype),
                                std::to_string(parts_count) + " parts, head_dim " +
                                    std::to_string(head_dim) + ", " +
                                    std::string(to_string(dtype)));
        }
      }
    }
  }
}

TEST(MergeStates, WeightsOfHugeLse) {
  const Extents shape = {1, 1, 1, 1};
  const auto part = [&](float out, float lse) {
    Part result{Tensor(DType::kFloat32, shape), Tensor(DType::kFloat32, shape)};
    result.out.set(0, 0, 0, 0, out);
    result.lse.set(0, 0, 0, 0, lse);
    return result;
  };
  for (const float lse : {-3e38f, -1e5f, 0.0f, 1e5f, 3e38f}) {
    const Part got = merged({part(1, lse), part(3, lse)}, shape);
    EXPECT_EQ(got.out.get(0, 0, 0, 0), 2) << lse;
    EXPECT_EQ(got.lse.get(0, 0, 0, 0), static_cast<float>(lse + std::log(2.0))) << lse;
  }
  EXPECT_EQ(merged({part(1, 3e38f), part(3, -3e38f)}, shape).out.get(0, 0, 0, 0), 1);
}

TEST(MergeStates, EmptyPartsChangeNoBit) {
  const Extents shape = {1, 7, 2, 33};
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Part part = random_part(shape, 5, dtype, Memory::kBshd, 3, 7);
    part.out.set(0, 3, 1, 4, -0.0);
    part.out.set(0, 3, 1, 5, 0x1p-24);
    const Part empty = random_part(shape, 6, DType::kFloat32, Memory::kBshd, 1, 0);
    Part all_empty = empty;
    for_each_row(shape, [&](int64_t b, int64_t s, int64_t h) {
      all_empty.lse.set(b, s, h, 0, -kInf);
      for (int64_t d = 0; d < shape[3]; ++d) all_empty.out.set(b, s, h, d, kNan);
    });
    for (const auto& parts : std::vector<std::vector<Part>>{
             {part}, {part, all_empty}, {all_empty, part}, {all_empty, part, all_empty}}) {
      const Part got = merged(parts, shape, dtype);
      EXPECT_EQ(got.out.bytes(), part.out.bytes()) << parts.size();
      EXPECT_EQ(got.lse.bytes(), part.lse.bytes()) << parts.size();
    }
    const Part other = random_part(shape, 7, dtype, Memory::kBshd, 3, 7);
    const Part two = merged({part, other}, shape, dtype);
    const Part with_empty = merged({part, all_empty, other}, shape, dtype);
    EXPECT_EQ(two.out.bytes(), with_empty.out.bytes());
    EXPECT_EQ(two.lse.bytes(), with_empty.lse.bytes());
  }
}

TEST(MergeStates, NoKeysAtAll) {
  const Extents shape = {2, 3, 1, 5};
  Part empty{Tensor(DType::kFloat32, shape), Tensor(DType::kFloat32, lse_shape(shape))};
  empty.out.fill([](int64_t, int64_t, int64_t, int64_t) { return kNan; });
  empty.lse.fill([](int64_t, int64_t, int64_t, int64_t) { return -kInf; });
  for (const auto& parts : std::vector<std::vector<Part>>{{}, {empty}, {empty, empty}}) {
    const Part got = merged(parts, shape);
    for (const double x : got.out.values()) {
      EXPECT_EQ(x, 0);
      EXPECT_FALSE(std::signbit(x));
    }
    for (const double x : got.lse.values()) EXPECT_EQ(x, -kInf);
  }
}

TEST(MergeStates, NanStaysInItsRow) {
  const Extents shape = {1, 4, 2, 6};
  std::vector<Part> parts;
  for (uint64_t i = 0; i < 3; ++i) {
    parts.push_back(random_part(shape, 20 + i, DType::kFloat32, Memory::kBshd, 2, 4));
  }
  const Part clean = merged(parts, shape);
  parts[1].lse.set(0, 1, 0, 0, kNan);  // a row
  parts[0].lse.set(0, 2, 1, 0, kNan);  // a row whose other parts are empty
  parts[1].lse.set(0, 2, 1, 0, -kInf);
  parts[2].lse.set(0, 2, 1, 0, -kInf);
  parts[2].out.set(0, 3, 1, 5, kNan);  // an element
  const Part got = merged(parts, shape);
  for_each_row(shape, [&](int64_t b, int64_t s, int64_t h) {
    const bool row = (s == 1 && h == 0) || (s == 2 && h == 1);
    EXPECT_EQ(std::isnan(got.lse.get(b, s, h, 0)), row) << s << " " << h;
    for (int64_t d = 0; d < shape[3]; ++d) {
      const bool nan = row || (s == 3 && h == 1 && d == 5);
      EXPECT_EQ(std::isnan(got.out.get(b, s, h, d)), nan) << s << " " << h << " " << d;
      if (!nan) {
        EXPECT_EQ(got.out.get(b, s, h, d), clean.out.get(b, s, h, d));
      }
    }
  });
}

TEST(MergeStates, OutputsMayBeAPart) {
  const Extents shape = {2, 40, 2, 300};
  for (const size_t target : {0, 1, 2}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      std::vector<Part> parts;
      for (uint64_t i = 0; i < 3; ++i) {
        parts.push_back(random_part(shape, 30 + i, dtype, Memory::kBshd, 2, static_cast<int>(i)));
      }
      const Part want = merged(parts, shape, dtype);
      expect_ok(merge_states(states_of(parts), {parts[target].out.view(), parts[target].lse.view()},
                             Context::cpu(2)));
      EXPECT_EQ(parts[target].out.bytes(), want.out.bytes()) << target;
      EXPECT_EQ(parts[target].lse.bytes(), want.lse.bytes()) << target;
    }
  }
}

TEST(MergeStates, SameBitsOnEveryIsaForAnyThreads) {
  const Extents shape = {3, 37, 2, 65};
  std::vector<Part> parts;
  for (uint64_t i = 0; i < 4; ++i) {
    parts.push_back(random_part(shape, 40 + i, DType::kFloat16, Memory::kStrided, 3, 2));
  }
  const Part want = merged(parts, shape, DType::kFloat16, Context::with_isa(Isa::kScalar));
  for (const IsaSupport& support : isa_support()) {
    if (!support.available) continue;
    for (const int threads : {1, 2, 5}) {
      const Part got =
          merged(parts, shape, DType::kFloat16, Context::with_isa(support.isa, threads));
      EXPECT_EQ(got.out.bytes(), want.out.bytes()) << to_string(support.isa);
      EXPECT_EQ(got.lse.bytes(), want.lse.bytes()) << to_string(support.isa);
    }
  }
}

/// One sequence in pieces: keys [cuts[i], cuts[i + 1]).
struct Pieces {
  std::vector<int64_t> cuts;
  [[nodiscard]] size_t count() const { return cuts.size() - 1; }
};

ConstTensorView tokens(ConstTensorView view, int64_t begin, int64_t end) {
  view.data = static_cast<const std::byte*>(view.data) +
              begin * view.strides[1] * static_cast<int64_t>(dtype_bytes(view.dtype));
  view.shape[1] = end - begin;
  return view;
}

Part attend(const AttentionInputs& inputs, const Extents& shape, const AttentionOptions& options) {
  Part part{Tensor(DType::kFloat32, shape), Tensor(DType::kFloat32, lse_shape(shape))};
  expect_ok(attention(inputs, {part.out.view(), part.lse.view()}, options, Context::cpu(2)));
  return part;
}

double largest_norm(const Tensor& x) {
  double largest = 0;
  for_each_row(x.shape(), [&](int64_t b, int64_t s, int64_t h) {
    double sum = 0;
    for (int64_t d = 0; d < x.shape()[3]; ++d) sum += std::pow(x.get(b, s, h, d), 2);
    largest = std::max(largest, std::sqrt(sum));
  });
  return largest;
}

const Pieces kPieces[] = {{{0, 700}},
                          {{0, 256, 700}},
                          {{0, 512, 512, 700}},  // one without keys
                          {{0, 256, 512, 700}}};

/// Every part and the whole obey the bound of float32 attention against float64 that kernel tests
/// use (support/kernel_case.cpp); weights of parts move by as much as the LSEs of parts err.
TEST(MergeStates, ExactAttentionInPieces) {
  const Extents q_shape = {1, 9, 4, 64};
  const Extents k_shape = {1, 700, 2, 64};
  Tensor q(DType::kFloat32, q_shape), k(DType::kFloat32, k_shape), v(DType::kFloat32, k_shape);
  q.fill_normal(1, 2);
  k.fill_normal(2);
  v.fill_normal(3);
  const AttentionOptions options = {.mode = Mode::kExact};
  const ConstTensorView k_view = std::as_const(k).view(), v_view = std::as_const(v).view();
  const Part whole = attend({q.view(), k_view, v_view}, q_shape, options);

  const double delta = (64 + 8) * 0x1p-24 * largest_norm(q) * largest_norm(k) / 8 + 0x1p-20;
  const double weight = 2 * delta + (700 + 8) * 0x1p-24;  // relative error of a weight or a sum
  const double lse_error = weight + 0x1p-21 * 64;         // |LSE| < 64 here
  for (const Pieces& pieces : kPieces) {
    std::vector<Part> parts;
    for (size_t i = 0; i < pieces.count(); ++i) {
      parts.push_back(attend({q.view(), tokens(k_view, pieces.cuts[i], pieces.cuts[i + 1]),
                              tokens(v_view, pieces.cuts[i], pieces.cuts[i + 1])},
                             q_shape, options));
    }
    const Part got = merged(parts, q_shape);
    const double n = static_cast<double>(pieces.count());
    const double bound = (2 * weight + 2.01 * lse_error + (n + 2) * 0x1p-24) * largest_norm(v);
    for_each_row(q_shape, [&](int64_t b, int64_t s, int64_t h) {
      ASSERT_LT(std::fabs(whole.lse.get(b, s, h, 0)), 64);
      EXPECT_LE(std::fabs(got.lse.get(b, s, h, 0) - whole.lse.get(b, s, h, 0)), 2 * lse_error);
      for (int64_t d = 0; d < q_shape[3]; ++d) {
        ASSERT_LE(std::fabs(got.out.get(b, s, h, d) - whole.out.get(b, s, h, d)), bound)
            << n << " pieces";
      }
    });
  }
}

/// Codes and scales given, and cut where blocks of keys begin: the pieces round the same weights as
/// the whole. Both then obey the bound that the emulation states, and nothing else separates them
/// but the rounding of LSEs: float32 sums over blocks, a division, and the LSE itself.
TEST(MergeStates, AccurateAttentionInPieces) {
  const Extents q_shape = {1, 9, 4, 64};
  const Extents k_shape = {1, 700, 2, 64};
  Tensor q(DType::kFloat32, q_shape), k(DType::kFloat32, k_shape), v(DType::kFloat32, k_shape);
  q.fill_normal(1, 2);
  k.fill_normal(2);
  v.fill_normal(3);
  Tensor q_codes(DType::kInt8, q_shape), k_codes(DType::kInt8, k_shape),
      v_codes(DType::kInt8, k_shape);
  Tensor q_scale(DType::kFloat32, {1, 9, 4, 1}), k_scale(DType::kFloat32, {1, 700, 2, 1}),
      v_scale(DType::kFloat32, {1, 700, 2, 1});
  expect_ok(quantize(q.view(), {}, q_codes.view(), q_scale.view(), {}));
  expect_ok(quantize(k.view(), {}, k_codes.view(), k_scale.view(), {}));
  expect_ok(quantize(v.view(), {}, v_codes.view(), v_scale.view(), {}));
  const auto inputs = [&](int64_t begin, int64_t end) {
    const auto cut = [&](const Tensor& codes, const Tensor& scale) {
      return QuantizedView{tokens(codes.view(), begin, end), tokens(scale.view(), begin, end)};
    };
    return AttentionInputs{QuantizedView{q_codes.view(), q_scale.view()}, cut(k_codes, k_scale),
                           cut(v_codes, v_scale)};
  };
  const AttentionOptions options = {.kv_block = 256};
  const size_t rows = 9 * 4;
  const auto bound_of = [&](const AttentionInputs& part) {
    std::vector<double> out(rows * 64), lse(rows), bound(rows * 64);
    expect_ok(reference::emulation(part, reference::emulation_options(options), out, lse, bound));
    return bound;
  };
  const Part whole = attend(inputs(0, 700), q_shape, options);
  const std::vector<double> whole_bound = bound_of(inputs(0, 700));
  // At most 3 blocks: sums and factors of a block, the logarithm in float32, the LSE (below 64).
  const double lse_error = 16 * 0x1p-24 + 0x1p-20 + 64 * 0x1p-23;
  for (const Pieces& pieces : kPieces) {
    std::vector<Part> parts;
    std::vector<std::vector<double>> bounds;
    for (size_t i = 0; i < pieces.count(); ++i) {
      const AttentionInputs part = inputs(pieces.cuts[i], pieces.cuts[i + 1]);
      parts.push_back(attend(part, q_shape, options));
      bounds.push_back(bound_of(part));
    }
    const Part got = merged(parts, q_shape);
    const double n = static_cast<double>(pieces.count());
    size_t row = 0;
    for_each_row(q_shape, [&](int64_t b, int64_t s, int64_t h) {
      const Oracle oracle = oracle_row(parts, b, s, h, 64);
      ASSERT_LT(std::fabs(oracle.lse), 64);
      EXPECT_LE(std::fabs(got.lse.get(b, s, h, 0) - whole.lse.get(b, s, h, 0)), 2 * lse_error);
      for (int64_t d = 0; d < 64; ++d) {
        const size_t at = row * 64 + static_cast<size_t>(d);
        double bound = whole_bound[at];
        double largest = 0;
        for (size_t i = 0; i < pieces.count(); ++i) {
          const double lse = parts[i].lse.get(b, s, h, 0);
          bound += std::exp(lse - oracle.lse) * bounds[i][at];
          largest = std::max(largest, std::fabs(parts[i].out.get(b, s, h, d)));
        }
        bound += (2.01 * lse_error + (n + 3) * 0x1p-24) * largest + 0x1p-100;
        ASSERT_LE(std::fabs(got.out.get(b, s, h, d) - whole.out.get(b, s, h, d)), bound)
            << n << " pieces, row " << row << ", channel " << d;
      }
      ++row;
    });
  }
}

TEST(MergeStates, Refusals) {
  const Extents shape = {2, 3, 4, 5};
  const auto expect_refused =
      [&](const std::string& message,
          const std::function<void(std::vector<AttentionState>&, AttentionOutputs&, Context&)>&
              change) {
        std::vector<Part> parts;
        for (uint64_t i = 0; i < 2; ++i) {
          parts.push_back(random_part(shape, i, DType::kFloat32, Memory::kBshd, 1, 3));
        }
        std::vector<AttentionState> states = states_of(parts);
        Part result = parts[0];
        AttentionOutputs outputs = {result.out.view(), result.lse.view()};
        Context context;
        expect_ok(merge_states(states, outputs, context));
        const Part before = result;
        change(states, outputs, context);
        const Status status = merge_states(states, outputs, context);
        EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
        EXPECT_EQ(status.message(), message);
        EXPECT_EQ(result.out.bytes(), before.out.bytes());
        EXPECT_EQ(result.lse.bytes(), before.lse.bytes());
      };
  using States = std::vector<AttentionState>;
  expect_refused("context.threads got 0, wants >= 1",
                 [](States&, AttentionOutputs&, Context& c) { c.threads = 0; });
  expect_refused("states[1].out.shape got [2, 3, 4, 6], wants [2, 3, 4, 5], as merged.out",
                 [](States& s, AttentionOutputs&, Context&) { s[1].out.shape[3] = 6; });
  expect_refused("states[0].out.dtype got int8, wants float32, float16 or bfloat16",
                 [](States& s, AttentionOutputs&, Context&) { s[0].out.dtype = DType::kInt8; });
  expect_refused("states[1].out.data got nullptr, wants [2, 3, 4, 5]",
                 [](States& s, AttentionOutputs&, Context&) { s[1].out.data = nullptr; });
  expect_refused("states[1].lse.shape got [2, 3, 4, 2], wants [2, 3, 4, 1]",
                 [](States& s, AttentionOutputs&, Context&) { s[1].lse.shape[3] = 2; });
  expect_refused("states[1].lse.dtype got float16, wants float32",
                 [](States& s, AttentionOutputs&, Context&) { s[1].lse.dtype = DType::kFloat16; });
  expect_refused("merged.out.dtype got int32, wants float32, float16 or bfloat16",
                 [](States&, AttentionOutputs& o, Context&) { o.out.dtype = DType::kInt32; });
  expect_refused("merged.out.strides[1]=0 wants distinct elements, because it is written",
                 [](States&, AttentionOutputs& o, Context&) { o.out.strides[1] = 0; });
  expect_refused("merged.lse.shape got [2, 3, 1, 1], wants [2, 3, 4, 1]",
                 [](States&, AttentionOutputs& o, Context&) { o.lse->shape[2] = 1; });
  expect_refused("merged.lse.data got nullptr, wants [2, 3, 4, 1]",
                 [](States&, AttentionOutputs& o, Context&) { o.lse->data = nullptr; });
}

TEST(MergeStates, WantsTensorsWhereTheContextIs) {
  const Extents shape = {1, 2, 1, 4};
  std::vector<Part> parts = {random_part(shape, 1, DType::kFloat32, Memory::kBshd, 1, 9)};
  Part result = parts[0];
  AttentionOutputs outputs = {result.out.view(), result.lse.view()};
  std::vector<AttentionState> states = states_of(parts);
  const Status on_host = merge_states(states, outputs, Context::cuda(0));
  EXPECT_EQ(on_host.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(on_host.message(), "merged.out.device got cpu, wants cuda:0, as the context's");
  outputs.out.device = outputs.lse->device = {DeviceType::kCuda, 0};
  const Status part_on_host = merge_states(states, outputs, Context::cuda(0));
  EXPECT_EQ(part_on_host.message(), "states[0].out.device got cpu, wants cuda:0, as the context's");
  const Status elsewhere = merge_states(states, {result.out.view(), outputs.lse}, {});
  EXPECT_EQ(elsewhere.message(), "merged.lse.device got cuda:0, wants cpu, as the context's");
}

TEST(MergeStates, EmptyShapes) {
  for (const Extents& shape : {Extents{0, 3, 2, 4}, {2, 0, 2, 4}, {2, 3, 0, 4}}) {
    TensorView out = bshd(static_cast<void*>(nullptr), DType::kFloat32, shape);
    TensorView lse = bshd(static_cast<void*>(nullptr), DType::kFloat32, lse_shape(shape));
    const AttentionState state = {out, lse};
    expect_ok(merge_states({&state, 1}, {out, lse}, {}));
  }
}

}  // namespace
}  // namespace attn8::testing
