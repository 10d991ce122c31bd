// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "attn8/kv_cache.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kv_cache/cache_model.hpp"
#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

void expect_ok(const Status& status) { ASSERT_TRUE(status.ok()) << status.message(); }

void expect_refused(const Status& status, StatusCode code, const std::string& message) {
  EXPECT_EQ(to_string(status.code()), to_string(code)) << status.message();
  EXPECT_EQ(status.message(), message);
}

KvCache make_cache(const KvCacheOptions& options) {
  Result<KvCache> cache = KvCache::make(options);
  EXPECT_TRUE(cache.ok()) << cache.status().message();
  return cache.value();
}

KvSequence create(KvCache& cache) {
  const Result<KvSequence> sequence = cache.create();
  EXPECT_TRUE(sequence.ok());
  return sequence.value();
}

int64_t length_of(const KvCache& cache, KvSequence sequence) {
  const Result<int64_t> length = cache.length(sequence);
  EXPECT_TRUE(length.ok()) << length.status().message();
  return length.value();
}

/// N(0, 1) with an outlier row now and then and a bias that smoothing removes.
Tensor tokens(int64_t count, int64_t heads, int64_t dim, uint64_t seed,
              DType dtype = DType::kFloat32, Memory memory = Memory::kBshd) {
  Tensor x(dtype, {1, count, heads, dim}, memory);
  x.fill([&](int64_t, int64_t s, int64_t h, int64_t d) {
    const auto index = static_cast<uint64_t>((s * heads + h) * dim + d);
    return normal_at(seed, index) * ((s + h) % 7 == 3 ? 20 : 1) + (d % 5 == 0 ? 2 : 0);
  });
  return x;
}

/// Rows [begin, end) of x.
Tensor rows_of(const Tensor& x, int64_t begin, int64_t end) {
  Tensor part(x.dtype(), {1, end - begin, x.shape()[2], x.shape()[3]});
  part.fill([&](int64_t, int64_t s, int64_t h, int64_t d) { return x.get(0, begin + s, h, d); });
  return part;
}

Attended outputs_for(const Tensor& q) {
  const Extents& s = q.shape();
  return {Tensor(DType::kFloat32, s), Tensor(DType::kFloat32, {s[0], s[1], s[2], 1})};
}

Attended attend(const KvCache& cache, const std::vector<KvSequence>& sequences, const Tensor& q,
                const std::vector<int32_t>& cu_seqlens_q, const KvCacheAttentionOptions& options,
                const Context& context) {
  Attended result = outputs_for(q);
  const Status status = cache.attend(sequences, q.view(), cu_seqlens_q,
                                     {result.out.view(), result.lse.view()}, options, context);
  EXPECT_TRUE(status.ok()) << status.message();
  return result;
}

/// attention() over one contiguous sequence.
Attended contiguous(const Tensor& q, const Operand& k, const Operand& v, int32_t kv_block,
                    bool smooth_k, const KvCacheAttentionOptions& options, const Context& context) {
  Attended result = outputs_for(q);
  const AttentionOptions all = {.softmax_scale = options.softmax_scale,
                                .mask = options.mask,
                                .kv_block = kv_block,
                                .smooth_k = smooth_k};
  const Status status =
      attention({q.view(), k, v}, {result.out.view(), result.lse.view()}, all, context);
  EXPECT_TRUE(status.ok()) << status.message();
  return result;
}

void expect_same(const Attended& got, const Attended& wanted, const std::string& what) {
  EXPECT_EQ(got.out.bytes(), wanted.out.bytes()) << what;
  EXPECT_EQ(got.lse.bytes(), wanted.lse.bytes()) << what;
}

/// Of the LSE: half a step of the score grid, ln(2) / 128 = 0.0054, and what the weights of tokens
/// with a V a twentieth of the page's largest lose when they are cut to integers; measured 0.0062.
constexpr double kGridBound = 0.01;

