// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "reference/element.hpp"
#include "reference/problem.hpp"
#include "reference/score_changes.hpp"

/// One row of attention in float64, with the rounding of P of the mode and a bound of what a
/// float32 kernel may compute differently.
namespace attn8::reference {

/// What P is rounded to.
enum class PFormat : uint8_t { kInteger, kBfloat16, kE4m3, kE5m2 };

struct Arithmetic {
  int64_t kv_block = 0;
  PFormat p_format = PFormat::kInteger;
  double p_range = 1;  ///< R: the weight of the key at the maximum
  bool local_max =
      false;  ///< weights relative to the maximum of the key block, else the running one
  Normalizer normalizer = Normalizer::kFloat;  ///< what l sums
  bool residual_mean = false;  ///< O also takes sum_j (w_j - code_j) times the mean V of the block
  [[nodiscard]] bool integer() const { return p_format == PFormat::kInteger; }
  /// Whether a key with this r enters l by its rounded weight.
  [[nodiscard]] bool sums_code(double r) const {
    constexpr double kMinRoundedRatio = 0x1p-6;
    return normalizer == Normalizer::kCodes ||
           (normalizer == Normalizer::kMixed && r >= kMinRoundedRatio);
  }
};

/// Visible keys of one (batch, kv head), quantized. Vectors [count] are indexed by j - k.first.
struct KeyValues {
  Tokens k;
  std::vector<double> k_scale;  // [count]
  std::vector<double> k_norm;   // [count] ||k||; empty where dot products are exact integers
  Tokens v;
  std::vector<double> r;        // [count] what P absorbs of the V scale; 1 where V is not folded
  std::vector<double> v_scale;  // [blocks from key 0][head_dim] what P does not absorb
  std::vector<double> v_mean;   // the same shape: mean V codes of the block's visible keys
  // Read on the score grid, in place of r.
  std::vector<float> g;         // [count] what the V scale adds to a score, in steps of the grid
  std::vector<int64_t> weight;  // [count] W_j
  double v_ref = 1;             // the unit of O: the largest finite v_scale

  /// Whether `keys` are all the keys of the block at `begin` that some query of the call sees.
  [[nodiscard]] bool holds_whole_block(int64_t begin, int64_t kv_block, KeyRange keys) const {
    return keys.first == std::max(begin, k.first) &&
           keys.last == std::min(begin + kv_block, k.first + k.count);
  }
};

struct Query {
  std::vector<double> q;  // [stride of k]
  double norm = 0;        ///< ||q||; read where k_norm is
  double factor = 0;      ///< c_i: turns q.k k_scale into a score in log2 units
  float grid_factor = 0;  ///< c_i of the score grid: into steps of it
  // With softcap both factors make it the argument of tanh, in units of ln 2 / 2.
  RowChanges changes;
};

/// Memory of emulate_row(), kept between rows.
struct RowScratch {
  std::vector<double> t, t_error;      // [keys of a block]
  std::vector<double> sum, sum_error;  // [stride of v] sum_j code_j v_jd of a block
  std::vector<int64_t> steps;          // [keys of a block] T
};

/// The online softmax of a row. Writes out [head_dim_v] and, unless bound is nullptr, how far a
/// kernel may be from it; returns log2 of the softmax denominator. `keys` is not empty.
double emulate_row(const Arithmetic& arithmetic, const KeyValues& kv, const Query& query,
                   KeyRange keys, RowScratch& scratch, double* out, double* bound);

/// The same on the score grid. Reads kv_block and residual_mean of `arithmetic`; the rest is fixed.
double emulate_grid_row(const Arithmetic& arithmetic, const KeyValues& kv, const Query& query,
                        KeyRange keys, RowScratch& scratch, double* out, double* bound);

}  // namespace attn8::reference
