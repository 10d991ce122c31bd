// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cpu/attend_tiles.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include "core/element.hpp"
#include "core/message.hpp"
#include "core/plan_state.hpp"
#include "core/quant_math.hpp"
#include "cpu/pack.hpp"
#include "cpu/parallel.hpp"
#include "cpu/views.hpp"

namespace attn8::cpu {
namespace {

/// Buffers of one worker, one after the other, each on a page of its own.
struct TileBuffers {
  size_t q = 0, out = 0, normalizer = 0, weight_sum = 0, row_max = 0, scratch = 0, total = 0;
};

TileBuffers tile_buffers(const KernelTable& table, int kv_block, int64_t packed_dim) noexcept {
  TileBuffers buffers;
  size_t next = 0;
  const auto take = [&next](size_t bytes) {
    const size_t offset = next;
    next += on_pages(bytes);
    return offset;
  };
  const auto dim = static_cast<size_t>(packed_dim);
  const auto padded = static_cast<size_t>(padded_dim(packed_dim));
  buffers.q = take(kQueryTile * std::max(padded * sizeof(uint16_t), dim * sizeof(float)));
  buffers.out = take(kQueryTile * padded * sizeof(float));
  buffers.normalizer = take(kQueryTile * sizeof(float));
  buffers.weight_sum = take(kQueryTile * sizeof(float));
  buffers.row_max = take(kQueryTile * sizeof(float));
  buffers.scratch = take(table.scratch_bytes(kv_block));
  buffers.total = next;
  return buffers;
}

/// Results of one part of the keys.
struct PartialBuffers {
  size_t out = 0, normalizer = 0, weight_sum = 0, row_max = 0, total = 0;
};

PartialBuffers partial_buffers(int64_t rows, int64_t packed_dim) noexcept {
  const auto padded_rows = static_cast<size_t>(round_up(rows, kRowGroup));
  PartialBuffers buffers;
  buffers.normalizer = padded_rows * static_cast<size_t>(padded_dim(packed_dim)) * sizeof(float);
  buffers.weight_sum = buffers.normalizer + padded_rows * sizeof(float);
  buffers.row_max = buffers.weight_sum + padded_rows * sizeof(float);
  buffers.total = (buffers.row_max + padded_rows * sizeof(float) + 63) / 64 * 64;
  return buffers;
}

/// Query rows of one kv head of a sequence are numbered position first, then query head of the
/// group, so that the rows of a tile see nearly the same keys and share what they read.
class TileRunner {
 public:
  explicit TileRunner(const AttendCall& call) noexcept
      : call_(call),
        q_(data_view(call.q)),
        packed_dim_(std::max(call.head_dim, call.head_dim_v)),
        buffers_(tile_buffers(call.table, call.kv_block, packed_dim_)),
        group_(call.nheads_q / call.nheads_k) {}

  Status run() noexcept {
    std::atomic<bool> bad_code = false;
    for_each_task(call_.context, call_.tasks, [&](int64_t task, int64_t worker) {
      const AttendSequence& sequence = sequence_of(task);
      const int64_t parts = sequence.split.parts;
      const int64_t tiles = tiles_of(sequence);
      task -= sequence.first_task;
      // The last tiles of a causal mask see the most keys; they start first. Parts have one tile.
      const int64_t tile = tiles - 1 - task / parts % tiles;
      const Head head = {sequence, task / parts / tiles};
      if (!run_tile(head, tile * kQueryTile, task % parts, worker)) bad_code = true;
    });
    if (std::any_of(call_.sequences.begin(), call_.sequences.end(), is_split)) {
      const auto heads = static_cast<int64_t>(call_.sequences.size()) * call_.nheads_k;
      for_each_task(call_.context, heads, [&](int64_t task, int64_t worker) {
        const AttendSequence& sequence =
            call_.sequences[static_cast<size_t>(task / call_.nheads_k)];
        if (is_split(sequence)) merge_parts({sequence, task % call_.nheads_k}, worker);
      });
    }
    if (bad_code) return invalid("q.codes holds -128, wants codes in [-127, 127]");
    return {};
  }

