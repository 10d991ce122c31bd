// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend_careful.hpp"
#include "online_softmax.hpp"

/// Attention with mma.sync: Ampere, Ada, and every later chip without int8 wgmma. Each warp owns 16
/// query rows; K and V tiles arrive through two stages of cp.async, so that the copy of the next
/// block overlaps the arithmetic of this one.
///
/// Shared memory, every tile at a multiple of 1024 bytes:
///   Q [kRows][row_bytes] | K 2 stages [kKvBlock][row_bytes] | V^T 2 stages [head_dim][kKvBlock]
///   | key constants 2 stages [kKvBlock / 16][2][16] floats | VisibleKeys
namespace attn8::cuda {

template <int kHeadDimIn, int kKvBlockIn, int kWarps, Weights kWeights>
struct AttendSm80 {
  static constexpr int kHeadDim = kHeadDimIn;
  static constexpr int kKvBlock = kKvBlockIn;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = 2;
  static constexpr int kRowBytes = packed_row_bytes(kHeadDim);

  using QTile = SharedTile<kRows, kRowBytes>;
  using KTile = SharedTile<kKvBlock, kRowBytes>;
  using VTile = SharedTile<kHeadDim, kKvBlock>;
  using Softmax = OnlineSoftmax<kKvBlock, kWeights>;
  static_assert(VTile::kSpan == kPanelKeys);
  static constexpr int kConstantBytes = kKvBlock / kKeyGroup * kKeyConstants * 4;

  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KTile::kBytes;
  static constexpr uint32_t kConstants = kV + kStages * VTile::kBytes;
  static constexpr uint32_t kVisible = kConstants + kStages * kConstantBytes;
  static constexpr uint32_t kSharedBytes = kVisible + kThreads * VisibleKeys::kBytes;

  /// An accumulator that starts at the bits of 1.5 * 2^23 is, read as a float, that plus the sum:
  /// exact while |sum| <= 2^22. Scores reach 127^2 * head_dim, outputs 255 * 127 * kv_block.
  static constexpr int kMagicBits = 0x4B400000;
  static constexpr float kMagic = 12582912.0f;
  static_assert(127 * 127 * kHeadDim <= 1 << 22 && 255 * 127 * kKvBlock <= 1 << 22);

  /// Q stays in registers unless the accumulators need them.
  static constexpr bool kQInRegisters = kHeadDim <= 128;

  /// All threads: `bytes` of contiguous memory, a multiple of 16 times the threads or less.
  template <int kBytes>
  static ATTN8_DEVICE void copy(uint32_t target, const void* source) {
    const int8_t* bytes = static_cast<const int8_t*>(source);
    ATTN8_UNROLL
    for (int i = 0; i < (kBytes + 16 * kThreads - 1) / (16 * kThreads); ++i) {
      const int at = (i * kThreads + ptx::thread_index()) * 16;
      if (at < kBytes) ptx::cp_async16(target + at, bytes + at, true);
    }
  }

  struct Sources {
    const int8_t* k;
    const int8_t* v;
    const float* constants;
    int64_t rows_k;
  };

  static ATTN8_DEVICE void load_k(uint32_t shared, const Sources& from, int block) {
    const uint32_t stage = block % kStages;
    const int64_t key = static_cast<int64_t>(block) * kKvBlock;
    ATTN8_UNROLL
    for (int panel = 0; panel < KTile::kPanels; ++panel) {
      copy<KTile::kPanelBytes>(
          shared + kK + stage * KTile::kBytes + panel * KTile::kPanelBytes,
          from.k + (static_cast<int64_t>(panel) * from.rows_k + key) * KTile::kSpan);
    }
    copy<kConstantBytes>(shared + kConstants + stage * kConstantBytes,
                         from.constants + key / kKeyGroup * kKeyConstants);
    ptx::cp_commit();
  }

  static ATTN8_DEVICE void load_v(uint32_t shared, const Sources& from, int block) {
    const uint32_t stage = block % kStages;
    copy<VTile::kBytes>(shared + kV + stage * VTile::kBytes,
                        from.v + static_cast<int64_t>(block) * kKvBlock * kHeadDim);
    ptx::cp_commit();
  }

