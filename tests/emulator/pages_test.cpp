// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cuda/append.hpp"
#include "cuda/attend_decode.hpp"
#include "cuda/attend_sm80.hpp"
#include "cuda/attend_sm90.hpp"
#include "cuda/merge_splits.hpp"
#include "emulator/float16.hpp"
#include "emulator/packed_problem.hpp"

/// The paged cache in the emulator: tables checked, tokens appended, ragged and uniform batches of
/// queries over the pages.
namespace attn8::cuda::testing {
namespace {

using emulator::Async;

constexpr int kHeadDim = 61;
constexpr int kRowBytes = 64;
constexpr int kPackedDim = 64;
constexpr int kPageSize = 256;
constexpr int kPageShift = 8;
constexpr int kMaxPages = 3;
constexpr int kNumPages = 8;
constexpr int kHeadsK = 2;
constexpr int kHeadsQ = 4;

/// A table with odd pages, the last of the pool among them; -1 where no page is needed.
const std::vector<int> kTable = {6, -1, -1, 3, -1, -1, 7, 0, 4};

std::string run_kernel(int threads, size_t shared, int x, int y, int z,
                       const std::vector<emulator::Buffer>& buffers,
                       const std::function<void()>& call) {
  if (x <= 0 || y <= 0) return {};
  emulator::Config config;
  config.threads = threads;
  config.shared_bytes = std::max<size_t>(shared, 16);
  config.async = Async::kRandom;
  config.buffers = buffers;
  const emulator::Report report = emulator::run(config, {x, y, z}, call);
  return report.ok ? "" : report.error;
}

template <class Kernel, class Params>
std::string launch(const Params& params, int x, int y,
                   const std::vector<emulator::Buffer>& buffers = {}) {
  return run_kernel(Kernel::kThreads, Kernel::kSharedBytes, x, y, 1, buffers,
                    [&] { Kernel::run(params); });
}

/// Tables as CheckTables leaves them.
struct Checked {
  std::vector<int> table, seqlens, cu, bad;
};

/// The pages of a cache on the host.
class Cache {
 public:
  explicit Cache(bool smooth_k) : smooth_k_(smooth_k) {
    const size_t tokens = static_cast<size_t>(kNumPages) * kHeadsK * kPageSize;
    // Codes that nobody wrote may be anything; constants are cleared once.
    k_.assign(tokens * kRowBytes, 77);
    v_.assign(tokens * kPackedDim, 77);
    constants_.assign(tokens * 2, 0.0f);
    mean_.assign(static_cast<size_t>(kNumPages) * kHeadsK * kRowBytes, 0.0f);
  }

  [[nodiscard]] Pages pages() {
    return {k_.data(), v_.data(), constants_.data(), mean_.data(), kHeadsK, kPageShift, kNumPages};
  }

  static Checked check(const std::vector<int>& table, const std::vector<int>& seqlens,
                       const std::vector<int>& cu, int seqlen, int total, bool appends,
                       int max_keys = kMaxPages * kPageSize) {
    const int batch = static_cast<int>(seqlens.size());
    Checked checked;
    checked.table.assign(static_cast<size_t>(batch) * kMaxPages, -7);
    checked.seqlens.assign(seqlens.size(), -7);
    checked.cu.assign(seqlens.size() + 1, -7);
    checked.bad.assign(seqlens.size(), -7);
    TablesParams p{};
    p.block_table = table.data();
    p.block_table_stride_batch = kMaxPages;
    p.block_table_stride_page = 1;
    p.cache_seqlens = seqlens.data();
    p.cache_seqlens_stride = 1;
    p.cu_seqlens = cu.empty() ? nullptr : cu.data();
    p.cu_seqlens_stride = 1;
    p.batch = batch;
    p.max_pages = kMaxPages;
    p.max_keys = max_keys;
    p.num_pages = kNumPages;
    p.page_shift = kPageShift;
    p.seqlen = p.max_seqlen = seqlen;
    p.total = total;
    p.appends = appends;
    p.checked_table = checked.table.data();
    p.checked_seqlens = checked.seqlens.data();
    p.checked_cu = checked.cu.data();
    p.bad = checked.bad.data();
    EXPECT_EQ(launch<CheckTables>(p, batch, 1), "");
    return checked;
  }

