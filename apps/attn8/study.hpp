// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/reference.hpp"
#include "measure.hpp"
#include "parallel.hpp"

namespace attn8::app {

std::string_view to_string(reference::PScale p_scale);
std::string_view to_string(reference::Normalizer normalizer);

/// One point of the design space of `accurate`, or a mode to compare it with.
struct StudyConfig {
  std::string
      name;  ///< empty for a point of the design space, else "paper", "half", "fp8_e4m3" ...
  reference::EmulationOptions options;
};

struct StudyRecord {
  std::string data;
  int64_t seqlen_k = 0;
  int64_t head_dim = 0;
  int64_t heads = 0;
  int64_t rows = 0;
  StudyConfig config;
  double rel_l2 = 0;      ///< median over the heads
  double rel_l2_max = 0;  ///< worst head

  [[nodiscard]] nlohmann::ordered_json json() const;
};

/// What happens to the weights that rounding takes from P: "residual" (given back at the mean V of
/// the block), else the name of the normaliser.
std::string_view rounding_name(const reference::EmulationOptions& options);

/// What the scores of a point of the design space are rounded to: "grid" or "float".
std::string_view scores_name(const reference::EmulationOptions& options);

/// The whole grid V granularity x P scale x rounding x smoothing at the default kv_block.
std::vector<StudyConfig> full_grid();
/// V granularity x P scale, smoothing on, and the other axes one at a time from the default.
std::vector<StudyConfig> main_grid();
/// The default at each kv_block, once as it is and once with scores in float.
std::vector<StudyConfig> kv_block_grid(const std::vector<int32_t>& kv_blocks);
/// paper, half, fp8 e4m3 and e5m2.
std::vector<StudyConfig> baselines();
/// The default of `accurate`.
StudyConfig default_config();

/// Problems of one name, all heads of which count alike.
struct StudyData {
  std::string name;
  std::vector<Qkv> problems;  ///< of one seqlen_k
  std::optional<float> softmax_scale;
  Mask mask;
};

/// Error of every configuration, `threads` at a time. Advances `progress` by seqlen_k x heads per
/// configuration.
std::vector<StudyRecord> study(const StudyData& data, const std::vector<StudyConfig>& configs,
                               int64_t rows, int64_t max_heads, int32_t threads,
                               Progress& progress);

}  // namespace attn8::app
