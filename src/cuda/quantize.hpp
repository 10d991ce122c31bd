// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "source_tensor.hpp"

/// From float tensors (or codes that were quantized before) to the packed form of params.hpp, the
/// rules of docs/numerics.md. Memory-bound: 16-byte loads where strides allow them, several in
/// flight, each input read once (K twice when it is smoothed, V twice when its scale is not per
/// token).
///
/// Order of launches: ChannelStatistics and FinishStatistics of K (mean) and V (scales), then
/// QuantizeRows of K and Q, PackV and FoldV (pack_v.hpp).
namespace attn8::cuda {

/// |x| in a form whose unsigned maximum keeps a NaN or an infinity.
ATTN8_DEVICE uint32_t magnitude_bits(float x) { return ptx::as_uint(x) & 0x7FFFFFFFu; }

ATTN8_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

inline constexpr uint32_t kNotFinite = 0x7F800000u;

/// a / b as a division rounds it, from the rounded 1 / b: one Newton step.
ATTN8_DEVICE float divide(float a, float b, float inverse) {
  const float estimate = ptx::mul(a, inverse);
  return ptx::fma(ptx::fma(-estimate, b, a), inverse, estimate);
}
/// 1 / x of a normal x below 2^126, rounded.
ATTN8_DEVICE float reciprocal(float x) {
  const float estimate = ptx::rcp(x);
  return ptx::fma(ptx::fma(-x, estimate, 1.0f), estimate, estimate);
}

/// Scale of a group from the largest magnitude_bits() in it: NaN when one is not finite, 1 when
/// the scale would be no normal number. Its low 3 bits are clear.
ATTN8_DEVICE float group_scale(uint32_t magnitude) {
  if (magnitude >= kNotFinite) return ptx::as_float(0x7FC00000u);
  const float quotient = divide(ptx::as_float(magnitude), 127.0f, 1.0f / 127.0f);
  const float scale = ptx::as_float(ptx::as_uint(quotient) & ~7u);
  return scale < FLT_MIN ? 1.0f : scale;
}

/// round-half-even(x / scale) in the low byte, two's complement; anything for a scale of NaN.
/// `inverse` is reciprocal(scale).
ATTN8_DEVICE uint32_t rounded_bits(float x, float scale, float inverse) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's last bit is worth 1
  return ptx::as_uint(ptx::add(divide(x, scale, inverse), magic));
}
/// The same; 0 for a scale of NaN.
ATTN8_DEVICE uint32_t code_bits(float x, float scale, float inverse) {
  return scale == scale ? rounded_bits(x, scale, inverse) : 0;
}

ATTN8_DEVICE uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return ptx::prmt(ptx::prmt(a, b, 0x0040), ptx::prmt(c, d, 0x0040), 0x5410);
}

// ---- Statistics over tokens ---------------------------------------------------------------------

/// The tokens that some query sees: [first, last), where sequences have lengths of their own those
/// of first_offset and so on in AttendParams.
struct VisibleTokens {
  int first, last;
  const int* seqlens_k;
  const int* leftpad_k;
  int64_t seqlens_k_stride, leftpad_k_stride;
  int seqlen_q, seqlen_k, first_offset, last_offset;
  bool bottom_right;

  struct Range {
    int first, last;
  };
  ATTN8_DEVICE Range of(int batch) const {
    if (seqlens_k == nullptr && leftpad_k == nullptr) return {first, last};
    int end = seqlen_k;
    int begin = 0;
    if (seqlens_k != nullptr) {
      end = clamp_to(ptx::ld_global(seqlens_k + batch * seqlens_k_stride), 0, seqlen_k);
    }
    if (leftpad_k != nullptr) {
      begin = clamp_to(ptx::ld_global(leftpad_k + batch * leftpad_k_stride), 0, end);
    }
    const int shift = bottom_right ? end - seqlen_q : 0;
    begin = clamp_to(first_offset + shift, begin, end);
    return {begin, clamp_to(seqlen_q + last_offset + shift, begin, end)};
  }
};

struct StatisticsParams {
  SourceTensor x;
  VisibleTokens visible;
  /// [batch * nheads][chunks][packed] partial results: sums (double) or magnitude bits (uint32)
  void* partial;
  int chunks;
  float* result;    ///< [batch * nheads][packed]: mean, or scale
  int packed;       ///< channels of `partial` and `result`, a multiple of 32
  bool per_tensor;  ///< magnitudes: one scale for all channels
};