  /// Appends rows [from[b], from[b] + count[b]) of `inputs`, sequence by sequence, as one call.
  void append(const std::vector<Inputs>& inputs, const std::vector<int>& from,
              const std::vector<int>& count, const std::vector<int>& table, bool ragged) {
    const int batch = static_cast<int>(inputs.size());
    const size_t row = static_cast<size_t>(kHeadsK) * kHeadDim;
    std::vector<uint16_t> k;
    std::vector<uint16_t> v;
    std::vector<int> cu = {0};
    for (int b = 0; b < batch; ++b) {
      const auto begin = static_cast<std::ptrdiff_t>(from[b] * row);
      const auto end = static_cast<std::ptrdiff_t>((from[b] + count[b]) * row);
      k.insert(k.end(), inputs[b].k.begin() + begin, inputs[b].k.begin() + end);
      v.insert(v.end(), inputs[b].v.begin() + begin, inputs[b].v.begin() + end);
      cu.push_back(cu.back() + count[b]);
    }
    const int most = *std::max_element(count.begin(), count.end());
    const Checked checked =
        check(table, from, ragged ? cu : std::vector<int>(), most, cu.back(), true);
    const auto source = [&](const std::vector<uint16_t>& data) {
      SourceTensor x{};
      x.data = data.data();
      x.stride_channel = 1;
      x.stride_head = kHeadDim;
      x.stride_row = static_cast<int64_t>(row);
      x.stride_batch = x.stride_row * most;
      x.seqlen = most;
      x.nheads = kHeadsK;
      x.head_dim = kHeadDim;
      return x;
    };
    AppendParams p{};
    p.k = source(k);
    p.v = source(v);
    p.pages = pages();
    p.block_table = checked.table.data();
    p.max_pages = kMaxPages;
    p.seqlens = checked.seqlens.data();
    p.cu = ragged ? checked.cu.data() : nullptr;
    p.bad = checked.bad.data();
    p.smooth_k = smooth_k_;
    p.chunks = (most + kAppendChunk - 1) / kAppendChunk;
    std::vector<double> sums(static_cast<size_t>(batch) * kHeadsK * p.chunks * kRowBytes, NAN);
    p.sums = sums.data();
    const std::vector<emulator::Buffer> buffers = {buffer("sums", sums, true),
                                                   buffer("k", k),
                                                   buffer("v", v),
                                                   buffer("table", checked.table),
                                                   buffer("seqlens", checked.seqlens),
                                                   buffer("cu", checked.cu),
                                                   buffer("bad", checked.bad),
                                                   buffer("k_pages", k_, true),
                                                   buffer("v_pages", v_, true),
                                                   buffer("constants", constants_, true),
                                                   buffer("k_mean", mean_, true)};
    if (smooth_k_) {
      using Sums = AppendSums<Source::kFloat16, kRowBytes>;
      ASSERT_EQ((launch<Sums>(p, p.chunks, batch * kHeadsK, buffers)), "");
    }
    ASSERT_EQ((launch<AppendMean<kRowBytes>>(p, batch * kHeadsK, 1, buffers)), "");
    using Tokens = AppendTokens<Source::kFloat16, kRowBytes, kPackedDim>;
    const int groups = (most + kKeyGroup - 1) / kKeyGroup + 1;
    ASSERT_EQ((launch<Tokens>(p, groups, batch * kHeadsK, buffers)), "");
  }