/// Relative L2 error of out against float64 attention over what the model says is stored, the
/// queries quantized too: what remains is what the score grid and P round.
double model_error(const Attended& got, const Tensor& q, const ModelSequence& model,
                   const KvCacheAttentionOptions& options, double lse_bound = kGridBound) {
  std::vector<double> exact(got.out.values().size());
  std::vector<double> lse(got.lse.values().size());
  const ModelSequence::Quantized k = model.k();
  const Tensor rounded_q = through_codes(q);
  expect_ok(reference::exact_attention(rounded_q.view(), k.dequantized().view(),
                                       model.v().dequantized().view(), options.softmax_scale,
                                       options.mask, exact, lse));
  const std::vector<double> got_lse = got.lse.values();
  const auto& [batch, seqlen_q, nheads_q, dim] = q.shape();
  const int64_t group = nheads_q / k.codes.shape()[2];
  for (size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(lse[i])) {
      EXPECT_EQ(got_lse[i], lse[i]);
      continue;
    }
    const int64_t row = static_cast<int64_t>(i) / nheads_q;
    const int64_t head = static_cast<int64_t>(i) % nheads_q;
    double mean_score = 0;
    for (int64_t d = 0; k.with_mean && d < dim; ++d) {
      mean_score += q.get(0, row, head, d) * k.mean.get(0, 0, head / group, d);
    }
    mean_score *= options.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(dim)));
    EXPECT_NEAR(got_lse[i], lse[i] + mean_score, lse_bound + 1e-5 * std::fabs(lse[i] + mean_score));
  }
  return reference::error_report(got.out.values(), exact).rel_l2;
}

class KvCacheTest : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(KvCacheTest);

/// All tokens in one append: the bits of attention() on the same floats.
TEST_P(KvCacheTest, OneAppendEqualsContiguous) {
  struct Shape {
    int64_t seqlen_q, seqlen_k, nheads_q, nheads_k, head_dim;
    int32_t page_size;
    DType dtype;
    Memory memory;
  };
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 64, DType::kFloat32, Memory::kBshd},
      {3, 63, 2, 1, 16, 64, DType::kFloat32, Memory::kBhsd},
      {5, 64, 4, 2, 20, 64, DType::kFloat16, Memory::kStrided},
      {70, 65, 3, 3, 40, 64, DType::kBFloat16, Memory::kReversed},
      {1, 300, 8, 2, 64, 256, DType::kFloat32, Memory::kBshd},
      {90, 700, 4, 2, 128, 256, DType::kFloat16, Memory::kBshd},
      {2, 1023, 4, 1, 256, 512, DType::kFloat32, Memory::kBshd},
      {1, 17000, 2, 1, 32, 192, DType::kFloat32, Memory::kBshd},  // in parts of the keys
  };
  uint64_t seed = 1;
  for (const Shape& shape : shapes) {
    const Tensor k =
        tokens(shape.seqlen_k, shape.nheads_k, shape.head_dim, ++seed, shape.dtype, shape.memory);
    const Tensor v =
        tokens(shape.seqlen_k, shape.nheads_k, shape.head_dim, ++seed, shape.dtype, shape.memory);
    const Tensor q =
        tokens(shape.seqlen_q, shape.nheads_q, shape.head_dim, ++seed, shape.dtype, shape.memory);
    for (const bool smooth_k : {false, true}) {
      KvCache cache = make_cache({.nheads_k = shape.nheads_k,
                                  .head_dim = shape.head_dim,
                                  .page_size = shape.page_size,
                                  .max_pages = 100,
                                  .smooth_k = smooth_k});
      const KvSequence sequence = create(cache);
      const Context context = Context::with_isa(GetParam(), 2);
      expect_ok(cache.append(sequence, k.view(), v.view(), context));
      for (const bool causal : {false, true}) {
        const KvCacheAttentionOptions options = {.mask = {.causal = causal}};
        // Rows before key 0 see nothing; where the first sees a key, every key counts in both.
        const Attended wanted =
            contiguous(q, k.view(), v.view(), shape.page_size, smooth_k, options, context);
        const Attended got = attend(cache, {sequence}, q, {0, static_cast<int32_t>(shape.seqlen_q)},
                                    options, context);
        expect_same(got, wanted,
                    "seqlen_k " + std::to_string(shape.seqlen_k) + " head_dim " +
                        std::to_string(shape.head_dim) + (smooth_k ? " smooth" : "") +
                        (causal ? " causal" : ""));
      }
    }
  }
}

