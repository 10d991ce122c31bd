// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "sequences.hpp"

/// The CUDA softmax: integer products of one key block in, 8-bit weights and the factor of the
/// block out. Both kernel families use it; docs/numerics.md defines what it computes.
///
/// Every thread holds two rows of the block, group and group + 8 of its warp's 16, and of each 16
/// keys the four of its C fragments: elements 0..7 of a key group are
///   row 0 keys 2t, 2t+1; row 1 keys 2t, 2t+1; row 0 keys 2t+8, 2t+9; row 1 keys 2t+8, 2t+9
/// The four threads of a quad share their rows.
///
/// Exponentials do not wait for the block's maximum: weights are p = 2^score r outright, and the
/// codes are p * 255 / max(p), which is the same number with the same relative accuracy. That holds
/// while float holds 2^score, and a row's sum tells in the end whether it did: ordinary scores are
/// far inside. A warp with a row that is not does its rows again, see attend_careful.hpp.
namespace attn8::cuda {

/// Range of a row's sum of weights in which nothing that matters has overflowed or underflowed:
/// codes times keys stay below 2^100, and what has underflowed is 2^-60 of the sum.
inline constexpr float kLargestSum = 0x1p60f;
inline constexpr float kSmallestSum = 0x1p-60f;

/// Adding 2^23 to x in [0, 255] leaves round-half-even(x) in the low byte.
inline constexpr float kRoundToByte = 8388608.0f;

/// A key group's constants, of the thread's four keys.
template <Weights kWeights>
struct KeyConstants {
  float4 scale, ratio;

  static ATTN8_DEVICE float element(const float4& four, int key) {
    return key == 0 ? four.x : key == 1 ? four.y : key == 2 ? four.z : four.w;
  }
  /// Key (of the thread's four) of element e of a key group.
  static ATTN8_DEVICE int key_of(int e) { return (e >> 2) * 2 + (e & 1); }

  ATTN8_DEVICE float score(float product, float score_scale, int e) const {
    return ptx::mul(ptx::mul(product, element(scale, key_of(e))), score_scale);
  }
  /// Weight times r.
  ATTN8_DEVICE float fold(float weight, int e) const {
    return kWeights == Weights::kFolded ? ptx::mul(weight, element(ratio, key_of(e))) : weight;
  }
};

/// Column, in the block, of element e of a key group.
ATTN8_DEVICE int key_column(int group, int e) {
  return group * kKeyGroup + (e >> 2) * 8 + ptx::thread_index() % 4 * 2 + (e & 1);
}

/// What is done to the scores of a thread's two rows. Kept in shared memory, after VisibleKeys.
struct RowChanges {
  static constexpr int kBytes = 48;
  float shift[2];   // of softcap's argument
  float slope[2];   // log2 units per key
  int position[2];  // of the query, among the keys
  int2 mask_at[2];  // attn_mask of key 0: low and high half of an element offset
  static constexpr float kLog2E = 1.4426950408889634f;

