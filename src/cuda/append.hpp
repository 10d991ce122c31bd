// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "quantize.hpp"

/// Tokens into the pages of a cache: quantized, packed and put where attention reads them, in one
/// pass. A page holds, per kv head, what params.hpp says of an image of page_size keys; V scales
/// are not made relative to another (v_ratio is the scale itself), so that a token never touches
/// another.
namespace attn8::cuda {

/// The pages of a cache.
struct Pages {
  int8_t* k;             ///< [pages][nheads_k] images of page_size rows
  int8_t* v;             ///< [pages][nheads_k] images of page_size keys
  float* key_constants;  ///< [pages][nheads_k][page_size / 16][2][16]
  float* k_mean;         ///< [pages][nheads_k][row_bytes]: of the sequence whose first page it is
  int nheads_k;
  int page_shift;  ///< log2(page_size)
  int num_pages;
};

/// What a call says of its sequences, in device memory: as the caller gave it, and as kernels may
/// rely on it.
struct TablesParams {
  const int* block_table;
  int64_t block_table_stride_batch, block_table_stride_page;
  const int* cache_seqlens;
  int64_t cache_seqlens_stride;
  const int* cu_seqlens;  ///< or nullptr: every sequence has `seqlen` new tokens
  int64_t cu_seqlens_stride;
  int batch, max_pages, num_pages, page_shift;
  int seqlen;            ///< new tokens of a sequence
  int max_seqlen;        ///< of a ragged batch: the most that one has
  int max_keys;          ///< that a sequence may have
  int total;             ///< tokens of the call
  bool appends;          ///< whether the new tokens come behind cache_seqlens, or are among them
  int* checked_table;    ///< [batch][max_pages]
  int* checked_seqlens;  ///< [batch]
  int* checked_cu;       ///< [batch + 1], written where cu_seqlens is given
  int* bad;              ///< [batch]: 1 where something pointed outside, and was replaced
};

/// One block per sequence. Whatever the tables hold, what it writes points inside the cache and the
/// call's tensors.
struct CheckTables {
  static constexpr int kThreads = 128;
  static constexpr uint32_t kSharedBytes = kThreads * 4;

  static ATTN8_DEVICE int cu(const TablesParams& p, int i) {
    return ptx::ld_global(p.cu_seqlens + i * p.cu_seqlens_stride);
  }

  static ATTN8_DEVICE void run(const TablesParams& p) {
    const int b = ptx::block_x();
    int bad = 0;
    int added = p.seqlen;
    if (p.cu_seqlens != nullptr) {
      const int first = clamp_to(cu(p, b), 0, p.total);
      const int last = clamp_to(cu(p, b + 1), 0, p.total);
      added = last - first;
      bad = first != cu(p, b) || last != cu(p, b + 1) || added < 0 || added > p.max_seqlen;
      if (ptx::thread_index() == 0) {
        ptx::st_global(p.checked_cu + b, first);
        if (b == p.batch - 1) ptx::st_global(p.checked_cu + p.batch, last);
      }
    }
    const int seqlen = ptx::ld_global(p.cache_seqlens + b * p.cache_seqlens_stride);
    const int64_t room = static_cast<int64_t>(p.max_pages) << p.page_shift;
    const int64_t end = static_cast<int64_t>(seqlen) + (p.appends && added > 0 ? added : 0);
    if (seqlen < 0 || end > p.max_keys) bad = 1;
    const int used =
        static_cast<int>(((end < room ? end : room) + (1 << p.page_shift) - 1) >> p.page_shift);
    for (int page = ptx::thread_index(); page < p.max_pages; page += kThreads) {
      const int given = ptx::ld_global(p.block_table + b * p.block_table_stride_batch +
                                       page * p.block_table_stride_page);
      const int inside = clamp_to(given, 0, p.num_pages - 1);
      if (page < used && inside != given) bad = 1;
      ptx::st_global(p.checked_table + static_cast<int64_t>(b) * p.max_pages + page, inside);
    }
    const uint32_t shared = ptx::smem_base();
    ptx::st_shared<int>(shared + ptx::thread_index() * 4, bad);
    ptx::sync_block();
    if (ptx::thread_index() != 0) return;
    for (int i = 0; i < kThreads; ++i) {
      if (ptx::ld_shared<int>(shared + i * 4) != 0) bad = 1;
    }
    ptx::st_global(p.checked_seqlens + b, clamp_to(seqlen, 0, p.max_keys));
    ptx::st_global(p.bad + b, bad);
  }
};

struct AppendParams {
  SourceTensor k, v;  ///< head_dim each; ragged: batch of one
  Pages pages;
  const int* block_table;  ///< [batch][max_pages], checked
  int max_pages;
  const int* seqlens;  ///< [batch] before the append, checked
  const int* cu;       ///< [batch + 1] or nullptr, checked
  const int* bad;      ///< [batch]: such a sequence is left alone
  bool smooth_k;
  double* sums;  ///< [batch * nheads_k][chunks][row_bytes]
  int chunks;    ///< of kAppendChunk tokens, that a sequence has at most
};

/// The new tokens of one sequence.
struct NewTokens {
  int first, count;  // rows of the sources
  int batch;         // of the sources
  int seqlen;        // tokens before them

