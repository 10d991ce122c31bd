// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <deque>
#include <vector>

#include "emulator/device.hpp"

namespace attn8::emulator {

/// One wgmma as one thread issued it.
struct WgmmaThread {
  uint32_t* d;
  const uint32_t* a;  ///< the thread's registers, or nullptr
  uint32_t a_at_issue[4];
  bool owns_poison;                  ///< the first in flight to use these accumulators
  std::vector<uint32_t> d_at_issue;  ///< when it accumulates and owns_poison
};

/// One wgmma of a warpgroup.
struct WgmmaOperation {
  Product product;
  int n;
  bool accumulate;
  uint64_t a_descriptor, b_descriptor;
  std::vector<WgmmaThread> threads;
};

/// The tensor cores' view of four warps.
struct Warpgroup {
  explicit Warpgroup(int first_thread_in);
  ~Warpgroup();
  Warpgroup(const Warpgroup&) = delete;
  Warpgroup& operator=(const Warpgroup&) = delete;

  const int first_thread;
  std::vector<WgmmaOperation> open;                ///< issued, not committed
  std::deque<std::vector<WgmmaOperation>> groups;  ///< committed, oldest first, not executed
  uint64_t executed = 0;                           ///< groups executed so far
  /// Accumulators in flight, per thread.
  std::vector<std::vector<uint32_t*>> in_flight;

  /// ThreadSanitizer: each warp has a tensor core that knows only what its own warp knew when it
  /// issued; a finished group tells whoever waits for it.
  static constexpr int kWarps = 4;
  static constexpr int kDoneSlots = 64;
  void* tensor_core[kWarps];
  char issue[kWarps] = {};
  char done[kDoneSlots] = {};
};

}  // namespace attn8::emulator
