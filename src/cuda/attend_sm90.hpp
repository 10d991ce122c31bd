// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend_careful.hpp"
#include "online_softmax.hpp"

/// Attention on Hopper (sm_90a). One producer warpgroup fetches tiles with bulk copies; two
/// consumer warpgroups of 64 query rows each multiply them with wgmma. While one of the two
/// computes weights the other keeps the tensor cores busy.
///
/// Shared memory, every tile at a multiple of 1024 bytes:
///   Q [128][row_bytes] | K stages [kKvBlock][row_bytes] | V^T stages [head_dim][kKvBlock]
///   | key constants stages [kKvBlock / 16][2][16] floats | VisibleKeys and RowChanges of the
///   consumers | barriers
namespace attn8::cuda {

template <int kHeadDimIn, int kKvBlockIn, Weights kWeights, Scores kScores = Scores::kPlain>
struct AttendSm90 {
  static constexpr int kHeadDim = kHeadDimIn;
  static constexpr int kKvBlock = kKvBlockIn;
  static constexpr int kConsumers = 2;
  static constexpr int kWarpgroupRows = 64;
  static constexpr int kRows = kConsumers * kWarpgroupRows;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kStages = 2;
  static constexpr int kRowBytes = packed_row_bytes(kHeadDim);

  using QTile = SharedTile<kRows, kRowBytes>;
  using KTile = SharedTile<kKvBlock, kRowBytes>;
  using VTile = SharedTile<kHeadDim, kKvBlock>;
  using Softmax = OnlineSoftmax<kKvBlock, kWeights, kScores>;
  static constexpr int kConstantBytes = kKvBlock / kKeyGroup * kKeyConstants * 4;

  // One wgmma covers 128 keys of the scores, so that half of a block's scores can be read while the
  // other half is still being multiplied.
  static constexpr int kScoreColumns = 128;
  static constexpr int kScoreParts = kKvBlock / kScoreColumns;
  // Outputs are multiplied 64 channels at a time, two such parts in flight: one is added to the
  // accumulators while the other is being multiplied.
  static constexpr int kOutColumns = kHeadDim == 96 ? 96 : 64;
  static constexpr int kOutParts = kHeadDim / kOutColumns;
  static constexpr int kOutInFlight = kOutParts < 2 ? 1 : 2;
  static_assert(kKvBlock % kScoreColumns == 0 && kHeadDim % kOutColumns == 0);

  /// Key groups of weights after which a warpgroup lets the other start its own. Both compute
  /// exponentials fastest when they do not compete for them, and left alone they fall into step.
  /// Measured on an H200 at head_dim 128: 3/4 of the block with folded V scales, all without.
  static constexpr int kTurnGroups =
      kKvBlock / kKeyGroup * (kWeights == Weights::kFolded ? 3 : 4) / 4;

  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KTile::kBytes;
  static constexpr uint32_t kConstants = kV + kStages * VTile::kBytes;
  static constexpr uint32_t kVisible = kConstants + kStages * kConstantBytes;
  /// Of a thread: VisibleKeys, and RowChanges where there are any.
  static constexpr int kRowStateBytes =
      VisibleKeys::kBytes + (kScores != Scores::kPlain ? RowChanges::kBytes : 0);
  static constexpr uint32_t kBarriers = kVisible + kConsumers * 128 * kRowStateBytes;
  static constexpr uint32_t kSharedBytes = kBarriers + 16 * (1 + 2 * kStages);
  static_assert(kSharedBytes <= 227 * 1024, "what a block of sm_90 may have");

  /// Shared addresses of the barriers. "Full": the copies have landed. "Empty": every consumer warp
  /// is done reading.
  struct Barriers {
    uint32_t q_full, k_full, k_empty, v_full, v_empty;  // the last four: + 8 * stage
    explicit ATTN8_DEVICE Barriers(uint32_t base)
        : q_full(base),
          k_full(base + 8),
          k_empty(k_full + 8 * kStages),
          v_full(k_empty + 8 * kStages),
          v_empty(v_full + 8 * kStages) {}
  };

