// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <type_traits>

#include "attend_careful.hpp"
#include "online_softmax.hpp"

/// Attention with mma.sync: Ampere, Ada, and every later chip without int8 wgmma. Each warp owns 16
/// query rows; K and V tiles arrive through two stages of cp.async, so that the copy of the next
/// block overlaps the arithmetic of this one.
///
/// Shared memory, every tile at a multiple of 1024 bytes:
///   Q [kRows][row_bytes] | K 2 stages [kKvBlock][row_bytes]
///   | V 2 stages: V^T [head_dim][kKvBlock] codes, or [kKvBlock][head_dim] bfloat16
///   | key constants 2 stages [kKvBlock / 16][2][16] floats | VisibleKeys, RowChanges of each quad
namespace attn8::cuda {

template <int kHeadDimIn, int kKvBlockIn, int kWarps, Weights kWeights,
          Scores kScores = Scores::kPlain>
struct AttendSm80 {
  static constexpr int kHeadDim = kHeadDimIn;
  static constexpr int kKvBlock = kKvBlockIn;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = 2;
  static constexpr int kBlockShift = kKvBlock == 128 ? 7 : 6;
  static_assert(kKvBlock == 1 << kBlockShift);
  static constexpr int kRowBytes = packed_row_bytes(kHeadDim);

  using QTile = SharedTile<kRows, kRowBytes>;
  using KTile = SharedTile<kKvBlock, kRowBytes>;
  static constexpr bool kHalf = kWeights == Weights::kHalf;
  using VTile =
      std::conditional_t<kHalf, SharedTile<kKvBlock, 2 * kHeadDim>, SharedTile<kHeadDim, kKvBlock>>;
  using Softmax = OnlineSoftmax<kKvBlock, kWeights, kScores>;
  static constexpr int kConstantBytes = kKvBlock / kKeyGroup * kKeyConstants * 4;

  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KTile::kBytes;
  static constexpr uint32_t kConstants = kV + kStages * VTile::kBytes;
  static constexpr uint32_t kVisible = kConstants + kStages * kConstantBytes;
  /// Of a quad, whose threads have the same rows: VisibleKeys, and RowChanges where there are any.
  static constexpr int kRowStateBytes =
      VisibleKeys::kBytes + (kScores != Scores::kPlain ? RowChanges::kBytes : 0);
  /// Whether registers are so few that what a block needs once waits in shared memory: Pointers of
  /// each thread, and what accumulators start at.
  static constexpr bool kFewRegisters = kHeadDim > 128 && kScores == Scores::kBiased;
  static constexpr uint32_t kPointers = kVisible + kThreads / 4 * kRowStateBytes;
  static constexpr uint32_t kMagicStart = kPointers + (kFewRegisters ? kThreads * 32 : 0);
  static constexpr uint32_t kSharedBytes = kMagicStart + (kFewRegisters ? 16 : 0);
  // What a block may have on compute capability 8.0, beside one that has 227 KB.
  static_assert(kSharedBytes <= 163 * 1024);

  /// An accumulator that starts at the bits of 1.5 * 2^23 is, read as a float, that plus the sum:
  /// exact while |sum| <= 2^22. Scores reach 127^2 * head_dim, outputs 255 * 127 * kv_block.
  static constexpr int kMagicBits = 0x4B400000;
  static constexpr float kMagic = 12582912.0f;
  static_assert(127 * 127 * kHeadDim <= 1 << 22 && 255 * 127 * kKvBlock <= 1 << 22);

  /// Q stays in registers unless accumulators and score changes need them.
  static constexpr bool kQInRegisters = kHeadDim <= (kScores == Scores::kBiased ? 64 : 128);
  /// Parts of a block whose scores are computed one after the other, for want of registers.
  static constexpr int kScoreParts = kScores == Scores::kBiased ? 2 : 1;

  /// Where in a copy a thread's first 16 bytes lie.
  static ATTN8_DEVICE uint32_t copy_offset() { return ptx::thread_index() * 16; }

