// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// `accurate` on AVX-512 VNNI as a skewed pipeline: the bits of attend_accurate(), with the softmax
// of one item in the shadow of the products of another. Included inside the ISA's namespace after
// skewed_softmax_avx512-inl.hpp.
//
// An item is four query rows against the key groups of one kv block. Step t of the pipeline does
//
//   Q K of item t      scores of a group become 16-bit numbers row by row, just before the row's
//                      accumulators start on the next group: no int32 score is ever stored
//   P V of item t - 1  between its products, the weights of item t: table, shift, pack
//   O of item t - 2    its last 64 channels leave the accumulators as Q K of item t takes them
//
// so that the two ports of vpdpbusd always have independent work. On Zen 4 what counts is how many
// multiplies and shuffles a score needs beside its products (they share those ports): 2 multiplies
// for the scales, 1/2 for the denominator, and 1.3 shuffles; everything else is free.
//
// 16 bits hold the scores of a tile when no |T| can pass kMaxSkewedScore, which the lengths of q
// and k bound before anything runs; other tiles take attend_accurate().

/// Moves O of an item's rows to their new references, where one moved.
inline __attribute__((noinline)) void rescale_rows(const SkewedState& state, int padded) {
  for (int r = 0; r < kRowGroup; ++r) {
    for (int c = 0; c < padded; ++c) state.out[r * padded + c] *= state.rescale[r];
  }
}

/// O of one row and kVectors vectors of channels from `channel` on.
template <int kVectors, int kSize>
ATTN8_INLINE void add_row(const Skewed& work, const SkewedState& state, const float* mean,
                          int channel, int r, const Vector (&sum)[kSize]) {
  float* out = state.out + r * work.padded + channel;
  const __m512 weight = broadcast_now(state.value_weight + r);
  const __m512 residual = broadcast_now(state.residual + r);
#pragma GCC unroll 4
  for (int c = 0; c < kVectors; ++c) {
    const __m512 x = _mm512_fmadd_ps(residual, _mm512_load_ps(mean + channel + 16 * c),
                                     _mm512_cvtepi32_ps(sum[c]));
    _mm512_store_ps(out + 16 * c, _mm512_fmadd_ps(weight, x, _mm512_load_ps(out + 16 * c)));
  }
}

/// One step of a dot product for four rows: kStride bytes between rows of `a`, kVectors vectors of
/// b.
template <int kVectors, int kStride>
ATTN8_INLINE void dot_step(Vector (&sum)[4][4], const std::byte* a, const std::byte* b) {
  Vector column[kVectors];
#pragma GCC unroll 16
  for (int c = 0; c < kVectors; ++c) {
    column[c] = load_now(b + 64 * c);
  }
#pragma GCC unroll 16
  for (int r = 0; r < 4; ++r) {
    const Vector x = broadcast_bytes(a + r * kStride);
#pragma GCC unroll 16
    for (int c = 0; c < kVectors; ++c) {
      dot(sum[r][c], x, column[c]);
    }
  }
}

/// Bytes between the rows of P, and between the steps of Q's dims.
inline constexpr int kCodesStride = 64;
inline constexpr int kQueryStep = 16;

/// Steps kFirst..15 of P V of a group, with kPieces pieces of the next item's weights between.
template <int kVectors, int kFirst, int kPieces>
ATTN8_INLINE void value_group(Vector (&sum)[4][4], const std::byte* p, const std::byte* v,
                              const Weigher& weigher, int piece, Vector table_low,
                              Vector table_high) {
  constexpr int kSteps = 16 - kFirst;
  constexpr int kHalves = 2 * kPieces;
  HalfPiece half;
#pragma GCC unroll 16
  for (int step = 0; step < kSteps; ++step) {
    dot_step<kVectors, kCodesStride>(sum, p + 4 * (kFirst + step),
                                     v + (kFirst + step) * kVectors * 64);
    // At most one half per step: the halves are spread over the steps.
    const int done = step * kHalves / kSteps;
    if ((step + 1) * kHalves / kSteps > done) {
      // Four pieces are the four rows of a group.
      if (kPieces == 4 && done == 0) {
        weigh_half<0, 0>(weigher, piece, half, table_low, table_high);
      } else if (kPieces == 4 && done == 2) {
        weigh_half<0, 1>(weigher, piece + 1, half, table_low, table_high);
      } else if (kPieces == 4 && done == 4) {
        weigh_half<0, 2>(weigher, piece + 2, half, table_low, table_high);
      } else if (kPieces == 4 && done == 6) {
        weigh_half<0, 3>(weigher, piece + 3, half, table_low, table_high);
      } else if (done % 2 == 0) {
        weigh_half<0, -1>(weigher, piece + done / 2, half, table_low, table_high);
      } else {
        weigh_half<1, -1>(weigher, piece + done / 2, half, table_low, table_high);
      }
    }
  }
}

