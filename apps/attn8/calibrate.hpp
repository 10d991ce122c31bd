// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "policy.hpp"
#include "real_tensors.hpp"

namespace attn8::app {

/// Squared errors of one (layer, kv head) over all that was captured of it, against `exact`.
struct HeadError {
  int64_t layer = 0;
  int64_t kv_head = 0;
  double reference = 0;  ///< ||o||^2 of `exact`
  double accurate = 0;   ///< ||o - o_exact||^2
  double half = 0;
  Mode mode = Mode::kAccurate;  ///< what the calibration chose

  [[nodiscard]] double error(Mode of) const {
    return of == Mode::kExact ? 0 : of == Mode::kHalf ? half : accurate;
  }
};

/// Model, layer and first kv head of "smollm2.layer.05.kv1" (or "layer.05", of no named model).
struct EntryName {
  std::string model;
  int64_t layer = 0;
  int64_t first_kv_head = 0;
};

/// Throws kInvalidArgument, beginning with `argument`, for a name without a layer.
EntryName parse_entry_name(const std::string& argument, const std::string& name);

/// Runs the entry in `accurate`, `half` and `exact`, and adds the errors of its kv heads to
/// `heads`, which stay sorted by layer and head.
void measure_entry(const EntryName& name, const RealEntry& entry, const Context& context,
                   std::vector<HeadError>& heads);

/// Relative L2 error of all heads together, each in its `mode`.
double total_error(const std::vector<HeadError>& heads);

/// Moves the head that errs most, from `accurate` to `half` where that errs less, else to `exact`,
/// until total_error() is at most `budget`.
void spend_budget(double budget, std::vector<HeadError>& heads);

}  // namespace attn8::app
