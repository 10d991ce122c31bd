// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "attn8/attention.hpp"

namespace attn8::app {

/// Which mode each head of a model runs in: `accurate`, but for the (layer, kv head) named here,
/// which run in `half` or `exact`. As a file it is the JSON of docs/precision.md.
struct HeadPolicy {
  std::string model;  ///< what it was made for; for people
  std::map<std::pair<int64_t, int64_t>, Mode> heads;

  [[nodiscard]] Mode mode(int64_t layer, int64_t kv_head) const;
  /// AttentionOptions::head_modes of a layer; empty where all heads run in `accurate`.
  [[nodiscard]] std::vector<Mode> modes(int64_t layer, int64_t nheads_k) const;
  [[nodiscard]] nlohmann::ordered_json json() const;
};

/// Throws kInvalidArgument with a line that begins with `argument`, the flag the path came from.
HeadPolicy read_policy(const std::string& argument, const std::string& path);

}  // namespace attn8::app
