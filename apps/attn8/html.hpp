// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <string_view>

namespace attn8::app {

/// The text with &, <, > and quotes replaced by their entities.
std::string escape_html(std::string_view text);

/// One self-contained page: inline style for light and dark, no script, nothing loaded.
class HtmlPage {
 public:
  explicit HtmlPage(std::string title) : title_(std::move(title)) {}
  /// Starts a section with a heading; it also gets a line in the table of contents.
  void section(std::string_view heading);
  void heading(std::string_view text);
  /// One paragraph of plain text; `code` spans are written between backquotes.
  void paragraph(std::string_view text);
  /// Markup that is already HTML or SVG.
  void raw(std::string_view markup) { body_ += markup; }
  /// A plot with its caption (plain text).
  void figure(std::string_view svg, std::string_view caption);
  [[nodiscard]] std::string str() const;

 private:
  std::string title_;
  std::string contents_;
  std::string body_;
  int sections_ = 0;
};

}  // namespace attn8::app
