// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Packed sequences: cu_seqlens_q and cu_seqlens_k.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

/// Sequences of any lengths, one after the other, and what one of them alone looks like.
struct Packed {
  std::vector<int64_t> queries, keys;
  int64_t nheads_q = 4, nheads_k = 2, head_dim = 40, head_dim_v = 24;
  DType dtype = DType::kFloat32;
  Memory memory = Memory::kBshd;
  AttentionOptions options = {};
  bool attn_mask = false, alibi_slopes = false, sinks = false;
  int32_t threads = 1;
};

int64_t sum(const std::vector<int64_t>& lengths) {
  int64_t total = 0;
  for (const int64_t length : lengths) total += length;
  return total;
}

Tensor starts(const std::vector<int64_t>& lengths) {
  Tensor cu_seqlens(DType::kInt32, {std::ssize(lengths) + 1, 1, 1, 1});
  int64_t total = 0;
  cu_seqlens.set(0, 0, 0, 0, 0);
  for (size_t i = 0; i < lengths.size(); ++i) {
    total += lengths[i];
    cu_seqlens.set(static_cast<int64_t>(i) + 1, 0, 0, 0, static_cast<double>(total));
  }
  return cu_seqlens;
}

struct PackedInputs {
  Tensor q, k, v, attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k;
  AttentionInputs all;

  explicit PackedInputs(const Packed& c)
      : q(c.dtype, {1, sum(c.queries), c.nheads_q, c.head_dim}, c.memory),
        k(c.dtype, {1, sum(c.keys), c.nheads_k, c.head_dim}, c.memory),
        v(c.dtype, {1, sum(c.keys), c.nheads_k, c.head_dim_v}, c.memory),
        attn_mask(DType::kFloat32,
                  {1, sum(c.queries), 1, std::max<int64_t>(2, std::ranges::max(c.keys))}),
        alibi_slopes(DType::kFloat32, {std::ssize(c.keys), 1, c.nheads_q, 1}),
        sinks(DType::kFloat32, {1, 1, c.nheads_q, 1}),
        cu_seqlens_q(starts(c.queries)),
        cu_seqlens_k(starts(c.keys)) {
    q.fill_normal(1);
    k.fill_normal(2);
    v.fill_normal(3);
    attn_mask.fill_normal(4);
    alibi_slopes.fill([](int64_t b, int64_t, int64_t h, int64_t) {
      return 0.01 * static_cast<double>(b + 1) + 0.1 * static_cast<double>(h);
    });
    sinks.fill_normal(5);
    all = {q.view(), k.view(), v.view()};
    if (c.attn_mask) all.attn_mask = attn_mask.view();
    if (c.alibi_slopes) all.alibi_slopes = alibi_slopes.view();
    if (c.sinks) all.sinks = sinks.view();
    all.cu_seqlens_q = cu_seqlens_q.view();
    all.cu_seqlens_k = cu_seqlens_k.view();
  }
};

/// Tokens [first, first + count) of an operand.
Operand tokens(const Operand& x, int64_t first, int64_t count) {
  if (const auto* view = std::get_if<ConstTensorView>(&x)) return stretch(*view, 1, first, count);
  QuantizedView part = std::get<QuantizedView>(x);
  part.codes = stretch(part.codes, 1, first, count);
  if (part.scale.shape[1] != 1) part.scale = stretch(part.scale, 1, first, count);
  return part;
}

