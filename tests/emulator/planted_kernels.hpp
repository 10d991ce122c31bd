// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "cuda/layout.hpp"
#include "cuda/ptx.hpp"

/// Two small kernels with the pipelines of the attention kernels, and a way to break each rule.
/// Both compute, for q [rows][64] and k [seqlen_k][64] int8,
///   out[i] = sum over visible keys j of (1 + q_i . k_j)
/// where a key is visible when j <= i + offset and j < seqlen_k.
namespace attn8::cuda::planted {

struct Params {
  const int8_t* q;
  const int8_t* k;
  int* out;
  int seqlen_k;
  int offset;
};

inline constexpr int kHeadDim = 64;
inline constexpr int kKvBlock = 64;
inline constexpr int kRows = 64;

ATTN8_DEVICE bool visible(const Params& p, int row, int key, int slack) {
  return key < p.seqlen_k && key <= row + p.offset + slack;
}

// ---- cp.async, ldmatrix, mma --------------------------------------------------------------------

enum class Sm80Bug {
  kNone,
  kNoWait,            ///< no cp.async.wait_group before the tile is read
  kNoBarrier,         ///< no barrier between a tile's arrival and its readers
  kOneBuffer,         ///< the next tile goes where this one is still read
  kNoSwizzle,         ///< tiles unswizzled on both sides: right, but bank conflicts
  kOtherSwizzle,      ///< reader and loader disagree
  kMaskOffByOne,      ///< the mask lets one key too many through
  kDivergentShuffle,  ///< lanes of odd rows skip a shuffle
  kMissingLane,       ///< one lane leaves before the last barrier
  kTooSmallShared,    ///< a stage beyond the shared memory asked for
  kReadPastEnd,       ///< rows beyond seqlen_k are read instead of filled with zeros
};

template <Sm80Bug kBug>
struct Sm80 {
  static constexpr int kThreads = 128;
  using Tile = SharedTile<kKvBlock, kHeadDim>;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + Tile::kBytes;
  static constexpr uint32_t kSharedBytes =
      kK + (kBug == Sm80Bug::kTooSmallShared ? 1 : 2) * Tile::kBytes;

  static ATTN8_DEVICE uint32_t offset(int row, int byte, bool reader) {
    if (kBug == Sm80Bug::kNoSwizzle || (kBug == Sm80Bug::kOtherSwizzle && reader)) {
      return static_cast<uint32_t>(row * kHeadDim + byte);
    }
    return Tile::offset(static_cast<uint32_t>(row), static_cast<uint32_t>(byte));
  }

  static ATTN8_DEVICE void load(uint32_t target, const int8_t* source, int rows) {
    for (int chunk = ptx::thread_index(); chunk < kKvBlock * 4; chunk += kThreads) {
      const int row = chunk / 4;
      const int byte = chunk % 4 * 16;
      const bool valid = kBug == Sm80Bug::kReadPastEnd || row < rows;
      ptx::cp_async16(target + offset(row, byte, false),
                      source + (valid ? row : 0) * kHeadDim + byte, valid);
    }
    ptx::cp_commit();
  }

