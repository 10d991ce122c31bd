// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "paper_tables.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <span>

#include "attn8/reference.hpp"
#include "bench.hpp"
#include "failure.hpp"
#include "measure.hpp"

namespace attn8::app {
namespace {

constexpr std::array<int64_t, 5> kLengths = {1024, 2048, 4096, 8192, 16384};

// arXiv:2409.16997, Tables 1 and 2, percent: FP8 (e5m2 without a scale), half INT8, full INT8.
struct Published {
  std::array<double, 5> fp8, half, full;
};
constexpr Published kNormal = {{7.46, 7.50, 7.66, 7.51, 7.57},
                               {0.890, 0.802, 0.843, 0.932, 0.775},
                               {4.05, 4.18, 4.21, 4.38, 4.52}};
constexpr Published kUniform = {{8.94, 9.15, 8.89, 9.02, 8.97},
                                {0.317, 0.300, 0.280, 0.299, 0.296},
                                {1.69, 1.62, 1.65, 1.85, 1.82}};

// Its speed figure: time saved over FlashAttention in FP16.
constexpr std::array<double, 5> kPublishedSaving = {0.31, 0.52, 0.66, 0.72, 0.73};

std::optional<double> published(const Published& table, const std::string& mode, size_t row) {
  if (mode == "fp8_e5m2") return table.fp8[row];
  if (mode == "half") return table.half[row];
  if (mode == "paper") return table.full[row];
  return std::nullopt;
}

PaperCell cell_of(const NamedMode& mode, const std::vector<double>& out,
                  const std::vector<double>& exact, size_t dim) {
  PaperCell cell;
  cell.mode = mode.name;
  const auto all = reference::error_report(out, exact);
  cell.rel_l2 = all.rel_l2;
  cell.mean_rel = all.mean_rel;
  std::vector<double> draws;
  double sum = 0;
  for (size_t i = 0; i < exact.size(); i += dim) {
    const auto row =
        reference::error_report(std::span(out).subspan(i, dim), std::span(exact).subspan(i, dim));
    draws.push_back(row.mre_last4);
    sum += row.mre_last4;
  }
  cell.mre_last4_mean = draws.empty() ? 0 : sum / static_cast<double>(draws.size());
  cell.mre_last4_median = median(draws);
  return cell;
}

}  // namespace

double paper_tables_work(int64_t seeds) {
  double tokens = 0;
  for (const int64_t length : kLengths) tokens += static_cast<double>(length);
  return 2 * tokens * static_cast<double>(seeds);
}

std::vector<PaperTable> paper_tables(const Context& context, int64_t seeds, int64_t rows,
                                     const std::function<void(double)>& done) {
  std::vector<PaperTable> tables(2);
  tables[0].distribution = "normal";
  tables[0].softmax_scale = 1 / std::sqrt(static_cast<float>(tables[0].head_dim));
  tables[1].distribution = "uniform";
  tables[1].softmax_scale = 1;
  for (PaperTable& table : tables) {
    const Published& figures = table.distribution == "normal" ? kNormal : kUniform;
    table.draws = seeds * rows;
    for (size_t n = 0; n < kLengths.size(); ++n) {
      // Heads are independent of each other: each is a seed.
      const Qkv qkv =
          make_qkv(table.distribution, 11, {1, seeds, seeds, rows, kLengths[n], table.head_dim});
      const Sample sample = Sample::spread(qkv.shape(), rows, seeds);
      const auto exact = exact_rows(qkv, table.softmax_scale, {}, sample, context.threads);
      PaperTable::Row row = {kLengths[n], {}};
      for (NamedMode mode : compared_modes()) {
        mode.options.softmax_scale = table.softmax_scale;
        row.cells.push_back(cell_of(mode, mode_rows(qkv, mode.options, context, sample), exact,
                                    static_cast<size_t>(table.head_dim)));
        row.cells.back().published = published(figures, mode.name, n);
      }
      table.rows.push_back(std::move(row));
      done(static_cast<double>(kLengths[n] * seeds));
    }
  }
  return tables;
}

Table PaperTable::beside_published() const {
  Table result;
  result.header = {"N"};
  const std::array<std::pair<const char*, const char*>, 3> order = {
      {{"fp8_e5m2", "FP8 e5m2"}, {"half", "half"}, {"paper", "full INT8"}}};
  for (const auto& [mode, title] : order) {
    result.header.push_back(fmt::format("{}: published", title));
    result.header.push_back("mean_rel");
    result.header.push_back("last4");
  }
  for (const Row& row : rows) {
    std::vector<std::string> line = {length_label(row.length)};
    for (const auto& [mode, title] : order) {
      const PaperCell& one = row.cell(mode);
      line.push_back(fmt::format("{:.3g}", one.published.value_or(0)));
      line.push_back(percent(one.mean_rel));
      line.push_back(percent(one.mre_last4_median));
    }
    result.rows.push_back(std::move(line));
  }
  return result;
}

Table PaperTable::rel_l2() const {
  Table result;
  result.header = {
      "N", "FP8 e5m2 raw", "FP8 e4m3 scaled", "paper (full INT8)", "accurate (full INT8)", "half"};
  for (const Row& row : rows) {
    std::vector<std::string> line = {length_label(row.length)};
    for (const char* mode : {"fp8_e5m2", "fp8_e4m3", "paper", "accurate", "half"}) {
      line.push_back(percent(row.cell(mode).rel_l2));
    }
    result.rows.push_back(std::move(line));
  }
  return result;
}

const PaperCell& PaperTable::Row::cell(std::string_view mode) const {
  for (const PaperCell& one : cells) {
    if (one.mode == mode) return one;
  }
  fail(StatusCode::kInternal, fmt::format("no column {}", mode));
}

nlohmann::ordered_json PaperTable::json() const {
  nlohmann::ordered_json result = {{"distribution", distribution},
                                   {"softmax_scale", softmax_scale},
                                   {"head_dim", head_dim},
                                   {"draws", draws},
                                   {"rows", nlohmann::ordered_json::array()}};
  for (const Row& row : rows) {
    nlohmann::ordered_json line = {{"seqlen_k", row.length}};
    for (const PaperCell& cell : row.cells) {
      line[cell.mode] = {
          {"published_percent", cell.published ? nlohmann::ordered_json(*cell.published)
                                               : nlohmann::ordered_json(nullptr)},
          {"mre_last4_mean", cell.mre_last4_mean},
          {"mre_last4_median", cell.mre_last4_median},
          {"mean_rel", cell.mean_rel},
          {"rel_l2", cell.rel_l2}};
    }
    result["rows"].push_back(line);
  }
  return result;
}

double speed_figure_work() {
  double work = 0;
  for (const int64_t length : kLengths) work += static_cast<double>(length * length);
  return work;
}

SpeedFigure speed_figure(const Context& context, double max_seconds,
                         const std::function<void(double)>& done) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  SpeedFigure figure;
  figure.heads = 2;
  figure.threads = context.threads;
  for (size_t n = 0; n < kLengths.size(); ++n) {
    const auto row_begin = Clock::now();
    const int64_t length = kLengths[n];
    const Qkv qkv =
        make_qkv("normal", 3, {1, figure.heads, figure.heads, length, length, figure.head_dim});
    const Qkv brain = convert(qkv, DType::kBFloat16);
    SpeedRow row;
    row.length = length;
    row.published_saving = kPublishedSaving[n];
    for (const auto& [name, mode] : {std::pair{"exact_fp32", Mode::kExact},
                                     {"exact_bf16", Mode::kExact},
                                     {"half", Mode::kHalf},
                                     {"paper", Mode::kPaper},
                                     {"accurate", Mode::kAccurate}}) {
      AttentionOptions options;
      options.mode = mode;
      BenchOptions how;
      how.repeats = 5;
      how.rows = 0;
      how.peak_ms = 0.5;
      how.max_seconds = 2.5;
      const auto result =
          bench(std::string(name) == "exact_bf16" ? brain : qkv, options, context, how);
      row.cells.push_back({name, result.min_ms, result.min_quantize_ms});
    }
    figure.rows.push_back(std::move(row));
    done(static_cast<double>(length * length));
    const auto time = Clock::now();
    const double spent = std::chrono::duration<double>(time - begin).count();
    const double last = std::chrono::duration<double>(time - row_begin).count();
    // Twice the length takes four times as long.
    if (n + 1 < kLengths.size() && spent + 4 * last > max_seconds) {
      figure.shortened = true;
      break;
    }
  }
  return figure;
}

