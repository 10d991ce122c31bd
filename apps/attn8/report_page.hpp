// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "report_data.hpp"
#include "table.hpp"

namespace attn8::app {

/// One line per entry of the real tensors: median error of its heads by mode, and the ratios the
/// targets are about.
Table real_table(const ReportData& data);

/// One line per recipe and mode, one column per length.
Table length_table(const ReportData& data);

/// V granularity x P scale, one column per data set, then the other axes one at a time.
Table study_table(const std::vector<StudyRecord>& records);

/// Rate, share of the measured peak and error of each kernel at 4096 x 4096 on one thread.
Table peak_table(const ReportData& data);

/// The findings in a few sentences, computed from the data.
std::vector<std::string> summary_lines(const ReportData& data);

/// JSON texts of long runs that the page shows beside its own measurements; empty: left out.
struct CommittedResults {
  std::string study;  ///< of attn8 study
  std::string peers;  ///< of benchmarks/peers
};

std::string report_page(const ReportData& data, const CommittedResults& committed);

}  // namespace attn8::app
