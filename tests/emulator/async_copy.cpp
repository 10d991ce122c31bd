// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <utility>

#include "emulator/block.hpp"

/// cp.async, mbarrier and the TMA unit.
namespace attn8::emulator {

// ---- cp.async -----------------------------------------------------------------------------------

void Block::complete(CpAsync& copy, int thread) {
  if (copy.done) return;
  copy.done = true;
  // The copy is the issuing thread's own access, at whatever point of its program it completes.
  tsan::Scope scope(threads[thread].fiber.tsan_fiber());
  uint8_t* target = shared.deliver(copy.target, 16, /*async_proxy=*/false, thread);
  if (copy.valid) {
    copy_bytes(target, copy.source, 16);
  } else {
    zero_bytes(target, 16);
  }
}

void cp_async16(uint32_t target, const void* source, bool valid) {
  Block& b = block();
  ++b.stats.cp_async;
  if (valid) check_global(source, 16, false, "cp.async");
  b.shared.begin_delivery(target, 16, "cp.async", b.current);
  CpAsync copy{target, source, valid, false};
  if (b.completes_now()) b.complete(copy, b.current);
  tsan::Scope scope(b.tsan_runtime);
  b.shared.count_access(__builtin_return_address(0), b.current, target, 16,
                        &b.stats.cp_async_conflicts);
  if (!copy.done) b.running().open.push_back(copy);
}

void cp_commit() {
  Block& b = block();
  tsan::Scope scope(b.tsan_runtime);
  b.running().groups.push_back(std::move(b.running().open));
  b.running().open.clear();
}

void cp_wait(int pending) {
  Block& b = block();
  if (b.skips(Sync::kCpWait, __builtin_return_address(0))) return;
  auto& groups = b.running().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (CpAsync& copy : groups.front()) b.complete(copy, b.current);
    tsan::Scope scope(b.tsan_runtime);
    groups.pop_front();
  }
}

// ---- mbarrier -----------------------------------------------------------------------------------

Mbarrier& Block::mbarrier(uint32_t address, const char* op) {
  shared.touch_barrier(address, op);
  Mbarrier& barrier = mbarriers[(address - kSharedBase) / 8];
  if (!barrier.initialized) fail("%s: no mbarrier at smem+%u", op, address - kSharedBase);
  return barrier;
}