  static ATTN8_DEVICE RowChanges of(const AttendParams& p, const Sequence& sequence, int batch,
                                    int head, int row) {
    RowChanges changes = {};
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= sequence.seqlen_q) continue;
      const int query = query_of(p, row + 8 * r);
      const int query_head = query_head_of(p, head, row + 8 * r);
      changes.position[r] = query + sequence.position_offset;
      if (p.changes.attn_mask != nullptr) {
        const int64_t at = sequence.batch * p.changes.attn_mask_stride_batch +
                           (sequence.first_query + query) * p.changes.attn_mask_stride_row +
                           query_head * p.changes.attn_mask_stride_head;
        changes.mask_at[r] = {static_cast<int>(at), static_cast<int>(at >> 32)};
      }
      if (p.changes.score_shift != nullptr) {
        changes.shift[r] =
            p.changes.softcap_rate * kLog2E *
            ptx::ld_global(p.changes.score_shift + sequence.row_index(p, head, row + 8 * r));
      }
      if (p.changes.alibi_slopes != nullptr) {
        changes.slope[r] =
            kLog2E * ptx::ld_global(p.changes.alibi_slopes + batch * p.changes.alibi_stride_batch +
                                    query_head * p.changes.alibi_stride_head);
      }
    }
    return changes;
  }
  static ATTN8_DEVICE RowChanges kept(uint32_t address) {
    const float4 x = ptx::ld_shared<float4>(address);
    const int2 y = ptx::ld_shared<int2>(address + 16);
    const int4 z = ptx::ld_shared<int4>(address + 32);
    return {{x.x, x.y}, {x.z, x.w}, {y.x, y.y}, {{z.x, z.y}, {z.z, z.w}}};
  }
  ATTN8_DEVICE void keep(uint32_t address) const {
    ptx::st_shared(address, float4{shift[0], shift[1], slope[0], slope[1]});
    ptx::st_shared(address + 16, int2{position[0], position[1]});
    ptx::st_shared(address + 32, int4{mask_at[0].x, mask_at[0].y, mask_at[1].x, mask_at[1].y});
  }

  /// Score t of row r and a key; attn_mask of one that is not visible stays unread.
  template <Scores kScores>
  ATTN8_DEVICE float apply(const ScoreChanges& changes, float t, int r, int key,
                           bool visible) const {
    if (kScores == Scores::kSoftcap || changes.softcap != 0) {
      // tanh(x) = 1 - 2 / (e^2x + 1): off by a few float roundings of softcap, however small x is.
      const float power = ptx::ex2(ptx::fma(t, changes.softcap_rate, shift[r]));
      t = ptx::fma(-2 * changes.softcap, ptx::rcp(ptx::add(power, 1.0f)), changes.softcap);
    }
    if constexpr (kScores == Scores::kBiased) {
      if (changes.attn_mask != nullptr && visible) {
        const int64_t at = (static_cast<int64_t>(mask_at[r].y) << 32 |
                            static_cast<int64_t>(static_cast<uint32_t>(mask_at[r].x))) +
                           key * changes.attn_mask_stride_key;
        const float added = ptx::ld_global(changes.attn_mask + at);
        t = added <= kHidingScore ? -INFINITY : ptx::fma(added, kLog2E, t);
      }
      const int distance = key < position[r] ? position[r] - key : key - position[r];
      t = ptx::fma(-slope[r], static_cast<float>(distance), t);
    }
    return t;
  }
};

/// Softmax of two rows over the key blocks of one head.
template <int kKvBlock, Weights kWeights, Scores kScores>
struct OnlineSoftmax {
  static constexpr int kElements = kKvBlock / 2;  // 2 rows x kKvBlock / 4 keys per thread
  static constexpr float kLevels = kWeights == Weights::kPaper ? 127.0f : 255.0f;
  using Constants = KeyConstants<kWeights>;

  float score_scale[2];  // q_scale * softmax_scale * log2(e)
  float sum[2];          // of this thread's weights before rounding, without r
  float block_sum[2];    // the same, of one block
  float running[2];      // kPaper: largest weight so far
  float code_sum[2];     // kPaper: of this thread's codes, in weights
  float block_scale[2];  // what the block's integer products are multiplied with

