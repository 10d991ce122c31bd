// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// What changes scores, the modes and the head_dim of V of attention over pages: the bits of
// attention() over what the model says is stored.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "attn8/kv_cache.hpp"
#include "kv_cache/cache_model.hpp"
#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr int32_t kPage = 64;
constexpr double kInf = std::numeric_limits<double>::infinity();

/// Sequences of one cache with their models, and the queries of a batch of all of them.
struct Batch {
  Batch(int64_t heads, int64_t dim, int64_t dim_v, const std::vector<int64_t>& lengths,
        const std::vector<int64_t>& queries, int64_t group, const Context& context)
      : cache(KvCache::make({.nheads_k = heads,
                             .head_dim = dim,
                             .head_dim_v = dim_v,
                             .page_size = kPage,
                             .max_pages = 64})
                  .value()) {
    for (size_t i = 0; i < lengths.size(); ++i) {
      sequences.push_back(cache.create().value());
      models.emplace_back(heads, dim, true, dim_v);
      // In two appends, so that a page is also filled up.
      for (const int64_t count : {lengths[i] * 2 / 3, lengths[i] - lengths[i] * 2 / 3}) {
        Tensor k(DType::kFloat32, {1, count, heads, dim});
        Tensor v(DType::kFloat16, {1, count, heads, models.back().dim_v()}, Memory::kStrided);
        k.fill_normal(10 + i + static_cast<uint64_t>(count));
        v.fill_normal(90 + i + static_cast<uint64_t>(count));
        const Status status = cache.append(sequences.back(), k.view(), v.view(), context);
        EXPECT_TRUE(status.ok()) << status.message();
        models.back().append(k, v);
      }
      cu_seqlens_q.push_back(cu_seqlens_q.back() + static_cast<int32_t>(queries[i]));
    }
    q = Tensor(DType::kFloat32, {1, cu_seqlens_q.back(), heads * group, dim});
    q.fill_normal(3);
  }

  [[nodiscard]] Attended attend(const KvCacheAttentionOptions& options,
                                const Context& context) const {
    const Extents& s = q.shape();
    Attended got = {Tensor(DType::kFloat32, {1, s[1], s[2], models.front().dim_v()}),
                    Tensor(DType::kFloat32, {1, s[1], s[2], 1})};
    const Status status = cache.attend(sequences, q.view(), cu_seqlens_q,
                                       {got.out.view(), got.lse.view()}, options, context);
    EXPECT_TRUE(status.ok()) << status.message();
    return got;
  }

  void expect_follows_the_model(const KvCacheAttentionOptions& options, const Context& context,
                                const std::string& what) const {
    const Attended got = attend(options, context);
    for (size_t i = 0; i < models.size(); ++i) {
      const int64_t first = cu_seqlens_q[i];
      const int64_t rows = cu_seqlens_q[i + 1] - first;
      if (rows == 0) continue;
      const Attended wanted = attend_model(models[i], q, first, rows, kPage, options, context);
      for (int64_t s = 0; s < rows; ++s) {
        for (int64_t h = 0; h < q.shape()[2]; ++h) {
          const double lse = got.lse.get(0, first + s, h, 0);
          const double wanted_lse = wanted.lse.get(0, s, h, 0);
          ASSERT_TRUE(lse == wanted_lse || (std::isnan(lse) && std::isnan(wanted_lse)))
              << what << " sequence " << i << " row " << s << " head " << h << ": " << lse
              << " wants " << wanted_lse;
          for (int64_t d = 0; d < models[i].dim_v(); ++d) {
            const double x = got.out.get(0, first + s, h, d);
            const double y = wanted.out.get(0, s, h, d);
            ASSERT_TRUE(x == y || (std::isnan(x) && std::isnan(y)))
                << what << " sequence " << i << " row " << s << " head " << h << ": " << x
                << " wants " << y;
          }
        }
      }
    }
  }

