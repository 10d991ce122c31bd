// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <functional>

#include "core/head_parts.hpp"
#include "core/message.hpp"
#include "core/plan_state.hpp"
#include "core/validate.hpp"
#include "cpu/attend_tiles.hpp"
#include "cpu/parallel.hpp"
#include "kv_cache/attend_batch.hpp"
#include "kv_cache/state.hpp"

namespace attn8 {

using cpu::AttendSequence;
using cpu::PackedHead;
using kv_cache::AttendBatch;
using kv_cache::Sequence;

namespace {

/// The sequences of a call, locked for reading. In the order of their addresses, so that two calls
/// with writers between them do not wait for each other.
class ReadLocks {
 public:
  explicit ReadLocks(const std::vector<std::shared_ptr<Sequence>>& sequences) {
    std::vector<Sequence*> order;
    order.reserve(sequences.size());
    for (const auto& sequence : sequences) order.push_back(sequence.get());
    std::sort(order.begin(), order.end(), std::less<>());
    order.erase(std::unique(order.begin(), order.end()), order.end());
    locks_.reserve(order.size());
    for (Sequence* sequence : order) locks_.emplace_back(sequence->mutex);
  }

 private:
  std::vector<std::shared_lock<std::shared_mutex>> locks_;
};

/// What a call works on beside the cache.
struct CallMemory {
  struct Free {
    void operator()(std::byte* p) const noexcept {
      ::operator delete (p, std::align_val_t{cpu::kAlignment});
    }
  };
  explicit CallMemory(size_t bytes)
      : base(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{cpu::kAlignment}))) {}
  std::unique_ptr<std::byte, Free> base;
};

/// Points at the pages of a sequence; v_out_scale [padded_dim] is filled.
PackedHead pack_head(const KvCache::State& cache, const Sequence& sequence, int64_t head,
                     PackedBlock* blocks, float* v_out_scale) noexcept {
  PackedHead packed;
  float largest = 0;
  for (size_t page = 0; page < sequence.pages.size(); ++page) {
    const kv_cache::PageBlock block = cache.pool.block(sequence.pages[page], head);
    blocks[page] = {block.memory.data, block.memory.header_data};
    const kv_cache::BlockSummary& summary = *block.summary;
    packed.kv.key_norm = std::max(packed.kv.key_norm, summary.key_norm);
    packed.poisoned = packed.poisoned || summary.poisoned;
    largest = std::max(largest, summary.v_scale);
  }
  packed.kv.blocks = blocks;
  packed.kv.layout = cache.pool.layout();
  packed.kv.keys = {0, sequence.length};
  packed.kv.v_ref = largest;
  if (!sequence.k_mean.empty()) {
    packed.k_mean = sequence.k_mean.data() + head * cache.options.head_dim;
  }
  std::fill_n(v_out_scale, padded_dim(cache.packed_dim()), largest);
  packed.v_out_scale = v_out_scale;
  return packed;
}