 private:
  /// A kv head of a sequence.
  struct Head {
    const AttendSequence& sequence;
    int64_t kv_head;
    [[nodiscard]] const PackedHead& packed() const noexcept { return sequence.heads[kv_head]; }
  };

  struct Row {
    int64_t seq, head;  ///< position and query head
    bool poisoned = false;
    float mean_score = 0;  ///< softmax_scale * q.k_mean, what smoothing took from the LSE
  };

  static bool is_split(const AttendSequence& sequence) noexcept { return sequence.split.parts > 1; }

  [[nodiscard]] const AttendSequence& sequence_of(int64_t task) const noexcept {
    const auto after = std::upper_bound(
        call_.sequences.begin(), call_.sequences.end(), task,
        [](int64_t t, const AttendSequence& sequence) { return t < sequence.first_task; });
    return *(after - 1);
  }

  [[nodiscard]] int64_t tiles_of(const AttendSequence& sequence) const noexcept {
    return (sequence.seqlen_q * group_ + kQueryTile - 1) / kQueryTile;
  }

  [[nodiscard]] std::byte* worker_memory(int64_t worker) const noexcept {
    return call_.workers + static_cast<size_t>(worker) * buffers_.total;
  }

  /// Points a tile's results at the memory of a part of the keys.
  void use_partial(const Head& head, int64_t part, AttendTile& tile) const noexcept {
    const AttendSequence& sequence = head.sequence;
    const PartialBuffers buffers = partial_buffers(sequence.seqlen_q * group_, packed_dim_);
    const int64_t index = sequence.first_partial + head.kv_head * sequence.split.parts + part;
    std::byte* memory = call_.partials + static_cast<size_t>(index) * call_.bytes_per_partial;
    tile.out = reinterpret_cast<float*>(memory + buffers.out);
    tile.normalizer = reinterpret_cast<float*>(memory + buffers.normalizer);
    tile.weight_sum = reinterpret_cast<float*>(memory + buffers.weight_sum);
    tile.row_max = reinterpret_cast<float*>(memory + buffers.row_max);
  }

  /// The tile's operands and what each row is and sees; false when given codes hold -128.
  bool begin_tile(const Head& head, int64_t first_row, std::byte* memory, AttendTile& tile,
                  ScoreChanges& changes, Row* rows) const noexcept {
    const AttendSequence& sequence = head.sequence;
    tile.mode = call_.mode;
    tile.bfloat16 = call_.bfloat16;
    tile.head_dim = static_cast<int>(packed_dim_);
    tile.kv_block = call_.kv_block;
    tile.rows =
        static_cast<int>(std::min<int64_t>(kQueryTile, sequence.seqlen_q * group_ - first_row));
    tile.q = memory + buffers_.q;
    tile.out = reinterpret_cast<float*>(memory + buffers_.out);
    tile.normalizer = reinterpret_cast<float*>(memory + buffers_.normalizer);
    tile.weight_sum = reinterpret_cast<float*>(memory + buffers_.weight_sum);
    tile.row_max = reinterpret_cast<float*>(memory + buffers_.row_max);
    tile.scratch = memory + buffers_.scratch;
    if (!sequence.keys.empty()) tile.kv = head.packed().kv;
    if (changes_scores()) {
      begin_changes(changes);
      tile.changes = &changes;
    }
    QueryCodes queries;
    if (int8_scores()) quantize_queries(head, first_row, tile.rows, queries);
    bool good = true;
    for (int r = 0; r < tile.rows; ++r) {
      Row& row = rows[r];
      row = {};
      row.seq = (first_row + r) / group_;
      row.head = head.kv_head * group_ + (first_row + r) % group_;
      tile.visible[r] =
          without_padding(visible_range(call_.mask, sequence.seqlen_q, sequence.seqlen_k, row.seq),
                          sequence.leftpad_k);
      good = load_query(head, r, row, queries, memory + buffers_.q, tile) && good;
      if (changes_scores()) change_row(head, row, r, changes);
      row.poisoned = row.poisoned || sees_poison(head, row, tile.visible[r]);
    }
    if (int8_scores()) pad_queries(memory + buffers_.q, tile);
    return good;
  }

