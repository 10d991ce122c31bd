// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "online_softmax.hpp"

/// Attention of 16 query rows for scores of any size. The kernels call it for the warps whose
/// weights left the range of float; it makes no use of what they computed, reads the packed tensors
/// from global memory and keeps weights relative to the largest score so far. Every block is
/// multiplied three times, because registers belong to the usual path. Slow and rare.
namespace attn8::cuda {

template <int kHeadDim, int kKvBlock, Weights kWeights, Scores kScores>
struct CarefulRows {
  static constexpr int kRowBytes = packed_row_bytes(kHeadDim);
  static constexpr int kGroups = kKvBlock / kKeyGroup;
  using Softmax = OnlineSoftmax<kKvBlock, kWeights, kScores>;
  using Constants = KeyConstants<kWeights>;

  static constexpr bool kHalf = kWeights == Weights::kHalf;
  /// Bytes of packed V per key.
  static constexpr int kValueBytes = kHeadDim * (kHalf ? 2 : 1);

  const AttendParams& p;
  const Sequence sequence;
  const int batch, head, kv_head;
  const int8_t* q;  // image of the head
  int row;          // first of the 16
  Softmax softmax;
  float reference[2];

  ATTN8_DEVICE CarefulRows(const AttendParams& params, int of_batch, int of_head, int first_row)
      : p(params),
        sequence(Sequence::of(params, of_batch)),
        batch(of_batch),
        head(of_head),
        kv_head(of_head / (params.nheads_q / params.nheads_k)),
        q(params.q + (sequence.first_image + of_head) * params.rows_q * kRowBytes),
        row(first_row) {
    softmax.start();
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      reference[r] = -FLT_MAX;
      softmax.score_scale[r] =
          ptx::ld_global(p.q_scale + sequence.row_index(p, head, thread_row() + 8 * r)) *
          p.score_scale;
    }
  }

  ATTN8_DEVICE int thread_row() const { return row + ptx::thread_index() % 32 / 4; }

  static ATTN8_DEVICE uint32_t load_word(const int8_t* image, int64_t offset) {
    return ptx::ld_global(reinterpret_cast<const uint32_t*>(image + offset));
  }

