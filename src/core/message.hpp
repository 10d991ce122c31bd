// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "attn8/status.hpp"

namespace attn8 {

inline void append_text(std::string& text, std::string_view part) { text += part; }
template <class T>
requires std::is_arithmetic_v<T>
void append_text(std::string& text, T number) { text += std::to_string(number); }

/// A status whose message is the parts one after the other; kOutOfMemory when there is no memory
/// even for that.
template <class... Parts>
Status failure(StatusCode code, const Parts&... parts) noexcept {
  try {
    std::string text;
    (append_text(text, parts), ...);
    return Status(code, std::move(text));
  } catch (...) {
    return Status(StatusCode::kOutOfMemory, {});
  }
}

template <class... Parts>
Status invalid(const Parts&... parts) noexcept {
  return failure(StatusCode::kInvalidArgument, parts...);
}

#define ATTN8_RETURN_IF_ERROR(expression)                             \
  do {                                                                \
    if (Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)

}  // namespace attn8
