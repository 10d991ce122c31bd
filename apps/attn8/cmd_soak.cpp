// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "commands.hpp"
#include "failure.hpp"
#include "flags.hpp"
#include "soak.hpp"

namespace attn8::app {
namespace {

/// About 15 s on one core of a Zen 4.
constexpr int64_t kDefaultOperations = 500000;

struct SoakFlags {
  SoakOptions options = {.operations = kDefaultOperations};
  bool json = false;
};

double mebibytes(size_t bytes) { return static_cast<double>(bytes) / 0x1p20; }

void print_text(const SoakFlags& flags, const SoakReport& report) {
  fmt::print(
      "{} operations in {:.1f} s, {:.0f} per second: {} sequences, {} tokens appended, {} "
      "queries attended\n",
      report.operations, report.seconds, static_cast<double>(report.operations) / report.seconds,
      report.sequences, report.tokens, report.rows);
  for (const auto& [name, count] : report.counts) fmt::print("  {:13} {:>9}\n", name, count);
  fmt::print("oracle: {} results compared, worst |out-oracle|/bound {:.3f}, LSE {:.3f}\n",
             report.checks, report.worst_out_ratio, report.worst_lse_ratio);
  fmt::print(
      "memory: {} of {} pages at most; resident {:.1f} MiB at the start, {:.1f} at most, "
      "{:.1f} at the end{}\n",
      report.peak_pages, flags.options.pages, mebibytes(report.rss_start_bytes),
      mebibytes(report.rss_peak_bytes), mebibytes(report.rss_end_bytes),
      report.rss_judged ? "" : " (not judged: the sanitizer keeps what is freed)");
  for (const std::string& failure : report.failures) fmt::print("failed: {}\n", failure);
}

void run(const SoakFlags& flags) {
  const SoakReport report = soak(flags.options);
  if (flags.json) {
    nlohmann::ordered_json json = {{"seed", flags.options.seed},
                                   {"threads", flags.options.threads},
                                   {"pages", flags.options.pages},
                                   {"page_size", kSoakPageSize}};
    json.update(report.json());
    fmt::print("{}\n", json.dump());
  } else {
    print_text(flags, report);
  }
  if (!report.failures.empty()) {
    fail(StatusCode::kInternal,
         fmt::format("soak: seed {}, {}", flags.options.seed, report.failures.front()));
  }
}

}  // namespace

void add_soak(CLI::App& root) {
  auto flags = std::make_shared<SoakFlags>();
  CLI::App& command = *root.add_subcommand(
      "soak",
      "Drives a KV cache at random under a memory cap against a model and the oracle; exit "
      "1 if anything is wrong");
  command.add_option("--operations", flags->options.operations, "Calls to make, of all threads")
      ->check(whole_number(1, int64_t{1} << 40))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--seed", flags->options.seed, "Decides everything")
      ->check(whole_number(0, int64_t{1} << 40))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--pages", flags->options.pages, "Pages of the cache, of 64 tokens each")
      ->check(whole_number(8, 1 << 20))
      ->type_name("N")
      ->capture_default_str();
  command
      .add_option("--threads", flags->options.threads,
                  "Threads, each with sequences of its own in the one cache")
      ->check(whole_number(1, 256))
      ->type_name("N")
      ->capture_default_str();
  command
      .add_option("--check-every", flags->options.check_every,
                  "Attended sequences per one that is compared with the oracle")
      ->check(whole_number(1))
      ->type_name("N")
      ->capture_default_str();
  command.add_flag("--json", flags->json, "One JSON object on stdout");
  command.final_callback([flags] { run(*flags); });
}

}  // namespace attn8::app
