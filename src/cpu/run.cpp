// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cpu/run.hpp"

#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <limits>
#include <span>

#include "core/message.hpp"
#include "core/quant_math.hpp"

namespace attn8::cpu {
namespace {

int64_t int_at(const ConstTensorView& view, int64_t i) noexcept {
  return *reinterpret_cast<const int32_t*>(element(view, i, 0, 0));
}

/// The queries of one sequence of a run.
struct SequenceQueries {
  int64_t batch = 0, first = 0, count = 0;
};

SequenceQueries queries_of(const AttentionPlan::State& plan, const AttentionInputs& inputs,
                           int64_t sequence) noexcept {
  if (!plan.ragged) return {sequence, 0, plan.seqlen_q};
  const int64_t first = int_at(*inputs.cu_seqlens_q, sequence);
  return {0, first, int_at(*inputs.cu_seqlens_q, sequence + 1) - first};
}

/// Where the keys of a sequence lie and which of them count.
SequenceKeys keys_of(const AttentionPlan::State& plan, const AttentionInputs& inputs,
                     int64_t sequence) noexcept {
  SequenceKeys keys;
  keys.batch = sequence;
  keys.seqlen_k = plan.seqlen_k;
  keys.visible = plan.keys;
  if (plan.ragged) {
    keys.batch = 0;
    keys.first_key = int_at(*inputs.cu_seqlens_k, sequence);
    keys.seqlen_k = int_at(*inputs.cu_seqlens_k, sequence + 1) - keys.first_key;
  } else if (plan.changes_lengths) {
    if (inputs.seqlens_k.has_value()) keys.seqlen_k = int_at(*inputs.seqlens_k, sequence);
    if (inputs.leftpad_k.has_value()) keys.leftpad_k = int_at(*inputs.leftpad_k, sequence);
  } else {
    return keys;
  }
  const int64_t queries = queries_of(plan, inputs, sequence).count;
  keys.visible =
      without_padding(visible_union(plan.options.mask, queries, keys.seqlen_k), keys.leftpad_k);
  return keys;
}

void find_keys(const Workspace& work, const AttentionInputs& inputs) noexcept {
  const int64_t kv_block = work.plan.options.kv_block;
  SequenceKeys before;
  int64_t blocks_before = 0;  // all of the sequence before
  for (int64_t i = 0; i < work.plan.sequences; ++i) {
    SequenceKeys& keys = work.sequence_keys()[static_cast<size_t>(i)];
    keys = keys_of(work.plan, inputs, i);
    if (!keys.visible.empty()) {
      keys.first_block = keys.visible.lo / kv_block;
      keys.blocks = block_count(keys.visible.hi, kv_block) - keys.first_block;
      keys.chunks = mean_chunks(keys.visible.hi - keys.visible.lo);
    }
    keys.block_slot = before.block_slot + before.blocks;
    keys.chunk_slot = before.chunk_slot + before.chunks;
    keys.table_slot = before.table_slot + blocks_before;
    blocks_before = block_count(keys.seqlen_k, kv_block);
    before = keys;
  }
}

/// The most that find_keys() may count.
struct KeyLimits {
  int64_t blocks = 0, table = 0, chunks = 0;
  int64_t partials = 0, partial_rows = 0;  ///< of sequences whose keys are split
};

KeyLimits key_limits(const AttentionPlan::State& plan) noexcept {
  KeyLimits most;
  if (plan.keys.empty() || plan.heads() == 0) return most;
  const int64_t kv_block = plan.options.kv_block;
  const int64_t group = plan.nheads_q / plan.nheads_k;
  if (plan.ragged) {
    // A sequence begins a block of its own, which it need not fill.
    const int64_t begun = std::min(plan.sequences, plan.seqlen_k);
    most.blocks = most.table = plan.seqlen_k / kv_block + begun;
    most.chunks = plan.seqlen_k / kMeanChunk + begun;
    most.partials = most_partials(plan.options.mode, group, plan.seqlen_k, kv_block);
    most.partial_rows = std::min<int64_t>(kQueryTile, plan.seqlen_q * group);
    return most;
  }
  const int64_t rows = plan.seqlen_q * group;
  const KeySplit split = split_keys(plan.options.mode, rows, plan.keys, kv_block);
  most.blocks = block_count(plan.keys.hi, kv_block) - plan.keys.lo / kv_block;
  most.table = block_count(plan.seqlen_k, kv_block);
  most.chunks = mean_chunks(plan.keys.hi - plan.keys.lo);
  most.partials = split.parts > 1 ? split.parts : 0;
  most.partial_rows = rows;
  return most;
}

Status attend(const Workspace& work, const AttentionInputs& inputs,
              const AttentionOutputs& outputs) noexcept {
  const AttentionPlan::State& plan = work.plan;
  const int64_t group = plan.nheads_q / plan.nheads_k;
  const std::span sequences(work.at<AttendSequence>(plan.layout.sequences),
                            static_cast<size_t>(plan.sequences));
  for (int64_t i = 0; i < plan.sequences; ++i) {
    AttendSequence& sequence = sequences[static_cast<size_t>(i)];
    const SequenceKeys& keys = work.sequence_keys()[static_cast<size_t>(i)];
    const SequenceQueries queries = queries_of(plan, inputs, i);
    sequence = {};
    sequence.index = i;
    sequence.batch = queries.batch;
    sequence.first_position = queries.first;
    sequence.seqlen_q = queries.count;
    sequence.seqlen_k = keys.seqlen_k;
    sequence.leftpad_k = keys.leftpad_k;
    sequence.keys = keys.visible;
    sequence.split =
        split_keys(plan.options.mode, queries.count * group, keys.visible, plan.options.kv_block);
    sequence.heads = &work.head(i * plan.nheads_k);
  }
  if (plan.ragged) longest_first(sequences, group);
  const TaskCount count = begin_tasks(sequences, plan.nheads_q, plan.nheads_k);
  return attend_tiles({.table = *plan.table,
                       .context = plan.context,
                       .mode = plan.options.mode,
                       .bfloat16 = plan.exact_bfloat16(),
                       .mask = plan.options.mask,
                       .softmax_scale = plan.softmax_scale,
                       .softcap = plan.options.softcap,
                       .kv_block = plan.options.kv_block,
                       .nheads_q = plan.nheads_q,
                       .nheads_k = plan.nheads_k,
                       .head_dim = plan.head_dim,
                       .head_dim_v = plan.head_dim_v,
                       .q = inputs.q,
                       .attn_mask = view_or_null(inputs.attn_mask),
                       .alibi_slopes = view_or_null(inputs.alibi_slopes),
                       .sinks = view_or_null(inputs.sinks),
                       .outputs = outputs,
                       .sequences = sequences,
                       .workers = work.base + plan.layout.workers,
                       .partials = work.base + plan.layout.partials,
                       .bytes_per_partial = plan.layout.bytes_per_partial,
                       .tasks = count.tasks});
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
    overflow = __builtin_add_overflow(next, on_pages(bytes), &next) || overflow;
    return offset;
  };
  const KeyLimits most = key_limits(plan);
  const int64_t heads = plan.keys.empty() ? 0 : plan.heads();
  // Of ragged sequences `most` counts all, else each.
  const int64_t by_sequence = (plan.ragged ? 1 : plan.batch) * plan.nheads_k;
  const int64_t padded = padded_dim(plan.packed_dim());
  const int float_bytes = plan.exact_bfloat16() ? 2 : 4;
  layout.block =
      block_layout(plan.options.kv_block, plan.packed_dim(), plan.int8_scores() ? 1 : float_bytes,
                   plan.int8_values()   ? 1
                   : plan.int8_scores() ? 2
                                        : float_bytes,
                   plan.v_granularity == Granularity::kBlockChannel);
  layout.blocks =
      take(product({by_sequence, most.blocks, static_cast<int64_t>(layout.block.bytes)}));
  layout.block_headers =
      take(product({by_sequence, most.blocks, static_cast<int64_t>(layout.block.header_bytes)}));
  layout.packed_blocks = take(product({by_sequence, most.table, int64_t{sizeof(PackedBlock)}}));
  layout.heads = take(product({heads, int64_t{sizeof(PackedHead)}}));
  layout.sequences = take(product({plan.sequences, int64_t{sizeof(AttendSequence)}}));
  layout.sequence_keys = take(product({plan.sequences, int64_t{sizeof(SequenceKeys)}}));
  if (plan.smooths_k() || plan.k.quantized) {
    layout.k_mean = take(product({heads, plan.head_dim, int64_t{sizeof(float)}}));
  }
  if (plan.smooths_k()) {
    layout.k_mean_sums =
        take(product({by_sequence, most.chunks, plan.head_dim, int64_t{sizeof(double)}}));
  }
  if (plan.int8_values()) {
    layout.v_out_scale = take(product({heads, padded, int64_t{sizeof(float)}}));
    if (plan.v_granularity == Granularity::kTensor || plan.v_granularity == Granularity::kChannel) {
      layout.v_max_bits =
          take(product({by_sequence, most.blocks, plan.head_dim_v, int64_t{sizeof(uint32_t)}}));
    }
  }
  if (most.partials > 0) {
    layout.bytes_per_partial = partial_bytes(most.partial_rows, plan.packed_dim());
    layout.partials =
        take(product({by_sequence, most.partials, static_cast<int64_t>(layout.bytes_per_partial)}));
  }
  layout.workers = take(product(
      {plan.context.threads,
       static_cast<int64_t>(worker_bytes(*plan.table, plan.options.kv_block, plan.packed_dim()))}));
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
  find_keys(work, inputs);
  if (Status status = prepare(work, inputs); !status.ok()) return status;
  const Clock::time_point prepared = Clock::now();
  Status status = attend(work, inputs, outputs);
  if (times != nullptr) {
    times->quantize_ms = milliseconds(start, prepared);
    times->attention_ms = milliseconds(prepared, Clock::now());
  }
  return status;
}

}  // namespace attn8::cpu
