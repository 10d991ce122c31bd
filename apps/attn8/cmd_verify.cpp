// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attn8/attention.hpp"
#include "attn8/cuda.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "flags.hpp"
#include "parallel.hpp"
#include "table.hpp"
#include "verify.hpp"

namespace attn8::app {
namespace {

struct VerifyFlags {
  std::vector<std::string> modes;
  ContextFlags context;
  bool full = false;
  bool json = false;
};

/// Outcomes of one mode on one ISA or device.
struct Tally {
  Mode mode;
  std::string place;
  int64_t cases = 0;
  int64_t unsupported = 0;  ///< of a device; not among the cases
  int64_t failed = 0;
  double out_ratio = 0;
  double lse_ratio = 0;
  double rel_l2 = 0;  ///< worst on normal data
  std::string worst;  ///< case with the largest out_ratio
  std::vector<std::string> failures;
};

std::vector<Isa> chosen_isas(const std::string& name) {
  if (name.empty()) return available_isas();
  const Isa isa = take(parse_isa(name));
  for (const IsaSupport& support : isa_support()) {
    if (support.isa == isa && !support.available) {
      fail(StatusCode::kUnavailable,
           fmt::format("--isa: got '{}', want one this machine can run: {}", name, support.reason));
    }
  }
  return {isa};
}

/// `places` names what each of the outcomes of a case ran on.
std::vector<Tally> sweep(
    const VerifyFlags& flags, const std::vector<std::string>& places,
    const std::function<std::vector<VerifyOutcome>(const VerifyCase&)>& verify) {
  std::vector<Mode> modes;
  for (const auto& name : flags.modes) modes.push_back(take(parse_mode(name)));
  if (modes.empty()) modes = {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact};

  std::vector<Tally> tallies;
  std::vector<std::pair<size_t, VerifyCase>> work;  // (first tally of the mode, case)
  for (const Mode mode : modes) {
    for (const VerifyCase& one : verify_cases(mode, flags.full)) {
      work.emplace_back(tallies.size(), one);
    }
    for (const std::string& place : places) {
      tallies.emplace_back();
      tallies.back().mode = mode;
      tallies.back().place = place;
    }
  }
  Progress progress("verify", static_cast<double>(work.size()));
  std::mutex mutex;
  const int32_t threads = flags.context.threads > 0 ? flags.context.threads : core_count();
  parallel_cases(static_cast<int64_t>(work.size()), threads, [&](int64_t i) {
    const auto& [first, one] = work[static_cast<size_t>(i)];
    const auto outcomes = verify(one);
    const std::lock_guard lock(mutex);
    for (size_t n = 0; n < places.size(); ++n) {
      Tally& tally = tallies[first + n];
      const VerifyOutcome& outcome = outcomes[n];
      if (!outcome.unsupported.empty()) {
        ++tally.unsupported;
        continue;
      }
      ++tally.cases;
      if (!outcome.failure.empty()) {
        ++tally.failed;
        tally.failures.push_back(fmt::format("{} {}: {}", places[n], one.label(), outcome.failure));
      }
      if (outcome.out_ratio >= tally.out_ratio) {
        tally.out_ratio = outcome.out_ratio;
        tally.worst = one.label();
      }
      tally.lse_ratio = std::max(tally.lse_ratio, outcome.lse_ratio);
      if (one.data == Data::kNormal) tally.rel_l2 = std::max(tally.rel_l2, outcome.rel_l2);
    }
    progress.advance();
  });
  return tallies;
}

void print_text(const std::vector<Tally>& tallies, const std::vector<std::string>& quantize) {
  Table table;
  table.header = {"on",
                  "mode",
                  "cases",
                  "unsupported",
                  "failed",
                  "worst |out-oracle|/bound",
                  "worst |lse-oracle|/bound",
                  "worst relL2 % (normal data)"};
  const Tally* worst = nullptr;
  for (const Tally& tally : tallies) {
    table.rows.push_back({tally.place, std::string(to_string(tally.mode)),
                          fmt::format("{}", tally.cases), fmt::format("{}", tally.unsupported),
                          fmt::format("{}", tally.failed), fmt::format("{:.3f}", tally.out_ratio),
                          fmt::format("{:.3f}", tally.lse_ratio), percent(tally.rel_l2)});
    if (worst == nullptr || tally.out_ratio > worst->out_ratio) worst = &tally;
  }
  fmt::print("{}", table.text());
  if (worst != nullptr) {
    fmt::print("\nworst case: {} {}\n", worst->place, worst->worst);
  }
  fmt::print("quantize: codes, scales and means of every ISA {}\n",
             quantize.empty() ? "equal the scalar ones" : "DIFFER");
  // The first few of each kind say enough; --json has all.
  constexpr size_t kShown = 3;
  for (const Tally& tally : tallies) {
    for (size_t i = 0; i < std::min(kShown, tally.failures.size()); ++i) {
      fmt::print("failed: {}\n", tally.failures[i]);
    }
  }
  for (const auto& line : quantize) fmt::print("failed: quantize {}\n", line);
}

void run(const VerifyFlags& flags) {
  const Context context = flags.context.context();
  const bool on_cpu = context.device.type == DeviceType::kCpu;
  const std::vector<Isa> isas = on_cpu ? chosen_isas(flags.context.isa) : std::vector<Isa>();
  std::vector<std::string> places;
  for (const Isa isa : isas) places.emplace_back(to_string(isa));
  if (!on_cpu) {
    take(CudaMemory::allocate(1, context.device.index));  // says what is missing, once
    places.push_back(flags.context.device);
  }
  const std::vector<std::string> quantize = verify_quantize(isas);
  const std::vector<Tally> tallies = sweep(flags, places, [&](const VerifyCase& one) {
    return on_cpu ? verify_case(one, isas)
                  : std::vector<VerifyOutcome>{verify_on_device(one, context)};
  });
  int64_t cases = 0;
  auto failed = static_cast<int64_t>(quantize.size());
  for (const Tally& tally : tallies) {
    cases += tally.cases;
    failed += tally.failed;
  }
  if (flags.json) {
    nlohmann::ordered_json report = {{"cases", cases}, {"failed", failed}};
    report["quantize_failures"] = quantize;
    report["results"] = nlohmann::ordered_json::array();
    for (const Tally& tally : tallies) {
      report["results"].push_back({{"isa", tally.place},
                                   {"mode", to_string(tally.mode)},
                                   {"cases", tally.cases},
                                   {"unsupported", tally.unsupported},
                                   {"failed", tally.failed},
                                   {"worst_out_ratio", tally.out_ratio},
                                   {"worst_lse_ratio", tally.lse_ratio},
                                   {"worst_rel_l2", tally.rel_l2},
                                   {"worst_case", tally.worst},
                                   {"failures", tally.failures}});
    }
    fmt::print("{}\n", report.dump());
  } else {
    print_text(tallies, quantize);
  }
  if (failed > 0) {
    fail(StatusCode::kInternal, fmt::format("verify: {} of {} cases failed", failed, cases));
  }
}

}  // namespace

void add_verify(CLI::App& root) {
  auto flags = std::make_shared<VerifyFlags>();
  CLI::App& command = *root.add_subcommand(
      "verify", "Runs every kernel of this machine against both oracles; exit 1 if any is wrong");
  command.add_option("--mode", flags->modes, "accurate, paper, half or exact; repeatable")
      ->type_name("NAME")
      ->allow_extra_args(false);
  flags->context.add(command);
  command.add_flag("--full", flags->full, "Five times as many cases");
  command.add_flag("--json", flags->json, "One JSON object on stdout");
  command.final_callback([flags] { run(*flags); });
}

}  // namespace attn8::app
