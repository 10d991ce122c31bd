// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "attn8/attention.hpp"
#include "measure.hpp"
#include "safetensors.hpp"

namespace attn8::app {

/// Q, K, V of one layer (or part of one) of a model, as its attention saw them.
struct RealEntry {
  std::string name;  ///< "smollm2.layer.05.kv0"
  Qkv qkv;
  std::optional<float> softmax_scale;
  Mask mask;
  std::string source;  ///< where it comes from, one line; may be empty
};

/// The captured tensors of one safetensors file, read entry by entry; the format of
/// docs/real-tensors.md.
class RealTensors {
 public:
  /// kInvalidArgument, with a line that begins with `argument`, when the file holds no NAME.q,
  /// NAME.k, NAME.v.
  RealTensors(const std::string& argument, const std::string& path);
  [[nodiscard]] size_t size() const noexcept { return prefixes_.size(); }
  [[nodiscard]] std::string name(size_t i) const;
  [[nodiscard]] RealEntry read(size_t i) const;
  [[nodiscard]] const SafetensorsFile& file() const noexcept { return file_; }

 private:
  SafetensorsFile file_;
  std::vector<std::string> prefixes_;
};

/// The committed sample, data/real_sample.safetensors of the source tree this was built from.
std::string default_sample_path();
/// The committed run of the study, docs/results/study.json of the same tree.
std::string committed_study_path();

/// The result of benchmarks/peers that is committed with the source.
std::string committed_peers_path();

}  // namespace attn8::app