  static ATTN8_DEVICE void run(const AttendParams& p) {
    const uint32_t shared = ptx::smem_base();
    const Barriers barriers(shared + kBarriers);
    const int warpgroup = ptx::shfl(ptx::thread_index() / 128, 0);
    const int head = ptx::block_y() % p.nheads_q;
    const int batch = ptx::block_y() / p.nheads_q;
    // Last rows first: under a causal mask they have the most work.
    const int row =
        ((Sequence::of(p, batch).seqlen_q + kRows - 1) / kRows - 1 - ptx::block_x()) * kRows;
    if (row < 0) return;

    if (ptx::thread_index() == 0) {
      ptx::mbar_init(barriers.q_full, 1);
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbar_init(barriers.k_full + 8 * stage, 1);
        ptx::mbar_init(barriers.v_full + 8 * stage, 1);
        ptx::mbar_init(barriers.k_empty + 8 * stage, 4 * kConsumers);
        ptx::mbar_init(barriers.v_empty + 8 * stage, 4 * kConsumers);
      }
      ptx::fence_barrier_init();
    }
    ptx::sync_block();

    // setmaxnreg: 24 + 2 * 240 registers a thread fill the 65,536 of a multiprocessor.
    if (warpgroup == 0) {
      ptx::regs_dec<24>();
      if (ptx::thread_index() == 0) produce(p, shared, barriers, batch, head, row);
    } else {
      ptx::regs_inc<240>();
      consume(p, shared, barriers, batch, head, row, warpgroup - 1);
    }
  }

  static ATTN8_DEVICE void produce(const AttendParams& p, uint32_t shared, const Barriers& barriers,
                                   int batch, int head, int row) {
    const Sequence sequence = Sequence::of(p, batch);
    const int kv_head = head / (p.nheads_q / p.nheads_k);
    const int8_t* q = p.q + (sequence.first_image + head) * p.rows_q * kRowBytes;

    const BlockRange blocks = visited_blocks<kKvBlock>(p, sequence, row, kRows);
    ptx::mbar_expect_tx(barriers.q_full, QTile::kBytes);
    for (int panel = 0; panel < QTile::kPanels; ++panel) {
      ptx::bulk_load(
          shared + kQ + panel * QTile::kPanelBytes,
          q + (static_cast<int64_t>(panel) * p.rows_q + sequence.first_row + row) * QTile::kSpan,
          QTile::kPanelBytes, barriers.q_full);
    }
    for (int block = blocks.begin; block < blocks.end; ++block) {
      const int n = block - blocks.begin;
      const uint32_t stage = n % kStages;
      const uint32_t parity = (n / kStages + 1) & 1;
      ptx::mbar_wait(barriers.k_empty + 8 * stage, parity);
      ptx::mbar_expect_tx(barriers.k_full + 8 * stage, KTile::kBytes + kConstantBytes);
      const KeyTile tile = KeyTile::of(p, batch, kv_head, static_cast<int64_t>(block) * kKvBlock);
      const int8_t* k = p.k + tile.image * p.rows_k * kRowBytes;
      const int64_t first_key = tile.image * p.rows_k + tile.row;
      for (int panel = 0; panel < KTile::kPanels; ++panel) {
        ptx::bulk_load(shared + kK + stage * KTile::kBytes + panel * KTile::kPanelBytes,
                       k + (static_cast<int64_t>(panel) * p.rows_k + tile.row) * KTile::kSpan,
                       KTile::kPanelBytes, barriers.k_full + 8 * stage);
      }
      ptx::bulk_load(shared + kConstants + stage * kConstantBytes, p.key_constants + first_key * 2,
                     kConstantBytes, barriers.k_full + 8 * stage);
      ptx::mbar_wait(barriers.v_empty + 8 * stage, parity);
      ptx::mbar_expect_tx(barriers.v_full + 8 * stage, VTile::kBytes);
      ptx::bulk_load(shared + kV + stage * VTile::kBytes, p.v + first_key * kHeadDim, VTile::kBytes,
                     barriers.v_full + 8 * stage);
    }
  }

