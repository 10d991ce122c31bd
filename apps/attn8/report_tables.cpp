// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "measure.hpp"
#include "report_page.hpp"

namespace attn8::app {
namespace {

std::string ratio(double a, double b) { return b > 0 ? fmt::format("{:.2f}", a / b) : "-"; }

/// The six axes of a point of the design space, or the name of a mode.
std::vector<std::string> config_cells(const StudyConfig& config) {
  if (!config.name.empty()) return {"mode " + config.name, "", "", "", "", ""};
  const auto& o = config.options;
  return {std::string(to_string(o.v_granularity)), std::string(to_string(o.p_scale)),
          std::string(rounding_name(o)),           std::string(scores_name(o)),
          o.smooth_k ? "removed" : "kept",         fmt::format("{}", o.kv_block)};
}

}  // namespace

Table real_table(const ReportData& data) {
  Table table;
  table.header = {"entry", "keys", "heads"};
  for (const NamedMode& mode : compared_modes()) table.header.push_back(mode.name);
  table.header.insert(table.header.end(), {"accurate/half", "accurate/fp8_e4m3"});
  for (const RealErrors& one : data.real) {
    std::vector<std::string> row = {one.entry, fmt::format("{}", one.shape.seqlen_k),
                                    fmt::format("{}", one.shape.nheads_q)};
    for (const NamedMode& mode : compared_modes()) {
      row.push_back(percent(one.median_of(mode.name)));
    }
    row.push_back(ratio(one.median_of("accurate"), one.median_of("half")));
    row.push_back(ratio(one.median_of("accurate"), one.median_of("fp8_e4m3")));
    table.rows.push_back(std::move(row));
  }
  return table;
}

Table length_table(const ReportData& data) {
  Table table;
  table.header = {"recipe, mode"};
  std::map<std::string, std::map<std::string, std::vector<std::string>>> cells;
  std::vector<std::string> recipes;
  for (const LengthErrors& one : data.lengths) {
    if (std::find(recipes.begin(), recipes.end(), one.recipe) == recipes.end()) {
      recipes.push_back(one.recipe);
    }
    if (one.recipe == recipes.front()) table.header.push_back(length_label(one.seqlen_k));
    for (const auto& [mode, error] : one.by_mode) {
      cells[one.recipe][mode].push_back(percent(error));
    }
  }
  for (const std::string& recipe : recipes) {
    for (const NamedMode& mode : compared_modes()) {
      std::vector<std::string> row = {fmt::format("{}, {}", recipe, mode.name)};
      const auto& values = cells[recipe][mode.name];
      row.insert(row.end(), values.begin(), values.end());
      table.rows.push_back(std::move(row));
    }
  }
  return table;
}

Table study_table(const std::vector<StudyRecord>& records) {
  std::vector<std::string> columns;
  std::vector<std::vector<std::string>> order;
  std::map<std::vector<std::string>, std::map<std::string, std::string>> cells;
  for (const StudyRecord& record : records) {
    const std::string column = fmt::format("{} {}", record.data, length_label(record.seqlen_k));
    const std::vector<std::string> row = config_cells(record.config);
    if (std::find(columns.begin(), columns.end(), column) == columns.end()) {
      columns.push_back(column);
    }
    if (!cells.contains(row)) order.push_back(row);
    cells[row][column] = percent(record.rel_l2);
  }
  Table table;
  table.header = {"V granularity", "P scale", "rounding", "scores", "K mean", "kv_block"};
  table.header.insert(table.header.end(), columns.begin(), columns.end());
  for (const auto& row : order) {
    std::vector<std::string> line = row;
    for (const std::string& column : columns) line.push_back(cells[row][column]);
    table.rows.push_back(std::move(line));
  }
  return table;
}

Table peak_table(const ReportData& data) {
  Table table;
  table.header = {"kernel",  "ms",          "quantize ms", "GOP/s",
                  "of peak", "peak, GOP/s", "instruction", "relL2 %"};
  for (const BenchResult& one : data.peaks) {
    table.rows.push_back({one.kernel, milliseconds(one.median_ms), milliseconds(one.quantize_ms),
                          fmt::format("{:.0f}", one.gops),
                          one.peak_fraction ? fmt::format("{:.2f}", *one.peak_fraction) : "-",
                          one.peak_gops ? fmt::format("{:.0f}", *one.peak_gops) : "-",
                          one.peak_name.empty() ? "-" : std::string(one.peak_name),
                          one.rel_l2 ? percent(*one.rel_l2) : "-"});
  }
  return table;
}

std::vector<std::string> summary_lines(const ReportData& data) {
  std::vector<std::string> lines;
  if (!data.real.empty()) {
    std::vector<double> accurate, over_half, over_fp8;
    for (const RealErrors& one : data.real) {
      accurate.push_back(one.median_of("accurate"));
      over_half.push_back(one.median_of("accurate") / one.median_of("half"));
      over_fp8.push_back(one.median_of("accurate") / one.median_of("fp8_e4m3"));
    }
    lines.push_back(fmt::format(
        "Real tensors, {} entries: accurate errs by {} % (median; relative L2), between {:.2f} and "
        "{:.2f} times half (target at most 1.5) and between {:.2f} and {:.2f} times FP8 e4m3 "
        "(target at most 0.25).",
        data.real.size(), percent(median(accurate)),
        *std::min_element(over_half.begin(), over_half.end()),
        *std::max_element(over_half.begin(), over_half.end()),
        *std::min_element(over_fp8.begin(), over_fp8.end()),
        *std::max_element(over_fp8.begin(), over_fp8.end())));
  }
  for (const char* recipe : {"normal", "llm", "sink"}) {
    const LengthErrors* first = nullptr;
    const LengthErrors* last = nullptr;
    for (const LengthErrors& one : data.lengths) {
      if (one.recipe != recipe) continue;
      if (first == nullptr) first = &one;
      last = &one;
    }
    if (first == nullptr) continue;
    lines.push_back(
        fmt::format("Recipe {}, {} to {} keys: accurate {} to {} %, paper {} to {} %, FP8 e4m3 {} "
                    "to {} %, half "
                    "{} to {} %.",
                    recipe, length_label(first->seqlen_k), length_label(last->seqlen_k),
                    percent(first->by_mode.at("accurate")), percent(last->by_mode.at("accurate")),
                    percent(first->by_mode.at("paper")), percent(last->by_mode.at("paper")),
                    percent(first->by_mode.at("fp8_e4m3")), percent(last->by_mode.at("fp8_e4m3")),
                    percent(first->by_mode.at("half")), percent(last->by_mode.at("half"))));
  }
  if (!data.speed.rows.empty()) {
    const SpeedRow& row = data.speed.rows.back();
    const double accurate = row.total_ms("accurate");
    lines.push_back(fmt::format(
        "Speed at {} tokens, head_dim {}, {} threads, quantization included: accurate takes {:.2f} "
        "of the time of exact fp32 and {:.2f} of that of exact bf16 attention.",
        length_label(row.length), data.speed.head_dim, data.speed.threads,
        accurate / row.total_ms("exact_fp32"), accurate / row.total_ms("exact_bf16")));
  }
  return lines;
}

}  // namespace attn8::app