// Where the accumulators change their job they do so two columns at a time, row by row: what all
// four rows need of these columns is loaded once. Row after row with all columns at once, the
// boundary took 90 loads of 64 bytes, one per cycle, beside 64 cycles of products and multiplies.

/// Two columns of accumulators that start on a product: what they start from, and what the first of
/// two steps multiplies.
template <int kCount>
struct Start {
  Vector initial[2];
  Vector first[2];
  const std::byte* second;
};

/// Q K of columns kFirst and kFirst + 1 of a group.
template <int kFirst>
ATTN8_INLINE Start<2> query_start(const KeyRecord& record, const std::byte* k) {
  return {.initial = {load_now(&record.correction[16 * kFirst]),
                      load_now(&record.correction[16 * kFirst + 16])},
          .first = {load_now(k + 64 * kFirst), load_now(k + 64 * kFirst + 64)},
          .second = k + 256 + 64 * kFirst};
}

/// P V of columns kFirst and kFirst + 1 of kVectors.
template <int kVectors, int kFirst>
ATTN8_INLINE auto value_start(const std::byte* v) {
  constexpr int kCount = kVectors < kFirst ? 0 : kVectors - kFirst < 2 ? kVectors - kFirst : 2;
  Start<kCount> start = {.initial = {_mm512_setzero_si512(), _mm512_setzero_si512()},
                         .first = {},
                         .second = v + 64 * (kVectors + kFirst)};
  if constexpr (kCount > 0) start.first[0] = load_now(v + 64 * kFirst);
  if constexpr (kCount > 1) start.first[1] = load_now(v + 64 * kFirst + 64);
  return start;
}

/// The first two steps of one row; kNext bytes between the steps of `a`.
template <int kFirst, int kNext, int kCount>
ATTN8_INLINE void start_pair(Vector (&sum)[4], const Start<kCount>& start, const std::byte* a) {
  if constexpr (kCount > 0) {
    const Vector x = broadcast_bytes(a);
#pragma GCC unroll 2
    for (int c = 0; c < kCount; ++c) {
      sum[kFirst + c] = start.initial[c];
      dot(sum[kFirst + c], x, start.first[c]);
    }
    const Vector y = broadcast_bytes(a + kNext);
#pragma GCC unroll 2
    for (int c = 0; c < kCount; ++c) dot_memory(sum[kFirst + c], y, start.second + 64 * c);
  }
}

/// The other steps of Q K of one group.
ATTN8_INLINE void finish_query_group(Vector (&sum)[4][4], const std::byte* q, int padded,
                                     const std::byte* k) {
  dot_step<4, 4>(sum, q + 2 * kQueryStep, k + 512);
  dot_step<4, 4>(sum, q + 3 * kQueryStep, k + 768);
  for (int dim = 16; dim < padded; dim += 16) {
    q += 4 * kQueryStep;
    k += 1024;
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      dot_step<4, 4>(sum, q + kQueryStep * step, k + 256 * step);
    }
  }
}

/// Scores of columns kFirst and kFirst + 1 of one group, whose accumulators start on the next
/// group.
template <int kFirst>
ATTN8_INLINE void next_query_pair(Vector (&sum)[4][4], const KeyRecord* record,
                                  const float* factors, int16_t* scores, const std::byte* q,
                                  const std::byte* k, Vector (&largest)[4]) {
  const KeyPair keys = load_pair(*record, kFirst);
  const Start start = query_start<kFirst>(record[1], k);
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    score_pair(keys, factors + r, scores + 64 * r + 16 * kFirst, sum[r][kFirst], sum[r][kFirst + 1],
               largest[r]);
    start_pair<kFirst, kQueryStep>(sum[r], start, q + 4 * r);
  }
}

/// Likewise of the last group, whose accumulators start on P V of the item before.
template <int kVectors, int kFirst>
ATTN8_INLINE void leave_query_pair(Vector (&sum)[4][4], const KeyRecord* record,
                                   const float* factors, int16_t* scores, const std::byte* p,
                                   const std::byte* v, Vector (&largest)[4]) {
  const KeyPair keys = load_pair(*record, kFirst);
  const auto start = value_start<kVectors, kFirst>(v);
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    score_pair(keys, factors + r, scores + 64 * r + 16 * kFirst, sum[r][kFirst], sum[r][kFirst + 1],
               largest[r]);
    start_pair<kFirst, 4>(sum[r], start, p + r * kCodesStride);
  }
}

