// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attn8/context.hpp"
#include "bench.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "flags.hpp"
#include "machine.hpp"
#include "parallel.hpp"
#include "peak.hpp"
#include "table.hpp"

namespace attn8::app {
namespace {

struct BenchFlags {
  std::vector<std::string> shapes;
  std::string shapes_file;
  std::vector<std::string> modes = {"accurate"};
  std::string dtype = "float32";
  std::string recipe = "normal";
  OptionFlags options;
  ContextFlags context;
  std::vector<int32_t> threads;
  int repeats = 9;
  int64_t rows = 16;
  bool no_check = false;
  bool json = false;
};

std::string or_dash(const std::optional<double>& value, const char* format) {
  return value ? fmt::format(fmt::runtime(format), *value) : "-";
}

void run(const BenchFlags& flags) {
  std::vector<BenchCase> cases;
  if (!flags.shapes_file.empty()) cases = read_shapes("--shapes", flags.shapes_file);
  for (const auto& text : flags.shapes) {
    cases.push_back({parse_shape("--shape", text), false});
  }
  if (cases.empty()) {
    fail(StatusCode::kInvalidArgument, "--shape: got nothing, want B,Hq,Hkv,Sq,Sk,D");
  }
  const DType dtype = parse_float_dtype("--dtype", flags.dtype);
  std::vector<Context> contexts;
  for (const int32_t threads : flags.threads.empty() ? std::vector{core_count()} : flags.threads) {
    contexts.push_back(flags.context.context());
    contexts.back().threads = threads;
  }
  std::vector<AttentionOptions> modes;
  for (const auto& mode : flags.modes) {
    modes.push_back(flags.options.options(take(parse_mode(mode))));
  }

  std::vector<BenchResult> results;
  std::vector<Ceilings> ceilings;
  {
    Progress progress("bench", static_cast<double>(cases.size() * modes.size() * contexts.size()));
    for (const BenchCase& one : cases) {
      Qkv qkv = make_qkv(flags.recipe, 1, one.shape);
      if (dtype != DType::kFloat32) qkv = convert(qkv, dtype);
      for (AttentionOptions options : modes) {
        options.mask.causal = options.mask.causal || one.causal;
        for (const Context& context : contexts) {
          BenchOptions how;
          how.repeats = flags.repeats;
          how.rows = flags.no_check ? 0 : flags.rows;
          results.push_back(bench(qkv, options, context, how));
          progress.advance();
        }
      }
    }
    for (const Context& context : contexts) {
      ceilings.push_back(
          measure_ceilings(context.force_isa ? context.isa : best_isa(), context.threads));
    }
  }

  if (flags.json) {
    nlohmann::ordered_json report = {{"version", version()}, {"machine", machine_json()}};
    report["recipe"] = flags.recipe;
    report["ceilings"] = nlohmann::ordered_json::array();
    for (const auto& one : ceilings) report["ceilings"].push_back(one.json());
    report["results"] = nlohmann::ordered_json::array();
    for (const auto& result : results) report["results"].push_back(result.json());
    fmt::print("{}\n", report.dump());
    return;
  }
  Table table;
  table.header = {"BxHqxHkv SqxSk d", "causal",      "mode",  "kernel",        "threads", "ms",
                  "min ms",           "quantize ms", "GOP/s", "with quantize", "of peak", "GB/s",
                  "of stream",        "relL2 %"};
  for (const auto& r : results) {
    table.rows.push_back(
        {r.shape.label(), r.options.mask.causal ? "yes" : "no",
         std::string(to_string(r.options.mode)), r.kernel, std::to_string(r.threads),
         milliseconds(r.median_ms), milliseconds(r.min_ms), milliseconds(r.quantize_ms),
         fmt::format("{:.1f}", r.gops), fmt::format("{:.1f}", r.end_to_end_gops),
         or_dash(r.peak_fraction, "{:.3f}"),
         r.bytes_per_s ? fmt::format("{:.1f}", *r.bytes_per_s * 1e-9) : "-",
         or_dash(r.stream_fraction, "{:.3f}"), r.rel_l2 ? percent(*r.rel_l2) : "-"});
  }
  fmt::print("{}\n{}; fractions are of rates measured between the runs\n", table.text(),
             cpu_name());
  for (const Ceilings& one : ceilings) {
    fmt::print("{} {}:", one.threads, one.threads == 1 ? "thread" : "threads");
    for (const auto& rate : one.rates) fmt::print(" {} {:.0f} GOP/s,", rate.name, rate.gops);
    fmt::print(" memory {:.1f} GB/s\n", one.bytes_per_s * 1e-9);
  }
}

}  // namespace

void add_bench(CLI::App& root) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App& command = *root.add_subcommand(
      "bench", "Times attention, with the machine's peak measured between the runs");
  command
      .add_option("--shape", flags->shapes,
                  "Batch, query heads, kv heads, query length, key length, head_dim; repeatable")
      ->type_name("B,Hq,Hkv,Sq,Sk,D")
      ->allow_extra_args(false);
  command
      .add_option("--shapes", flags->shapes_file,
                  "A file of such shapes, one per line, each optionally followed by: causal")
      ->type_name("FILE");
  command.add_option("--mode", flags->modes, "accurate, paper, half, exact or fp8; repeatable")
      ->type_name("NAME")
      ->allow_extra_args(false)
      ->capture_default_str();
  command.add_option("--dtype", flags->dtype, "Type of Q, K and V: float32, float16, bfloat16")
      ->type_name("NAME")
      ->capture_default_str();
  command.add_option("--recipe", flags->recipe, "Synthetic data, see docs/numerics.md")
      ->type_name("NAME")
      ->capture_default_str();
  flags->options.add(command);
  flags->context.add_place(command);
  command
      .add_option("--threads", flags->threads,
                  "Threads, several counts between commas; the default is every core")
      ->check(whole_number(1, 4096))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("N,...");
  command.add_option("--repeats", flags->repeats, "Ratios to take the median of")
      ->check(whole_number(1, 100000))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--rows", flags->rows, "Query rows per head for the error against float64")
      ->check(whole_number(1))
      ->type_name("N")
      ->capture_default_str();
  command.add_flag("--no-check", flags->no_check, "Leave the error out");
  command.add_flag("--json", flags->json, "One JSON object on stdout");
  command.final_callback([flags] { run(*flags); });
}

}  // namespace attn8::app