  [[nodiscard]] bool biased() const noexcept {
    return call_.attn_mask != nullptr || call_.alibi_slopes != nullptr;
  }
  [[nodiscard]] bool changes_scores() const noexcept { return call_.softcap != 0 || biased(); }

  void begin_changes(ScoreChanges& changes) const noexcept {
    const double nat =
        std::numbers::log2e * (call_.mode == Mode::kAccurate ? 64.0 : 1.0);  // in a score's unit
    changes.unit = static_cast<float>(nat);
    changes.softcap = static_cast<float>(static_cast<double>(call_.softcap) * nat);
    changes.biased = biased();
    std::fill_n(changes.mask, kQueryTile, nullptr);
    std::fill_n(changes.mean_score, kQueryTile, 0.0f);
    std::fill_n(changes.alibi_slope, kQueryTile, 0.0f);
    std::fill_n(changes.position, kQueryTile, 0);
    if (call_.attn_mask == nullptr) return;
    changes.mask_dtype = call_.attn_mask->dtype;
    changes.mask_stride = call_.attn_mask->shape[3] == 1 ? 0 : call_.attn_mask->strides[3];
  }

  /// What is added to the scores of a row, and to them before softcap.
  void change_row(const Head& head, const Row& row, int r, ScoreChanges& changes) const noexcept {
    const AttendSequence& sequence = head.sequence;
    const int64_t seq = sequence.first_position + row.seq;
    changes.position[r] =
        row.seq + first_position(call_.mask, sequence.seqlen_q, sequence.seqlen_k);
    if (call_.softcap != 0) {
      changes.mean_score[r] = static_cast<float>(row.mean_score * cap_factor());
    }
    if (call_.attn_mask != nullptr) changes.mask[r] = mask_element(sequence.batch, seq, row.head);
    if (const ConstTensorView* slopes = call_.alibi_slopes; slopes != nullptr) {
      const int64_t batch = slopes->shape[0] == 1 ? 0 : sequence.index;
      changes.alibi_slope[r] = float_at(*slopes, batch, 0, row.head) * changes.unit;
    }
  }

  /// Of a score in nats, in the argument of tanh_of_octaves().
  [[nodiscard]] double cap_factor() const noexcept {
    return 2 * std::numbers::log2e / static_cast<double>(call_.softcap);
  }

  /// attn_mask of a row from `key` on.
  [[nodiscard]] const std::byte* mask_element(int64_t batch, int64_t seq, int64_t head,
                                              int64_t key = 0) const noexcept {
    const ConstTensorView& mask = *call_.attn_mask;
    const auto index = [&mask](size_t axis, int64_t i) { return mask.shape[axis] == 1 ? 0 : i; };
    return element(mask, index(0, batch), index(1, seq), index(2, head), index(3, key));
  }
  [[nodiscard]] bool mask_hides(int64_t batch, int64_t seq, int64_t head,
                                int64_t key) const noexcept {
    const std::byte* at = mask_element(batch, seq, head, key);
    if (call_.attn_mask->dtype == DType::kBool) return *at == std::byte{0};
    float value = 0;
    call_.table.load_row(at, call_.attn_mask->dtype, 1, 1, &value);
    return value < kHidingMask;
  }

  bool run_tile(const Head& head, int64_t first_row, int64_t part, int64_t worker) const noexcept {
    AttendTile tile;
    ScoreChanges changes;
    Row rows[kQueryTile];
    const bool good = begin_tile(head, first_row, worker_memory(worker), tile, changes, rows);
    const KeySplit& split = head.sequence.split;
    if (split.parts == 1) {
      call_.table.attend(tile);
      for (int r = 0; r < tile.rows; ++r) finish_row(head, tile, r, tile.visible[r], rows[r]);
      return good;
    }
    const int64_t keys_per_part = split.blocks_per_part * call_.kv_block;
    const int64_t begin =
        head.sequence.keys.lo / call_.kv_block * call_.kv_block + part * keys_per_part;
    for (int r = 0; r < tile.rows; ++r) {
      KeyRange& range = tile.visible[r];
      range = {std::max(range.lo, begin), std::min(range.hi, begin + keys_per_part)};
      if (range.empty()) range = {};
    }
    use_partial(head, part, tile);
    call_.table.attend(tile);
    return good;
  }

