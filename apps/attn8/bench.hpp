// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/attention.hpp"
#include "measure.hpp"

namespace attn8::app {

/// How one problem is timed.
struct BenchOptions {
  int repeats = 9;           ///< ratios to take the median of
  int64_t rows = 16;         ///< query rows per head of the error; 0: no error
  double peak_ms = 10;       ///< length of one peak measurement
  double max_seconds = 1e9;  ///< stops repeating beyond that
};

struct BenchResult {
  Shape shape;
  AttentionOptions options;
  DType dtype = DType::kFloat32;
  std::string kernel;
  std::string isa;
  int32_t threads = 1;
  int32_t kv_block = 0;
  int repeats = 0;
  double median_ms = 0;  ///< attention without quantization
  double min_ms = 0;
  double quantize_ms = 0;  ///< median
  double min_quantize_ms = 0;
  double gops = 0;  ///< 4 * batch * nheads_q * head_dim * visible pairs / median_ms
  double end_to_end_gops = 0;
  std::string_view peak_name;
  std::optional<double> peak_gops;      ///< median, of all threads together
  std::optional<double> peak_fraction;  ///< median of ratios, each against peaks before and after
  std::optional<double> bytes_per_s;    ///< of K and V read once, for at most 8 query rows
  std::optional<double> stream_fraction;
  double ops_per_byte = 0;  ///< operations per byte of Q, K, V and out, each moved once
  std::optional<double> rel_l2;

  [[nodiscard]] nlohmann::ordered_json json() const;
};

/// Times the problem: warm-up, then repeats of peak, kernel, peak, so that a change of clock or a
/// neighbour's load hits both sides of a ratio.
BenchResult bench(const Qkv& qkv, const AttentionOptions& options, const Context& context,
                  const BenchOptions& how);

/// One line of a shapes file or one --shape.
struct BenchCase {
  Shape shape;
  bool causal = false;
};

/// "B,Hq,Hkv,Sq,Sk,D"; `argument` names where it stood in the failure.
Shape parse_shape(const std::string& argument, const std::string& text);

/// A shapes file: one "B,Hq,Hkv,Sq,Sk,D" per line, optionally followed by the word causal; # starts
/// a comment.
std::vector<BenchCase> read_shapes(const std::string& argument, const std::string& path);

}  // namespace attn8::app
