// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace attn8::app {

/// A table of text cells, printed aligned in a terminal or as HTML. The first column is flush
/// left, the others flush right.
struct Table {
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;

  /// Lines of text, each ending in a newline.
  [[nodiscard]] std::string text() const;
  /// A <table>, cells escaped.
  [[nodiscard]] std::string html() const;
};

/// 0.01234 -> "1.23"; three significant digits, in percent, without the sign.
std::string percent(double fraction);

/// Milliseconds with three significant digits.
std::string milliseconds(double value);

/// 1024 -> "1k", 131072 -> "128k"; other numbers as they are.
std::string length_label(int64_t tokens);

}  // namespace attn8::app
