// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "quantize.hpp"

/// Packing V: quantized, transposed, and its scales per token made ready to fold into P.
namespace attn8::cuda {

struct PackVParams {
  SourceTensor x;
  int8_t* codes;  ///< [batch * nheads] images of `rows` keys
  int rows;
  VisibleTokens visible;
  const float* scale;    ///< per tensor or channel: [batch * nheads][packed_head_dim]; else nullptr
  float* token_scale;    ///< per token: [batch * nheads][rows]; 0 for tokens of zeros and padding
  float* panel_scale;    ///< per token: [batch * nheads][rows / 128] largest visible finite scale
  float* v_scale;        ///< per token: [batch * nheads][packed_head_dim] what FoldV writes
  float* key_constants;  ///< per token: [batch * nheads][rows / 16][2][16] what FoldV completes
  int kv_block;
};

/// One block per panel of 128 keys, and batch and head: quantizes and transposes. A thread has four
/// keys that are neighbours in packed order, and eight channels of each: 16-byte loads, and one
/// word of codes per channel, which meet in shared memory as
///   [packed_head_dim][32 words], words exchanged within a channel by swizzled_word()
template <Source kSource, int kPackedDim, bool kPerToken>
struct PackV {
  static constexpr int kThreads = 256;
  static constexpr int kWords = kPanelKeys / 4;  // of a channel
  /// Threads that share a key; a power of two, so that they are neighbours in a warp.
  static constexpr int kLanes = kPackedDim <= 64 ? 8 : kPackedDim <= 128 ? 16 : 32;
  static constexpr int kPasses = kWords * kLanes / kThreads;
  static_assert(kPasses * kThreads == kWords * kLanes);
  static constexpr int kMaxima = kPackedDim * kPanelKeys;  // after the codes: [8 warps] floats
  static constexpr uint32_t kSharedBytes = kMaxima + kThreads / 32 * 4;

  /// What a warp stores at once, words [w, w + 32 / kLanes) of channels i, 8 + i, 16 + i, ...,
  /// falls into 32 banks.
  static ATTN8_DEVICE int swizzled_word(int channel, int word) {
    return word ^ (channel / 8 * (32 / kLanes) & 31);
  }

