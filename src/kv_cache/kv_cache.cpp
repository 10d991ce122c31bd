// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "attn8/kv_cache.hpp"

#include <algorithm>
#include <atomic>

#include "core/message.hpp"
#include "core/validate.hpp"
#include "kv_cache/page_writer.hpp"
#include "kv_cache/state.hpp"

namespace attn8 {

using kv_cache::freed_error;
using kv_cache::out_of_pages;
using kv_cache::PageWriter;
using kv_cache::Sequence;

namespace {

uint64_t next_cache_id() noexcept {
  static std::atomic<uint64_t> next = 1;
  return next.fetch_add(1, std::memory_order_relaxed);
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

Status kv_cache::out_of_pages(int64_t wanted, int64_t free_pages) noexcept {
  return failure(StatusCode::kOutOfMemory, "pages free got ", free_pages, ", wants ", wanted);
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
