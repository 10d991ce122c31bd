// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "params.hpp"
#include "ptx.hpp"

/// The CUDA softmax: integer products of one key block in, 8-bit weights and the factor of the block
/// out. Both kernel families use it; docs/numerics.md defines what it computes.
///
/// Every thread holds two rows of the block, group and group + 8 of its warp's 16, and of each 16
/// keys the four of its C fragments: elements 0..7 of a key group are
///   row 0 keys 2t, 2t+1; row 1 keys 2t, 2t+1; row 0 keys 2t+8, 2t+9; row 1 keys 2t+8, 2t+9
/// The four threads of a quad share their rows.
namespace attn8::cuda {

/// What a row's float accumulators are multiplied with may grow this many octaves before they are
/// rescaled: 2^60 above codes * keys < 2^31 is far from the end of float, and weights 2^-60 below
/// the reference are far below what a sum keeps.
inline constexpr float kRescaleAbove = 60.0f;

/// Adding 2^23 to x in [0, 255] leaves round-half-even(x) in the low byte.
inline constexpr float kRoundToByte = 8388608.0f;

/// Keys [first, first + count) that a thread's two rows see.
struct VisibleKeys {
  int first[2];
  uint32_t count[2];

  ATTN8_DEVICE void set(const AttendParams& p, int r, int row) {
    const int lowest = row + p.first_offset;
    const int highest = row + p.last_offset;
    first[r] = lowest > 0 ? lowest : 0;
    const int end = highest < p.seqlen_k ? highest + 1 : p.seqlen_k;
    count[r] = end > first[r] ? static_cast<uint32_t>(end - first[r]) : 0;
  }
  ATTN8_DEVICE bool sees(int r, int key) const {
    return static_cast<uint32_t>(key - first[r]) < count[r];
  }
};

/// Key blocks that rows [row, row + rows) of the call visit, in order: [begin, end); those in
/// [full_begin, full_end) are seen whole by every row and need no mask.
struct BlockRange {
  int begin, full_begin, full_end, end;
};

ATTN8_DEVICE int clamp_to(int x, int low, int high) {
  return x < low ? low : x > high ? high : x;
}

template <int kKvBlock>
ATTN8_DEVICE BlockRange visited_blocks(const AttendParams& p, int row, int rows) {
  const int last_row = (row + rows < p.seqlen_q ? row + rows : p.seqlen_q) - 1;
  BlockRange range;
  range.begin = clamp_to(row + p.first_offset, 0, p.seqlen_k) / kKvBlock;
  const int end_key = clamp_to(last_row + p.last_offset + 1, 0, p.seqlen_k);
  range.end = (end_key + kKvBlock - 1) / kKvBlock;
  range.end = range.end > range.begin ? range.end : range.begin;
  const int first_full = clamp_to(last_row + p.first_offset, 0, p.seqlen_k);
  const int end_full = clamp_to(row + p.last_offset + 1, 0, p.seqlen_k);
  range.full_begin = clamp_to((first_full + kKvBlock - 1) / kKvBlock, range.begin, range.end);
  range.full_end = clamp_to(end_full / kKvBlock, range.full_begin, range.end);
  return range;
}

/// Softmax of two rows over the key blocks of one head.
template <int kKvBlock, Weights kWeights>
struct OnlineSoftmax {
  static constexpr int kElements = kKvBlock / 2;  // 2 rows x kKvBlock / 4 keys per thread
  static constexpr float kLevels = kWeights == Weights::kPaper ? 127.0f : 255.0f;

  float score_scale[2];  // q_scale * softmax_scale * log2(e)
  float reference[2];    // out and sums are relative to 2^reference
  float sum[2];          // of this thread's weights, before rounding, at most 1 each
  float code_sum[2];     // kPaper: of this thread's codes
  float block_scale[2];  // what the block's integer products are multiplied with

  ATTN8_DEVICE void start() {
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      reference[r] = -FLT_MAX;
      sum[r] = 0;
      code_sum[r] = 0;
    }
  }

