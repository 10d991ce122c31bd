// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "report_data.hpp"

#include <algorithm>
#include <optional>
#include <span>
#include <tuple>

#include "measure.hpp"
#include "parallel.hpp"
#include "real_tensors.hpp"

namespace attn8::app {
namespace {

// Rows and seeds that keep the whole report within about a minute on two cores; the figures move by
// a few percent of themselves when they are doubled.
constexpr int64_t kRealRows = 64;
constexpr int64_t kLengthRows = 24;
constexpr int64_t kPaperSeeds = 4;
constexpr int64_t kPaperRows = 32;
constexpr int64_t kStudyRows = 16;
constexpr int64_t kStudyLength = 4096;

std::vector<RealErrors> real_errors(const ReportOptions& options) {
  std::vector<RealErrors> results;
  for (const std::string& path : options.data) {
    const RealTensors tensors("--data", path);
    Progress progress("real tensors", static_cast<double>(tensors.size()));
    for (size_t i = 0; i < tensors.size(); ++i) {
      const RealEntry entry = tensors.read(i);
      RealErrors errors;
      errors.entry = entry.name;
      errors.source = entry.source;
      errors.shape = entry.qkv.shape();
      errors.causal = entry.mask.causal;
      const Sample sample = Sample::spread(errors.shape, kRealRows, INT64_MAX);
      errors.rows = static_cast<int64_t>(sample.rows.size());
      const auto exact =
          exact_rows(entry.qkv, entry.softmax_scale, entry.mask, sample, options.context.threads);
      for (NamedMode mode : compared_modes()) {
        mode.options.softmax_scale = entry.softmax_scale;
        mode.options.mask = entry.mask;
        const auto out = mode_rows(entry.qkv, mode.options, options.context, sample);
        const size_t part = exact.size() / sample.heads.size();
        for (size_t h = 0; h < sample.heads.size(); ++h) {
          errors.by_mode[mode.name].push_back(
              reference::error_report(std::span(out).subspan(h * part, part),
                                      std::span(exact).subspan(h * part, part))
                  .rel_l2);
        }
      }
      results.push_back(std::move(errors));
      progress.advance();
    }
  }
  return results;
}

std::vector<LengthErrors> length_errors(const ReportOptions& options, int64_t head_dim) {
  const std::vector<std::string> names = {"normal", "llm", "sink"};
  std::vector<LengthErrors> results;
  Progress progress(
      "lengths", static_cast<double>(names.size()) * 2 * static_cast<double>(options.max_length));
  for (const std::string& recipe : names) {
    for (int64_t length = 1024; length <= options.max_length; length *= 2) {
      const Qkv qkv = make_qkv(recipe, 5, {1, 1, 1, kLengthRows, length, head_dim});
      const Sample sample = Sample::spread(qkv.shape(), kLengthRows, 1);
      const auto exact = exact_rows(qkv, std::nullopt, {}, sample, options.context.threads);
      LengthErrors errors = {recipe, length, {}};
      for (const NamedMode& mode : compared_modes()) {
        errors.by_mode[mode.name] =
            reference::error_report(mode_rows(qkv, mode.options, options.context, sample), exact)
                .rel_l2;
      }
      results.push_back(std::move(errors));
      progress.advance(static_cast<double>(length));
    }
  }
  return results;
}

std::vector<BenchResult> peak_fractions(const Context& context) {
  std::vector<BenchResult> results;
  Context one_thread = context;
  one_thread.threads = 1;
  for (const int64_t head_dim : {64, 128}) {
    const Qkv qkv = make_qkv("normal", 9, {1, 1, 1, 4096, 4096, head_dim});
    BenchOptions how;
    how.repeats = 5;
    how.max_seconds = 3;
    AttentionOptions options;
    for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact}) {
      options.mode = mode;
      results.push_back(bench(qkv, options, one_thread, how));
    }
    const Qkv brain = convert(qkv, DType::kBFloat16);
    results.push_back(bench(brain, options, one_thread, how));
  }
  return results;
}

std::vector<BenchResult> few_queries(const Context& context) {
  std::vector<BenchResult> results;
  Context one_thread = context;
  one_thread.threads = 1;
  // 256k keys: 64 MiB of codes, beyond most caches.
  Qkv qkv = make_qkv("normal", 9, {1, 4, 4, 64, 65536, 128});
  for (const int64_t queries : {1, 8, 64}) {
    qkv.q = make_qkv("normal", 9, {1, 4, 4, queries, 1, 128}).q;
    for (const Mode mode : {Mode::kAccurate, Mode::kExact}) {
      AttentionOptions options;
      options.mode = mode;
      BenchOptions how;
      how.repeats = 3;
      how.max_seconds = 1;
      how.rows = 0;
      results.push_back(bench(qkv, options, one_thread, how));
    }
  }
  return results;
}

