// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend_sm80.hpp"

/// Attention of few queries over many keys, for every chip from Ampere on: one tile of 16 rows, the
/// heads that share keys packed into it. Reading K and V is all that takes time, so the warps of a
/// block take key blocks in turn, each through its own stages of cp.async and without a word to the
/// others; in the end their sums are added up. The arithmetic of a block is that of AttendSm80.
///
/// Shared memory, [kWarps][kStages] of each:
///   K [kKvBlock][row_bytes] | V^T [head_dim][kKvBlock] codes
///   | key constants [kKvBlock / 16][2][16] floats,     and VisibleKeys of each quad
namespace attn8::cuda {

template <int kHeadDimIn, int kWarps, int kStages, Weights kWeights,
          Scores kScores = Scores::kPlain>
struct AttendDecode {
  static constexpr int kHeadDim = kHeadDimIn;
  /// Half a panel of packed V: short sequences are divided among more warps.
  static constexpr int kKvBlock = 64;
  static constexpr int kRows = 16;
  static constexpr int kThreads = 32 * kWarps;
  /// Keys that a block of the grid takes at a time.
  static constexpr int kStepKeys = kWarps * kKvBlock;

  using Tiles = AttendSm80<kHeadDim, kKvBlock, kWarps, kWeights, kScores>;
  using KTile = typename Tiles::KTile;
  using VTile = typename Tiles::VTile;
  using Softmax = typename Tiles::Softmax;
  using State = typename Tiles::State;
  // Sums of parts add up when all weights are relative to 2^0; codes of V are in panels.
  static_assert(kWeights == Weights::kFolded || kWeights == Weights::kPlain);
  static_assert(kScores == Scores::kPlain);
  static_assert(Tiles::kQInRegisters && KTile::kPanels == 1 && VTile::kSpan == kPanelKeys / 2);

  static constexpr int kRowBytes = Tiles::kRowBytes;
  static constexpr int kConstantBytes = Tiles::kConstantBytes;
  static constexpr uint32_t kK = 0;
  static constexpr uint32_t kV = kK + kWarps * kStages * KTile::kBytes;
  static constexpr uint32_t kConstants = kV + kWarps * kStages * VTile::kBytes;
  static constexpr uint32_t kVisible = kConstants + kWarps * kStages * kConstantBytes;
  static constexpr uint32_t kSharedBytes = kVisible + kThreads / 4 * VisibleKeys::kBytes;

  /// What a warp leaves in the place of its K for all to add up: [kRows][kPartRow] floats, outputs
  /// and then the sum of weights. Rows lie 8 banks apart.
  static constexpr int kPartRow = kHeadDim + 8;
  static constexpr int kPartBytes = kRows * kPartRow * 4;
  static constexpr int kPartStride = kStages * KTile::kBytes;
  static_assert(kPartBytes <= kPartStride && kHeadDim % 32 == 0);

  /// The keys of one head, as a warp reads them.
  struct Sources {
    const AttendParams& p;
    int batch, kv_head;
    uint32_t shared;
    int end;  ///< of the key blocks

    /// The warp's place number `stage` among those of tiles of `bytes`.
    static ATTN8_DEVICE uint32_t place(int stage, int bytes) {
      return static_cast<uint32_t>((ptx::thread_index() / 32 * kStages + stage) * bytes);
    }
    ATTN8_DEVICE uint32_t k(int stage) const { return shared + kK + place(stage, KTile::kBytes); }
    ATTN8_DEVICE uint32_t v(int stage) const { return shared + kV + place(stage, VTile::kBytes); }
    ATTN8_DEVICE uint32_t constants(int stage) const {
      return shared + kConstants + place(stage, kConstantBytes);
    }

    /// The warp: contiguous memory.
    template <int kBytes>
    static ATTN8_DEVICE void copy(uint32_t target, const int8_t* source) {
      static_assert(kBytes % 512 == 0);
      const int at = ptx::thread_index() % 32 * 16;
      ATTN8_UNROLL
      for (int i = 0; i < kBytes; i += 512) ptx::cp_async16(target + at + i, source + at + i, true);
    }

