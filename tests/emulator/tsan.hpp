// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// ThreadSanitizer's fiber interface; nothing in other builds.
///
/// The emulator itself is compiled without -fsanitize=thread and the kernels with it, so that
/// ThreadSanitizer sees the kernels' accesses and, through the calls below, what their instructions
/// do to memory: happens-before edges exist only where CUDA has them.
#ifdef ATTN8_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#endif

namespace attn8::emulator::tsan {

#ifdef ATTN8_EMULATOR_TSAN
inline constexpr bool kEnabled = true;
inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
/// Flag 1: switching is no synchronization.
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
inline void acquire(void* address) { __tsan_acquire(address); }
inline void release(void* address) { __tsan_release(address); }
/// Whether a race was reported since the last clear_race().
bool race_found();
void clear_race();
/// One report tells enough, and each costs milliseconds: nothing is annotated after it, and ranges
/// go in pieces, because a racing range would be reported once per word.
inline constexpr unsigned long kPiece = 16;
inline void read(const void* data, unsigned long bytes) {
  const char* at = static_cast<const char*>(data);
  for (; bytes > 0 && !race_found(); at += kPiece) {
    const unsigned long piece = bytes < kPiece ? bytes : kPiece;
    __tsan_read_range(const_cast<char*>(at), piece);
    bytes -= piece;
  }
}
inline void write(void* data, unsigned long bytes) {
  char* at = static_cast<char*>(data);
  for (; bytes > 0 && !race_found(); at += kPiece) {
    const unsigned long piece = bytes < kPiece ? bytes : kPiece;
    __tsan_write_range(at, piece);
    bytes -= piece;
  }
}
#else
inline constexpr bool kEnabled = false;
inline bool race_found() { return false; }
inline void clear_race() {}
inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
inline void read(const void*, unsigned long) {}
inline void write(void*, unsigned long) {}
#endif

/// While it lives, accesses count as those of another fiber.
class Scope {
 public:
  explicit Scope(void* fiber) : previous_(current()) { switch_to(fiber); }
  ~Scope() { switch_to(previous_); }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  void* previous_;
};

}  // namespace attn8::emulator::tsan
