// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attn8/context.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "file.hpp"
#include "flags.hpp"
#include "parallel.hpp"
#include "real_tensors.hpp"
#include "recipes.hpp"
#include "study.hpp"
#include "table.hpp"

namespace attn8::app {
namespace {

struct StudyFlags {
  std::vector<std::string> recipes;
  std::vector<std::string> qkv;
  std::vector<int64_t> lengths = {1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072};
  int64_t grid_length = 8192;
  int64_t head_dim = 128;
  int64_t rows = 24;
  int64_t heads = 9;
  bool full = false;
  std::vector<int32_t> kv_blocks;
  bool by_entry = false;
  int32_t threads = 0;
  std::string out;
  bool json = false;
};

/// A problem to be made or read when its turn comes: long sequences do not fit in memory together.
struct Task {
  std::string name;
  int64_t seqlen_k = 0;
  std::vector<StudyConfig> configs;
  std::string recipe;  ///< synthetic data
  const RealTensors* file = nullptr;
  std::vector<size_t> entries;  ///< real data: entries of the file
  int64_t problem_heads = 1;    ///< heads of all its problems, for the progress
};

std::vector<StudyConfig> with_baselines(std::vector<StudyConfig> configs) {
  for (const StudyConfig& config : baselines()) configs.push_back(config);
  return configs;
}

/// The configurations of both lists, once each.
std::vector<StudyConfig> merged(std::vector<StudyConfig> a, const std::vector<StudyConfig>& b) {
  const auto same = [](const StudyConfig& x, const StudyConfig& y) {
    const auto key = [](const StudyConfig& c) {
      return std::tuple(c.name, c.options.v_granularity, c.options.p_scale,
                        rounding_name(c.options), c.options.score_grid, c.options.smooth_k,
                        c.options.kv_block);
    };
    return key(x) == key(y);
  };
  for (const StudyConfig& config : b) {
    bool found = false;
    for (const StudyConfig& other : a) found = found || same(config, other);
    if (!found) a.push_back(config);
  }
  return a;
}

/// Name of the model an entry belongs to: "smollm2" of "smollm2.layer.05.kv0", or of the file when
/// its entries have no such word.
std::string model_name(const std::string& path, const std::string& entry) {
  const std::string word = entry.substr(0, entry.find('.'));
  return word == "layer" || word == "qkv" ? std::filesystem::path(path).stem().string() : word;
}

std::vector<StudyConfig> configs_of(const StudyFlags& flags, bool whole) {
  if (!flags.kv_blocks.empty()) return with_baselines(kv_block_grid(flags.kv_blocks));
  return with_baselines(whole ? merged(full_grid(), main_grid()) : main_grid());
}

std::vector<Task> real_tasks(const RealTensors& tensors, const std::string& path,
                             const StudyFlags& flags) {
  const auto configs = configs_of(flags, flags.full);
  std::map<std::tuple<std::string, int64_t, bool, float>, Task> groups;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const RealEntry entry = tensors.read(i);
    const Shape shape = entry.qkv.shape();
    const std::string model = model_name(path, entry.name);
    const bool named = entry.name.starts_with(model);
    const std::string name = !flags.by_entry ? model
                             : named         ? entry.name
                                             : model + " " + entry.name;
    Task& task = groups[{name, shape.seqlen_k, entry.mask.causal, entry.softmax_scale.value_or(0)}];
    task.name = "real " + name;
    task.seqlen_k = shape.seqlen_k;
    task.configs = configs;
    task.file = &tensors;
    task.problem_heads = (task.entries.empty() ? 0 : task.problem_heads) +
                         std::min(flags.heads, shape.batch * shape.nheads_q);
    task.entries.push_back(i);
  }
  std::vector<Task> tasks;
  for (auto& [key, task] : groups) tasks.push_back(std::move(task));
  return tasks;
}

StudyData load(const Task& task, const StudyFlags& flags) {
  StudyData data;
  data.name = task.name;
  if (task.file == nullptr) {
    data.problems.push_back(
        make_qkv(task.recipe, 1, {1, 1, 1, flags.rows, task.seqlen_k, flags.head_dim}));
    return data;
  }
  for (const size_t i : task.entries) {
    RealEntry entry = task.file->read(i);
    data.softmax_scale = entry.softmax_scale;
    data.mask = entry.mask;
    data.problems.push_back(std::move(entry.qkv));
  }
  return data;
}

void print_tables(const std::vector<StudyRecord>& records) {
  std::vector<std::pair<std::string, int64_t>> columns;
  std::map<std::string, std::map<std::pair<std::string, int64_t>, double>> cells;
  std::vector<std::string> rows;
  for (const StudyRecord& r : records) {
    const auto& o = r.config.options;
    const std::string row =
        !r.config.name.empty()
            ? r.config.name
            : fmt::format("{:<13} {:<11} {:<8} {:<5} {:<6} {:>3}", to_string(o.v_granularity),
                          to_string(o.p_scale), rounding_name(o), scores_name(o),
                          o.smooth_k ? "smooth" : "raw", o.kv_block);
    const std::pair column = {r.data, r.seqlen_k};
    if (columns.empty() || columns.back() != column) columns.push_back(column);
    if (!cells.contains(row)) rows.push_back(row);
    cells[row][column] = r.rel_l2;
  }
  // One table per name of data; its lengths side by side.
  for (size_t first = 0; first < columns.size();) {
    size_t last = first;
    while (last < columns.size() && columns[last].first == columns[first].first) ++last;
    Table table;
    table.header = {fmt::format("{}: relative L2 error, %", columns[first].first)};
    for (size_t c = first; c < last; ++c) {
      table.header.push_back(length_label(columns[c].second));
    }
    for (const std::string& row : rows) {
      std::vector<std::string> line = {row};
      bool any = false;
      for (size_t c = first; c < last; ++c) {
        const auto found = cells[row].find(columns[c]);
        any = any || found != cells[row].end();
        line.push_back(found == cells[row].end() ? "" : percent(found->second));
      }
      if (any) table.rows.push_back(line);
    }
    fmt::print("{}\n", table.text());
    first = last;
  }
}

void run(const StudyFlags& flags) {
  std::optional<OutputFile> out;
  if (!flags.out.empty()) out.emplace("--out", flags.out);
  std::vector<std::string> recipes = flags.recipes;
  if (recipes.empty() && flags.qkv.empty()) recipes = {"normal", "llm", "sink"};

  std::vector<std::unique_ptr<RealTensors>> files;
  std::vector<Task> tasks;
  for (const std::string& recipe : recipes) {
    for (const int64_t length : flags.lengths) {
      const bool whole = flags.full || length == flags.grid_length;
      Task task;
      task.name = recipe;
      task.seqlen_k = length;
      task.configs = configs_of(flags, whole);
      task.recipe = recipe;
      tasks.push_back(std::move(task));
    }
  }
  for (const std::string& path : flags.qkv) {
    files.push_back(std::make_unique<RealTensors>("--qkv", path));
    for (Task& task : real_tasks(*files.back(), path, flags)) tasks.push_back(std::move(task));
  }

  double work = 0;
  for (const Task& task : tasks) {
    work += static_cast<double>(task.configs.size()) * static_cast<double>(task.seqlen_k) *
            static_cast<double>(task.problem_heads);
  }
  std::vector<StudyRecord> records;
  {
    Progress progress("study", work);
    const int32_t threads = flags.threads > 0 ? flags.threads : core_count();
    for (const Task& task : tasks) {
      for (StudyRecord& record :
           study(load(task, flags), task.configs, flags.rows, flags.heads, threads, progress)) {
        records.push_back(std::move(record));
      }
    }
  }

  nlohmann::ordered_json report = {
      {"version", version()},
      {"what", "relative L2 error against float64 attention; median and worst of the heads"},
      {"records", nlohmann::ordered_json::array()}};
  for (const StudyRecord& record : records) report["records"].push_back(record.json());
  if (out) {
    // One record per line: short, and its changes can be read.
    std::string text = fmt::format("{{\n\"version\": {},\n\"what\": {},\n\"records\": [\n",
                                   report["version"].dump(), report["what"].dump());
    for (size_t i = 0; i < report["records"].size(); ++i) {
      text += report["records"][i].dump() + (i + 1 < report["records"].size() ? ",\n" : "\n");
    }
    out->write(text + "]\n}\n");
  }
  if (flags.json) {
    fmt::print("{}\n", report.dump());
  } else {
    print_tables(records);
  }
}

}  // namespace