  KvCache cache;
  std::vector<KvSequence> sequences;
  std::vector<ModelSequence> models;
  std::vector<int32_t> cu_seqlens_q = {0};
  Tensor q;
};

const std::vector<int64_t> kLengths = {150, 1, 0, 64, 210};
const std::vector<int64_t> kQueries = {1, 3, 2, 70, 5};
constexpr int64_t kTotal = 81;

class KvCacheOptionsTest : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(KvCacheOptionsTest);

TEST_P(KvCacheOptionsTest, HeadDimOfV) {
  const Context context = Context::with_isa(GetParam(), 2);
  struct Dims {
    int64_t dim, dim_v;
  };
  for (const auto& [dim, dim_v] : {Dims{24, 64}, {128, 20}, {1, 256}, {40, 0}, {80, 96}}) {
    const Batch batch(2, dim, dim_v, kLengths, kQueries, 2, context);
    EXPECT_EQ(batch.cache.options().head_dim_v, dim_v == 0 ? dim : dim_v);
    for (const Mode mode : {Mode::kAccurate, Mode::kHalf, Mode::kExact}) {
      batch.expect_follows_the_model({.mode = mode, .mask = {.causal = true}}, context,
                                     std::to_string(dim) + " and " + std::to_string(dim_v) +
                                         " in " + std::string(to_string(mode)));
    }
  }
}

/// Masks of every broadcast and type, with keys to spare, over sequences of every length.
TEST_P(KvCacheOptionsTest, ScoreOperands) {
  const Context context = Context::with_isa(GetParam());
  const Batch batch(2, 32, 0, kLengths, kQueries, 2, context);
  Tensor slopes(DType::kFloat32, {1, 1, 4, 1});
  slopes.fill([](int64_t, int64_t, int64_t h, int64_t) { return 0.02 * static_cast<double>(h); });
  Tensor sinks(DType::kFloat32, {1, 1, 4, 1});
  sinks.fill_normal(8);
  struct MaskOf {
    DType dtype;
    Extents shape;
    Memory memory;
  };
  const MaskOf masks[] = {
      {DType::kBool, {1, kTotal, 4, 210}, Memory::kBshd},
      {DType::kBool, {1, 1, 1, 230}, Memory::kReversed},
      {DType::kFloat32, {1, kTotal, 1, 256}, Memory::kStrided},
      {DType::kBFloat16, {1, kTotal, 4, 1}, Memory::kBshd},
      {DType::kFloat16, {1, 1, 4, 211}, Memory::kBhsd},
  };
  for (const MaskOf& of : masks) {
    Tensor mask(of.dtype, of.shape, of.memory);
    mask.fill([&](int64_t, int64_t s, int64_t h, int64_t d) {
      const bool hidden = (3 * s + h + 5 * d) % 7 == 2 || s == 77;
      if (of.dtype == DType::kBool) return hidden ? 0.0 : 1.0;
      return hidden ? -kInf : normal_at(5, static_cast<uint64_t>((s * 4 + h) * 300 + d));
    });
    for (const Mode mode : {Mode::kAccurate, Mode::kHalf, Mode::kExact}) {
      KvCacheAttentionOptions options = {.mode = mode, .mask = {.causal = true}};
      options.attn_mask = mask.view();
      const std::string what = std::string(to_string(of.dtype)) + " mask of " +
                               std::to_string(of.shape[3]) + " keys in " +
                               std::string(to_string(mode));
      batch.expect_follows_the_model(options, context, what);
      options.softcap = 4;
      options.alibi_slopes = slopes.view();
      options.sinks = sinks.view();
      // In `accurate` all keys of a cache count, also those outside of the window; not so in a
      // call.
      if (mode != Mode::kAccurate) options.mask.window_left = 100;
      batch.expect_follows_the_model(options, context, what + " and all else");
    }
  }
}