  /// Adds up what the parts of the keys gave, in their order, and finishes the rows of a head.
  void merge_parts(const Head& head, int64_t worker) const noexcept {
    AttendTile tile;
    ScoreChanges changes;
    Row rows[kQueryTile];
    begin_tile(head, 0, worker_memory(worker), tile, changes, rows);
    const int64_t padded = padded_dim(packed_dim_);
    const int64_t parts = head.sequence.split.parts;
    for (int r = 0; r < tile.rows; ++r) {
      tile.row_max[r] = -std::numeric_limits<float>::infinity();
      AttendTile part;
      for (int64_t p = 0; p < parts; ++p) {
        use_partial(head, p, part);
        tile.row_max[r] = std::max(tile.row_max[r], part.row_max[r]);
      }
      float* out = tile.out + r * padded;
      std::fill_n(out, padded, 0.0f);
      tile.normalizer[r] = 0;
      tile.weight_sum[r] = 0;
      for (int64_t p = 0; p < parts; ++p) {
        use_partial(head, p, part);
        if (std::isinf(part.row_max[r])) continue;  // sees none of this part
        // kAccurate: a whole power of two, so that nothing is rounded.
        const float scale = std::exp2(part.row_max[r] - tile.row_max[r]);
        if (scale < 0x1p-100f) continue;
        const float* partial = part.out + r * padded;
        for (int64_t d = 0; d < padded; ++d) out[d] += scale * partial[d];
        tile.normalizer[r] += scale * part.normalizer[r];
        tile.weight_sum[r] += scale * part.weight_sum[r];
      }
      finish_row(head, tile, r, tile.visible[r], rows[r]);
    }
  }

  /// Rows of zeros that see nothing up to the next multiple of kRowGroup.
  void pad_queries(std::byte* q, AttendTile& tile) const noexcept {
    const int64_t padded = padded_dim(packed_dim_);
    for (int64_t r = tile.rows; r < round_up(tile.rows, kRowGroup); ++r) {
      for (int64_t d = 0; d < padded; ++d) q[packed_q_offset(r, d, padded)] = std::byte{0};
      tile.visible[r] = {};
      tile.score_factor[r] = 0;
      tile.query_norm[r] = 0;
    }
  }

  /// What quantize_rows() makes of the rows of a tile.
  struct QueryCodes {
    alignas(64) int8_t codes[kQueryTile][kMaxDim];
    uint32_t bits[kQueryTile];
  };

  void quantize_queries(const Head& head, int64_t first_row, int count,
                        QueryCodes& queries) const noexcept {
    std::memset(queries.codes, 0, static_cast<size_t>(count) * kMaxDim);
    if (std::holds_alternative<QuantizedView>(call_.q)) return;  // load_query() copies the codes
    const int64_t batch = head.sequence.batch;
    // Rows side by side: the positions of a head, or the heads of a position.
    for (int64_t r = 0; r < count;) {
      const int64_t seq = head.sequence.first_position + (first_row + r) / group_;
      const int64_t in_group = (first_row + r) % group_;
      const int64_t left = group_ == 1 ? count - r : std::min(group_ - in_group, count - r);
      const size_t axis = group_ == 1 ? 1 : 2;
      call_.table.quantize_rows(
          row_span(q_, axis, batch, seq, head.kv_head * group_ + in_group, left, 0, call_.head_dim),
          nullptr, queries.codes[r], kMaxDim, queries.bits + r);
      r += left;
    }
  }

