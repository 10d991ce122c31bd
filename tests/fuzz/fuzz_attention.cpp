// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Bytes to a problem for attention(): shapes, types, strides, masks, options, and data with all
// that floats can hold. What is refused is refused by every ISA in the same words; `accurate` and
// `paper` give the same bits on every ISA and any number of threads; small problems stay within the
// emulation's bound.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <sstream>
#include <utility>

#include "fuzz_target.hpp"
#include "support/kernel_case.hpp"
#include "support/tensors.hpp"

namespace attn8::fuzz {
namespace {

using testing::KernelCase;
using testing::KernelResult;
using testing::Memory;
using testing::Tensor;

/// Products of one run on the slowest ISA, so that a run takes milliseconds.
constexpr int64_t kMaxProducts = int64_t{1} << 20;
/// The same for the oracle.
constexpr int64_t kMaxOracleProducts = int64_t{1} << 17;

constexpr double kInf = std::numeric_limits<double>::infinity();

/// What the elements of a tensor are drawn from.
struct Recipe {
  uint64_t seed = 0;
  double sigma = 1;
  int kind = 0;
  double special = 0;  ///< in one element of `rare`; 0: none
  int64_t rare = 0;
  int64_t place = 0;

  /// Whether every element and what a mode computes from it lies far from the ends of float32.
  [[nodiscard]] bool tame() const {
    return sigma >= 1e-3 && sigma <= 1e3 && (rare == 0 || std::fabs(special) <= 1e3);
  }
};

Recipe read_recipe(ByteReader& bytes) {
  Recipe recipe;
  recipe.seed = bytes.byte();
  recipe.sigma = bytes.pick({1.0, 1.0, 1.0, 1.0, 0.0, 1e-3, 30.0, 1e3, 1e-20, 1e18, 1e-40});
  recipe.kind = static_cast<int>(bytes.below(5));
  if (bytes.one_in(4)) {
    recipe.special = bytes.pick(
        {std::nan(""), kInf, -kInf, 3e38, -3e38, 65504.0, 1e-42, -0.0, 100.0, 1e-30, 1e30});
    recipe.rare = bytes.pick({int64_t{1} << 40, int64_t{977}, int64_t{61}, int64_t{3}});
    recipe.place = bytes.below(65536);
  }
  return recipe;
}

void fill(Tensor& x, const Recipe& recipe) {
  const Extents shape = x.shape();
  x.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    const int64_t index = ((b * shape[1] + s) * shape[2] + h) * shape[3] + d;
    if (recipe.rare > 0 && index % recipe.rare == recipe.place % recipe.rare) return recipe.special;
    const double normal = recipe.sigma * value_at(recipe.seed, static_cast<uint64_t>(index));
    switch (recipe.kind) {
      case 1:
        return s % 32 == d ? recipe.sigma : 0.0;
      case 2:
        return s % 7 == 3 ? 40 * normal : normal;
      case 3:
        return normal + 3 * recipe.sigma;
      case 4:
        return recipe.sigma * static_cast<double>(d % 3 - 1);
      default:
        return normal;
    }
  });
}

/// An operand in the form it is passed, with the memory it points into.
struct OperandMemory {
  Tensor floats, codes, scale, mean;
  std::optional<QuantSpec> spec;
  bool with_mean = false;
  bool broadcast = false;  ///< all tokens are the first one
  Recipe recipe;

  [[nodiscard]] Operand operand() const {
    if (spec) {
      QuantizedView view{codes.view(), scale.view(), *spec};
      if (with_mean) view.mean = mean.view();
      return view;
    }
    ConstTensorView view = floats.view();
    if (broadcast) view.strides[1] = 0;
    return view;
  }
};

struct Problem {
  KernelCase shape;
  OperandMemory q, k, v;
  std::optional<Tensor> attn_mask, alibi_slopes, sinks, seqlens_k, leftpad_k;
  double largest_change = 0;  ///< of a score, in nats, by the first three
  std::vector<Mode> head_modes;
  bool tame = true;

