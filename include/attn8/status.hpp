// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "attn8/export.hpp"

namespace attn8 {

/// Why a call failed. The text of the Status says which argument, what it got and what it wants.
enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  ///< the caller's argument breaks a stated rule; retrying cannot help
  kUnsupported = 2,      ///< a valid request that no kernel of this library implements
  kUnavailable = 3,      ///< implemented, but this machine lacks the ISA or the device
  kOutOfMemory = 4,      ///< an allocation failed; nothing was written
  kDeviceError = 5,      ///< an accelerator reported an error; its own text is in the message
  kInternal = 6,         ///< a bug in this library
};

/// Name of a code as it stands in the enumeration, without the k ("InvalidArgument").
ATTN8_API std::string_view to_string(StatusCode code) noexcept;

/// Outcome of a call: a code and, unless ok, one line of text. The library throws no exceptions.
class [[nodiscard]] Status {
 public:
  Status() noexcept = default;
  Status(StatusCode code, std::string message) noexcept
      : code_(code), message_(std::move(message)) {}

  [[nodiscard]] bool ok() const noexcept { return code_ == StatusCode::kOk; }
  [[nodiscard]] StatusCode code() const noexcept { return code_; }
  /// One line without a trailing newline, for example
  /// "k.shape[2]=3 must divide q.shape[2]=8". Empty when ok().
  [[nodiscard]] const std::string& message() const noexcept { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

/// A value or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) noexcept : state_(std::in_place_index<0>, std::move(value)) {}         // NOLINT
  Result(Status status) noexcept : state_(std::in_place_index<1>, std::move(status)) {}  // NOLINT

  [[nodiscard]] bool ok() const noexcept { return state_.index() == 0; }
  /// Requires ok().
  [[nodiscard]] const T& value() const& noexcept { return *std::get_if<0>(&state_); }
  [[nodiscard]] T& value() & noexcept { return *std::get_if<0>(&state_); }
  [[nodiscard]] T&& value() && noexcept { return std::move(*std::get_if<0>(&state_)); }
  [[nodiscard]] Status status() const noexcept {
    const Status* status = std::get_if<1>(&state_);
    return status != nullptr ? *status : Status();
  }

 private:
  std::variant<T, Status> state_;
};

}  // namespace attn8