double SpeedRow::total_ms(const std::string& name) const {
  for (const Cell& cell : cells) {
    if (cell.name == name) return cell.attention_ms + cell.quantize_ms;
  }
  return 0;
}

Table SpeedFigure::table() const {
  Table result;
  result.header = {
      "N",           "exact fp32 ms",     "exact bf16 ms",     "half ms",           "paper ms",
      "accurate ms", "of which quantize", "saved over fp32 %", "saved over bf16 %", "published %"};
  for (const SpeedRow& row : rows) {
    const double accurate = row.total_ms("accurate");
    std::vector<std::string> line = {length_label(row.length)};
    for (const char* name : {"exact_fp32", "exact_bf16", "half", "paper", "accurate"}) {
      line.push_back(milliseconds(row.total_ms(name)));
    }
    line.push_back(milliseconds(row.cells.back().quantize_ms));
    line.push_back(fmt::format("{:.0f}", 100 * (1 - accurate / row.total_ms("exact_fp32"))));
    line.push_back(fmt::format("{:.0f}", 100 * (1 - accurate / row.total_ms("exact_bf16"))));
    line.push_back(fmt::format("{:.0f}", 100 * row.published_saving));
    result.rows.push_back(std::move(line));
  }
  return result;
}

nlohmann::ordered_json SpeedFigure::json() const {
  nlohmann::ordered_json result = {{"head_dim", head_dim},
                                   {"heads", heads},
                                   {"threads", threads},
                                   {"shortened", shortened},
                                   {"rows", nlohmann::ordered_json::array()}};
  for (const SpeedRow& row : rows) {
    nlohmann::ordered_json line = {{"seqlen", row.length},
                                   {"published_saving", row.published_saving}};
    for (const auto& cell : row.cells) {
      line[cell.name] = {{"attention_ms", cell.attention_ms}, {"quantize_ms", cell.quantize_ms}};
    }
    result["rows"].push_back(line);
  }
  return result;
}

}  // namespace attn8::app
