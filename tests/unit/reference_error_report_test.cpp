// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attn8/reference.hpp"

namespace attn8::reference {
namespace {

TEST(ErrorReport, ByHand) {
  const std::vector<double> reference = {3, -4, 0, 1, 2, -2};
  const std::vector<double> out = {3, -2, 0.5, 1, 2, -3};
  const ErrorReport report = error_report(out, reference);
  EXPECT_EQ(report.elements, 6);
  EXPECT_DOUBLE_EQ(report.rel_l2, std::sqrt((4 + 0.25 + 1) / 34.0));
  EXPECT_DOUBLE_EQ(report.mean_rel, 3.5 / 12.0);
  EXPECT_DOUBLE_EQ(report.max_abs, 2);
  EXPECT_DOUBLE_EQ(report.cosine, (9 + 8 + 1 + 4 + 6) / std::sqrt(27.25 * 34.0));
  const double zero_element = 0.5 / 1e-5, last = 1 / (2 + 1e-5);
  EXPECT_DOUBLE_EQ(report.mre, (2 / (4 + 1e-5) + zero_element + last) / 6);
  EXPECT_DOUBLE_EQ(report.mre_last4, (zero_element + last) / 4);
}

TEST(ErrorReport, FewerThanFourElements) {
  const std::vector<double> reference = {1, 2}, out = {1, 3};
  EXPECT_DOUBLE_EQ(error_report(out, reference).mre_last4, 1 / (2 + 1e-5) / 2);
}

TEST(ErrorReport, ZeroAgainstZeroIsNoError) {
  const std::vector<double> zero(5, 0.0);
  const ErrorReport report = error_report(zero, zero);
  EXPECT_EQ(report.rel_l2, 0);
  EXPECT_EQ(report.mean_rel, 0);
  EXPECT_EQ(report.max_abs, 0);
  EXPECT_EQ(report.cosine, 1);
  EXPECT_EQ(report.mre, 0);
  EXPECT_EQ(error_report({}, {}).elements, 0);
}

TEST(ErrorReport, SomethingAgainstZeroIsInfinite) {
  const std::vector<double> zero(2, 0.0), out = {0, 1};
  EXPECT_TRUE(std::isinf(error_report(out, zero).rel_l2));
  EXPECT_EQ(error_report(out, zero).cosine, 0);
}

TEST(ErrorReport, NanShowsInEveryMeasure) {
  const std::vector<double> reference = {1, 2, 3};
  const std::vector<double> out = {1, std::numeric_limits<double>::quiet_NaN(), 7};
  const ErrorReport report = error_report(out, reference);
  EXPECT_TRUE(std::isnan(report.rel_l2));
  EXPECT_TRUE(std::isnan(report.mean_rel));
  EXPECT_TRUE(std::isnan(report.max_abs));
  EXPECT_TRUE(std::isnan(report.cosine));
  EXPECT_TRUE(std::isnan(report.mre));
}

}  // namespace
}  // namespace attn8::reference