  [[nodiscard]] AttentionInputs inputs() const {
    AttentionInputs all = {q.operand(), k.operand(), v.operand()};
    const auto set = [](std::optional<ConstTensorView>& view, const std::optional<Tensor>& tensor) {
      if (tensor) view = tensor->view();
    };
    set(all.attn_mask, attn_mask);
    set(all.alibi_slopes, alibi_slopes);
    set(all.sinks, sinks);
    set(all.seqlens_k, seqlens_k);
    set(all.leftpad_k, leftpad_k);
    return all;
  }
  [[nodiscard]] AttentionOptions options() const {
    AttentionOptions all = shape.options;
    all.head_modes = head_modes;
    return all;
  }
};

DType read_dtype(ByteReader& bytes) {
  return bytes.pick({DType::kFloat32, DType::kFloat32, DType::kFloat16, DType::kBFloat16});
}

Memory read_memory(ByteReader& bytes) {
  return bytes.pick(
      {Memory::kBshd, Memory::kBshd, Memory::kBhsd, Memory::kStrided, Memory::kReversed});
}

OperandMemory read_operand(ByteReader& bytes, const Extents& shape, const AttentionOptions& options,
                           char name, Problem& problem) {
  OperandMemory memory;
  const DType dtype = read_dtype(bytes);
  const Memory order = read_memory(bytes);
  const Recipe recipe = read_recipe(bytes);
  memory.recipe = recipe;
  problem.tame = problem.tame && recipe.tame();
  memory.floats = Tensor(dtype, shape, order);
  fill(memory.floats, recipe);
  memory.broadcast = bytes.one_in(16);
  if (!bytes.one_in(5)) return memory;
  // Quantized: by the library, or codes and scales of their own. A granularity that the mode does
  // not take is for validation to refuse.
  QuantSpec spec = {Granularity::kToken, 0};
  if (name == 'v') {
    spec.granularity = bytes.pick({Granularity::kToken, Granularity::kTensor, Granularity::kChannel,
                                   Granularity::kBlock, Granularity::kBlockChannel});
    spec.block = options.kv_block == 0 ? kDefaultKvBlock : options.kv_block;
  }
  memory.spec = spec;
  memory.broadcast = false;
  memory.codes = Tensor(DType::kInt8, shape, read_memory(bytes));
  memory.scale = Tensor(DType::kFloat32, scale_shape(shape, spec), read_memory(bytes));
  memory.mean = Tensor(DType::kFloat32, {shape[0], 1, shape[2], shape[3]});
  memory.with_mean = name == 'k' && bytes.one_in(2);
  const bool by_library =
      bytes.one_in(2) && (spec.block > 0 || spec.granularity < Granularity::kBlock);
  if (by_library) {
    const Status status =
        quantize(memory.floats.view(), spec, memory.codes.view(), memory.scale.view(), Context(),
                 memory.with_mean ? Mean::kCompute : Mean::kNone,
                 memory.with_mean ? std::optional<TensorView>(memory.mean.view()) : std::nullopt);
    expect(status.ok(), "quantize: " + status.message());
    return memory;
  }
  const auto positive = [&](int64_t b, int64_t s, int64_t h, int64_t d) {
    const auto index = static_cast<uint64_t>(((b * 977 + s) * 61 + h) * 257 + d);
    const double x = std::fabs(value_at(recipe.seed + 1, index)) * recipe.sigma / 100;
    return std::max(x, 0x1p-149);  // a scale is > 0
  };
  memory.scale.fill(positive);
  // -128 is no code; the kernels find it while they compute.
  const double rare_low = bytes.one_in(8) ? -128.0 : -127.0;
  memory.codes.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    const auto index = static_cast<uint64_t>(((b * 977 + s) * 61 + h) * 257 + d);
    const double x = 40 * value_at(recipe.seed + 2, index);
    return std::round(std::clamp(x, rare_low, 127.0));
  });
  memory.mean.fill([&](int64_t b, int64_t, int64_t h, int64_t d) {
    return value_at(recipe.seed + 3, static_cast<uint64_t>((b * 61 + h) * 257 + d));
  });
  return memory;
}

