// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cpu/run.hpp"

#include <chrono>
#include <initializer_list>
#include <limits>
#include <span>

#include "core/message.hpp"

namespace attn8::cpu {
namespace {

/// The parts in which each (batch, kv head) is computed.
KeySplit split_of(const AttentionPlan::State& plan, KeyRange keys) noexcept {
  if (plan.nheads_k == 0) return {};
  return split_keys(plan.options.mode, plan.seqlen_q * (plan.nheads_q / plan.nheads_k), keys,
                    plan.options.kv_block);
}

Status attend(const Workspace& work, const AttentionInputs& inputs,
              const AttentionOutputs& outputs) noexcept {
  const AttentionPlan::State& plan = work.plan;
  const std::span sequences(work.at<AttendSequence>(plan.layout.sequences),
                            static_cast<size_t>(plan.batch));
  for (int64_t batch = 0; batch < plan.batch; ++batch) {
    AttendSequence& sequence = sequences[static_cast<size_t>(batch)];
    sequence = {};
    sequence.batch = batch;
    sequence.seqlen_q = plan.seqlen_q;
    const SequenceKeys keys = keys_of(plan, inputs, batch);
    sequence.seqlen_k = keys.seqlen_k;
    sequence.leftpad_k = keys.leftpad_k;
    sequence.keys = keys.visible;
    sequence.split = split_of(plan, keys.visible);
    sequence.heads = &work.head(batch * plan.nheads_k);
  }
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

SequenceKeys keys_of(const AttentionPlan::State& plan, const AttentionInputs& inputs,
                     int64_t batch) noexcept {
  if (!plan.changes_lengths) return {plan.seqlen_k, 0, plan.keys};
  const auto length = [batch](const ConstTensorView& view) {
    return int64_t{*reinterpret_cast<const int32_t*>(element(view, batch, 0, 0))};
  };
  SequenceKeys keys;
  keys.seqlen_k = inputs.seqlens_k.has_value() ? length(*inputs.seqlens_k) : plan.seqlen_k;
  keys.leftpad_k = inputs.leftpad_k.has_value() ? length(*inputs.leftpad_k) : 0;
  keys.visible = without_padding(visible_union(plan.options.mask, plan.seqlen_q, keys.seqlen_k),
                                 keys.leftpad_k);
  return keys;
}

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
  const bool empty = plan.keys.empty() || plan.heads() == 0;
  const int64_t heads = empty ? 0 : plan.heads();
  const int64_t padded = padded_dim(plan.packed_dim());
  const int float_bytes = plan.exact_bfloat16() ? 2 : 4;
  layout.block =
      block_layout(plan.options.kv_block, plan.packed_dim(), plan.int8_scores() ? 1 : float_bytes,
                   plan.int8_values()   ? 1
                   : plan.int8_scores() ? 2
                                        : float_bytes,
                   plan.v_granularity == Granularity::kBlockChannel);
  layout.blocks =
      take(product({heads, plan.kv_blocks(), static_cast<int64_t>(layout.block.bytes)}));
  layout.block_headers =
      take(product({heads, plan.kv_blocks(), static_cast<int64_t>(layout.block.header_bytes)}));
  layout.packed_blocks = take(product({heads, plan.kv_blocks(), int64_t{sizeof(PackedBlock)}}));
  layout.heads = take(product({heads, int64_t{sizeof(PackedHead)}}));
  layout.sequences = take(product({plan.batch, int64_t{sizeof(AttendSequence)}}));
  if (plan.smooths_k() || plan.k.quantized) {
    layout.k_mean = take(product({heads, plan.head_dim, int64_t{sizeof(float)}}));
  }
  if (plan.smooths_k()) {
    const int64_t chunks = mean_chunks(plan.keys.hi - plan.keys.lo);
    layout.k_mean_sums = take(product({heads, chunks, plan.head_dim, int64_t{sizeof(double)}}));
  }
  if (plan.int8_values()) {
    layout.v_out_scale = take(product({heads, padded, int64_t{sizeof(float)}}));
    if (plan.v_granularity == Granularity::kTensor || plan.v_granularity == Granularity::kChannel) {
      layout.v_max_bits =
          take(product({heads, plan.kv_blocks(), plan.head_dim_v, int64_t{sizeof(uint32_t)}}));
    }
  }
  if (const KeySplit split = split_of(plan, plan.keys); split.parts > 1) {
    const int64_t rows = plan.seqlen_q * (plan.nheads_q / plan.nheads_k);
    layout.bytes_per_partial = partial_bytes(rows, plan.packed_dim());
    layout.partials =
        take(product({heads, split.parts, static_cast<int64_t>(layout.bytes_per_partial)}));
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
