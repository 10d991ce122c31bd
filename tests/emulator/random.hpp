// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace attn8::emulator {

/// splitmix64: the same numbers for the same seed on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t operator()() {
    state_ += 0x9E3779B97F4A7C15;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  /// In [0, bound), bound > 0. The bias of the modulo does not matter to a scheduler.
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((*this)() >> 32) % bound; }

 private:
  uint64_t state_;
};

}  // namespace attn8::emulator