  static ATTN8_DEVICE void run(const PackVParams& p) {
    const uint32_t shared = ptx::smem_base();
    float largest = 0;
    ATTN8_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int item = pass * kThreads + ptx::thread_index();
      quantize(p, shared, item / kLanes, item % kLanes, largest);
    }
    if constexpr (kPerToken) {
      ATTN8_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) {
        largest = ptx::max(largest, ptx::shfl_xor(largest, mask));
      }
      if (ptx::thread_index() % 32 == 0) {
        ptx::st_shared<float>(shared + kMaxima + ptx::thread_index() / 32 * 4, largest);
      }
    }
    ptx::sync_block();
    if constexpr (kPerToken) {
      if (ptx::thread_index() == 0) {
        for (int warp = 0; warp < kThreads / 32; ++warp) {
          largest = ptx::max(largest, ptx::ld_shared<float>(shared + kMaxima + warp * 4));
        }
        ptx::st_global(p.panel_scale +
                           static_cast<int64_t>(ptx::block_y()) * (p.rows / kPanelKeys) +
                           ptx::block_x(),
                       largest);
      }
    }
    store(p, shared);
  }

  /// Keys of word `word` of the panel, channels [8 lane, 8 lane + 8).
  static ATTN8_DEVICE void quantize(const PackVParams& p, uint32_t shared, int word, int lane,
                                    float& largest) {
    const int head = ptx::block_y() % p.x.nheads;
    const int batch = ptx::block_y() / p.x.nheads;
    const int64_t first_position = static_cast<int64_t>(ptx::block_x()) * kPanelKeys + word * 4;
    const auto key = [first_position](int i) {
      return static_cast<int>(packed_key(first_position + i));
    };
    EightChannels<kSource> rows[4];
    load_rows<kSource>(
        p.x, lane,
        [&](int i) { return key(i) < p.x.seqlen ? p.x.offset(batch, key(i), head) : kNoRow; },
        rows);
    float values[4][8];
    ATTN8_UNROLL
    for (int i = 0; i < 4; ++i) rows[i].widen(values[i]);
    float scale[8];
    float inverse[8];
    if constexpr (kPerToken) {
      uint32_t magnitude[4] = {};
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) {
        ATTN8_UNROLL
        for (int c = 0; c < 8; ++c) {
          magnitude[i] = larger(magnitude[i], magnitude_bits(values[i][c]));
        }
      }
      ATTN8_UNROLL
      for (int mask = 1; mask < kLanes; mask *= 2) {
        ATTN8_UNROLL
        for (int i = 0; i < 4; ++i) {
          magnitude[i] = larger(magnitude[i], ptx::shfl_xor(magnitude[i], mask));
        }
      }
      const VisibleTokens::Range visible = p.visible.of(batch);
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) {
        scale[i] = token_scale(p, visible, batch, head, key(i), lane, magnitude[i], largest);
      }
    } else if constexpr (kSource != Source::kCodes) {
      const float* channels =
          p.scale + static_cast<int64_t>(ptx::block_y()) * kPackedDim + lane * 8;
      ATTN8_UNROLL
      for (int c = 0; c < 8; ++c) scale[c] = 1;
      if (lane * 8 < kPackedDim) load_floats(channels, scale);
    }
    if constexpr (kSource != Source::kCodes) {
      ATTN8_UNROLL
      for (int i = 0; i < (kPerToken ? 4 : 8); ++i) inverse[i] = reciprocal(scale[i]);
    }
    if (lane * 8 >= kPackedDim) return;
    uint32_t finite = 0;  // of each key's byte
    if constexpr (kPerToken && kSource != Source::kCodes) {
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) finite |= scale[i] == scale[i] ? 0xFFu << 8 * i : 0;
    }
    ATTN8_UNROLL
    for (int c = 0; c < 8; ++c) {
      uint32_t code[4];
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (kSource == Source::kCodes) {
          code[i] = static_cast<uint32_t>(static_cast<int>(values[i][c]));
        } else {
          code[i] =
              rounded_bits(values[i][c], scale[kPerToken ? i : c], inverse[kPerToken ? i : c]);
        }
      }
      uint32_t four = pack_bytes(code[0], code[1], code[2], code[3]);
      if constexpr (kSource != Source::kCodes) {
        four = kPerToken ? four & finite : scale[c] == scale[c] ? four : 0;
      }
      const int channel = lane * 8 + c;
      ptx::st_shared<uint32_t>(shared + (channel * kWords + swizzled_word(channel, word)) * 4,
                               four);
    }
  }

  /// Scale to quantize a key with, from the largest magnitude_bits() of its channels; writes the
  /// one that FoldV reads, which is 0 where all codes are, and keeps the largest of those a query
  /// sees.
  static ATTN8_DEVICE float token_scale(const PackVParams& p, const VisibleTokens::Range& visible,
                                        int batch, int head, int key, int lane, uint32_t magnitude,
                                        float& largest) {
    const float scale = group_scale(magnitude);
    float known = scale;
    if constexpr (kSource == Source::kCodes) {
      known = key < p.x.seqlen ? p.x.token_scale(batch, key, head) : 0.0f;
    }
    // A token of zeros, or with a scale too small for a float (it is 1), has codes 0 throughout.
    if constexpr (kSource == Source::kCodes) {
      if (magnitude == 0 && known == known) known = 0;
    } else if (scale == 1.0f && ptx::as_float(magnitude) < 0.5f) {
      known = 0;
    }
    if (key >= visible.first && key < visible.last) largest = ptx::max(largest, known);
    if (lane == 0) {
      ptx::st_global(p.token_scale + static_cast<int64_t>(ptx::block_y()) * p.rows + key, known);
    }
    return scale;
  }

  /// The panel from shared memory to its image, 16 bytes of a channel at a time.
  static ATTN8_DEVICE void store(const PackVParams& p, uint32_t shared) {
    int8_t* panel = p.codes + static_cast<int64_t>(ptx::block_y()) * p.rows * kPackedDim +
                    static_cast<int64_t>(ptx::block_x()) * kPackedDim * kPanelKeys;
    for (int i = ptx::thread_index(); i < kPackedDim * (kWords / 4); i += kThreads) {
      const int channel = i / (kWords / 4);
      const int word = i % (kWords / 4) * 4;
      const int at = swizzled_word(channel, word);
      uint4 codes = ptx::ld_shared<uint4>(shared + (channel * kWords + (at & ~3)) * 4);
      // swizzled_word() exchanges words within the 16 bytes, too.
      if ((at & 2) != 0) codes = {codes.z, codes.w, codes.x, codes.y};
      if ((at & 1) != 0) codes = {codes.y, codes.x, codes.w, codes.z};
      ptx::st_global(
          reinterpret_cast<uint4*>(
              panel + channel / 8 * (8 * kPanelKeys) +
              swizzle(static_cast<uint32_t>(channel % 8 * kPanelKeys + word * 4), kPanelKeys)),
          codes);
    }
  }
};

/// V for `half`: rounded to bfloat16, in the image of packed_v_half_offset(). One thread per eight
/// channels of a key. A token with a value that is not finite there has zeros, and a scale of NaN
/// for its key, so that the rows that see it become NaN and no others.
template <Source kSource>
struct PackHalfV {
  static constexpr int kThreads = 256;
  static constexpr uint32_t kSharedBytes = 0;