/// What changes scores, and lengths: none of it most of the time.
void read_score_changes(ByteReader& bytes, Problem& problem) {
  KernelCase& c = problem.shape;
  const auto either = [&](int64_t extent) { return bytes.one_in(2) ? extent : int64_t{1}; };
  if (bytes.one_in(4)) {
    const DType dtype =
        bytes.pick({DType::kBool, DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    Tensor& mask = problem.attn_mask.emplace(
        dtype, Extents{either(c.batch), either(c.seqlen_q), either(c.nheads_q), either(c.seqlen_k)},
        read_memory(bytes));
    const uint64_t seed = bytes.byte();
    const double sigma = bytes.pick({1.0, 0.0, 30.0, 1e3});
    const double special = bytes.pick({-kInf, -kInf, -2e30, 0.0, std::nan(""), kInf});
    const int64_t rare = bytes.pick({2, 5, 64, 1000});
    mask.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      const auto index = ((b * 83 + s) * 17 + h) * 719 + d;
      if (index % rare == 1) return dtype == DType::kBool ? 0.0 : special;
      return dtype == DType::kBool ? 1.0 : sigma * value_at(seed, static_cast<uint64_t>(index));
    });
    problem.largest_change += 4 * sigma;
    if (special > 0) problem.tame = false;
  }
  if (bytes.one_in(6)) {
    Tensor& slopes =
        problem.alibi_slopes.emplace(DType::kFloat32, Extents{either(c.batch), 1, c.nheads_q, 1});
    const double slope = bytes.pick({0.5, 0.004, -1.0, 100.0, 0.0, 1e7, kInf});
    slopes.fill([&](int64_t b, int64_t, int64_t h, int64_t) {
      return slope * static_cast<double>(1 + b + h);
    });
    problem.largest_change += std::fabs(slope) * static_cast<double>(c.batch + c.nheads_q) * 1024;
  }
  if (bytes.one_in(6)) {
    Tensor& sinks = problem.sinks.emplace(DType::kFloat32, Extents{1, 1, c.nheads_q, 1});
    const double sigma = bytes.pick({1.0, 20.0, 0.0, 1e4});
    const uint64_t seed = bytes.byte();
    const bool infinite = bytes.one_in(8);
    sinks.fill([&](int64_t, int64_t, int64_t h, int64_t) {
      return infinite && h == 0 ? -kInf : sigma * value_at(seed, static_cast<uint64_t>(h));
    });
    problem.largest_change += 4 * sigma;
  }
  if (bytes.one_in(6)) {
    Tensor& lengths = problem.seqlens_k.emplace(DType::kInt32, Extents{c.batch, 1, 1, 1});
    const auto longest = static_cast<uint32_t>(c.seqlen_k) + 1;
    lengths.fill([&](int64_t, int64_t, int64_t, int64_t) {
      return bytes.one_in(32) ? -1.0 : static_cast<double>(bytes.below(longest));
    });
  }
  if (bytes.one_in(6)) {
    Tensor& lengths = problem.leftpad_k.emplace(DType::kInt32, Extents{c.batch, 1, 1, 1});
    const auto longest = static_cast<uint32_t>(c.seqlen_k) / 2 + 1;
    lengths.fill([&](int64_t, int64_t, int64_t, int64_t) {
      return static_cast<double>(bytes.below(longest));
    });
  }
  if (bytes.one_in(6)) {
    c.options.softcap = bytes.pick(
        {5.0F, 50.0F, 0.25F, -1.0F, 1e-30F, 1e30F, std::numeric_limits<float>::infinity()});
    problem.largest_change += std::fabs(static_cast<double>(c.options.softcap));
  }
  if (bytes.one_in(8)) {
    c.options.mask.q_offset = static_cast<int64_t>(bytes.below(1000)) - 500;
    c.options.mask.k_offset = bytes.pick({int64_t{0}, int64_t{100}, int64_t{-7}, INT64_MAX});
  }
  if (bytes.one_in(12)) {
    for (int64_t head = 0; head < c.nheads_k; ++head) {
      problem.head_modes.push_back(
          bytes.pick({Mode::kAccurate, Mode::kHalf, Mode::kExact, Mode::kPaper}));
    }
    if (bytes.one_in(16)) problem.head_modes.pop_back();
  }
}

int64_t read_length(ByteReader& bytes, uint32_t most) {
  if (bytes.one_in(3)) {
    return bytes.pick({0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513});
  }
  return bytes.below(most);
}

