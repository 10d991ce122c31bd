// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "online_softmax.hpp"

/// Joins the outputs of key ranges that were attended apart: each is a mean of V, and its LSE says
/// how much it counts.
namespace attn8::cuda {

/// Floats of a row of a part: whole pairs.
ATTN8_HOST_DEVICE constexpr int split_row_floats(int head_dim) { return head_dim + head_dim % 2; }

struct MergeParams {
  const float* out;  ///< [splits][batch][seqlen_q][nheads_q][split_row_floats()]
  const float* lse;  ///< [splits][batch][seqlen_q][nheads_q]
  int splits;
  AttendParams result;  ///< out, lse and their strides; lengths and heads are the caller's
};

/// One block per query and head: parts are far apart in memory, so each warp reads some of them.
struct MergeSplits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMaxHeadDim = 256;
  /// Pairs of channels of a lane, and parts that a warp has in flight.
  static constexpr int kGroups = kMaxHeadDim / 64;
  static constexpr int kAtOnce = 4;
  /// Sums of each warp, [kWarps][kMaxHeadDim] floats.
  static constexpr uint32_t kSharedBytes = kWarps * kMaxHeadDim * 4;

  static ATTN8_DEVICE void run(const MergeParams& p, int batches) {
    const AttendParams& r = p.result;
    const int64_t rows = static_cast<int64_t>(batches) * r.seqlen_q * r.nheads_q;
    const int64_t row = ptx::block_x();
    const int64_t head = row % r.nheads_q;
    const int64_t query = row / r.nheads_q % r.seqlen_q;
    const int64_t batch = row / r.nheads_q / r.seqlen_q;
    const int lane = ptx::thread_index() % 32;
    const int warp = ptx::thread_index() / 32;

    ptx::wait_for_previous_grid();
    float reference = -INFINITY;
    for (int split = lane; split < p.splits; split += 32) {
      reference = ptx::max(reference, ptx::ld_written(p.lse + split * rows + row));
    }
    ATTN8_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) {
      reference = ptx::max(reference, ptx::shfl_xor(reference, mask));
    }
    if (reference == -INFINITY) reference = 0;
    const auto weight_of = [&](int split) {
      const float log2e = 1.4426950408889634f;
      return ptx::ex2((ptx::ld_written(p.lse + split * rows + row) - reference) * log2e);
    };
    float sum = 0;
    for (int split = lane; split < p.splits; split += 32) sum += weight_of(split);
    ATTN8_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) sum += ptx::shfl_xor(sum, mask);

    const int row_floats = split_row_floats(r.head_dim);
    const uint32_t shared = ptx::smem_base();
    float2 total[kGroups] = {};
    for (int first = warp; first < p.splits; first += kWarps * kAtOnce) {
      float weight[kAtOnce];
      float2 part[kAtOnce][kGroups];
      ATTN8_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int split = first + i * kWarps;
        const float* source = p.out + (split * rows + row) * row_floats + lane * 2;
        weight[i] = split < p.splits ? weight_of(split) : 0.0f;
        ATTN8_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          const bool inside = split < p.splits && lane * 2 + group * 64 < r.head_dim;
          part[i][group] =
              inside ? ptx::ld_written(reinterpret_cast<const float2*>(source + group * 64))
                     : float2{0, 0};
        }
      }
      ATTN8_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        ATTN8_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          total[group].x = ptx::fma(part[i][group].x, weight[i], total[group].x);
          total[group].y = ptx::fma(part[i][group].y, weight[i], total[group].y);
        }
      }
    }
    ATTN8_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      ptx::st_shared(shared + (warp * kMaxHeadDim + lane * 2 + group * 64) * 4, total[group]);
    }
    ptx::sync_block();

    float lse = sum == 0 ? -INFINITY : reference + logf(sum);
    float factor = sum == 0 ? 0.0f : 1.0f / sum;
    if (r.sinks != nullptr) {
      factor *= beside_sink(ptx::ld_global(r.sinks + head * r.sinks_stride), &lse);
    }
    const int column = ptx::thread_index() * 2;
    if (column < r.head_dim) {
      float2 all = {0, 0};
      ATTN8_UNROLL
      for (int other = 0; other < kWarps; ++other) {
        const float2 part = ptx::ld_shared<float2>(shared + (other * kMaxHeadDim + column) * 4);
        all.x += part.x;
        all.y += part.y;
      }
      store_pair(r,
                 batch * r.out_stride_batch + query * r.out_stride_row + head * r.out_stride_head,
                 column, all.x * factor, all.y * factor);
    }
    if (r.lse != nullptr && ptx::thread_index() == 0) {
      ptx::st_global(
          r.lse + batch * r.lse_stride_batch + query * r.lse_stride_row + head * r.lse_stride_head,
          lse);
    }
  }
};

}  // namespace attn8::cuda
