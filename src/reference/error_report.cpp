// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "attn8/reference.hpp"

namespace attn8::reference {
namespace {

// numerator / denominator, where 0 / 0 means that there is nothing to err about.
double ratio(double numerator, double denominator) {
  return numerator == 0 ? 0 : numerator / denominator;
}

}  // namespace

ErrorReport error_report(std::span<const double> out, std::span<const double> reference) noexcept {
  // The script published with arXiv:2409.16997 adds 1e-5 and looks at four elements.
  constexpr double kMreEpsilon = 1e-5;
  constexpr size_t kLastElements = 4;

  ErrorReport report;
  const size_t elements = std::min(out.size(), reference.size());
  const size_t last_from = elements - std::min(elements, kLastElements);
  double difference2 = 0, out2 = 0, reference2 = 0, product = 0;
  double difference1 = 0, reference1 = 0, relative = 0, relative_last = 0;
  for (size_t i = 0; i < elements; ++i) {
    const double difference = std::abs(out[i] - reference[i]);
    const double relative_i = difference / (std::abs(reference[i]) + kMreEpsilon);
    difference2 += difference * difference;
    out2 += out[i] * out[i];
    reference2 += reference[i] * reference[i];
    product += out[i] * reference[i];
    difference1 += difference;
    reference1 += std::abs(reference[i]);
    relative += relative_i;
    if (i >= last_from) relative_last += relative_i;
    // A NaN, once met, stays the maximum: no comparison with it is true.
    if (!(difference <= report.max_abs) && !std::isnan(report.max_abs)) report.max_abs = difference;
  }
  report.elements = static_cast<int64_t>(elements);
  report.rel_l2 = ratio(std::sqrt(difference2), std::sqrt(reference2));
  report.mean_rel = ratio(difference1, reference1);
  report.cosine =
      out2 == 0 && reference2 == 0 ? 1 : ratio(product, std::sqrt(out2) * std::sqrt(reference2));
  if (elements > 0) {
    report.mre = relative / static_cast<double>(elements);
    report.mre_last4 = relative_last / static_cast<double>(elements - last_from);
  }
  return report;
}

}  // namespace attn8::reference