void add_study(CLI::App& root) {
  auto flags = std::make_shared<StudyFlags>();
  CLI::App& command = *root.add_subcommand(
      "study",
      "The design study: V granularity, P scale, rounding of P, smoothing, kv_block, length");
  command
      .add_option("--recipe", flags->recipes,
                  "Synthetic data, repeatable; the default without --qkv is normal, llm and sink")
      ->type_name("NAME")
      ->allow_extra_args(false);
  command.add_option("--qkv", flags->qkv, "Real tensors, safetensors; repeatable")
      ->type_name("FILE")
      ->allow_extra_args(false);
  command.add_option("--lengths", flags->lengths, "Lengths of the synthetic data")
      ->delimiter(',')
      ->check(whole_number(1, 1 << 22))
      ->type_name("N,...");
  command
      .add_option("--grid-length", flags->grid_length,
                  "The length at which every combination is tried; elsewhere one axis at a time")
      ->check(whole_number(1))
      ->type_name("N")
      ->capture_default_str();
  command.add_flag("--full", flags->full, "Every combination everywhere");
  command
      .add_option("--kv-block", flags->kv_blocks,
                  "Only the default of accurate, at these kv_blocks, and the other modes")
      ->delimiter(',')
      ->check(whole_number(1, 1 << 20))
      ->type_name("N,...");
  command.add_flag("--by-entry", flags->by_entry,
                   "Every entry of a file for itself, not all of a model together");
  command.add_option("--head-dim", flags->head_dim, "Of the synthetic data")
      ->check(whole_number(1, 256))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--rows", flags->rows, "Query rows per head")
      ->check(whole_number(1, 1 << 20))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--heads", flags->heads, "Query heads per entry of a file, at most")
      ->check(whole_number(1))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--threads", flags->threads, "Threads; the default is every core")
      ->check(whole_number(1, 4096))
      ->type_name("N");
  command.add_option("--out", flags->out, "Also write the JSON to a file")->type_name("FILE");
  command.add_flag("--json", flags->json, "One JSON object on stdout");
  command.final_callback([flags] { run(*flags); });
}

}  // namespace attn8::app
