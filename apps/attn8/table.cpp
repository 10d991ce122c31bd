// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "table.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "html.hpp"

namespace attn8::app {
namespace {

std::string three_digits(double value) {
  if (!std::isfinite(value)) return fmt::format("{}", value);
  const double magnitude = std::fabs(value);
  if (magnitude >= 99.95) return fmt::format("{:.0f}", value);
  if (magnitude >= 9.995) return fmt::format("{:.1f}", value);
  if (magnitude >= 0.9995) return fmt::format("{:.2f}", value);
  if (magnitude >= 0.09995) return fmt::format("{:.3f}", value);
  return value == 0 ? "0" : fmt::format("{:.2g}", value);
}

}  // namespace

std::string Table::text() const {
  std::vector<size_t> widths;
  const auto measure = [&](const std::vector<std::string>& row) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  };
  measure(header);
  for (const auto& row : rows) measure(row);

  std::string out;
  const auto print = [&](const std::vector<std::string>& row) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c) {
      line += c == 0 ? fmt::format("{:<{}}", row[c], widths[c])
                     : fmt::format("  {:>{}}", row[c], widths[c]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + '\n';
  };
  print(header);
  size_t total = widths.empty() ? 0 : 2 * (widths.size() - 1);
  for (const size_t width : widths) total += width;
  out += std::string(total, '-') + '\n';
  for (const auto& row : rows) print(row);
  return out;
}

std::string Table::html() const {
  std::string out = "<div class=\"scroll\"><table>\n<thead><tr>";
  for (const auto& cell : header) out += fmt::format("<th>{}</th>", escape_html(cell));
  out += "</tr></thead>\n<tbody>\n";
  for (const auto& row : rows) {
    out += "<tr>";
    for (const auto& cell : row) out += fmt::format("<td>{}</td>", escape_html(cell));
    out += "</tr>\n";
  }
  return out + "</tbody></table></div>\n";
}

std::string percent(double fraction) { return three_digits(100 * fraction); }

std::string milliseconds(double value) { return three_digits(value); }

std::string length_label(int64_t tokens) {
  return tokens >= 1024 && tokens % 1024 == 0 ? fmt::format("{}k", tokens / 1024)
                                              : fmt::format("{}", tokens);
}

}  // namespace attn8::app