std::optional<Problem> read_problem(ByteReader& bytes) {
  Problem problem;
  KernelCase& c = problem.shape;
  AttentionOptions& options = c.options;
  options.mode = bytes.pick(
      {Mode::kAccurate, Mode::kAccurate, Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact});
  c.batch = bytes.pick({1, 1, 1, 2, 0, 3});
  c.nheads_k = bytes.pick({1, 1, 2, 3});
  c.nheads_q = c.nheads_k * bytes.pick({1, 1, 2, 4, 7});
  if (bytes.one_in(32)) ++c.nheads_q;
  c.head_dim = bytes.one_in(3) ? 1 + bytes.below(256)
                               : bytes.pick({1, 3, 4, 16, 31, 32, 33, 61, 64, 80, 96, 128, 256});
  if (bytes.one_in(8)) c.head_dim_v = 1 + bytes.below(256);
  c.seqlen_q = read_length(bytes, 80);
  c.seqlen_k = read_length(bytes, 700);
  const int64_t dim = std::max(c.head_dim, c.out_dim());
  const int64_t products = c.batch * c.nheads_q * c.seqlen_q * c.seqlen_k * dim;
  const int64_t elements = c.batch * (c.nheads_q * c.seqlen_q + 2 * c.nheads_k * c.seqlen_k) * dim;
  if (products > kMaxProducts || elements > kMaxProducts / 2) return std::nullopt;
  options.mask.causal = bytes.one_in(2);
  options.mask.align = bytes.pick({CausalAlign::kBottomRight, CausalAlign::kTopLeft});
  if (bytes.one_in(3)) {
    options.mask.window_left = static_cast<int64_t>(bytes.below(300)) - 1;
    options.mask.window_right = static_cast<int64_t>(bytes.below(100)) - 1;
  }
  if (bytes.one_in(32)) {
    options.mask.window_left = bytes.pick({int64_t{-2}, INT64_MAX, INT64_MIN, int64_t{1} << 62});
  }
  options.kv_block = bytes.pick({0, 0, 64, 64, 128, 192, 512});
  if (bytes.one_in(64)) options.kv_block = static_cast<int32_t>(bytes.below(1000)) - 100;
  options.v_granularity =
      bytes.pick({Granularity::kToken, Granularity::kToken, Granularity::kTensor,
                  Granularity::kChannel, Granularity::kBlock, Granularity::kBlockChannel});
  options.smooth_k = !bytes.one_in(3);
  options.check_finite = bytes.one_in(8);
  if (bytes.one_in(3)) {
    options.softmax_scale =
        bytes.pick({1.0F, 0.0F, -0.5F, 0.01F, 1e-30F, 50.0F, 1e10F, 3e38F, 1e-45F,
                    std::numeric_limits<float>::infinity(), std::nanf("")});
    problem.tame = problem.tame && std::fabs(*options.softmax_scale) <= 1;
  }
  c.out_dtype = read_dtype(bytes);
  c.memory = bytes.one_in(3) ? read_memory(bytes) : Memory::kBshd;
  const Extents q_shape = {c.batch, c.seqlen_q, c.nheads_q, c.head_dim};
  const Extents k_shape = {c.batch, c.seqlen_k, c.nheads_k, c.head_dim};
  const Extents v_shape = {c.batch, c.seqlen_k, c.nheads_k, c.out_dim()};
  problem.q = read_operand(bytes, q_shape, options, 'q', problem);
  problem.k = read_operand(bytes, k_shape, options, 'k', problem);
  problem.v = read_operand(bytes, v_shape, options, 'v', problem);
  read_score_changes(bytes, problem);
  return problem;
}

struct Answer {
  Status status;
  KernelResult result;
};

Answer attend(const Problem& problem, Isa isa, int32_t threads) {
  const KernelCase& c = problem.shape;
  Answer answer;
  answer.result = {Tensor(c.out_dtype, {c.batch, c.seqlen_q, c.nheads_q, c.out_dim()}, c.memory),
                   Tensor(DType::kFloat32, {c.batch, c.seqlen_q, c.nheads_q, 1}, c.memory)};
  answer.status = attention(problem.inputs(), {answer.result.out.view(), answer.result.lse.view()},
                            problem.options(), Context::with_isa(isa, threads));
  return answer;
}

/// The same bytes, or NaN in the same places: which NaN is no part of the definition.
bool same(const Tensor& a, const Tensor& b) {
  if (a.bytes() == b.bytes()) return true;
  const std::vector<double> x = a.values();
  const std::vector<double> y = b.values();
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i]) && std::isnan(y[i])) continue;
    if (std::memcmp(&x[i], &y[i], sizeof(double)) != 0) return false;
  }
  return true;
}

bool untouched(const Tensor& x) {
  return std::ranges::all_of(x.bytes(), [](std::byte byte) { return byte == std::byte{0x5a}; });
}

