// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "svg.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "html.hpp"
#include "table.hpp"

namespace attn8::app {
namespace {

constexpr double kFont = 12;           // px, of all text but the title
constexpr double kCharacter = 0.64;    // width of a character in font sizes, on the safe side
constexpr double kLabelHeight = 14.5;  // px between two direct labels

bool is_log(Axis::Scale scale) { return scale != Axis::Scale::kLinear; }

double text_width(const std::string& text) {
  return kFont * kCharacter * static_cast<double>(text.size());
}

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
};

bool drawable(const Axis& axis, double value) {
  return std::isfinite(value) && (!is_log(axis.scale) || value > 0);
}

Range data_range(const Axis& axis, const std::vector<Series>& series, bool is_x) {
  if (!axis.categories.empty()) {
    return {-0.5, static_cast<double>(axis.categories.size()) - 0.5};
  }
  Range range;
  for (const Series& one : series) {
    for (const auto& [x, y] : one.points) {
      const double value = is_x ? x : y;
      if (!drawable(axis, value)) continue;
      range.low = std::min(range.low, value);
      range.high = std::max(range.high, value);
    }
  }
  if (range.low > range.high) range = is_log(axis.scale) ? Range{1, 10} : Range{0, 1};
  if (!is_x) {  // room above and below the data
    if (is_log(axis.scale)) {
      range = {range.low / 1.3, range.high * 1.3};
    } else {
      range = {std::min(0.0, range.low), range.high * 1.08};
    }
  }
  range.low = axis.low.value_or(range.low);
  range.high = axis.high.value_or(range.high);
  if (range.low == range.high) range.high = range.low + 1;
  return range;
}

/// Maps data values of an axis to pixels.
struct Mapping {
  const Axis& axis;
  Range range;
  double begin, end;

  double operator()(double value) const {
    const auto place = [&](double x) { return is_log(axis.scale) ? std::log2(x) : x; };
    const double t = (place(value) - place(range.low)) / (place(range.high) - place(range.low));
    return begin + t * (end - begin);
  }
};

std::string svg_begin(int width, double height, const std::string& title) {
  return fmt::format(
      "<svg viewBox=\"0 0 {0} {1:.0f}\" role=\"img\" aria-label=\"{2}\" "
      "style=\"max-width:{0}px\" font-size=\"{3}\" fill=\"var(--ink)\">\n"
      "<text x=\"0\" y=\"16\" font-size=\"14\" font-weight=\"600\">{2}</text>\n",
      width, height, escape_html(title), kFont);
}

std::string text_at(double x, double y, const char* anchor, const std::string& text,
                    const std::string& fill = "var(--soft)") {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" fill=\"{}\">{}</text>\n",
                     x, y, anchor, fill, escape_html(text));
}

std::string rule(double x0, double y0, double x1, double y1, const char* extra = "") {
  return fmt::format(
      "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"var(--line)\" {}/>\n",
      x0, y0, x1, y1, extra);
}

std::string draw_series(const Series& one, const Mapping& x, const Mapping& y) {
  const std::string color = fmt::format("var(--s{})", one.color % 8);
  std::string path, dots;
  bool pen_down = false;
  for (const auto& [px, py] : one.points) {
    if (!drawable(x.axis, px) || !drawable(y.axis, py)) {
      pen_down = false;
      continue;
    }
    path += fmt::format("{}{:.1f} {:.1f} ", pen_down ? 'L' : 'M', x(px), y(py));
    pen_down = true;
    if (one.markers) {
      dots += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\"/>", x(px), y(py),
                          one.marker_radius);
    }
  }
  std::string out;
  if (one.line) {
    out += fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{}/>\n", path,
                       color, one.dashed ? " stroke-dasharray=\"5 4\"" : "");
  }
  if (!dots.empty()) {
    out += fmt::format("<g fill=\"{}\"{}>{}</g>\n", color, one.line ? "" : " fill-opacity=\"0.65\"",
                       dots);
  }
  return out;
}

