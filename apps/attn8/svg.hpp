// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace attn8::app {

// Pixels of plots on a page: two panels side by side, or one over its width.
inline constexpr int kPanelWidth = 460;
inline constexpr int kPanelHeight = 320;
inline constexpr int kPageWidth = 920;

struct Axis {
  enum class Scale : unsigned char { kLinear, kLog2, kLog10 };
  std::string label;
  Scale scale = Scale::kLinear;
  /// Ends of the axis; taken from the data when absent.
  std::optional<double> low = std::nullopt;
  std::optional<double> high = std::nullopt;
  /// Names of the positions 0, 1, 2 ... of an axis of categories.
  std::vector<std::string> categories = {};
};

struct Series {
  std::string name;  ///< written at the end of the line in its colour; empty: not written
  int color = 0;     ///< one of the page's eight series colours
  std::vector<std::pair<double, double>> points;  ///< points that are not finite are left out
  bool line = true;
  bool markers = true;
  bool dashed = false;
  double marker_radius = 3.5;
};

/// One panel of lines or points with labelled axes, drawn as inline SVG that takes its colours from
/// the page.
struct Plot {
  std::string title;
  Axis x, y;
  std::vector<Series> series;
  int width = 640;
  int height = 360;

  [[nodiscard]] std::string svg() const;
};

/// Grouped horizontal bars on a linear axis that starts at 0, each with its value written beside
/// it.
struct BarChart {
  struct Bar {
    std::string label;
    double value = 0;
    int color = 0;
    std::string text;  ///< written after the bar
  };
  struct Group {
    std::string label;
    std::vector<Bar> bars;
  };
  std::string title;
  std::string axis_label;
  std::vector<Group> groups;
  std::optional<double> reference = std::nullopt;  ///< a dashed line at this value
  int width = 640;

  [[nodiscard]] std::string svg() const;
};

/// Positions and texts of an axis's ticks between low and high.
std::vector<std::pair<double, std::string>> axis_ticks(const Axis& axis, double low, double high);

}  // namespace attn8::app