std::string text(double value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

std::string describe(const Problem& problem, Isa isa) {
  const auto form = [](const OperandMemory& operand) {
    const Recipe& recipe = operand.recipe;
    const std::string rare =
        recipe.rare > 0 ? ", one in " + std::to_string(recipe.rare) + " " + text(recipe.special)
                        : "";
    return std::string(operand.spec ? "codes" : to_string(operand.floats.dtype())) +
           (operand.with_mean ? " with mean" : "") + " (kind " + std::to_string(recipe.kind) +
           ", sigma " + text(recipe.sigma) + rare + ")";
  };
  const std::optional<float> scale = problem.shape.options.softmax_scale;
  std::string changes;
  for (const auto& [name, tensor] :
       {std::pair<const char*, const std::optional<Tensor>&>{" attn_mask", problem.attn_mask},
        {" alibi_slopes", problem.alibi_slopes},
        {" sinks", problem.sinks},
        {" seqlens_k", problem.seqlens_k},
        {" leftpad_k", problem.leftpad_k}}) {
    if (tensor) changes += name;
  }
  if (!problem.head_modes.empty()) changes += " head_modes";
  const AttentionOptions& options = problem.shape.options;
  if (options.softcap != 0) changes += " softcap " + text(options.softcap);
  if (options.mask.q_offset != options.mask.k_offset) changes += " offsets";
  return std::string(to_string(isa)) + " " + problem.shape.name() + changes + " head_dim_v " +
         std::to_string(problem.shape.out_dim()) + (scale ? " scale " + text(*scale) : "") + " q " +
         form(problem.q) + " k " + form(problem.k) + " v " + form(problem.v);
}

/// Upper bound of |x| over all elements, those that are finite.
double largest(const OperandMemory& operand) {
  const auto of = [](const Tensor& x) {
    double most = 0;
    for (const double value : x.values()) {
      if (std::isfinite(value)) most = std::max(most, std::fabs(value));
    }
    return most;
  };
  return operand.spec ? 127 * of(operand.scale) + of(operand.mean) : of(operand.floats);
}

bool finite(const OperandMemory& operand) {
  return operand.spec ||
         std::ranges::all_of(operand.floats.values(), [](double x) { return std::isfinite(x); });
}

/// Upper bound of a score in nats, the mean of K included.
double largest_score(const Problem& problem) {
  const KernelCase& c = problem.shape;
  const auto dim = static_cast<double>(c.head_dim);
  const double scale = std::fabs(c.options.softmax_scale.value_or(1 / std::sqrt(dim)));
  return std::max(scale, 1.0) * dim * largest(problem.q) * largest(problem.k) +
         problem.largest_change;
}

/// Whether a bound of the result is known: where scores stay within float32, and of float32
/// arithmetic far from its ends.
bool has_bound(const Problem& problem) {
  const KernelCase& c = problem.shape;
  const int64_t products = c.batch * c.nheads_q * c.seqlen_q * c.seqlen_k * c.head_dim;
  if (products > kMaxOracleProducts || largest_score(problem) > 1e37) return false;
  if (!problem.head_modes.empty()) return false;  // every head is one of the other problems
  const Mode mode = c.options.mode;
  return (mode != Mode::kHalf && mode != Mode::kExact) || problem.tame;
}

/// Half a unit in the last place of a type, relative, and half its smallest step.
std::pair<double, double> rounding_of(DType dtype) {
  if (dtype == DType::kFloat16) return {0x1p-11, 0x1p-25};
  // A block whose maximum lies 126 octaves below the running one counts as if it lay there.
  return {dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-24, 0x1p-100};
}

void expect_near(double got, double want, double bound, const char* name, size_t i,
                 const std::string& what) {
  if (got == want || (std::isnan(got) && std::isnan(want))) return;
  expect(std::fabs(got - want) <= bound, what + ": " + name + "[" + std::to_string(i) + "] is " +
                                             text(got) + ", the oracle's " + text(want) +
                                             ", bound " + text(bound));
}

/// The emulation's bound, or, of float32 arithmetic, what its rounding may do to a score.
void check_oracle(const Problem& problem, const KernelResult& result, const std::string& what) {
  const KernelCase& c = problem.shape;
  const auto rows = static_cast<size_t>(c.batch * c.seqlen_q * c.nheads_q);
  std::vector<double> out(rows * static_cast<size_t>(c.out_dim()));
  std::vector<double> bound(out.size());
  std::vector<double> lse(rows);
  // A float32 dot product of D terms errs by at most (D + 2) 2^-24 of the sum of their sizes; exp2
  // errs by 2^-18, a float32 sum by 2^-24 per key.
  const double delta = static_cast<double>(c.head_dim + 8) * 0x1p-23 * largest_score(problem) +
                       0x1p-18 + static_cast<double>(c.seqlen_k + 8) * 0x1p-24;
  const AttentionInputs inputs = problem.inputs();
  if (c.options.mode == Mode::kExact) {
    const Status status = reference::exact_attention(inputs, c.options, out, lse);
    expect(status.ok(), "exact_attention: " + status.message());
    if (delta > 0.1) return;  // rounding decides who wins
    // A V that is not finite makes a row NaN and its LSE with it, where that oracle goes on.
    if (!finite(problem.v)) return;
    // P is bfloat16 where Q, K and V all are and the CPU multiplies pairs of it.
    std::ranges::fill(bound, (3 * delta + 0x1p-7) * largest(problem.v));
  } else {
    const Status status =
        reference::emulation(inputs, reference::emulation_options(c.options), out, lse, bound);
    expect(status.ok(), "emulation: " + status.message());
  }
  const std::vector<double> got = result.out.values();
  const auto [rounding, step] = rounding_of(c.out_dtype);
  for (size_t i = 0; i < out.size(); ++i) {
    const double limit = bound[i] + rounding * (std::fabs(out[i]) + bound[i]);
    // What is beyond a type is Inf there.
    const bool beyond = c.out_dtype == DType::kFloat16 && std::fabs(out[i]) + limit >= 65504;
    if (!beyond) expect_near(got[i], out[i], limit + step, "out", i, what);
  }
  const std::vector<double> got_lse = result.lse.values();
  for (size_t i = 0; i < rows; ++i) {
    expect_near(got_lse[i], lse[i], 2 * delta + 0x1p-22 * std::fabs(lse[i]), "lse", i, what);
  }
}

void expect_status(const Status& status, const Status& wanted, const std::string& what) {
  expect(status.code() == wanted.code() && status.message() == wanted.message(),
         what + " answers '" + status.message() + "', scalar '" + wanted.message() + "'");
}

void check(const Problem& problem, Isa isa, const Answer& scalar) {
  const std::string what = describe(problem, isa);
  const Answer one = attend(problem, isa, 1);
  const Answer three = attend(problem, isa, 3);
  for (const Answer* answer : {&one, &three}) {
    expect_status(answer->status, scalar.status, what);
    if (answer->status.ok() || answer->status.message().find("-128") != std::string::npos) continue;
    expect(untouched(answer->result.out) && untouched(answer->result.lse),
           what + " writes though it answers '" + answer->status.message() + "'");
  }
  if (!one.status.ok()) return;
  expect(same(one.result.out, three.result.out) && same(one.result.lse, three.result.lse),
         what + ": one and three threads differ");
  const Mode mode = problem.shape.options.mode;
  const bool same_everywhere =
      (mode == Mode::kAccurate || mode == Mode::kPaper) && problem.head_modes.empty();
  if (same_everywhere) {
    expect(same(one.result.out, scalar.result.out) && same(one.result.lse, scalar.result.lse),
           what + " differs from scalar");
  }
  if (!has_bound(problem) || (same_everywhere && isa != Isa::kScalar)) return;
  check_oracle(problem, one.result, what);
}

}  // namespace

std::vector<Bytes> seeds() { return {}; }

}  // namespace attn8::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace attn8;        // NOLINT: this is the target
  using namespace attn8::fuzz;  // NOLINT
  ByteReader bytes(data, size);
  const std::optional<Problem> problem = read_problem(bytes);
  if (!problem) return -1;
  const Answer scalar = attend(*problem, Isa::kScalar, 1);
  expect(scalar.status.ok() == scalar.status.message().empty() &&
             scalar.status.message().find('\n') == std::string::npos,
         "a status without its line: '" + scalar.status.message() + "'");
  for (const IsaSupport& support : isa_support()) {
    if (support.available) check(*problem, support.isa, scalar);
  }
  return scalar.status.ok() ? 0 : -1;
}
