// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

/// What a fuzz target is: bytes in, nothing checked that holds; libFuzzer's interface, so that it
/// can drive the targets too. Returns 0, or -1 for bytes that are not worth keeping for mutation.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace attn8::fuzz {

using Bytes = std::vector<uint8_t>;

/// Inputs to begin with; may be empty. Every target has one.
std::vector<Bytes> seeds();

/// Prints what is wrong and aborts: the driver, or libFuzzer, keeps the bytes.
[[noreturn]] inline void finding(const std::string& what) {
  std::fprintf(stderr, "finding: %s\n", what.c_str());
  std::abort();
}

inline void expect(bool holds, const std::string& what) {
  if (!holds) finding(what);
}

/// A number in [-4, 4], small ones more often, that is a function of its arguments.
inline double value_at(uint64_t seed, uint64_t index) noexcept {
  uint64_t x = (seed << 32 ^ index) + 0x9e3779b97f4a7c15;  // SplitMix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  x ^= x >> 31;
  const double u = static_cast<double>(static_cast<int64_t>(x)) * 0x1p-63;
  return 4 * u * u * u;
}

/// Reads choices from bytes; zeros follow the last one.
class ByteReader {
 public:
  ByteReader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  [[nodiscard]] bool at_end() const noexcept { return next_ >= size_; }
  uint8_t byte() noexcept { return at_end() ? uint8_t{0} : data_[next_++]; }
  /// In [0, n), n at most 65536.
  uint32_t below(uint32_t n) noexcept {
    uint32_t value = byte();
    if (n > 256) value = value << 8 | byte();
    return value % n;
  }
  bool one_in(uint32_t n) noexcept { return below(n) == n - 1; }
  uint64_t word() noexcept {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return value;
  }
  template <class T>
  T pick(std::initializer_list<T> choices) noexcept {
    return choices.begin()[below(static_cast<uint32_t>(choices.size()))];
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t next_ = 0;
};

}  // namespace attn8::fuzz