/// Runs all sequences in one call and each alone; expects the same bits.
void expect_as_alone(const Packed& c, const AttentionInputs& all, Isa isa) {
  const Context context = Context::with_isa(isa, c.threads);
  Tensor out(c.dtype, {1, sum(c.queries), c.nheads_q, c.head_dim_v});
  Tensor lse(DType::kFloat32, {1, sum(c.queries), c.nheads_q, 1});
  Tensor wanted = out;
  Tensor wanted_lse = lse;
  Status status = attention(all, {out.view(), lse.view()}, c.options, context);
  ASSERT_TRUE(status.ok()) << status.message();
  int64_t first_query = 0;
  int64_t first_key = 0;
  for (size_t i = 0; i < c.queries.size(); ++i) {
    const int64_t queries = c.queries[i];
    const int64_t keys = c.keys[i];
    AttentionInputs own = {tokens(all.q, first_query, queries), tokens(all.k, first_key, keys),
                           tokens(all.v, first_key, keys)};
    if (c.attn_mask) {
      own.attn_mask = stretch(*all.attn_mask, 1, first_query, queries);
      own.attn_mask->shape[3] = keys;
    }
    if (c.alibi_slopes) {
      own.alibi_slopes = stretch(*all.alibi_slopes, 0, static_cast<int64_t>(i), 1);
    }
    own.sinks = all.sinks;
    const AttentionOutputs outputs = {stretch(wanted.view(), 1, first_query, queries),
                                      stretch(wanted_lse.view(), 1, first_query, queries)};
    status = attention(own, outputs, c.options, Context::with_isa(isa, 1));
    ASSERT_TRUE(status.ok()) << status.message();
    first_query += queries;
    first_key += keys;
  }
  const std::string what = std::string(to_string(c.options.mode)) + " " +
                           std::string(to_string(c.options.v_granularity)) + " threads " +
                           std::to_string(c.threads);
  EXPECT_EQ(out.bytes(), wanted.bytes()) << what;
  EXPECT_EQ(lse.bytes(), wanted_lse.bytes()) << what;
}

constexpr Mode kKernelModes[] = {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact};

/// Prompts, chunks, single tokens, and sequences without queries or keys.
Packed mixed() {
  Packed c;
  c.queries = {1, 70, 0, 33, 1, 129, 5, 0, 1};
  c.keys = {300, 70, 12, 513, 1, 129, 0, 0, 64};
  return c;
}

class Ragged : public EachIsa {};

TEST_P(Ragged, EverySequenceGetsTheBitsItGetsAlone) {
  for (const Mode mode : kKernelModes) {
    for (const int32_t threads : {1, 3}) {
      Packed c = mixed();
      c.options.mode = mode;
      c.threads = threads;
      expect_as_alone(c, PackedInputs(c).all, GetParam());
      c.options.mask = {.causal = true};
      expect_as_alone(c, PackedInputs(c).all, GetParam());
      c.options.mask = {.align = CausalAlign::kTopLeft, .window_left = 40, .window_right = 3};
      c.options.kv_block = 64;
      expect_as_alone(c, PackedInputs(c).all, GetParam());
    }
  }
}

TEST_P(Ragged, WithEverythingThatChangesScores) {
  for (const Mode mode : kKernelModes) {
    Packed c = mixed();
    c.options.mode = mode;
    c.options.softcap = 4;
    c.options.mask = {.causal = true};
    c.attn_mask = c.alibi_slopes = c.sinks = true;
    c.threads = 2;
    expect_as_alone(c, PackedInputs(c).all, GetParam());
  }
}

TEST_P(Ragged, EveryTypeLayoutAndGranularity) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const Memory memory : {Memory::kBhsd, Memory::kStrided}) {
      for (const Granularity granularity :
           {Granularity::kToken, Granularity::kTensor, Granularity::kChannel, Granularity::kBlock,
            Granularity::kBlockChannel}) {
        Packed c = mixed();
        c.dtype = dtype;
        c.memory = memory;
        c.options.v_granularity = granularity;
        expect_as_alone(c, PackedInputs(c).all, GetParam());
      }
    }
  }
}

/// Parts of the keys (16384 or more of them) of several sequences in one call.
TEST_P(Ragged, SplitKeys) {
  Packed c;
  c.queries = {1, 2, 1, 3};
  c.keys = {20000, 100, 16384, 17000};
  c.nheads_q = 2;
  c.nheads_k = 1;
  c.head_dim = c.head_dim_v = 16;
  for (const Mode mode : {Mode::kAccurate, Mode::kExact}) {
    c.options.mode = mode;
    c.threads = 3;
    expect_as_alone(c, PackedInputs(c).all, GetParam());
  }
}