  ATTN8_DEVICE void start() {
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) sum[r] = running[r] = code_sum[r] = 0;
  }
  ATTN8_DEVICE void start_block() { block_sum[0] = block_sum[1] = 0; }

  static ATTN8_DEVICE uint32_t constants_address(uint32_t constants, int group) {
    return constants + group * (kKeyConstants * 4) + ptx::thread_index() % 4 * 16;
  }
  static ATTN8_DEVICE float4 load_scale(uint32_t constants, int group) {
    return ptx::ld_shared<float4>(constants_address(constants, group));
  }
  static ATTN8_DEVICE float4 load_ratio(uint32_t constants, int group) {
    if constexpr (kWeights != Weights::kFolded) return float4{1, 1, 1, 1};
    return ptx::ld_shared<float4>(constants_address(constants, group) + kKeyGroup * 4);
  }

  /// Weights p of key groups [kFirst, kLast) of the block, their sums going to block_sum.
  ///   changes          not read by Scores::kPlain
  ///   row_address      of the rows' VisibleKeys, and its RowChanges after them
  ///   score_of(i, r, scale)  of element i of the block, which is in row r, a key with this scale
  ///   constants        shared address of the block's [kKvBlock / 16][2][16] key constants
  ///   first_key        of the block
  ///   next_scale       scales of group kFirst; then those of group kLast
  /// An exponential takes some 40 cycles and a warp waits for whole batches of them, so each
  /// group's are used while the next group's are being computed.
  template <int kFirst, int kLast, bool kMasked, class ScoreOf>
  ATTN8_DEVICE void weights(const ScoreChanges& changes, uint32_t row_address,
                            const ScoreOf& score_of, uint32_t constants, int first_key,
                            float4& next_scale, float (&p)[kElements]) {
    VisibleKeys visible = {};
    RowChanges row_changes = {};
    if constexpr (kMasked) visible = VisibleKeys::kept(row_address);
    if constexpr (kScores != Scores::kPlain) {
      row_changes = RowChanges::kept(row_address + VisibleKeys::kBytes);
    }
    Constants now = {};
    Constants previous = {};
    ATTN8_UNROLL
    for (int group = kFirst; group <= kLast; ++group) {
      if constexpr (kScores == Scores::kBiased) ptx::sync_warp();  // as in AttendSm80::add_codes()
      if constexpr (kScores == Scores::kBiased) {
        if (group > kFirst) previous.ratio = load_ratio(constants, group - 1);
      } else {
        previous.ratio = now.ratio;
        if (group < kLast) now.ratio = load_ratio(constants, group);
      }
      if (group < kLast) {
        now.scale = next_scale;
        if (group + 1 < kKvBlock / kKeyGroup) next_scale = load_scale(constants, group + 1);
      }
      ATTN8_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int r = e >> 1 & 1;
        if (group < kLast) {
          float score =
              score_of(group * 8 + e, r, Constants::element(now.scale, Constants::key_of(e)));
          [[maybe_unused]] const int key = first_key + key_column(group, e);
          const bool sees = !kMasked || visible.sees(r, key);
          if constexpr (kScores != Scores::kPlain) {
            score = row_changes.apply<kScores>(changes, score, r, key, sees);
          }
          if (!sees) score = -INFINITY;
          p[group * 8 + e] = ptx::ex2(score);
        }
        if (group > kFirst) {
          float& weight = p[(group - 1) * 8 + e];
          block_sum[r] = ptx::add(block_sum[r], weight);
          weight = previous.fold(weight, e);
        }
      }
    }
  }

  /// Largest p of row r over the block and the quad. Floats that are not negative compare as
  /// integers, which sm_90 does three at a time.
  ATTN8_DEVICE float largest_weight(int r, const float (&p)[kElements]) const {
    int bits = 0;
    ATTN8_UNROLL
    for (int i = 0; i < kElements; i += 4) {
      bits = ptx::max3(bits, static_cast<int>(ptx::as_uint(p[i + 2 * r])),
                       static_cast<int>(ptx::as_uint(p[i + 2 * r + 1])));
    }
    bits = ptx::max3(bits, bits, ptx::shfl_xor(bits, 1));
    bits = ptx::max3(bits, bits, ptx::shfl_xor(bits, 2));
    return ptx::as_float(static_cast<uint32_t>(bits));
  }

  /// From the largest weights of the block: what weights become codes with, what products are
  /// multiplied with.
  ATTN8_DEVICE void finish_block(const float (&largest)[2], float (&factor)[2]) {
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      sum[r] += block_sum[r];
      float top = largest[r];
      if constexpr (kWeights == Weights::kPaper) top = running[r] = ptx::max(running[r], top);
      // A block without a visible key has codes 0.
      factor[r] = top < FLT_MIN ? 0.0f : kLevels * ptx::rcp(top);
      block_scale[r] = top * (1.0f / kLevels);
    }
  }

  /// Four weights to four codes in packed key order.
  static ATTN8_DEVICE uint32_t round_to_codes(const float (&weights)[4], float factor,
                                              uint32_t& total) {
    uint32_t byte[4];
    ATTN8_UNROLL
    for (int key = 0; key < 4; ++key) {
      byte[key] = ptx::as_uint(ptx::fma(weights[key], factor, kRoundToByte));
    }
    // The low halves of b1 * 256 + b0; multiplied, because the pipe of byte permutes is the busier.
    const uint32_t four =
        ptx::prmt(ptx::mad(byte[1], 256, byte[0]), ptx::mad(byte[3], 256, byte[2]), 0x5410);
    if constexpr (kWeights == Weights::kPaper) total = ptx::sum_bytes(four, total);
    return four;
  }

  ATTN8_DEVICE void add_codes(const uint32_t (&block_codes)[2]) {
    if constexpr (kWeights == Weights::kPaper) {
      ATTN8_UNROLL
      for (int r = 0; r < 2; ++r) {
        code_sum[r] = ptx::fma(static_cast<float>(block_codes[r]), block_scale[r], code_sum[r]);
      }
    }
  }

  /// Weights to codes: `packed` receives them as A fragments of k32 steps, in the key order of
  /// packed V. Sets block_scale.
  ATTN8_DEVICE void codes(const float (&p)[kElements], uint32_t (&packed)[kKvBlock / 32][4]) {
    const float largest[2] = {largest_weight(0, p), largest_weight(1, p)};
    float factor[2];
    finish_block(largest, factor);
    uint32_t block_codes[2] = {0, 0};
    ATTN8_UNROLL
    for (int group = 0; group < kKvBlock / kKeyGroup; ++group) {
      ATTN8_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int i = group * 8 + 2 * r;
        const float weights[4] = {p[i], p[i + 1], p[i + 4], p[i + 5]};
        packed[group / 2][group % 2 * 2 + r] = round_to_codes(weights, factor[r], block_codes[r]);
      }
    }
    add_codes(block_codes);
  }

  /// Weights to bfloat16: `packed` receives them as A fragments of k16 steps.
  ATTN8_DEVICE void halves(const float (&p)[kElements], uint32_t (&packed)[kKvBlock / 16][4]) {
    ATTN8_UNROLL
    for (int i = 0; i < kElements / 2; ++i) {
      packed[i / 4][i % 4] = ptx::pack_bfloat162(p[2 * i], p[2 * i + 1]);
    }
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) sum[r] += block_sum[r];
  }

  /// After the last block: adds up the quad. Collective over the quad.
  ATTN8_DEVICE void add_quad() {
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      sum[r] += ptx::shfl_xor(sum[r], 1);
      sum[r] += ptx::shfl_xor(sum[r], 2);
      if constexpr (kWeights == Weights::kPaper) {
        code_sum[r] += ptx::shfl_xor(code_sum[r], 1);
        code_sum[r] += ptx::shfl_xor(code_sum[r], 2);
      }
    }
  }

  /// Whether float held the weights of row r, after add_quad(). False for a NaN.
  ATTN8_DEVICE bool fits(int r, const VisibleKeys& visible) const {
    return visible.count[r] == 0 || (sum[r] >= kSmallestSum && sum[r] <= kLargestSum);
  }

  /// After add_quad(): factor that turns row r's accumulated products into the output, and its
  /// log-sum-exp, both for sums relative to 2^reference. A row that saw no key gets 0 and -inf.
  ATTN8_DEVICE float normalize(int r, float reference, float* lse) const {
    float normalizer = sum[r];
    if constexpr (kWeights == Weights::kPaper) {
      normalizer = code_sum[r] + 0.0f * sum[r];  // a NaN among the weights shows in `sum` alone
    }
    const float ln2 = 0.69314718f;
    *lse = sum[r] == 0 ? -INFINITY : logf(sum[r]) + reference * ln2;
    return normalizer == 0 ? 0.0f : 1.0f / normalizer;
  }

  /// After add_quad(): what a sink leaves of row r's output, where it leaves `kept` of the weights
  /// that the LSE counts. `paper` divides by its codes, so that there the sink joins their sum.
  ATTN8_DEVICE float beside_codes(int r, float kept) const {
    if constexpr (kWeights != Weights::kPaper) return kept;
    if (kept == 0) return 0;  // as where no key has a weight
    const float ratio = code_sum[r] / sum[r];
    return ratio * kept / (1 + (ratio - 1) * kept);
  }
};

