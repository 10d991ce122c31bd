// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <mutex>

#include "core/message.hpp"
#include "core/quant_math.hpp"
#include "core/validate.hpp"
#include "cpu/pack.hpp"
#include "cpu/parallel.hpp"
#include "cpu/views.hpp"
#include "kv_cache/page_writer.hpp"
#include "kv_cache/state.hpp"

namespace attn8 {

using kv_cache::out_of_pages;
using kv_cache::PageWriter;
using kv_cache::Sequence;

namespace {

/// The tokens that a call appends to one sequence.
struct Part {
  KvSequence handle;
  int64_t first = 0, count = 0;  ///< of k and v
  std::shared_ptr<Sequence> sequence = nullptr;
  int64_t before = 0, after = 0;  ///< tokens of the sequence
  bool copies = false;            ///< whether its last page is shared, and so copied to be written
  int64_t wanted_pages = 0;
  std::vector<float> mean = {};  ///< of K, where these are its first tokens
  int64_t first_task = 0;

  [[nodiscard]] int64_t first_page(int64_t page_size) const noexcept { return before / page_size; }
  [[nodiscard]] int64_t end_page(int64_t page_size) const noexcept {
    return (after + page_size - 1) / page_size;
  }
};

/// The K mean of every head over tokens [first, first + tokens) of k, [nheads_k][head_dim], as
/// attention() takes it.
std::vector<float> mean_of_k(const KernelTable& table, const ConstTensorView& k, int64_t first,
                             int64_t tokens, const Context& context) {
  const int64_t heads = k.shape[2];
  const auto dim = static_cast<int>(k.shape[3]);
  const int64_t chunks = cpu::mean_chunks(tokens);
  std::vector<double> sums(static_cast<size_t>(heads * chunks * dim));
  std::vector<float> mean(static_cast<size_t>(heads * dim));
  cpu::for_each_task(context, heads * chunks, [&](int64_t task, int64_t) {
    const int64_t begin = task % chunks * kMeanChunk;
    const int64_t count = std::min(kMeanChunk, tokens - begin);
    table.add_rows(cpu::token_rows(k, 0, first + begin, count, task / chunks, 0, dim),
                   sums.data() + task * dim);
  });
  for (int64_t head = 0; head < heads; ++head) {
    cpu::mean_of_chunks(sums.data() + head * chunks * dim, tokens, dim, mean.data() + head * dim);
  }
  return mean;
}

/// Finds the sequences and locks them for writing, in the order of their addresses as readers do,
/// so that no two calls wait for each other.
Status lock_sequences(const KvCache::State& cache, std::span<Part> parts,
                      std::vector<std::unique_lock<std::shared_mutex>>& locks) {
  std::vector<const Part*> order;
  order.reserve(parts.size());
  for (Part& part : parts) {
    if (Status status = cache.find(part.handle, part.sequence); !status.ok()) return status;
    order.push_back(&part);
  }
  std::ranges::sort(order, std::less<>(), [](const Part* part) { return part->sequence.get(); });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i]->sequence != order[i - 1]->sequence) continue;
    return invalid("sequences holds sequence ", order[i]->handle.id, " twice, wants it once");
  }
  locks.reserve(parts.size());
  for (const Part* part : order) locks.emplace_back(part->sequence->mutex);
  for (const Part& part : parts) {
    if (part.sequence->freed) return kv_cache::freed_error(part.handle);
  }
  return {};
}

/// What the call will take and set; nothing is changed. Returns the number of tasks, (kv head,
/// page) of all parts. Throws std::bad_alloc.
int64_t plan_parts(KvCache::State& cache, const KernelTable& table, std::span<Part> parts,
                   const ConstTensorView& k, const Context& context) {
  const int64_t page_size = cache.options.page_size;
  int64_t tasks = 0;
  for (Part& part : parts) {
    Sequence& sequence = *part.sequence;
    part.first_task = tasks;
    part.before = sequence.length;
    part.after = part.before + part.count;
    if (part.count == 0) continue;
    const int64_t end_page = part.end_page(page_size);
    part.copies = part.before % page_size != 0 && cache.pool.is_shared(sequence.pages.back());
    part.wanted_pages =
        end_page - static_cast<int64_t>(sequence.pages.size()) + (part.copies ? 1 : 0);
    if (part.before == 0 && cache.options.smooth_k) {
      part.mean = mean_of_k(table, k, part.first, part.count, context);
    }
    sequence.pages.reserve(static_cast<size_t>(end_page));
    tasks += cache.options.nheads_k * (end_page - part.first_page(page_size));
  }
  return tasks;
}