  /// Attention of all sequences, out and lse [sum of queries][heads][...].
  template <class Kernel>
  void attend(const std::vector<Inputs>& inputs, const std::vector<int>& seqlens,
              const std::vector<int>& table, bool ragged, int group, int split_blocks,
              std::vector<float>& out, std::vector<float>& lse) {
    const int batch = static_cast<int>(inputs.size());
    std::vector<uint16_t> q;
    std::vector<int> cu = {0};
    int most = 0;
    for (const Inputs& one : inputs) {
      q.insert(q.end(), one.q.begin(), one.q.end());
      cu.push_back(cu.back() + one.shape.seqlen_q);
      most = std::max(most, one.shape.seqlen_q);
    }
    const int total = cu.back();
    const Checked checked =
        check(table, seqlens, ragged ? cu : std::vector<int>(), most, total, false);
    const int64_t rows = ragged ? ragged_row(int64_t{total} * group, batch) + kRaggedRows
                                : round_up(int64_t{most} * group, kSequencePad);
    const auto images = static_cast<size_t>((ragged ? 1 : batch) * kHeadsQ / group);
    std::vector<int8_t> codes(images * rows * kRowBytes, 55);
    std::vector<float> q_scale(images * rows, 0.0f);
    std::vector<float> shift(q_scale.size(), NAN);
    RowsParams r{};
    r.x.data = q.data();
    r.x.stride_channel = 1;
    r.x.stride_head = kHeadDim;
    r.x.stride_row = int64_t{kHeadsQ} * kHeadDim;
    r.x.stride_batch = r.x.stride_row * most;
    r.x.seqlen = most;
    r.x.nheads = kHeadsQ;
    r.x.head_dim = kHeadDim;
    r.codes = codes.data();
    r.rows = static_cast<int>(rows);
    r.q_scale = q_scale.data();
    r.mean = mean_.data();
    r.heads_per_mean = kHeadsQ / kHeadsK;
    r.mean_channels = kRowBytes;
    r.lse_shift = shift.data();
    r.softmax_scale = static_cast<float>(1 / std::sqrt(double(kHeadDim)));
    r.group = group;
    r.cu_seqlens = ragged ? checked.cu.data() : nullptr;
    r.mean_pages = checked.table.data();
    r.mean_pages_stride = kMaxPages;
    r.bad = checked.bad.data();
    using Rows = QuantizeRows<Source::kFloat16, kRowBytes, true>;
    const int queries = ragged ? most : static_cast<int>((rows + group - 1) / group);
    ASSERT_EQ(
        (launch<Rows>(r, (queries + Rows::kBlockTokens - 1) / Rows::kBlockTokens, batch * kHeadsQ)),
        "");

    out.assign(static_cast<size_t>(total) * kHeadsQ * kHeadDim, 1e9f);
    lse.assign(static_cast<size_t>(total) * kHeadsQ, 1e9f);
    AttendParams p{};
    p.q = codes.data();
    p.k = k_.data();
    p.v = v_.data();
    p.q_scale = q_scale.data();
    p.key_constants = constants_.data();
    p.lse_shift = shift.data();
    p.out = out.data();
    p.lse = lse.data();
    p.out_stride_channel = 1;
    p.out_stride_head = kHeadDim;
    p.out_stride_row = int64_t{kHeadsQ} * kHeadDim;
    p.out_stride_batch = p.out_stride_row * most;
    p.lse_stride_head = 1;
    p.lse_stride_row = kHeadsQ;
    p.lse_stride_batch = int64_t{kHeadsQ} * most;
    p.nheads_q = kHeadsQ;
    p.nheads_k = kHeadsK;
    p.rows_q = static_cast<int>(rows);
    p.rows_k = kPageSize;
    p.seqlen_q = most;
    p.seqlen_k = kMaxPages * kPageSize;
    p.head_dim = kHeadDim;
    const Shape& shape = inputs[0].shape;
    p.first_offset = shape.window_left < 0 ? -kNoLimit : -shape.window_left;
    p.last_offset = shape.causal ? 0 : kNoLimit;
    p.bottom_right = true;
    p.score_scale = static_cast<float>(1.4426950408889634 / std::sqrt(double(kHeadDim)));
    p.cu_seqlens_q = r.cu_seqlens;
    p.seqlens_k = checked.seqlens.data();
    p.seqlens_k_stride = 1;
    p.block_table = checked.table.data();
    p.block_table_stride = kMaxPages;
    p.page_shift = kPageShift;

    // Rows of the call, then heads, then as many keys as the longest sequence has.
    std::vector<float> mask;
    if (shape.attn_mask) {
      const int keys = *std::max_element(seqlens.begin(), seqlens.end());
      for (const Inputs& one : inputs) {
        for (int i = 0; i < (r.cu_seqlens == nullptr ? most : one.shape.seqlen_q); ++i) {
          for (int h = 0; h < kHeadsQ; ++h) {
            for (int j = 0; j < keys; ++j) mask.push_back(Shape::added(h, i, j));
          }
        }
      }
      p.changes.attn_mask = mask.data();
      p.changes.attn_mask_stride_key = 1;
      p.changes.attn_mask_stride_head = keys;
      p.changes.attn_mask_stride_row = int64_t{kHeadsQ} * keys;
      p.changes.attn_mask_stride_batch = p.changes.attn_mask_stride_row * most;
    }

    AttendParams kernel = p;
    kernel.group = group;
    kernel.group_inverse = group_inverse_of(group);
    kernel.nheads_q = kHeadsQ / group;
    kernel.seqlen_q = most * group;
    int splits = 1;
    const int row_floats = split_row_floats(kHeadDim);
    std::vector<float> parts;
    std::vector<float> part_lse;
    if (split_blocks > 0) {
      kernel.split_keys = split_blocks * Kernel::kKvBlock;
      splits = (p.seqlen_k + kernel.split_keys - 1) / kernel.split_keys;
      const int64_t all = int64_t{total} * kHeadsQ;
      parts.assign(static_cast<size_t>(splits * all * row_floats), 1e9f);
      part_lse.assign(static_cast<size_t>(splits * all), 1e9f);
      kernel.out = parts.data();
      kernel.out_pairs = true;
      kernel.lse = part_lse.data();
      kernel.out_stride_head = row_floats;
      kernel.out_stride_row = int64_t{kHeadsQ} * row_floats;
      kernel.out_stride_batch = kernel.out_stride_row * most;
      kernel.out_stride_split = all * row_floats;
      kernel.lse_stride_split = all;
    }
    const std::vector<emulator::Buffer> buffers = {buffer("q", codes),
                                                   buffer("q_scale", q_scale),
                                                   buffer("k_pages", k_),
                                                   buffer("v_pages", v_),
                                                   buffer("constants", constants_),
                                                   buffer("shift", shift),
                                                   buffer("table", checked.table),
                                                   buffer("seqlens", checked.seqlens),
                                                   buffer("cu", checked.cu),
                                                   buffer("mask", mask),
                                                   buffer("out", out, true),
                                                   buffer("lse", lse, true),
                                                   buffer("parts", parts, true),
                                                   buffer("part_lse", part_lse, true)};
    ASSERT_EQ(run_kernel(Kernel::kThreads, Kernel::kSharedBytes,
                         (kernel.seqlen_q + Kernel::kRows - 1) / Kernel::kRows,
                         batch * kernel.nheads_q, splits, buffers, [&] { Kernel::run(kernel); }),
              "");
    if (splits == 1) return;
    AttendParams merged = p;
    merged.seqlen_q = total;
    const MergeParams merge = {parts.data(), part_lse.data(), splits, merged};
    ASSERT_EQ(run_kernel(MergeSplits::kThreads, MergeSplits::kSharedBytes, total * kHeadsQ, 1, 1,
                         {}, [&] { MergeSplits::run(merge, 1); }),
              "");
  }