  /// All threads: kBytes of contiguous memory. Target and source are those of the copy, each
  /// copy_offset() further.
  template <int kBytes>
  static ATTN8_DEVICE void copy(uint32_t target, const int8_t* source) {
    constexpr int kAtOnce = 16 * kThreads;
    ATTN8_UNROLL
    for (int at = 0; at < kBytes; at += kAtOnce) {
      if (at + kAtOnce <= kBytes || at + static_cast<int>(copy_offset()) < kBytes) {
        ptx::cp_async16(target + at, source + at, true);
      }
    }
  }

  /// Of the keys of one head, each copy_offset() further: of its image, or of its first in pages.
  struct Pointers {
    const int8_t* k;
    const int8_t* v;
    const int8_t* constants;
    const int* pages;  ///< of the sequence, or nullptr
  };

  /// The keys of one head.
  struct Sources {
    static constexpr int kKeyBytes = VTile::kBytes / kKvBlock;  // of packed V
    static constexpr int kConstantRow = kConstantBytes / kKvBlock;
    const AttendParams& p;
    Pointers kept;
    int page_shift;  ///< log2 of a page's blocks

    ATTN8_DEVICE Sources(const AttendParams& params, int batch, int kv_head)
        : p(params), page_shift(params.page_shift - kBlockShift) {
      const bool paged = p.block_table != nullptr;
      const int64_t rows =
          (paged ? kv_head : static_cast<int64_t>(batch) * p.nheads_k + kv_head) * p.rows_k;
      kept.k = p.k + rows * kRowBytes + copy_offset();
      kept.v = p.v + rows * kKeyBytes + copy_offset();
      kept.constants =
          reinterpret_cast<const int8_t*>(p.key_constants) + rows * kConstantRow + copy_offset();
      kept.pages =
          paged ? p.block_table + static_cast<int64_t>(batch) * p.block_table_stride : nullptr;
      if constexpr (kFewRegisters) {
        const auto word = [](const void* pointer, int half) {
          return static_cast<int>(reinterpret_cast<uint64_t>(pointer) >> 32 * half);
        };
        ptx::st_shared(address(),
                       int4{word(kept.k, 0), word(kept.k, 1), word(kept.v, 0), word(kept.v, 1)});
        ptx::st_shared(address() + 16, int4{word(kept.constants, 0), word(kept.constants, 1),
                                            word(kept.pages, 0), word(kept.pages, 1)});
      }
    }

    static ATTN8_DEVICE uint32_t address() {
      return ptx::smem_base() + kPointers + ptx::thread_index() * 32;
    }
    ATTN8_DEVICE Pointers pointers() const {
      if constexpr (!kFewRegisters) return kept;
      const auto joined = [](int low, int high) {
        return static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
               static_cast<uint32_t>(low);
      };
      const int4 a = ptx::ld_shared<int4>(address());
      const int4 b = ptx::ld_shared<int4>(address() + 16);
      return {reinterpret_cast<const int8_t*>(joined(a.x, a.y)),
              reinterpret_cast<const int8_t*>(joined(a.z, a.w)),
              reinterpret_cast<const int8_t*>(joined(b.x, b.y)),
              reinterpret_cast<const int*>(joined(b.z, b.w))};
    }

    /// Where a block lies: rows of the images before its page's, blocks before it there.
    struct Place {
      int64_t rows;
      int block;
    };
    ATTN8_DEVICE Place place_of(const int* pages, int block) const {
      if (pages == nullptr) return {0, block};
      const int shift = kFewRegisters ? p.page_shift - kBlockShift : page_shift;
      const int page = ptx::ld_global(pages + (block >> shift));
      return {static_cast<int64_t>(page * p.nheads_k) * p.rows_k, block & ((1 << shift) - 1)};
    }
  };