/// O of columns kFirst and kFirst + 1 of kVectors from `channel` on, whose accumulators start on
/// `start`: kStride bytes between the rows of `a`, kNext between its steps.
template <int kVectors, int kFirst, int kStride, int kNext, int kCount>
ATTN8_INLINE void leave_value_pair(Vector (&sum)[4][4], const Skewed& work,
                                   const SkewedState& state, const float* mean, int channel,
                                   const Start<kCount>& start, const std::byte* a) {
  constexpr int kLeft = kVectors < kFirst ? 0 : kVectors - kFirst < 2 ? kVectors - kFirst : 2;
  __m512 column_mean[2];
#pragma GCC unroll 2
  for (int c = 0; c < kLeft; ++c) {
    column_mean[c] = _mm512_load_ps(mean + channel + 16 * (kFirst + c));
  }
  float* out = state.out + channel + 16 * kFirst;
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    if constexpr (kLeft > 0) {
      const __m512 weight = broadcast_now(state.value_weight + r);
      const __m512 residual = broadcast_now(state.residual + r);
#pragma GCC unroll 2
      for (int c = 0; c < kLeft; ++c) {
        const __m512 x =
            _mm512_fmadd_ps(residual, column_mean[c], _mm512_cvtepi32_ps(sum[r][kFirst + c]));
        _mm512_store_ps(out + 16 * c, _mm512_fmadd_ps(weight, x, _mm512_load_ps(out + 16 * c)));
      }
      out += work.padded;
    }
    start_pair<kFirst, kNext>(sum[r], start, a + r * kStride);
  }
}

/// The next slab of P V, whose accumulators held kVectors columns of O from `channel` on.
template <int kVectors>
ATTN8_INLINE void next_slab(Vector (&sum)[4][4], const Skewed& work, const SkewedState& state,
                            const float* mean, int channel, const std::byte* p,
                            const std::byte* v) {
  leave_value_pair<kVectors, 0, kCodesStride, 4>(sum, work, state, mean, channel,
                                                 value_start<4, 0>(v), p);
  leave_value_pair<kVectors, 2, kCodesStride, 4>(sum, work, state, mean, channel,
                                                 value_start<4, 2>(v), p);
}

/// The first group of Q K, whose accumulators held kVectors columns of O from `channel` on.
template <int kVectors>
ATTN8_INLINE void enter_query(Vector (&sum)[4][4], const Skewed& work, const SkewedState& state,
                              const float* mean, int channel, const KeyRecord& record,
                              const std::byte* q, const std::byte* k) {
  leave_value_pair<kVectors, 0, 4, kQueryStep>(sum, work, state, mean, channel,
                                               query_start<0>(record, k), q);
  leave_value_pair<kVectors, 2, 4, kQueryStep>(sum, work, state, mean, channel,
                                               query_start<2>(record, k), q);
}

/// The pieces to weigh beside the next group of P V. After the last piece it repeats that: cheaper
/// than a second copy of the loop, and the same numbers again.
template <int kPieces>
ATTN8_INLINE int take_pieces(Weigher& weigher) {
  const int piece = weigher.next < weigher.end - kPieces ? weigher.next : weigher.end - kPieces;
  weigher.next = piece + kPieces;
  return piece;
}

/// P V of an item for one slab of channels whose rows are started, with kPieces pieces of the next
/// item's weights in each of its groups.
template <int kVectors, int kPieces>
ATTN8_INLINE void value_slab(Vector (&sum)[4][4], int groups, const std::byte* p,
                             const std::byte* v, size_t v_group_bytes, Weigher& weigher,
                             Vector table_low, Vector table_high) {
  value_group<kVectors, 2, kPieces>(sum, p, v, weigher, take_pieces<kPieces>(weigher), table_low,
                                    table_high);
  for (int group = 1; group < groups; ++group) {
    v += v_group_bytes;
    p += kRowGroup * kCodesStride;
    value_group<kVectors, 0, kPieces>(sum, p, v, weigher, take_pieces<kPieces>(weigher), table_low,
                                      table_high);
  }
}

