// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

/// Runs a CUDA kernel on the CPU, one fiber per thread of a block, blocks one after the other.
///
/// The kernel is the production source, compiled by a host compiler with ATTN8_EMULATE: its PTX
/// wrappers (src/cuda/ptx.hpp) call into this emulator. Ordering is decided by a seeded random
/// scheduler; asynchronous copies, TMA boxes and wgmma groups complete when Config::async says, and
/// what they are still delivering is poisoned and may not be touched. Breaking a rule of the
/// machine ends the run with one line that names the rule, the thread and the address.
namespace attn8::emulator {

/// When asynchronous work becomes visible, within what the hardware may do.
enum class Async : uint8_t {
  kLate,    ///< not before a wait demands it: finds missing waits
  kEarly,   ///< at issue: finds buffers that are overwritten while still read
  kRandom,  ///< each piece at its own time
};

/// Global memory a kernel may touch. With at least one, every access outside them is an error.
struct Buffer {
  const char* name;
  const void* data;
  size_t bytes;
  bool writable;
};

/// Instructions that only order others. Leaving one out must be noticed, or it is not needed.
enum class Sync : uint8_t {
  kNone,
  kCpWait,       ///< cp.async.wait_group
  kBarrier,      ///< bar.sync, bar.arrive
  kWarpBarrier,  ///< bar.warp.sync
  kMbarWait,     ///< mbarrier.try_wait
  kProxyFence,   ///< fence.proxy.async
  kInitFence,    ///< fence.mbarrier_init
  kWgmmaFence,   ///< wgmma.fence
  kWgmmaWait,    ///< wgmma.wait_group
};

/// "cp.async.wait_group" and so on.
const char* to_string(Sync sync);

/// One of them in the kernel's machine code.
struct SyncSite {
  Sync sync = Sync::kNone;
  const void* address = nullptr;
  friend bool operator==(const SyncSite&, const SyncSite&) = default;
};

struct Config {
  int threads = 128;        ///< per block; a multiple of 32
  size_t shared_bytes = 0;  ///< dynamic shared memory; at most 227 KiB, as on sm_90
  Async async = Async::kLate;
  uint64_t seed = 0;  ///< of the scheduler, the poison and Async::kRandom
  std::vector<Buffer> buffers = {};
  SyncSite skip = {};  ///< does nothing in this run
};

struct Grid {
  int x = 1, y = 1, z = 1;
};

/// Warp-level instruction counts over all blocks.
struct Stats {
  uint64_t mma = 0, wgmma = 0, ldmatrix = 0, shuffle = 0, barrier = 0;
  uint64_t ld_shared = 0, st_shared = 0, cp_async = 0, tma = 0;  ///< thread-level
  uint64_t switches = 0;                                         ///< between fibers
  /// Shared-memory wavefronts beyond one per phase (8 lanes of 16 bytes, 16 of 8, 32 of 4).
  uint64_t ldmatrix_conflicts = 0, ld_conflicts = 0, st_conflicts = 0, cp_async_conflicts = 0;

  [[nodiscard]] uint64_t bank_conflicts() const {
    return ldmatrix_conflicts + ld_conflicts + st_conflicts + cp_async_conflicts;
  }
};

struct Report {
  bool ok = true;
  std::string error;  ///< one line when !ok
  Stats stats;
  std::vector<SyncSite> sync_sites;  ///< executed, by first execution
};

/// Whether this build finds data races (ThreadSanitizer); the first one ends the run.
bool finds_races();

/// Calls `kernel` once per thread of each block; stops at the first error. Not reentrant; one run
/// per host thread at a time.
Report run(const Config& config, const Grid& grid, const std::function<void()>& kernel);

}  // namespace attn8::emulator
