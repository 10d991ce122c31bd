// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "report_page.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "attn8/context.hpp"
#include "html.hpp"
#include "machine.hpp"
#include "measure.hpp"
#include "report_speed.hpp"
#include "svg.hpp"

namespace attn8::app {
namespace {

/// Heads as dots, medians as a line where the entries are layers of one model.
std::string real_plot(const ReportData& data) {
  Plot plot;
  plot.title = "Error on real tensors, one dot per query head";
  plot.x.label = "";
  plot.y = {"relative L2 error, % (log)", Axis::Scale::kLog10};
  plot.width = kPageWidth;
  plot.height = 430;
  const bool many = data.real.size() > 12;
  for (const RealErrors& one : data.real) {
    plot.x.categories.push_back(one.entry);
  }
  const auto modes = compared_modes();
  for (size_t m = 0; m < modes.size(); ++m) {
    const NamedMode& mode = modes[m];
    // Side by side, so that equal errors do not hide each other.
    const double shift =
        many ? 0 : 0.1 * (static_cast<double>(m) - (static_cast<double>(modes.size()) - 1) / 2);
    Series dots = {many ? "" : mode.name, mode.color, {}, false, true};
    Series medians = {mode.name, mode.color, {}, true, false};
    dots.marker_radius = many ? 2.2 : 4;
    for (size_t i = 0; i < data.real.size(); ++i) {
      const auto x = static_cast<double>(i);
      for (const double error : data.real[i].by_mode.at(mode.name)) {
        dots.points.emplace_back(x + shift, 100 * error);
      }
      medians.points.emplace_back(x, 100 * data.real[i].median_of(mode.name));
    }
    plot.series.push_back(std::move(dots));
    if (many) plot.series.push_back(std::move(medians));
  }
  return plot.svg();
}

std::string length_plots(const ReportData& data) {
  const std::vector<std::pair<std::string, std::string>> titles = {
      {"normal", "iid N(0, 1)"},
      {"llm", "LLM-like, no sink"},
      {"sink", "LLM-like, low-norm attention sink"}};
  std::string out = "<div class=\"plots\">\n";
  for (const auto& [recipe, title] : titles) {
    Plot plot;
    plot.title = title;
    plot.x = {"keys", Axis::Scale::kLog2};
    plot.y = {"relative L2 error, % (log)", Axis::Scale::kLog10};
    plot.width = kPanelWidth;
    plot.height = kPanelHeight;
    for (const NamedMode& mode : compared_modes()) {
      Series series = {mode.name, mode.color, {}};
      for (const LengthErrors& one : data.lengths) {
        if (one.recipe != recipe) continue;
        series.points.emplace_back(static_cast<double>(one.seqlen_k),
                                   100 * one.by_mode.at(mode.name));
      }
      plot.series.push_back(std::move(series));
    }
    out += plot.svg();
  }
  return out + "</div>\n";
}

std::string paper_plot(const PaperTable& table, int number) {
  Plot plot;
  plot.title = fmt::format("Table {}: {}", number, table.distribution);
  plot.x = {"tokens", Axis::Scale::kLog2};
  plot.y = {"mean |o-r| / mean |r|, % (log)", Axis::Scale::kLog10};
  plot.width = kPanelWidth;
  plot.height = kPanelHeight;
  for (const NamedMode& mode : compared_modes()) {
    Series ours = {mode.name, mode.color, {}};
    Series theirs = {mode.name + " publ.", mode.color, {}, true, false, true};
    for (const PaperTable::Row& row : table.rows) {
      const PaperCell& cell = row.cell(mode.name);
      const auto x = static_cast<double>(row.length);
      ours.points.emplace_back(x, 100 * cell.mean_rel);
      if (cell.published) theirs.points.emplace_back(x, *cell.published);
    }
    plot.series.push_back(std::move(ours));
    if (!theirs.points.empty()) plot.series.push_back(std::move(theirs));
  }
  return plot.svg();
}

/// One panel per data set: V granularity along x, a line per P scale, half and FP8 as levels.
std::string study_plots(const std::vector<StudyRecord>& records) {
  const StudyConfig chosen = default_config();
  std::vector<std::pair<std::string, int64_t>> panels;
  for (const StudyRecord& record : records) {
    const std::pair panel = {record.data, record.seqlen_k};
    if (std::find(panels.begin(), panels.end(), panel) == panels.end()) panels.push_back(panel);
  }
  std::string out = "<div class=\"plots\">\n";
  for (const auto& [name, length] : panels) {
    Plot plot;
    plot.title = fmt::format("{}, {} keys", name, length_label(length));
    plot.x.label = "V granularity";
    plot.y = {"relative L2 error, % (log)", Axis::Scale::kLog10};
    plot.width = kPanelWidth;
    plot.height = kPanelHeight;
    std::map<reference::PScale, Series> lines;
    std::vector<Series> levels;
    for (const StudyRecord& record : records) {
      if (record.data != name || record.seqlen_k != length) continue;
      const auto& o = record.config.options;
      if (record.config.name == "half" || record.config.name == "fp8_e4m3") {
        levels.push_back({record.config.name,
                          record.config.name == "half" ? 2 : 3,
                          {{-0.5, 100 * record.rel_l2}, {4.5, 100 * record.rel_l2}},
                          true,
                          false,
                          true});
      }
      if (!record.config.name.empty() || o.smooth_k != chosen.options.smooth_k ||
          rounding_name(o) != rounding_name(chosen.options) ||
          o.kv_block != chosen.options.kv_block ||
          (o.p_scale == chosen.options.p_scale && o.score_grid != chosen.options.score_grid)) {
        continue;
      }
      const std::string granularity(to_string(o.v_granularity));
      auto& names = plot.x.categories;
      const auto found = std::find(names.begin(), names.end(), granularity);
      const auto x = static_cast<double>(found - names.begin());
      if (found == names.end()) names.push_back(granularity);
      lines[o.p_scale].points.emplace_back(x, 100 * record.rel_l2);
    }
    const std::map<reference::PScale, int> colors = {{reference::PScale::kRunningMax127, 1},
                                                     {reference::PScale::kRunningMax255, 4},
                                                     {reference::PScale::kBlockLocal255, 0}};
    for (auto& [p_scale, series] : lines) {
      series.name = to_string(p_scale);
      series.color = colors.at(p_scale);
      plot.series.push_back(std::move(series));
    }
    plot.series.insert(plot.series.end(), levels.begin(), levels.end());
    out += plot.svg();
  }
  return out + "</div>\n";
}

/// Error of each V granularity against length, from the JSON of a full study; empty when the text
/// is not one.
std::string committed_plots(const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_object() || !json.contains("records")) return {};
  const reference::EmulationOptions usual = default_config().options;
  std::map<std::string, std::map<std::string, std::vector<std::pair<double, double>>>> panels;
  for (const auto& record : json["records"]) {
    const std::string mode = record.value("mode", "");
    const bool level = mode == "half" || mode == "fp8_e4m3";
    const bool chosen = mode.empty() && record.value("p_scale", "") == to_string(usual.p_scale) &&
                        record.value("rounding", "") == rounding_name(usual) &&
                        record.value("scores", "float") == scores_name(usual) &&
                        record.value("smooth_k", false) == usual.smooth_k &&
                        record.value("kv_block", 0) == usual.kv_block;
    if (!level && !chosen) continue;
    panels[record.value("data", "")][level ? mode : record.value("v_granularity", "")].emplace_back(
        record.value("seqlen_k", 0.0), 100 * record.value("rel_l2", 0.0));
  }
  const std::map<std::string, int> colors = {{"token", 0},        {"tensor", 1}, {"channel", 4},
                                             {"block", 5},        {"half", 2},   {"fp8_e4m3", 3},
                                             {"block_channel", 7}};
  std::string out;
  for (const auto& [name, lines] : panels) {
    if (lines.begin()->second.size() < 2) continue;
    Plot plot;
    plot.title = name;
    plot.x = {"keys", Axis::Scale::kLog2};
    plot.y = {"relative L2 error, % (log)", Axis::Scale::kLog10};
    plot.width = kPanelWidth;
    plot.height = kPanelHeight;
    for (const auto& [line, points] : lines) {
      const auto color = colors.find(line);
      const bool level = line == "half" || line == "fp8_e4m3";
      plot.series.push_back(
          {line, color == colors.end() ? 6 : color->second, points, true, !level, level});
    }
    out += plot.svg();
  }
  return out.empty() ? out : "<div class=\"plots\">\n" + out + "</div>\n";
}

Table machine_table() {
  const auto machine = machine_json();
  Table table;
  table.header = {"machine", ""};
  table.rows.push_back({"attn8", std::string(version())});
  for (const auto& [key, value] : machine.items()) {
    table.rows.push_back({key, value.is_string() ? value.get<std::string>() : value.dump()});
  }
  for (const IsaSupport& support : isa_support()) {
    table.rows.push_back({std::string(to_string(support.isa)),
                          support.available ? "available" : std::string(support.reason)});
  }
  return table;
}

}  // namespace

