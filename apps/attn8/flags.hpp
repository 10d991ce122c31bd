// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "attn8/attention.hpp"
#include "attn8/context.hpp"
#include "host_tensor.hpp"

namespace attn8::app {

/// Accepts whole numbers in [low, high]; the message names what it got and what it wants.
CLI::Validator whole_number(int64_t low, int64_t high = std::numeric_limits<int32_t>::max());

/// Accepts finite numbers.
CLI::Validator finite_number();

/// Where a command runs: --threads, --isa, --device.
struct ContextFlags {
  int32_t threads = 0;  ///< 0: every core
  std::string isa;
  std::string device = "cpu";

  void add(CLI::App& command);
  /// All but --threads.
  void add_place(CLI::App& command);
  /// Throws kUnsupported for a device without a backend.
  [[nodiscard]] Context context() const;
};

/// What a command computes: the options of attention() as flags.
struct OptionFlags {
  std::string mode = "accurate";
  std::optional<float> scale;
  float softcap = 0;
  bool causal = false;
  std::string align = "bottom_right";
  std::string window;
  std::string v_granularity = "token";
  int32_t kv_block = 0;
  bool no_smooth_k = false;
  std::string fp8_format = "e4m3";

  /// Everything but --mode.
  void add(CLI::App& command);
  [[nodiscard]] AttentionOptions options(Mode mode) const;
};

DType parse_float_dtype(const std::string& argument, const std::string& name);
Layout parse_layout(const std::string& name);

/// Integers between commas; `argument` and `want` name the flag and its form in the failure.
std::vector<int64_t> parse_integers(const std::string& argument, const std::string& text,
                                    size_t count, const std::string& want);

}  // namespace attn8::app