/// Writes channels `column`, which is even, and column + 1 of a row.
ATTN8_DEVICE void store_pair(const AttendParams& p, int64_t row_offset, int column, float low,
                             float high) {
  if (column >= p.head_dim) return;
  const int64_t at = row_offset + column * p.out_stride_channel;
  const bool both = column + 1 < p.head_dim;
  if (p.out_type == Element::kFloat32) {
    float* out = static_cast<float*>(p.out) + at;
    if (p.out_pairs && both) {
      ptx::st_global(reinterpret_cast<float2*>(out), float2{low, high});
    } else {
      ptx::st_global(out, low);
      if (both) ptx::st_global(out + p.out_stride_channel, high);
    }
    return;
  }
  const uint32_t pair =
      p.out_type == Element::kFloat16 ? ptx::pack_half2(low, high) : ptx::pack_bfloat162(low, high);
  uint16_t* out = static_cast<uint16_t*>(p.out) + at;
  if (p.out_pairs && both) {
    ptx::st_global(reinterpret_cast<uint32_t*>(out), pair);
  } else {
    ptx::st_global(out, static_cast<uint16_t>(pair));
    if (both) ptx::st_global(out + p.out_stride_channel, static_cast<uint16_t>(pair >> 16));
  }
}

/// Transposes the 4 x 4 words of a quad: thread t's word i becomes thread i's word t.
ATTN8_DEVICE void transpose_quad(uint32_t (&words)[4]) {
  ATTN8_UNROLL
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (ptx::thread_index() & step) != 0;
    ATTN8_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      uint32_t& low = words[i];
      uint32_t& high = words[i + step];
      const uint32_t got = ptx::shfl_xor(upper ? low : high, step);
      if (upper) {
        low = got;
      } else {
        high = got;
      }
    }
  }
}