/// Moves the labels apart, as little as needed, keeping their order.
void spread_labels(std::vector<std::pair<double, const Series*>>& labels, double bottom) {
  std::sort(labels.begin(), labels.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  for (size_t i = 1; i < labels.size(); ++i) {
    labels[i].first = std::max(labels[i].first, labels[i - 1].first + kLabelHeight);
  }
  double limit = bottom;
  for (size_t i = labels.size(); i-- > 0;) {
    labels[i].first = std::min(labels[i].first, limit);
    limit = labels[i].first - kLabelHeight;
  }
}

}  // namespace

std::vector<std::pair<double, std::string>> axis_ticks(const Axis& axis, double low, double high) {
  std::vector<std::pair<double, std::string>> ticks;
  if (!axis.categories.empty()) {
    for (size_t i = 0; i < axis.categories.size(); ++i) {
      ticks.emplace_back(static_cast<double>(i), axis.categories[i]);
    }
    return ticks;
  }
  switch (axis.scale) {
    case Axis::Scale::kLog2:
      for (double t = std::exp2(std::ceil(std::log2(low) - 1e-9)); t <= high * (1 + 1e-9); t *= 2) {
        ticks.emplace_back(t, t >= 1 ? length_label(std::llround(t)) : fmt::format("{:g}", t));
      }
      break;
    case Axis::Scale::kLog10: {
      // 1, 2, 5 while they fit, else the powers of ten alone.
      const bool dense = std::log10(high / low) < 3.2;
      for (double decade = std::pow(10, std::floor(std::log10(low))); decade <= high;
           decade *= 10) {
        for (const double step : {1.0, 2.0, 5.0}) {
          const double t = decade * step;
          if (t < low * (1 - 1e-9) || t > high * (1 + 1e-9)) continue;
          if (step == 1 || dense) ticks.emplace_back(t, fmt::format("{:g}", t));
        }
      }
      break;
    }
    case Axis::Scale::kLinear: {
      const double rough = (high - low) / 6;
      const double decade = std::pow(10, std::floor(std::log10(rough)));
      double step = 10 * decade;
      for (const double nice : {5.0, 2.0, 1.0}) {
        if (rough <= nice * decade) step = nice * decade;
      }
      // + 0.0 makes a zero of the negative zero that ceil may give.
      for (double i = std::ceil(low / step - 1e-9) + 0.0; i * step <= high * (1 + 1e-9); ++i) {
        ticks.emplace_back(i * step, fmt::format("{:.6g}", i * step));
      }
      break;
    }
  }
  return ticks;
}

std::string Plot::svg() const {
  const Range x_range = data_range(x, series, true);
  const Range y_range = data_range(y, series, false);
  const auto x_ticks = axis_ticks(x, x_range.low, x_range.high);
  const auto y_ticks = axis_ticks(y, y_range.low, y_range.high);

  double label_width = 0;
  for (const Series& one : series) label_width = std::max(label_width, text_width(one.name));
  double tick_width = 0;
  for (const auto& [value, text] : y_ticks) tick_width = std::max(tick_width, text_width(text));
  double longest = 0;
  for (const auto& text : x.categories) longest = std::max(longest, text_width(text));

  double left = tick_width + 14;
  const double right = width - (label_width > 0 ? label_width + 14 : 10);
  const double top = 46;
  // Long names of categories hang at an angle of 40 degrees; the first must not leave the picture.
  const double category_width =
      (right - left) / std::max<double>(1, static_cast<double>(x.categories.size()));
  const bool slanted = !x.categories.empty() && longest + 8 > category_width;
  if (slanted) left = std::max(left, longest * 0.77 - category_width / 2);
  const double bottom = height - (slanted ? 34 + longest * 0.64 : 40);
  const Mapping map_x = {x, x_range, left, right};
  const Mapping map_y = {y, y_range, bottom, top};

  std::string out = svg_begin(width, height, title);
  out += text_at(0, top - 12, "start", y.label);
  out += text_at((left + right) / 2, height - 6, "middle", x.label);
  for (const auto& [value, text] : y_ticks) {
    out += rule(left, map_y(value), right, map_y(value));
    out += text_at(left - 7, map_y(value) + 4, "end", text);
  }
  // Where ticks are closer than their texts, only every n-th keeps its text.
  size_t every = 1;
  if (x.categories.empty()) {
    double widest = 0;
    for (const auto& [value, text] : x_ticks) widest = std::max(widest, text_width(text) + 8);
    const double room = (right - left) / std::max<double>(1, static_cast<double>(x_ticks.size()));
    every = static_cast<size_t>(std::max(1.0, std::ceil(widest / room)));
  } else {
    const double room = (right - left) / static_cast<double>(x.categories.size());
    every = static_cast<size_t>(std::max(1.0, std::ceil(13 / room)));
  }
  for (size_t i = 0; i < x_ticks.size(); ++i) {
    const double at = map_x(x_ticks[i].first);
    out += rule(at, bottom, at, bottom + 5);
    if (i % every != 0) continue;
    if (slanted) {
      out += fmt::format(
          "<text transform=\"translate({:.1f} {:.1f}) rotate(-40)\" text-anchor=\"end\" "
          "fill=\"var(--soft)\">{}</text>\n",
          at + 4, bottom + 15, escape_html(x_ticks[i].second));
    } else {
      out += text_at(at, bottom + 18, "middle", x_ticks[i].second);
    }
  }
  out += rule(left, bottom, right, bottom, "stroke-width=\"1.5\"");

  std::vector<std::pair<double, const Series*>> labels;
  for (const Series& one : series) {
    out += draw_series(one, map_x, map_y);
    for (size_t i = one.points.size(); i-- > 0 && !one.name.empty();) {
      const auto& [px, py] = one.points[i];
      if (!drawable(x, px) || !drawable(y, py)) continue;
      labels.emplace_back(map_y(py) + 4, &one);
      break;
    }
  }
  spread_labels(labels, bottom + 4);
  for (const auto& [at, one] : labels) {
    out += text_at(right + 10, at, "start", one->name, fmt::format("var(--s{})", one->color % 8));
  }
  return out + "</svg>\n";
}