std::string report_page(const ReportData& data, const CommittedResults& committed) {
  HtmlPage page("attn8: full-INT8 attention, measured");
  page.paragraph(
      "Errors are against attention in float64 on the same inputs, as relative L2 ||o - r|| / "
      "||r|| "
      "unless said. Made by `attn8 report`; everything below was computed on this machine in this "
      "run, except where a figure says published or committed.");
  std::string items;
  for (const std::string& line : summary_lines(data)) {
    items += fmt::format("<li>{}</li>\n", escape_html(line));
  }
  page.raw("<ul>\n" + items + "</ul>\n");

  page.section("Real tensors");
  page.paragraph(
      "Q, K and V of real models after rotary embedding; docs/real-tensors.md says where they come "
      "from and how to capture more. `accurate`, `half` and `paper` ran through their kernels, "
      "`fp8` "
      "through its emulation.");
  page.figure(real_plot(data), "Every query head of every entry. Lower is better.");
  page.paragraph("Percent; median over the heads of an entry:");
  page.raw(real_table(data).html());

  page.section("Error against length");
  page.figure(length_plots(data),
              fmt::format("One head, head_dim {}, softmax scale 1/sqrt(head_dim), not causal, {} "
                          "query rows, one seed.",
                          data.length_dim, data.length_rows));
  page.raw(length_table(data).html());

  page.section("Tables 1 and 2 of the paper");
  page.paragraph(
      "arXiv:2409.16997 publishes a mean relative error of full INT8, half INT8 and FP8. Its FP8 "
      "is "
      "e5m2 without any scale, and its script takes the error over the last four elements of the "
      "output. Here each published figure stands beside ours by two metrics: mean_rel = mean|o-r| "
      "/ "
      "mean|r| over all elements, and last4 = mean(|o-r| / (|r|+1e-5)) over the last four "
      "elements, "
      "the median of many draws, because a division by a value near zero makes single draws wild.");
  std::string plots;
  for (size_t i = 0; i < data.tables.size(); ++i) {
    plots += paper_plot(data.tables[i], static_cast<int>(i) + 1);
  }
  page.figure("<div class=\"plots\">\n" + plots + "</div>\n",
              "Dashed: published. Full INT8 as the paper has it grows with length; accurate does "
              "not.");
  for (size_t i = 0; i < data.tables.size(); ++i) {
    const PaperTable& table = data.tables[i];
    page.heading(fmt::format("Table {}: {}, head_dim {}, softmax scale {:.3g}, {} draws; percent",
                             i + 1, table.distribution, table.head_dim, table.softmax_scale,
                             table.draws));
    page.raw(table.beside_published().html());
    page.paragraph("Relative L2 error of every mode:");
    page.raw(table.rel_l2().html());
  }

  speed_section(page, data);
  roofline_section(page, data);
  peers_section(page, committed.peers);

  page.section("What fixed the default");
  const reference::EmulationOptions usual = default_config().options;
  const std::string axes =
      fmt::format("smoothing {}, rounding {}, kv_block {}", usual.smooth_k ? "on" : "off",
                  rounding_name(usual), usual.kv_block);
  page.paragraph(fmt::format(
      "How V is scaled and how P is rounded, from the emulation of docs/numerics.md ({}). "
      "`running` "
      "scales P to the running maximum, `block` to the maximum of the key block; the number is the "
      "largest code. `attn8 study` repeats it at full size.",
      axes));
  page.figure(study_plots(data.study), "Dashed: the half mode and FP8 e4m3 on the same data.");
  page.paragraph("Percent; median over the heads:");
  page.raw(study_table(data.study).html());
  const std::string study = committed_plots(committed.study);
  if (!study.empty()) {
    page.heading("V granularity against length");
    page.figure(
        study,
        fmt::format("From the committed run of attn8 study, docs/results/study.json: P scaled "
                    "to the block maximum, {}.",
                    axes));
  }

  page.section("Machine");
  page.raw(machine_table().html());
  return page.str();
}

}  // namespace attn8::app