/// However the tokens arrive, their codes, scales and folds are the same.
TEST_P(KvCacheTest, AppendsOneByOneEqualTheModel) {
  constexpr int64_t kHeads = 2;
  constexpr int64_t kDim = 24;
  constexpr int64_t kTokens = 210;
  const Context context = Context::with_isa(GetParam());
  const Tensor k = tokens(kTokens, kHeads, kDim, 1);
  const Tensor v = tokens(kTokens, kHeads, kDim, 2);
  const Tensor q = tokens(3, 4, kDim, 3);
  KvCache cache =
      make_cache({.nheads_k = kHeads, .head_dim = kDim, .page_size = 128, .max_pages = 4});
  const KvSequence sequence = create(cache);
  ModelSequence model(kHeads, kDim, true);
  int64_t done = 0;
  for (const int64_t count : {40, 1, 1, 22, 1, 62, 1, 1, 81}) {
    const Tensor more_k = rows_of(k, done, done + count);
    const Tensor more_v = rows_of(v, done, done + count);
    expect_ok(cache.append(sequence, more_k.view(), more_v.view(), context));
    model.append(more_k, more_v);
    done += count;
    ASSERT_EQ(length_of(cache, sequence), done);
    const Attended got = attend(cache, {sequence}, q, {0, 3}, {}, context);
    expect_same(got, contiguous(q, model.k().view(), model.v().view(), 128, false, {}, context),
                std::to_string(done) + " tokens");
    // 2 %: what rounding Q and P costs such rows.
    EXPECT_LT(model_error(got, q, model, {}), 0.02) << done << " tokens";
  }
  ASSERT_EQ(done, kTokens);
}

/// V scales that span more than r can: codes shrink when a larger token arrives. One append gives
/// the contiguous bits, several what differs by the second rounding of tokens that hardly count.
TEST_P(KvCacheTest, ScalesOfVThatSpanMoreThanTheFold) {
  constexpr int64_t kTokens = 100;
  // A token 2^16 below the largest V of its page has one bit left in the denominator; measured
  // 0.014.
  constexpr double kFoldBound = 0.03;
  const Context context = Context::with_isa(GetParam());
  const Tensor k = tokens(kTokens, 1, 16, 1);
  Tensor v = tokens(kTokens, 1, 16, 2);
  const Tensor plain = v;
  v.fill([&](int64_t, int64_t s, int64_t h, int64_t d) {
    return plain.get(0, s, h, d) * std::exp2(s / 4 % 24 - 4.0) * (s % 13 == 5 ? 0 : 1);
  });
  const Tensor q = tokens(5, 1, 16, 3);
  KvCache cache = make_cache({.nheads_k = 1, .head_dim = 16, .page_size = 64, .max_pages = 20});
  const KvSequence once = create(cache);
  expect_ok(cache.append(once, k.view(), v.view(), context));
  const Attended wanted = contiguous(q, k.view(), v.view(), 64, true, {}, context);
  const Attended got = attend(cache, {once}, q, {0, 5}, {}, context);
  expect_same(got, wanted, "one append");

  KvCache rough = make_cache(
      {.nheads_k = 1, .head_dim = 16, .page_size = 64, .max_pages = 20, .smooth_k = false});
  const KvSequence piecemeal = create(rough);
  ModelSequence model(1, 16, false);
  for (int64_t s = 0; s < kTokens; ++s) {
    const Tensor one_k = rows_of(k, s, s + 1);
    const Tensor one_v = rows_of(v, s, s + 1);
    expect_ok(rough.append(piecemeal, one_k.view(), one_v.view(), context));
    model.append(one_k, one_v);
    if (s % 9 != 0 && s + 1 != kTokens) continue;
    EXPECT_LT(
        model_error(attend(rough, {piecemeal}, q, {0, 5}, {}, context), q, model, {}, kFoldBound),
        0.02)
        << s + 1 << " tokens";
  }
  // Down to where only small tokens are left of the last page.
  for (const int64_t length : {70, 66, 20}) {
    expect_ok(rough.truncate(piecemeal, length));
    model.truncate(length);
    EXPECT_LT(
        model_error(attend(rough, {piecemeal}, q, {0, 5}, {}, context), q, model, {}, kFoldBound),
        0.02)
        << "cut to " << length;
  }
}