/// P V of an item for kVectors vectors of channels from `channel` on, added to its O.
template <int kVectors>
ATTN8_INLINE void drain_channels(const Skewed& work, const SkewedItem& item,
                                 const SkewedState& state, int channel) {
  const int slab = channel / 64 * 64;
  const int64_t step_bytes = slab_width(work.padded, slab) * 4;
  Vector sum[4][4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sum[r][c] = _mm512_setzero_si512();
  }
  const std::byte* p = state.codes;
  const std::byte* v = item.v + slab * kKeyGroup + (channel - slab) * 4;
  for (int group = 0; group < item.groups; ++group) {
    for (int step = 0; step < 16; ++step) {
      dot_step<kVectors, kCodesStride>(sum, p + 4 * step, v + step * step_bytes);
    }
    p += kRowGroup * kCodesStride;
    v += work.tile.kv.layout.v_group_bytes;
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) add_row<kVectors>(work, state, item.mean, channel, r, sum[r]);
}

/// P V of the last item, which has nothing to run beside.
inline __attribute__((noinline)) void drain(const Skewed& work, const SkewedItem& item,
                                            const SkewedState& state) {
  if (state.rescales) rescale_rows(state, work.padded);
  int channel = 0;
  for (; channel + 64 <= work.padded; channel += 64) drain_channels<4>(work, item, state, channel);
  for (; channel < work.padded; channel += 16) drain_channels<1>(work, item, state, channel);
}

/// Items in use at a time: of the steps before, now and after; a power of two.
inline constexpr unsigned kItems = 4;

