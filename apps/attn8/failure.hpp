// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <exception>
#include <string>
#include <utility>

#include "attn8/status.hpp"

namespace attn8::app {

/// What a command throws when it cannot go on: the one line that main() prints on stderr and the
/// code that decides the exit status.
class Failure : public std::exception {
 public:
  explicit Failure(Status status) : status_(std::move(status)) {}
  [[nodiscard]] const Status& status() const noexcept { return status_; }
  [[nodiscard]] const char* what() const noexcept override { return status_.message().c_str(); }

 private:
  Status status_;
};

[[noreturn]] inline void fail(StatusCode code, std::string message) {
  throw Failure(Status(code, std::move(message)));
}

/// Throws what is not ok.
inline void require(Status status) {
  if (!status.ok()) throw Failure(std::move(status));
}

/// The value, or throws the status.
template <class T>
T take(Result<T> result) {
  if (!result.ok()) throw Failure(result.status());
  return std::move(result).value();
}

/// 0 success, 1 a check failed or a bug, 2 bad input, 3 this machine lacks what was asked.
constexpr int exit_code(StatusCode code) noexcept {
  switch (code) {
    case StatusCode::kOk:
      return 0;
    case StatusCode::kInvalidArgument:
    case StatusCode::kUnsupported:
      return 2;
    case StatusCode::kUnavailable:
    case StatusCode::kOutOfMemory:
    case StatusCode::kDeviceError:
      return 3;
    case StatusCode::kInternal:
      return 1;
  }
  return 1;
}

}  // namespace attn8::app
