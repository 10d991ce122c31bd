// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "reference/element.hpp"
#include "reference/problem.hpp"

/// The online softmax of one row in float64, with the rounding of P of the mode and an interval
/// around everything that a float32 kernel may compute differently.
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
};

struct Query {
  std::vector<double> q;  // [stride of k]
  double norm = 0;        ///< ||q||; read where k_norm is
  double factor = 0;      ///< c_i: turns q.k k_scale into a score in log2 units
};

/// Memory of emulate_row(), kept between rows.
struct RowScratch {
  std::vector<double> t, t_error;      // [keys of a block]
  std::vector<double> sum, sum_error;  // [stride of v] sum_j code_j v_jd of a block
};

/// Writes out [head_dim] and, unless bound is nullptr, how far a kernel may be from it; returns
/// log2 of the softmax denominator. `keys` is not empty.
double emulate_row(const Arithmetic& arithmetic, const KeyValues& kv, const Query& query,
                   KeyRange keys, RowScratch& scratch, double* out, double* bound);

}  // namespace attn8::reference
