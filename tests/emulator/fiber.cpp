// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "emulator/fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "emulator/tsan.hpp"

// Define ATTN8_EMULATOR_UCONTEXT to try the portable switch on x86-64 too.
#if defined(__x86_64__) && !defined(ATTN8_EMULATOR_UCONTEXT)
#define ATTN8_EMULATOR_X86_SWITCH
#else
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace attn8::emulator {
namespace {
// A lane at head_dim 256 keeps under 4 KiB of arrays; the rest is for unwinding and sanitizers.
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4 << 10;
}  // namespace

#ifdef ATTN8_EMULATOR_X86_SWITCH
// Saves the callee-saved registers on the running stack, its pointer in *save, and continues on the
// other stack. swapcontext would do, at the price of two system calls per switch.
extern "C" void attn8_emulator_switch(void** save, void* load);
asm(R"(
  .text
  .globl attn8_emulator_switch
  .type attn8_emulator_switch, @function
attn8_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size attn8_emulator_switch, . - attn8_emulator_switch
)");
#endif

struct Fiber::Stack {
  void (*entry)() = nullptr;
  uint8_t* memory = nullptr;
  void* tsan = nullptr;
  void* caller_tsan = nullptr;
  // AddressSanitizer: its shadow of this stack, and where the caller's stack lies.
  void* asan = nullptr;
  const void* caller_bottom = nullptr;
  size_t caller_bytes = 0;
#ifdef ATTN8_EMULATOR_X86_SWITCH
  void* own = nullptr;
  void* caller = nullptr;
#else
  ucontext_t own, caller;
#endif
};

namespace {
// Stacks are kept for the next block, and with each the fiber that ThreadSanitizer knows it by:
// making hundreds per block costs more than running it.
struct StackPool {
  struct Entry {
    uint8_t* memory;
    void* tsan;
  };
  std::vector<Entry> free;

  ~StackPool() {
    for (const Entry& entry : free) {
      tsan::destroy(entry.tsan);
      munmap(entry.memory, kGuardBytes + kStackBytes);
    }
  }
  Entry take() {
    if (!free.empty()) {
      const Entry entry = free.back();
      free.pop_back();
      return entry;
    }
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    return {static_cast<uint8_t*>(memory), tsan::create()};
  }
};
thread_local StackPool pool;

/// The fiber that enter() goes to: a new one finds itself here.
thread_local void* entered_fiber = nullptr;
}  // namespace

Fiber::Fiber(void (*entry)()) : stack_(new Stack) {
  const StackPool::Entry pooled = pool.take();
  stack_->entry = entry;
  stack_->memory = pooled.memory;
  stack_->tsan = pooled.tsan;
  uint8_t* bottom = stack_->memory + kGuardBytes;
#ifdef __SANITIZE_ADDRESS__
  // The frames that the last fiber never returned from.
  __asan_unpoison_memory_region(bottom, kStackBytes);
#endif
#ifdef ATTN8_EMULATOR_X86_SWITCH
  // The stack as attn8_emulator_switch leaves it: six registers and a return address; above it a
  // zero where entry's caller would be, which also gives entry the ABI's alignment (8 mod 16).
  void** top = reinterpret_cast<void**>(bottom + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_->own = top;
#else
  getcontext(&stack_->own);
  stack_->own.uc_stack.ss_sp = bottom;
  stack_->own.uc_stack.ss_size = kStackBytes;
  stack_->own.uc_link = nullptr;
  makecontext(&stack_->own, &Fiber::start, 0);
#endif
}

Fiber::~Fiber() {
  if (stack_ == nullptr) return;
  pool.free.push_back({stack_->memory, stack_->tsan});
  delete stack_;
}

Fiber::Fiber(Fiber&& other) noexcept : stack_(std::exchange(other.stack_, nullptr)) {}

void* Fiber::tsan_fiber() const { return stack_->tsan; }

void Fiber::start() {
  Stack* stack = static_cast<Stack*>(entered_fiber);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &stack->caller_bottom, &stack->caller_bytes);
#endif
  stack->entry();
}

void Fiber::enter() {
  entered_fiber = stack_;
  stack_->caller_tsan = tsan::current();
  tsan::switch_to(stack_->tsan);
#ifdef __SANITIZE_ADDRESS__
  void* caller_asan = nullptr;
  __sanitizer_start_switch_fiber(&caller_asan, stack_->memory + kGuardBytes, kStackBytes);
#endif
#ifdef ATTN8_EMULATOR_X86_SWITCH
  attn8_emulator_switch(&stack_->caller, stack_->own);
#else
  swapcontext(&stack_->caller, &stack_->own);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(caller_asan, nullptr, nullptr);
#endif
}

void Fiber::leave() {
  tsan::switch_to(stack_->caller_tsan);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&stack_->asan, stack_->caller_bottom, stack_->caller_bytes);
#endif
#ifdef ATTN8_EMULATOR_X86_SWITCH
  attn8_emulator_switch(&stack_->own, stack_->caller);
#else
  swapcontext(&stack_->own, &stack_->caller);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(stack_->asan, &stack_->caller_bottom, &stack_->caller_bytes);
#endif
}

}  // namespace attn8::emulator
