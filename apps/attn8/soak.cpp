// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "soak.hpp"

#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <fstream>
#include <mutex>
#include <random>
#include <sstream>
#include <string_view>
#include <thread>

#include "failure.hpp"
#include "parallel.hpp"
#include "soak_model.hpp"

namespace attn8::app {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kKeepsFreedMemory = true;
#else
constexpr bool kKeepsFreedMemory = false;
#endif

/// Memory of one thread's heap and of the run-time libraries, which stays; a leak of 16 bytes per
/// operation is as much after a million of them.
constexpr size_t kRssAllowance = size_t{16} << 20;

/// A line of /proc/self/status in bytes.
size_t resident_bytes(std::string_view field) {
  std::ifstream file("/proc/self/status");
  std::string line;
  while (std::getline(file, line)) {
    if (!line.starts_with(field)) continue;
    std::istringstream numbers(line.substr(field.size()));
    size_t kib = 0;
    numbers >> kib;
    return kib * 1024;
  }
  return 0;
}

/// What the threads of a soak share.
struct Shared {
  const SoakOptions& options;
  KvCache cache;
  KvCache other;  ///< its sequences are foreign to `cache`
  const SoakTokens tokens;
  SoakPages pages;
  KvSequence prompt;  ///< of everybody; lives to the end
  SoakSequence prompt_model;
  KvSequence foreign;
  std::atomic<bool> stop = false;
  std::mutex mutex;  ///< of report
  SoakReport report;
  Progress progress;

  explicit Shared(const SoakOptions& soak_options)
      : options(soak_options),
        cache(make_cache(soak_options.pages)),
        other(make_cache(1)),
        tokens(soak_options.seed, kSoakHeads * kSoakHeadDim),
        prompt(take(cache.create())),
        prompt_model(pages),
        foreign(take(other.create())),
        progress("soak", static_cast<double>(soak_options.operations)) {}

  static KvCache make_cache(int64_t pages) {
    return take(KvCache::make({.nheads_k = kSoakHeads,
                               .head_dim = kSoakHeadDim,
                               .page_size = kSoakPageSize,
                               .max_pages = pages}));
  }
};

/// One thread: its sequences, their models, and what it did.
class Worker {
 public:
  Worker(Shared& shared, uint64_t seed) : shared_(shared), random_(seed) {}

  void run(int64_t operations) {
    for (; operations > 0 && !shared_.stop; --operations) {
      ++report_.operations;
      step();
      if (report_.operations % 1024 == 0) shared_.progress.advance(1024);
    }
    while (!live_.empty()) free_one();
    const std::scoped_lock lock(shared_.mutex);
    SoakReport& total = shared_.report;
    for (const auto& [name, count] : report_.counts) total.counts[name] += count;
    for (const std::string& failure : report_.failures) total.failures.push_back(failure);
    total.operations += report_.operations;
    total.sequences += report_.sequences;
    total.tokens += report_.tokens;
    total.rows += report_.rows;
    total.checks += report_.checks;
    total.worst_out_ratio = std::max(total.worst_out_ratio, report_.worst_out_ratio);
    total.worst_lse_ratio = std::max(total.worst_lse_ratio, report_.worst_lse_ratio);
    total.peak_pages = std::max(total.peak_pages, report_.peak_pages);
  }

 private:
  struct Live {
    KvSequence handle;
    SoakSequence model;
  };

  uint64_t below(uint64_t n) { return random_() % n; }
  size_t pick() { return below(live_.size()); }

  void fail_soak(const std::string& what) {
    report_.failures.push_back(fmt::format("operation {}: {}", report_.operations, what));
    shared_.stop = true;
  }

