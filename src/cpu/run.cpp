// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cpu/run.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numbers>

#include "core/element.hpp"
#include "core/message.hpp"
#include "core/quant_math.hpp"
#include "cpu/parallel.hpp"

namespace attn8::cpu {
namespace {

constexpr int kMaxDim = 256;
/// Of what lies in the workspace: a page, so that the distances between what a kernel stores and
/// what it loads next, modulo the 12 bits by which CPUs match them, do not depend on the caller.
constexpr size_t kAlignment = 4096;

constexpr size_t aligned(size_t bytes) noexcept {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// Few queries against at least this many keys are split over the keys: enough parts for the
/// threads of a machine, each long enough that starting it costs little. A function of the shape
/// alone, so that the threads do not change the result.
constexpr int64_t kKeysPerSplit = 8192;

/// Buffers of one worker, one after the other.
struct TileBuffers {
  size_t q = 0, out = 0, normalizer = 0, weight_sum = 0, row_max = 0, scratch = 0, total = 0;
};

/// Results of one part of the keys.
struct PartialBuffers {
  size_t out = 0, normalizer = 0, weight_sum = 0, row_max = 0, total = 0;
};

PartialBuffers partial_buffers(const AttentionPlan::State& plan) noexcept {
  const auto rows = static_cast<size_t>(
      round_up(plan.seqlen_q * (plan.nheads_q / std::max<int64_t>(1, plan.nheads_k)), kRowGroup));
  PartialBuffers buffers;
  buffers.normalizer = rows * static_cast<size_t>(padded_dim(plan.head_dim)) * sizeof(float);
  buffers.weight_sum = buffers.normalizer + rows * sizeof(float);
  buffers.row_max = buffers.weight_sum + rows * sizeof(float);
  buffers.total = (buffers.row_max + rows * sizeof(float) + 63) / 64 * 64;
  return buffers;
}

TileBuffers tile_buffers(const AttentionPlan::State& plan) noexcept {
  TileBuffers buffers;
  size_t next = 0;
  const auto take = [&next](size_t bytes) {
    const size_t offset = next;
    next += aligned(bytes);
    return offset;
  };
  const auto dim = static_cast<size_t>(plan.head_dim);
  const auto padded = static_cast<size_t>(padded_dim(plan.head_dim));
  buffers.q = take(kQueryTile * std::max(padded * sizeof(uint16_t), dim * sizeof(float)));
  buffers.out = take(kQueryTile * padded * sizeof(float));
  buffers.normalizer = take(kQueryTile * sizeof(float));
  buffers.weight_sum = take(kQueryTile * sizeof(float));
  buffers.row_max = take(kQueryTile * sizeof(float));
  buffers.scratch = take(plan.table->scratch_bytes(plan.options.kv_block));
  buffers.total = next;
  return buffers;
}

/// Query rows of one (batch, kv head), numbered sequence position first, then query head of the
/// group, so that the rows of a tile see nearly the same keys and share what they read.
class TileRunner {
 public:
  TileRunner(const Workspace& workspace, const AttentionInputs& inputs,
             const AttentionOutputs& outputs) noexcept
      : work_(workspace),
        plan_(workspace.plan),
        inputs_(inputs),
        outputs_(outputs),
        q_(data_view(inputs.q)),
        buffers_(tile_buffers(workspace.plan)),
        group_(plan_.nheads_q / plan_.nheads_k),
        rows_(plan_.seqlen_q * group_) {}

  Status run() noexcept {
    const int64_t tiles = (rows_ + kQueryTile - 1) / kQueryTile;
    const int64_t splits = plan_.key_splits;
    std::atomic<bool> bad_code = false;
    for_each_task(plan_.context, plan_.heads() * tiles * splits, [&](int64_t task, int64_t worker) {
      // The last tiles of a causal mask see the most keys; they start first. Splits have one tile.
      const int64_t tile = tiles - 1 - task / splits % tiles;
      if (!run_tile(task / splits / tiles, tile * kQueryTile, task % splits, worker)) {
        bad_code = true;
      }
    });
    if (splits > 1) {
      for_each_task(plan_.context, plan_.heads(),
                    [&](int64_t head, int64_t worker) { merge_splits(head, worker); });
    }
    if (bad_code) return invalid("q.codes holds -128, wants codes in [-127, 127]");
    return {};
  }

 private:
  struct Row {
    int64_t seq, head;  ///< position and query head
    bool poisoned = false;
    float mean_score = 0;  ///< softmax_scale * q.k_mean, what smoothing took from the LSE
  };

  [[nodiscard]] std::byte* worker_memory(int64_t worker) const noexcept {
    return work_.base + plan_.layout.workers +
           static_cast<size_t>(worker) * plan_.layout.bytes_per_worker;
  }

  /// Points a tile's results at the partial of a split.
  void use_partial(int64_t head, int64_t split, AttendTile& tile) const noexcept {
    const PartialBuffers buffers = partial_buffers(plan_);
    std::byte* memory =
        work_.base + plan_.layout.partials +
        static_cast<size_t>(head * plan_.key_splits + split) * plan_.layout.bytes_per_partial;
    tile.out = reinterpret_cast<float*>(memory + buffers.out);
    tile.normalizer = reinterpret_cast<float*>(memory + buffers.normalizer);
    tile.weight_sum = reinterpret_cast<float*>(memory + buffers.weight_sum);
    tile.row_max = reinterpret_cast<float*>(memory + buffers.row_max);
  }

  /// The tile's operands and what each row is and sees; false when given codes hold -128.
  bool begin_tile(int64_t head, int64_t first_row, std::byte* memory, AttendTile& tile,
                  Row* rows) const noexcept {
    tile.mode = plan_.options.mode;
    tile.bfloat16 = plan_.exact_bfloat16();
    tile.head_dim = static_cast<int>(plan_.head_dim);
    tile.kv_block = plan_.options.kv_block;
    tile.rows = static_cast<int>(std::min<int64_t>(kQueryTile, rows_ - first_row));
    tile.q = memory + buffers_.q;
    tile.out = reinterpret_cast<float*>(memory + buffers_.out);
    tile.normalizer = reinterpret_cast<float*>(memory + buffers_.normalizer);
    tile.weight_sum = reinterpret_cast<float*>(memory + buffers_.weight_sum);
    tile.row_max = reinterpret_cast<float*>(memory + buffers_.row_max);
    tile.scratch = memory + buffers_.scratch;
    const HeadState& state = work_.head(head);
    tile.kv.blocks = work_.packed_blocks(head);
    tile.kv.layout = plan_.layout.block;
    tile.kv.keys = plan_.keys;
    tile.kv.v_ref = state.v_ref;
    tile.kv.key_norm = state.key_norm;
    tile.kv.channel_scale = plan_.v_granularity == Granularity::kBlockChannel;
    bool good = true;
    for (int r = 0; r < tile.rows; ++r) {
      Row& row = rows[r];
      row = {};
      row.seq = (first_row + r) / group_;
      row.head = head % plan_.nheads_k * group_ + (first_row + r) % group_;
      tile.visible[r] = visible_range(plan_.options.mask, plan_.seqlen_q, plan_.seqlen_k, row.seq);
      good = load_query(head, r, row, memory + buffers_.q, tile) && good;
      row.poisoned = row.poisoned || sees_poison(head, tile.visible[r]);
    }
    if (plan_.int8_scores()) pad_queries(memory + buffers_.q, tile);
    return good;
  }

  bool run_tile(int64_t head, int64_t first_row, int64_t split, int64_t worker) const noexcept {
    AttendTile tile;
    Row rows[kQueryTile];
    const bool good = begin_tile(head, first_row, worker_memory(worker), tile, rows);
    if (plan_.key_splits == 1) {
      plan_.table->attend(tile);
      for (int r = 0; r < tile.rows; ++r) finish_row(head, tile, r, tile.visible[r], rows[r]);
      return good;
    }
    const int64_t keys_per_split = plan_.blocks_per_split * plan_.options.kv_block;
    const int64_t begin =
        plan_.keys.lo / plan_.options.kv_block * plan_.options.kv_block + split * keys_per_split;
    for (int r = 0; r < tile.rows; ++r) {
      KeyRange& range = tile.visible[r];
      range = {std::max(range.lo, begin), std::min(range.hi, begin + keys_per_split)};
      if (range.empty()) range = {};
    }
    use_partial(head, split, tile);
    plan_.table->attend(tile);
    return good;
  }

  /// Adds up what the parts of the keys gave, in their order, and finishes the rows of a head.
  void merge_splits(int64_t head, int64_t worker) const noexcept {
    AttendTile tile;
    Row rows[kQueryTile];
    begin_tile(head, 0, worker_memory(worker), tile, rows);
    const int64_t padded = padded_dim(plan_.head_dim);
    for (int r = 0; r < tile.rows; ++r) {
      tile.row_max[r] = -std::numeric_limits<float>::infinity();
      AttendTile part;
      for (int64_t split = 0; split < plan_.key_splits; ++split) {
        use_partial(head, split, part);
        tile.row_max[r] = std::max(tile.row_max[r], part.row_max[r]);
      }
      float* out = tile.out + r * padded;
      std::fill_n(out, padded, 0.0f);
      tile.normalizer[r] = 0;
      tile.weight_sum[r] = 0;
      for (int64_t split = 0; split < plan_.key_splits; ++split) {
        use_partial(head, split, part);
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
    const int64_t padded = padded_dim(plan_.head_dim);
    for (int64_t r = tile.rows; r < round_up(tile.rows, kRowGroup); ++r) {
      for (int64_t d = 0; d < padded; ++d) q[packed_q_offset(r, d, padded)] = std::byte{0};
      tile.visible[r] = {};
      tile.score_factor[r] = 0;
      tile.query_norm[r] = 0;
    }
  }

  /// Row r of the tile's Q operand; false when given codes hold -128.
  bool load_query(int64_t head, int r, Row& row, std::byte* q, AttendTile& tile) const noexcept {
    const int64_t batch = head / plan_.nheads_k;
    const int dim = static_cast<int>(plan_.head_dim);
    const auto log2_scale =
        static_cast<float>(static_cast<double>(plan_.softmax_scale) * std::numbers::log2e);
    float values[kMaxDim];
    bool good = true;
    if (plan_.exact_bfloat16()) {
      const int64_t padded = padded_dim(dim);
      auto* out = reinterpret_cast<uint16_t*>(q) + r * padded;
      plan_.table->load_row(element(q_, batch, row.seq, row.head), q_.dtype, q_.strides[3], dim,
                            values);
      for (int d = 0; d < padded; ++d) out[d] = d < dim ? float_to_bfloat16(values[d]) : 0;
      tile.score_factor[r] = log2_scale;
      return true;
    }
    if (!plan_.int8_scores()) {
      auto* out = reinterpret_cast<float*>(q) + r * dim;
      plan_.table->load_row(element(q_, batch, row.seq, row.head), q_.dtype, q_.strides[3], dim,
                            out);
      tile.score_factor[r] = log2_scale;
      return true;
    }
    const auto padded = static_cast<int>(padded_dim(dim));
    int8_t codes[kMaxDim] = {};
    float scale = 0;
    if (const auto* quantized = std::get_if<QuantizedView>(&inputs_.q)) {
      scale = float_at(quantized->scale, batch, row.seq, row.head);
      good = !load_codes(q_, batch, row.seq, row.head, codes);
      if (plan_.with_lse) {
        for (int d = 0; d < dim; ++d) values[d] = static_cast<float>(codes[d]) * scale;
      }
    } else {
      plan_.table->load_row(element(q_, batch, row.seq, row.head), q_.dtype, q_.strides[3], dim,
                            values);
      const uint32_t bits = plan_.table->max_abs_bits(values, dim);
      scale = scale_from_bits(bits);
      if (!codes_are_zero(bits)) plan_.table->encode(values, dim, &scale, 0, codes);
    }
    if (!(scale > 0 && scale <= std::numeric_limits<float>::max())) {
      row.poisoned = true;
      scale = 0;
    }
    // Finite, so that no product of a score is 0 * Inf.
    constexpr float kHuge = std::numeric_limits<float>::max();
    const float grid = plan_.options.mode == Mode::kAccurate ? 64.0f : 1.0f;
    tile.score_factor[r] = std::clamp(grid * scale * log2_scale, -kHuge, kHuge);
    tile.query_norm[r] = std::sqrt(static_cast<float>(plan_.table->squared_length(codes, dim)));
    const uint32_t flip = plan_.table->query_codes_offset ? 0x80808080u : 0;  // + 128 in each byte
    for (int d = 0; d < padded; d += 4) {
      uint32_t quad = 0;
      std::memcpy(&quad, codes + d, 4);
      quad ^= flip;
      std::memcpy(q + packed_q_offset(r, d, padded), &quad, 4);
    }
    if (plan_.with_lse) row.mean_score = mean_score(head, values);
    return good;
  }

  [[nodiscard]] float mean_score(int64_t head, const float* q) const noexcept {
    double sum = 0;
    const auto* quantized = std::get_if<QuantizedView>(&inputs_.k);
    if (quantized != nullptr && quantized->mean.has_value()) {
      for (int64_t d = 0; d < plan_.head_dim; ++d) {
        sum += static_cast<double>(q[d]) *
               float_at(*quantized->mean, head / plan_.nheads_k, 0, head % plan_.nheads_k, d);
      }
    } else if (plan_.smooths_k() && !plan_.keys.empty()) {
      for (int64_t d = 0; d < plan_.head_dim; ++d) {
        sum += static_cast<double>(q[d]) * work_.k_mean(head)[d];
      }
    }
    return static_cast<float>(sum * static_cast<double>(plan_.softmax_scale));
  }

  [[nodiscard]] bool sees_poison(int64_t head, KeyRange range) const noexcept {
    if (range.empty() || !work_.head(head).poisoned) return false;
    return std::memchr(work_.poison(head) + range.lo, 1,
                       static_cast<size_t>(range.hi - range.lo)) != nullptr;
  }

  void finish_row(int64_t head, const AttendTile& tile, int r, KeyRange visible,
                  const Row& row) const noexcept {
    const int64_t batch = head / plan_.nheads_k;
    const int dim = tile.head_dim;
    float* out = tile.out + r * padded_dim(dim);
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    float lse = -std::numeric_limits<float>::infinity();
    if (visible.empty()) {
      std::fill_n(out, dim, 0.0f);
    } else if (row.poisoned) {
      std::fill_n(out, dim, kNan);
      lse = kNan;
    } else {
      const float* scale = plan_.int8_values() ? work_.v_out_scale(head) : nullptr;
      plan_.table->normalize(out, dim, tile.normalizer[r], scale);
      const float top = tile.mode == Mode::kAccurate ? 255.0f
                        : tile.mode == Mode::kPaper  ? 127.0f
                                                     : 1.0f;
      lse = std::log(tile.weight_sum[r] / top) + tile.row_max[r] * std::numbers::ln2_v<float> +
            row.mean_score;
    }
    const ConstTensorView view = outputs_.out;
    plan_.table->store_row(out, dim, view.dtype, view.strides[3],
                           element(outputs_.out, batch, row.seq, row.head));
    if (outputs_.lse.has_value()) {
      *reinterpret_cast<float*>(element(*outputs_.lse, batch, row.seq, row.head)) = lse;
    }
  }

  const Workspace& work_;
  const AttentionPlan::State& plan_;
  const AttentionInputs& inputs_;
  const AttentionOutputs& outputs_;
  const ConstTensorView& q_;
  const TileBuffers buffers_;
  const int64_t group_;
  const int64_t rows_;
};

/// Decides whether the keys are split. `paper` and `half` round P relative to a running maximum
/// that parts would not share.
void split_keys(AttentionPlan::State& plan) noexcept {
  const int64_t keys = plan.keys.hi - plan.keys.lo;
  const bool can = plan.options.mode == Mode::kAccurate || plan.options.mode == Mode::kExact;
  if (!can || plan.nheads_k == 0 || keys < 2 * kKeysPerSplit ||
      plan.seqlen_q * (plan.nheads_q / plan.nheads_k) > kQueryTile) {
    return;
  }
  const int64_t kv_block = plan.options.kv_block;
  const int64_t blocks = (plan.keys.hi + kv_block - 1) / kv_block - plan.keys.lo / kv_block;
  plan.blocks_per_split = kKeysPerSplit / kv_block;
  plan.key_splits = (blocks + plan.blocks_per_split - 1) / plan.blocks_per_split;
}

}  // namespace

Status lay_out(AttentionPlan::State& plan) noexcept {
  WorkspaceLayout& layout = plan.layout;
  bool overflow = false;
  size_t next = 0;
  const auto product = [&overflow](std::initializer_list<int64_t> factors) {
    size_t bytes = 1;
    for (const int64_t factor : factors) {
      overflow = __builtin_mul_overflow(bytes, static_cast<size_t>(factor), &bytes) || overflow;
    }
    return bytes;
  };
  const auto take = [&](size_t bytes) {
    const size_t offset = next;
    overflow = bytes > std::numeric_limits<size_t>::max() - kAlignment || overflow;
    overflow = __builtin_add_overflow(next, aligned(bytes), &next) || overflow;
    return offset;
  };
  const bool empty = plan.keys.empty() || plan.heads() == 0;
  const int64_t heads = empty ? 0 : plan.heads();
  const int64_t padded = padded_dim(plan.head_dim);
  const int float_bytes = plan.exact_bfloat16() ? 2 : 4;
  layout.block =
      block_layout(plan.options.kv_block, plan.head_dim, plan.int8_scores() ? 1 : float_bytes,
                   plan.int8_values()   ? 1
                   : plan.int8_scores() ? 2
                                        : float_bytes,
                   plan.v_granularity == Granularity::kBlockChannel);
  layout.blocks =
      take(product({heads, plan.kv_blocks(), static_cast<int64_t>(layout.block.bytes)}));
  layout.block_headers =
      take(product({heads, plan.kv_blocks(), static_cast<int64_t>(layout.block.header_bytes)}));
  layout.packed_blocks = take(product({heads, plan.kv_blocks(), int64_t{sizeof(PackedBlock)}}));
  layout.heads = take(product({heads, int64_t{sizeof(HeadState)}}));
  layout.poison = take(product({heads, plan.seqlen_k}));
  if (plan.smooths_k()) {
    const int64_t chunks = (plan.keys.hi - plan.keys.lo + kMeanChunk - 1) / kMeanChunk;
    layout.k_mean = take(product({heads, plan.head_dim, int64_t{sizeof(float)}}));
    layout.k_mean_sums = take(product({heads, chunks, plan.head_dim, int64_t{sizeof(double)}}));
  }
  if (plan.int8_values()) {
    layout.v_out_scale = take(product({heads, padded, int64_t{sizeof(float)}}));
    if (plan.v_granularity == Granularity::kTensor || plan.v_granularity == Granularity::kChannel) {
      layout.v_max_bits =
          take(product({heads, plan.kv_blocks(), plan.head_dim, int64_t{sizeof(uint32_t)}}));
    }
  }
  split_keys(plan);
  if (plan.key_splits > 1) {
    layout.bytes_per_partial = partial_buffers(plan).total;
    layout.partials =
        take(product({heads, plan.key_splits, static_cast<int64_t>(layout.bytes_per_partial)}));
  }
  layout.bytes_per_worker = tile_buffers(plan).total;
  layout.workers =
      take(product({plan.context.threads, static_cast<int64_t>(layout.bytes_per_worker)}));
  layout.total = next + kAlignment;  // run() may have to round its start up
  if (overflow || next > size_t{1} << 62) {
    return invalid("k.shape asks for a workspace of over 2^62 bytes");
  }
  return {};
}

Status run(const AttentionPlan::State& plan, const AttentionInputs& inputs,
           const AttentionOutputs& outputs, std::byte* workspace, RunTimes* times) noexcept {
  using Clock = std::chrono::steady_clock;
  const auto milliseconds = [](Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double, std::milli>(to - from).count();
  };
  workspace += (kAlignment - reinterpret_cast<uintptr_t>(workspace) % kAlignment) % kAlignment;
  const Workspace work{plan, workspace};
  const Clock::time_point start = Clock::now();
  if (Status status = prepare(work, inputs); !status.ok()) return status;
  const Clock::time_point prepared = Clock::now();
  Status status = TileRunner(work, inputs, outputs).run();
  if (times != nullptr) {
    times->quantize_ms = milliseconds(start, prepared);
    times->attention_ms = milliseconds(prepared, Clock::now());
  }
  return status;
}

}  // namespace attn8::cpu