  /// Row r of the tile's Q operand; false when given codes hold -128.
  bool load_query(const Head& head, int r, Row& row, QueryCodes& queries, std::byte* q,
                  AttendTile& tile) const noexcept {
    const int64_t batch = head.sequence.batch;
    const int64_t seq = head.sequence.first_position + row.seq;
    const int dim = static_cast<int>(call_.head_dim);
    const bool with_mean =
        call_.outputs.lse.has_value() || call_.sinks != nullptr || call_.softcap != 0;
    // Finite, as the scale beside it, so that no factor of a score is 0 * Inf.
    constexpr float kHuge = std::numeric_limits<float>::max();
    const auto log2_scale = static_cast<float>(
        std::clamp<double>(static_cast<double>(call_.softmax_scale) *
                               (call_.softcap != 0 ? cap_factor() : std::numbers::log2e),
                           -kHuge, kHuge));
    float values[kMaxDim];
    bool good = true;
    if (call_.bfloat16) {
      const int64_t padded = padded_dim(packed_dim_);
      auto* out = reinterpret_cast<uint16_t*>(q) + r * padded;
      call_.table.load_row(element(q_, batch, seq, row.head), q_.dtype, q_.strides[3], dim, values);
      for (int d = 0; d < padded; ++d) out[d] = d < dim ? float_to_bfloat16(values[d]) : 0;
      tile.score_factor[r] = log2_scale;
      return true;
    }
    if (!int8_scores()) {
      auto* out = reinterpret_cast<float*>(q) + r * packed_dim_;
      call_.table.load_row(element(q_, batch, seq, row.head), q_.dtype, q_.strides[3], dim, out);
      std::fill_n(out + dim, packed_dim_ - dim, 0.0f);
      tile.score_factor[r] = log2_scale;
      return true;
    }
    const auto padded = static_cast<int>(padded_dim(packed_dim_));
    int8_t* codes = queries.codes[r];
    float scale = 0;
    if (const auto* quantized = std::get_if<QuantizedView>(&call_.q)) {
      scale = float_at(quantized->scale, batch, seq, row.head);
      good = !load_codes(q_, batch, seq, row.head, codes);
      if (with_mean) {
        for (int d = 0; d < dim; ++d) values[d] = static_cast<float>(codes[d]) * scale;
      }
    } else {
      scale = scale_from_bits(queries.bits[r]);
      if (with_mean) {
        call_.table.load_row(element(q_, batch, seq, row.head), q_.dtype, q_.strides[3], dim,
                             values);
      }
    }
    if (!usable(scale)) {
      row.poisoned = true;
      scale = 0;
    }
    const float grid = call_.mode == Mode::kAccurate && call_.softcap == 0 ? 64.0f : 1.0f;
    tile.score_factor[r] = std::clamp(grid * scale * log2_scale, -kHuge, kHuge);
    tile.query_norm[r] = std::sqrt(static_cast<float>(call_.table.squared_length(codes, dim)));
    const uint32_t flip = call_.table.query_codes_offset ? 0x80808080u : 0;  // + 128 in each byte
    std::byte* out = q + packed_q_offset(r, 0, padded);
    for (int d = 0; d < padded; d += 4, out += 16) {
      uint32_t quad = 0;
      std::memcpy(&quad, codes + d, 4);
      quad ^= flip;
      std::memcpy(out, &quad, 4);
    }
    // A NaN of a poisoned row would be taken for a key that attn_mask hides.
    if (with_mean && !row.poisoned) row.mean_score = mean_score(head, values);
    return good;
  }

  [[nodiscard]] float mean_score(const Head& head, const float* q) const noexcept {
    if (head.sequence.keys.empty() || head.packed().k_mean == nullptr) return 0;
    double sum = 0;
    for (int64_t d = 0; d < call_.head_dim; ++d) {
      sum += static_cast<double>(q[d]) * head.packed().k_mean[d];
    }
    return static_cast<float>(sum * static_cast<double>(call_.softmax_scale));
  }