  /// Whether the status is what the model says of a call that wants that many pages.
  bool succeeded(std::string_view call, const Status& status, int64_t wanted, int64_t used_before) {
    ++report_.counts[std::string(call)];
    const int64_t left = shared_.options.pages - used_before;
    const bool alone = shared_.options.threads == 1;
    const bool must = wanted == 0 || (alone && wanted <= left);
    const bool may = !alone || wanted <= left;
    if (status.ok() && may) return true;
    if (!status.ok() && !must && status.code() == StatusCode::kOutOfMemory) {
      ++report_.counts["out_of_pages"];
      out_of_pages_ = true;
      return false;
    }
    fail_soak(fmt::format("{} wanted {} of {} free pages and answered '{}'", call, wanted, left,
                          status.ok() ? "ok" : status.message()));
    return false;
  }

  void expect_refused(std::string_view call, const Status& status) {
    ++report_.counts["refused"];
    if (status.code() != StatusCode::kInvalidArgument || status.message().empty()) {
      fail_soak(fmt::format("{} with a bad argument answered '{}'", call,
                            status.ok() ? "ok" : status.message()));
    }
  }

  void step() {
    const uint64_t choice = live_.empty() ? 0 : below(100);
    out_of_pages_ = false;
    std::optional<size_t> changed;
    if (choice < 2) {
      create();
    } else if (choice < 46) {
      append(changed.emplace(pick()));
    } else if (choice < 50) {
      append_several();
    } else if (choice < 54) {
      fork();
    } else if (choice < 58) {
      truncate(changed.emplace(pick()));
    } else if (choice < 60) {
      free_one();
    } else if (choice < 62) {
      misuse();
    } else {
      attend();
    }
    check_counts(changed);
    if (!out_of_pages_) return;
    // What ran out must be as it was; and somebody has to go.
    if (changed && below(16) == 0) attend_batch({*changed}, true);
    if (live_.size() > 1 && below(2) == 0) free_one();
  }

  /// Lengths and usage against the model.
  void check_counts(std::optional<size_t> changed) {
    const size_t i = changed.value_or(live_.empty() ? 0 : pick());
    if (i < live_.size()) {
      const Result<int64_t> length = shared_.cache.length(live_[i].handle);
      if (!length.ok() || length.value() != live_[i].model.length()) {
        fail_soak(fmt::format("length is {}, the model's {}", length.ok() ? length.value() : -1,
                              live_[i].model.length()));
      }
    }
    const KvCacheUsage usage = shared_.cache.usage();
    report_.peak_pages = std::max(report_.peak_pages, usage.pages_used);
    if (usage.pages_used + usage.pages_free != shared_.options.pages) {
      fail_soak(fmt::format("{} pages used and {} free of {}", usage.pages_used, usage.pages_free,
                            shared_.options.pages));
    }
    if (shared_.options.threads > 1) return;
    if (usage.pages_used != shared_.pages.used() || usage.sequences != std::ssize(live_) + 1) {
      fail_soak(fmt::format("{} pages and {} sequences, the model's {} and {}", usage.pages_used,
                            usage.sequences, shared_.pages.used(), live_.size() + 1));
    }
  }

  void create() {
    // Every other sequence goes on from the prompt of all, the whole of it or a part.
    const int64_t length = static_cast<int64_t>(
        below(2) == 0 ? 0 : below(static_cast<uint64_t>(shared_.prompt_model.length()) + 1));
    if (length > 0) return add_fork(shared_.prompt, shared_.prompt_model, length);
    live_.push_back({take(shared_.cache.create()), SoakSequence(shared_.pages)});
    ++report_.counts["create"];
    ++report_.sequences;
    append(live_.size() - 1);
  }

  /// Tokens to append to a sequence: first a prompt of 1 to 1023, short ones as likely as long
  /// ones; then mostly decode.
  uint64_t draw_count(const SoakSequence& model) {
    const uint64_t kind = below(16);
    if (model.length() == 0) return below(uint64_t{2} << below(10)) + 1;
    if (kind < 12) return 1;
    return kind < 15 ? below(64) : below(512);
  }

