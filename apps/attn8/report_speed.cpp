// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "report_speed.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "report_page.hpp"
#include "svg.hpp"

namespace attn8::app {
namespace {

/// What a result is called beside others: its mode, and where it is not float32 its type.
std::string name_of(const BenchResult& one) {
  std::string name(to_string(one.options.mode));
  if (one.dtype != DType::kFloat32) name += fmt::format(" {}", to_string(one.dtype));
  return name;
}

int color_of(const BenchResult& one) {
  if (one.dtype == DType::kBFloat16) return 7;
  switch (one.options.mode) {
    case Mode::kAccurate:
      return 0;
    case Mode::kPaper:
      return 1;
    case Mode::kHalf:
      return 2;
    case Mode::kFp8:
      return 3;
    case Mode::kExact:
      break;
  }
  return 6;
}

std::string speed_plots(const SpeedFigure& speed) {
  Plot times;
  times.title = "Time, quantization included";
  times.x = {"tokens", Axis::Scale::kLog2};
  times.y = {"ms (log)", Axis::Scale::kLog10};
  times.width = kPanelWidth;
  times.height = kPanelHeight;
  const std::vector<std::pair<const char*, int>> order = {
      {"exact_fp32", 6}, {"exact_bf16", 7}, {"half", 2}, {"paper", 1}, {"accurate", 0}};
  for (const auto& [name, color] : order) {
    Series series = {name, color, {}};
    for (const SpeedRow& row : speed.rows) {
      series.points.emplace_back(static_cast<double>(row.length), row.total_ms(name));
    }
    times.series.push_back(std::move(series));
  }

  Plot saved;
  saved.title = "Time saved by full INT8";
  saved.x = {"tokens", Axis::Scale::kLog2};
  saved.y = {"% of the baseline's time", Axis::Scale::kLinear, std::nullopt, 100.0};
  saved.width = kPanelWidth;
  saved.height = kPanelHeight;
  Series fp32 = {"accurate / fp32", 0, {}};
  Series bf16 = {"accurate / bf16", 7, {}};
  Series theirs = {"publ. / fp16 GPU", 1, {}, true, true, true};
  for (const SpeedRow& row : speed.rows) {
    const auto x = static_cast<double>(row.length);
    const double time = row.total_ms("accurate");
    fp32.points.emplace_back(x, 100 * (1 - time / row.total_ms("exact_fp32")));
    bf16.points.emplace_back(x, 100 * (1 - time / row.total_ms("exact_bf16")));
    theirs.points.emplace_back(x, 100 * row.published_saving);
  }
  saved.series = {fp32, bf16, theirs};
  return "<div class=\"plots\">\n" + times.svg() + saved.svg() + "</div>\n";
}

std::string peak_chart(const ReportData& data) {
  BarChart chart;
  chart.title = "Share of the instruction's peak rate, one thread, 4096 x 4096, not causal";
  chart.axis_label = "fraction of the peak measured between the runs";
  chart.width = 760;
  std::map<int64_t, BarChart::Group> groups;
  for (const BenchResult& one : data.peaks) {
    if (!one.peak_fraction) continue;
    BarChart::Group& group = groups[one.shape.head_dim];
    group.label = fmt::format("head_dim {}", one.shape.head_dim);
    group.bars.push_back(
        {name_of(one), *one.peak_fraction, color_of(one),
         fmt::format("{:.2f} of {}, {:.0f} GOP/s", *one.peak_fraction, one.peak_name, one.gops)});
  }
  for (auto& [head_dim, group] : groups) chart.groups.push_back(std::move(group));
  return chart.groups.empty() ? std::string() : chart.svg();
}

/// The instruction whose ceiling a result stands under: the one its peak was measured with.
double ceiling_gops(const ReportData& data, const BenchResult& one) {
  for (const auto& rate : data.ceilings.rates) {
    if (rate.name == one.peak_name) return rate.gops;
  }
  return 0;
}

std::string roofline_plot(const ReportData& data) {
  Plot plot;
  plot.title = "Roofline of one thread";
  plot.x = {"operations per byte of Q, K, V and out", Axis::Scale::kLog2};
  plot.y = {"GOP/s (log)", Axis::Scale::kLog10};
  plot.width = kPageWidth;
  plot.height = 430;
  double last = 1;
  for (const BenchResult* one : data.roofline()) last = std::max(last, one->ops_per_byte);
  const double bandwidth = data.ceilings.bytes_per_s * 1e-9;
  const std::map<std::string_view, int> colors = {
      {"vpdpbusd zmm", 0}, {"vpmaddwd+vpaddd ymm", 0}, {"vdpbf16ps zmm", 7}};
  for (const auto& rate : data.ceilings.rates) {
    const auto color = colors.find(rate.name);
    const double ridge = rate.gops / bandwidth;
    plot.series.push_back({fmt::format("{}, {:.0f}", rate.name, rate.gops),
                           color == colors.end() ? 6 : color->second,
                           {{0.25, 0.25 * bandwidth}, {ridge, rate.gops}, {2 * last, rate.gops}},
                           true,
                           false,
                           true});
  }
  std::map<std::string, Series> points;
  for (const BenchResult* one : data.roofline()) {
    Series& series = points[name_of(*one)];
    series.name = name_of(*one);
    series.color = color_of(*one);
    series.line = false;
    series.marker_radius = 5;
    series.points.emplace_back(one->ops_per_byte, one->gops);
  }
  for (auto& [name, series] : points) plot.series.push_back(std::move(series));
  return plot.svg();
}

/// What benchmarks/peers/peers.py writes of one library on one case.
struct PeerRecord {
  std::string name;  ///< library and variant
  std::string column;
  double median_ms = 0;
  double ratio = 0;  ///< its time over that of attn8's accurate mode
  double rel_l2 = 0;
  bool ours = false;
};

std::vector<PeerRecord> peer_records(const nlohmann::json& records) {
  std::vector<PeerRecord> result;
  for (const auto& one : records) {
    const std::string library = one.value("library", "");
    result.push_back({fmt::format("{}, {}", library, one.value("variant", "")),
                      fmt::format("{}, {} thr.", one.value("case", ""), one.value("threads", 0)),
                      one.value("median_ms", 0.0), one.value("ratio", 0.0),
                      one.value("rel_l2", 0.0), library == "attn8"});
  }
  return result;
}

std::string peer_chart(const std::vector<PeerRecord>& records) {
  BarChart chart;
  chart.title = "Time over that of attn8 accurate; above 1, attn8 is faster";
  chart.axis_label = "ratio of times in the same round, median";
  chart.width = kPageWidth;
  chart.reference = 1.0;
  for (const PeerRecord& one : records) {
    if (!one.column.ends_with(" 1 thr.") || one.ours) continue;
    auto group = std::find_if(chart.groups.begin(), chart.groups.end(),
                              [&](const auto& g) { return g.label == one.column; });
    if (group == chart.groups.end()) {
      chart.groups.push_back({one.column, {}});
      group = chart.groups.end() - 1;
    }
    group->bars.push_back({one.name, one.ratio, 6,
                           fmt::format("{:.1f}, error {} %", one.ratio, percent(one.rel_l2))});
  }
  return chart.svg();
}

/// Libraries down, cases across.
Table peer_table(const std::vector<PeerRecord>& records) {
  std::vector<std::string> names, columns;
  std::map<std::pair<std::string, std::string>, std::string> cells;
  const auto add = [](std::vector<std::string>& list, const std::string& text) {
    if (std::find(list.begin(), list.end(), text) == list.end()) list.push_back(text);
  };
  for (const PeerRecord& one : records) {
    add(names, one.name);
    add(columns, one.column);
    cells[{one.name, one.column}] = fmt::format("{} ms ({:.2f}; {} %)", milliseconds(one.median_ms),
                                                one.ratio, percent(one.rel_l2));
  }
  Table table;
  table.header = {"case"};
  table.header.insert(table.header.end(), columns.begin(), columns.end());
  for (const std::string& name : names) {
    std::vector<std::string> row = {name};
    for (const std::string& column : columns) {
      const auto cell = cells.find({name, column});
      row.push_back(cell == cells.end() ? "-" : cell->second);
    }
    table.rows.push_back(std::move(row));
  }
  return table;
}

}  // namespace

void speed_section(HtmlPage& page, const ReportData& data) {
  page.section("Speed on this CPU");
  page.figure(speed_plots(data.speed),
              fmt::format("{} heads, head_dim {}, {} threads, not causal; the best of five runs. "
                          "Published: full INT8 against FlashAttention in FP16 on the paper's GPU.",
                          data.speed.heads, data.speed.head_dim, data.speed.threads));
  page.raw(data.speed.table().html());
  if (data.speed.shortened) {
    page.paragraph("Longer lengths are left out: they would take too long on this machine.");
  }
  const std::string chart = peak_chart(data);
  if (!chart.empty()) {
    page.figure(chart,
                "The peak of the multiply-add instruction is measured before and after every run; "
                "the fraction is the median of these ratios.");
  }
  page.raw(peak_table(data).html());
}

void roofline_section(HtmlPage& page, const ReportData& data) {
  if (data.ceilings.rates.empty()) return;  // no micro-kernel of this instruction set
  page.section("Roofline");
  page.paragraph(
      "A kernel cannot be faster than the multiply-add it is made of (the flat part of its line) "
      "nor than memory delivers K and V (the slope); both were measured on this machine in this "
      "run. Few queries against a long cache stand on the slope, prefill under the flat part.");
  page.figure(roofline_plot(data),
              fmt::format("One thread. Operations: 4 x head_dim per visible pair of a query and a "
                          "key. Bytes: Q, K, V as the kernel reads them and out, each moved once. "
                          "Memory reads {:.1f} GB/s.",
                          data.ceilings.bytes_per_s * 1e-9));
  page.raw(roofline_table(data).html());
}

Table roofline_table(const ReportData& data) {
  Table table;
  table.header = {"kernel",  "BxHqxHkv SqxSk d", "ms",          "GOP/s",
                  "op/byte", "bound, GOP/s",     "of the bound"};
  for (const BenchResult* one : data.roofline()) {
    const double memory = data.ceilings.bytes_per_s * 1e-9 * one->ops_per_byte;
    const double bound = std::min(ceiling_gops(data, *one), memory);
    table.rows.push_back({one->kernel, one->shape.label(), milliseconds(one->median_ms),
                          fmt::format("{:.1f}", one->gops),
                          fmt::format("{:.1f}", one->ops_per_byte),
                          fmt::format("{:.0f}{}", bound, bound == memory ? " (memory)" : ""),
                          fmt::format("{:.2f}", one->gops / bound)});
  }
  return table;
}

void peers_section(HtmlPage& page, const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_object() || !json.contains("records") || !json["records"].is_array()) return;
  const auto records = peer_records(json["records"]);
  if (records.empty()) return;
  page.section("Beside other libraries");
  page.paragraph(fmt::format(
      "The same tensors, N(0, 1), in turns in one run of benchmarks/peers on {}: the committed "
      "docs/results/peers_cpu.json, not measured in this run. Errors are relative L2 against "
      "float64. attn8's time includes quantization of float32 inputs in prefill; in decode every "
      "library finds its cache in the form it keeps.",
      json.contains("machine") ? json["machine"].value("cpu", "an unnamed CPU")
                               : std::string("an unnamed CPU")));
  page.figure(peer_chart(records), "One thread. Errors stand beside the ratios.");
  page.paragraph("Median time (ratio to attn8 accurate; error):");
  page.raw(peer_table(records).html());
}

}  // namespace attn8::app