  static ATTN8_DEVICE void run(const PackVParams& p, int packed_dim) {
    const int lanes = packed_dim / 8;
    const int item = ptx::block_x() * kThreads + ptx::thread_index();
    const int key = item / lanes;
    const int lane = item % lanes;
    if (key >= p.rows) return;
    const int64_t image = ptx::block_y();
    float values[8] = {};
    if (key < p.x.seqlen && lane * 8 < p.x.head_dim) {
      const int head = ptx::block_y() % p.x.nheads;
      const int batch = ptx::block_y() / p.x.nheads;
      load8<kSource>(p.x, p.x.offset(batch, key, head), lane, values);
    }
    uint32_t pairs[4];
    bool finite = true;
    ATTN8_UNROLL
    for (int i = 0; i < 4; ++i) {
      pairs[i] = ptx::pack_bfloat162(values[2 * i], values[2 * i + 1]);
      finite = finite && magnitude_bits(ptx::bfloat16_to_float(pairs[i] & 0xFFFF)) < kNotFinite &&
               magnitude_bits(ptx::as_float(pairs[i] & 0xFFFF0000u)) < kNotFinite;
    }
    if (!finite) {
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) pairs[i] = 0;
      ptx::st_global(p.key_constants + image * p.rows * 2 + key_constant_offset(key, 0),
                     ptx::as_float(0x7FC00000u));
    }
    ptx::st_global(reinterpret_cast<uint4*>(p.codes + image * p.rows * packed_dim * 2 +
                                            packed_v_half_offset(packed_dim, key, lane * 8)),
                   uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
  }
};

/// One block per (kv_block, batch and head): turns token scales into what folds them into P, see
/// `accurate` in docs/numerics.md. A token of zeros gets 2^-20 times the largest ratio of its
/// block.
struct FoldV {
  static constexpr int kThreads = 256;
  static constexpr uint32_t kSharedBytes = kThreads / 32 * 4;

  /// Largest over the block; all threads get it.
  static ATTN8_DEVICE float block_maximum(float x) {
    const uint32_t shared = ptx::smem_base();
    ATTN8_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) x = ptx::max(x, ptx::shfl_xor(x, mask));
    ptx::sync_block();
    if (ptx::thread_index() % 32 == 0) {
      ptx::st_shared<float>(shared + ptx::thread_index() / 32 * 4, x);
    }
    ptx::sync_block();
    ATTN8_UNROLL
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      x = ptx::max(x, ptx::ld_shared<float>(shared + warp * 4));
    }
    return x;
  }

  static ATTN8_DEVICE void run(const PackVParams& p, int packed_dim) {
    const int64_t head = ptx::block_y();
    const int panels = p.rows / kPanelKeys;
    float reference = 0;
    for (int i = ptx::thread_index(); i < panels; i += kThreads) {
      reference = ptx::max(reference, ptx::ld_global(p.panel_scale + head * panels + i));
    }
    reference = block_maximum(reference);
    if (reference == 0) reference = 1;

    // kv_block <= 256: one key a thread.
    const int key = ptx::block_x() * p.kv_block + ptx::thread_index();
    const bool inside = ptx::thread_index() < p.kv_block && key < p.rows;
    const float scale = inside ? ptx::ld_global(p.token_scale + head * p.rows + key) : 0.0f;
    const VisibleTokens::Range range = p.visible.of(static_cast<int>(head) / p.x.nheads);
    const bool visible = inside && key >= range.first && key < range.last;
    const float smallest_ratio = ptx::as_float(0x0D800000u);  // 2^-100
    float ratio = scale / reference;
    float largest = block_maximum(visible ? ratio : 0.0f);
    if (largest == 0) largest = 1;
    if (scale == 0) ratio = largest * 0x1p-20f;
    // A token that is not finite counts through its key's scale, which the mask can hide: 0 times a
    // ratio of NaN would reach rows that do not see it.
    const bool finite = ratio == ratio;
    if (!(ratio >= smallest_ratio)) ratio = smallest_ratio;
    if (inside) {
      float* constants = p.key_constants + head * p.rows * 2;
      if (!finite) {
        ptx::st_global(constants + key_constant_offset(key, 0), ptx::as_float(0x7FC00000u));
      }
      ptx::st_global(constants + key_constant_offset(key, 1), ratio);
    }
    if (ptx::block_x() == 0 && ptx::thread_index() < packed_dim) {
      ptx::st_global(p.v_scale + head * packed_dim + ptx::thread_index(), reference);
    }
  }
};

}  // namespace attn8::cuda