  void append(size_t i) {
    const uint64_t count = draw_count(live_[i].model);
    append_batch({i}, {0, static_cast<int32_t>(count)});
  }

  /// Up to four sequences in one call.
  void append_several() {
    std::vector<size_t> batch = {pick()};
    for (uint64_t more = below(4); more > 0; --more) {
      const size_t i = pick();
      if (std::ranges::find(batch, i) == batch.end()) batch.push_back(i);
    }
    std::vector<int32_t> cu_seqlens = {0};
    for (const size_t i : batch) {
      cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(draw_count(live_[i].model)));
    }
    append_batch(batch, cu_seqlens);
  }

  void append_batch(const std::vector<size_t>& batch, const std::vector<int32_t>& cu_seqlens) {
    const auto total = static_cast<size_t>(cu_seqlens.back());
    std::vector<uint64_t> tokens(total);
    for (uint64_t& token : tokens) token = below(uint64_t{1} << 32);
    const size_t row = kSoakHeads * kSoakHeadDim;
    k_.resize(total * row);
    v_.resize(total * row);
    for (size_t t = 0; t < total; ++t) {
      std::ranges::copy(shared_.tokens.k(tokens[t]), k_.begin() + static_cast<long>(t * row));
      std::ranges::copy(shared_.tokens.v(tokens[t]), v_.begin() + static_cast<long>(t * row));
    }
    const Extents shape = {1, static_cast<int64_t>(total), kSoakHeads, kSoakHeadDim};
    const TensorView k = bshd(k_.data(), DType::kFloat32, shape);
    const TensorView v = bshd(v_.data(), DType::kFloat32, shape);
    std::vector<KvSequence> handles;
    int64_t wanted = 0;
    for (size_t b = 0; b < batch.size(); ++b) {
      handles.push_back(live_[batch[b]].handle);
      wanted += live_[batch[b]].model.append_wants(cu_seqlens[b + 1] - cu_seqlens[b]);
    }
    const int64_t used = shared_.pages.used();
    const Status status = batch.size() == 1
                              ? shared_.cache.append(handles[0], k, v, Context())
                              : shared_.cache.append(handles, k, v, cu_seqlens, Context());
    if (!succeeded(batch.size() == 1 ? "append" : "append_batch", status, wanted, used)) return;
    for (size_t b = 0; b < batch.size(); ++b) {
      live_[batch[b]].model.append(
          std::span(tokens).subspan(static_cast<size_t>(cu_seqlens[b]),
                                    static_cast<size_t>(cu_seqlens[b + 1] - cu_seqlens[b])));
    }
    report_.tokens += static_cast<int64_t>(total);
  }

  void add_fork(KvSequence parent, const SoakSequence& model, int64_t length) {
    const int64_t used = shared_.pages.used();
    const Result<KvSequence> child = shared_.cache.fork(parent, length);
    if (!succeeded("fork", child.status(), model.fork_wants(length), used)) return;
    live_.push_back({child.value(), model.fork(length)});
    ++report_.sequences;
  }

  void fork() {
    const Live& parent = live_[pick()];
    const auto length = static_cast<uint64_t>(parent.model.length());
    add_fork(parent.handle, parent.model,
             static_cast<int64_t>(below(2) == 0 ? length : below(length + 1)));
  }

  void truncate(size_t i) {
    Live& live = live_[i];
    const auto length = static_cast<int64_t>(below(static_cast<uint64_t>(live.model.length()) + 1));
    const int64_t wanted = live.model.truncate_wants(length);
    const int64_t used = shared_.pages.used();
    const Status status = shared_.cache.truncate(live.handle, length);
    if (succeeded("truncate", status, wanted, used)) live.model.truncate(length);
  }

  void free_one() {
    const size_t i = pick();
    succeeded("free", shared_.cache.free(live_[i].handle), 0, shared_.pages.used());
    freed_ = live_[i].handle;
    std::swap(live_[i], live_.back());
    live_.pop_back();
  }

