// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "emulator/shared_memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>

#include "emulator/block.hpp"

namespace attn8::emulator {

void copy_bytes(void* target, const void* source, uint32_t bytes) {
  auto* to = static_cast<uint8_t*>(target);
  const auto* from = static_cast<const uint8_t*>(source);
  // The empty asm keeps the loop from becoming a call of memcpy.
  for (uint32_t i = 0; i < bytes; ++i) {
    to[i] = from[i];
    asm volatile("");
  }
}

void zero_bytes(void* target, uint32_t bytes) {
  auto* to = static_cast<uint8_t*>(target);
  for (uint32_t i = 0; i < bytes; ++i) {
    to[i] = 0;
    asm volatile("");
  }
}

// The arena is mapped, not allocated, so that ThreadSanitizer connects it with no heap block.
SharedMemory::SharedMemory(uint32_t bytes, Random& random)
    : bytes_(bytes),
      random_(random),
      state_(bytes, State::kUnwritten),
      granules_((bytes + 15) / 16) {
  void* memory = mmap(nullptr, std::max<size_t>(bytes, 4096), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(memory);
  for (uint32_t i = 0; i < bytes_; ++i) memory_[i] = static_cast<uint8_t>(random_() | 0x80);
}

SharedMemory::~SharedMemory() { munmap(memory_, std::max<size_t>(bytes_, 4096)); }

uint32_t SharedMemory::index(uint32_t address, uint32_t bytes, uint32_t alignment,
                             const char* op) const {
  if (address < kSharedBase || bytes > bytes_ || address - kSharedBase > bytes_ - bytes) {
    fail("%s: shared bytes [%lld, +%u) are out of bounds (%u bytes)", op,
         static_cast<long long>(address) - kSharedBase, bytes, bytes_);
  }
  if (address % alignment != 0) {
    fail("%s: smem+%u is not %u-byte aligned", op, address - kSharedBase, alignment);
  }
  return address - kSharedBase;
}

void SharedMemory::fail_in_flight(uint32_t offset, const char* verb, const char* op) const {
  const Granule& g = granules_[offset / 16];
  fail("%s: %s smem+%u, which %s of thread %d is still delivering", op, verb, offset, g.op,
       g.thread);
}

void SharedMemory::require_readable(uint32_t offset, uint32_t bytes, const char* op) const {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (state_[i] == State::kWritten) continue;
    if (state_[i] == State::kInFlight) fail_in_flight(i, "reads", op);
    if (state_[i] == State::kBarrier) fail("%s: reads the mbarrier at smem+%u", op, i);
    fail("%s: reads smem+%u, which was never written", op, i);
  }
}

const uint8_t* SharedMemory::read(uint32_t address, uint32_t bytes, uint32_t alignment,
                                  const char* op) {
  const uint32_t offset = index(address, bytes, alignment, op);
  require_readable(offset, bytes, op);
  tsan::read(memory_ + offset, bytes);
  return memory_ + offset;
}

uint8_t* SharedMemory::write(uint32_t address, uint32_t bytes, uint32_t alignment, const char* op) {
  const uint32_t offset = index(address, bytes, alignment, op);
  Block& b = block();
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (state_[i] == State::kInFlight) fail_in_flight(i, "writes", op);
    if (state_[i] == State::kBarrier) fail("%s: writes over the mbarrier at smem+%u", op, i);
    state_[i] = State::kWritten;
  }
  for (uint32_t g = offset / 16; g <= (offset + bytes - 1) / 16; ++g) {
    if (granules_[g].pins > 0) {
      fail("%s: writes smem+%u, which a wgmma of warpgroup %d may still be reading", op, g * 16,
           granules_[g].warpgroup);
    }
    granules_[g].thread = b.current;
    granules_[g].fences = b.running().proxy_fences;
    granules_[g].generic = true;
  }
  tsan::write(memory_ + offset, bytes);
  return memory_ + offset;
}

const uint8_t* SharedMemory::read_async(uint32_t address, uint32_t bytes, const char* op) {
  const uint32_t offset = index(address, bytes, 16, op);
  require_readable(offset, bytes, op);
  for (uint32_t g = offset / 16; g <= (offset + bytes - 1) / 16; ++g) {
    const Granule& granule = granules_[g];
    if (granule.generic && block().threads[granule.thread].proxy_fences == granule.fences) {
      fail("%s: reads smem+%u, which thread %d wrote without fence.proxy.async after it", op,
           g * 16, granule.thread);
    }
  }
  return memory_ + offset;
}

