// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

#include "html.hpp"
#include "report_data.hpp"
#include "table.hpp"

namespace attn8::app {

/// Time against exact attention, and each kernel's share of its instruction's peak.
void speed_section(HtmlPage& page, const ReportData& data);

/// The kernels as points under the machine's ceilings.
void roofline_section(HtmlPage& page, const ReportData& data);

/// One line per point of the roofline: its rate beside what the ceilings allow.
Table roofline_table(const ReportData& data);

/// Other libraries beside attn8, from the JSON text that benchmarks/peers writes; nothing where the
/// text is not one.
void peers_section(HtmlPage& page, const std::string& text);

}  // namespace attn8::app