  static ATTN8_DEVICE void run(const Params& p) {
    const uint32_t base = ptx::smem_base();
    const int warp = ptx::thread_index() / 32;
    const int lane = ptx::thread_index() % 32;
    const int tiles = (p.seqlen_k + kKvBlock - 1) / kKvBlock;
    const auto stage = [&](int tile) {
      return base + kK +
             static_cast<uint32_t>(kBug == Sm80Bug::kOneBuffer ? 0 : tile % 2) * Tile::kBytes;
    };
    load(base + kQ, p.q, kRows);
    load(stage(0), p.k, p.seqlen_k);
    ptx::cp_wait<1>();
    ptx::sync_block();
    uint32_t q[kHeadDim / 32][4];
    for (int step = 0; step < kHeadDim / 32; ++step) {
      ptx::ldmatrix_x4(q[step], base + kQ +
                                    offset(warp * 16 + ldmatrix_a_row(lane),
                                           step * 32 + ldmatrix_a_byte(lane), true));
    }
    int sum[2] = {0, 0};
    for (int tile = 0; tile < tiles; ++tile) {
      if (kBug != Sm80Bug::kNoWait) ptx::cp_wait<0>();
      if (kBug != Sm80Bug::kNoBarrier) ptx::sync_block();
      if (tile + 1 < tiles) {
        load(stage(tile + 1), p.k + (tile + 1) * kKvBlock * kHeadDim,
             p.seqlen_k - (tile + 1) * kKvBlock);
      }
      for (int columns = 0; columns < kKvBlock; columns += 16) {
        int s[2][4] = {};
        for (int step = 0; step < kHeadDim / 32; ++step) {
          uint32_t k[4];
          ptx::ldmatrix_x4(k, stage(tile) + offset(columns + ldmatrix_b_column(lane),
                                                   step * 32 + ldmatrix_b_byte(lane), true));
          ptx::mma_s8(s[0], q[step], {k[0], k[1]});
          ptx::mma_s8(s[1], q[step], {k[2], k[3]});
        }
        for (int i = 0; i < 8; ++i) {
          const int row = warp * 16 + c_row(lane, i);
          const int key = tile * kKvBlock + columns + c_column(lane, i);
          const int slack = kBug == Sm80Bug::kMaskOffByOne ? 1 : 0;
          if (visible(p, row, key, slack)) sum[i / 2 % 2] += 1 + s[i / 4][i % 4];
        }
      }
    }
    for (int r = 0; r < 2; ++r) {
      if (kBug != Sm80Bug::kDivergentShuffle || lane / 4 % 2 == 0) {
        sum[r] += ptx::shfl_xor(sum[r], 1);
      }
      sum[r] += ptx::any(true) ? ptx::shfl_xor(sum[r], 2) : 0;
      const int row = warp * 16 + lane / 4 + 8 * r;
      if (lane % 4 == 0) ptx::st_global(p.out + row, sum[r]);
    }
    if (kBug == Sm80Bug::kMissingLane && ptx::thread_index() == 77) return;
    ptx::sync_block();
  }
};

// ---- TMA, mbarrier, wgmma -----------------------------------------------------------------------

enum class Sm90Bug {
  kNone,
  kNoWgmmaWait,     ///< no wgmma.wait_group before scores are read
  kNoWgmmaFence,    ///< no wgmma.fence before the first wgmma of a tile
  kNoEmptyWait,     ///< the producer does not wait for a stage to be released
  kEarlyRelease,    ///< a stage is released before its wgmma has finished
  kNoFullWait,      ///< the consumer does not wait for the tile
  kNoProxyFence,    ///< q written by ordinary stores without fence.proxy.async
  kWrongBytes,      ///< expect_tx promises more bytes than the box has
  kOtherSwizzle,    ///< tensor map and descriptor disagree
  kNoBarrierInit,   ///< a barrier is used that nobody initialized
  kNoInitFence,     ///< no fence between mbarrier.init and the first copy
  kNoInitBarrier,   ///< no block barrier between mbarrier.init and first use
  kForgottenGroup,  ///< the kernel ends with a group in flight
};

template <Sm90Bug kBug>
struct Sm90 {
  static constexpr int kThreads = 256;  // a producer warpgroup, a consumer warpgroup
  static constexpr int kStages = 2;
  using Tile = SharedTile<kKvBlock, kHeadDim>;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + Tile::kBytes;
  static constexpr uint32_t kBarriers = kK + kStages * Tile::kBytes;
  static constexpr uint32_t kSharedBytes = kBarriers + 32;

  static ATTN8_DEVICE void produce(const Params& p, const ptx::TensorMap& map, int tiles,
                                   uint32_t base, uint32_t full, uint32_t empty) {
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t stage = static_cast<uint32_t>(tile % kStages);
      const uint32_t parity = static_cast<uint32_t>(tile / kStages + 1) & 1;
      if (kBug != Sm90Bug::kNoEmptyWait) ptx::mbar_wait(empty + 8 * stage, parity);
      const uint32_t extra = kBug == Sm90Bug::kWrongBytes ? 16 : 0;
      ptx::mbar_expect_tx(full + 8 * stage, Tile::kBytes + extra);
      ptx::tma_load3(base + kK + stage * Tile::kBytes, &map, full + 8 * stage, 0, tile * kKvBlock,
                     0);
    }
    (void)p;
  }

