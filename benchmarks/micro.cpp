// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
//
// Micro-benchmarks of quantize(), attention and the KV cache, each on every instruction set of this
// machine, one thread. For speed against the machine's peak, see `attn8 bench`.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <latch>
#include <new>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "attn8/attn8.hpp"

namespace {

using attn8::DType;
using attn8::Extents;

constexpr std::align_val_t kWorkspaceAlignment{64};

size_t elements(const Extents& shape) {
  return static_cast<size_t>(shape[0] * shape[1] * shape[2] * shape[3]);
}

std::vector<float> normal_tensor(const Extents& shape, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(elements(shape));
  for (float& value : x) value = normal(random);
  return x;
}

void quantize(benchmark::State& state, attn8::Isa isa, attn8::Granularity granularity,
              attn8::Mean mean_use) {
  const Extents shape = {1, state.range(0), 1, state.range(1)};
  const attn8::QuantSpec spec = {granularity};
  const std::vector<float> x = normal_tensor(shape, 1);
  std::vector<int8_t> codes(elements(shape));
  std::vector<float> scale(elements(attn8::scale_shape(shape, spec)));
  std::vector<float> mean(static_cast<size_t>(shape[3]));
  std::optional<attn8::TensorView> mean_view;
  if (mean_use != attn8::Mean::kNone) {
    mean_view = attn8::bshd(mean.data(), DType::kFloat32, {1, 1, 1, shape[3]});
  }
  for (auto _ : state) {
    const attn8::Status status =
        attn8::quantize(attn8::bshd(x.data(), DType::kFloat32, shape), spec,
                        attn8::bshd(codes.data(), DType::kInt8, shape),
                        attn8::bshd(scale.data(), DType::kFloat32, attn8::scale_shape(shape, spec)),
                        attn8::Context::with_isa(isa), mean_use, mean_view);
    if (!status.ok()) {
      state.SkipWithError(status.message().c_str());
      break;
    }
    benchmark::DoNotOptimize(codes.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(x.size() * sizeof(float)));
}

void attend(benchmark::State& state, attn8::Isa isa, attn8::Mode mode, bool causal) {
  const Extents shape = {1, state.range(0), 1, state.range(1)};
  const std::vector<float> q = normal_tensor(shape, 1);
  const std::vector<float> k = normal_tensor(shape, 2);
  const std::vector<float> v = normal_tensor(shape, 3);
  std::vector<float> out(q.size());
  const attn8::AttentionInputs inputs = {.q = attn8::bshd(q.data(), DType::kFloat32, shape),
                                         .k = attn8::bshd(k.data(), DType::kFloat32, shape),
                                         .v = attn8::bshd(v.data(), DType::kFloat32, shape)};
  const attn8::AttentionOutputs outputs = {.out = attn8::bshd(out.data(), DType::kFloat32, shape)};
  const auto plan = attn8::AttentionPlan::make(
      inputs, outputs, {.mode = mode, .mask = {.causal = causal}}, attn8::Context::with_isa(isa));
  if (!plan.ok()) {
    state.SkipWithError(plan.status().message().c_str());
    return;
  }
  const size_t bytes = plan.value().workspace_bytes();
  auto* workspace = static_cast<std::byte*>(::operator new(bytes, kWorkspaceAlignment));
  attn8::RunTimes times;
  double attention_ms = 0;
  for (auto _ : state) {
    const attn8::Status status = plan.value().run(inputs, outputs, {workspace, bytes}, &times);
    if (!status.ok()) {
      state.SkipWithError(status.message().c_str());
      break;
    }
    attention_ms += times.attention_ms;
    benchmark::ClobberMemory();
  }
  ::operator delete(workspace, kWorkspaceAlignment);
  state.SetLabel(std::string(plan.value().kernel()));
  // 2 products of 2 operations per visible (q, k) pair and channel.
  const double n = static_cast<double>(shape[1]);
  const double pairs = causal ? n * (n + 1) / 2 : n * n;
  const double runs = static_cast<double>(state.iterations());
  state.counters["gops"] = 4e-6 * pairs * static_cast<double>(shape[3]) * runs / attention_ms;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// One query per query head against a long sequence, by turns from the pages of a cache (the time)
/// and from what a plan packed; the attention alone, in both cases right after K and V were packed.
void decode(benchmark::State& state, attn8::Isa isa) {
  constexpr int64_t kHeadsK = 8;
  constexpr int64_t kHeadDim = 128;
  const Extents q_shape = {1, 1, state.range(1) * kHeadsK, kHeadDim};
  const Extents k_shape = {1, state.range(0), kHeadsK, kHeadDim};
  const std::vector<float> q = normal_tensor(q_shape, 1);
  const std::vector<float> k = normal_tensor(k_shape, 2);
  const std::vector<float> v = normal_tensor(k_shape, 3);
  std::vector<float> out(q.size());
  const attn8::ConstTensorView k_view = attn8::bshd(k.data(), DType::kFloat32, k_shape);
  const attn8::ConstTensorView v_view = attn8::bshd(v.data(), DType::kFloat32, k_shape);
  const attn8::AttentionInputs inputs = {
      .q = attn8::bshd(q.data(), DType::kFloat32, q_shape), .k = k_view, .v = v_view};
  const attn8::AttentionOutputs outputs = {.out =
                                               attn8::bshd(out.data(), DType::kFloat32, q_shape)};
  const attn8::Context context = attn8::Context::with_isa(isa);
  auto cache = attn8::KvCache::make(
      {.nheads_k = kHeadsK, .head_dim = kHeadDim, .max_pages = state.range(0) / 256 + 1});
  const auto sequence = cache.value().create();
  const std::vector<int32_t> cu_seqlens_q = {0, 1};
  const auto plan = attn8::AttentionPlan::make(inputs, outputs, {}, context);
  const size_t bytes = plan.value().workspace_bytes();
  auto* workspace = static_cast<std::byte*>(::operator new(bytes, kWorkspaceAlignment));
  std::vector<double> contiguous;
  std::vector<double> ratios;
  attn8::Status status;
  for (auto _ : state) {
    status = cache.value().truncate(sequence.value(), 0);
    if (!status.ok()) break;
    status = cache.value().append(sequence.value(), k_view, v_view, context);
    if (!status.ok()) break;
    const auto start = std::chrono::steady_clock::now();
    status =
        cache.value().attend({&sequence.value(), 1}, inputs.q, cu_seqlens_q, outputs, {}, context);
    if (!status.ok()) break;
    const double pages = seconds_since(start);
    state.SetIterationTime(pages);
    attn8::RunTimes times;
    status = plan.value().run(inputs, outputs, {workspace, bytes}, &times);
    if (!status.ok()) break;
    contiguous.push_back(times.attention_ms * 1e3);
    ratios.push_back(pages * 1e6 / contiguous.back());
  }
  ::operator delete(workspace, kWorkspaceAlignment);
  if (!status.ok()) state.SkipWithError(status.message().c_str());
  state.counters["contiguous_us"] = median(contiguous);
  state.counters["ratio"] = median(ratios);
}

constexpr size_t kSequences = 32;

/// Length of a sequence of a ragged batch: 17 to 8192 tokens, each by the same factor longer.
int64_t ragged_length(size_t sequence) {
  const double share = static_cast<double>(sequence) / (kSequences - 1);
  return std::llround(17 * std::pow(8192.0 / 17, share));
}

/// A decode step of such a batch, with a cache of its own.
class RaggedStep {
 public:
  RaggedStep()
      : cache_(attn8::KvCache::make({.nheads_k = kHeadsK, .head_dim = kHeadDim, .max_pages = 1024})
                   .value()) {
    for (size_t i = 0; i < kSequences; ++i) {
      const Extents shape = {1, ragged_length(i), kHeadsK, kHeadDim};
      const std::vector<float> k = normal_tensor(shape, 2);
      const attn8::ConstTensorView view = attn8::bshd(k.data(), DType::kFloat32, shape);
      sequences_.push_back(cache_.create().value());
      note(cache_.append(sequences_.back(), view, view, attn8::Context()));
      cu_seqlens_q_.push_back(static_cast<int32_t>(i + 1));
    }
  }

  /// All sequences in one call. Both return seconds.
  double together(const attn8::Context& context) {
    const auto start = std::chrono::steady_clock::now();
    note(cache_.attend(sequences_, q_view_, cu_seqlens_q_, {out_view_}, {}, context));
    return seconds_since(start);
  }
  /// A call for each.
  double separate(const attn8::Context& context) {
    double sum = 0;
    for (size_t i = 0; i < kSequences; ++i) {
      attn8::ConstTensorView q_row = q_view_;
      attn8::TensorView out_row = out_view_;
      q_row.shape[1] = out_row.shape[1] = 1;
      q_row.data = q_.data() + static_cast<int64_t>(i) * q_view_.strides[1];
      out_row.data = out_.data() + static_cast<int64_t>(i) * out_view_.strides[1];
      const auto start = std::chrono::steady_clock::now();
      note(cache_.attend({&sequences_[i], 1}, q_row, std::span(cu_seqlens_q_).first(2), {out_row},
                         {}, context));
      sum += seconds_since(start);
    }
    return sum;
  }
  [[nodiscard]] const attn8::Status& status() const { return status_; }

 private:
  static constexpr int64_t kHeadsK = 8;
  static constexpr int64_t kHeadDim = 128;
  static constexpr Extents kShape = {1, kSequences, 4 * kHeadsK, kHeadDim};

  void note(attn8::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  attn8::KvCache cache_;
  std::vector<attn8::KvSequence> sequences_;
  std::vector<int32_t> cu_seqlens_q_ = {0};
  std::vector<float> q_ = normal_tensor(kShape, 1);
  std::vector<float> out_ = std::vector<float>(q_.size());
  attn8::ConstTensorView q_view_ = attn8::bshd(q_.data(), DType::kFloat32, kShape);
  attn8::TensorView out_view_ = attn8::bshd(out_.data(), DType::kFloat32, kShape);
  attn8::Status status_;
};

/// The step in one call on two threads (the time), by turns with one sequence after the other on
/// one. ratio: of the first to half of the second. shared: what a step on one thread takes while
/// another thread does the same with a cache of its own, to what it takes alone: so much of the
/// ratio no division of the work over the threads can help.
void ragged(benchmark::State& state, attn8::Isa isa) {
  RaggedStep step;
  RaggedStep neighbour;
  const attn8::Context one = attn8::Context::with_isa(isa, 1);
  const attn8::Context two = attn8::Context::with_isa(isa, 2);
  std::vector<double> separate;
  std::vector<double> ratios;
  std::vector<double> shared;
  for (auto _ : state) {
    const double together = step.together(two);
    state.SetIterationTime(together);
    separate.push_back(step.separate(one) * 1e6);
    ratios.push_back(together * 1e6 / (separate.back() / 2));
    const double alone = step.together(one);
    std::latch begin(2);
    double beside = 0;
    std::thread other([&] {
      begin.arrive_and_wait();
      beside = neighbour.together(one);
    });
    begin.arrive_and_wait();
    const double own = step.together(one);
    other.join();
    shared.push_back((own + beside) / 2 / alone);
  }
  for (const RaggedStep* each : {&step, &neighbour}) {
    if (!each->status().ok()) state.SkipWithError(each->status().message().c_str());
  }
  state.counters["separate_us"] = median(separate);
  state.counters["ratio"] = median(ratios);
  state.counters["shared"] = median(shared);
}

/// The prompts of such a batch, packed one after the other.
class RaggedPrompts {
 public:
  RaggedPrompts() {
    for (size_t i = 0; i < kSequences; ++i) {
      starts_.push_back(starts_.back() + static_cast<int32_t>(ragged_length(i)));
    }
    const int64_t total = starts_.back();
    q_ = normal_tensor({1, total, kHeadsQ, kHeadDim}, 1);
    k_ = normal_tensor({1, total, kHeadsK, kHeadDim}, 2);
    out_.resize(q_.size());
  }
  RaggedPrompts(const RaggedPrompts&) = delete;
  RaggedPrompts& operator=(const RaggedPrompts&) = delete;
  ~RaggedPrompts() { ::operator delete(workspace_, kWorkspaceAlignment); }

  /// All prompts in one call. Both return seconds.
  double together(const attn8::Context& context) {
    const Extents numbers = {std::ssize(starts_), 1, 1, 1};
    attn8::AttentionInputs inputs = part(0, starts_.back());
    inputs.cu_seqlens_q = attn8::bshd(starts_.data(), DType::kInt32, numbers);
    inputs.cu_seqlens_k = inputs.cu_seqlens_q;
    return run(inputs, 0, starts_.back(), context);
  }
  /// A call for each.
  double separate(const attn8::Context& context) {
    double sum = 0;
    for (size_t i = 0; i < kSequences; ++i) {
      sum += run(part(starts_[i], starts_[i + 1]), starts_[i], starts_[i + 1], context);
    }
    return sum;
  }
  [[nodiscard]] const attn8::Status& status() const { return status_; }

 private:
  static constexpr int64_t kHeadsQ = 4;
  static constexpr int64_t kHeadsK = 2;
  static constexpr int64_t kHeadDim = 128;

  /// Prompts of the tokens [first, last).
  attn8::AttentionInputs part(int64_t first, int64_t last) {
    const attn8::ConstTensorView k =
        attn8::bshd(k_.data() + first * kHeadsK * kHeadDim, DType::kFloat32,
                    {1, last - first, kHeadsK, kHeadDim});
    return {
        attn8::ConstTensorView(attn8::bshd(q_.data() + first * kHeadsQ * kHeadDim, DType::kFloat32,
                                           {1, last - first, kHeadsQ, kHeadDim})),
        k, k};
  }

  double run(const attn8::AttentionInputs& inputs, int64_t first, int64_t last,
             const attn8::Context& context) {
    const attn8::AttentionOutputs outputs = {attn8::bshd(out_.data() + first * kHeadsQ * kHeadDim,
                                                         DType::kFloat32,
                                                         {1, last - first, kHeadsQ, kHeadDim})};
    const attn8::AttentionOptions options = {.mask = {.causal = true}};
    const auto plan = attn8::AttentionPlan::make(inputs, outputs, options, context);
    if (!plan.ok()) {
      status_ = plan.status();
      return 0;
    }
    const size_t bytes = plan.value().workspace_bytes();
    if (bytes > bytes_) {
      ::operator delete(workspace_, kWorkspaceAlignment);
      bytes_ = bytes;
      workspace_ = static_cast<std::byte*>(::operator new(bytes, kWorkspaceAlignment));
      std::fill_n(workspace_, bytes, std::byte{0});  // the system has given the memory
    }
    const auto start = std::chrono::steady_clock::now();
    attn8::Status status = plan.value().run(inputs, outputs, {workspace_, bytes});
    const double seconds = seconds_since(start);
    if (status_.ok()) status_ = std::move(status);
    return seconds;
  }

  std::vector<int32_t> starts_ = {0};
  std::vector<float> q_, k_, out_;
  std::byte* workspace_ = nullptr;
  size_t bytes_ = 0;
  attn8::Status status_;
};

/// As `ragged`, of causal prompts with their quantization.
void ragged_prompts(benchmark::State& state, attn8::Isa isa) {
  RaggedPrompts prompts;
  const attn8::Context one = attn8::Context::with_isa(isa, 1);
  const attn8::Context two = attn8::Context::with_isa(isa, 2);
  std::vector<double> separate;
  std::vector<double> ratios;
  prompts.together(two);  // grows the workspace
  for (auto _ : state) {
    const double together = prompts.together(two);
    state.SetIterationTime(together);
    separate.push_back(prompts.separate(one) * 1e3);
    ratios.push_back(together * 1e3 / (separate.back() / 2));
  }
  if (!prompts.status().ok()) state.SkipWithError(prompts.status().message().c_str());
  state.counters["separate_ms"] = median(separate);
  state.counters["ratio"] = median(ratios);
}

/// Appends to a sequence of a cache, from a page boundary on: one token, or a prompt with its mean.
void append(benchmark::State& state, attn8::Isa isa) {
  const int64_t tokens = state.range(0);
  const int64_t pages = tokens == 1 ? 64 : (tokens + 255) / 256;
  const Extents shape = {1, tokens, 8, 128};
  const std::vector<float> k = normal_tensor(shape, 2);
  const attn8::ConstTensorView view = attn8::bshd(k.data(), DType::kFloat32, shape);
  const attn8::Context context = attn8::Context::with_isa(isa);
  auto cache = attn8::KvCache::make(
      {.nheads_k = 8, .head_dim = 128, .max_pages = pages, .smooth_k = tokens > 1});
  const auto sequence = cache.value().create();
  attn8::Status status;
  for (auto _ : state) {
    if (cache.value().usage().pages_free == 0) status = cache.value().truncate(sequence.value(), 0);
    status = cache.value().append(sequence.value(), view, view, context);
    if (!status.ok()) break;
  }
  if (!status.ok()) state.SkipWithError(status.message().c_str());
}

/// Appends a token to each of 32 sequences on two threads: in one call (the time) by turns with a
/// call for each.
void append_batch(benchmark::State& state, attn8::Isa isa) {
  const Extents shape = {1, kSequences, 8, 128};
  const std::vector<float> k = normal_tensor(shape, 2);
  const attn8::ConstTensorView view = attn8::bshd(k.data(), DType::kFloat32, shape);
  const attn8::Context context = attn8::Context::with_isa(isa, 2);
  auto cache =
      attn8::KvCache::make({.nheads_k = 8, .head_dim = 128, .max_pages = 8 * kSequences}).value();
  std::vector<attn8::KvSequence> sequences;
  std::vector<int32_t> cu_seqlens = {0};
  for (size_t i = 0; i < kSequences; ++i) {
    sequences.push_back(cache.create().value());
    cu_seqlens.push_back(static_cast<int32_t>(i + 1));
  }
  attn8::Status status;
  std::vector<double> each;
  for (auto _ : state) {
    if (cache.length(sequences[0]).value() == 2048) {
      for (const attn8::KvSequence sequence : sequences) status = cache.truncate(sequence, 0);
    }
    const auto start = std::chrono::steady_clock::now();
    status = cache.append(sequences, view, view, cu_seqlens, context);
    if (!status.ok()) break;
    const double together = seconds_since(start);
    state.SetIterationTime(together);
    const auto separate = std::chrono::steady_clock::now();
    for (size_t i = 0; i < kSequences && status.ok(); ++i) {
      attn8::ConstTensorView token = view;
      token.shape[1] = 1;
      token.data = k.data() + static_cast<int64_t>(i) * view.strides[1];
      status = cache.append(sequences[i], token, token, context);
    }
    if (!status.ok()) break;
    each.push_back(seconds_since(separate) * 1e6);
  }
  if (!status.ok()) state.SkipWithError(status.message().c_str());
  state.counters["separate_us"] = median(each);
}

void register_all() {
  using attn8::Granularity;
  using attn8::Mean;
  using attn8::Mode;
  for (const attn8::IsaSupport& support : attn8::isa_support()) {
    if (!support.available) continue;
    const attn8::Isa isa = support.isa;
    const std::string suffix = "/" + std::string(attn8::to_string(isa));
    const auto add_quantize = [&](const char* name, Granularity granularity, Mean mean_use) {
      benchmark::RegisterBenchmark((name + suffix).c_str(), quantize, isa, granularity, mean_use)
          ->Args({4096, 64})
          ->Args({4096, 128});
    };
    add_quantize("quantize_token", Granularity::kToken, Mean::kNone);
    add_quantize("quantize_token_smooth", Granularity::kToken, Mean::kCompute);
    add_quantize("quantize_tensor", Granularity::kTensor, Mean::kNone);
    add_quantize("quantize_channel", Granularity::kChannel, Mean::kNone);
    benchmark::RegisterBenchmark(("decode" + suffix).c_str(), decode, isa)
        ->ArgsProduct({{4096, 32768}, {1, 4}})
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark(("ragged" + suffix).c_str(), ragged, isa)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark(("ragged_prompts" + suffix).c_str(), ragged_prompts, isa)
        ->UseManualTime()
        ->Iterations(5)
        ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark(("append_token" + suffix).c_str(), append, isa)
        ->Arg(1)
        ->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark(("append_batch" + suffix).c_str(), append_batch, isa)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark(("append_prompt" + suffix).c_str(), append, isa)
        ->Arg(4096)
        ->Unit(benchmark::kMicrosecond);
    for (const Mode mode : {Mode::kAccurate, Mode::kPaper, Mode::kHalf, Mode::kExact}) {
      for (const bool causal : {false, true}) {
        const std::string name =
            "attend_" + std::string(attn8::to_string(mode)) + (causal ? "_causal" : "") + suffix;
        benchmark::RegisterBenchmark(name.c_str(), attend, isa, mode, causal)
            ->Args({1024, 64})
            ->Args({1024, 128})
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