TEST_P(KvCacheOptionsTest, AModePerHead) {
  const Context context = Context::with_isa(GetParam(), 2);
  const Batch batch(4, 16, 24, kLengths, kQueries, 2, context);
  Tensor mask(DType::kFloat32, {1, kTotal, 8, 210});
  mask.fill_normal(4);
  Tensor sinks(DType::kFloat32, {1, 1, 8, 1});
  sinks.fill_normal(8);
  using enum Mode;
  for (const std::vector<Mode>& modes : {std::vector{kExact, kAccurate, kAccurate, kHalf},
                                         {kAccurate, kAccurate, kAccurate, kAccurate},
                                         {kHalf, kHalf, kAccurate, kExact}}) {
    KvCacheAttentionOptions options = {.mode = kExact, .head_modes = modes};
    options.attn_mask = mask.view();
    options.sinks = sinks.view();
    batch.expect_follows_the_model(options, context, "modes");
  }
}

/// What `half` and `exact` are for: nearer to float64 over the stored tokens than `accurate`.
TEST_P(KvCacheOptionsTest, OtherModesErrLess) {
  const Context context = Context::with_isa(GetParam());
  const Batch batch(1, 64, 0, {500}, {9}, 2, context);
  const ModelSequence& model = batch.models.front();
  std::vector<double> exact(9 * 2 * 64), lse(9 * 2);
  ASSERT_TRUE(reference::exact_attention(batch.q.view(), model.k().restored().view(),
                                         model.v().dequantized().view(), std::nullopt, {}, exact,
                                         lse)
                  .ok());
  const auto error = [&](Mode mode) {
    const Attended got = batch.attend({.mode = mode}, context);
    const std::vector<double> got_lse = got.lse.values();
    for (size_t i = 0; i < lse.size(); ++i) EXPECT_NEAR(got_lse[i], lse[i], 0.02) << i;
    return reference::error_report(got.out.values(), exact).rel_l2;
  };
  EXPECT_LT(error(Mode::kExact), 1e-5);
  EXPECT_LT(error(Mode::kHalf), error(Mode::kAccurate));
}

/// A token that is not finite, in every mode; a mask that hides it keeps the rows clean.
TEST_P(KvCacheOptionsTest, PoisonStaysWithTheRowsThatSeeIt) {
  const Context context = Context::with_isa(GetParam());
  Batch batch(1, 16, 0, {100}, {4}, 1, context);
  Tensor k(DType::kFloat32, {1, 1, 1, 16});
  k.fill_normal(1);
  Tensor v = k;
  k.set(0, 0, 0, 3, kInf);
  ASSERT_TRUE(batch.cache.append(batch.sequences[0], k.view(), v.view(), context).ok());
  batch.models[0].append(k, v);
  Tensor mask(DType::kBool, {1, 4, 1, 101});
  mask.fill([](int64_t, int64_t s, int64_t, int64_t d) { return s < 2 && d == 100 ? 0.0 : 1.0; });
  for (const Mode mode : {Mode::kAccurate, Mode::kHalf, Mode::kExact}) {
    KvCacheAttentionOptions options = {.mode = mode};
    options.attn_mask = mask.view();
    const Attended got = batch.attend(options, context);
    for (int64_t s = 0; s < 4; ++s) {
      EXPECT_EQ(std::isnan(got.out.get(0, s, 0, 0)), s >= 2) << to_string(mode) << " row " << s;
      EXPECT_EQ(std::isnan(got.lse.get(0, s, 0, 0)), s >= 2) << to_string(mode) << " row " << s;
    }
  }
}