  static ATTN8_DEVICE void load_k(uint32_t shared, const Sources& from, int block) {
    const uint32_t stage = static_cast<uint32_t>(block) % kStages;
    const uint32_t target = shared + copy_offset();
    const Pointers pointers = from.pointers();
    const typename Sources::Place place = from.place_of(pointers.pages, block);
    const int8_t* k = pointers.k + place.rows * kRowBytes +
                      static_cast<int64_t>(place.block) * (kKvBlock * KTile::kSpan);
    ATTN8_UNROLL
    for (int panel = 0; panel < KTile::kPanels; ++panel) {
      copy<KTile::kPanelBytes>(target + kK + stage * KTile::kBytes + panel * KTile::kPanelBytes,
                               k + static_cast<int64_t>(panel) * from.p.rows_k * KTile::kSpan);
    }
    copy<kConstantBytes>(target + kConstants + stage * kConstantBytes,
                         pointers.constants + place.rows * Sources::kConstantRow +
                             static_cast<int64_t>(place.block) * kConstantBytes);
    ptx::cp_commit();
  }

  static ATTN8_DEVICE void load_v(uint32_t shared, const Sources& from, int block) {
    static_assert(kHalf ? kKvBlock == kHalfTileKeys : VTile::kSpan == kPanelKeys);
    const uint32_t stage = static_cast<uint32_t>(block) % kStages;
    const Pointers pointers = from.pointers();
    const typename Sources::Place place = from.place_of(pointers.pages, block);
    copy<VTile::kBytes>(shared + copy_offset() + kV + stage * VTile::kBytes,
                        pointers.v + place.rows * Sources::kKeyBytes +
                            static_cast<int64_t>(place.block) * VTile::kBytes);
    ptx::cp_commit();
  }

  /// What a warp keeps from block to block.
  struct State {
    uint32_t q[kQInRegisters ? kRowBytes / 32 : 1][4];  // [k32 steps][A fragment]
    float out[kHeadDim / 8][4];                         // [16 rows, kHeadDim]
    Softmax softmax;
    int magic[4];  // kMagicBits
  };

  /// A scale whose product with kMagic is exact, so that one multiply-add takes a score out of its
  /// accumulator as if both operations were: a float without its last two bits.
  static ATTN8_DEVICE float exact_with_magic(float scale) {
    const float rounded = ptx::as_float((ptx::as_uint(scale) + 2) & ~3u);
    return ptx::max(scale, -scale) <= FLT_MAX ? rounded : scale;
  }

  static ATTN8_DEVICE void load_magic(uint32_t address, int (&magic)[4]) {
    const int4 four = ptx::ld_shared<int4>(address);
    magic[0] = four.x;
    magic[1] = four.y;
    magic[2] = four.z;
    magic[3] = four.w;
  }

  static ATTN8_DEVICE void load_q_fragment(uint32_t shared, int step, uint32_t (&fragment)[4]) {
    const int lane = ptx::thread_index() % 32;
    const int row = ptx::thread_index() / 32 * 16 + ldmatrix_a_row(lane);
    ptx::ldmatrix_x4(fragment, shared + kQ + QTile::offset(row, step * 32 + ldmatrix_a_byte(lane)));
  }

