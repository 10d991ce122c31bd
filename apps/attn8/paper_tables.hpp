// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/context.hpp"
#include "table.hpp"

namespace attn8::app {

/// The error of one mode on one distribution and length.
struct PaperCell {
  std::string mode;
  /// Published "mean relative error" in percent; absent where the paper has no such column.
  std::optional<double> published;
  /// The same metric, that of the script published with the paper: mean(|o - r| / (|r| + 1e-5))
  /// over the last four elements of the output, as a fraction; mean and median over the draws.
  double mre_last4_mean = 0;
  double mre_last4_median = 0;
  double rel_l2 = 0;
  double mean_rel = 0;
};

/// Table 1 (normal) or Table 2 (uniform) of arXiv:2409.16997.
struct PaperTable {
  std::string distribution;
  float softmax_scale = 0;
  int64_t head_dim = 64;
  int64_t draws = 0;
  struct Row {
    int64_t length = 0;
    std::vector<PaperCell> cells;
    [[nodiscard]] const PaperCell& cell(std::string_view mode) const;
  };
  std::vector<Row> rows;

  /// The paper's three columns, each with mean_rel and the median of the four-element metric.
  [[nodiscard]] Table beside_published() const;
  /// The relative L2 error of every mode.
  [[nodiscard]] Table rel_l2() const;
  [[nodiscard]] nlohmann::ordered_json json() const;
};

/// Both tables, with `seeds` independent K and V and `rows` queries each; every query gives one
/// draw of the four-element metric. `done` is told the tokens handled, of paper_tables_work().
std::vector<PaperTable> paper_tables(const Context& context, int64_t seeds, int64_t rows,
                                     const std::function<void(double)>& done);
double paper_tables_work(int64_t seeds);

/// One length of the speed figure.
struct SpeedRow {
  int64_t length = 0;
  struct Cell {
    std::string name;         ///< "exact_fp32", "exact_bf16", "half", "paper", "accurate"
    double attention_ms = 0;  ///< best of the runs: other load only ever adds
    double quantize_ms = 0;
  };
  std::vector<Cell> cells;
  /// Time the paper says full INT8 saves over FlashAttention in FP16 on its GPU; a fraction.
  double published_saving = 0;

  [[nodiscard]] double total_ms(const std::string& name) const;
};

struct SpeedFigure {
  int64_t head_dim = 64;
  int64_t heads = 0;
  int32_t threads = 0;
  std::vector<SpeedRow> rows;
  bool shortened = false;  ///< lengths were left out because the machine is slow

  [[nodiscard]] Table table() const;
  [[nodiscard]] nlohmann::ordered_json json() const;
};

/// Times every mode against exact attention over 1k to 16k tokens; stops before a length that
/// would pass `max_seconds` in total.
SpeedFigure speed_figure(const Context& context, double max_seconds,
                         const std::function<void(double)>& done);
double speed_figure_work();

}  // namespace attn8::app
