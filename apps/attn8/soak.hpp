// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attn8/kv_cache.hpp"

namespace attn8::app {

/// A long random life of one KV cache.
struct SoakOptions {
  int64_t operations = 0;  ///< of all threads together
  uint64_t seed = 1;
  int64_t pages = 1024;      ///< memory cap; it is run into on purpose
  int32_t threads = 1;       ///< each with sequences of its own, all of one cache and one prompt
  int64_t check_every = 40;  ///< attended sequences per one that is compared with the oracle
};

/// Sizes of the cache of every soak: small enough that a million operations take minutes.
inline constexpr int64_t kSoakHeads = 2;
inline constexpr int64_t kSoakQueryHeads = 4;
inline constexpr int64_t kSoakHeadDim = 64;
inline constexpr int32_t kSoakPageSize = 64;

struct SoakReport {
  std::map<std::string, int64_t> counts;  ///< calls by kind; "out_of_pages" and "refused" beside
  int64_t operations = 0;
  int64_t sequences = 0;       ///< created or forked
  int64_t tokens = 0;          ///< appended
  int64_t rows = 0;            ///< queries attended
  int64_t checks = 0;          ///< sequences of an attend() compared with the oracle
  double worst_out_ratio = 0;  ///< |out - oracle| / bound; at most 1
  double worst_lse_ratio = 0;
  int64_t peak_pages = 0;
  double seconds = 0;
  size_t rss_start_bytes = 0;         ///< before the cache is made
  size_t rss_peak_bytes = 0;          ///< of the process so far
  size_t rss_end_bytes = 0;           ///< when it is gone
  bool rss_judged = true;             ///< false under sanitizers that keep freed memory
  std::vector<std::string> failures;  ///< the first few; empty when all went as it must

  [[nodiscard]] nlohmann::ordered_json json() const;
};

/// Appends, forks, attends, truncates and frees at random, beside a model that knows what every
/// sequence must hold and, on one thread, how many pages there must be. Ends at the first failure.
/// Depends on nothing but the options, except for which calls run out of pages on several threads.
SoakReport soak(const SoakOptions& options);

}  // namespace attn8::app
