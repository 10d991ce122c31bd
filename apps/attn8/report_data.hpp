// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attn8/context.hpp"
#include "bench.hpp"
#include "paper_tables.hpp"
#include "peak.hpp"
#include "study.hpp"

namespace attn8::app {

/// Errors on one entry of captured tensors.
struct RealErrors {
  std::string entry;
  std::string source;
  Shape shape;
  bool causal = false;
  int64_t rows = 0;
  /// Relative L2 error of each query head, by mode.
  std::map<std::string, std::vector<double>> by_mode;

  [[nodiscard]] double median_of(const std::string& mode) const;
};

/// Errors on one recipe at one length.
struct LengthErrors {
  std::string recipe;
  int64_t seqlen_k = 0;
  std::map<std::string, double> by_mode;
};

/// Everything the report shows.
struct ReportData {
  std::vector<std::string> data_files;
  std::vector<RealErrors> real;
  std::vector<LengthErrors> lengths;
  int64_t length_rows = 0;
  int64_t length_dim = 128;
  std::vector<PaperTable> tables;
  SpeedFigure speed;
  std::vector<BenchResult> peaks;
  Ceilings ceilings;                     ///< of one thread
  std::vector<BenchResult> few_queries;  ///< against a long cache, one thread
  std::vector<StudyRecord> study;

  /// The points of the roofline: few_queries and peaks.
  [[nodiscard]] std::vector<const BenchResult*> roofline() const;
  [[nodiscard]] nlohmann::ordered_json json() const;
};

struct ReportOptions {
  std::vector<std::string> data;  ///< safetensors files
  Context context;
  int64_t max_length = 131072;
  double max_speed_seconds = 30;  ///< the speed figure stops growing there
};

/// Runs every part; `stage` is told each part's name before it starts.
ReportData collect_report(const ReportOptions& options,
                          const std::function<void(const std::string&)>& stage);

}  // namespace attn8::app
