// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "attn8/merge.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/device_plan.hpp"
#include "core/kernel_table.hpp"
#include "core/message.hpp"
#include "core/validate.hpp"
#include "cpu/parallel.hpp"
#include "cpu/views.hpp"

namespace attn8 {
namespace {

/// Rows of any length go through this many elements at a time.
constexpr int64_t kPiece = 256;

/// Rows of one task: 32 rows of 128 floats and two parts are 32 KB, enough to hide what a task
/// costs.
constexpr int64_t kRowsPerTask = 32;

constexpr double kEmpty = -std::numeric_limits<double>::infinity();

struct Merger {
  const KernelTable& table;
  std::span<const AttentionState> states;
  const AttentionOutputs& merged;

  void merge_row(int64_t b, int64_t s, int64_t h) const noexcept {
    const auto lse_of = [&](const AttentionState& state) {
      return static_cast<double>(cpu::float_at(state.lse, b, s, h));
    };
    double max = kEmpty;
    for (const AttentionState& state : states) max = std::max(max, lse_of(state));
    // Relative to the maximum no sum overflows. A NaN, which the maximum may pass over, reaches the
    // sum all the same.
    double sum = 0;
    for (const AttentionState& state : states) {
      const double lse = lse_of(state);
      if (lse != kEmpty) sum += std::exp(lse - max);
    }
    const int64_t head_dim = merged.out.shape[3];
    for (int64_t d = 0; d < head_dim; d += kPiece) {
      const int64_t n = std::min(kPiece, head_dim - d);
      float total[kPiece];
      float row[kPiece];
      // x + -0 is x for every x, -0 included: a single part goes through unchanged.
      std::fill_n(total, n, sum == 0 ? 0.0f : -0.0f);
      for (const AttentionState& state : states) {
        const double lse = lse_of(state);
        if (lse == kEmpty) continue;
        const auto weight = static_cast<float>(std::exp(lse - max) / sum);
        table.load_row(cpu::element(state.out, b, s, h, d), state.out.dtype, state.out.strides[3],
                       static_cast<int>(n), row);
        for (int64_t i = 0; i < n; ++i) total[i] += weight * row[i];
      }
      table.store_row(total, static_cast<int>(n), merged.out.dtype, merged.out.strides[3],
                      cpu::element(merged.out, b, s, h, d));
    }
    // Last: it may be the memory of a part's.
    if (merged.lse.has_value()) {
      *reinterpret_cast<float*>(cpu::element(*merged.lse, b, s, h)) =
          static_cast<float>(sum == 0 ? kEmpty : max + std::log(sum));
    }
  }
};

}  // namespace

Status merge_states(std::span<const AttentionState> states, const AttentionOutputs& merged,
                    const Context& context) noexcept {
  const bool on_cpu = context.device.type == DeviceType::kCpu;
  if (on_cpu) {
    if (Status status = validate_context(context); !status.ok()) return status;
  }
  if (Status status = validate_merge(states, merged, context.device); !status.ok()) return status;
  if (!on_cpu) return merge_states_on_cuda(states, merged, context.device.index, context.stream);
  const KernelTable* table = find_kernel_table(context.force_isa ? context.isa : best_isa());
  if (table == nullptr) return failure(StatusCode::kInternal, "no kernel table");
  const Merger merger{*table, states, merged};
  const Extents& shape = merged.out.shape;
  const int64_t rows = shape[0] * shape[1] * shape[2];
  cpu::for_each_task(context, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int64_t) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const int64_t h = row % shape[2];
      const int64_t s = row / shape[2] % shape[1];
      merger.merge_row(row / (shape[1] * shape[2]), s, h);
    }
  });
  return {};
}

}  // namespace attn8