/// How much of a row's softmax its keys keep beside a sink, whose score joins the LSE.
ATTN8_DEVICE float beside_sink(float sink, float* lse) {
  const float larger = *lse > sink ? *lse : sink;
  const float all =
      larger == -INFINITY ? larger : larger + logf(expf(*lse - larger) + expf(sink - larger));
  const float kept = all == -INFINITY ? 0.0f : expf(*lse - all);
  *lse = all;
  return kept;
}

/// Normalizes a thread's two rows and writes them.
///   row           of the call, of r = 0; r = 1 is 8 further
///   reference(r)  what the sums are relative to, in log2 units
///   value(i)      accumulated products, elements as in a C fragment of packed_head_dim columns
template <int kHeadDim, class Softmax, class Reference, class Value>
ATTN8_DEVICE void store_rows(const AttendParams& p, const Softmax& softmax, int batch, int head,
                             int row, const Reference& reference, const Value& value) {
  const Sequence sequence = Sequence::of(p, batch);
  const int thread = ptx::thread_index() % 4;
  const int kv_head = head / (p.nheads_q / p.nheads_k);
  const float* v_scale =
      p.v_scale == nullptr
          ? nullptr
          : p.v_scale + static_cast<int64_t>(batch * p.nheads_k + kv_head) * kHeadDim;
  ATTN8_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int r_row = row + 8 * r;
    float lse;
    float factor = softmax.normalize(r, reference(r), &lse);
    const bool exists = r_row < sequence.seqlen_q;  // rows of the padding take part in shuffles
    const int64_t query = sequence.first_query + query_of(p, r_row);
    const int query_head = query_head_of(p, head, r_row);
    if (p.lse_shift != nullptr) {
      lse += ptx::ld_global(p.lse_shift + sequence.row_index(p, head, r_row));
    }
    if (p.sinks != nullptr) {
      const float sink = ptx::ld_global(p.sinks + query_head * p.sinks_stride);
      factor *= softmax.beside_codes(r, beside_sink(sink, &lse));
    }
    const int64_t row_offset = ptx::block_z() * p.out_stride_split +
                               sequence.batch * p.out_stride_batch + query * p.out_stride_row +
                               query_head * p.out_stride_head;
    const auto scaled = [&](int group) {
      const int column = group * 8 + thread * 2;
      const float2 scale = v_scale == nullptr
                               ? float2{1, 1}
                               : ptx::ld_global(reinterpret_cast<const float2*>(v_scale + column));
      return float2{value(group * 4 + 2 * r) * (factor * scale.x),
                    value(group * 4 + 2 * r + 1) * (factor * scale.y)};
    };
    if (p.out_eights) {
      ATTN8_UNROLL
      for (int first = 0; first < kHeadDim / 8; first += 4) {
        uint32_t words[4];
        ATTN8_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float2 pair = scaled(first + i);
          words[i] = p.out_type == Element::kFloat16 ? ptx::pack_half2(pair.x, pair.y)
                                                     : ptx::pack_bfloat162(pair.x, pair.y);
        }
        transpose_quad(words);
        const int column = (first + thread) * 8;
        if (exists && column < p.head_dim) {
          ptx::st_global(
              reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + row_offset + column),
              uint4{words[0], words[1], words[2], words[3]});
        }
      }
    } else if (exists) {
      ATTN8_UNROLL
      for (int group = 0; group < kHeadDim / 8; ++group) {
        const float2 pair = scaled(group);
        store_pair(p, row_offset, group * 8 + thread * 2, pair.x, pair.y);
      }
    }
    if (p.lse != nullptr && exists && thread == 0) {
      ptx::st_global(p.lse + ptx::block_z() * p.lse_stride_split +
                         sequence.batch * p.lse_stride_batch + query * p.lse_stride_row +
                         query_head * p.lse_stride_head,
                     lse);
    }
  }
}

}  // namespace attn8::cuda
