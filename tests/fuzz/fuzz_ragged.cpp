// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Bytes to packed sequences: lengths, masks, types, options and data. One call gives every sequence
// the bits that a call of its own gives it, on the same ISA and any number of threads; starts that
// are no starts are refused.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "fuzz_target.hpp"
#include "support/tensors.hpp"

namespace attn8::fuzz {
namespace {

using testing::Memory;
using testing::stretch;
using testing::Tensor;

/// Scores of one run, so that it takes milliseconds.
constexpr int64_t kMaxScores = 60000;

struct Problem {
  std::vector<int64_t> queries, keys;
  AttentionOptions options;
  Tensor q, k, v, attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k;
  Tensor out, lse;
  bool with_mask = false, with_slopes = false, with_sinks = false, with_lse = false;

  [[nodiscard]] AttentionInputs inputs() const {
    AttentionInputs all = {q.view(), k.view(), v.view()};
    if (with_mask) all.attn_mask = attn_mask.view();
    if (with_slopes) all.alibi_slopes = alibi_slopes.view();
    if (with_sinks) all.sinks = sinks.view();
    all.cu_seqlens_q = cu_seqlens_q.view();
    all.cu_seqlens_k = cu_seqlens_k.view();
    return all;
  }
};

void fill(ByteReader& bytes, Tensor& x) {
  const uint64_t seed = bytes.byte();
  const double sigma = bytes.pick({1.0, 1.0, 1.0, 0.0, 50.0, 1e-20, 1e18});
  const double special = bytes.pick({0.0, 0.0, 0.0, std::nan(""), HUGE_VAL, -3e38, 100.0});
  const int64_t place = bytes.below(65536);
  int64_t i = 0;
  x.fill([&](int64_t, int64_t, int64_t, int64_t) {
    const int64_t at = i++;
    if (special != 0 && at % 4001 == place % 4001) return special;
    return sigma * value_at(seed, static_cast<uint64_t>(at));
  });
}

Tensor starts(const std::vector<int64_t>& lengths) {
  Tensor cu_seqlens(DType::kInt32, {std::ssize(lengths) + 1, 1, 1, 1});
  int64_t total = 0;
  for (size_t i = 0; i <= lengths.size(); ++i) {
    cu_seqlens.set(static_cast<int64_t>(i), 0, 0, 0, static_cast<double>(total));
    if (i < lengths.size()) total += lengths[i];
  }
  return cu_seqlens;
}

AttentionOptions read_options(ByteReader& bytes) {
  AttentionOptions options;
  options.mode =
      bytes.pick({Mode::kAccurate, Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact});
  options.mask.causal = bytes.one_in(2);
  options.mask.align = bytes.pick({CausalAlign::kBottomRight, CausalAlign::kTopLeft});
  options.mask.window_left = bytes.pick({int64_t{-1}, int64_t{-1}, int64_t{0}, int64_t{33}});
  options.mask.window_right = bytes.pick({int64_t{-1}, int64_t{-1}, int64_t{0}, int64_t{7}});
  options.mask.q_offset = bytes.pick({int64_t{0}, int64_t{0}, int64_t{11}, int64_t{-90}});
  options.kv_block = bytes.pick({0, 64, 64, 128, 512});
  options.v_granularity =
      bytes.pick({Granularity::kToken, Granularity::kToken, Granularity::kTensor,
                  Granularity::kChannel, Granularity::kBlock, Granularity::kBlockChannel});
  options.smooth_k = !bytes.one_in(4);
  options.softcap = bytes.pick({0.0F, 0.0F, 0.0F, 2.0F, 50.0F});
  return options;
}

/// Fills the problem; false when it is too large.
bool read_problem(ByteReader& bytes, Problem& p) {
  p.options = read_options(bytes);
  const auto sequences = static_cast<size_t>(bytes.below(9));
  int64_t total_q = 0;
  int64_t total_k = 0;
  int64_t longest = 0;
  int64_t scores = 0;
  for (size_t i = 0; i < sequences; ++i) {
    p.queries.push_back(bytes.pick({1, 1, 0, 2, 17, 64, 65, 130}));
    p.keys.push_back(bytes.below(bytes.one_in(32) ? 17000 : 400));
    total_q += p.queries.back();
    total_k += p.keys.back();
    longest = std::max(longest, p.keys.back());
    scores += p.queries.back() * p.keys.back();
  }
  const int64_t nheads_k = bytes.pick({1, 1, 2, 3});
  const int64_t nheads_q = nheads_k * bytes.pick({1, 1, 2, 5});
  const int64_t head_dim = bytes.pick({16, 1, 32, 61, 64});
  const int64_t head_dim_v = bytes.one_in(3) ? bytes.pick({16, 3, 80}) : head_dim;
  if (scores * nheads_q > kMaxScores) return false;
  const auto dtype = bytes.pick({DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  const auto memory =
      bytes.pick({Memory::kBshd, Memory::kBhsd, Memory::kStrided, Memory::kReversed});
  p.q = Tensor(dtype, {1, total_q, nheads_q, head_dim}, memory);
  p.k = Tensor(dtype, {1, total_k, nheads_k, head_dim}, memory);
  p.v = Tensor(dtype, {1, total_k, nheads_k, head_dim_v}, memory);
  p.out = Tensor(bytes.pick({DType::kFloat32, DType::kBFloat16}),
                 {1, total_q, nheads_q, head_dim_v}, memory);
  p.lse = Tensor(DType::kFloat32, {1, total_q, nheads_q, 1});
  p.with_lse = bytes.one_in(2);
  p.with_mask = bytes.one_in(3);
  p.with_slopes = bytes.one_in(4);
  p.with_sinks = bytes.one_in(4);
  const auto either = [&](int64_t extent) { return bytes.one_in(3) ? int64_t{1} : extent; };
  p.attn_mask = Tensor(bytes.pick({DType::kBool, DType::kFloat32, DType::kFloat16}),
                       {1, either(total_q), either(nheads_q), either(longest + bytes.below(3))},
                       bytes.pick({Memory::kBshd, Memory::kStrided}));
  const uint64_t seed = bytes.byte();
  int64_t place = 0;
  p.attn_mask.fill([&](int64_t, int64_t, int64_t, int64_t) {
    const double x = value_at(seed, static_cast<uint64_t>(place++));
    if (p.attn_mask.dtype() == DType::kBool) return x > -1 ? 1.0 : 0.0;
    return x < -2 ? -HUGE_VAL : x;
  });
  p.alibi_slopes = Tensor(DType::kFloat32, {either(std::ssize(p.keys)), 1, nheads_q, 1});
  p.alibi_slopes.fill([&](int64_t b, int64_t, int64_t h, int64_t) {
    return 0.02 * static_cast<double>(b) + 0.1 * static_cast<double>(h);
  });
  p.sinks = Tensor(DType::kFloat32, {1, 1, nheads_q, 1});
  fill(bytes, p.q);
  fill(bytes, p.k);
  fill(bytes, p.v);
  p.sinks.fill([&](int64_t, int64_t, int64_t h, int64_t) {
    return value_at(seed + 1, static_cast<uint64_t>(h));
  });
  p.cu_seqlens_q = starts(p.queries);
  p.cu_seqlens_k = starts(p.keys);
  return true;
}

/// One sequence after the other, each as if there were no others.
void attend_alone(const Problem& p, const Context& context, Tensor& out, Tensor& lse) {
  int64_t first_query = 0;
  int64_t first_key = 0;
  for (size_t i = 0; i < p.queries.size(); ++i) {
    const int64_t queries = p.queries[i];
    const int64_t keys = p.keys[i];
    AttentionInputs own = {stretch(p.q.view(), 1, first_query, queries),
                           stretch(p.k.view(), 1, first_key, keys),
                           stretch(p.v.view(), 1, first_key, keys)};
    if (p.with_mask) {
      ConstTensorView mask = p.attn_mask.view();
      if (mask.shape[1] != 1) mask = stretch(mask, 1, first_query, queries);
      if (mask.shape[3] != 1) mask.shape[3] = keys;
      own.attn_mask = mask;
    }
    if (p.with_slopes) {
      const ConstTensorView slopes = p.alibi_slopes.view();
      own.alibi_slopes =
          slopes.shape[0] == 1 ? slopes : stretch(slopes, 0, static_cast<int64_t>(i), 1);
    }
    if (p.with_sinks) own.sinks = p.sinks.view();
    AttentionOutputs outputs = {stretch(out.view(), 1, first_query, queries)};
    if (p.with_lse) outputs.lse = stretch(lse.view(), 1, first_query, queries);
    const Status status = attention(own, outputs, p.options, context);
    expect(status.ok(), "sequence " + std::to_string(i) + " alone: " + status.message());
    first_query += queries;
    first_key += keys;
  }
}

/// Starts that are broken somewhere are refused, by name.
void check_refusal(ByteReader& bytes, Problem& p, const AttentionOutputs& outputs) {
  Tensor& cu_seqlens = bytes.one_in(2) ? p.cu_seqlens_q : p.cu_seqlens_k;
  const int64_t at = bytes.below(static_cast<uint32_t>(p.queries.size()) + 1);
  const double old = cu_seqlens.get(at, 0, 0, 0);
  const bool inside = at > 0 && at < std::ssize(p.queries);
  const double wrong =
      inside ? cu_seqlens.get(at - 1, 0, 0, 0) - 1 - bytes.byte() : old + 1 + bytes.byte();
  cu_seqlens.set(at, 0, 0, 0, wrong);
  const Status status = attention(p.inputs(), outputs, p.options, Context::cpu(1));
  expect(
      status.code() == StatusCode::kInvalidArgument && status.message().starts_with("cu_seqlens_"),
      "broken starts: " + (status.ok() ? "ok" : status.message()));
  cu_seqlens.set(at, 0, 0, 0, old);
}

int run(ByteReader& bytes) {
  Problem p;
  if (!read_problem(bytes, p)) return -1;
  AttentionOutputs outputs = {p.out.view()};
  if (p.with_lse) outputs.lse = p.lse.view();
  if (bytes.one_in(8)) check_refusal(bytes, p, outputs);
  const int32_t threads = bytes.pick({1, 2, 3});
  for (const IsaSupport& support : isa_support()) {
    if (!support.available) continue;
    const Status status =
        attention(p.inputs(), outputs, p.options, Context::with_isa(support.isa, threads));
    const std::string isa(to_string(support.isa));
    expect(status.ok(), isa + ": " + status.message());
    Tensor out = p.out;
    Tensor lse = p.lse;
    attend_alone(p, Context::with_isa(support.isa, 1), out, lse);
    expect(out.bytes() == p.out.bytes(), isa + ": out differs from that of each sequence alone");
    expect(lse.bytes() == p.lse.bytes(), isa + ": lse differs from that of each sequence alone");
  }
  return 0;
}

}  // namespace

std::vector<Bytes> seeds() { return {}; }

}  // namespace attn8::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  attn8::fuzz::ByteReader bytes(data, size);
  return attn8::fuzz::run(bytes);
}