  /// What a warp keeps from block to block.
  struct State {
    uint32_t q[kQInRegisters ? kRowBytes / 32 : 1][4];  // [k32 steps][A fragment]
    float out[kHeadDim / 8][4];                         // [16 rows, kHeadDim]
    Softmax softmax;
  };

  static ATTN8_DEVICE void load_q_fragment(uint32_t shared, int step, uint32_t (&fragment)[4]) {
    const int lane = ptx::thread_index() % 32;
    const int row = ptx::thread_index() / 32 * 16 + ldmatrix_a_row(lane);
    ptx::ldmatrix_x4(fragment, shared + kQ + QTile::offset(row, step * 32 + ldmatrix_a_byte(lane)));
  }

  static ATTN8_DEVICE void run(const AttendParams& p) {
    const uint32_t shared = ptx::smem_base();
    const int lane = ptx::thread_index() % 32;
    const int warp = ptx::thread_index() / 32;
    // Last rows first: under a causal mask they have the most work.
    const int block_row = ((p.seqlen_q + kRows - 1) / kRows - 1 - ptx::block_x()) * kRows;
    const int head = ptx::block_y() % p.nheads_q;
    const int batch = ptx::block_y() / p.nheads_q;
    const int row = block_row + warp * 16 + lane / 4;
    const int64_t q_head = batch * p.nheads_q + head;
    const int64_t kv_head = batch * p.nheads_k + head / (p.nheads_q / p.nheads_k);
    const Sources from = {p.k + kv_head * p.rows_k * kRowBytes, p.v + kv_head * p.rows_k * kHeadDim,
                          p.key_constants + kv_head * (p.rows_k / kKeyGroup) * kKeyConstants,
                          p.rows_k};

    VisibleKeys::of(p, row).keep(visible_address(shared));
    State state;
    state.softmax.start();
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      state.softmax.score_scale[r] =
          ptx::ld_global(p.q_scale + q_head * p.rows_q + row + 8 * r) * p.score_scale;
    }
    ATTN8_UNROLL
    for (int group = 0; group < kHeadDim / 8; ++group) {
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) state.out[group][i] = 0;
    }