void Block::end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  for (int thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void mbar_init(uint32_t address, uint32_t count) {
  // The count field of an mbarrier has 20 bits.
  if (count == 0 || count >= 1u << 20) fail("mbarrier.init: count %u", count);
  Block& b = block();
  b.shared.make_barrier(address);
  Mbarrier& barrier = b.mbarriers[(address - kSharedBase) / 8];
  barrier.initialized = true;
  barrier.fenced = false;
  barrier.init_thread = b.current;
  barrier.count = barrier.pending = count;
}

void Block::show_barriers_to_async_proxy() {
  for (Mbarrier& barrier : mbarriers) {
    if (barrier.init_thread == current) barrier.fenced = true;
  }
}

void fence_barrier_init() {
  Block& b = block();
  if (b.skips(Sync::kInitFence, __builtin_return_address(0))) return;
  b.show_barriers_to_async_proxy();
}

void mbar_arrive(uint32_t address, uint32_t expected_bytes) {
  Block& b = block();
  Mbarrier& barrier = b.mbarrier(address, "mbarrier.arrive");
  tsan::release(&barrier.sync);
  if (barrier.pending == 0) {
    fail("mbarrier.arrive: smem+%u has all %u arrivals of phase %u and waits for bytes only",
         address - kSharedBase, barrier.count, barrier.phase);
  }
  barrier.bytes += expected_bytes;
  --barrier.pending;
  b.end_phase_if_complete(barrier);
}

void mbar_wait(uint32_t address, uint32_t parity) {
  Block& b = block();
  if (b.skips(Sync::kMbarWait, __builtin_return_address(0))) return;
  Mbarrier& barrier = b.mbarrier(address, "mbarrier.try_wait");
  // A thread that looks again too late, two phases on, finds the parity it does not want: real
  // polling can miss a phase just so.
  while ((barrier.phase & 1) == (parity & 1)) {
    {
      tsan::Scope scope(b.tsan_runtime);
      barrier.waiting.push_back(b.current);
    }
    b.wait({Wait::Kind::kMbarrier, "", address, parity & 1});
  }
  tsan::acquire(&barrier.sync);
}

// ---- TMA ----------------------------------------------------------------------------------------

namespace {

/// The swizzle as the PTX ISA draws it: the number of a 16-byte chunk within its row, exchanged by
/// the number of the row (of 128 bytes) within its pattern.
uint32_t swizzled(uint32_t address, uint32_t span) {
  if (span == 0) return address;
  const uint32_t chunks = span / 16;
  const uint32_t chunk = address / 16 % chunks;
  const uint32_t row = address / 128 % chunks;
  return address - chunk * 16 + (chunk ^ row) * 16;
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

/// Copies the row of a box that starts at `at`, zeros where it leaves the tensor.
void copy_box_row(const TensorMap& map, const int64_t* at, uint8_t* row) {
  const uint32_t bytes = map.box[0] * map.element_bytes;
  const uint8_t* source = static_cast<const uint8_t*>(map.base);
  bool inside = true;
  for (int i = 1; i < map.rank; ++i) {
    inside = inside && at[i] >= 0 && at[i] < static_cast<int64_t>(map.shape[i]);
    source += at[i] * static_cast<int64_t>(map.stride_bytes[i]);
  }
  for (uint32_t i = 0; i < bytes; ++i) {
    const int64_t x = at[0] + i / map.element_bytes;
    const bool readable = inside && x >= 0 && x < static_cast<int64_t>(map.shape[0]);
    row[i] = readable ? source[at[0] * map.element_bytes + i] : uint8_t{0};
  }
}

void copy_box(Block& b, const BulkCopy& copy) {
  const TensorMap& map = *copy.map;
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  uint8_t row[4096];
  uint32_t written = 0;
  int64_t at[5];
  uint32_t step[5] = {};
  while (written < box_bytes(map)) {
    for (int i = 0; i < map.rank; ++i) at[i] = int64_t{copy.start[i]} + step[i];
    copy_box_row(map, at, row);
    for (uint32_t i = 0; i < row_bytes; i += 16) {
      const uint32_t target = swizzled(copy.target + written + i, map.swizzle);
      copy_bytes(b.shared.deliver(target, 16, /*async_proxy=*/true, copy.thread), row + i, 16);
    }
    written += row_bytes;
    for (int i = 1; i < map.rank && ++step[i] == map.box[i]; ++i) step[i] = 0;
  }
}

/// What cuTensorMapEncodeTiled and the instruction demand.
void check_map(const TensorMap& map, uint32_t target, int rank) {
  if (map.rank != rank) fail("tma: a %d-D load of a %d-D tensor map", rank, map.rank);
  if (target % 128 != 0) fail("tma: smem+%u is not 128-byte aligned", target - kSharedBase);
  if (reinterpret_cast<uintptr_t>(map.base) % 16 != 0) fail("tma: the base is not 16-byte aligned");
  const uint32_t inner_bytes = map.box[0] * map.element_bytes;
  if (inner_bytes % 16 != 0 || inner_bytes > 4096) {
    fail("tma: a box row of %u bytes, want a multiple of 16", inner_bytes);
  }
  if (map.swizzle != 0 && inner_bytes > map.swizzle) {
    fail("tma: a box row of %u bytes does not fit the %u-byte swizzle", inner_bytes, map.swizzle);
  }
  for (int i = 0; i < rank; ++i) {
    if (map.box[i] == 0 || map.box[i] > 256) fail("tma: box[%d]=%u not in [1, 256]", i, map.box[i]);
    if (i > 0 && map.stride_bytes[i] % 16 != 0) {
      fail("tma: stride[%d] is not a multiple of 16 bytes", i);
    }
  }
}

void start_bulk_copy(Block& b, BulkCopy copy, const char* op) {
  ++b.stats.tma;
  // From at once to long after everything else has come to a halt.
  constexpr uint32_t kLog2MaxDelay = 16;
  copy.due = b.stats.switches + b.random.below(1u << b.random.below(kLog2MaxDelay));
  if (!b.mbarrier(copy.barrier, op).fenced) {
    fail("%s: no fence.mbarrier_init after the mbarrier at smem+%u was initialized", op,
         copy.barrier - kSharedBase);
  }
  copy.tsan_fiber = static_cast<uint32_t>(b.stats.tma % Block::kTmaFibers);
  tsan::release(&b.sync_tma[copy.tsan_fiber]);
  {
    tsan::Scope scope(b.tsan_tma[copy.tsan_fiber]);
    tsan::acquire(&b.sync_tma[copy.tsan_fiber]);
    b.shared.begin_delivery(copy.target, copy.bytes, op, b.current);
  }
  {
    tsan::Scope scope(b.tsan_runtime);
    b.bulk_copies.push_back(copy);
  }
  if (b.config.async == Async::kEarly) b.complete_bulk_copy(0);
}

}  // namespace

BulkCopy Block::take_bulk_copy(size_t pick) {
  tsan::Scope scope(tsan_runtime);
  const BulkCopy copy = bulk_copies[pick];
  bulk_copies.erase(bulk_copies.begin() + static_cast<std::ptrdiff_t>(pick));
  return copy;
}

void Block::complete_some_bulk_copy() {
  const size_t count = bulk_copies.size();
  if (config.async == Async::kRandom) {
    complete_bulk_copy(random.below(static_cast<uint32_t>(count)));
  } else {
    complete_bulk_copy(config.seed % 2 == 0 ? 0 : count - 1);
  }
}

void Block::complete_bulk_copy(size_t pick) {
  const BulkCopy copy = take_bulk_copy(pick);
  Mbarrier& barrier = mbarriers[(copy.barrier - kSharedBase) / 8];
  {
    tsan::Scope scope(tsan_tma[copy.tsan_fiber]);
    if (copy.map != nullptr) {
      copy_box(*this, copy);
    } else {
      copy_bytes(shared.deliver(copy.target, copy.bytes, /*async_proxy=*/true, copy.thread),
                 copy.source, copy.bytes);
    }
    tsan::release(&barrier.sync);
  }
  barrier.bytes -= copy.bytes;
  end_phase_if_complete(barrier);
}

void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int rank, const int* start) {
  Block& b = block();
  check_map(*map, target, rank);
  BulkCopy copy{target, barrier, map, {}, nullptr, box_bytes(*map), b.current, 0, 0};
  for (int i = 0; i < rank; ++i) copy.start[i] = start[i];
  // The tensor itself must be memory the kernel may read: its last row tells.
  const uint8_t* last_row = static_cast<const uint8_t*>(map->base);
  for (int i = 1; i < rank; ++i) last_row += (map->shape[i] - 1) * map->stride_bytes[i];
  check_global(map->base, 1, false, "tma");
  check_global(last_row + map->shape[0] * map->element_bytes - 1, 1, false, "tma");
  start_bulk_copy(b, copy, "tma");
}

void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  Block& b = block();
  if (bytes == 0 || bytes % 16 != 0) fail("cp.async.bulk: %u bytes, want a multiple of 16", bytes);
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("cp.async.bulk: source not aligned");
  check_global(source, 1, false, "cp.async.bulk");
  check_global(static_cast<const uint8_t*>(source) + bytes - 1, 1, false, "cp.async.bulk");
  start_bulk_copy(b, {target, barrier, nullptr, {}, source, bytes, b.current, 0, 0},
                  "cp.async.bulk");
}

void fence_proxy_async() {
  Block& b = block();
  if (b.skips(Sync::kProxyFence, __builtin_return_address(0))) return;
  ++b.running().proxy_fences;
  b.show_barriers_to_async_proxy();
}

}  // namespace attn8::emulator