  /// Scores in log2 units, biased by kScoreBias, of key groups [kFirst, kLast) of the block.
  ///   product(i)  integer product of element i of the block, as a float
  ///   constants   shared address of the block's [kKvBlock / 16][3][16] key constants
  ///   first_key   of the block
  template <int kFirst, int kLast, bool kMasked, class Product>
  ATTN8_DEVICE void scores(const Product& product, uint32_t constants, const VisibleKeys& visible,
                           int first_key, float (&t)[kElements]) const {
    const int thread = ptx::thread_index() % 4;
    ATTN8_UNROLL
    for (int group = kFirst; group < kLast; ++group) {
      const uint32_t address = constants + group * (kKeyConstants * 4) + thread * 16;
      const float4 scale4 = ptx::ld_shared<float4>(address);
      const float scale[4] = {scale4.x, scale4.y, scale4.z, scale4.w};
      float fold[4] = {kScoreBias, kScoreBias, kScoreBias, kScoreBias};
      if constexpr (kWeights == Weights::kFolded) {
        const float4 fold4 = ptx::ld_shared<float4>(address + kKeyGroup * 4);
        fold[0] = fold4.x;
        fold[1] = fold4.y;
        fold[2] = fold4.z;
        fold[3] = fold4.w;
      }
      ATTN8_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int r = e >> 1 & 1;
        const int key = (e >> 2) * 2 + (e & 1);  // of the thread's four
        const int i = group * 8 + e;
        t[i] = ptx::fma(ptx::mul(product(i), scale[key]), score_scale[r], fold[key]);
        if constexpr (kMasked) {
          const int column = group * 16 + (key >> 1) * 8 + thread * 2 + (key & 1);
          if (!visible.sees(r, first_key + column)) t[i] = -INFINITY;
        }
      }
    }
  }

  /// Largest score of row r over the block and the quad, at least -FLT_MAX. Positive floats compare
  /// as integers, which sm_90 does three at a time; when the largest is none (all negative, or an
  /// infinity or NaN among them) the row is done again as floats, an infinity becoming FLT_MAX.
  ATTN8_DEVICE float row_maximum(int r, float (&t)[kElements]) const {
    int bits = static_cast<int>(ptx::as_uint(t[2 * r]));
    ATTN8_UNROLL
    for (int i = 0; i < kElements; i += 4) {
      bits = ptx::max3(bits, static_cast<int>(ptx::as_uint(t[i + 2 * r])),
                       static_cast<int>(ptx::as_uint(t[i + 2 * r + 1])));
    }
    float largest = ptx::as_float(static_cast<uint32_t>(bits));
    if (static_cast<uint32_t>(bits) >= 0x7F800000u) {
      largest = -FLT_MAX;
      ATTN8_UNROLL
      for (int i = 0; i < kElements; ++i) {
        if ((i >> 1 & 1) != r) continue;
        if (t[i] == INFINITY) t[i] = FLT_MAX;
        largest = ptx::max(largest, t[i]);
      }
    }
    largest = ptx::max(largest, ptx::shfl_xor(largest, 1));
    return ptx::max(largest, ptx::shfl_xor(largest, 2));
  }

  /// Scores to weights: `packed` receives the codes as A fragments of k32 steps, in the key order
  /// of packed V. Sets block_scale and calls rescale(factor[2]) when what was accumulated so far
  /// must shrink.
  template <class Rescale>
  ATTN8_DEVICE void weights(float (&t)[kElements], uint32_t constants, const Rescale& rescale,
                            uint32_t (&packed)[kKvBlock / 32][4]) {
    float largest[2];
    float factor[2];
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      largest[r] = row_maximum(r, t);
      factor[r] = 1.0f;
      if constexpr (kWeights == Weights::kPaper) largest[r] = ptx::max(largest[r], reference[r]);
    }
    const float limit = kWeights == Weights::kPaper ? 0.0f : kRescaleAbove;
    if (largest[0] - reference[0] > limit || largest[1] - reference[1] > limit) {
      ATTN8_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (!(largest[r] - reference[r] > limit)) continue;
        factor[r] = ptx::ex2(reference[r] - largest[r]);
        reference[r] = largest[r];
        sum[r] *= factor[r];
        code_sum[r] *= factor[r];
      }
      rescale(factor);
    }
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) block_scale[r] = ptx::ex2(largest[r] - reference[r]);

    const int thread = ptx::thread_index() % 4;
    float block_sum[2] = {0, 0};
    uint32_t block_codes[2] = {0, 0};
    ATTN8_UNROLL
    for (int group = 0; group < kKvBlock / 16; ++group) {
      float inverse[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      if constexpr (kWeights == Weights::kFolded) {
        const float4 inverse4 = ptx::ld_shared<float4>(
            constants + group * (kKeyConstants * 4) + 2 * kKeyGroup * 4 + thread * 16);
        inverse[0] = inverse4.x;
        inverse[1] = inverse4.y;
        inverse[2] = inverse4.z;
        inverse[3] = inverse4.w;
      }
      ATTN8_UNROLL
      for (int r = 0; r < 2; ++r) {
        uint32_t byte[4];
        ATTN8_UNROLL
        for (int key = 0; key < 4; ++key) {
          const float weight =
              ptx::ex2(ptx::add(t[group * 8 + (key >> 1) * 4 + 2 * r + (key & 1)], -largest[r]));
          block_sum[r] = kWeights == Weights::kFolded
                             ? ptx::fma(weight, inverse[key], block_sum[r])
                             : ptx::add(block_sum[r], weight);
          byte[key] = ptx::as_uint(ptx::fma(weight, kLevels, kRoundToByte));
        }
        const uint32_t codes = ptx::prmt(ptx::prmt(byte[0], byte[1], 0x0040),
                                         ptx::prmt(byte[2], byte[3], 0x0040), 0x5410);
        packed[group / 2][group % 2 * 2 + r] = codes;
        if constexpr (kWeights == Weights::kPaper) {
          block_codes[r] = ptx::sum_bytes(codes, block_codes[r]);
        }
      }
    }
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      sum[r] = ptx::fma(block_sum[r], block_scale[r], sum[r]);
      if constexpr (kWeights == Weights::kPaper) code_sum[r] += static_cast<float>(block_codes[r]);
    }
  }

  /// After the last block: factor that turns row r's accumulated products into the output, and its
  /// log-sum-exp. Collective over the quad. A row that saw no key gets 0 and -inf.
  ATTN8_DEVICE float finish(int r, float* lse) {
    sum[r] += ptx::shfl_xor(sum[r], 1);
    sum[r] += ptx::shfl_xor(sum[r], 2);
    float normalizer = sum[r] * kLevels;
    if constexpr (kWeights == Weights::kPaper) {
      code_sum[r] += ptx::shfl_xor(code_sum[r], 1);
      code_sum[r] += ptx::shfl_xor(code_sum[r], 2);
      normalizer = code_sum[r] + 0.0f * sum[r];  // a NaN among the scores shows in `sum` alone
    }
    const float ln2 = 0.69314718f;
    *lse = sum[r] == 0 ? -INFINITY : logf(sum[r]) + (reference[r] - kScoreBias) * ln2;
    return normalizer == 0 ? 0.0f : 1.0f / normalizer;
  }
};