    const BlockRange visited = visited_blocks<kKvBlock>(p, block_row, kRows);
    if (visited.begin < visited.end) {
      ATTN8_UNROLL
      for (int panel = 0; panel < QTile::kPanels; ++panel) {
        copy<QTile::kPanelBytes>(
            shared + kQ + panel * QTile::kPanelBytes,
            p.q + q_head * p.rows_q * kRowBytes +
                (static_cast<int64_t>(panel) * p.rows_q + block_row) * QTile::kSpan);
      }
      load_k(shared, from, visited.begin);
      load_v(shared, from, visited.begin);
      if constexpr (kQInRegisters) {
        ptx::cp_wait<1>();
        ptx::sync_block();
        ATTN8_UNROLL
        for (int step = 0; step < kRowBytes / 32; ++step) {
          load_q_fragment(shared, step, state.q[step]);
        }
      }
      int block = visited.begin;
      int masked_end = visited.full_begin;
      while (true) {
        for (; block < masked_end; ++block) {
          attend_block<true>(shared, from, block, visited.end, state);
        }
        if (block >= visited.end) break;
        for (; block < visited.full_end; ++block) {
          attend_block<false>(shared, from, block, visited.end, state);
        }
        masked_end = visited.end;
      }
      ptx::cp_wait<0>();
    }
    state.softmax.add_quad();
    const VisibleKeys visible = VisibleKeys::kept(visible_address(shared));
    if (ptx::any(!state.softmax.fits(0, visible) || !state.softmax.fits(1, visible))) {
      attend_carefully<kHeadDim, kKvBlock, kWeights>(p, batch, head, block_row + warp * 16);
    } else {
      store_rows<kHeadDim>(
          p, state.softmax, batch, head, row, [](int) { return 0.0f; },
          [&](int i) { return state.out[i / 4][i % 4]; });
    }
  }

  template <bool kMasked>
  static ATTN8_DEVICE void attend_block(uint32_t shared, const Sources& from, int block, int end,
                                        State& state) {
    const int lane = ptx::thread_index() % 32;
    const uint32_t stage = block % kStages;
    const uint32_t k_tile = shared + kK + stage * KTile::kBytes;
    const uint32_t v_tile = shared + kV + stage * VTile::kBytes;
    const uint32_t constants = shared + kConstants + stage * kConstantBytes;

    // K of this block has landed, and every warp is done with the other stage.
    ptx::cp_wait<1>();
    ptx::sync_block();
    if (block + 1 < end) {
      load_k(shared, from, block + 1);
    } else {
      ptx::cp_commit();
    }

    float p[Softmax::kElements];  // [16 rows, kKvBlock] weights
    float4 next_scale = Softmax::load_scale(constants, 0);
    state.softmax.start_block();
    {
      int products[kKvBlock / 8][4];  // [8-key groups][C fragment]
      ATTN8_UNROLL
      for (int step = 0; step < kRowBytes / 32; ++step) {
        uint32_t q[4];
        if constexpr (kQInRegisters) {
          ATTN8_UNROLL
          for (int i = 0; i < 4; ++i) q[i] = state.q[step][i];
        } else {
          load_q_fragment(shared, step, q);
        }
        ATTN8_UNROLL
        for (int group = 0; group < kKvBlock / 16; ++group) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, k_tile + KTile::offset(group * 16 + ldmatrix_b_column(lane),
                                                     step * 32 + ldmatrix_b_byte(lane)));
          ATTN8_UNROLL
          for (int half = 0; half < 2; ++half) {
            const uint32_t columns[2] = {b[2 * half], b[2 * half + 1]};
            if (step == 0) {
              ptx::mma_s8_from(products[2 * group + half], q, columns, kMagicBits);
            } else {
              ptx::mma_s8(products[2 * group + half], q, columns);
            }
          }
        }
      }
      state.softmax.template weights<0, kKvBlock / kKeyGroup, kMasked>(
          visible_address(shared),
          [&](int i) { return ptx::add(as_magic(products[i / 4][i % 4]), -kMagic); }, constants,
          block * kKvBlock, next_scale, p);
    }

    uint32_t packed[kKvBlock / 32][4];  // [k32 steps][A fragment] codes of the weights
    state.softmax.codes(p, packed);

    // V of this block has landed; the barrier also ends all reads of the other V stage.
    ptx::cp_wait<1>();
    ptx::sync_block();
    if (block + 1 < end) {
      load_v(shared, from, block + 1);
    } else {
      ptx::cp_commit();
    }

    ATTN8_UNROLL
    for (int columns = 0; columns < kHeadDim / 16; ++columns) {
      int products[2][4];  // [8-channel groups][C fragment]
      ATTN8_UNROLL
      for (int step = 0; step < kKvBlock / 32; ++step) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, v_tile + VTile::offset(columns * 16 + ldmatrix_b_column(lane),
                                                   step * 32 + ldmatrix_b_byte(lane)));
        ATTN8_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t keys[2] = {b[2 * half], b[2 * half + 1]};
          if (step == 0) {
            ptx::mma_u8_from(products[half], packed[step], keys, kMagicBits);
          } else {
            ptx::mma_u8(products[half], packed[step], keys);
          }
        }
      }
      ATTN8_UNROLL
      for (int half = 0; half < 2; ++half) {
        ATTN8_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& o = state.out[2 * columns + half][i];
          o = ptx::fma(ptx::add(as_magic(products[half][i]), -kMagic),
                       state.softmax.block_scale[i >> 1], o);
        }
      }
    }
  }

  /// Of the thread's VisibleKeys.
  static ATTN8_DEVICE uint32_t visible_address(uint32_t shared) {
    return shared + kVisible + ptx::thread_index() * VisibleKeys::kBytes;
  }

  static ATTN8_DEVICE float as_magic(int bits) {
    return ptx::as_float(static_cast<uint32_t>(bits));
  }
};

}  // namespace attn8::cuda