  /// Scores of one key group; those beyond float saturate, so that the largest stay the largest.
  ATTN8_DEVICE Constants scores(int64_t key, float (&t)[8]) const {
    const int lane = ptx::thread_index() % 32;
    const KeyTile tile = KeyTile::of(p, batch, kv_head, key);
    const int8_t* k = p.k + tile.image * p.rows_k * kRowBytes;
    int sums[2][4] = {};
    ATTN8_NO_UNROLL
    for (int byte = 0; byte < kRowBytes; byte += 32) {
      uint32_t a[4];
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) {
        a[i] = load_word(
            q, packed_row_offset(p.rows_q, kRowBytes, sequence.first_row + row + a_row(lane, i),
                                 byte + a_byte(lane, i)));
      }
      ATTN8_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t b[2];
        ATTN8_UNROLL
        for (int i = 0; i < 2; ++i) {
          b[i] = load_word(
              k, packed_row_offset(p.rows_k, kRowBytes, tile.row + 8 * half + b_column(lane),
                                   byte + b_byte(lane, i)));
        }
        ptx::mma_s8(sums[half], a, b);
      }
    }
    const float* group = p.key_constants + tile.image * p.rows_k * 2 +
                         tile.row / kKeyGroup * kKeyConstants + lane % 4 * 4;
    Constants c;
    c.scale = ptx::ld_global(reinterpret_cast<const float4*>(group));
    if constexpr (kWeights == Weights::kFolded) {
      c.ratio = ptx::ld_global(reinterpret_cast<const float4*>(group + kKeyGroup));
    }
    const VisibleKeys visible = VisibleKeys::of(p, sequence, thread_row());
    RowChanges changes = {};
    if constexpr (kScores != Scores::kPlain) {
      changes = RowChanges::of(p, sequence, batch, head, thread_row());
    }
    ATTN8_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int r = e >> 1 & 1;
      t[e] = c.score(static_cast<float>(sums[e / 4][e % 4]), softmax.score_scale[r], e);
      if (t[e] == INFINITY) t[e] = FLT_MAX;
      if (t[e] == -INFINITY) t[e] = -FLT_MAX;
      const int column = static_cast<int>(key) + key_column(0, e);
      if constexpr (kScores != Scores::kPlain) {
        t[e] = changes.apply<kScores>(p.changes, t[e], r, column, visible.sees(r, column));
      }
      if (!visible.sees(r, column)) t[e] = -INFINITY;
    }
    return c;
  }

  static ATTN8_DEVICE float quad_maximum(float x) {
    x = ptx::max(x, ptx::shfl_xor(x, 1));
    return ptx::max(x, ptx::shfl_xor(x, 2));
  }

  ATTN8_DEVICE void attend_block(int64_t first_key, float (&out)[kHeadDim / 8][4]) {
    float t[8];
    float largest[2] = {-FLT_MAX, -FLT_MAX};
    ATTN8_NO_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      scores(first_key + group * kKeyGroup, t);
      ATTN8_UNROLL
      for (int e = 0; e < 8; ++e) largest[e >> 1 & 1] = ptx::max(largest[e >> 1 & 1], t[e]);
    }
    float shrink[2];
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      largest[r] = ptx::max(quad_maximum(largest[r]), reference[r]);
      // A power of two, so that weights round as if they were relative to 2^0.
      if constexpr (kHalf) largest[r] = ceilf(largest[r]);
      shrink[r] = ptx::ex2(reference[r] - largest[r]);
      reference[r] = largest[r];
      softmax.sum[r] *= shrink[r];
      softmax.running[r] *= shrink[r];
      softmax.code_sum[r] *= shrink[r];
      largest[r] = 0;
    }

    softmax.start_block();
    ATTN8_NO_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const Constants c = scores(first_key + group * kKeyGroup, t);
      ATTN8_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int r = e >> 1 & 1;
        const float weight = ptx::ex2(ptx::add(t[e], -reference[r]));
        softmax.block_sum[r] = ptx::add(softmax.block_sum[r], weight);
        largest[r] = ptx::max(largest[r], c.fold(weight, e));
      }
    }
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) largest[r] = quad_maximum(largest[r]);
    float factor[2];
    softmax.finish_block(largest, factor);

    if constexpr (kHalf) {
      add_halves(first_key, shrink, out);
    } else {
      add_codes(first_key, shrink, factor, out);
    }
  }

  /// Weights of a key group relative to the reference, with r.
  ATTN8_DEVICE void group_weights(int64_t key, float (&t)[8]) const {
    const Constants c = scores(key, t);
    ATTN8_UNROLL
    for (int e = 0; e < 8; ++e) {
      t[e] = c.fold(ptx::ex2(ptx::add(t[e], -reference[e >> 1 & 1])), e);
    }
  }

  ATTN8_DEVICE void add_halves(int64_t first_key, const float (&shrink)[2],
                               float (&out)[kHeadDim / 8][4]) {
    uint32_t packed[kGroups][4];  // [key groups][A fragment]
    ATTN8_NO_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      float t[8];
      group_weights(first_key + group * kKeyGroup, t);
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) packed[group][i] = ptx::pack_bfloat162(t[2 * i], t[2 * i + 1]);
    }
    const int lane = ptx::thread_index() % 32;
    const KeyTile tile = KeyTile::of(p, batch, kv_head, first_key);
    const auto* v = reinterpret_cast<const uint16_t*>(p.v + tile.image * p.rows_k * kValueBytes);
    ATTN8_UNROLL
    for (int columns = 0; columns < kHeadDim / 8; ++columns) {
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) out[columns][i] *= shrink[i >> 1];
      ATTN8_NO_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        uint32_t b[2];
        ATTN8_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int64_t key = tile.row + group * kKeyGroup + b_byte(lane, i) / 2;
          const int channel = columns * 8 + b_column(lane);
          const auto value = [&](int64_t of_key) {
            return uint32_t{
                ptx::ld_global(v + packed_v_half_offset(kHeadDim, of_key, channel) / 2)};
          };
          b[i] = value(key) | value(key + 1) << 16;
        }
        ptx::mma_bf16(out[columns], packed[group], b);
      }
    }
  }

  ATTN8_DEVICE void add_codes(int64_t first_key, const float (&shrink)[2], const float (&factor)[2],
                              float (&out)[kHeadDim / 8][4]) {
    float t[8];
    uint32_t packed[kGroups][2];  // [key groups][rows]: half an A fragment each
    uint32_t block_codes[2] = {0, 0};
    ATTN8_NO_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      group_weights(first_key + group * kKeyGroup, t);
      ATTN8_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float weights[4] = {t[2 * r], t[2 * r + 1], t[2 * r + 4], t[2 * r + 5]};
        packed[group][r] = Softmax::round_to_codes(weights, factor[r], block_codes[r]);
      }
    }
    softmax.add_codes(block_codes);

    const int lane = ptx::thread_index() % 32;
    const KeyTile tile = KeyTile::of(p, batch, kv_head, first_key);
    const int8_t* v = p.v + tile.image * p.rows_k * kHeadDim;
    ATTN8_UNROLL
    for (int columns = 0; columns < kHeadDim / 8; ++columns) {
      int sums[4] = {};
      ATTN8_NO_UNROLL
      for (int step = 0; step < kGroups / 2; ++step) {
        const uint32_t a[4] = {packed[2 * step][0], packed[2 * step][1], packed[2 * step + 1][0],
                               packed[2 * step + 1][1]};
        const int64_t key = tile.row + step * 32;
        uint32_t b[2];
        ATTN8_UNROLL
        for (int i = 0; i < 2; ++i) {
          b[i] = load_word(
              v, (key / kPanelKeys * kHeadDim + columns * 8) * kPanelKeys +
                     swizzle(b_column(lane) * kPanelKeys + static_cast<uint32_t>(key % kPanelKeys) +
                                 b_byte(lane, i),
                             kPanelKeys));
        }
        ptx::mma_u8(sums, a, b);
      }
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& o = out[columns][i];
        o = ptx::fma(static_cast<float>(sums[i]), softmax.block_scale[i >> 1], o * shrink[i >> 1]);
      }
    }
  }
};

/// Rows [row, row + 16) of one head, by the calling warp.
template <int kHeadDim, int kKvBlock, Weights kWeights, Scores kScores>
ATTN8_DEVICE_NOINLINE void attend_carefully(const AttendParams& p, int batch, int head, int row) {
  CarefulRows<kHeadDim, kKvBlock, kWeights, kScores> rows(p, batch, head, row);
  float out[kHeadDim / 8][4] = {};  // [16 rows, kHeadDim]
  const BlockRange blocks = visited_blocks<kKvBlock>(p, rows.sequence, row, 16);
  for (int block = blocks.begin; block < blocks.end; ++block) {
    rows.attend_block(static_cast<int64_t>(block) * kKvBlock, out);
  }
  rows.softmax.add_quad();
  store_rows<kHeadDim>(
      p, rows.softmax, batch, head, rows.thread_row(), [&](int r) { return rows.reference[r]; },
      [&](int i) { return out[i / 4][i % 4]; });
}

}  // namespace attn8::cuda