/// kTail: channels of the last slab when it is narrower than 64, else 0. kPieces: pieces of weights
/// per group and slab of P V, about four over the slabs of an item.
template <int kTail, int kPieces>
inline void attend_skewed(const AttendTile& tile) {
  constexpr int kTailVectors = kTail / 16;
  Skewed work(tile);
  begin_accurate(tile, work.scratch);
  SkewedWalk walk(tile);
  SkewedItem items[kItems];  // that of step t in t % kItems
  if (!walk.next(items[0])) return end_accurate(tile, work.scratch);
  // Before the first item comes one of zeros, whose O nobody reads.
  SkewedState states[2];
  std::memset(work.codes[1], 0, kRowGroup * kCodesStride);
  SkewedItem& zeros = items[kItems - 1];
  zeros = items[0];
  zeros.groups = 1;
  zeros.mean = work.nothing;
  zeros.any_high = false;
  for (int i = 0; i < 2; ++i) {
    states[i].out = work.nothing;
    states[i].codes = work.codes[i];
  }
  const float* pending_mean = work.nothing;

  const int padded = work.padded;
  const int slabs = padded / 64;
  const size_t k_group_bytes = tile.kv.layout.k_group_bytes;
  const size_t v_group_bytes = tile.kv.layout.v_group_bytes;
  const Vector zero = _mm512_setzero_si512();
  Vector sum[4][4] = {{zero, zero, zero, zero},
                      {zero, zero, zero, zero},
                      {zero, zero, zero, zero},
                      {zero, zero, zero, zero}};
  bool more = true;
  unsigned t = 0;
  for (; more; ++t) {
    const SkewedItem& item = items[t % kItems];
    const SkewedItem& previous = items[(t + kItems - 1) % kItems];
    SkewedState& state = states[t & 1];  // that of two items ago until its O is complete
    SkewedState& previous_state = states[(t + 1) & 1];
    const std::byte* q = tile.q + item.first_row * padded;  // [padded / 4][4][4]
    const std::byte* k = item.k;
    const KeyRecord* record = item.records;
    const float* factors = work.factors + item.first_row;
    int16_t* scores = work.scores;
    const Vector hidden = _mm512_set1_epi16(kHiddenScore16);
    Vector largest[4] = {hidden, hidden, hidden, hidden};
    // Q K of the item; its first rows start where the last slab of P V leaves.
    if (kPieces == 4 && kTail > 0 && slabs == 0) {
      enter_query<0>(sum, work, state, pending_mean, 0, *record, q, k);
    } else {
      enter_query<4>(sum, work, state, pending_mean, 64 * (slabs - 1), *record, q, k);
    }
    finish_query_group(sum, q, padded, k);
    // Here, where many products wait for their turn, what needs none of them costs nothing.
    finish_sums(work, previous, previous_state);
    more = walk.next(items[(t + 1) % kItems]);
    for (int group = item.groups; group > 1; --group) {
      k += k_group_bytes;
      next_query_pair<0>(sum, record, factors, scores, q, k, largest);
      next_query_pair<2>(sum, record, factors, scores, q, k, largest);
      ++record;
      scores += kRowGroup * 64;
      finish_query_group(sum, q, padded, k);
    }

    // P V of the previous item; the narrow slab is last in memory and first in time.
    if (previous_state.rescales) [[unlikely]]
      rescale_rows(previous_state, padded);
    const std::byte* p = previous_state.codes;
    const std::byte* v = previous.v + (kTail > 0 ? 64 * slabs : 0) * kKeyGroup;
    constexpr int kFirstVectors = kTail > 0 ? kTailVectors : 4;
    leave_query_pair<kFirstVectors, 0>(sum, record, factors, scores, p, v, largest);
    leave_query_pair<kFirstVectors, 2>(sum, record, factors, scores, p, v, largest);
    state.out = tile.out + item.first_row * padded;
    advance_rows(work, item, largest, state);
    // Q K needs their registers.
    const Vector table_low = load_now(kGridWeight16);
    const Vector table_high = load_now(kGridWeight16 + 32);
    Weigher weigher = {.scores = work.scores,
                       .codes = state.codes,
                       .records = item.records,
                       .top = work.top,
                       .sums = work.sums,
                       .next = 0,
                       .end = kRowGroup * item.groups};
    if constexpr (kTail > 0) {
      // With no full slab beside it, the weights go here.
      if (slabs > 0) {
        value_slab<kTailVectors, 0>(sum, previous.groups, p, v, v_group_bytes, weigher, table_low,
                                    table_high);
      } else {
        value_slab<kTailVectors, kPieces>(sum, previous.groups, p, v, v_group_bytes, weigher,
                                          table_low, table_high);
      }
    }
    for (int h = 0; h < slabs; ++h) {
      v = previous.v + 64 * h * kKeyGroup;
      if (kTail > 0 || h > 0) {
        if (kTail == 0 || h > 0) {
          next_slab<4>(sum, work, previous_state, previous.mean, 64 * (h - 1), p, v);
        } else {
          next_slab<kTailVectors>(sum, work, previous_state, previous.mean, 64 * slabs, p, v);
        }
      }
      value_slab<4, kPieces>(sum, previous.groups, p, v, v_group_bytes, weigher, table_low,
                             table_high);
    }
    if constexpr (kTail > 0 && kPieces == 4) {
      if (slabs == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          add_row<kTailVectors>(work, previous_state, previous.mean, 0, r, sum[r]);
        }
      }
    }
    pending_mean = previous.mean;
    for (; weigher.next < weigher.end; ++weigher.next) {
      HalfPiece half;
      weigh_half<0, -1>(weigher, weigher.next, half, table_low, table_high);
      weigh_half<1, -1>(weigher, weigher.next, half, table_low, table_high);
    }
  }
  const SkewedItem& last = items[(t + kItems - 1) % kItems];
  finish_sums(work, last, states[(t + 1) & 1]);
  if (slabs > 0) {
    const SkewedState& state = states[t & 1];
    add_row<4>(work, state, pending_mean, 64 * (slabs - 1), 0, sum[0]);
    add_row<4>(work, state, pending_mean, 64 * (slabs - 1), 1, sum[1]);
    add_row<4>(work, state, pending_mean, 64 * (slabs - 1), 2, sum[2]);
    add_row<4>(work, state, pending_mean, 64 * (slabs - 1), 3, sum[3]);
  }
  drain(work, last, states[(t + 1) & 1]);
  end_accurate(tile, work.scratch);
}

/// The pipeline for the tile's head_dim.
inline void attend_skewed(const AttendTile& tile) {
  const auto padded = padded_dim(tile.head_dim);
  switch (padded / 64 * 4 + padded % 64 / 16) {
    case 0 * 4 + 1:
    case 1 * 4 + 1:
      return attend_skewed<16, 4>(tile);
    case 0 * 4 + 2:
    case 1 * 4 + 2:
      return attend_skewed<32, 4>(tile);
    case 0 * 4 + 3:
    case 1 * 4 + 3:
      return attend_skewed<48, 4>(tile);
    case 1 * 4:
      return attend_skewed<0, 4>(tile);
    case 2 * 4:
    case 3 * 4:
      return attend_skewed<0, 2>(tile);
    case 4 * 4:
      return attend_skewed<0, 1>(tile);
    case 2 * 4 + 1:
    case 3 * 4 + 1:
      return attend_skewed<16, 2>(tile);
    case 2 * 4 + 2:
    case 3 * 4 + 2:
      return attend_skewed<32, 2>(tile);
    default:
      return attend_skewed<48, 2>(tile);
  }
}
