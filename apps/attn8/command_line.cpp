// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <new>
#include <string>

#include "attn8/context.hpp"
#include "commands.hpp"
#include "failure.hpp"

namespace attn8::app {
namespace {

int report_failure(std::string message, int code) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  message.erase(message.find_last_not_of(' ') + 1);
  fmt::print(stderr, "attn8: {}\n", message);
  return code;
}

/// CLI11 alone would answer an unknown first word with "a subcommand is required".
void require_command(const CLI::App& root, int argc, const char* const* argv) {
  const std::string word = argc > 1 ? argv[1] : "";
  if (word.starts_with('-')) return;
  std::string names;
  for (const CLI::App* command : root.get_subcommands([](const CLI::App*) { return true; })) {
    if (command->get_name() == word) return;
    names += (names.empty() ? "" : ", ") + command->get_name();
  }
  fail(StatusCode::kInvalidArgument,
       fmt::format("subcommand: got {}, want one of {}",
                   word.empty() ? "nothing" : "'" + word + "'", names));
}

}  // namespace

int run_command_line(int argc, const char* const* argv) {
  CLI::App root("Attention in eight bits: INT8 attention on the CPU, its oracles and its studies",
                "attn8");
  root.set_version_flag("--version", std::string(version()));
  root.require_subcommand(1);
  try {
    add_info(root);
    add_run(root);
    add_bench(root);
    add_verify(root);
    add_paper(root);
    add_study(root);
    add_report(root);
    add_soak(root);
    add_calibrate(root);
    require_command(root, argc, argv);
    root.parse(argc, argv);
    return 0;
  } catch (const CLI::Success& success) {  // --help and --version
    return root.exit(success);
  } catch (const CLI::ParseError& error) {
    return report_failure(error.what(), exit_code(StatusCode::kInvalidArgument));
  } catch (const Failure& failure) {
    return report_failure(failure.what(), exit_code(failure.status().code()));
  } catch (const std::bad_alloc&) {
    return report_failure("out of memory", exit_code(StatusCode::kOutOfMemory));
  } catch (const std::exception& error) {
    return report_failure(error.what(), exit_code(StatusCode::kInternal));
  }
}

}  // namespace attn8::app