  /// Compares with the oracle, sequence by sequence.
  template <class Kernel>
  void check_attention(const std::vector<Inputs>& inputs, const std::vector<int>& table,
                       bool ragged, int group, int split_blocks) {
    std::vector<int> seqlens;
    for (const Inputs& one : inputs) seqlens.push_back(one.shape.seqlen_k);
    std::vector<float> out;
    std::vector<float> lse;
    attend<Kernel>(inputs, seqlens, table, ragged, group, split_blocks, out, lse);
    if (::testing::Test::HasFatalFailure()) return;
    size_t row = 0;
    for (size_t b = 0; b < inputs.size(); ++b) {
      SCOPED_TRACE(::testing::Message() << "sequence " << b);
      Quantized z = quantize(inputs[b], Weights::kFolded, smooth_k_, Kernel::kKvBlock);
      // Scales of V are their own ratios here.
      std::fill(z.v_scale.begin(), z.v_scale.end(), 1.0f);
      for (size_t i = 0; i < z.ratio.size(); ++i) {
        z.ratio[i] = z.v_token_scale[i] == 0 ? 0x1p-100f : z.v_token_scale[i];
      }
      const Packed packed = pack(inputs[b], z, Weights::kFolded);
      const Expected want =
          expected(inputs[b].shape, z, packed, Weights::kFolded, Kernel::kKvBlock);
      for (size_t i = 0; i < want.out.size(); ++i) {
        const float got = out[row * kHeadDim + i];
        ASSERT_LE(std::fabs(got - want.out[i]), want.bound[i]) << i << ": " << got;
      }
      for (size_t i = 0; i < want.lse.size(); ++i) {
        if (std::isinf(want.lse[i])) {
          ASSERT_EQ(lse[row + i], -INFINITY);
        } else {
          const double expect = want.lse[i] + expected_shift(inputs[b].shape, packed, i);
          ASSERT_NEAR(lse[row + i], expect, 2e-5 * (1 + std::fabs(expect)));
        }
      }
      row += want.lse.size();
    }
    EXPECT_EQ(row, lse.size());
  }

