// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "params.hpp"
#include "ptx.hpp"

/// Which rows, keys and key blocks a block of the grid works on, and where they lie.
namespace attn8::cuda {

/// Query of a row of the kernel.
ATTN8_DEVICE int query_of(const AttendParams& p, int row) {
  return p.group == 1 ? row : row * p.group_inverse >> 16;
}

/// The caller's head of a row of head `head` of the kernel.
ATTN8_DEVICE int query_head_of(const AttendParams& p, int head, int row) {
  return head * p.group + row - query_of(p, row) * p.group;
}

/// One sequence of the batch.
struct Sequence {
  int seqlen_q;  ///< rows of the kernel
  int seqlen_k;
  int first_key;                  ///< those before it count for nothing
  int first_offset, last_offset;  ///< see AttendParams
  int position_offset;            ///< see ScoreChanges
  int first_query;                ///< among those of a ragged batch
  int batch;                      ///< of out and lse
  int64_t first_row;              ///< in the images of Q
  int64_t first_image;            ///< of Q

  static ATTN8_DEVICE Sequence of(const AttendParams& p, int batch) {
    Sequence s = {p.seqlen_q,
                  p.seqlen_k,
                  0,
                  p.first_offset,
                  p.last_offset,
                  p.changes.position_offset,
                  0,
                  batch,
                  0,
                  static_cast<int64_t>(batch) * p.nheads_q};
    // Whatever the caller's memory holds, the kernels stay inside theirs.
    if (p.seqlens_k != nullptr) {
      s.seqlen_k =
          clamp_to(ptx::ld_global(p.seqlens_k + batch * p.seqlens_k_stride), 0, p.seqlen_k);
    }
    if (p.leftpad_k != nullptr) {
      s.first_key =
          clamp_to(ptx::ld_global(p.leftpad_k + batch * p.leftpad_k_stride), 0, s.seqlen_k);
    }
    if (p.cu_seqlens_q != nullptr) {
      s.first_query = ptx::ld_global(p.cu_seqlens_q + batch);
      s.seqlen_q = (ptx::ld_global(p.cu_seqlens_q + batch + 1) - s.first_query) * p.group;
      s.batch = 0;
      s.first_image = 0;
      s.first_row = ragged_row(static_cast<int64_t>(s.first_query) * p.group, batch);
    }
    if (p.bottom_right) {
      const int shift = s.seqlen_k - s.seqlen_q / p.group;
      s.first_offset += shift;
      s.last_offset += shift;
      s.position_offset += shift;
    }
    return s;
  }

  /// Of the scale and the LSE's shift of row `row` of head `head`.
  ATTN8_DEVICE int64_t row_index(const AttendParams& p, int head, int row) const {
    return (first_image + head) * p.rows_q + first_row + row;
  }
};

/// Where a block of keys lies: row `row` of image `image`, of rows_k rows.
struct KeyTile {
  int64_t image, row;

  static ATTN8_DEVICE KeyTile of(const AttendParams& p, int batch, int kv_head, int64_t key) {
    if (p.block_table == nullptr) return {static_cast<int64_t>(batch) * p.nheads_k + kv_head, key};
    const int page = ptx::ld_global(
        p.block_table + static_cast<int64_t>(batch) * p.block_table_stride + (key >> p.page_shift));
    return {static_cast<int64_t>(page) * p.nheads_k + kv_head, key & ((1 << p.page_shift) - 1)};
  }
};

/// Keys that a thread's two rows see, `row` and `row + 8` of the kernel, in this z of the grid.
/// They are kept in 16 bytes of shared memory: registers are for the blocks that need no mask.
struct VisibleKeys {
  static constexpr int kBytes = 16;
  int first[2];
  uint32_t count[2];

  static ATTN8_DEVICE VisibleKeys of(const AttendParams& p, const Sequence& sequence, int row) {
    VisibleKeys keys;
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int query = query_of(p, row + 8 * r);
      const int lowest = query + sequence.first_offset;
      const int highest = query + sequence.last_offset;
      int begin = lowest > sequence.first_key ? lowest : sequence.first_key;
      int end = highest < sequence.seqlen_k ? highest + 1 : sequence.seqlen_k;
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

template <int kKvBlock>
ATTN8_DEVICE BlockRange visited_blocks(const AttendParams& p, const Sequence& s, int row,
                                       int rows) {
  const int first = query_of(p, row);
  const int last = query_of(p, (row + rows < s.seqlen_q ? row + rows : s.seqlen_q) - 1);
  BlockRange range;
  range.begin = clamp_to(first + s.first_offset, s.first_key, s.seqlen_k) / kKvBlock;
  const int end_key = clamp_to(last + s.last_offset + 1, 0, s.seqlen_k);
  range.end = (end_key + kKvBlock - 1) / kKvBlock;
  if (p.split_keys > 0) {
    const int blocks = p.split_keys / kKvBlock;
    const int split_begin = ptx::block_z() * blocks;
    range.begin = range.begin > split_begin ? range.begin : split_begin;
    range.end = range.end < split_begin + blocks ? range.end : split_begin + blocks;
  }
  range.end = range.end > range.begin ? range.end : range.begin;
  const int first_full = clamp_to(last + s.first_offset, s.first_key, s.seqlen_k);
  const int end_full = clamp_to(first + s.last_offset + 1, 0, s.seqlen_k);
  range.full_begin = clamp_to((first_full + kKvBlock - 1) / kKvBlock, range.begin, range.end);
  range.full_end = clamp_to(end_full / kKvBlock, range.full_begin, range.end);
  return range;
}

}  // namespace attn8::cuda