enum class Statistic : int32_t { kSum, kMagnitude };

/// One block per (chunk of 256 tokens, batch and head). Sums are in double: exact for float16 data
/// in any order, so that they equal those of docs/numerics.md.
template <Source kSource, Statistic kStatistic>
struct ChannelStatistics {
  using Partial = std::conditional_t<kStatistic == Statistic::kSum, double, uint32_t>;
  static constexpr int kThreads = 256;
  static constexpr int kChunk = 256;
  static constexpr int kInFlight = 4;  // rows of a thread
  static constexpr uint32_t kSharedBytes = kThreads * 8 * sizeof(Partial);

  static ATTN8_DEVICE Partial combine(Partial a, Partial b) {
    if constexpr (kStatistic == Statistic::kSum) {
      return a + b;
    } else {
      return larger(a, b);
    }
  }

  static ATTN8_DEVICE void run(const StatisticsParams& p) {
    const int lanes = p.packed / 8;  // threads that share a token
    const int tokens = kThreads / lanes;
    const int lane = ptx::thread_index() % lanes;
    const int slot = ptx::thread_index() / lanes;
    const int head = ptx::block_y() % p.x.nheads;
    const int batch = ptx::block_y() / p.x.nheads;
    const VisibleTokens::Range visible = p.visible.of(batch);
    const int begin = visible.first + ptx::block_x() * kChunk;
    const int end = begin + kChunk < visible.last ? begin + kChunk : visible.last;

    Partial sums[8] = {};
    if (slot < tokens && lane * 8 < p.x.head_dim) {
      for (int row = begin + slot; row < end; row += kInFlight * tokens) {
        EightChannels<kSource> rows[kInFlight];
        load_rows<kSource>(
            p.x, lane,
            [&](int u) {
              return row + u * tokens < end ? p.x.offset(batch, row + u * tokens, head) : kNoRow;
            },
            rows);
        ATTN8_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          float values[8];
          rows[u].widen(values);
          ATTN8_UNROLL
          for (int i = 0; i < 8; ++i) {
            if constexpr (kStatistic == Statistic::kSum) {
              sums[i] += static_cast<double>(values[i]);
            } else {
              sums[i] = larger(sums[i], magnitude_bits(values[i]));
            }
          }
        }
      }
    }
    const uint32_t shared = ptx::smem_base();
    if (slot < tokens) {
      ATTN8_UNROLL
      for (int i = 0; i < 8; ++i) {
        ptx::st_shared<Partial>(shared + ((slot * lanes + lane) * 8 + i) * sizeof(Partial),
                                sums[i]);
      }
    }
    ptx::sync_block();
    if (ptx::thread_index() < p.packed) {
      Partial total = 0;
      for (int s = 0; s < tokens; ++s) {
        total =
            combine(total, ptx::ld_shared<Partial>(shared + (s * p.packed + ptx::thread_index()) *
                                                                sizeof(Partial)));
      }
      ptx::st_global(
          static_cast<Partial*>(p.partial) +
              (static_cast<int64_t>(ptx::block_y()) * p.chunks + ptx::block_x()) * p.packed +
              ptx::thread_index(),
          total);
    }
  }
};

/// One block per batch and head: partial results to the mean or the scales. Threads that share a
/// channel take turns at the chunks, because the way to memory and back is what takes time.
template <Statistic kStatistic>
struct FinishStatistics {
  using Chunks = ChannelStatistics<Source::kFloat32, kStatistic>;
  using Partial = typename Chunks::Partial;
  static constexpr int kThreads = 1024;
  static constexpr uint32_t kSharedBytes = kThreads * sizeof(Partial);