  /// Calls that must be refused and change nothing.
  void misuse() {
    KvCache& cache = shared_.cache;
    const Live& live = live_[pick()];
    const int64_t beyond = live.model.length() + 1;
    std::array<float, kSoakHeads* kSoakHeadDim> token = {};
    const Extents shape = {1, 1, kSoakHeads, kSoakHeadDim};
    const TensorView one = bshd(token.data(), DType::kFloat32, shape);
    TensorView narrow = one;
    narrow.shape[3] -= 1;
    for (const KvSequence gone : {freed_, shared_.foreign, KvSequence()}) {
      expect_refused("append", cache.append(gone, one, one, Context()));
      expect_refused("fork", cache.fork(gone, 0).status());
      expect_refused("truncate", cache.truncate(gone, 0));
      expect_refused("free", cache.free(gone));
      expect_refused("length", cache.length(gone).status());
    }
    expect_refused("append", cache.append(live.handle, narrow, narrow, Context()));
    expect_refused("fork", cache.fork(live.handle, beyond).status());
    expect_refused("truncate", cache.truncate(live.handle, beyond));
    expect_refused("truncate", cache.truncate(live.handle, -1));
  }

  void attend() {
    std::vector<size_t> batch(1 + below(4));
    for (size_t& i : batch) i = pick();
    attend_batch(batch, false);
  }

  /// Mostly decode, some chunks of queries; `check` compares all of it with the oracle.
  void attend_batch(const std::vector<size_t>& batch, bool check) {
    std::vector<KvSequence> handles;
    std::vector<int32_t> cu_seqlens_q = {0};
    int64_t longest = 0;
    for (const size_t i : batch) {
      handles.push_back(live_[i].handle);
      longest = std::max(longest, live_[i].model.length());
      const uint64_t rows = below(8) != 0 ? 1 : below(16);
      cu_seqlens_q.push_back(cu_seqlens_q.back() + static_cast<int32_t>(rows));
    }
    const auto total = static_cast<int64_t>(cu_seqlens_q.back());
    const Extents shape = {1, total, kSoakQueryHeads, kSoakHeadDim};
    const Extents lse_shape = {1, total, kSoakQueryHeads, 1};
    q_.resize(static_cast<size_t>(total * kSoakQueryHeads * kSoakHeadDim));
    out_.assign(q_.size(), -1.0F);
    lse_.assign(static_cast<size_t>(total * kSoakQueryHeads), -1.0F);
    constexpr size_t kPart = kSoakHeads * kSoakHeadDim;  // of a query, which is some tokens' V
    for (size_t at = 0; at < q_.size(); at += kPart) {
      std::ranges::copy(shared_.tokens.v(random_()), q_.begin() + static_cast<long>(at));
    }
    TensorView q = bshd(q_.data(), DType::kFloat32, shape);
    TensorView out = bshd(out_.data(), DType::kFloat32, shape);
    TensorView lse = bshd(lse_.data(), DType::kFloat32, lse_shape);
    const SoakScores scores(random_, total, longest);
    const Status status =
        shared_.cache.attend(handles, q, cu_seqlens_q, {out, lse}, scores.options(), Context());
    if (!succeeded("attend", status, 0, 0)) return;
    report_.rows += total;
    for (size_t b = 0; b < batch.size(); ++b) {
      if (!check && below(static_cast<uint64_t>(shared_.options.check_every)) != 0) continue;
      const int64_t first = cu_seqlens_q[b];
      const auto part = [&](TensorView x) {
        x.data = static_cast<float*>(x.data) + first * x.strides[1];
        x.shape[1] = cu_seqlens_q[b + 1] - first;
        return x;
      };
      if (part(q).shape[1] == 0) continue;
      const SoakRatios ratios = compare_with_oracle(live_[batch[b]].model, shared_.tokens, part(q),
                                                    part(out), part(lse), scores, first);
      ++report_.checks;
      report_.worst_out_ratio = std::max(report_.worst_out_ratio, ratios.out);
      report_.worst_lse_ratio = std::max(report_.worst_lse_ratio, ratios.lse);
      if (ratios.out > 1 || ratios.lse > 1) {
        fail_soak(
            fmt::format("attend ({}) over {} tokens is {:.3g} (out) and {:.3g} (lse) times the "
                        "bound away from the oracle",
                        scores.label(), live_[batch[b]].model.length(), ratios.out, ratios.lse));
      }
    }
  }