TEST_P(Ragged, QuantizedOperands) {
  for (const Granularity granularity :
       {Granularity::kToken, Granularity::kTensor, Granularity::kChannel}) {
    Packed c = mixed();
    PackedInputs inputs(c);
    const auto quantized = [&](const Tensor& x, const QuantSpec& spec, Tensor& codes,
                               Tensor& scale) {
      codes = Tensor(DType::kInt8, x.shape());
      scale = Tensor(DType::kFloat32, scale_shape(x.shape(), spec));
      const Status status = quantize(x.view(), spec, codes.view(), scale.view(), Context::cpu(1));
      EXPECT_TRUE(status.ok()) << status.message();
      return QuantizedView{std::as_const(codes).view(), std::as_const(scale).view(), spec};
    };
    Tensor q_codes, q_scale, k_codes, k_scale, v_codes, v_scale;
    inputs.all.q = quantized(inputs.q, {Granularity::kToken}, q_codes, q_scale);
    inputs.all.k = quantized(inputs.k, {Granularity::kToken}, k_codes, k_scale);
    inputs.all.v = quantized(inputs.v, {granularity}, v_codes, v_scale);
    expect_as_alone(c, inputs.all, GetParam());
  }
}

/// The oracle walks cu_seqlens on its own.
TEST_P(Ragged, WithinTheBoundsOfTheEmulation) {
  Packed c = mixed();
  c.options.mask = {.causal = true};
  c.options.softcap = 6;
  c.attn_mask = c.alibi_slopes = c.sinks = true;
  const PackedInputs inputs(c);
  Tensor out(DType::kFloat32, {1, sum(c.queries), c.nheads_q, c.head_dim_v});
  Tensor lse(DType::kFloat32, {1, sum(c.queries), c.nheads_q, 1});
  const AttentionOutputs outputs = {out.view(), lse.view()};
  Status status = attention(inputs.all, outputs, c.options, Context::with_isa(GetParam(), 1));
  ASSERT_TRUE(status.ok()) << status.message();
  const auto rows = static_cast<size_t>(sum(c.queries) * c.nheads_q);
  std::vector<double> want(rows * static_cast<size_t>(c.head_dim_v));
  std::vector<double> want_lse(rows);
  std::vector<double> bound(want.size());
  status = reference::emulation(inputs.all, reference::emulation_options(c.options), want, want_lse,
                                bound);
  ASSERT_TRUE(status.ok()) << status.message();
  const std::vector<double> got = out.values();
  const std::vector<double> got_lse = lse.values();
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], bound[i] + 1e-6 * std::fabs(want[i])) << "element " << i;
  }
  for (size_t i = 0; i < rows; ++i) {
    if (std::isinf(want_lse[i])) {
      ASSERT_EQ(got_lse[i], want_lse[i]) << "row " << i;
    } else {
      ASSERT_NEAR(got_lse[i], want_lse[i], 1e-4) << "row " << i;
    }
  }
}

TEST_P(Ragged, AlsoInFp8AndWithHeadModes) {
  Packed c = mixed();
  c.attn_mask = true;
  c.options.mode = Mode::kFp8;
  expect_as_alone(c, PackedInputs(c).all, GetParam());
  const Mode modes[] = {Mode::kHalf, Mode::kAccurate};
  c.options.mode = Mode::kAccurate;
  c.options.head_modes = modes;
  expect_as_alone(c, PackedInputs(c).all, GetParam());
}