std::string BarChart::svg() const {
  constexpr double kBar = 15;
  constexpr double kGap = 3;
  constexpr double kGroupGap = 12;
  double label_width = 0;
  double text_room = 0;
  double largest = reference.value_or(0);
  double content = 0;
  for (const Group& group : groups) {
    content += (group.label.empty() ? 0 : 17) + kGroupGap +
               (kBar + kGap) * static_cast<double>(group.bars.size());
    for (const Bar& bar : group.bars) {
      label_width = std::max(label_width, text_width(bar.label));
      text_room = std::max(text_room, text_width(bar.text));
      if (std::isfinite(bar.value)) largest = std::max(largest, bar.value);
    }
  }
  const double left = label_width + 10;
  const double right = width - text_room - 10;
  const double top = 28;
  const double bottom = top + content;
  const Axis axis = {axis_label};
  const Mapping map_x = {axis, {0, largest > 0 ? largest : 1}, left, right};

  std::string out = svg_begin(width, bottom + 38, title);
  for (const auto& [value, text] : axis_ticks(axis, 0, map_x.range.high)) {
    out += rule(map_x(value), top, map_x(value), bottom);
    out += text_at(map_x(value), bottom + 16, "middle", text);
  }
  out += text_at((left + right) / 2, bottom + 33, "middle", axis_label);
  double at = top;
  for (const Group& group : groups) {
    if (!group.label.empty()) {
      out += text_at(0, at + 13, "start", group.label, "var(--ink)");
      at += 17;
    }
    for (const Bar& bar : group.bars) {
      const double end = std::isfinite(bar.value) ? map_x(bar.value) : left;
      out += text_at(left - 6, at + kBar - 3.5, "end", bar.label);
      out += fmt::format(
          "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{}\" rx=\"2\" "
          "fill=\"var(--s{})\"/>\n",
          left, at, std::max(0.5, end - left), kBar, bar.color % 8);
      out += text_at(end + 6, at + kBar - 3.5, "start", bar.text, "var(--ink)");
      at += kBar + kGap;
    }
    at += kGroupGap;
  }
  if (reference) {
    out += fmt::format(
        "<line x1=\"{0:.1f}\" y1=\"{1}\" x2=\"{0:.1f}\" y2=\"{2:.1f}\" stroke=\"var(--ink)\" "
        "stroke-dasharray=\"4 3\"/>\n",
        map_x(*reference), top, bottom);
  }
  return out + "</svg>\n";
}

}  // namespace attn8::app