  static ATTN8_DEVICE void run(const AttendParams& p) {
    const uint32_t shared = ptx::smem_base();
    const int lane = ptx::thread_index() % 32;
    const int warp = ptx::thread_index() / 32;
    const int head = ptx::block_y() % p.nheads_q;
    const int batch = ptx::block_y() / p.nheads_q;
    const Sequence sequence = Sequence::of(p, batch);
    // Last rows first: under a causal mask they have the most work.
    const int block_row = ((sequence.seqlen_q + kRows - 1) / kRows - 1 - ptx::block_x()) * kRows;
    if (block_row < 0) return;
    const int row = block_row + warp * 16 + lane / 4;
    const Sources from(p, batch, head / (p.nheads_q / p.nheads_k));

    State state;
    const bool leads_quad = lane % 4 == 0;
    // By way of memory: the compiler would fill registers with a constant in every block again.
    const int4 magic = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
    if constexpr (kFewRegisters) {
      if (ptx::thread_index() == 0) ptx::st_shared(shared + kMagicStart, magic);  // for every block
    } else {
      if (leads_quad) ptx::st_shared(row_address(shared), magic);
      ptx::sync_warp();
      load_magic(row_address(shared), state.magic);
      ptx::sync_warp();
    }
    if (leads_quad) {
      VisibleKeys::of(p, sequence, row).keep(row_address(shared));
      if constexpr (kScores != Scores::kPlain) {
        RowChanges::of(p, sequence, batch, head, row)
            .keep(row_address(shared) + VisibleKeys::kBytes);
      }
    }
    state.softmax.start();
    ATTN8_UNROLL
    for (int r = 0; r < 2; ++r) {
      state.softmax.score_scale[r] = exact_with_magic(
          ptx::ld_global(p.q_scale + sequence.row_index(p, head, row + 8 * r)) * p.score_scale);
    }
    ATTN8_UNROLL
    for (int group = 0; group < kHeadDim / 8; ++group) {
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) state.out[group][i] = 0;
    }

