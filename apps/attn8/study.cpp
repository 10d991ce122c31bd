// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "study.hpp"

#include <algorithm>
#include <array>
#include <span>

namespace attn8::app {
namespace {

using reference::EmulationOptions;
using reference::Normalizer;
using reference::PScale;

constexpr std::array<Granularity, 5> kGranularities = {
    Granularity::kTensor, Granularity::kChannel, Granularity::kBlock, Granularity::kBlockChannel,
    Granularity::kToken};
constexpr std::array<PScale, 3> kPScales = {PScale::kRunningMax127, PScale::kRunningMax255,
                                            PScale::kBlockLocal255};
struct Rounding {
  Normalizer normalizer;
  bool residual_mean;
};
constexpr std::array<Rounding, 4> kRoundings = {{{Normalizer::kFloat, true},
                                                 {Normalizer::kFloat, false},
                                                 {Normalizer::kCodes, false},
                                                 {Normalizer::kMixed, false}}};

/// The score grid where it is the default's and defined for these options.
bool uses_grid(const EmulationOptions& options) {
  return reference::emulation_options({}).score_grid && options.p_scale == PScale::kBlockLocal255 &&
         options.normalizer == Normalizer::kFloat;
}

/// Relative L2 error of each head of a sample.
std::vector<double> head_errors(std::span<const double> out, std::span<const double> exact,
                                size_t heads) {
  std::vector<double> errors;
  const size_t part = heads == 0 ? 0 : exact.size() / heads;
  for (size_t h = 0; h < heads; ++h) {
    errors.push_back(
        reference::error_report(out.subspan(h * part, part), exact.subspan(h * part, part)).rel_l2);
  }
  return errors;
}

}  // namespace

std::string_view to_string(PScale p_scale) {
  switch (p_scale) {
    case PScale::kRunningMax127:
      return "running_127";
    case PScale::kRunningMax255:
      return "running_255";
    case PScale::kBlockLocal255:
      return "block_255";
  }
  return "";
}

std::string_view to_string(Normalizer normalizer) {
  switch (normalizer) {
    case Normalizer::kMixed:
      return "mixed";
    case Normalizer::kCodes:
      return "codes";
    case Normalizer::kFloat:
      return "float";
  }
  return "";
}

std::string_view rounding_name(const EmulationOptions& options) {
  return options.residual_mean ? "residual" : to_string(options.normalizer);
}

std::string_view scores_name(const EmulationOptions& options) {
  return options.score_grid ? "grid" : "float";
}

StudyConfig default_config() { return {"", reference::emulation_options({})}; }

std::vector<StudyConfig> full_grid() {
  std::vector<StudyConfig> configs;
  for (const bool smooth_k : {true, false}) {
    for (const auto& [normalizer, residual_mean] : kRoundings) {
      for (const PScale p_scale : kPScales) {
        for (const Granularity granularity : kGranularities) {
          // Without scales folded into P, mixed is codes.
          if (normalizer == Normalizer::kMixed && granularity != Granularity::kToken) continue;
          StudyConfig config = default_config();
          config.options.v_granularity = granularity;
          config.options.p_scale = p_scale;
          config.options.normalizer = normalizer;
          config.options.residual_mean = residual_mean;
          config.options.smooth_k = smooth_k;
          config.options.score_grid = uses_grid(config.options);
          configs.push_back(config);
        }
      }
    }
  }
  return configs;
}

std::vector<StudyConfig> main_grid() {
  std::vector<StudyConfig> configs;
  for (const PScale p_scale : kPScales) {
    for (const Granularity granularity : kGranularities) {
      StudyConfig config = default_config();
      config.options.v_granularity = granularity;
      config.options.p_scale = p_scale;
      config.options.score_grid = uses_grid(config.options);
      configs.push_back(config);
    }
  }
  StudyConfig rough = default_config();
  rough.options.smooth_k = false;
  configs.push_back(rough);
  const std::vector<int32_t> kv_blocks = {64, 128, 256, 512};
  for (const int32_t kv_block : kv_blocks) {
    for (const auto& [normalizer, residual_mean] : kRoundings) {
      StudyConfig config = default_config();
      config.options.kv_block = kv_block;
      config.options.normalizer = normalizer;
      config.options.residual_mean = residual_mean;
      config.options.score_grid = uses_grid(config.options);
      const bool is_default =
          kv_block == default_config().options.kv_block &&
          rounding_name(config.options) == rounding_name(default_config().options);
      if (!is_default) configs.push_back(config);
    }
  }
  for (const StudyConfig& config : kv_block_grid(kv_blocks)) {
    if (config.options.score_grid != default_config().options.score_grid) configs.push_back(config);
  }
  return configs;
}

std::vector<StudyConfig> kv_block_grid(const std::vector<int32_t>& kv_blocks) {
  std::vector<StudyConfig> configs;
  for (const int32_t kv_block : kv_blocks) {
    StudyConfig config = default_config();
    config.options.kv_block = kv_block;
    configs.push_back(config);
    if (!config.options.score_grid) continue;
    config.options.score_grid = false;
    configs.push_back(config);
  }
  return configs;
}

std::vector<StudyConfig> baselines() {
  std::vector<StudyConfig> configs;
  for (const NamedMode& mode : compared_modes()) {
    if (mode.options.mode == Mode::kAccurate) continue;
    configs.push_back({mode.name, reference::emulation_options(mode.options)});
  }
  return configs;
}

std::vector<StudyRecord> study(const StudyData& data, const std::vector<StudyConfig>& configs,
                               int64_t rows, int64_t max_heads, int32_t threads,
                               Progress& progress) {
  std::vector<std::vector<double>> errors(configs.size());
  StudyRecord common;
  common.data = data.name;
  common.rows = rows;
  for (const Qkv& qkv : data.problems) {
    const Shape shape = qkv.shape();
    const Sample sample = Sample::spread(shape, rows, max_heads);
    common.seqlen_k = shape.seqlen_k;
    common.head_dim = shape.head_dim;
    common.heads += static_cast<int64_t>(sample.heads.size());
    common.rows = static_cast<int64_t>(sample.rows.size());
    const auto exact = exact_rows(qkv, data.softmax_scale, data.mask, sample, threads);
    parallel_cases(static_cast<int64_t>(configs.size()), threads, [&](int64_t i) {
      EmulationOptions options = configs[static_cast<size_t>(i)].options;
      options.softmax_scale = data.softmax_scale;
      options.mask = data.mask;
      const auto found =
          head_errors(emulated_rows(qkv, options, sample, 1), exact, sample.heads.size());
      auto& all = errors[static_cast<size_t>(i)];
      all.insert(all.end(), found.begin(), found.end());
      progress.advance(static_cast<double>(shape.seqlen_k) *
                       static_cast<double>(sample.heads.size()));
    });
  }
  std::vector<StudyRecord> records;
  for (size_t i = 0; i < configs.size(); ++i) {
    StudyRecord record = common;
    record.config = configs[i];
    record.rel_l2 = median(errors[i]);
    record.rel_l2_max =
        errors[i].empty() ? 0 : *std::max_element(errors[i].begin(), errors[i].end());
    records.push_back(record);
  }
  return records;
}

nlohmann::ordered_json StudyRecord::json() const {
  nlohmann::ordered_json result = {{"data", data},
                                   {"seqlen_k", seqlen_k},
                                   {"head_dim", head_dim},
                                   {"heads", heads},
                                   {"rows", rows}};
  const auto& options = config.options;
  if (config.name.empty()) {
    result["v_granularity"] = to_string(options.v_granularity);
    result["p_scale"] = to_string(options.p_scale);
    result["rounding"] = rounding_name(options);
    result["scores"] = scores_name(options);
    result["smooth_k"] = options.smooth_k;
  } else {
    result["mode"] = config.name;
  }
  result["kv_block"] = options.kv_block;
  result["rel_l2"] = rel_l2;
  result["rel_l2_max"] = rel_l2_max;
  return result;
}

}  // namespace attn8::app