  /// q by ordinary stores of the consumer warpgroup.
  static ATTN8_DEVICE void store_q(const Params& p, uint32_t base, int thread) {
    for (int chunk = thread; chunk < kRows * 4; chunk += 128) {
      const int row = chunk / 4;
      const int byte = chunk % 4 * 16;
      const auto* source = reinterpret_cast<const uint4*>(p.q + row * kHeadDim + byte);
      ptx::st_shared(
          base + kQ + Tile::offset(static_cast<uint32_t>(row), static_cast<uint32_t>(byte)),
          ptx::ld_global(source));
    }
    if (kBug != Sm90Bug::kNoProxyFence) ptx::fence_proxy_async();
    ptx::bar_sync(1, 128);
  }

  static ATTN8_DEVICE void consume(const Params& p, int tiles, uint32_t base, uint32_t full,
                                   uint32_t empty) {
    const int thread = ptx::thread_index() % 128;
    const int lane = thread % 32;
    constexpr uint32_t kSpan = kBug == Sm90Bug::kOtherSwizzle ? 2 * Tile::kSpan : Tile::kSpan;
    store_q(p, base, thread);
    uint32_t sum[2] = {0, 0};  // wraps on the poison that a planted bug may read
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t stage = static_cast<uint32_t>(tile % kStages);
      if (kBug != Sm90Bug::kNoFullWait) {
        ptx::mbar_wait(full + 8 * stage, static_cast<uint32_t>(tile / kStages) & 1);
      }
      int s[kKvBlock / 2];
      if (kBug != Sm90Bug::kNoWgmmaFence) ptx::wgmma_fence();
      for (uint32_t step = 0; step < kHeadDim / 32; ++step) {
        const uint32_t q = base + kQ + Tile::operand_offset(0, step * 32);
        const uint32_t k = base + kK + stage * Tile::kBytes + Tile::operand_offset(0, step * 32);
        ptx::wgmma_ss_s8<kKvBlock>(s, matrix_descriptor(q, Tile::kSpan),
                                   matrix_descriptor(k, kSpan), step > 0);
      }
      ptx::wgmma_commit();
      if (kBug == Sm90Bug::kEarlyRelease && thread == 0) ptx::mbar_arrive(empty + 8 * stage);
      if (kBug != Sm90Bug::kNoWgmmaWait) ptx::wgmma_wait<0>();
      for (int i = 0; i < kKvBlock / 2; ++i) {
        const int row = thread / 32 * 16 + c_row(lane, i);
        const int key = tile * kKvBlock + c_column(lane, i);
        if (visible(p, row, key, 0)) sum[i / 2 % 2] += 1u + static_cast<uint32_t>(s[i]);
      }
      if (kBug == Sm90Bug::kNoWgmmaWait) ptx::wgmma_wait<0>();
      if (kBug != Sm90Bug::kEarlyRelease && thread == 0) ptx::mbar_arrive(empty + 8 * stage);
      if (kBug == Sm90Bug::kForgottenGroup && tile + 1 == tiles) {
        ptx::wgmma_fence();
        ptx::wgmma_ss_s8<kKvBlock>(s, matrix_descriptor(base + kQ, Tile::kSpan),
                                   matrix_descriptor(base + kQ, Tile::kSpan), false);
        ptx::wgmma_commit();
      }
    }
    for (int r = 0; r < 2; ++r) {
      sum[r] += ptx::shfl_xor(sum[r], 1);
      sum[r] += ptx::shfl_xor(sum[r], 2);
      const int row = thread / 32 * 16 + lane / 4 + 8 * r;
      if (lane % 4 == 0) ptx::st_global(p.out + row, static_cast<int>(sum[r]));
    }
  }

  static ATTN8_DEVICE void run(const Params& p, const ptx::TensorMap& map) {
    const uint32_t base = ptx::smem_base();
    const uint32_t full = base + kBarriers;
    const uint32_t empty = full + 8 * kStages;
    const int tiles = (p.seqlen_k + kKvBlock - 1) / kKvBlock;
    if (ptx::thread_index() == 0) {
      for (uint32_t stage = 0; stage < kStages; ++stage) {
        if (kBug != Sm90Bug::kNoBarrierInit) ptx::mbar_init(full + 8 * stage, 1);
        ptx::mbar_init(empty + 8 * stage, 1);
      }
      if (kBug != Sm90Bug::kNoInitFence) ptx::fence_barrier_init();
    }
    if (kBug != Sm90Bug::kNoInitBarrier) ptx::sync_block();
    if (ptx::thread_index() >= 128) {
      consume(p, tiles, base, full, empty);
    } else if (ptx::thread_index() == 0) {
      produce(p, map, tiles, base, full, empty);
    }
  }
};

}  // namespace attn8::cuda::planted
