// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "params.hpp"
#include "ptx.hpp"

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

/// Query of a row of the kernel.
ATTN8_DEVICE int query_of(const AttendParams& p, int row) {
  return p.group == 1 ? row : row * p.group_inverse >> 16;
}

/// Keys that a thread's two rows see, `row` and `row + 8` of the kernel, in this z of the grid. A
/// thread keeps them in 16 bytes of shared memory of its own: registers are for the blocks that
/// need no mask.
struct VisibleKeys {
  static constexpr int kBytes = 16;
  int first[2];
  uint32_t count[2];

  static ATTN8_DEVICE VisibleKeys of(const AttendParams& p, int row) {
    VisibleKeys keys;
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int query = query_of(p, row + 8 * r);
      const int lowest = query + p.first_offset;
      const int highest = query + p.last_offset;
      int begin = lowest > 0 ? lowest : 0;
      int end = highest < p.seqlen_k ? highest + 1 : p.seqlen_k;
      if (p.split_keys > 0) {
        const int split_begin = ptx::block_z() * p.split_keys;
        begin = begin > split_begin ? begin : split_begin;
        end = end < split_begin + p.split_keys ? end : split_begin + p.split_keys;
      }
      keys.first[r] = begin;
      keys.count[r] = end > begin ? static_cast<uint32_t>(end - begin) : 0;
    }
    return keys;
  }
  static ATTN8_DEVICE VisibleKeys kept(uint32_t address) {
    const int4 x = ptx::ld_shared<int4>(address);
    return {{x.x, x.y}, {static_cast<uint32_t>(x.z), static_cast<uint32_t>(x.w)}};
  }
  ATTN8_DEVICE void keep(uint32_t address) const {
    ptx::st_shared(
        address, int4{first[0], first[1], static_cast<int>(count[0]), static_cast<int>(count[1])});
  }
  ATTN8_DEVICE bool sees(int r, int key) const {
    return static_cast<uint32_t>(key - first[r]) < count[r];
  }
};

/// Key blocks that rows [row, row + rows) of the call visit in this z of the grid, in order:
/// [begin, end); those in [full_begin, full_end) are seen whole by every row and need no mask.
struct BlockRange {
  int begin, full_begin, full_end, end;
};

