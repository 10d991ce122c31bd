// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>

namespace attn8::emulator {

/// A stack of its own that can be left and entered again.
class Fiber {
 public:
  /// The first enter() calls `entry`, which never returns.
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(Fiber&& other) noexcept;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  Fiber& operator=(Fiber&&) = delete;

  /// Runs the fiber until it calls leave().
  void enter();
  /// From inside: returns to the caller of enter().
  void leave();
  /// What ThreadSanitizer knows it as.
  [[nodiscard]] void* tsan_fiber() const;

 private:
  struct Stack;
  static void start();
  Stack* stack_;
};

}  // namespace attn8::emulator
