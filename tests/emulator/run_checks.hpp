// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "emulator/emulator.hpp"

/// What the tests of the emulator share: runs that must pass or fail, and bytes.
namespace attn8::cuda {

using emulator::Async;
using emulator::Config;
using emulator::Report;

inline Config config(int threads, size_t shared_bytes, Async async = Async::kLate) {
  Config result;
  result.threads = threads;
  result.shared_bytes = shared_bytes;
  result.async = async;
  return result;
}

/// Expects a run to fail with a line that holds `what`.
template <class Kernel>
void expect_error(const Config& c, const std::string& what, Kernel kernel) {
  const Report report = emulator::run(c, {}, kernel);
  EXPECT_FALSE(report.ok);
  EXPECT_NE(report.error.find(what), std::string::npos) << report.error;
}
template <class Kernel>
Report expect_ok(const Config& c, Kernel kernel) {
  const Report report = emulator::run(c, {}, kernel);
  EXPECT_TRUE(report.ok) << report.error;
  return report;
}

inline std::vector<uint8_t> random_bytes(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

inline uint32_t word(const uint8_t* bytes) {
  return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
}

}  // namespace attn8::cuda
