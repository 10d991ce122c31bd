// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "parallel.hpp"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

namespace attn8::app {

int32_t core_count() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
}

void parallel_cases(int64_t count, int32_t threads, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) {
      try {
        body(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  };
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < std::min<int64_t>(threads, count); ++t) workers.emplace_back(work);
  work();
  for (auto& worker : workers) worker.join();
  if (failure) std::rethrow_exception(failure);
}

Progress::Progress(std::string label, double total)
    : label_(std::move(label)), total_(total), terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() {
  if (drawn_) fmt::print(stderr, "\r\x1b[K");
}

void Progress::advance(double work) {
  const std::lock_guard lock(mutex_);
  done_ += work;
  if (!terminal_ || total_ <= 0) return;
  const auto time = Clock::now();
  const double elapsed = std::chrono::duration<double>(time - begin_).count();
  const double fraction = std::min(1.0, done_ / total_);
  // Nothing appears before two seconds unless the job is clearly longer than that.
  const bool long_job = elapsed > 2 || (elapsed > 0.5 && elapsed / fraction > 4);
  if (!long_job || time - last_ < std::chrono::milliseconds(100)) return;
  last_ = time;
  drawn_ = true;
  constexpr int kWidth = 30;
  const int filled = static_cast<int>(fraction * kWidth);
  fmt::print(stderr, "\r{} [{:#<{}}{:.<{}}] {:3.0f} %, {:.0f} s left \x1b[K", label_, "", filled,
             "", kWidth - filled, 100 * fraction, elapsed / fraction - elapsed);
  std::fflush(stderr);
}

}  // namespace attn8::app
