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

/// One warp per query and head, two channels a thread and pass.
struct MergeSplits {
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / 32;
  static constexpr uint32_t kSharedBytes = 0;

  static ATTN8_DEVICE void run(const MergeParams& p, int batches) {
    const AttendParams& r = p.result;
    const int64_t rows = static_cast<int64_t>(batches) * r.seqlen_q * r.nheads_q;
    const int64_t row = static_cast<int64_t>(ptx::block_x()) * kRows + ptx::thread_index() / 32;
    if (row >= rows) return;
    const int64_t head = row % r.nheads_q;
    const int64_t query = row / r.nheads_q % r.seqlen_q;
    const int64_t batch = row / r.nheads_q / r.seqlen_q;

    float largest = -INFINITY;
    for (int split = 0; split < p.splits; ++split) {
      largest = ptx::max(largest, ptx::ld_global(p.lse + split * rows + row));
    }
    const float log2e = 1.4426950408889634f;
    const float reference = largest == -INFINITY ? 0.0f : largest;
    float sum = 0;
    for (int split = 0; split < p.splits; ++split) {
      sum += ptx::ex2((ptx::ld_global(p.lse + split * rows + row) - reference) * log2e);
    }
    const float factor = sum == 0 ? 0.0f : 1.0f / sum;
    const int row_floats = split_row_floats(r.head_dim);
    float lse = sum == 0 ? -INFINITY : reference + logf(sum);
    float kept = 1;
    if (r.sinks != nullptr)
      kept = beside_sink(ptx::ld_global(r.sinks + head * r.sinks_stride), &lse);
    const int64_t target =
        batch * r.out_stride_batch + query * r.out_stride_row + head * r.out_stride_head;
    for (int column = ptx::thread_index() % 32 * 2; column < r.head_dim; column += 64) {
      float low = 0;
      float high = 0;
      for (int split = 0; split < p.splits; ++split) {
        const float weight =
            ptx::ex2((ptx::ld_global(p.lse + split * rows + row) - reference) * log2e);
        const float2 part = ptx::ld_global(
            reinterpret_cast<const float2*>(p.out + (split * rows + row) * row_floats + column));
        low = ptx::fma(part.x, weight, low);
        high = ptx::fma(part.y, weight, high);
      }
      store_pair(r, target, column, low * factor * kept, high * factor * kept);
    }
    if (r.lse != nullptr && ptx::thread_index() % 32 == 0) {
      ptx::st_global(
          r.lse + batch * r.lse_stride_batch + query * r.lse_stride_row + head * r.lse_stride_head,
          lse);
    }
  }
};

}  // namespace attn8::cuda