  Shared& shared_;
  std::mt19937_64 random_;
  std::vector<Live> live_;
  KvSequence freed_;
  bool out_of_pages_ = false;
  SoakReport report_;
  std::vector<float> k_, v_, q_, out_, lse_;
};

void run_workers(Shared& shared) {
  const SoakOptions& options = shared.options;
  std::vector<uint64_t> prompt(300);  // ends inside a page
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = i;
  std::vector<float> k;
  std::vector<float> v;
  for (const uint64_t token : prompt) {
    k.insert(k.end(), shared.tokens.k(token).begin(), shared.tokens.k(token).end());
    v.insert(v.end(), shared.tokens.v(token).begin(), shared.tokens.v(token).end());
  }
  const Extents shape = {1, std::ssize(prompt), kSoakHeads, kSoakHeadDim};
  require(shared.cache.append(shared.prompt, bshd(k.data(), DType::kFloat32, shape),
                              bshd(v.data(), DType::kFloat32, shape), Context()));
  shared.prompt_model.append(prompt);
  parallel_cases(options.threads, options.threads, [&](int64_t thread) {
    const int64_t share = options.operations / options.threads +
                          (thread < options.operations % options.threads ? 1 : 0);
    Worker(shared, options.seed * 1000003 + static_cast<uint64_t>(thread)).run(share);
  });
  require(shared.cache.free(shared.prompt));
  shared.prompt_model.truncate(0);
  const KvCacheUsage usage = shared.cache.usage();
  if (usage.pages_used != 0 || usage.sequences != 0 || usage.bytes_used != 0) {
    shared.report.failures.push_back(fmt::format("at the end {} pages and {} sequences are left",
                                                 usage.pages_used, usage.sequences));
  }
}

}  // namespace

SoakReport soak(const SoakOptions& options) {
  const size_t rss_start = resident_bytes("VmRSS:");
  SoakReport report;
  const auto begin = std::chrono::steady_clock::now();
  {
    Shared shared(options);
    run_workers(shared);
    report = std::move(shared.report);
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  malloc_trim(0);
  report.rss_start_bytes = rss_start;
  report.rss_peak_bytes = resident_bytes("VmHWM:");
  report.rss_end_bytes = resident_bytes("VmRSS:");
  report.rss_judged = !kKeepsFreedMemory;
  if (report.rss_judged && report.rss_end_bytes > rss_start + kRssAllowance) {
    report.failures.push_back(
        fmt::format("resident memory went from {} to {} bytes", rss_start, report.rss_end_bytes));
  }
  return report;
}

nlohmann::ordered_json SoakReport::json() const {
  return {{"operations", operations},
          {"seconds", seconds},
          {"operations_per_s", static_cast<double>(operations) / seconds},
          {"counts", counts},
          {"sequences", sequences},
          {"tokens", tokens},
          {"rows", rows},
          {"checks", checks},
          {"worst_out_ratio", worst_out_ratio},
          {"worst_lse_ratio", worst_lse_ratio},
          {"peak_pages", peak_pages},
          {"rss_start_bytes", rss_start_bytes},
          {"rss_peak_bytes", rss_peak_bytes},
          {"rss_end_bytes", rss_end_bytes},
          {"rss_judged", rss_judged},
          {"failures", failures}};
}

}  // namespace attn8::app
