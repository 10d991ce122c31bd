// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "attn8/context.hpp"
#include "commands.hpp"
#include "file.hpp"
#include "flags.hpp"
#include "machine.hpp"
#include "real_tensors.hpp"
#include "report_data.hpp"
#include "report_page.hpp"
#include "report_speed.hpp"

namespace attn8::app {
namespace {

struct ReportFlags {
  std::string out = "build/report/index.html";
  std::vector<std::string> data;
  std::string study;
  std::string peers;
  int64_t max_length = 131072;
  ContextFlags context;
  bool json = false;
};

std::string read_text(const std::string& argument, const std::string& path) {
  const InputFile file(argument, path);
  std::string text(static_cast<size_t>(file.size_bytes()), ' ');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

/// The file named, else the committed one where it exists.
std::string committed_text(const std::string& argument, const std::string& named,
                           const std::string& committed) {
  if (!named.empty()) return read_text(argument, named);
  return std::filesystem::exists(committed) ? read_text(argument, committed) : std::string();
}

void print_text(const ReportData& data) {
  fmt::print("Real tensors: relative L2 error against float64, %, median over the heads\n{}\n",
             real_table(data).text());
  fmt::print("Error against length: relative L2, %, head_dim {}, {} query rows\n{}\n",
             data.length_dim, data.length_rows, length_table(data).text());
  int number = 1;
  for (const PaperTable& table : data.tables) {
    fmt::print(
        "Table {} of arXiv:2409.16997: {}, head_dim {}, scale {:.3g}; percent; mean_rel and the "
        "median of the four-element metric\nbeside the published mean relative error\n{}\n"
        "Relative L2 error of every mode, percent\n{}\n",
        number++, table.distribution, table.head_dim, table.softmax_scale,
        table.beside_published().text(), table.rel_l2().text());
  }
  fmt::print("Design study: relative L2, %\n{}\n", study_table(data.study).text());
  fmt::print("Kernels, one thread, 4096 x 4096, not causal\n{}\n", peak_table(data).text());
  fmt::print("Roofline, one thread, memory {:.1f} GB/s\n{}\n", data.ceilings.bytes_per_s * 1e-9,
             roofline_table(data).text());
  fmt::print(
      "Speed: {}, {} threads, {} heads, head_dim {}, not causal, quantization included\n{}\n",
      cpu_name(), data.speed.threads, data.speed.heads, data.speed.head_dim,
      data.speed.table().text());
  for (const std::string& line : summary_lines(data)) fmt::print("{}\n", line);
}

void run(const ReportFlags& flags) {
  const auto begin = std::chrono::steady_clock::now();
  ReportOptions options;
  options.data = flags.data.empty() ? std::vector{default_sample_path()} : flags.data;
  options.context = flags.context.context();
  options.max_length = flags.max_length;
  const auto folder = std::filesystem::path(flags.out).parent_path();
  if (!folder.empty()) make_directories("--out", folder.string());
  const OutputFile out("--out", flags.out);
  const CommittedResults committed = {
      committed_text("--study", flags.study, committed_study_path()),
      committed_text("--peers", flags.peers, committed_peers_path())};
  for (const std::string& path : options.data) static_cast<void>(RealTensors("--data", path));

  const bool terminal = isatty(STDERR_FILENO) != 0;
  const ReportData data = collect_report(options, [&](const std::string& stage) {
    if (terminal) fmt::print(stderr, "report: {}\n", stage);
  });
  out.write(report_page(data, committed));
  if (flags.json) {
    nlohmann::ordered_json report = {{"version", version()}, {"machine", machine_json()}};
    report.update(data.json());
    fmt::print("{}\n", report.dump());
    return;
  }
  print_text(data);
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
  fmt::print("\n{} written in {:.0f} s\n", out.path(), spent.count());
}

}  // namespace

void add_report(CLI::App& root) {
  auto flags = std::make_shared<ReportFlags>();
  CLI::App& command =
      *root.add_subcommand("report", "Every study in one self-contained page, and in the terminal");
  command.add_option("--out", flags->out, "The page")->type_name("FILE")->capture_default_str();
  command
      .add_option("--data", flags->data,
                  "Captured tensors, safetensors, repeatable; the default is the committed sample")
      ->type_name("FILE")
      ->allow_extra_args(false);
  command
      .add_option("--study", flags->study,
                  "JSON of attn8 study to show; the default is docs/results/study.json")
      ->type_name("FILE");
  command
      .add_option("--peers", flags->peers,
                  "JSON of benchmarks/peers to show; the default is docs/results/peers_cpu.json")
      ->type_name("FILE");
  command.add_option("--max-length", flags->max_length, "Longest sequence of the error curves")
      ->check(whole_number(1024, 1 << 22))
      ->type_name("N")
      ->capture_default_str();
  flags->context.add(command);
  command.add_flag("--json", flags->json, "One JSON object on stdout");
  command.final_callback([flags] { run(*flags); });
}

}  // namespace attn8::app
