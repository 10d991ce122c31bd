// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// What libFuzzer does, as far as a compiler without it allows: random byte strings and mutations of
// those that a target found worth keeping. Bytes that end the process are left in a file, whose
// name as an argument runs them again.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <csignal>
#include <fstream>
#include <iterator>
#include <random>

#include "fuzz_target.hpp"

/// Of the sanitizers' run time, where there is one: called when it ends the process.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace attn8::fuzz {
namespace {

constexpr size_t kCorpus = 1024;

struct Options {
  int64_t runs = 0;
  double seconds = 0;
  uint64_t seed = 1;
  size_t max_bytes = 512;
  std::string crash_file = "fuzz-finding";
  std::vector<std::string> files;
};

/// The input that is running, for the handlers below, which may allocate nothing.
const Bytes* running = nullptr;
std::string crash_file;

void keep_input() {
  if (running == nullptr) return;
  const int file = open(crash_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file < 0) return;
  const bool kept = write(file, running->data(), running->size()) >= 0;
  close(file);
  running = nullptr;
  constexpr char kText[] = "fuzz: the input is kept in ";
  if (!kept || write(STDERR_FILENO, kText, sizeof kText - 1) < 0 ||
      write(STDERR_FILENO, crash_file.data(), crash_file.size()) < 0 ||
      write(STDERR_FILENO, "\n", 1) < 0) {
    _exit(3);
  }
}

void on_signal(int signal) {
  keep_input();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

int run_one(const Bytes& input) {
  running = &input;
  const int result = LLVMFuzzerTestOneInput(input.data(), input.size());
  running = nullptr;
  return result;
}

class Mutator {
 public:
  Mutator(uint64_t seed, size_t max_bytes) : random_(seed), max_bytes_(max_bytes) {}

  size_t below(size_t n) { return static_cast<size_t>(random_() % n); }

  Bytes fresh() {
    Bytes bytes(1 + below(max_bytes_));
    for (uint8_t& byte : bytes) byte = any_byte();
    return bytes;
  }

  Bytes mutated(const std::vector<Bytes>& corpus) {
    Bytes bytes = corpus[below(corpus.size())];
    for (size_t n = 1 + below(4); n > 0; --n) mutate(bytes, corpus[below(corpus.size())]);
    if (bytes.empty()) bytes.push_back(any_byte());
    bytes.resize(std::min(bytes.size(), max_bytes_));
    return bytes;
  }

 private:
  /// Small numbers and the ends of the range more often than others.
  uint8_t any_byte() {
    static constexpr uint8_t kEnds[] = {0, 1, 2, 3, 7, 8, 0x7f, 0x80, 0xfe, 0xff};
    return below(4) == 0 ? kEnds[below(std::size(kEnds))] : static_cast<uint8_t>(random_());
  }

  void mutate(Bytes& bytes, const Bytes& other) {
    if (bytes.empty()) return bytes.push_back(any_byte());
    const size_t at = below(bytes.size());
    const auto place = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(8)) {
      case 0:
        *place = any_byte();
        break;
      case 1:
        *place = static_cast<uint8_t>(*place ^ (1U << below(8)));
        break;
      case 2:
        *place = static_cast<uint8_t>(*place + below(9) - 4);
        break;
      case 3:
        bytes.insert(place, any_byte());
        break;
      case 4:
        bytes.erase(place);
        break;
      case 5: {  // a stretch of another input over this one
        if (other.empty()) break;
        const size_t from = below(other.size());
        const size_t count =
            std::min(1 + below(16), std::min(other.size() - from, bytes.size() - at));
        std::copy_n(other.begin() + static_cast<std::ptrdiff_t>(from), count, place);
        break;
      }
      case 6: {  // doubled
        const size_t count = std::min<size_t>(1 + below(16), bytes.size() - at);
        const Bytes stretch(place, place + static_cast<std::ptrdiff_t>(count));
        bytes.insert(place, stretch.begin(), stretch.end());
        break;
      }
      default:
        bytes.resize(at + 1);
    }
  }

  std::mt19937_64 random_;
  size_t max_bytes_;
};

Bytes read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void fuzz(const Options& options) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  std::vector<Bytes> corpus;
  int64_t runs = 0;
  int64_t worth = 0;
  for (const Bytes& seed : seeds()) {
    ++runs;
    if (run_one(seed) == 0) corpus.push_back(seed);
  }
  Mutator mutator(options.seed, options.max_bytes);
  while (runs < options.runs || elapsed() < options.seconds) {
    const bool fresh = corpus.empty() || mutator.below(8) == 0;
    Bytes input = fresh ? mutator.fresh() : mutator.mutated(corpus);
    ++runs;
    if (run_one(input) != 0) continue;
    ++worth;
    if (corpus.size() < kCorpus) {
      corpus.push_back(std::move(input));
    } else {
      corpus[mutator.below(corpus.size())] = std::move(input);
    }
  }
  fmt::print("{} executions, {} of bytes that were taken, in {:.1f} s, seed {}: no finding\n", runs,
             worth, elapsed(), options.seed);
}

}  // namespace

}  // namespace attn8::fuzz

int main(int argc, char** argv) {
  using namespace attn8::fuzz;  // NOLINT: this is its main()
  Options options;
  CLI::App app("Runs a fuzz target on random bytes, or on files");
  app.add_option("--runs", options.runs, "Executions, at least");
  app.add_option("--seconds", options.seconds, "Time, at least");
  app.add_option("--seed", options.seed, "Of the random bytes")->capture_default_str();
  app.add_option("--max-bytes", options.max_bytes, "Longest input")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--crash-file", options.crash_file, "Where the input of a finding is left")
      ->capture_default_str();
  app.add_option("files", options.files, "Inputs to run instead");
  CLI11_PARSE(app, argc, argv);

  crash_file = options.crash_file;
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(keep_input);
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) {
    std::signal(signal, on_signal);
  }
  for (const std::string& file : options.files) {
    const Bytes input = read_file(file);
    const int result = run_one(input);
    fmt::print("{}: {} bytes, {}\n", file, input.size(), result == 0 ? "taken" : "not taken");
  }
  if (options.files.empty()) fuzz(options);
  return 0;
}