/// The workspace is that of any lengths with these totals, and no byte beyond it is touched.
TEST_P(Ragged, OnePlanServesOtherLengths) {
  Packed c = mixed();
  c.options.v_granularity = Granularity::kChannel;
  const PackedInputs inputs(c);
  Tensor out(DType::kFloat32, {1, sum(c.queries), c.nheads_q, c.head_dim_v});
  const AttentionOutputs outputs = {out.view()};
  const Context context = Context::with_isa(GetParam(), 2);
  const auto plan = AttentionPlan::make(inputs.all, outputs, c.options, context);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  const size_t bytes = plan.value().workspace_bytes();
  constexpr size_t kGuard = 4096;
  std::vector<std::byte> memory(bytes + kGuard + 64, std::byte{0xA5});
  const size_t shift = 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
  Packed other = c;
  // As many blocks as these totals can have: one sequence has all but a key, the others begin one.
  other.queries.assign(c.queries.size(), 0);
  other.queries.back() = sum(c.queries);
  other.keys.assign(c.keys.size(), 1);
  other.keys.back() = sum(c.keys) - std::ssize(c.keys) + 1;
  for (const Packed* lengths : {&other, &c}) {
    const PackedInputs those(*lengths);
    AttentionInputs all = inputs.all;
    all.cu_seqlens_q = those.all.cu_seqlens_q;
    all.cu_seqlens_k = those.all.cu_seqlens_k;
    const Status status = plan.value().run(all, outputs, {memory.data() + shift, bytes});
    ASSERT_TRUE(status.ok()) << status.message();
    Tensor alone = out;
    const AttentionOutputs again = {alone.view()};
    ASSERT_TRUE(attention(all, again, c.options, context).ok());
    EXPECT_EQ(out.bytes(), alone.bytes());
  }
  EXPECT_TRUE(std::all_of(memory.begin() + static_cast<long>(shift + bytes), memory.end(),
                          [](std::byte b) { return b == std::byte{0xA5}; }));
}

ATTN8_INSTANTIATE_EACH_ISA(Ragged);

TEST(RaggedErrors, NameTheArgument) {
  Packed c = mixed();
  c.attn_mask = c.alibi_slopes = true;
  PackedInputs inputs(c);
  Tensor out(DType::kFloat32, {1, sum(c.queries), c.nheads_q, c.head_dim_v});
  const auto refused = [&](const std::string& message,
                           const std::function<void(AttentionInputs&)>& change) {
    AttentionInputs changed = inputs.all;
    change(changed);
    const Status status = attention(changed, {out.view()}, c.options, Context::cpu(1));
    EXPECT_EQ(to_string(status.code()), to_string(StatusCode::kInvalidArgument));
    EXPECT_EQ(status.message(), message);
  };
  refused("cu_seqlens_q is set alone, wants cu_seqlens_q and cu_seqlens_k",
          [](AttentionInputs& all) { all.cu_seqlens_k.reset(); });
  refused("cu_seqlens_k is set alone, wants cu_seqlens_q and cu_seqlens_k",
          [](AttentionInputs& all) { all.cu_seqlens_q.reset(); });
  refused("cu_seqlens_k.shape got [9, 1, 1, 1], wants [10, 1, 1, 1]",
          [](AttentionInputs& all) { all.cu_seqlens_k->shape[0] = 9; });
  refused("cu_seqlens_q.dtype got float32, wants int32",
          [](AttentionInputs& all) { all.cu_seqlens_q->dtype = DType::kFloat32; });
  refused("seqlens_k is set beside cu_seqlens_k, wants one of the two", [&](AttentionInputs& all) {
    all.seqlens_k = all.cu_seqlens_k;
    all.seqlens_k->shape[0] = 1;
  });
  refused("q.shape[0]=0 (batch) wants 1 with cu_seqlens_q: [1, total, ...]",
          [&](AttentionInputs& all) {
            std::get<ConstTensorView>(all.q).shape[0] = 0;
            std::get<ConstTensorView>(all.k).shape[0] = 0;
            std::get<ConstTensorView>(all.v).shape[0] = 0;
          });
  refused("attn_mask.shape[3]=512 wants 1 or at least 513, the tokens of the longest sequence",
          [](AttentionInputs& all) { all.attn_mask->shape[3] = 512; });
  refused("alibi_slopes.shape got [8, 1, 4, 1], wants [9, 1, 4, 1] or a first extent of 1",
          [](AttentionInputs& all) { all.alibi_slopes->shape[0] = 8; });
  const auto set = [&](Tensor& cu_seqlens, int64_t i, double value, const std::string& message) {
    const double old = cu_seqlens.get(i, 0, 0, 0);
    cu_seqlens.set(i, 0, 0, 0, value);
    refused(message, [](AttentionInputs&) {});
    cu_seqlens.set(i, 0, 0, 0, old);
  };
  set(inputs.cu_seqlens_q, 0, 1, "cu_seqlens_q runs from 1 to 240, wants 0 to q.shape[1]=240");
  set(inputs.cu_seqlens_q, 9, 239, "cu_seqlens_q runs from 0 to 239, wants 0 to q.shape[1]=240");
  set(inputs.cu_seqlens_k, 9, 1090, "cu_seqlens_k runs from 0 to 1090, wants 0 to k.shape[1]=1089");
  set(inputs.cu_seqlens_k, 2, 299, "cu_seqlens_k[2]=299 wants at least the 300 before it");
  set(inputs.cu_seqlens_q, 3, -1, "cu_seqlens_q[3]=-1 wants at least the 71 before it");
}