ATTN8_DEVICE int clamp_to(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

template <int kKvBlock>
ATTN8_DEVICE BlockRange visited_blocks(const AttendParams& p, int row, int rows) {
  const int first = query_of(p, row);
  const int last = query_of(p, (row + rows < p.seqlen_q ? row + rows : p.seqlen_q) - 1);
  BlockRange range;
  range.begin = clamp_to(first + p.first_offset, 0, p.seqlen_k) / kKvBlock;
  const int end_key = clamp_to(last + p.last_offset + 1, 0, p.seqlen_k);
  range.end = (end_key + kKvBlock - 1) / kKvBlock;
  if (p.split_keys > 0) {
    const int blocks = p.split_keys / kKvBlock;
    const int split_begin = ptx::block_z() * blocks;
    range.begin = range.begin > split_begin ? range.begin : split_begin;
    range.end = range.end < split_begin + blocks ? range.end : split_begin + blocks;
  }
  range.end = range.end > range.begin ? range.end : range.begin;
  const int first_full = clamp_to(last + p.first_offset, 0, p.seqlen_k);
  const int end_full = clamp_to(first + p.last_offset + 1, 0, p.seqlen_k);
  range.full_begin = clamp_to((first_full + kKvBlock - 1) / kKvBlock, range.begin, range.end);
  range.full_end = clamp_to(end_full / kKvBlock, range.full_begin, range.end);
  return range;
}

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

/// Softmax of two rows over the key blocks of one head.
template <int kKvBlock, Weights kWeights>
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
  ///   visible_address  of the thread's VisibleKeys
  ///   product(i)       integer product of element i of the block, as a float
  ///   constants        shared address of the block's [kKvBlock / 16][2][16] key constants
  ///   first_key        of the block
  ///   next_scale       scales of group kFirst; then those of group kLast
  /// An exponential takes some 40 cycles and a warp waits for whole batches of them, so each
  /// group's are used while the next group's are being computed.
  template <int kFirst, int kLast, bool kMasked, class Product>
  ATTN8_DEVICE void weights(uint32_t visible_address, const Product& product, uint32_t constants,
                            int first_key, float4& next_scale, float (&p)[kElements]) {
    VisibleKeys visible = {};
    if constexpr (kMasked) visible = VisibleKeys::kept(visible_address);
    Constants now = {};
    Constants previous = {};
    ATTN8_UNROLL
    for (int group = kFirst; group <= kLast; ++group) {
      previous.ratio = now.ratio;
      if (group < kLast) {
        now.scale = next_scale;
        now.ratio = load_ratio(constants, group);
        if (group + 1 < kKvBlock / kKeyGroup) next_scale = load_scale(constants, group + 1);
      }
      ATTN8_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int r = e >> 1 & 1;
        if (group < kLast) {
          float score = now.score(product(group * 8 + e), score_scale[r], e);
          if constexpr (kMasked) {
            if (!visible.sees(r, first_key + key_column(group, e))) score = -INFINITY;
          }
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
};

/// Writes a thread's part of 8-column group `group` of row `row`: columns 8 group + 2 thread +
/// 0, 1.
ATTN8_DEVICE void store_pair(const AttendParams& p, int64_t row_offset, int column, float low,
                             float high) {
  if (column >= p.head_dim) return;
  if (p.out_type == Element::kFloat32) {
    ptx::st_global(reinterpret_cast<float2*>(static_cast<float*>(p.out) + row_offset + column),
                   float2{low, high});
  } else {
    const uint32_t pair = p.out_type == Element::kFloat16 ? ptx::pack_half2(low, high)
                                                          : ptx::pack_bfloat162(low, high);
    ptx::st_global(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + row_offset + column),
                   pair);
  }
}

/// Normalizes a thread's two rows and writes them.
///   row           of the call, of r = 0; r = 1 is 8 further
///   reference(r)  what the sums are relative to, in log2 units
///   value(i)      accumulated products, elements as in a C fragment of packed_head_dim columns
template <int kHeadDim, class Softmax, class Reference, class Value>
ATTN8_DEVICE void store_rows(const AttendParams& p, const Softmax& softmax, int batch, int head,
                             int row, const Reference& reference, const Value& value) {
  const int thread = ptx::thread_index() % 4;
  const int kv_head = head / (p.nheads_q / p.nheads_k);
  const float* v_scale = p.v_scale + static_cast<int64_t>(batch * p.nheads_k + kv_head) * kHeadDim;
  ATTN8_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int r_row = row + 8 * r;
    float lse;
    const float factor = softmax.normalize(r, reference(r), &lse);
    if (r_row >= p.seqlen_q) continue;
    const int query = query_of(p, r_row);
    const int query_head = head * p.group + r_row - query * p.group;
    const int64_t row_offset = ptx::block_z() * p.out_stride_split + batch * p.out_stride_batch +
                               query * p.out_stride_row + query_head * p.out_stride_head;
    ATTN8_UNROLL
    for (int group = 0; group < kHeadDim / 8; ++group) {
      const int column = group * 8 + thread * 2;
      const float2 scale = ptx::ld_global(reinterpret_cast<const float2*>(v_scale + column));
      store_pair(p, row_offset, column, value(group * 4 + 2 * r) * (factor * scale.x),
                 value(group * 4 + 2 * r + 1) * (factor * scale.y));
    }
    if (p.lse != nullptr && thread == 0) {
      if (p.lse_shift != nullptr) {
        lse += ptx::ld_global(p.lse_shift +
                              static_cast<int64_t>(batch * p.nheads_q + head) * p.rows_q + r_row);
      }
      ptx::st_global(p.lse + ptx::block_z() * p.lse_stride_split + batch * p.lse_stride_batch +
                         query * p.lse_stride_row + query_head * p.lse_stride_head,
                     lse);
    }
  }
}

}  // namespace attn8::cuda