  static ATTN8_DEVICE NewTokens of(const AppendParams& p, int b) {
    NewTokens tokens = {0, p.k.seqlen, b, ptx::ld_global(p.seqlens + b)};
    if (p.cu != nullptr) {
      tokens.first = ptx::ld_global(p.cu + b);
      tokens.count = ptx::ld_global(p.cu + b + 1) - tokens.first;
      tokens.batch = 0;
    }
    if (ptx::ld_global(p.bad + b) != 0) tokens.count = 0;
    return tokens;
  }
};

/// Tokens whose sum one block takes.
inline constexpr int kAppendChunk = 1024;

/// One block per chunk of tokens, and sequence and kv head: sums of K over a first append, in
/// double.
template <Source kSource, int kRowBytes>
struct AppendSums {
  static constexpr int kThreads = 256;
  static constexpr int kLanes = kRowBytes / 8;
  static constexpr int kSlots = kThreads / kLanes;
  static constexpr uint32_t kSharedBytes = kThreads * 8 * sizeof(double);

  static ATTN8_DEVICE void run(const AppendParams& p) {
    const int head = ptx::block_y() % p.pages.nheads_k;
    const NewTokens tokens = NewTokens::of(p, ptx::block_y() / p.pages.nheads_k);
    const int begin = ptx::block_x() * kAppendChunk;
    if (tokens.seqlen > 0 || begin >= tokens.count) return;
    const int end = begin + kAppendChunk < tokens.count ? begin + kAppendChunk : tokens.count;
    const int lane = ptx::thread_index() % kLanes;
    const int slot = ptx::thread_index() / kLanes;
    double sums[8] = {};
    for (int i = begin + slot; i < end && lane * 8 < p.k.head_dim; i += 4 * kSlots) {
      float values[4][8] = {};
      ATTN8_UNROLL
      for (int u = 0; u < 4; ++u) {
        if (i + u * kSlots >= end) continue;
        load8<kSource>(p.k, p.k.offset(tokens.batch, tokens.first + i + u * kSlots, head), lane,
                       values[u]);
      }
      ATTN8_UNROLL
      for (int u = 0; u < 4; ++u) {
        ATTN8_UNROLL
        for (int c = 0; c < 8; ++c) sums[c] += static_cast<double>(values[u][c]);
      }
    }
    const uint32_t shared = ptx::smem_base();
    ATTN8_UNROLL
    for (int c = 0; c < 8; ++c) {
      ptx::st_shared<double>(shared + (slot * kRowBytes + lane * 8 + c) * 8, sums[c]);
    }
    ptx::sync_block();
    const int channel = ptx::thread_index();
    if (channel >= kRowBytes) return;
    double total = 0;
    for (int s = 0; s < kSlots; ++s) {
      total += ptx::ld_shared<double>(shared + (s * kRowBytes + channel) * 8);
    }
    ptx::st_global(
        p.sums + (static_cast<int64_t>(ptx::block_y()) * p.chunks + ptx::block_x()) * kRowBytes +
            channel,
        total);
  }
};

/// One block per sequence and kv head: the mean of a first append, into its first page.
template <int kRowBytes>
struct AppendMean {
  static constexpr int kThreads = kRowBytes;
  static constexpr uint32_t kSharedBytes = 0;

  static ATTN8_DEVICE void run(const AppendParams& p) {
    const int head = ptx::block_x() % p.pages.nheads_k;
    const int b = ptx::block_x() / p.pages.nheads_k;
    const NewTokens tokens = NewTokens::of(p, b);
    if (tokens.seqlen > 0 || tokens.count <= 0) return;
    const int channel = ptx::thread_index();
    float mean = 0;
    if (p.smooth_k) {
      double total = 0;
      for (int chunk = 0; chunk * kAppendChunk < tokens.count; ++chunk) {
        total += ptx::ld_global(
            p.sums + (static_cast<int64_t>(ptx::block_x()) * p.chunks + chunk) * kRowBytes +
            channel);
      }
      mean = static_cast<float>(total / tokens.count);
      if (magnitude_bits(mean) >= kNotFinite) mean = 0;
    }
    const int64_t page = ptx::ld_global(p.block_table + static_cast<int64_t>(b) * p.max_pages);
    ptx::st_global(p.pages.k_mean + (page * p.pages.nheads_k + head) * kRowBytes + channel, mean);
  }
};

/// One block per 16 neighbouring tokens of a page, of which some may be new, and sequence and kv
/// head: kRowBytes / 8 threads a token. Codes of V meet in shared memory, [channel][16 positions].
template <Source kSource, int kRowBytes, int kPackedDim>
struct AppendTokens {
  static constexpr int kLanes = kRowBytes / 8;
  static constexpr int kThreads = kLanes * kKeyGroup;
  static constexpr uint32_t kSharedBytes = kRowBytes * kKeyGroup;