/// Prefill, chunked prefill, decode and nothing in one call: each as if alone, for any threads.
TEST_P(KvCacheTest, RaggedBatch) {
  constexpr int64_t kHeads = 2;
  constexpr int64_t kDim = 64;
  const std::vector<int64_t> lengths = {300, 0, 17, 129, 640, 1, 64};
  const std::vector<int64_t> queries = {1, 2, 17, 60, 0, 3, 1};
  KvCache cache =
      make_cache({.nheads_k = kHeads, .head_dim = kDim, .page_size = 128, .max_pages = 20});
  std::vector<KvSequence> sequences;
  std::vector<ModelSequence> models;
  std::vector<int32_t> cu_seqlens_q = {0};
  for (size_t i = 0; i < lengths.size(); ++i) {
    sequences.push_back(create(cache));
    models.emplace_back(kHeads, kDim, true);
    const Tensor k = tokens(lengths[i], kHeads, kDim, 10 + i);
    const Tensor v = tokens(lengths[i], kHeads, kDim, 20 + i);
    expect_ok(cache.append(sequences[i], k.view(), v.view(), Context()));
    models[i].append(k, v);
    cu_seqlens_q.push_back(cu_seqlens_q.back() + static_cast<int32_t>(queries[i]));
  }
  const Tensor q = tokens(cu_seqlens_q.back(), 3 * kHeads, kDim, 5, DType::kFloat16);
  const KvCacheAttentionOptions options = {.softmax_scale = 0.1f, .mask = {.causal = true}};
  const Attended got =
      attend(cache, sequences, q, cu_seqlens_q, options, Context::with_isa(GetParam()));
  for (const int32_t threads : {2, 5}) {
    expect_same(
        attend(cache, sequences, q, cu_seqlens_q, options, Context::with_isa(GetParam(), threads)),
        got, std::to_string(threads) + " threads");
  }
  for (size_t i = 0; i < lengths.size(); ++i) {
    const Tensor own = rows_of(q, cu_seqlens_q[i], cu_seqlens_q[i + 1]);
    const Attended part = {rows_of(got.out, cu_seqlens_q[i], cu_seqlens_q[i + 1]),
                           rows_of(got.lse, cu_seqlens_q[i], cu_seqlens_q[i + 1])};
    expect_same(part,
                contiguous(own, models[i].k().view(), models[i].v().view(), 128, false, options,
                           Context::with_isa(GetParam())),
                "sequence " + std::to_string(i));
  }
}