/// Gives a sequence its pages, the last of `free_pages`, and a page of its own for the one it
/// shares.
void take_pages(kv_cache::PagePool& pool, Part& part, std::vector<int32_t>& free_pages) noexcept {
  std::vector<int32_t>& pages = part.sequence->pages;
  const auto next = [&free_pages] {
    const int32_t page = free_pages.back();
    free_pages.pop_back();
    return page;
  };
  int64_t left = part.wanted_pages;
  if (part.copies) {
    const int32_t own = next();
    pool.copy(pages.back(), own);
    pool.release(&pages.back(), 1);
    pages.back() = own;
    --left;
  }
  for (; left > 0; --left) pages.push_back(next());  // within its capacity
  if (!part.mean.empty()) part.sequence->k_mean = std::move(part.mean);
}

Status append_parts(KvCache::State& cache, std::span<Part> parts, const ConstTensorView& k,
                    const ConstTensorView& v, const Context& context) {
  std::vector<std::unique_lock<std::shared_mutex>> locks;
  if (Status status = lock_sequences(cache, parts, locks); !status.ok()) return status;
  const KernelTable& table = context.force_isa ? *find_kernel_table(context.isa) : cache.table;
  const int64_t tasks = plan_parts(cache, table, parts, k, context);
  int64_t wanted = 0;
  for (const Part& part : parts) wanted += part.wanted_pages;
  if (const int64_t left = cache.pool.free_pages(); wanted > left) {
    return out_of_pages(wanted, left);
  }
  std::vector<int32_t> free_pages;
  free_pages.reserve(static_cast<size_t>(wanted));
  if (!cache.pool.take(wanted, free_pages)) return out_of_pages(wanted, cache.pool.free_pages());
  // Nothing fails from here on.
  for (Part& part : parts) take_pages(cache.pool, part, free_pages);

  const KvCacheOptions& options = cache.options;
  const PageWriter writer(table, options);
  const int64_t page_size = options.page_size;
  cpu::for_each_task(context, tasks, [&](int64_t task, int64_t) {
    const auto after = std::ranges::upper_bound(parts, task, {}, &Part::first_task);
    const Part& part = *(after - 1);
    const Sequence& sequence = *part.sequence;
    const int64_t touched = part.end_page(page_size) - part.first_page(page_size);
    const int64_t head = (task - part.first_task) / touched;
    const int64_t page = part.first_page(page_size) + (task - part.first_task) % touched;
    const int64_t lo = std::max(part.before, page * page_size);
    const int64_t hi = std::min(part.after, (page + 1) * page_size);
    writer.append(
        cache.pool.block(sequence.pages[static_cast<size_t>(page)], head), lo - page * page_size, k,
        v, head, part.first + lo - part.before, hi - lo,
        sequence.k_mean.empty() ? nullptr : sequence.k_mean.data() + head * options.head_dim);
  });
  for (Part& part : parts) part.sequence->length = part.after;
  return {};
}

}  // namespace

Status KvCache::append(KvSequence sequence, const ConstTensorView& k, const ConstTensorView& v,
                       const Context& context) noexcept try {
  if (Status status = validate_context(context); !status.ok()) return status;
  if (Status status = validate_kv_append(options(), k, v); !status.ok()) return status;
  Part all = {.handle = sequence, .count = k.shape[1]};
  return append_parts(*state_, {&all, 1}, k, v, context);
} catch (...) {
  return Status(StatusCode::kOutOfMemory, {});
}

Status KvCache::append(std::span<const KvSequence> sequences, const ConstTensorView& k,
                       const ConstTensorView& v, std::span<const int32_t> cu_seqlens,
                       const Context& context) noexcept try {
  if (Status status = validate_context(context); !status.ok()) return status;
  if (Status status = validate_kv_append(options(), k, v); !status.ok()) return status;
  if (Status status = validate_cu_seqlens("cu_seqlens", static_cast<int64_t>(sequences.size()), "k",
                                          k.shape[1], cu_seqlens);
      !status.ok()) {
    return status;
  }
  if (sequences.empty()) return {};
  std::vector<Part> parts(sequences.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i].handle = sequences[i];
    parts[i].first = cu_seqlens[i];
    parts[i].count = cu_seqlens[i + 1] - cu_seqlens[i];
  }
  return append_parts(*state_, parts, k, v, context);
} catch (...) {
  return Status(StatusCode::kOutOfMemory, {});
}

}  // namespace attn8