  [[nodiscard]] bool sees_poison(const Head& head, const Row& row, KeyRange range) const noexcept {
    if (range.empty() || !head.packed().poisoned) return false;
    const PackedKv& kv = head.packed().kv;
    for (int64_t b = range.lo / call_.kv_block; b * call_.kv_block < range.hi; ++b) {
      if (kv.header(b).poisoned == 0) continue;
      const int64_t first = b * call_.kv_block;
      const int64_t lo = std::max(range.lo - first, int64_t{0});
      const int64_t hi = std::min<int64_t>(range.hi - first, call_.kv_block);
      if (std::memchr(kv.poison(b) + lo, 1, static_cast<size_t>(hi - lo)) == nullptr) continue;
      if (call_.attn_mask == nullptr) return true;
      const int64_t seq = head.sequence.first_position + row.seq;
      for (int64_t key = lo; key < hi; ++key) {
        if (kv.poison(b)[key] == 0) continue;
        if (!mask_hides(head.sequence.batch, seq, row.head, first + key)) return true;
      }
    }
    return false;
  }

  /// The weight of a score without a value, `sink` nats; `top` is what a weight of 1 counts.
  static void add_sink(float sink, float top, int r, AttendTile& tile) noexcept {
    const double octaves =
        static_cast<double>(sink) * std::numbers::log2e - static_cast<double>(tile.row_max[r]);
    const auto weight = static_cast<float>(std::exp2(octaves) * static_cast<double>(top));
    tile.normalizer[r] += weight;
    tile.weight_sum[r] += weight;
  }

  void finish_row(const Head& head, AttendTile& tile, int r, KeyRange visible,
                  const Row& row) const noexcept {
    const int64_t batch = head.sequence.batch;
    const int64_t seq = head.sequence.first_position + row.seq;
    const auto dim = static_cast<int>(call_.head_dim_v);
    float* out = tile.out + r * padded_dim(packed_dim_);
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const float sink = call_.sinks != nullptr ? float_at(*call_.sinks, 0, 0, row.head) : -kInfinity;
    // A visible key may still be hidden by attn_mask; then nothing was ever the maximum.
    const bool sees_none =
        visible.empty() || (call_.attn_mask != nullptr && tile.row_max[r] == -kInfinity &&
                            !std::isnan(tile.normalizer[r]));
    float lse = sink;
    if (sees_none) {
      std::fill_n(out, dim, 0.0f);
    } else if (row.poisoned) {
      std::fill_n(out, dim, kNan);
      lse = kNan;
    } else {
      const float top = tile.mode == Mode::kAccurate ? 255.0f
                        : tile.mode == Mode::kPaper  ? 127.0f
                                                     : 1.0f;
      // Softcap comes after the mean is given back, so nothing is missing from its scores.
      const float mean_score = call_.softcap != 0 ? 0.0f : row.mean_score;
      if (call_.sinks != nullptr) add_sink(sink - mean_score, top, r, tile);
      call_.table.normalize(out, dim, tile.normalizer[r], head.packed().v_out_scale);
      // Where nothing else counts beside the sink, lse stays that.
      if (call_.outputs.lse.has_value() && !std::isinf(tile.normalizer[r])) {
        lse = std::log(tile.weight_sum[r] / top) + tile.row_max[r] * std::numbers::ln2_v<float> +
              mean_score;
      }
    }
    const TensorView& view = call_.outputs.out;
    call_.table.store_row(out, dim, view.dtype, view.strides[3],
                          element(view, batch, seq, row.head));
    if (call_.outputs.lse.has_value()) {
      *reinterpret_cast<float*>(element(*call_.outputs.lse, batch, seq, row.head)) = lse;
    }
  }

  [[nodiscard]] bool int8_scores() const noexcept { return call_.mode != Mode::kExact; }

  const AttendCall& call_;
  const ConstTensorView& q_;
  const int64_t packed_dim_;
  const TileBuffers buffers_;
  const int64_t group_;
};

}  // namespace

size_t worker_bytes(const KernelTable& table, int kv_block, int64_t packed_dim) noexcept {
  return tile_buffers(table, kv_block, packed_dim).total;
}

size_t partial_bytes(int64_t rows, int64_t packed_dim) noexcept {
  return partial_buffers(rows, packed_dim).total;
}

Status attend_tiles(const AttendCall& call) noexcept { return TileRunner(call).run(); }

}  // namespace attn8::cpu