 private:
  template <class T>
  static emulator::Buffer buffer(const char* name, const std::vector<T>& data,
                                 bool writable = false) {
    return {name, data.data(), data.size() * sizeof(T), writable};
  }

  bool smooth_k_;
  std::vector<int8_t> k_, v_;
  std::vector<float> constants_, mean_;
};

std::vector<Inputs> sequences(const std::vector<int>& seqlens_q, const std::vector<int>& seqlens_k,
                              bool causal = true, int window_left = -1) {
  std::vector<Inputs> result;
  for (size_t b = 0; b < seqlens_q.size(); ++b) {
    const Shape shape = {1,        kHeadsQ, kHeadsK, seqlens_q[b], seqlens_k[b],
                         kHeadDim, causal,  false,   window_left,  -1};
    result.push_back(random_inputs(shape, 40 + static_cast<unsigned>(b)));
  }
  // A token of zeros in V.
  if (seqlens_k[0] > 3) {
    std::fill_n(result[0].v.begin() + 3 * kHeadsK * kHeadDim, kHeadDim, uint16_t{0});
  }
  return result;
}

using Sm80 = AttendSm80<64, 128, 4, Weights::kFolded>;
using Sm90 = AttendSm90<64, 256, Weights::kFolded>;
using Few = AttendDecode<64, 4, 2, Weights::kFolded>;

TEST(Pages, AppendedInParts) {
  const std::vector<Inputs> inputs = sequences({5, 1, 70}, {37, 1, 530});
  Cache cache(false);
  cache.append(inputs, {0, 0, 0}, {20, 0, 300}, kTable, true);
  cache.append(inputs, {20, 0, 300}, {16, 0, 229}, kTable, true);
  cache.append(inputs, {36, 0, 529}, {1, 1, 1}, kTable, false);
  if (HasFatalFailure()) return;
  cache.check_attention<Sm80>(inputs, kTable, true, 1, 0);
  cache.check_attention<Sm90>(inputs, kTable, true, 1, 0);
  cache.check_attention<Sm90>(inputs, kTable, true, 1, 1);
}

TEST(Pages, Decode) {
  const std::vector<Inputs> inputs = sequences({1, 1, 1}, {37, 0, 530});
  Cache cache(true);
  cache.append(inputs, {0, 0, 0}, {37, 0, 530}, kTable, true);
  if (HasFatalFailure()) return;
  cache.check_attention<Sm80>(inputs, kTable, false, 2, 1);
  cache.check_attention<Sm90>(inputs, kTable, false, 2, 0);
  cache.check_attention<Sm90>(inputs, kTable, true, 2, 1);
  cache.check_attention<Few>(inputs, kTable, false, 2, 0);
  cache.check_attention<Few>(inputs, kTable, false, 2, 4);
  cache.check_attention<Few>(inputs, kTable, true, 2, 2);
}

TEST(Pages, Window) {
  const std::vector<Inputs> inputs = sequences({33, 9, 2}, {40, 256, 700}, true, 300);
  Cache cache(false);
  cache.append(inputs, {0, 0, 0}, {40, 256, 700}, kTable, true);
  if (HasFatalFailure()) return;
  cache.check_attention<Sm80>(inputs, kTable, true, 2, 0);
  cache.check_attention<Few>(inputs, kTable, true, 2, 3);
}

/// A mask whose rows are those of the call: of all sequences one after the other, or of each.
TEST(Pages, Mask) {
  using Biased = AttendSm80<64, 128, 4, Weights::kFolded, Scores::kBiased>;
  std::vector<Inputs> inputs = sequences({33, 9, 2}, {40, 256, 700});
  for (Inputs& one : inputs) one.shape.attn_mask = true;
  Cache cache(true);
  cache.append(inputs, {0, 0, 0}, {40, 256, 700}, kTable, true);
  if (HasFatalFailure()) return;
  cache.check_attention<Biased>(inputs, kTable, true, 1, 0);
  std::vector<Inputs> decode = sequences({1, 1, 1}, {37, 12, 530});
  for (Inputs& one : decode) one.shape.attn_mask = true;
  Cache other(false);
  other.append(decode, {0, 0, 0}, {37, 12, 530}, kTable, true);
  if (HasFatalFailure()) return;
  other.check_attention<Biased>(decode, kTable, false, 2, 1);
  // A sequence with more keys than the mask is bad.
  EXPECT_EQ(Cache::check(kTable, {200, 201, 199}, {}, 1, 3, false, 200).bad,
            (std::vector<int>{0, 1, 0}));
}

/// What a page held before, or holds behind the length of a sequence, does not matter.
TEST(Pages, TokensBehindTheEndDoNotCount) {
  std::vector<Inputs> inputs = sequences({3}, {60});
  std::vector<Inputs> poisoned = inputs;
  const uint16_t nan = emulator::half_bits(std::numeric_limits<float>::quiet_NaN());
  for (int token = 41; token < 60; ++token) {
    poisoned[0].v[static_cast<size_t>(token * kHeadsK) * kHeadDim + 7] = nan;
    poisoned[0].k[static_cast<size_t>(token * kHeadsK + 1) * kHeadDim + 9] = nan;
  }
  Cache cache(false);
  cache.append(poisoned, {0}, {60}, kTable, false);
  if (HasFatalFailure()) return;
  std::vector<Inputs> shorter = sequences({3}, {41});
  const size_t kept = size_t{41} * kHeadsK * kHeadDim;
  std::copy_n(inputs[0].k.begin(), kept, shorter[0].k.begin());
  std::copy_n(inputs[0].v.begin(), kept, shorter[0].v.begin());
  cache.check_attention<Sm80>(shorter, kTable, false, 1, 0);
  cache.check_attention<Sm90>(shorter, kTable, false, 2, 1);
  // Where they are seen, every row is NaN.
  std::vector<float> out;
  std::vector<float> lse;
  cache.attend<Sm80>(poisoned, {60}, kTable, false, 1, 0, out, lse);
  for (const float x : out) EXPECT_TRUE(std::isnan(x));
}

/// Tables that point outside touch nothing that is not theirs, and give NaN.
TEST(Pages, BadTables) {
  const std::vector<Inputs> inputs = sequences({2, 2, 2}, {30, 20, 300});
  Cache cache(false);
  std::vector<int> table = kTable;
  cache.append(inputs, {0, 0, 0}, {30, 20, 300}, table, true);
  table[0] = kNumPages;  // sequence 0 has it
  table[7] = -1;         // and sequence 2 this one
  std::vector<float> out;
  std::vector<float> lse;
  cache.attend<Sm80>(inputs, {30, 20, 300}, table, true, 1, 0, out, lse);
  const size_t row = size_t{kHeadsQ} * kHeadDim;
  for (size_t i = 0; i < out.size(); ++i) {
    EXPECT_EQ(std::isnan(out[i]), i / row / 2 != 1) << i;
  }
  // Nothing of a sequence is appended where its pages are bad or full.
  const Checked full =
      Cache::check(kTable, {kMaxPages * kPageSize, -1, 5}, {0, 1, 2, 3}, 1, 3, true);
  EXPECT_EQ(full.bad, (std::vector<int>{1, 1, 0}));
  EXPECT_EQ(full.seqlens, (std::vector<int>{kMaxPages * kPageSize, 0, 5}));
  const Checked order = Cache::check(kTable, {5, 5, 5}, {0, 4, 2, 9}, 4, 6, true);
  EXPECT_EQ(order.bad, (std::vector<int>{0, 1, 1}));
  EXPECT_EQ(order.cu, (std::vector<int>{0, 4, 2, 6}));
}

}  // namespace
}  // namespace attn8::cuda::testing