/// `accurate`, on the pages of kv heads [first, first + heads); inputs and outputs are theirs.
Status attend_pages(const AttendBatch& batch, int64_t first, int64_t heads,
                    const AttentionInputs& inputs, const AttentionOutputs& outputs) {
  const KvCache::State& cache = batch.cache;
  const std::span found = batch.sequences;
  const size_t count = found.size();
  const KvCacheOptions& options = cache.options;
  const auto padded = static_cast<size_t>(padded_dim(cache.packed_dim()));
  const int64_t nheads_q = data_view(inputs.q).shape[2];
  const int64_t group = nheads_q / heads;
  std::vector<PackedHead> packed(count * static_cast<size_t>(heads));
  std::vector<AttendSequence> sequences(count);
  std::vector<size_t> first_block(count);  // of each sequence
  size_t blocks = 0;
  int64_t split_rows = 0;  // most rows of a sequence that is split
  for (size_t i = 0; i < count; ++i) {
    AttendSequence& sequence = sequences[i];
    sequence.index = static_cast<int64_t>(i);
    sequence.first_position = batch.cu_seqlens_q[i];
    sequence.seqlen_q = batch.cu_seqlens_q[i + 1] - batch.cu_seqlens_q[i];
    sequence.seqlen_k = found[i]->length;
    sequence.keys = {0, found[i]->length};
    const int64_t rows = sequence.seqlen_q * group;
    sequence.split = cpu::split_keys(Mode::kAccurate, rows, sequence.keys, options.page_size);
    if (sequence.split.parts > 1) split_rows = std::max(split_rows, rows);
    sequence.heads = packed.data() + i * static_cast<size_t>(heads);
    first_block[i] = blocks;
    blocks += found[i]->pages.size() * static_cast<size_t>(heads);
  }
  cpu::longest_first(sequences, group);
  const cpu::TaskCount tasks = cpu::begin_tasks(sequences, nheads_q, heads);

  const Context& context = batch.context;
  const KernelTable& table = context.force_isa ? *find_kernel_table(context.isa) : cache.table;
  std::vector<PackedBlock> packed_blocks(blocks);
  const size_t scale_bytes = cpu::on_pages(packed.size() * padded * sizeof(float));
  const size_t worker_bytes = static_cast<size_t>(context.threads) *
                              cpu::worker_bytes(table, options.page_size, cache.packed_dim());
  const size_t partial_bytes = cpu::partial_bytes(split_rows, cache.packed_dim());
  const CallMemory memory(scale_bytes + worker_bytes +
                          static_cast<size_t>(tasks.partials) * partial_bytes);
  auto* v_out_scale = reinterpret_cast<float*>(memory.base.get());
  // On one thread: that takes less than waking the others, who are wanted for the tiles only.
  for (size_t index = 0; index < packed.size(); ++index) {
    const size_t i = index / static_cast<size_t>(heads);
    const auto head = static_cast<int64_t>(index % static_cast<size_t>(heads));
    PackedBlock* own =
        packed_blocks.data() + first_block[i] + static_cast<size_t>(head) * found[i]->pages.size();
    packed[index] = pack_head(cache, *found[i], first + head, own, v_out_scale + index * padded);
  }
  return cpu::attend_tiles({.table = table,
                            .context = context,
                            .mode = Mode::kAccurate,
                            .bfloat16 = false,
                            .mask = batch.options.mask,
                            .softmax_scale = batch.softmax_scale,
                            .softcap = batch.options.softcap,
                            .kv_block = options.page_size,
                            .nheads_q = nheads_q,
                            .nheads_k = heads,
                            .head_dim = options.head_dim,
                            .head_dim_v = options.head_dim_v,
                            .q = inputs.q,
                            .attn_mask = cpu::view_or_null(inputs.attn_mask),
                            .alibi_slopes = cpu::view_or_null(inputs.alibi_slopes),
                            .sinks = cpu::view_or_null(inputs.sinks),
                            .outputs = outputs,
                            .sequences = sequences,
                            .workers = memory.base.get() + scale_bytes,
                            .partials = memory.base.get() + scale_bytes + worker_bytes,
                            .bytes_per_partial = partial_bytes,
                            .tasks = tasks.tasks});
}

}  // namespace

Status KvCache::attend(std::span<const KvSequence> handles, const Operand& q,
                       std::span<const int32_t> cu_seqlens_q, const AttentionOutputs& outputs,
                       const KvCacheAttentionOptions& attention_options,
                       const Context& context) const noexcept try {
  if (Status status = validate_context(context); !status.ok()) return status;
  if (Status status = validate_kv_attention(options(), static_cast<int64_t>(handles.size()), q,
                                            cu_seqlens_q, outputs, attention_options);
      !status.ok()) {
    return status;
  }
  const size_t count = handles.size();
  std::vector<std::shared_ptr<Sequence>> found(count);
  for (size_t i = 0; i < count; ++i) {
    if (Status status = state_->find(handles[i], found[i]); !status.ok()) return status;
  }
  const ReadLocks locks(found);
  int64_t longest = 0;
  for (size_t i = 0; i < count; ++i) {
    if (found[i]->freed) return kv_cache::freed_error(handles[i]);
    longest = std::max(longest, found[i]->length);
  }
  if (Status status = validate_ragged_mask(attention_options.attn_mask, longest); !status.ok()) {
    return status;
  }
  const AttendBatch batch = {*state_,
                             found,
                             cu_seqlens_q,
                             attention_options,
                             context,
                             attention_options.softmax_scale.value_or(static_cast<float>(
                                 1.0 / std::sqrt(static_cast<double>(options().head_dim))))};
  const AttentionInputs inputs = {.q = q,
                                  .k = ConstTensorView(),  // in the pages
                                  .v = ConstTensorView(),
                                  .attn_mask = attention_options.attn_mask,
                                  .alibi_slopes = attention_options.alibi_slopes,
                                  .sinks = attention_options.sinks};
  const std::vector<Mode> one_mode(static_cast<size_t>(options().nheads_k), attention_options.mode);
  const int64_t group = data_view(q).shape[2] / options().nheads_k;
  for (const HeadStretch& heads : stretches_of(
           attention_options.head_modes.empty() ? one_mode : attention_options.head_modes)) {
    const AttentionInputs part = part_of(inputs, heads.first, heads.count, group);
    const AttentionOutputs part_outputs = part_of(outputs, heads.first, heads.count, group);
    Status status = heads.mode == Mode::kAccurate
                        ? attend_pages(batch, heads.first, heads.count, part, part_outputs)
                        : kv_cache::attend_dequantized(batch, heads, part, part_outputs);
    if (!status.ok()) return status;
  }
  return {};
} catch (...) {
  return Status(StatusCode::kOutOfMemory, {});
}

}  // namespace attn8
