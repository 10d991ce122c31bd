// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "bench.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <sstream>

#include "failure.hpp"
#include "file.hpp"
#include "flags.hpp"
#include "peak.hpp"

namespace attn8::app {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kDecodeRows = 8;  // up to that many query rows reading K and V bounds the time
constexpr double kRepeatMs = 10;    // shorter kernels run several times per repeat

/// Bytes the attention must read of K and V: codes and one scale per token after quantization,
/// else the elements as they are.
double key_value_bytes(const Shape& shape, Mode mode, DType dtype) {
  const auto tokens = static_cast<double>(shape.batch * shape.nheads_k * shape.seqlen_k);
  const auto dim = static_cast<double>(shape.head_dim);
  if (mode == Mode::kExact) return 2 * tokens * dim * static_cast<double>(dtype_bytes(dtype));
  const double k_bytes = dim + sizeof(float);
  // `half` keeps V in bfloat16.
  const double v_bytes = mode == Mode::kHalf ? 2 * dim : dim + sizeof(float);
  return tokens * (k_bytes + v_bytes);
}

template <class T>
nlohmann::ordered_json or_null(const std::optional<T>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

}  // namespace

BenchResult bench(const Qkv& qkv, const AttentionOptions& options, const Context& context,
                  const BenchOptions& how) {
  const auto begin = Clock::now();
  BenchResult result;
  result.shape = qkv.shape();
  result.options = options;
  result.dtype = qkv.q.dtype();
  result.threads = context.threads;

  Runner runner(qkv, options, context);
  result.kernel = runner.plan().kernel();
  const Isa isa = runner.plan().isa();
  const bool on_cpu = context.device.type == DeviceType::kCpu;
  result.isa = on_cpu ? to_string(isa) : "cuda";
  result.kv_block = runner.plan().kv_block();
  result.options.v_granularity = runner.plan().v_granularity();

  const double ops = 4.0 * static_cast<double>(result.shape.batch * result.shape.nheads_q) *
                     static_cast<double>(result.shape.head_dim) *
                     visible_pairs(result.shape.seqlen_q, result.shape.seqlen_k, options.mask);
  const bool decode = result.shape.seqlen_q <= kDecodeRows;
  const double bytes = key_value_bytes(result.shape, options.mode, result.dtype);
  result.ops_per_byte = ops / (bytes + static_cast<double>(qkv.q.size_bytes()) +
                               static_cast<double>(runner.out().size_bytes()));
  const bool bfloat16 = result.kernel.find("_bfloat16_") != std::string::npos;
  auto peak = bfloat16 ? find_peak(isa, Operands::kBFloat16) : find_peak(isa, options.mode);
  if (!on_cpu) peak.reset();  // the ceilings are the CPU's
  std::optional<Stream> stream;
  if (decode && on_cpu) stream.emplace(isa, context.threads);

  const RunTimes warm = runner.run();
  const double warm_ms = warm.attention_ms + warm.quantize_ms;
  const int inner = static_cast<int>(std::clamp(std::ceil(kRepeatMs / warm_ms), 1.0, 1000.0));

  std::vector<double> attention, quantize, peaks, peak_ratios, stream_ratios;
  const auto measure_peak = [&] {
    return peak ? measure_peak_gops(*peak, context.threads, how.peak_ms) : 0;
  };
  for (int repeat = 0; repeat < how.repeats; ++repeat) {
    const double peak_before = measure_peak();
    const double stream_before = stream ? stream->measure() : 0;
    double sum_ms = 0;
    for (int i = 0; i < inner; ++i) {
      const RunTimes times = runner.run();
      attention.push_back(times.attention_ms);
      quantize.push_back(times.quantize_ms);
      sum_ms += times.attention_ms;
    }
    const double mean_ms = sum_ms / inner;
    if (stream) {
      const double bandwidth = (stream_before + stream->measure()) / 2;
      stream_ratios.push_back(bytes / (mean_ms * 1e-3) / bandwidth);
    }
    if (peak) {
      const double rate = (peak_before + measure_peak()) / 2;
      peaks.push_back(rate);
      peak_ratios.push_back(ops / (mean_ms * 1e6) / rate);
    }
    ++result.repeats;
    if (std::chrono::duration<double>(Clock::now() - begin).count() > how.max_seconds) break;
  }

  result.median_ms = median(attention);
  result.min_ms = attention.empty() ? 0 : *std::min_element(attention.begin(), attention.end());
  result.quantize_ms = median(quantize);
  result.min_quantize_ms =
      quantize.empty() ? 0 : *std::min_element(quantize.begin(), quantize.end());
  result.gops = ops / (result.median_ms * 1e6);
  result.end_to_end_gops = ops / ((result.median_ms + result.quantize_ms) * 1e6);
  if (peak) {
    result.peak_name = peak->name;
    result.peak_gops = median(peaks);
    result.peak_fraction = median(peak_ratios);
  }
  if (stream) {
    result.bytes_per_s = bytes / (result.median_ms * 1e-3);
    result.stream_fraction = median(stream_ratios);
  }
  if (how.rows > 0) {
    const Sample sample = Sample::spread(result.shape, how.rows, 2);
    result.rel_l2 = reference::error_report(gather(runner.out().view(), sample),
                                            exact_rows(qkv, options.softmax_scale, options.mask,
                                                       sample, context.threads))
                        .rel_l2;
  }
  return result;
}

nlohmann::ordered_json BenchResult::json() const {
  return {{"shape", shape.list()},
          {"causal", options.mask.causal},
          {"mode", to_string(options.mode)},
          {"dtype", to_string(dtype)},
          {"v_granularity", to_string(options.v_granularity)},
          {"kv_block", kv_block},
          {"kernel", kernel},
          {"isa", isa},
          {"threads", threads},
          {"repeats", repeats},
          {"median_ms", median_ms},
          {"min_ms", min_ms},
          {"quantize_ms", quantize_ms},
          {"gops", gops},
          {"peak_name",
           peak_name.empty() ? nlohmann::ordered_json(nullptr) : nlohmann::ordered_json(peak_name)},
          {"peak_gops", or_null(peak_gops)},
          {"peak_fraction", or_null(peak_fraction)},
          {"end_to_end_gops", end_to_end_gops},
          {"bytes_per_s", or_null(bytes_per_s)},
          {"stream_fraction", or_null(stream_fraction)},
          {"ops_per_byte", ops_per_byte},
          {"rel_l2", or_null(rel_l2)}};
}

Shape parse_shape(const std::string& argument, const std::string& text) {
  const std::string want = "B,Hq,Hkv,Sq,Sk,D: six whole numbers, at least 1";
  const auto n = parse_integers(argument, text, 6, want);
  for (const int64_t extent : n) {
    if (extent < 1 || extent > (int64_t{1} << 31)) {
      fail(StatusCode::kInvalidArgument,
           fmt::format("{}: got '{}', want {}", argument, text, want));
    }
  }
  if (n[1] % n[2] != 0) {
    fail(StatusCode::kInvalidArgument,
         fmt::format("{}: got {} kv heads, want a divisor of the {} query heads", argument, n[2],
                     n[1]));
  }
  if (static_cast<double>(n[0]) * static_cast<double>(n[1]) *
          static_cast<double>(std::max(n[3], n[4])) * static_cast<double>(n[5]) >
      0x1p40) {
    fail(StatusCode::kInvalidArgument,
         fmt::format("{}: got '{}', want at most 2^40 elements", argument, text));
  }
  return {n[0], n[1], n[2], n[3], n[4], n[5]};
}

std::vector<BenchCase> read_shapes(const std::string& argument, const std::string& path) {
  const InputFile file(argument, path);
  std::string text(static_cast<size_t>(file.size_bytes()), ' ');
  file.read(0, std::as_writable_bytes(std::span(text)));
  std::vector<BenchCase> cases;
  std::istringstream lines(text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    std::istringstream words(line.substr(0, line.find('#')));
    std::string shape, word, more;
    if (!(words >> shape)) continue;
    words >> word >> more;
    const std::string where = fmt::format("{} line {}", file.name(), number);
    if ((!word.empty() && word != "causal") || !more.empty()) {
      fail(StatusCode::kInvalidArgument,
           fmt::format("{}: got '{}' after the shape, want nothing or the word causal", where,
                       word != "causal" ? word : more));
    }
    cases.push_back({parse_shape(where, shape), word == "causal"});
  }
  if (cases.empty()) file.reject("holds no shape, want at least one");
  return cases;
}

}  // namespace attn8::app