    /// One group of copies each, empty beyond the last block.
    ATTN8_DEVICE void load_k(int stage, int block) const {
      if (block < end) {
        const KeyTile tile = KeyTile::of(p, batch, kv_head, int64_t{block} * kKvBlock);
        const int64_t first = tile.image * p.rows_k;
        copy<KTile::kBytes>(k(stage), p.k + first * kRowBytes + tile.row * KTile::kSpan);
        copy<kConstantBytes>(constants(stage), reinterpret_cast<const int8_t*>(
                                                   p.key_constants + (first + tile.row) * 2));
      }
      ptx::cp_commit();
    }
    ATTN8_DEVICE void load_v(int stage, int block) const {
      if (block < end) {
        const KeyTile tile = KeyTile::of(p, batch, kv_head, int64_t{block} * kKvBlock);
        // Half of every row of a panel; eight rows, after which the swizzle repeats, at a time.
        const int row = ptx::thread_index() % 32 / 4;
        const int byte = ptx::thread_index() % 4 * 16;
        const int half = static_cast<int>(tile.row) % kPanelKeys;
        const int8_t* source =
            p.v + tile.image * p.rows_k * kHeadDim + (tile.row - half) * kHeadDim +
            swizzle(static_cast<uint32_t>(row * kPanelKeys + half + byte), kPanelKeys);
        const uint32_t target = v(stage) + VTile::offset(row, byte);
        ATTN8_UNROLL
        for (int i = 0; i < kHeadDim / 8; ++i) {
          ptx::cp_async16(target + i * 8 * VTile::kSpan, source + i * 8 * kPanelKeys, true);
        }
      }
      ptx::cp_commit();
    }
  };

  /// Q from global memory: every warp needs all of it, once.
  static ATTN8_DEVICE void load_q(const AttendParams& p, const Sequence& sequence, int head,
                                  int block_row, State& state) {
    const int lane = ptx::thread_index() % 32;
    const int8_t* image = p.q + (sequence.first_image + head) * p.rows_q * kRowBytes;
    ATTN8_UNROLL
    for (int step = 0; step < kRowBytes / 32; ++step) {
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t at =
            packed_row_offset(p.rows_q, kRowBytes, sequence.first_row + block_row + a_row(lane, i),
                              step * 32 + a_byte(lane, i));
        state.q[step][i] = ptx::ld_global(reinterpret_cast<const uint32_t*>(image + at));
      }
    }
  }

  static ATTN8_DEVICE void run(const AttendParams& p) {
    ptx::launch_dependents();  // MergeSplits
    const uint32_t shared = ptx::smem_base();
    const int lane = ptx::thread_index() % 32;
    const int warp = ptx::thread_index() / 32;
    const int head = ptx::block_y() % p.nheads_q;
    const int batch = ptx::block_y() / p.nheads_q;
    const Sequence sequence = Sequence::of(p, batch);
    const int block_row = ptx::block_x() * kRows;
    if (block_row >= sequence.seqlen_q) return;
    const BlockRange visited = visited_blocks<kKvBlock>(p, sequence, block_row, kRows);
    const Sources from = {p, batch, head / (p.nheads_q / p.nheads_k), shared, visited.end};
    ATTN8_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      from.load_k(stage, visited.begin + warp + stage * kWarps);
      from.load_v(stage, visited.begin + warp + stage * kWarps);
    }

