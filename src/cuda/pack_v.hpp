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
  int first, last;       ///< keys [first, last) are visible to a query
  const float* scale;    ///< per tensor or channel: [batch * nheads][packed_head_dim]; else nullptr
  float* token_scale;    ///< per token: [batch * nheads][rows]; 0 for tokens of zeros and padding
  float* panel_scale;    ///< per token: [batch * nheads][rows / 128] largest visible finite scale
  float* v_scale;        ///< per token: [batch * nheads][packed_head_dim] what FoldV writes
  float* key_constants;  ///< per token: [batch * nheads][rows / 16][2][16] what FoldV completes
  int kv_block;
};

/// One block per panel of 128 keys, and batch and head: quantizes and transposes.
template <Source kSource, int kPackedDim, bool kPerToken>
struct PackV {
  static constexpr int kThreads = 256;
  // 33 words a channel: a warp's 16 x 2 words of one store fall into 32 banks.
  static constexpr int kWords = kPanelKeys / 4 + 1;
  static constexpr int kMaxima = kPackedDim * kWords * 4;  // after the codes: [8 warps] floats
  static constexpr uint32_t kSharedBytes = kMaxima + kThreads / 32 * 4;

  static ATTN8_DEVICE void run(const PackVParams& p) {
    const uint32_t shared = ptx::smem_base();
    const int head = ptx::block_y() % p.x.nheads;
    const int batch = ptx::block_y() / p.x.nheads;
    const int lane = ptx::thread_index() % 16;
    const int64_t first_position = static_cast<int64_t>(ptx::block_x()) * kPanelKeys;
    float largest = 0;
    ATTN8_UNROLL
    for (int pass = 0; pass < 2; ++pass) {
      const int word = pass * 16 + ptx::thread_index() / 16;  // four positions of the panel
      float values[4][kPackedDim / 16];
      float scale[4] = {1, 1, 1, 1};
      float inverse[4] = {1, 1, 1, 1};
      int key[4];
      ATTN8_UNROLL
      for (int i = 0; i < 4; ++i) {
        key[i] = static_cast<int>(packed_key(first_position + word * 4 + i));
        ATTN8_UNROLL
        for (int c = 0; c < kPackedDim / 32; ++c) {
          const int channel = c * 32 + lane * 2;
          values[i][2 * c] = 0;
          values[i][2 * c + 1] = 0;
          if (key[i] < p.x.seqlen && channel < p.x.head_dim) {
            load2<kSource>(p.x, p.x.offset(batch, key[i], head) + channel, values[i][2 * c],
                           values[i][2 * c + 1]);
          }
        }
      }
      if constexpr (kPerToken) {
        ATTN8_UNROLL
        for (int i = 0; i < 4; ++i) {
          uint32_t magnitude = 0;
          ATTN8_UNROLL
          for (int c = 0; c < kPackedDim / 16; ++c) {
            magnitude = larger(magnitude, magnitude_bits(values[i][c]));
          }
          ATTN8_UNROLL
          for (int mask = 1; mask < 16; mask *= 2) {
            magnitude = larger(magnitude, ptx::shfl_xor(magnitude, mask));
          }
          scale[i] = group_scale(magnitude);
          inverse[i] = 1.0f / scale[i];
          float token_scale = scale[i];
          if constexpr (kSource == Source::kCodes) {
            token_scale = key[i] < p.x.seqlen ? p.x.token_scale(batch, key[i], head) : 0.0f;
          }
          // A token of zeros, or with a scale too small for a float, has codes 0 throughout.
          if (magnitude == 0 ||
              (kSource != Source::kCodes && scale[i] == 1.0f && ptx::as_float(magnitude) < 0.5f)) {
            if (token_scale == token_scale) token_scale = 0;
          }
          if (key[i] >= p.first && key[i] < p.last) largest = ptx::max(largest, token_scale);
          if (lane == 0) {
            ptx::st_global(p.token_scale + static_cast<int64_t>(ptx::block_y()) * p.rows + key[i],
                           token_scale);
          }
        }
      }
      ATTN8_UNROLL
      for (int c = 0; c < kPackedDim / 16; ++c) {
        const int channel = c / 2 * 32 + lane * 2 + c % 2;
        float channel_scale = 1;
        if constexpr (!kPerToken && kSource != Source::kCodes) {
          channel_scale =
              ptx::ld_global(p.scale + static_cast<int64_t>(ptx::block_y()) * kPackedDim + channel);
        }
        const float channel_inverse = 1.0f / channel_scale;
        uint32_t code[4];
        ATTN8_UNROLL
        for (int i = 0; i < 4; ++i) {
          code[i] = kSource == Source::kCodes
                        ? static_cast<uint32_t>(static_cast<int>(values[i][c]))
                        : code_bits(values[i][c], kPerToken ? scale[i] : channel_scale,
                                    kPerToken ? inverse[i] : channel_inverse);
        }
        ptx::st_shared<uint32_t>(shared + (channel * kWords + word) * 4,
                                 pack_bytes(code[0], code[1], code[2], code[3]));
      }
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
    int8_t* image = p.codes + static_cast<int64_t>(ptx::block_y()) * p.rows * kPackedDim;
    for (int i = ptx::thread_index(); i < kPackedDim * 8; i += kThreads) {
      const int channel = i / 8;
      const uint32_t address = shared + (channel * kWords + i % 8 * 4) * 4;
      const uint4 codes = {ptx::ld_shared<uint32_t>(address), ptx::ld_shared<uint32_t>(address + 4),
                           ptx::ld_shared<uint32_t>(address + 8),
                           ptx::ld_shared<uint32_t>(address + 12)};
      const int64_t panel = static_cast<int64_t>(ptx::block_x()) * kPackedDim * kPanelKeys;
      ptx::st_global(
          reinterpret_cast<uint4*>(
              image + panel + channel / 8 * (8 * kPanelKeys) +
              swizzle(static_cast<uint32_t>(channel % 8 * kPanelKeys + i % 8 * 16), kPanelKeys)),
          codes);
    }
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
    const bool visible = inside && key >= p.first && key < p.last;
    const float smallest_ratio = ptx::as_float(0x0D800000u);  // 2^-100
    float ratio = scale / reference;
    float largest = block_maximum(visible ? ratio : 0.0f);
    if (largest == 0) largest = 1;
    if (scale == 0) ratio = largest * 0x1p-20f;
    if (ratio < smallest_ratio) ratio = smallest_ratio;
    if (inside) {
      float* constants = p.key_constants + head * p.rows * 2;
      ptx::st_global(constants + key_constant_offset(key, 1), ratio);
    }
    if (ptx::block_x() == 0 && ptx::thread_index() < packed_dim) {
      ptx::st_global(p.v_scale + head * packed_dim + ptx::thread_index(), reference);
    }
  }
};

}  // namespace attn8::cuda