/// Writes a thread's part of 8-column group `group` of row `row`: columns 8 group + 2 thread + 0, 1.
ATTN8_DEVICE void store_pair(const AttendParams& p, int64_t row_offset, int column, float low,
                             float high) {
  if (column >= p.head_dim) return;
  if (p.out_type == Element::kFloat32) {
    ptx::st_global(reinterpret_cast<float2*>(static_cast<float*>(p.out) + row_offset + column),
                   float2{low, high});
  } else {
    const uint32_t pair = p.out_type == Element::kFloat16 ? ptx::pack_half2(low, high)
                                                          : ptx::pack_bfloat162(low, high);
    ptx::st_global(
        reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + row_offset + column), pair);
  }
}

/// Normalizes a thread's two rows and writes them.
///   row       of the call, of r = 0; r = 1 is 8 further
///   value(i)  accumulated products, elements as in a C fragment of packed_head_dim columns
template <int kHeadDim, class Softmax, class Value>
ATTN8_DEVICE void store_rows(const AttendParams& p, Softmax& softmax, int batch, int head, int row,
                             const Value& value) {
  const int thread = ptx::thread_index() % 4;
  const int kv_head = head / (p.nheads_q / p.nheads_k);
  const float* v_scale = p.v_scale + static_cast<int64_t>(batch * p.nheads_k + kv_head) * kHeadDim;
  ATTN8_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int r_row = row + 8 * r;
    float lse;
    const float factor = softmax.finish(r, &lse);
    if (r_row >= p.seqlen_q) continue;
    const int64_t row_offset = batch * p.out_stride_batch + r_row * p.out_stride_row +
                               head * p.out_stride_head;
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
      ptx::st_global(p.lse + batch * p.lse_stride_batch + r_row * p.lse_stride_row +
                         head * p.lse_stride_head,
                     lse);
    }
  }
}

}  // namespace attn8::cuda