std::vector<StudyRecord> small_study(const ReportOptions& options) {
  std::vector<StudyConfig> configs = main_grid();
  for (const StudyConfig& config : baselines()) configs.push_back(config);
  std::vector<StudyRecord> records;
  const auto run = [&](StudyData data) {
    Progress progress("study of " + data.name,
                      static_cast<double>(configs.size() * data.problems.size()) * kStudyLength);
    for (StudyRecord& record :
         study(data, configs, kStudyRows, INT64_MAX, options.context.threads, progress)) {
      records.push_back(std::move(record));
    }
  };
  for (const char* recipe : {"normal", "llm", "sink"}) {
    StudyData data;
    data.name = recipe;
    data.problems.push_back(make_qkv(recipe, 1, {1, 1, 1, kStudyRows, kStudyLength, 128}));
    run(std::move(data));
  }
  // Of each file the largest set of entries with the same mask, shape and scale: heads that count
  // alike.
  for (const std::string& path : options.data) {
    const RealTensors tensors("--data", path);
    std::map<std::tuple<bool, std::vector<int64_t>, std::optional<float>>, StudyData> groups;
    for (size_t i = 0; i < tensors.size(); ++i) {
      RealEntry entry = tensors.read(i);
      StudyData& data = groups[{entry.mask.causal, entry.qkv.shape().list(), entry.softmax_scale}];
      data.name = entry.mask.causal ? "real causal" : "real encoder";
      data.softmax_scale = entry.softmax_scale;
      data.mask = entry.mask;
      data.problems.push_back(std::move(entry.qkv));
    }
    for (const bool causal : {true, false}) {
      StudyData* largest = nullptr;
      for (auto& [key, data] : groups) {
        if (std::get<0>(key) != causal) continue;
        if (largest == nullptr || data.problems.size() > largest->problems.size()) largest = &data;
      }
      if (largest != nullptr) run(std::move(*largest));
    }
  }
  return records;
}

}  // namespace

double RealErrors::median_of(const std::string& mode) const { return median(by_mode.at(mode)); }

ReportData collect_report(const ReportOptions& options,
                          const std::function<void(const std::string&)>& stage) {
  ReportData data;
  data.data_files = options.data;
  data.length_rows = kLengthRows;
  stage("errors on real tensors");
  data.real = real_errors(options);
  stage("error against length");
  data.lengths = length_errors(options, data.length_dim);
  stage("the paper's tables");
  data.tables = paper_tables(options.context, kPaperSeeds, kPaperRows, [](double) {});
  stage("design study");
  data.study = small_study(options);
  stage("share of the machine's peak");
  data.peaks = peak_fractions(options.context);
  stage("roofline");
  data.ceilings = measure_ceilings(options.context.force_isa ? options.context.isa : best_isa(), 1);
  data.few_queries = few_queries(options.context);
  stage("speed figure");
  data.speed = speed_figure(options.context, options.max_speed_seconds, [](double) {});
  return data;
}

std::vector<const BenchResult*> ReportData::roofline() const {
  std::vector<const BenchResult*> results;
  for (const auto* part : {&few_queries, &peaks}) {
    for (const BenchResult& one : *part) results.push_back(&one);
  }
  return results;
}

nlohmann::ordered_json ReportData::json() const {
  nlohmann::ordered_json result = {{"real", nlohmann::ordered_json::array()},
                                   {"lengths", nlohmann::ordered_json::array()},
                                   {"tables", nlohmann::ordered_json::array()},
                                   {"study", nlohmann::ordered_json::array()},
                                   {"peaks", nlohmann::ordered_json::array()}};
  for (const auto& one : real) {
    result["real"].push_back({{"entry", one.entry},
                              {"shape", one.shape.list()},
                              {"causal", one.causal},
                              {"rows", one.rows},
                              {"rel_l2", one.by_mode}});
  }
  for (const auto& one : lengths) {
    result["lengths"].push_back(
        {{"recipe", one.recipe}, {"seqlen_k", one.seqlen_k}, {"rel_l2", one.by_mode}});
  }
  for (const auto& table : tables) result["tables"].push_back(table.json());
  for (const auto& record : study) result["study"].push_back(record.json());
  for (const auto& one : peaks) result["peaks"].push_back(one.json());
  result["ceilings"] = ceilings.json();
  result["few_queries"] = nlohmann::ordered_json::array();
  for (const auto& one : few_queries) result["few_queries"].push_back(one.json());
  result["speed"] = speed.json();
  return result;
}

}  // namespace attn8::app
