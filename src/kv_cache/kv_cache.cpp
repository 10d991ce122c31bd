// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "attn8/kv_cache.hpp"

#include <algorithm>
#include <atomic>

#include "core/message.hpp"
#include "core/quant_math.hpp"
#include "core/validate.hpp"
#include "cpu/parallel.hpp"
#include "cpu/views.hpp"
#include "kv_cache/page_writer.hpp"
#include "kv_cache/state.hpp"

namespace attn8 {

using kv_cache::freed_error;
using kv_cache::PageWriter;
using kv_cache::Sequence;

namespace {

uint64_t next_cache_id() noexcept {
  static std::atomic<uint64_t> next = 1;
  return next.fetch_add(1, std::memory_order_relaxed);
}

Status out_of_pages(int64_t wanted, int64_t free_pages) noexcept {
  return failure(StatusCode::kOutOfMemory, "pages free got ", free_pages, ", wants ", wanted);
}

/// Turns a failed allocation into a status.
template <class Body>
auto guarded(Body body) noexcept -> decltype(body()) {
  try {
    return body();
  } catch (...) {
    return Status(StatusCode::kOutOfMemory, {});
  }
}

/// The K mean of every head over all tokens of k, [nheads_k][head_dim], as attention() takes it.
std::vector<float> mean_of_k(const KernelTable& table, const ConstTensorView& k,
                             const Context& context) {
  const int64_t tokens = k.shape[1];
  const int64_t heads = k.shape[2];
  const auto dim = static_cast<int>(k.shape[3]);
  const int64_t chunks = cpu::mean_chunks(tokens);
  std::vector<double> sums(static_cast<size_t>(heads * chunks * dim));
  std::vector<float> mean(static_cast<size_t>(heads * dim));
  cpu::for_each_task(context, heads * chunks, [&](int64_t task, int64_t) {
    const int64_t begin = task % chunks * kMeanChunk;
    const int64_t count = std::min(kMeanChunk, tokens - begin);
    table.add_rows(cpu::token_rows(k, 0, begin, count, task / chunks, 0, dim),
                   sums.data() + task * dim);
  });
  for (int64_t head = 0; head < heads; ++head) {
    cpu::mean_of_chunks(sums.data() + head * chunks * dim, tokens, dim, mean.data() + head * dim);
  }
  return mean;
}

KvCacheOptions resolved(KvCacheOptions options) noexcept {
  if (options.head_dim_v == 0) options.head_dim_v = options.head_dim;
  return options;
}

}  // namespace

KvCache::State::State(const KvCacheOptions& the_options)
    : options(resolved(the_options)),
      table(*find_kernel_table(best_isa())),
      id(next_cache_id()),
      pool(options.max_pages, options.page_size, options.nheads_k, packed_dim()) {}

Status KvCache::State::find(KvSequence sequence, std::shared_ptr<Sequence>& found) const {
  const std::scoped_lock lock(mutex);
  if (sequence.cache != id || sequence.id == 0 || sequence.id >= next_sequence) {
    return invalid("sequence ", sequence.id, " is not of this cache");
  }
  const auto place = sequences.find(sequence.id);
  if (place == sequences.end()) return freed_error(sequence);
  found = place->second;
  return {};
}

KvSequence KvCache::State::add(std::shared_ptr<Sequence> sequence) {
  const std::scoped_lock lock(mutex);
  sequences.emplace(next_sequence, std::move(sequence));
  return {id, next_sequence++};
}

Status kv_cache::freed_error(KvSequence sequence) noexcept {
  return invalid("sequence ", sequence.id, " was freed");
}

Result<KvCache> KvCache::make(const KvCacheOptions& options) noexcept {
  if (Status status = validate_kv_cache(options); !status.ok()) return status;
  return guarded([&]() -> Result<KvCache> { return KvCache(std::make_shared<State>(options)); });
}

Result<KvSequence> KvCache::create() noexcept {
  return guarded([&]() -> Result<KvSequence> {
    return state_->add(std::make_shared<Sequence>(state_->pool));
  });
}

Status KvCache::append(KvSequence handle, const ConstTensorView& k, const ConstTensorView& v,
                       const Context& context) noexcept {
  if (Status status = validate_context(context); !status.ok()) return status;
  if (Status status = validate_kv_append(options(), k, v); !status.ok()) return status;
  return guarded([&]() -> Status {
    std::shared_ptr<Sequence> sequence;
    if (Status status = state_->find(handle, sequence); !status.ok()) return status;
    const std::unique_lock lock(sequence->mutex);
    if (sequence->freed) return freed_error(handle);
    const int64_t tokens = k.shape[1];
    if (tokens == 0) return {};
    kv_cache::PagePool& pool = state_->pool;
    const int64_t page_size = options().page_size;
    const int64_t before = sequence->length;
    const int64_t after = before + tokens;
    std::vector<int32_t>& pages = sequence->pages;
    const auto pages_before = static_cast<int64_t>(pages.size());
    const int64_t pages_after = (after + page_size - 1) / page_size;
    const bool copies = before % page_size != 0 && pool.is_shared(pages.back());
    const int64_t wanted = pages_after - pages_before + (copies ? 1 : 0);
    if (const int64_t left = pool.free_pages(); wanted > left) return out_of_pages(wanted, left);

    const KernelTable& table = context.force_isa ? *find_kernel_table(context.isa) : state_->table;
    std::vector<float> mean;
    const bool first = before == 0 && options().smooth_k;
    if (first) mean = mean_of_k(table, k, context);
    pages.reserve(static_cast<size_t>(pages_after + (copies ? 1 : 0)));
    if (!pool.take(wanted, pages)) return out_of_pages(wanted, pool.free_pages());
    // Nothing fails from here on.
    if (copies) {
      const auto last = static_cast<size_t>(pages_before - 1);
      pool.copy(pages[last], pages.back());
      pool.release(&pages[last], 1);
      pages[last] = pages.back();
      pages.pop_back();
    }
    if (first) sequence->k_mean = std::move(mean);

    const PageWriter writer(table, options());
    const int64_t heads = options().nheads_k;
    const int64_t first_page = before / page_size;
    const int64_t touched = pages_after - first_page;
    cpu::for_each_task(context, heads * touched, [&](int64_t task, int64_t) {
      const int64_t page = first_page + task % touched;
      const int64_t head = task / touched;
      const int64_t lo = std::max(before, page * page_size);
      const int64_t hi = std::min(after, (page + 1) * page_size);
      writer.append(
          pool.block(pages[static_cast<size_t>(page)], head), lo - page * page_size, k, v, head,
          lo - before, hi - lo,
          sequence->k_mean.empty() ? nullptr : sequence->k_mean.data() + head * options().head_dim);
    });
    sequence->length = after;
    return {};
  });
}

Result<KvSequence> KvCache::fork(KvSequence handle, int64_t length) noexcept {
  return guarded([&]() -> Result<KvSequence> {
    std::shared_ptr<Sequence> parent;
    if (Status status = state_->find(handle, parent); !status.ok()) return status;
    const std::shared_lock lock(parent->mutex);
    if (parent->freed) return freed_error(handle);
    if (length < 0 || length > parent->length) {
      return invalid("length got ", length, ", wants 0 to ", parent->length, ", the tokens there");
    }
    kv_cache::PagePool& pool = state_->pool;
    const int64_t page_size = options().page_size;
    const int64_t tail = length % page_size;
    const bool own_tail = tail != 0 && length < parent->length;
    const int64_t pages = (length + page_size - 1) / page_size;
    const int64_t shared = pages - (own_tail ? 1 : 0);
    const auto child = std::make_shared<Sequence>(pool);
    child->length = length;
    if (length > 0) child->k_mean = parent->k_mean;
    child->pages.reserve(static_cast<size_t>(pages));
    child->pages.assign(parent->pages.begin(), parent->pages.begin() + shared);
    pool.share(child->pages.data(), shared);
    if (own_tail) {
      if (!pool.take(1, child->pages)) return out_of_pages(1, pool.free_pages());
      const int32_t page = child->pages.back();
      pool.copy(parent->pages[static_cast<size_t>(shared)], page);
      const int64_t filled = std::min(parent->length - shared * page_size, page_size);
      const PageWriter writer(state_->table, options());
      for (int64_t head = 0; head < options().nheads_k; ++head) {
        writer.truncate(pool.block(page, head), filled, tail);
      }
    }
    return state_->add(child);
  });
}

Status KvCache::truncate(KvSequence handle, int64_t length) noexcept {
  return guarded([&]() -> Status {
    std::shared_ptr<Sequence> sequence;
    if (Status status = state_->find(handle, sequence); !status.ok()) return status;
    const std::unique_lock lock(sequence->mutex);
    if (sequence->freed) return freed_error(handle);
    if (length < 0 || length > sequence->length) {
      return invalid("length got ", length, ", wants 0 to ", sequence->length,
                     ", the tokens there");
    }
    if (length == sequence->length) return {};
    kv_cache::PagePool& pool = state_->pool;
    const int64_t page_size = options().page_size;
    const int64_t tail = length % page_size;
    std::vector<int32_t>& pages = sequence->pages;
    const int64_t kept = (length + page_size - 1) / page_size;
    if (tail != 0) {
      int32_t& last = pages[static_cast<size_t>(kept - 1)];
      if (pool.is_shared(last)) {
        std::vector<int32_t> own;
        own.reserve(1);
        if (!pool.take(1, own)) return out_of_pages(1, pool.free_pages());
        pool.copy(last, own[0]);
        pool.release(&last, 1);
        last = own[0];
      }
      const int64_t filled = std::min(sequence->length - (kept - 1) * page_size, page_size);
      const PageWriter writer(state_->table, options());
      for (int64_t head = 0; head < options().nheads_k; ++head) {
        writer.truncate(pool.block(last, head), filled, tail);
      }
    }
    pool.release(pages.data() + kept, static_cast<int64_t>(pages.size()) - kept);
    pages.resize(static_cast<size_t>(kept));
    if (length == 0) sequence->k_mean.clear();
    sequence->length = length;
    return {};
  });
}

Status KvCache::free(KvSequence handle) noexcept {
  return guarded([&]() -> Status {
    std::shared_ptr<Sequence> sequence;
    if (Status status = state_->find(handle, sequence); !status.ok()) return status;
    const std::unique_lock lock(sequence->mutex);
    if (sequence->freed) return freed_error(handle);
    sequence->freed = true;
    sequence->pool.release(sequence->pages.data(), static_cast<int64_t>(sequence->pages.size()));
    sequence->pages.clear();
    const std::scoped_lock state_lock(state_->mutex);
    state_->sequences.erase(handle.id);
    return {};
  });
}

Result<int64_t> KvCache::length(KvSequence handle) const noexcept {
  return guarded([&]() -> Result<int64_t> {
    std::shared_ptr<Sequence> sequence;
    if (Status status = state_->find(handle, sequence); !status.ok()) return status;
    const std::shared_lock lock(sequence->mutex);
    if (sequence->freed) return freed_error(handle);
    return sequence->length;
  });
}

KvCacheUsage KvCache::usage() const noexcept {
  KvCacheUsage usage;
  usage.pages_free = state_->pool.free_pages();
  usage.pages_used = state_->pool.pages() - usage.pages_free;
  usage.bytes_per_page = state_->pool.bytes_per_page();
  usage.bytes_used = static_cast<size_t>(usage.pages_used) * usage.bytes_per_page;
  const std::scoped_lock lock(state_->mutex);
  usage.sequences = static_cast<int64_t>(state_->sequences.size());
  return usage;
}

const KvCacheOptions& KvCache::options() const noexcept { return state_->options; }

}  // namespace attn8
