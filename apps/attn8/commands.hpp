// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <CLI/CLI.hpp>

namespace attn8::app {

/// Each adds one subcommand. A subcommand runs inside CLI::App::parse and throws Failure.
void add_info(CLI::App& root);
void add_run(CLI::App& root);
void add_bench(CLI::App& root);
void add_verify(CLI::App& root);
void add_paper(CLI::App& root);
void add_study(CLI::App& root);
void add_report(CLI::App& root);
void add_soak(CLI::App& root);
void add_calibrate(CLI::App& root);

/// The whole command line: parses, runs, prints every failure as one line on stderr, and returns
/// the exit status.
int run_command_line(int argc, const char* const* argv);

}  // namespace attn8::app
