// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "emulator/emulator.hpp"
#include "emulator/random.hpp"

namespace attn8::emulator {

/// Shared memory of one block with a shadow that knows, per byte, whether it was ever written and
/// who is still delivering to it. Every access names its instruction for the error line; errors
/// end the run (fail() in device.hpp).
class SharedMemory {
 public:
  SharedMemory(uint32_t bytes, Random& random);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  /// Bytes about to be read / written by the running thread through the generic proxy.
  const uint8_t* read(uint32_t address, uint32_t bytes, uint32_t alignment, const char* op);
  uint8_t* write(uint32_t address, uint32_t bytes, uint32_t alignment, const char* op);

  /// As read(), by a tensor core and without ThreadSanitizer: also demands that the writer of
  /// ordinary stores has since executed fence.proxy.async.
  const uint8_t* read_async(uint32_t address, uint32_t bytes, const char* op);

  /// Marks [address, +bytes) as being delivered by `op` of thread `thread`, and poisons it.
  void begin_delivery(uint32_t address, uint32_t bytes, const char* op, int thread);
  /// Bytes to fill in and whose delivery ends. Writes through the asynchronous proxy need no fence.
  uint8_t* deliver(uint32_t address, uint32_t bytes, bool async_proxy, int thread);

  /// A wgmma that has been issued reads [address, +bytes) until unpinned: deliveries there fail.
  void pin(uint32_t address, uint32_t bytes, int warpgroup);
  void unpin(uint32_t address, uint32_t bytes);

  /// 8 bytes that hold an mbarrier from now on; other accesses to them fail.
  void make_barrier(uint32_t address);
  /// An access to an mbarrier, for ThreadSanitizer: it must come after make_barrier.
  void touch_barrier(uint32_t address, const char* op);

  /// Counts wavefronts of a warp instruction from its threads' accesses. Accesses of one call site
  /// belong together by order: the n-th of each lane is one instruction.
  void count_access(const void* site, int thread, uint32_t address, uint32_t bytes,
                    uint64_t* conflicts);
  /// Counts what count_access() still holds: instructions that not all lanes execute.
  void count_pending();

 private:
  enum class State : uint8_t { kUnwritten, kWritten, kInFlight, kBarrier };
  /// Per 16 bytes.
  struct Granule {
    const char* op = nullptr;  ///< of the delivery in flight
    int32_t thread = -1;       ///< that issued it, or wrote last through the generic proxy
    uint32_t fences = 0;       ///< that `thread` had executed then
    bool generic = false;      ///< last written through the generic proxy
    uint16_t pins = 0;
    int16_t warpgroup = -1;  ///< of the last pin
  };
  struct Instruction {
    uint32_t lanes = 0;
    uint32_t bytes = 0;
    std::array<uint32_t, 32> address;
    uint64_t* conflicts = nullptr;
  };
  struct Key {
    const void* site;
    int warp;
    uint32_t ordinal;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const {
      return reinterpret_cast<size_t>(key.site) * 31 + static_cast<size_t>(key.warp) * 7919 +
             key.ordinal;
    }
  };
  struct SiteKey {
    const void* site;
    int warp;
    bool operator==(const SiteKey&) const = default;
  };
  struct SiteHash {
    size_t operator()(const SiteKey& key) const {
      return reinterpret_cast<size_t>(key.site) + static_cast<size_t>(key.warp);
    }
  };

  uint32_t index(uint32_t address, uint32_t bytes, uint32_t alignment, const char* op) const;
  void require_readable(uint32_t offset, uint32_t bytes, const char* op) const;
  [[noreturn]] void fail_in_flight(uint32_t offset, const char* verb, const char* op) const;

  uint32_t bytes_;
  Random& random_;
  uint8_t* memory_;
  std::vector<State> state_;
  std::vector<Granule> granules_;
  std::unordered_map<Key, Instruction, KeyHash> instructions_;
  std::unordered_map<SiteKey, std::array<uint32_t, 32>, SiteHash> ordinals_;
};

/// Wavefronts beyond the first of each phase when these lanes access `bytes` each.
uint64_t extra_wavefronts(uint32_t lanes, const uint32_t* addresses, uint32_t bytes);

/// Copies and fills that ThreadSanitizer does not see: its memcpy would be an access of its own.
void copy_bytes(void* target, const void* source, uint32_t bytes);
void zero_bytes(void* target, uint32_t bytes);

}  // namespace attn8::emulator