  static ATTN8_DEVICE void run(const AppendParams& p) {
    const int head = ptx::block_y() % p.pages.nheads_k;
    const int b = ptx::block_y() / p.pages.nheads_k;
    const NewTokens tokens = NewTokens::of(p, b);
    const int group = tokens.seqlen / kKeyGroup + ptx::block_x();
    const int first = group * kKeyGroup;
    const int end = tokens.seqlen + tokens.count;
    if (tokens.count <= 0 || first >= end) return;

    const int lane = ptx::thread_index() % kLanes;
    const int key = first + ptx::thread_index() / kLanes;
    const bool is_new = key >= tokens.seqlen && key < end;
    const int* table = p.block_table + static_cast<int64_t>(b) * p.max_pages;
    const int page_size = 1 << p.pages.page_shift;
    const int64_t image =
        static_cast<int64_t>(ptx::ld_global(table + (first >> p.pages.page_shift))) *
            p.pages.nheads_k +
        head;
    const int place = key & (page_size - 1);

    float k[8] = {};
    float v[8] = {};
    if (is_new && lane * 8 < p.k.head_dim) {
      const int row = tokens.first + key - tokens.seqlen;
      load8<kSource>(p.k, p.k.offset(tokens.batch, row, head), lane, k);
      load8<kSource>(p.v, p.v.offset(tokens.batch, row, head), lane, v);
      if (p.smooth_k) {
        float mean[8];
        load_floats(p.pages.k_mean +
                        (static_cast<int64_t>(ptx::ld_global(table)) * p.pages.nheads_k + head) *
                            kRowBytes +
                        lane * 8,
                    mean);
        ATTN8_UNROLL
        for (int c = 0; c < 8; ++c) {
          if (lane * 8 + c < p.k.head_dim) k[c] = ptx::add(k[c], -mean[c]);
        }
      }
    }
    float k_scale = group_scale(largest_magnitude(k));
    const uint32_t v_magnitude = largest_magnitude(v);
    const float v_scale = group_scale(v_magnitude);
    if (is_new) {
      uint32_t code[8];
      codes_of(k, k_scale, code);
      ptx::st_global(
          reinterpret_cast<uint2*>(p.pages.k + image * page_size * kRowBytes +
                                   packed_row_offset(page_size, kRowBytes, place, lane * 8)),
          uint2{pack_bytes(code[0], code[1], code[2], code[3]),
                pack_bytes(code[4], code[5], code[6], code[7])});
      if (lane == 0) {
        // A token of zeros has codes of zeros, whose scale does not matter. One that is not finite
        // counts through the scale of its key, which a mask can hide.
        const bool zeros = v_magnitude == 0;
        if (v_magnitude >= kNotFinite) k_scale = ptx::as_float(0x7FC00000u);
        float* constants = p.pages.key_constants + image * page_size * 2;
        ptx::st_global(constants + key_constant_offset(place, 0), k_scale);
        ptx::st_global(constants + key_constant_offset(place, 1),
                       zeros || v_magnitude >= kNotFinite ? 0.0f : v_scale);
      }
    }
    uint32_t code[8];
    codes_of(v, v_scale, code);
    const uint32_t shared = ptx::smem_base();
    ATTN8_UNROLL
    for (int c = 0; c < 8; ++c) {
      ptx::st_shared_byte(
          shared + (lane * 8 + c) * kKeyGroup + static_cast<int>(packed_position(key) % kKeyGroup),
          code[c] & 0xFF);
    }
    ptx::sync_block();
    const bool whole = first >= tokens.seqlen && first + kKeyGroup <= end;
    const int first_place = first & (page_size - 1);
    int8_t* values = p.pages.v + image * page_size * kPackedDim;
    for (int i = ptx::thread_index(); i < kPackedDim; i += kThreads) {
      int8_t* target = values + packed_v_offset(kPackedDim, first_place, i);
      if (whole) {
        ptx::st_global(reinterpret_cast<uint4*>(target),
                       ptx::ld_shared<uint4>(shared + i * kKeyGroup));
        continue;
      }
      for (int n = 0; n < kKeyGroup; ++n) {
        const int new_key = first + n;
        if (new_key < tokens.seqlen || new_key >= end) continue;
        const int position = static_cast<int>(packed_position(n));
        ptx::st_global(target + position,
                       static_cast<int8_t>(ptx::ld_shared_byte(shared + i * kKeyGroup + position)));
      }
    }
  }

  /// Largest magnitude_bits() of a token. Collective over its threads.
  static ATTN8_DEVICE uint32_t largest_magnitude(const float (&x)[8]) {
    uint32_t magnitude = 0;
    ATTN8_UNROLL
    for (int c = 0; c < 8; ++c) magnitude = larger(magnitude, magnitude_bits(x[c]));
    ATTN8_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) {
      magnitude = larger(magnitude, ptx::shfl_xor(magnitude, mask));
    }
    return magnitude;
  }

  static ATTN8_DEVICE void codes_of(const float (&x)[8], float scale, uint32_t (&code)[8]) {
    const float inverse = reciprocal(scale);
    ATTN8_UNROLL
    for (int c = 0; c < 8; ++c) code[c] = code_bits(x[c], scale, inverse);
  }
};

}  // namespace attn8::cuda