/// A window hides keys that still count as keys of their pages: close to float64, and the same for
/// one query as for the last of many.
TEST_P(KvCacheTest, Windows) {
  constexpr int64_t kDim = 32;
  const Context context = Context::with_isa(GetParam());
  const Tensor k = tokens(500, 1, kDim, 1);
  const Tensor v = tokens(500, 1, kDim, 2);
  const Tensor q = tokens(40, 2, kDim, 3);
  KvCache cache = make_cache({.nheads_k = 1, .head_dim = kDim, .page_size = 64, .max_pages = 8});
  const KvSequence sequence = create(cache);
  expect_ok(cache.append(sequence, k.view(), v.view(), context));
  ModelSequence model(1, kDim, true);
  model.append(k, v);
  for (const Mask& mask :
       {Mask{.causal = true, .window_left = 100}, Mask{.causal = true, .window_left = 0},
        Mask{.align = CausalAlign::kTopLeft, .window_left = 3, .window_right = 9},
        Mask{.causal = true, .align = CausalAlign::kTopLeft}}) {
    const Attended many = attend(cache, {sequence}, q, {0, 40}, {.mask = mask}, context);
    EXPECT_LT(model_error(many, q, model, {.mask = mask}), 0.03)
        << "window " << mask.window_left << ", " << mask.window_right;
    if (mask.align == CausalAlign::kTopLeft) continue;
    const Attended one =
        attend(cache, {sequence}, rows_of(q, 39, 40), {0, 1}, {.mask = mask}, context);
    expect_same(one, {rows_of(many.out, 39, 40), rows_of(many.lse, 39, 40)}, "last row");
  }
}

TEST_P(KvCacheTest, PoisonReachesOnlyTheRowsThatSeeIt) {
  const Context context = Context::with_isa(GetParam());
  Tensor k = tokens(130, 1, 16, 1);
  Tensor v = tokens(130, 1, 16, 2);
  k.set(0, 100, 0, 3, std::numeric_limits<double>::quiet_NaN());
  v.set(0, 110, 0, 5, std::numeric_limits<double>::infinity());
  KvCache cache = make_cache({.nheads_k = 1, .head_dim = 16, .page_size = 64, .max_pages = 8});
  const KvSequence sequence = create(cache);
  expect_ok(cache.append(sequence, k.view(), v.view(), context));
  const Tensor q = tokens(130, 1, 16, 3);
  const Attended got = attend(cache, {sequence}, q, {0, 130}, {.mask = {.causal = true}}, context);
  for (int64_t s = 0; s < 130; ++s) {
    EXPECT_EQ(std::isnan(got.out.get(0, s, 0, 0)), s >= 100) << "row " << s;
  }
  // Cut off, it is gone, also from what the page says of itself.
  expect_ok(cache.truncate(sequence, 100));
  const Tensor more = tokens(9, 1, 16, 4);
  expect_ok(cache.append(sequence, more.view(), more.view(), context));
  const Tensor one = tokens(1, 1, 16, 5);
  EXPECT_TRUE(
      std::isfinite(attend(cache, {sequence}, one, {0, 1}, {}, context).out.get(0, 0, 0, 0)));
}