    State state;
    const int row = block_row + lane / 4;
    const uint32_t rows = shared + kVisible + ptx::thread_index() / 4 * VisibleKeys::kBytes;
    // By way of memory: the compiler would fill registers with a constant in every block again.
    if (lane % 4 == 0) {
      ptx::st_shared(
          rows, int4{Tiles::kMagicBits, Tiles::kMagicBits, Tiles::kMagicBits, Tiles::kMagicBits});
    }
    ptx::sync_warp();
    Tiles::load_magic(rows, state.magic);
    ptx::sync_warp();
    if (lane % 4 == 0) VisibleKeys::of(p, sequence, row).keep(rows);
    load_q(p, sequence, head, block_row, state);
    state.softmax.start();
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      state.softmax.score_scale[r] = Tiles::exact_with_magic(
          ptx::ld_global(p.q_scale + sequence.row_index(p, head, row + 8 * r)) * p.score_scale);
    }
    ATTN8_UNROLL
    for (int group = 0; group < kHeadDim / 8; ++group) {
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) state.out[group][i] = 0;
    }

    int stage = 0;
    for (int block = visited.begin + warp; block < visited.end; block += kWarps) {
      attend_block(from, rows, stage, block, state);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    const uint32_t parts = shared + kK;
    leave_part(parts + warp * kPartStride, state);
    ptx::sync_block();
    const int row_of_lane = block_row + lane % kRows;
    const VisibleKeys visible = VisibleKeys::of(p, sequence, row_of_lane);
    const float sum = sum_of_parts(parts, lane % kRows, kHeadDim);
    const bool fits = visible.count[0] == 0 || (sum >= kSmallestSum && sum <= kLargestSum);
    if (ptx::any(!fits)) {
      if (warp == 0) {
        attend_carefully<kHeadDim, kKvBlock, kWeights, kScores>(p, batch, head, block_row);
      }
      return;
    }
    store_parts(p, sequence, batch, head, block_row, parts);
  }

  static ATTN8_DEVICE void attend_block(const Sources& from, uint32_t rows, int stage, int block,
                                        State& state) {
    const int lane = ptx::thread_index() % 32;
    const int next = block + kStages * kWarps;
    // Of the groups of copies, two to a stage, K of this block is the oldest.
    ptx::cp_wait<2 * kStages - 1>();
    ptx::sync_warp();
    const uint32_t constants = from.constants(stage);
    float p[Softmax::kElements];  // [16 rows, kKvBlock] weights
    float4 next_scale = Softmax::load_scale(constants, 0);
    state.softmax.start_block();
    // Masked or not: arithmetic is not what takes the time, and one loop is half the code.
    Tiles::template weigh<0, kKvBlock / kKeyGroup, true>(
        from.shared, rows,
        from.k(stage) + KTile::offset(ldmatrix_b_column(lane), ldmatrix_b_byte(lane)), constants,
        from.p.changes, block, state, next_scale, p);
    ptx::sync_warp();
    from.load_k(stage, next);

    uint32_t packed[kKvBlock / 32][4];  // codes: [k32 steps][A fragment]
    state.softmax.codes(p, packed);
    ptx::cp_wait<2 * kStages - 1>();
    ptx::sync_warp();
    Tiles::add_codes(from.v(stage), packed, state);
    ptx::sync_warp();
    from.load_v(stage, next);
  }

  static ATTN8_DEVICE void leave_part(uint32_t part, State& state) {
    const int lane = ptx::thread_index() % 32;
    state.softmax.add_quad();
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      const uint32_t row = part + (lane / 4 + 8 * r) * kPartRow * 4;
      ATTN8_UNROLL
      for (int group = 0; group < kHeadDim / 8; ++group) {
        ptx::st_shared(row + (group * 8 + lane % 4 * 2) * 4,
                       float2{state.out[group][2 * r], state.out[group][2 * r + 1]});
      }
      if (lane % 4 == 0) ptx::st_shared(row + kHeadDim * 4, state.softmax.sum[r]);
    }
  }

  /// Of element `column` of row `row`.
  static ATTN8_DEVICE float sum_of_parts(uint32_t parts, int row, int column) {
    float sum = 0;
    ATTN8_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += ptx::ld_shared<float>(parts + warp * kPartStride + (row * kPartRow + column) * 4);
    }
    return sum;
  }

  /// All warps: normalizes and writes the rows that there are. As store_rows(), from shared memory
  /// and in a loop: a block that attends to a few hundred keys waits for its instructions most.
  static ATTN8_DEVICE void store_parts(const AttendParams& p, const Sequence& sequence, int batch,
                                       int head, int block_row, uint32_t parts) {
    const int kv_head = head / (p.nheads_q / p.nheads_k);
    const int64_t channels = static_cast<int64_t>(batch * p.nheads_k + kv_head) * kHeadDim;
    const int rows = clamp_to(sequence.seqlen_q - block_row, 0, kRows);
    ATTN8_NO_UNROLL
    for (int i = ptx::thread_index(); i < rows * (kHeadDim / 2); i += kThreads) {
      const int row = i / (kHeadDim / 2);
      const int column = i % (kHeadDim / 2) * 2;
      const int call_row = block_row + row;
      const float sum = sum_of_parts(parts, row, kHeadDim);
      float lse = sum == 0 ? -INFINITY : logf(sum);
      float factor = sum == 0 ? 0.0f : 1.0f / sum;
      const int64_t query = sequence.first_query + query_of(p, call_row);
      const int query_head = query_head_of(p, head, call_row);
      if (p.lse_shift != nullptr) {
        lse += ptx::ld_global(p.lse_shift + sequence.row_index(p, head, call_row));
      }
      if (p.sinks != nullptr) {
        factor *= beside_sink(ptx::ld_global(p.sinks + query_head * p.sinks_stride), &lse);
      }
      float2 scale = {1, 1};
      if (p.v_scale != nullptr) {
        scale = ptx::ld_global(reinterpret_cast<const float2*>(p.v_scale + channels + column));
      }
      store_pair(p,
                 ptx::block_z() * p.out_stride_split + sequence.batch * p.out_stride_batch +
                     query * p.out_stride_row + query_head * p.out_stride_head,
                 column, sum_of_parts(parts, row, column) * (factor * scale.x),
                 sum_of_parts(parts, row, column + 1) * (factor * scale.y));
      if (p.lse != nullptr && column == 0) {
        ptx::st_global(p.lse + ptx::block_z() * p.lse_stride_split +
                           sequence.batch * p.lse_stride_batch + query * p.lse_stride_row +
                           query_head * p.lse_stride_head,
                       lse);
      }
    }
  }
};

}  // namespace attn8::cuda
