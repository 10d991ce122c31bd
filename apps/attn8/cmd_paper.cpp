// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "attn8/context.hpp"
#include "commands.hpp"
#include "flags.hpp"
#include "machine.hpp"
#include "paper_tables.hpp"
#include "parallel.hpp"

namespace attn8::app {
namespace {

struct PaperFlags {
  ContextFlags context;
  int64_t seeds = 8;
  int64_t rows = 64;
  bool no_speed = false;
  bool json = false;
};

void run(const PaperFlags& flags) {
  const Context context = flags.context.context();
  std::vector<PaperTable> tables;
  {
    Progress progress("tables", paper_tables_work(flags.seeds));
    tables = paper_tables(context, flags.seeds, flags.rows,
                          [&](double work) { progress.advance(work); });
  }
  SpeedFigure speed;
  if (!flags.no_speed) {
    Progress progress("speed", speed_figure_work());
    constexpr double kMaxSeconds = 300;
    speed = speed_figure(context, kMaxSeconds, [&](double work) { progress.advance(work); });
  }
  if (flags.json) {
    nlohmann::ordered_json report = {{"version", version()},
                                     {"machine", machine_json()},
                                     {"paper", "arXiv:2409.16997"},
                                     {"tables", nlohmann::ordered_json::array()}};
    for (const PaperTable& table : tables) report["tables"].push_back(table.json());
    if (!flags.no_speed) report["speed"] = speed.json();
    fmt::print("{}\n", report.dump());
    return;
  }
  int number = 1;
  for (const PaperTable& table : tables) {
    fmt::print(
        "Table {} of arXiv:2409.16997: {}, head_dim {}, softmax scale {:.3g}; percent\n"
        "published: the paper's \"mean relative error\". mean_rel: ours, mean|o-r| / mean|r|. "
        "last4: "
        "ours by the metric\nof its script, mean(|o-r| / (|r|+1e-5)) over the last four elements; "
        "median of {} draws.\n{}\nRelative L2 error, ||o-r|| / ||r||, percent\n{}\n",
        number++, table.distribution, table.head_dim, table.softmax_scale, table.draws,
        table.beside_published().text(), table.rel_l2().text());
  }
  if (!flags.no_speed) {
    fmt::print(
        "Speed on this CPU: {}, {} threads, {} heads, head_dim {}, not causal; quantization "
        "included.\n{}",
        cpu_name(), speed.threads, speed.heads, speed.head_dim, speed.table().text());
    if (speed.shortened) fmt::print("Longer lengths left out: they would take too long here.\n");
  }
}

}  // namespace

void add_paper(CLI::App& root) {
  auto flags = std::make_shared<PaperFlags>();
  CLI::App& command = *root.add_subcommand(
      "paper", "Tables 1 and 2 and the speed figure of arXiv:2409.16997, ours beside theirs");
  flags->context.add(command);
  command.add_option("--seeds", flags->seeds, "Independent K and V per cell")
      ->check(whole_number(1, 1024))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--rows", flags->rows, "Queries per seed")
      ->check(whole_number(1, 4096))
      ->type_name("N")
      ->capture_default_str();
  command.add_flag("--no-speed", flags->no_speed, "Only the tables");
  command.add_flag("--json", flags->json, "One JSON object on stdout");
  command.final_callback([flags] { run(*flags); });
}

}  // namespace attn8::app