/// Random operations against the model; every attention must have the bits of attention() over the
/// model's codes.
TEST_P(KvCacheTest, RandomOperationsFollowTheModel) {
  for (const auto& [heads, dim, smooth_k] :
       {std::tuple<int64_t, int64_t, bool>{2, 20, true}, {1, 64, false}}) {
    constexpr int64_t kPages = 9;
    KvCache cache = make_cache({.nheads_k = heads,
                                .head_dim = dim,
                                .page_size = 64,
                                .max_pages = kPages,
                                .smooth_k = smooth_k});
    const Context context = Context::with_isa(GetParam());
    std::mt19937_64 random(static_cast<uint64_t>(dim));
    const auto below = [&](int64_t n) {
      return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
    };
    std::vector<KvSequence> sequences;
    std::vector<ModelSequence> models;
    std::map<std::string, int> counts;
    const auto pick = [&] { return static_cast<size_t>(below(std::ssize(sequences))); };
    for (int step = 0; step < 500; ++step) {
      SCOPED_TRACE("step " + std::to_string(step));
      const int64_t operation = sequences.empty() ? 0 : below(12);
      if (operation == 0) {
        if (sequences.size() >= 6) continue;
        sequences.push_back(create(cache));
        models.emplace_back(heads, dim, smooth_k);
      } else if (operation <= 4) {
        const size_t i = pick();
        const int64_t count = operation == 1 ? below(150) : 1 + below(3);
        Tensor k = tokens(count, heads, dim, random());
        const Tensor v = tokens(count, heads, dim, random());
        if (below(20) == 0 && count > 0) {
          k.set(0, below(count), 0, 0, std::numeric_limits<double>::infinity());
        }
        const Status status = cache.append(sequences[i], k.view(), v.view(), context);
        if (status.ok()) {
          models[i].append(k, v);
        } else {
          ASSERT_EQ(status.code(), StatusCode::kOutOfMemory) << status.message();
          ++counts["out of pages"];
        }
      } else if (operation == 5) {
        const size_t i = pick();
        const int64_t length = below(2) == 0 ? models[i].length() : below(models[i].length() + 1);
        const Result<KvSequence> child = cache.fork(sequences[i], length);
        if (child.ok()) {
          sequences.push_back(child.value());
          models.push_back(models[i]);
          models.back().truncate(length);
          ++counts["fork"];
        } else {
          ASSERT_EQ(child.status().code(), StatusCode::kOutOfMemory);
          ++counts["out of pages"];
        }
      } else if (operation == 6) {
        const size_t i = pick();
        const int64_t length = below(models[i].length() + 1);
        const Status status = cache.truncate(sequences[i], length);
        if (status.ok()) {
          models[i].truncate(length);
          ++counts["truncate"];
        } else {
          ASSERT_EQ(status.code(), StatusCode::kOutOfMemory) << status.message();
        }
      } else if (operation == 7 && sequences.size() > 2) {
        const size_t i = pick();
        expect_ok(cache.free(sequences[i]));
        expect_refused(cache.free(sequences[i]), StatusCode::kInvalidArgument,
                       "sequence " + std::to_string(sequences[i].id) + " was freed");
        sequences.erase(sequences.begin() + static_cast<int64_t>(i));
        models.erase(models.begin() + static_cast<int64_t>(i));
        ++counts["free"];
      } else if (operation >= 8) {
        const KvCacheAttentionOptions options = {.mask = {.causal = below(2) == 0}};
        std::vector<size_t> batch;
        std::vector<int32_t> cu_seqlens_q = {0};
        std::vector<KvSequence> handles;
        for (int64_t n = 1 + below(3); n > 0; --n) {
          batch.push_back(pick());
          handles.push_back(sequences[batch.back()]);
          cu_seqlens_q.push_back(cu_seqlens_q.back() + static_cast<int32_t>(below(6)));
        }
        const Tensor q = tokens(cu_seqlens_q.back(), 2 * heads, dim, random());
        const Attended got = attend(cache, handles, q, cu_seqlens_q, options, context);
        for (size_t b = 0; b < batch.size(); ++b) {
          const ModelSequence& model = models[batch[b]];
          ASSERT_EQ(length_of(cache, handles[b]), model.length());
          const Tensor own = rows_of(q, cu_seqlens_q[b], cu_seqlens_q[b + 1]);
          const Attended part = {rows_of(got.out, cu_seqlens_q[b], cu_seqlens_q[b + 1]),
                                 rows_of(got.lse, cu_seqlens_q[b], cu_seqlens_q[b + 1])};
          expect_same(
              part,
              contiguous(own, model.k().view(), model.v().view(), 64, false, options, context),
              "sequence " + std::to_string(b) + " of the batch");
          if (!model.poisoned() && own.shape()[1] > 0) {
            EXPECT_LT(model_error(part, own, model, options), 0.03);
          }
          ++counts["attend"];
        }
      }
      const KvCacheUsage usage = cache.usage();
      ASSERT_EQ(usage.pages_used + usage.pages_free, kPages);
      ASSERT_EQ(usage.sequences, std::ssize(sequences));
      if (::testing::Test::HasFailure()) return;
    }
    for (const char* what : {"out of pages", "fork", "truncate", "free", "attend"}) {
      EXPECT_GT(counts[what], 0) << what << " never happened";
    }
    for (const KvSequence sequence : sequences) expect_ok(cache.free(sequence));
    EXPECT_EQ(cache.usage().pages_used, 0);
    EXPECT_EQ(cache.usage().sequences, 0);
  }
}

}  // namespace
}  // namespace attn8::testing