TEST(KvCacheOptions, RefusesWhatIsWrong) {
  Batch batch(2, 16, 24, {100, 70}, {2, 2}, 2, Context());
  Tensor out(DType::kFloat32, {1, 4, 4, 24});
  const auto refused = [&](const KvCacheAttentionOptions& options, StatusCode code,
                           const std::string& message) {
    const auto before = out.bytes();
    const Status status = batch.cache.attend(batch.sequences, batch.q.view(), batch.cu_seqlens_q,
                                             {out.view()}, options, Context());
    EXPECT_EQ(to_string(status.code()), to_string(code));
    EXPECT_EQ(status.message(), message);
    EXPECT_EQ(out.bytes(), before);
  };
  const auto with_mask = [](const Tensor& mask) {
    KvCacheAttentionOptions options;
    options.attn_mask = mask.view();
    return options;
  };
  constexpr auto kInvalid = StatusCode::kInvalidArgument;
  refused(with_mask(Tensor(DType::kBool, {1, 4, 1, 99})), kInvalid,
          "attn_mask.shape[3]=99 wants 1 or at least 100, the tokens of the longest sequence");
  refused(with_mask(Tensor(DType::kBool, {1, 3, 1, 100})), kInvalid,
          "attn_mask.shape got [1, 3, 1, 100], wants [1, 4, 4, 100] (batch, seqlen_q, nheads_q, "
          "seqlen_k), each also 1");
  refused(with_mask(Tensor(DType::kBool, {2, 4, 1, 100})), kInvalid,
          "attn_mask.shape got [2, 4, 1, 100], wants [1, 4, 4, 100] (batch, seqlen_q, nheads_q, "
          "seqlen_k), each also 1");
  refused(with_mask(Tensor(DType::kInt32, {1, 4, 1, 100})), kInvalid,
          "attn_mask.dtype got int32, wants bool, float32, float16 or bfloat16");
  KvCacheAttentionOptions in_out = with_mask(Tensor(DType::kFloat32, {1, 1, 1, 100}));
  in_out.attn_mask->data = out.bytes().data();
  refused(in_out, kInvalid, "out overlaps attn_mask, wants memory of its own");
  for (const Mode mode : {Mode::kPaper, Mode::kFp8}) {
    refused({.mode = mode}, StatusCode::kUnsupported,
            "options.mode got " + std::string(to_string(mode)) +
                ", a cache of INT8 tokens wants accurate, half or exact");
  }
  refused({.mode = static_cast<Mode>(77)}, kInvalid, "options.mode is not a value of attn8::Mode");
  const std::vector<Mode> modes = {Mode::kExact};
  refused({.head_modes = modes}, kInvalid, "options.head_modes got 1 modes, wants nheads_k=2");
  const std::vector<Mode> paper = {Mode::kExact, Mode::kPaper};
  refused({.head_modes = paper}, StatusCode::kUnsupported,
          "options.mode got paper, a cache of INT8 tokens wants accurate, half or exact");
  Tensor codes(DType::kInt8, batch.q.shape());
  codes.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0; });
  Tensor scale(DType::kFloat32, {1, 4, 4, 1});
  scale.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0; });
  const QuantizedView q = {codes.view(), scale.view(), {Granularity::kToken}};
  const std::vector<Mode> exact = {Mode::kAccurate, Mode::kExact};
  const Status status = batch.cache.attend(batch.sequences, q, batch.cu_seqlens_q, {out.view()},
                                           {.head_modes = exact}, Context());
  EXPECT_EQ(status.message(), "q got int8 codes, mode exact wants float");
  Tensor narrow(DType::kFloat32, {1, 4, 4, 16});
  EXPECT_EQ(batch.cache
                .attend(batch.sequences, batch.q.view(), batch.cu_seqlens_q, {narrow.view()}, {},
                        Context())
                .message(),
            "out.shape got [1, 4, 4, 16], wants [1, 4, 4, 24], as q and head_dim_v");
  const Tensor k(DType::kFloat32, {1, 1, 2, 16});
  EXPECT_EQ(batch.cache.append(batch.sequences[0], k.view(), k.view(), Context()).message(),
            "v.shape got [1, 1, 2, 16], wants [1, 1, 2, 24], as k and head_dim_v");
  EXPECT_EQ(KvCache::make({.nheads_k = 1, .head_dim = 8, .head_dim_v = 257, .max_pages = 1})
                .status()
                .message(),
            "options.head_dim_v got 257, wants 0 to 256");
}

}  // namespace
}  // namespace attn8::testing