    const BlockRange visited = visited_blocks<kKvBlock>(p, sequence, block_row, kRows);
    if (visited.begin < visited.end) {
      ATTN8_UNROLL
      for (int panel = 0; panel < QTile::kPanels; ++panel) {
        copy<QTile::kPanelBytes>(
            shared + kQ + panel * QTile::kPanelBytes + copy_offset(),
            p.q + (sequence.first_image + head) * p.rows_q * kRowBytes +
                (static_cast<int64_t>(panel) * p.rows_q + sequence.first_row + block_row) *
                    QTile::kSpan +
                copy_offset());
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
    } else {
      ptx::sync_warp();
    }
    state.softmax.add_quad();
    const VisibleKeys visible = VisibleKeys::kept(row_address(shared));
    if (ptx::any(!state.softmax.fits(0, visible) || !state.softmax.fits(1, visible))) {
      attend_carefully<kHeadDim, kKvBlock, kWeights, kScores>(p, batch, head,
                                                              block_row + warp * 16);
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
    const uint32_t stage = static_cast<uint32_t>(block) % kStages;
    const uint32_t k_fragment = shared + kK + stage * KTile::kBytes +
                                KTile::offset(ldmatrix_b_column(lane), ldmatrix_b_byte(lane));
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
    constexpr int kPartGroups = kKvBlock / kKeyGroup / kScoreParts;
    weigh<0, kPartGroups, kMasked>(shared, row_address(shared), k_fragment, constants,
                                   from.p.changes, block, state, next_scale, p);
    if constexpr (kScoreParts == 2) {
      weigh<kPartGroups, 2 * kPartGroups, kMasked>(shared, row_address(shared), k_fragment,
                                                   constants, from.p.changes, block, state,
                                                   next_scale, p);
    }

    // Codes of the weights: [k32 steps][A fragment], or bfloat16: [k16 steps][A fragment].
    uint32_t packed[kKvBlock / (kHalf ? 16 : 32)][4];
    if constexpr (kHalf) {
      state.softmax.halves(p, packed);
    } else {
      state.softmax.codes(p, packed);
    }

    // V of this block has landed; the barrier also ends all reads of the other V stage.
    ptx::cp_wait<1>();
    ptx::sync_block();
    if (block + 1 < end) {
      load_v(shared, from, block + 1);
    } else {
      ptx::cp_commit();
    }

    if constexpr (kHalf) {
      add_halves(v_tile, packed, state.out);
    } else {
      add_codes(v_tile, packed, state);
    }
  }

  /// Weights p of key groups [kFirst, kLast) of a block; the rows' VisibleKeys are at `rows`.
  template <int kFirst, int kLast, bool kMasked>
  static ATTN8_DEVICE void weigh(uint32_t shared, uint32_t rows, uint32_t k_fragment,
                                 uint32_t constants, const ScoreChanges& changes, int block,
                                 State& state, float4& next_scale, float (&p)[Softmax::kElements]) {
    int products[2 * (kLast - kFirst)][4];  // [8-key groups][C fragment]
    if constexpr (kFewRegisters) {
      ptx::sync_warp();  // as in add_codes()
      load_magic(shared + kMagicStart, state.magic);
    }
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
      for (int group = 0; group < kLast - kFirst; ++group) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, KTile::advance(k_fragment, (kFirst + group) * 16, step * 32));
        ATTN8_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t columns[2] = {b[2 * half], b[2 * half + 1]};
          if (step == 0) {
            ptx::mma_s8_from(products[2 * group + half], q, columns, state.magic);
          } else {
            ptx::mma_s8(products[2 * group + half], q, columns);
          }
        }
      }
    }
    const float magic_score[2] = {-kMagic * state.softmax.score_scale[0],
                                  -kMagic * state.softmax.score_scale[1]};
    state.softmax.template weights<kFirst, kLast, kMasked>(
        changes, rows,
        [&](int i, int r, float scale) {
          const float product = as_magic(products[i / 4 - 2 * kFirst][i % 4]);
          return ptx::mul(ptx::fma(product, state.softmax.score_scale[r], magic_score[r]), scale);
        },
        constants, block * kKvBlock, next_scale, p);
  }

  /// out += weights times V, in bfloat16.
  static ATTN8_DEVICE void add_halves(uint32_t v_tile, const uint32_t (&packed)[kKvBlock / 16][4],
                                      float (&out)[kHeadDim / 8][4]) {
    const int lane = ptx::thread_index() % 32;
    // Transposed: rows of the matrices are keys, {0, 1} for 8 channels and {2, 3} for 8 more.
    const uint32_t fragment = v_tile + VTile::offset(lane % 16, lane / 16 * 16);
    ATTN8_UNROLL
    for (int step = 0; step < kKvBlock / 16; ++step) {
      ATTN8_UNROLL
      for (int columns = 0; columns < kHeadDim / 16; ++columns) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, VTile::advance(fragment, step * 16, columns * 32));
        ATTN8_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t keys[2] = {b[2 * half], b[2 * half + 1]};
          ptx::mma_bf16(out[2 * columns + half], packed[step], keys);
        }
      }
    }
  }

  /// out += codes times V codes, times the block's scale.
  static ATTN8_DEVICE void add_codes(uint32_t v_tile, const uint32_t (&packed)[kKvBlock / 32][4],
                                     State& state) {
    const int lane = ptx::thread_index() % 32;
    const uint32_t fragment =
        v_tile + VTile::offset(ldmatrix_b_column(lane), ldmatrix_b_byte(lane));
    if constexpr (kFewRegisters) load_magic(ptx::smem_base() + kMagicStart, state.magic);
    ATTN8_UNROLL
    for (int columns = 0; columns < kHeadDim / 16; ++columns) {
      // Keeps the compiler from loading V so far ahead that outputs leave their registers.
      if constexpr (kHeadDim > 128 || kScores == Scores::kBiased) ptx::sync_warp();
      int products[2][4];  // [8-channel groups][C fragment]
      ATTN8_UNROLL
      for (int step = 0; step < kKvBlock / 32; ++step) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, VTile::advance(fragment, columns * 16, step * 32));
        ATTN8_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t keys[2] = {b[2 * half], b[2 * half + 1]};
          if (step == 0) {
            ptx::mma_u8_from(products[half], packed[step], keys, state.magic);
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

  /// Of the quad's VisibleKeys and RowChanges.
  static ATTN8_DEVICE uint32_t row_address(uint32_t shared) {
    return shared + kVisible + ptx::thread_index() / 4 * kRowStateBytes;
  }

  static ATTN8_DEVICE float as_magic(int bits) {
    return ptx::as_float(static_cast<uint32_t>(bits));
  }
};

}  // namespace attn8::cuda