  static ATTN8_DEVICE void run(const StatisticsParams& p) {
    const int channel = ptx::thread_index() % p.packed;
    const int slots = kThreads / p.packed;
    const int slot = ptx::thread_index() / p.packed;
    const int64_t head = ptx::block_x();
    const uint32_t shared = ptx::smem_base();
    const auto address = [shared](int item) {
      return shared + static_cast<uint32_t>(item) * static_cast<uint32_t>(sizeof(Partial));
    };
    Partial total = 0;
    if (slot < slots) {
      const Partial* partial =
          static_cast<const Partial*>(p.partial) + head * p.chunks * p.packed + channel;
      for (int chunk = slot; chunk < p.chunks; chunk += slots) {
        total = Chunks::combine(total,
                                ptx::ld_global(partial + static_cast<int64_t>(chunk) * p.packed));
      }
      ptx::st_shared<Partial>(address(slot * p.packed + channel), total);
    }
    ptx::sync_block();
    total = 0;
    for (int s = 0; s < slots; ++s) {
      total = Chunks::combine(total, ptx::ld_shared<Partial>(address(s * p.packed + channel)));
    }
    float result = 0;
    if constexpr (kStatistic == Statistic::kSum) {
      const VisibleTokens::Range visible = p.visible.of(static_cast<int>(head) / p.x.nheads);
      result = static_cast<float>(total / static_cast<double>(visible.last - visible.first));
      if (magnitude_bits(result) >= kNotFinite) result = 0;
    } else {
      if (p.per_tensor) {
        for (int i = 0; i < slots * p.packed; ++i) {
          total = larger(total, ptx::ld_shared<uint32_t>(address(i)));
        }
      }
      result = group_scale(total);
    }
    if (slot == 0) ptx::st_global(p.result + head * p.packed + channel, result);
  }
};

// ---- Q and K ------------------------------------------------------------------------------------

struct RowsParams {
  SourceTensor x;
  int8_t* codes;         ///< [batch * nheads] images of `rows` rows
  int rows;              ///< packed length
  float* q_scale;        ///< Q: [batch * nheads][rows]
  float* key_constants;  ///< K: [batch * nheads][rows / 16][2][16]
  /// [batch * nheads / heads_per_mean][mean_channels] or nullptr. K: subtracted first. Q: the mean
  /// of its K, whose product with the row goes to lse_shift.
  const float* mean;
  int heads_per_mean, mean_channels;
  float* lse_shift;  ///< Q: [batch * nheads][rows] or nullptr
  float softmax_scale;
  int group;  ///< Q: heads that share an image, rows interleaved (see AttendParams); else 1
  /// The last of batch * nheads, to begin with it: what made the mean of K has just left that end
  /// in the cache. 0: begin with the first.
  int last_image;
  /// Q of a ragged batch: [batch + 1]; `x` is a batch of one, an image has all its sequences.
  const int* cu_seqlens;
  /// Q over a cache: the mean of sequence b is that of page mean_pages[b * mean_pages_stride], and
  /// bad[b] makes its rows NaN; or nullptr.
  const int* mean_pages;
  int64_t mean_pages_stride;
  const int* bad;
};

/// kRowBytes / 8 threads share a row of codes, and each has kRows rows: where a row comes from and
/// goes to costs more instructions than its quantization.
template <Source kSource, int kRowBytes, bool kQuery>
struct QuantizeRows {
  static constexpr int kThreads = 256;
  static constexpr int kLanes = kRowBytes / 8;
  static constexpr int kSlots = kThreads / kLanes;
  static constexpr int kRows = 4;
  static constexpr int kBlockTokens = kSlots * kRows;
  static constexpr uint32_t kSharedBytes = 0;

  static ATTN8_DEVICE void run(const RowsParams& p) {
    const int lane = ptx::thread_index() % kLanes;
    const int image_y = p.last_image > 0 ? p.last_image - ptx::block_y() : ptx::block_y();
    const int head = image_y % p.x.nheads;
    const int batch = image_y / p.x.nheads;
    const int first_row = ptx::block_x() * kBlockTokens;
    const int row = first_row + ptx::thread_index() / kLanes;

    const int group = kQuery ? p.group : 1;
    const int member = image_y % group;
    Place place = {batch,           0,     p.x.seqlen, (p.rows - member + group - 1) / group,
                   image_y / group, member};
    if constexpr (kQuery) {
      if (p.cu_seqlens != nullptr) {
        const int first = ptx::ld_global(p.cu_seqlens + batch);
        const int count = ptx::ld_global(p.cu_seqlens + batch + 1) - first;
        place = {0,
                 first,
                 count,
                 count,
                 head / group,
                 ragged_row(static_cast<int64_t>(first) * group, batch) + head % group};
      }
    }

    const int64_t offset = p.x.offset(place.batch, place.first_token + row, head);
    EightChannels<kSource> rows[kRows];
    load_rows<kSource>(
        p.x, lane,
        [&](int i) {
          return row + i * kSlots < place.count ? offset + i * (kSlots * p.x.stride_row) : kNoRow;
        },
        rows);
    float mean[8] = {};
    if (p.mean != nullptr && lane * 8 < p.x.head_dim) {
      int64_t mean_head = image_y / p.heads_per_mean;
      if (kQuery && p.mean_pages != nullptr) {
        const int64_t page = ptx::ld_global(p.mean_pages + batch * p.mean_pages_stride);
        mean_head = page * (p.x.nheads / p.heads_per_mean) + head / p.heads_per_mean;
      }
      load_floats(p.mean + mean_head * p.mean_channels + lane * 8, mean);
    }
    // Rows of an image that are a multiple of 8 apart are swizzled alike.
    static_assert(kSlots % 8 == 0);
    constexpr int kSpan = kRowBytes < 128 ? kRowBytes : 128;
    const int64_t image_row = place.first_image_row + static_cast<int64_t>(row) * group;
    int8_t* codes = p.codes + place.image * p.rows * kRowBytes +
                    packed_row_offset(p.rows, kRowBytes, image_row, lane * 8);
    const int64_t step = static_cast<int64_t>(kSlots) * group;
    ATTN8_UNROLL
    for (int i = 0; i < kRows; ++i) {
      // A block leaves as one: the lanes of a row add up its statistics.
      if (first_row + i * kSlots >= place.stored) return;
      float values[8];
      rows[i].widen(values);
      quantize_row(p, values, mean, place, row + i * kSlots, image_row + i * step,
                   codes + i * step * kSpan, batch, head, lane);
    }
  }

