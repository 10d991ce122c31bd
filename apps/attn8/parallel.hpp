// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

namespace attn8::app {

/// Cores this process may run on.
int32_t core_count();

/// Runs body(0) ... body(count - 1) on `threads` threads; the first exception stops the rest and
/// is thrown again here.
void parallel_cases(int64_t count, int32_t threads, const std::function<void(int64_t)>& body);

/// A bar on stderr, drawn only on a terminal and only for a job of more than two seconds.
/// Thread-safe.
class Progress {
 public:
  /// `total` is in any unit of work.
  Progress(std::string label, double total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void advance(double work = 1);

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_;
  double total_;
  double done_ = 0;
  bool terminal_;
  bool drawn_ = false;
  Clock::time_point begin_ = Clock::now();
  Clock::time_point last_ = begin_;
  std::mutex mutex_;
};

}  // namespace attn8::app
