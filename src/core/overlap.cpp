// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/overlap.hpp"

#include <algorithm>
#include <array>
#include <cstdint>

namespace attn8 {
namespace {

/// Comparisons of two runs of bytes after which overlap() gives up: tens of microseconds.
constexpr int kBudget = 2048;

struct Axis {
  int64_t stride = 0;  ///< in bytes, > 0
  int64_t extent = 0;  ///< > 1
};

/// The bytes of a view: a run of `run` bytes, repeated along axes of falling stride.
struct Bytes {
  uintptr_t begin = 0;
  int64_t run = 0;
  std::array<Axis, 4> axes = {};
  int count = 0;

  /// From the first byte of the axes from `level` on to behind their last.
  [[nodiscard]] int64_t span(int level) const noexcept {
    int64_t bytes = run;
    for (int i = level; i < count; ++i) {
      const Axis& axis = axes[static_cast<size_t>(i)];
      bytes += axis.stride * (axis.extent - 1);
    }
    return bytes;
  }
};

Bytes bytes_of(const ConstTensorView& view) noexcept {
  Bytes bytes;
  bytes.begin = reinterpret_cast<uintptr_t>(view.data);
  bytes.run = static_cast<int64_t>(dtype_bytes(view.dtype));
  const int64_t size = bytes.run;
  for (size_t i = 0; i < 4; ++i) {
    const int64_t extent = view.shape[i];
    // Once (its stride may then be any number), or the same bytes again.
    if (extent <= 1 || view.strides[i] == 0) continue;
    int64_t stride = view.strides[i] * size;
    if (stride < 0) {
      bytes.begin -= static_cast<uintptr_t>(-stride) * static_cast<uintptr_t>(extent - 1);
      stride = -stride;
    }
    auto place = static_cast<size_t>(bytes.count++);
    for (; place > 0 && bytes.axes[place - 1].stride < stride; --place) {
      bytes.axes[place] = bytes.axes[place - 1];
    }
    bytes.axes[place] = {stride, extent};
  }
  // Inner axes that leave no gaps are part of the run.
  while (bytes.count > 0) {
    const Axis& inner = bytes.axes[static_cast<size_t>(bytes.count - 1)];
    if (inner.stride > bytes.run) break;
    bytes.run += inner.stride * (inner.extent - 1);
    --bytes.count;
  }
  return bytes;
}

/// floor(a / b) for b > 0.
int64_t floor_div(int64_t a, int64_t b) noexcept { return a / b - (a % b < 0 ? 1 : 0); }

class Search {
 public:
  Search(const Bytes& a, const Bytes& b) noexcept : a_(a), b_(b) {}

  /// Whether the axes of a from level_a on and those of b from level_b on, which begins `delta`
  /// bytes behind a, meet.
  bool meet(int level_a, int level_b, int64_t delta) noexcept {
    if (--budget_ < 0) return false;
    if (delta >= a_.span(level_a) || -delta >= b_.span(level_b)) return false;
    const bool more_a = level_a < a_.count;
    const bool more_b = level_b < b_.count;
    if (!more_a && !more_b) return true;
    const Axis a = more_a ? a_.axes[static_cast<size_t>(level_a)] : Axis{0, 1};
    const Axis b = more_b ? b_.axes[static_cast<size_t>(level_b)] : Axis{0, 1};
    if (a.stride == b.stride) {
      // Only how far the two indices lie apart matters: at i_b - i_a = n, b is at delta + n stride.
      return any(delta, a.stride, a_.span(level_a + 1), b_.span(level_b + 1), -(a.extent - 1),
                 b.extent - 1,
                 [&](int64_t moved) { return meet(level_a + 1, level_b + 1, moved); });
    }
    if (a.stride > b.stride) {
      return any(delta, a.stride, a_.span(level_a + 1), b_.span(level_b), -(a.extent - 1), 0,
                 [&](int64_t moved) { return meet(level_a + 1, level_b, moved); });
    }
    return any(delta, b.stride, a_.span(level_a), b_.span(level_b + 1), 0, b.extent - 1,
               [&](int64_t moved) { return meet(level_a, level_b + 1, moved); });
  }

 private:
  /// Whether `inside` holds of delta + n stride for an n in [low, high] at which spans of those
  /// lengths intersect.
  template <class Inside>
  bool any(int64_t delta, int64_t stride, int64_t span_a, int64_t span_b, int64_t low, int64_t high,
           Inside inside) noexcept {
    // -span_b < delta + n stride < span_a
    const int64_t first = std::max(low, floor_div(-span_b - delta, stride) + 1);
    const int64_t last = std::min(high, -floor_div(delta - span_a, stride) - 1);
    for (int64_t n = first; n <= last && budget_ >= 0; ++n) {
      if (inside(delta + n * stride)) return true;
    }
    return false;
  }

  const Bytes& a_;
  const Bytes& b_;
  int budget_ = kBudget;
};

}  // namespace

bool overlap(const ConstTensorView& a, const ConstTensorView& b) noexcept {
  const auto empty = [](const ConstTensorView& view) {
    return std::any_of(view.shape.begin(), view.shape.end(), [](int64_t n) { return n == 0; });
  };
  if (empty(a) || empty(b)) return false;
  const Bytes x = bytes_of(a);
  const Bytes y = bytes_of(b);
  // Apart, as almost always; the difference of what is left fits 64 bits, as views reach 2^48
  // bytes.
  if (x.begin + static_cast<uintptr_t>(x.span(0)) <= y.begin ||
      y.begin + static_cast<uintptr_t>(y.span(0)) <= x.begin) {
    return false;
  }
  return Search(x, y).meet(0, 0, static_cast<int64_t>(y.begin - x.begin));
}

}  // namespace attn8
