// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "svg.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <regex>

#include "html.hpp"
#include "table.hpp"

namespace attn8::app {
namespace {

std::vector<std::string> tick_texts(const Axis& axis, double low, double high) {
  std::vector<std::string> texts;
  for (const auto& [value, text] : axis_ticks(axis, low, high)) texts.push_back(text);
  return texts;
}

/// All values of an attribute, in order.
std::vector<double> attributes(const std::string& svg, const std::string& name) {
  std::vector<double> values;
  const std::regex pattern(" " + name + "=\"([-0-9.]+)\"");
  for (std::sregex_iterator i(svg.begin(), svg.end(), pattern), end; i != end; ++i) {
    values.push_back(std::stod((*i)[1]));
  }
  return values;
}

TEST(AxisTicks, AreRoundNumbersInsideTheAxis) {
  EXPECT_EQ(tick_texts({"", Axis::Scale::kLog2}, 1024, 131072),
            (std::vector<std::string>{"1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k"}));
  EXPECT_EQ(tick_texts({"", Axis::Scale::kLog10}, 0.3, 12),
            (std::vector<std::string>{"0.5", "1", "2", "5", "10"}));
  EXPECT_EQ(tick_texts({"", Axis::Scale::kLog10}, 0.001, 1000),
            (std::vector<std::string>{"0.001", "0.01", "0.1", "1", "10", "100", "1000"}));
  EXPECT_EQ(tick_texts({"", Axis::Scale::kLinear}, 0, 3),
            (std::vector<std::string>{"0", "0.5", "1", "1.5", "2", "2.5", "3"}));
  Axis names;
  names.categories = {"a", "b"};
  EXPECT_EQ(tick_texts(names, -0.5, 1.5), (std::vector<std::string>{"a", "b"}));
}

TEST(Plot, PutsPointsWhereTheyBelongOnALogAxis) {
  Plot plot;
  plot.x = {"n", Axis::Scale::kLog2};
  plot.y = {"error", Axis::Scale::kLog10, 1.0, 100.0};
  plot.series = {{"one", 0, {{1, 1}, {2, 10}, {4, 100}}}};
  const std::string svg = plot.svg();
  const auto x = attributes(svg, "cx");
  const auto y = attributes(svg, "cy");
  ASSERT_EQ(x.size(), 3U);
  EXPECT_NEAR(x[1] - x[0], x[2] - x[1], 0.2);  // equal ratios, equal distances
  EXPECT_NEAR(y[0] - y[1], y[1] - y[2], 0.2);
  EXPECT_GT(y[0], y[2]);  // larger values stand higher
}

TEST(Plot, LeavesOutWhatCannotBeDrawn) {
  Plot plot;
  plot.y.scale = Axis::Scale::kLog10;
  plot.series = {{"s",
                  0,
                  {{0, 1},
                   {1, 0},
                   {2, std::numeric_limits<double>::quiet_NaN()},
                   {3, std::numeric_limits<double>::infinity()},
                   {4, 2}}}};
  const std::string svg = plot.svg();
  EXPECT_EQ(attributes(svg, "cx").size(), 2U);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
  plot.series.clear();
  EXPECT_EQ(plot.svg().find("nan"), std::string::npos);
}

TEST(Plot, DirectLabelsNeverOverlapAndTextIsEscaped) {
  Plot plot;
  for (int i = 0; i < 4; ++i) {
    plot.series.push_back({"s<" + std::to_string(i) + ">", i, {{0, 1}, {1, 1 + 0.001 * i}}});
  }
  const std::string svg = plot.svg();
  EXPECT_EQ(svg.find("s<0"), std::string::npos);
  std::vector<double> at;
  const std::regex pattern("y=\"([-0-9.]+)\"[^>]*>s&lt;");
  for (std::sregex_iterator i(svg.begin(), svg.end(), pattern), end; i != end; ++i) {
    at.push_back(std::stod((*i)[1]));
  }
  ASSERT_EQ(at.size(), 4U);
  std::sort(at.begin(), at.end());
  for (size_t i = 1; i < at.size(); ++i) EXPECT_GE(at[i] - at[i - 1], 12);
}

TEST(BarChart, WidthsAreProportionalToValues) {
  BarChart chart;
  chart.groups = {{"g", {{"a", 1, 0, "1"}, {"b", 2, 1, "2"}, {"c", 4, 2, "4"}}}};
  const auto widths = attributes(chart.svg(), "width");
  ASSERT_EQ(widths.size(), 3U);
  EXPECT_NEAR(widths[1], 2 * widths[0], 0.2);
  EXPECT_NEAR(widths[2], 4 * widths[0], 0.3);
}

TEST(Html, EscapesAndLoadsNothing) {
  HtmlPage page("a < b");
  page.section("x & y");
  page.paragraph("run `attn8 <x>`");
  Table table;
  table.header = {"h"};
  table.rows = {{"<script>"}};
  page.raw(table.html());
  const std::string html = page.str();
  EXPECT_NE(html.find("<title>a &lt; b</title>"), std::string::npos);
  EXPECT_NE(html.find("x &amp; y"), std::string::npos);
  EXPECT_NE(html.find("<code>attn8 &lt;x&gt;</code>"), std::string::npos);
  for (const char* loaded : {"<script", "http://", "https://", "url(", "@import", "<link"}) {
    EXPECT_EQ(html.find(loaded), std::string::npos) << loaded;
  }
}

TEST(TableText, AlignsColumns) {
  Table table;
  table.header = {"name", "x"};
  table.rows = {{"a", "1.5"}, {"long name", "12"}};
  EXPECT_EQ(table.text(),
            "name         x\n"
            "--------------\n"
            "a          1.5\n"
            "long name   12\n");
}

TEST(TableText, NumbersKeepThreeDigits) {
  EXPECT_EQ(percent(0.012345), "1.23");
  EXPECT_EQ(percent(0.12345), "12.3");
  EXPECT_EQ(percent(0.9), "90.0");
  EXPECT_EQ(percent(0.0012345), "0.123");
  EXPECT_EQ(percent(0), "0");
  EXPECT_EQ(length_label(131072), "128k");
  EXPECT_EQ(length_label(1000), "1000");
}

}  // namespace
}  // namespace attn8::app
