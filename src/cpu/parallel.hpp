// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <atomic>
#include <cstdint>

#include "attn8/context.hpp"

namespace attn8::cpu {

/// Runs body(argument, i) for i in [0, count) with the context's parallel_for, or OpenMP.
void parallel_for(const Context& context, int64_t count, void (*body)(void*, int64_t),
                  void* argument) noexcept;

/// Calls task(index, worker) once for every index in [0, count). At most context.threads workers
/// run at the same time, each with its own number in [0, context.threads): the owner of a scratch
/// area.
template <class Task>
void for_each_task(const Context& context, int64_t count, Task task) noexcept {
  struct Shared {
    Task* task;
    std::atomic<int64_t> next;
    int64_t count;
  } shared{&task, 0, count};
  const int64_t workers = context.threads < count ? context.threads : count;
  const auto body = [](void* argument, int64_t worker) {
    auto& work = *static_cast<Shared*>(argument);
    for (;;) {
      const int64_t index = work.next.fetch_add(1, std::memory_order_relaxed);
      if (index >= work.count) return;
      (*work.task)(index, worker);
    }
  };
  if (workers <= 1) {
    if (count > 0) body(&shared, 0);
    return;
  }
  parallel_for(context, workers, body, &shared);
}

}  // namespace attn8::cpu