TEST(RaggedErrors, AVOfBlocksIsRefused) {
  Packed c = mixed();
  PackedInputs inputs(c);
  const QuantSpec spec = {Granularity::kBlock, 256};
  Tensor codes(DType::kInt8, inputs.v.shape());
  Tensor scale(DType::kFloat32, scale_shape(inputs.v.shape(), spec));
  ASSERT_TRUE(
      quantize(std::as_const(inputs.v).view(), spec, codes.view(), scale.view(), Context::cpu(1))
          .ok());
  inputs.all.v = QuantizedView{std::as_const(codes).view(), std::as_const(scale).view(), spec};
  Tensor out(DType::kFloat32, {1, sum(c.queries), c.nheads_q, c.head_dim_v});
  const Status status = attention(inputs.all, {out.view()}, c.options, Context::cpu(1));
  EXPECT_EQ(status.message(),
            "v.spec.granularity got block, wants token, tensor or channel with cu_seqlens_k");
}

TEST(RaggedErrors, APlanKeepsItsNumberOfSequences) {
  const Packed c = mixed();
  const PackedInputs inputs(c);
  Tensor out(DType::kFloat32, {1, sum(c.queries), c.nheads_q, c.head_dim_v});
  const AttentionOutputs outputs = {out.view()};
  const auto plan = AttentionPlan::make(inputs.all, outputs, c.options, Context::cpu(1));
  ASSERT_TRUE(plan.ok());
  AttentionInputs fewer = inputs.all;
  fewer.cu_seqlens_q->shape[0] = 9;
  fewer.cu_seqlens_k->shape[0] = 9;
  AttentionInputs none = inputs.all;
  none.cu_seqlens_q.reset();
  none.cu_seqlens_k.reset();
  for (const AttentionInputs* other : {&fewer, &none}) {
    EXPECT_EQ(plan.value().run(*other, outputs, {}).message(),
              "operands do not have the dtypes, lengths and outputs the plan was made for");
  }
}

TEST(RaggedErrors, NoSequencesAreNothingToDo) {
  Packed c;
  c.queries = c.keys = {0};
  PackedInputs inputs(c);
  inputs.all.cu_seqlens_q->shape[0] = 1;
  inputs.all.cu_seqlens_k->shape[0] = 1;
  Tensor out(DType::kFloat32, {1, 0, c.nheads_q, c.head_dim_v});
  const Status status = attention(inputs.all, {out.view()}, c.options, Context::cpu(1));
  EXPECT_TRUE(status.ok()) << status.message();
}

}  // namespace
}  // namespace attn8::testing