  /// Where the rows of a block come from and go to.
  struct Place {
    int batch, first_token, count;  // of the source
    int stored;                     // rows that are written
    int64_t image, first_image_row;
  };

  static ATTN8_DEVICE void quantize_row(const RowsParams& p, float (&x)[8], const float (&mean)[8],
                                        const Place& place, int row, int64_t image_row,
                                        int8_t* codes, int batch, int head, int lane) {
    const bool inside = row < place.count;
    float scale = 0;
    float shift = 0;
    if constexpr (kSource == Source::kCodes) {
      if (inside) scale = p.x.token_scale(place.batch, place.first_token + row, head);
    } else {
      uint32_t magnitude = 0;
      ATTN8_UNROLL
      for (int i = 0; i < 8; ++i) {
        if constexpr (!kQuery) {
          if (p.mean != nullptr && inside) x[i] = ptx::add(x[i], -mean[i]);
        }
        magnitude = larger(magnitude, magnitude_bits(x[i]));
      }
      ATTN8_UNROLL
      for (int mask = 1; mask < kLanes; mask *= 2) {
        magnitude = larger(magnitude, ptx::shfl_xor(magnitude, mask));
      }
      scale = group_scale(magnitude);
    }
    if constexpr (kQuery) {
      if (p.lse_shift != nullptr) {
        ATTN8_UNROLL
        for (int i = 0; i < 8; ++i) shift = ptx::fma(x[i], mean[i], shift);
        ATTN8_UNROLL
        for (int mask = 1; mask < kLanes; mask *= 2) shift += ptx::shfl_xor(shift, mask);
        if constexpr (kSource == Source::kCodes) shift *= scale;
      }
    }
    const float inverse = reciprocal(scale);
    uint32_t code[8];
    ATTN8_UNROLL
    for (int i = 0; i < 8; ++i) {
      code[i] = kSource == Source::kCodes ? static_cast<uint32_t>(static_cast<int>(x[i]))
                                          : rounded_bits(x[i], scale, inverse);
    }
    if (row >= place.stored) return;
    uint2 words = {pack_bytes(code[0], code[1], code[2], code[3]),
                   pack_bytes(code[4], code[5], code[6], code[7])};
    if (kSource != Source::kCodes && scale != scale) words = {0, 0};
    ptx::st_global(reinterpret_cast<uint2*>(codes), words);
    if (lane != 0) return;
    if (!inside) scale = 0;
    if constexpr (kQuery) {
      if (p.bad != nullptr && ptx::ld_global(p.bad + batch) != 0) {
        scale = ptx::as_float(0x7FC00000u);
      }
      const int64_t head_row = place.image * p.rows + image_row;
      ptx::st_global(p.q_scale + head_row, scale);
      if (p.lse_shift != nullptr) ptx::st_global(p.lse_shift + head_row, shift * p.softmax_scale);
    } else {
      const int64_t constants = place.image * p.rows * 2;
      ptx::st_global(p.key_constants + constants + key_constant_offset(image_row, 0), scale);
    }
  }
};

}  // namespace attn8::cuda
