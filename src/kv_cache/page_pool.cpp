// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "kv_cache/page_pool.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/attend_tiles.hpp"

namespace attn8::kv_cache {

void PagePool::Free::operator()(std::byte* p) const noexcept {
  ::operator delete (p, std::align_val_t{cpu::kAlignment});
}

PagePool::Memory PagePool::allocate(size_t bytes) {
  return Memory(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{cpu::kAlignment})));
}

PagePool::PagePool(int64_t pages, int64_t page_size, int64_t heads, int64_t head_dim)
    : heads_(heads),
      layout_(block_layout(page_size, head_dim, 1, 1, false)),
      header_bytes_(layout_.header_bytes + static_cast<size_t>(page_size) * sizeof(float)),
      data_(allocate(static_cast<size_t>(pages * heads) * layout_.bytes)),
      headers_(allocate(static_cast<size_t>(pages * heads) * header_bytes_)),
      summaries_(allocate(static_cast<size_t>(pages * heads) * sizeof(BlockSummary))),
      users_(static_cast<size_t>(pages), 0) {
  free_.reserve(static_cast<size_t>(pages));
  for (int64_t page = pages; page > 0; --page) free_.push_back(static_cast<int32_t>(page - 1));
}

bool PagePool::take(int64_t count, std::vector<int32_t>& pages) noexcept {
  const std::scoped_lock lock(mutex_);
  if (count > static_cast<int64_t>(free_.size()) ||
      static_cast<size_t>(count) > pages.capacity() - pages.size()) {
    return false;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t page = free_.back();
    free_.pop_back();
    users_[static_cast<size_t>(page)] = 1;
    pages.push_back(page);
  }
  return true;
}

void PagePool::share(const int32_t* pages, int64_t count) noexcept {
  const std::scoped_lock lock(mutex_);
  for (int64_t i = 0; i < count; ++i) ++users_[static_cast<size_t>(pages[i])];
}

void PagePool::release(const int32_t* pages, int64_t count) noexcept {
  const std::scoped_lock lock(mutex_);
  for (int64_t i = 0; i < count; ++i) {
    if (--users_[static_cast<size_t>(pages[i])] == 0) free_.push_back(pages[i]);
  }
}

bool PagePool::is_shared(int32_t page) const noexcept {
  const std::scoped_lock lock(mutex_);
  return users_[static_cast<size_t>(page)] > 1;
}

int64_t PagePool::free_pages() const noexcept {
  const std::scoped_lock lock(mutex_);
  return static_cast<int64_t>(free_.size());
}

size_t PagePool::bytes_per_page() const noexcept {
  return static_cast<size_t>(heads_) * (layout_.bytes + header_bytes_ + sizeof(BlockSummary));
}

PageBlock PagePool::block(int32_t page, int64_t head) const noexcept {
  const auto index = static_cast<size_t>(page * heads_ + head);
  std::byte* header = headers_.get() + index * header_bytes_;
  return {{data_.get() + index * layout_.bytes, header, layout_},
          reinterpret_cast<float*>(header + layout_.header_bytes),
          &summary(page, head)};
}

void PagePool::copy(int32_t from, int32_t to) const noexcept {
  const auto heads = static_cast<size_t>(heads_);
  const PageBlock source = block(from, 0);
  const PageBlock target = block(to, 0);
  std::memcpy(target.memory.data, source.memory.data, heads * layout_.bytes);
  std::memcpy(target.memory.header_data, source.memory.header_data, heads * header_bytes_);
  std::copy_n(source.summary, heads, target.summary);
}

}  // namespace attn8::kv_cache