  static ATTN8_DEVICE void release(uint32_t barrier) {
    ptx::sync_warp();
    if (ptx::thread_index() % 32 == 0) ptx::mbar_arrive(barrier);
  }

  static ATTN8_DEVICE void consume(const AttendParams& p, uint32_t shared, const Barriers& barriers,
                                   int batch, int head, int block_row, int consumer) {
    const int lane = ptx::thread_index() % 32;
    const int warp = ptx::thread_index() / 32 % 4;
    const int warpgroup_row = block_row + consumer * kWarpgroupRows;
    const int row = warpgroup_row + warp * 16 + lane / 4;
    const Sequence sequence = Sequence::of(p, batch);
    VisibleKeys::of(p, sequence, row).keep(row_address(shared));
    if constexpr (kScores != Scores::kPlain) {
      RowChanges::of(p, sequence, batch, head, row).keep(row_address(shared) + VisibleKeys::kBytes);
    }

    Softmax softmax;
    softmax.start();
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      softmax.score_scale[r] =
          ptx::ld_global(p.q_scale + sequence.row_index(p, head, row + 8 * r)) * p.score_scale;
    }
    float out[kHeadDim / 2];  // [16 rows of the warp, kHeadDim]
    ATTN8_UNROLL
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0;

    const BlockRange visited = visited_blocks<kKvBlock>(p, sequence, block_row, kRows);
    const BlockRange own = visited_blocks<kKvBlock>(p, sequence, warpgroup_row, kWarpgroupRows);
    const int full_begin = clamp_to(own.full_begin, visited.begin, visited.end);
    const int full_end = clamp_to(own.full_end, full_begin, visited.end);
    ptx::mbar_wait(barriers.q_full, 0);
    if (consumer == 1 && visited.begin < visited.end) give_turn(0);
    int block = visited.begin;
    int masked_end = full_begin;
    while (true) {
      for (; block < masked_end; ++block) {
        attend_block<true>(p.changes, shared, barriers, block, visited, consumer, softmax, out);
      }
      if (block >= visited.end) break;
      for (; block < full_end; ++block) {
        attend_block<false>(p.changes, shared, barriers, block, visited, consumer, softmax, out);
      }
      masked_end = visited.end;
    }
    softmax.add_quad();
    const VisibleKeys visible = VisibleKeys::kept(row_address(shared));
    if (ptx::any(!softmax.fits(0, visible) || !softmax.fits(1, visible))) {
      attend_carefully<kHeadDim, kKvBlock, kWeights, kScores>(p, batch, head,
                                                              warpgroup_row + warp * 16);
    } else {
      store_rows<kHeadDim>(
          p, softmax, batch, head, row, [](int) { return 0.0f; }, [&](int i) { return out[i]; });
    }
  }

  /// Of the thread's VisibleKeys and RowChanges.
  static ATTN8_DEVICE uint32_t row_address(uint32_t shared) {
    return shared + kVisible + (ptx::thread_index() - 128) * kRowStateBytes;
  }

  /// Consumer warpgroups take turns; named barrier 1 + consumer is the turn of one.
  static ATTN8_DEVICE void wait_turn(int consumer) { ptx::bar_sync(1 + consumer, 256); }
  static ATTN8_DEVICE void give_turn(int consumer) { ptx::bar_arrive(1 + consumer, 256); }

  template <bool kMasked>
  static ATTN8_DEVICE void attend_block(const ScoreChanges& changes, uint32_t shared,
                                        const Barriers& barriers, int block,
                                        const BlockRange& visited, int consumer, Softmax& softmax,
                                        float (&out)[kHeadDim / 2]) {
    const uint32_t stage = (block - visited.begin) % kStages;
    const uint32_t parity = (block - visited.begin) / kStages & 1;
    const uint32_t constants = shared + kConstants + stage * kConstantBytes;

    float p[Softmax::kElements];  // [16 rows of the warp, kKvBlock] weights
    softmax.start_block();
    {
      int products[kScoreParts][kScoreColumns / 2];  // [parts][16 rows of the warp, 128 keys]
      ptx::mbar_wait(barriers.k_full + 8 * stage, parity);
      const uint64_t q = matrix_descriptor(
          shared + kQ + QTile::operand_offset(consumer * kWarpgroupRows, 0), QTile::kSpan);
      const uint64_t k = matrix_descriptor(shared + kK + stage * KTile::kBytes, KTile::kSpan);
      ptx::wgmma_fence();
      ATTN8_UNROLL
      for (int part = 0; part < kScoreParts; ++part) {
        ATTN8_UNROLL
        for (int byte = 0; byte < kRowBytes; byte += 32) {
          ptx::wgmma_ss_s8<kScoreColumns>(
              products[part], advance_descriptor(q, QTile::operand_offset(0, byte)),
              advance_descriptor(k, KTile::operand_offset(part * kScoreColumns, byte)), byte > 0);
        }
        ptx::wgmma_commit();
      }
      float4 next_scale = Softmax::load_scale(constants, 0);
      wait_turn(consumer);
      const auto weights = [&]<int kFirst, int kLast>() {
        softmax.template weights<kFirst, kLast, kMasked>(
            changes, row_address(shared),
            [&](int i, int r, float scale) {
              const int product = products[i / (kScoreColumns / 2)][i % (kScoreColumns / 2)];
              return ptx::mul(ptx::mul(static_cast<float>(product), scale), softmax.score_scale[r]);
            },
            constants, block * kKvBlock, next_scale, p);
      };
      constexpr int kGroups = kKvBlock / kKeyGroup;
      constexpr int kFirstPart = kScoreParts == 2 ? kScoreColumns / kKeyGroup : 0;
      if constexpr (kFirstPart > 0) {
        ptx::wgmma_wait<1>();
        weights.template operator()<0, kFirstPart>();
      }
      ptx::wgmma_wait<0>();
      weights.template operator()<kFirstPart, kTurnGroups>();
      // The last block's turn goes to nobody.
      if (consumer == 0 || block + 1 < visited.end) give_turn(1 - consumer);
      if constexpr (kTurnGroups < kGroups) weights.template operator()<kTurnGroups, kGroups>();
    }

    uint32_t packed[kKvBlock / 32][4];  // [k32 steps][A fragment] codes of the weights
    softmax.codes(p, packed);
    release(barriers.k_empty + 8 * stage);

    ptx::mbar_wait(barriers.v_full + 8 * stage, parity);
    const uint64_t v = matrix_descriptor(shared + kV + stage * VTile::kBytes, VTile::kSpan);
    ATTN8_UNROLL
    for (int first = 0; first < kOutParts; first += kOutInFlight) {
      int products[kOutInFlight][kOutColumns / 2];  // [parts][16 rows of the warp, kOutColumns]
      ptx::wgmma_fence();
      ATTN8_UNROLL
      for (int part = 0; part < kOutInFlight; ++part) {
        ATTN8_UNROLL
        for (int step = 0; step < kKvBlock / 32; ++step) {
          ptx::wgmma_rs_u8<kOutColumns>(
              products[part], packed[step],
              advance_descriptor(v, VTile::operand_offset((first + part) * kOutColumns, step * 32)),
              step > 0);
        }
        ptx::wgmma_commit();
      }
      ATTN8_UNROLL
      for (int part = 0; part < kOutInFlight; ++part) {
        if (part + 1 < kOutInFlight) {
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
          if (first + kOutInFlight == kOutParts) release(barriers.v_empty + 8 * stage);
        }
        ATTN8_UNROLL
        for (int i = 0; i < kOutColumns / 2; ++i) {
          float& o = out[(first + part) * (kOutColumns / 2) + i];
          o = ptx::fma(static_cast<float>(products[part][i]), softmax.block_scale[i >> 1 & 1], o);
        }
      }
    }
  }
};

}  // namespace attn8::cuda
