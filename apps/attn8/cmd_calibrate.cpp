// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "calibrate.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "file.hpp"
#include "flags.hpp"
#include "parallel.hpp"
#include "table.hpp"

namespace attn8::app {
namespace {

struct CalibrateFlags {
  std::vector<std::string> data;
  std::string model;
  double budget = 0.01;
  std::string out;
  ContextFlags context;
  bool json = false;
};

double relative(double error, double reference) {
  return error == 0 ? 0 : std::sqrt(error / reference);
}

/// Heads of the model asked for, or of the only one there is.
std::vector<HeadError> measure(CalibrateFlags& flags) {
  const Context context = flags.context.context();
  std::map<std::string, std::vector<HeadError>> models;
  for (const std::string& path : flags.data) {
    const RealTensors tensors("--data", path);
    Progress progress("calibrate", static_cast<double>(tensors.size()));
    for (size_t i = 0; i < tensors.size(); ++i) {
      const EntryName name = parse_entry_name("--data", tensors.name(i));
      std::vector<HeadError>& heads = models[name.model];
      if (flags.model.empty() || name.model == flags.model) {
        measure_entry(name, tensors.read(i), context, heads);
      }
      progress.advance();
    }
  }
  std::string names;
  for (const auto& [name, heads] : models) names += (names.empty() ? "" : ", ") + name;
  if (flags.model.empty() && models.size() > 1) {
    fail(StatusCode::kInvalidArgument, fmt::format("--model: got nothing, want one of {}", names));
  }
  if (flags.model.empty()) flags.model = models.begin()->first;
  if (!models.contains(flags.model)) {
    fail(StatusCode::kInvalidArgument,
         fmt::format("--model: got '{}', want one of {}", flags.model, names));
  }
  return models[flags.model];
}

nlohmann::ordered_json report_json(const CalibrateFlags& flags, const HeadPolicy& policy,
                                   const std::vector<HeadError>& heads, double before) {
  nlohmann::ordered_json report = {{"model", flags.model},
                                   {"budget", flags.budget},
                                   {"error_accurate", before},
                                   {"error", total_error(heads)}};
  report["heads"] = nlohmann::ordered_json::array();
  for (const HeadError& head : heads) {
    report["heads"].push_back({{"layer", head.layer},
                               {"kv_head", head.kv_head},
                               {"rel_l2_accurate", relative(head.accurate, head.reference)},
                               {"rel_l2_half", relative(head.half, head.reference)},
                               {"mode", to_string(head.mode)}});
  }
  report["policy"] = policy.json();
  return report;
}

void print_text(const CalibrateFlags& flags, const std::vector<HeadError>& heads, double before) {
  double all = 0;
  size_t moved = 0;
  for (const HeadError& head : heads) {
    all += head.accurate;
    moved += head.mode != Mode::kAccurate ? 1 : 0;
  }
  Table table;
  table.header = {"layer.head", "accurate relL2 %", "half relL2 %", "share of all error %", "mode"};
  for (const HeadError& head : heads) {
    table.rows.push_back({fmt::format("{}.{}", head.layer, head.kv_head),
                          percent(relative(head.accurate, head.reference)),
                          percent(relative(head.half, head.reference)),
                          fmt::format("{:.1f}", all > 0 ? 100 * head.accurate / all : 0.0),
                          std::string(to_string(head.mode))});
  }
  fmt::print(
      "{}\n{}: relative L2 error against exact {} %, {} % with {} of {} kv heads moved; "
      "budget {} %\n",
      table.text(), flags.model.empty() ? "the model" : flags.model, percent(before),
      percent(total_error(heads)), moved, heads.size(), percent(flags.budget));
}

void run(CalibrateFlags flags) {
  if (flags.data.empty()) flags.data.push_back(default_sample_path());
  std::optional<OutputFile> out;
  if (!flags.out.empty()) out.emplace("--out", flags.out);
  std::vector<HeadError> heads = measure(flags);
  for (const HeadError& head : heads) {
    if (std::isfinite(head.reference) && std::isfinite(head.accurate) && std::isfinite(head.half)) {
      continue;
    }
    fail(StatusCode::kInvalidArgument,
         fmt::format("--data: layer {}, kv head {} holds a NaN or an Inf, want finite tensors",
                     head.layer, head.kv_head));
  }
  const double before = total_error(heads);
  spend_budget(flags.budget, heads);
  HeadPolicy policy;
  policy.model = flags.model;
  for (const HeadError& head : heads) {
    if (head.mode != Mode::kAccurate) policy.heads[{head.layer, head.kv_head}] = head.mode;
  }
  if (out) out->write(policy.json().dump(1) + "\n");
  if (flags.json) {
    fmt::print("{}\n", report_json(flags, policy, heads, before).dump());
  } else {
    print_text(flags, heads, before);
  }
}

}  // namespace

void add_calibrate(CLI::App& root) {
  auto flags = std::make_shared<CalibrateFlags>();
  CLI::App& command = *root.add_subcommand(
      "calibrate", "Chooses the heads of a model that run in half or exact, for an error budget");
  command
      .add_option("--data", flags->data,
                  "Captured tensors (safetensors); repeatable; the default is the sample")
      ->type_name("FILE")
      ->allow_extra_args(false);
  command.add_option("--model", flags->model, "Which model of the files, where they hold several")
      ->type_name("NAME");
  command
      .add_option("--budget", flags->budget,
                  "Relative L2 error against exact, of all captured heads together")
      ->check(finite_number())
      ->check(CLI::NonNegativeNumber)
      ->type_name("X")
      ->capture_default_str();
  command.add_option("--out", flags->out, "Write the policy as JSON")->type_name("FILE");
  flags->context.add(command);
  command.add_flag("--json", flags->json, "One JSON object on stdout");
  command.final_callback([flags] { run(*flags); });
}

}  // namespace attn8::app
