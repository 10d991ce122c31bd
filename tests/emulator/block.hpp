// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulator/device.hpp"
#include "emulator/emulator.hpp"
#include "emulator/fiber.hpp"
#include "emulator/random.hpp"
#include "emulator/shared_memory.hpp"
#include "emulator/tsan.hpp"

/// The state of the block that runs; internal to the emulator.
namespace attn8::emulator {

inline constexpr int kWarpThreads = 32;
inline constexpr int kWarpgroupThreads = 128;

/// Thrown to unwind the threads of a run that has failed.
struct Aborted {};

/// What a thread waits for, in a form cheap to record and told only when nothing moves any more.
struct Wait {
  enum class Kind : uint8_t { kNone, kRendezvous, kBarrier, kMbarrier };
  Kind kind = Kind::kNone;
  const char* op = "";
  uint32_t id = 0;      ///< barrier number, or address of an mbarrier
  uint32_t parity = 0;  ///< of an mbarrier
};

struct CpAsync {
  uint32_t target;
  const void* source;
  bool valid;
  bool done;
};

/// One CUDA thread.
struct Thread {
  explicit Thread(void (*entry)()) : fiber(entry) {}
  Fiber fiber;
  bool exited = false;
  Wait wait;
  // cp.async: groups[0] is the oldest; `open` is not committed yet.
  std::vector<CpAsync> open;
  std::deque<std::vector<CpAsync>> groups;
  uint32_t proxy_fences = 0;
  // wgmma.
  bool fenced = false;
  uint64_t committed = 0, retired = 0;
};

/// What a barrier orders, for ThreadSanitizer. A thread that goes on late must not learn of what
/// others did before the next use of the barrier, so uses take turns at two addresses: nobody comes
/// to the use after the next before all have gone on from this one.
struct BarrierOrder {
  char sync[2] = {};
  uint32_t uses = 0;  ///< that have ended
  [[nodiscard]] void* now() { return &sync[uses % 2]; }
};

/// Where the threads of a warp or warpgroup meet to execute one instruction together.
struct Rendezvous {
  int size = 0;
  int first_thread = 0;
  int arrived = 0;
  const char* op = "";
  int first_arrived = 0;
  void* arguments[kWarpgroupThreads] = {};
  BarrierOrder order;
};

struct NamedBarrier {
  int expected = 0;
  int arrived = 0;
  std::vector<int> waiting;
  BarrierOrder order;
};

struct Mbarrier {
  bool initialized = false;
  bool fenced = false;  ///< visible to the asynchronous proxy
  int init_thread = -1;
  uint32_t count = 0;
  uint32_t pending = 0;  ///< arrivals the phase still wants
  int64_t bytes = 0;     ///< and bytes
  uint32_t phase = 0;
  std::vector<int> waiting;
  char sync = 0;  ///< its address stands for the barrier in ThreadSanitizer
};

/// A TMA box or bulk copy under way.
struct BulkCopy {
  uint32_t target;
  uint32_t barrier;
  const TensorMap* map;  ///< nullptr: `bytes` from `source`
  int start[5];
  const void* source;
  uint32_t bytes;
  int thread;
  uint32_t tsan_fiber;
  uint64_t due = 0;  ///< Async::kRandom: the switch after which it completes
};

struct Warpgroup;  // wgmma.cpp

struct Block {
  Block(const Config& config, int x, int y, int z, Report& report,
        const std::function<void()>& kernel);
  ~Block();

  /// Runs all threads to their end or to the first error; returns that error or "".
  std::string run();

  Thread& running() { return threads[current]; }
  /// Stops the running thread until somebody calls wake().
  void wait(const Wait& reason);
  void wake(int thread) { ready.push_back(thread); }
  /// Notes that an instruction was executed, and tells whether this run leaves it out.
  bool skips(Sync sync, const void* address);

  /// The running thread meets the others of `place`; the last to arrive calls execute(arguments),
  /// one argument per thread in order, before all go on.
  template <class Execute>
  void meet(Rendezvous& place, const char* op, void* argument, Execute&& execute) {
    arrive(place, op, argument);
    if (place.arrived < place.size) {
      wait({Wait::Kind::kRendezvous, op, 0, 0});
      return;
    }
    execute(place.arguments);
    place.arrived = 0;
    ++place.order.uses;
    for (int i = 0; i < place.size; ++i) {
      if (place.first_thread + i != current) wake(place.first_thread + i);
    }
  }
  Rendezvous& warp() { return warps[current / kWarpThreads]; }

  /// Whether a piece of asynchronous work completes at once.
  bool completes_now() {
    return config.async == Async::kEarly || (config.async == Async::kRandom && random() % 2 == 0);
  }
  /// Completes the TMA box or bulk copy bulk_copies[pick].
  void complete_bulk_copy(size_t pick);
  /// When nothing else can go on: any, or the oldest or newest by the seed, for nothing orders
  /// them.
  void complete_some_bulk_copy();
  void complete(CpAsync& copy, int thread);
  Mbarrier& mbarrier(uint32_t address, const char* op);
  void end_phase_if_complete(Mbarrier& barrier);
  /// The running thread's fence: copies may signal the barriers it has initialized.
  void show_barriers_to_async_proxy();

  const Config& config;
  const int index[3];
  Stats& stats;
  std::vector<SyncSite>& sync_sites;
  const std::function<void()>& kernel;
  Random random;
  SharedMemory shared;
  std::vector<Thread> threads;
  std::vector<Rendezvous> warps, warpgroup_places;
  NamedBarrier barriers[16];
  std::vector<Mbarrier> mbarriers;  ///< one per 8 bytes of shared memory
  std::vector<BulkCopy> bulk_copies;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  std::vector<int> ready;
  int current = -1;
  int exited = 0;
  bool aborting = false;
  std::string error;

  // ThreadSanitizer: the emulator's own bookkeeping counts as a thread, and so does each bulk copy,
  // because they are not ordered among themselves; a few fibers take turns.
  static constexpr uint32_t kTmaFibers = 8;
  void* tsan_runtime;
  void* tsan_tma[kTmaFibers];
  char sync_begin = 0, sync_end = 0;
  char sync_tma[kTmaFibers] = {};

 private:
  void arrive(Rendezvous& place, const char* op, void* argument);
  BulkCopy take_bulk_copy(size_t pick);
  void complete_something_at_random();
  std::string describe_deadlock() const;
  std::string describe(const Wait& reason) const;
};

/// The block that runs on this host thread.
Block& block();

}  // namespace attn8::emulator