void SharedMemory::begin_delivery(uint32_t address, uint32_t bytes, const char* op, int thread) {
  const uint32_t offset = index(address, bytes, 16, op);
  for (uint32_t g = offset / 16; g < (offset + bytes + 15) / 16; ++g) {
    const State state = state_[g * 16];
    if (state == State::kInFlight) fail_in_flight(g * 16, "delivers to", op);
    if (state == State::kBarrier) fail("%s: delivers over the mbarrier at smem+%u", op, g * 16);
    if (granules_[g].pins > 0) {
      fail("%s: delivers to smem+%u, which a wgmma of warpgroup %d may still be reading", op,
           g * 16, granules_[g].warpgroup);
    }
    granules_[g].op = op;
    granules_[g].thread = thread;
    granules_[g].generic = false;
  }
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    state_[i] = State::kInFlight;
    memory_[i] = static_cast<uint8_t>(random_() | 0x80);
  }
  tsan::write(memory_ + offset, bytes);
}

uint8_t* SharedMemory::deliver(uint32_t address, uint32_t bytes, bool async_proxy, int thread) {
  const uint32_t offset = address - kSharedBase;
  for (uint32_t i = offset; i < offset + bytes; ++i) state_[i] = State::kWritten;
  for (uint32_t g = offset / 16; g < (offset + bytes + 15) / 16; ++g) {
    granules_[g].op = nullptr;
    granules_[g].generic = !async_proxy;
    granules_[g].thread = thread;
    granules_[g].fences = block().threads[thread].proxy_fences;
  }
  tsan::write(memory_ + offset, bytes);
  return memory_ + offset;
}

void SharedMemory::pin(uint32_t address, uint32_t bytes, int warpgroup) {
  const uint32_t offset = index(address, bytes, 16, "wgmma");
  for (uint32_t g = offset / 16; g < (offset + bytes) / 16; ++g) {
    ++granules_[g].pins;
    granules_[g].warpgroup = static_cast<int16_t>(warpgroup);
  }
}

void SharedMemory::unpin(uint32_t address, uint32_t bytes) {
  const uint32_t offset = address - kSharedBase;
  for (uint32_t g = offset / 16; g < (offset + bytes) / 16; ++g) --granules_[g].pins;
}

void SharedMemory::make_barrier(uint32_t address) {
  const uint32_t offset = index(address, 8, 8, "mbarrier.init");
  for (uint32_t i = offset; i < offset + 8; ++i) {
    if (state_[i] == State::kInFlight) fail_in_flight(i, "writes", "mbarrier.init");
    state_[i] = State::kBarrier;
  }
  tsan::write(memory_ + offset, 8);
}

void SharedMemory::touch_barrier(uint32_t address, const char* op) {
  tsan::read(memory_ + index(address, 8, 8, op), 8);
}

uint64_t extra_wavefronts(uint32_t lanes, const uint32_t* addresses, uint32_t bytes) {
  // A wavefront moves 128 bytes: 32 banks of 4. Wide accesses are split into phases of neighbouring
  // lanes that could move 128 bytes; lanes that read the same word share it.
  const int lanes_per_phase = bytes <= 4 ? 32 : static_cast<int>(128 / bytes);
  uint64_t extra = 0;
  for (int first = 0; first < 32; first += lanes_per_phase) {
    uint32_t words[32][32];
    uint32_t count[32] = {};
    uint32_t wavefronts = 0;
    for (int lane = first; lane < first + lanes_per_phase; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (uint32_t word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
        const uint32_t bank = word % 32;
        uint32_t* const end = words[bank] + count[bank];
        if (std::find(words[bank], end, word) == end) *end = word, ++count[bank];
        wavefronts = std::max(wavefronts, count[bank]);
      }
    }
    if (wavefronts > 0) extra += wavefronts - 1;
  }
  return extra;
}

void SharedMemory::count_access(const void* site, int thread, uint32_t address, uint32_t bytes,
                                uint64_t* conflicts) {
  const int warp = thread / kWarpThreads;
  const int lane = thread % kWarpThreads;
  const uint32_t ordinal = ordinals_[{site, warp}][static_cast<size_t>(lane)]++;
  const Key key{site, warp, ordinal};
  Instruction& instruction = instructions_[key];
  instruction.lanes |= 1u << lane;
  instruction.address[static_cast<size_t>(lane)] = address;
  instruction.bytes = bytes;
  instruction.conflicts = conflicts;
  if (instruction.lanes == ~0u) {
    *conflicts += extra_wavefronts(instruction.lanes, instruction.address.data(), bytes);
    instructions_.erase(key);
  }
}

void SharedMemory::count_pending() {
  for (const auto& [key, instruction] : instructions_) {
    *instruction.conflicts +=
        extra_wavefronts(instruction.lanes, instruction.address.data(), instruction.bytes);
  }
  instructions_.clear();
}

}  // namespace attn8::emulator
