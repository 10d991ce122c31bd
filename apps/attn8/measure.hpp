// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attn8/attention.hpp"
#include "attn8/cuda.hpp"
#include "attn8/reference.hpp"
#include "host_tensor.hpp"

namespace attn8::app {

/// The six numbers of one attention problem, in the order of --shape.
struct Shape {
  int64_t batch = 1;
  int64_t nheads_q = 1;
  int64_t nheads_k = 1;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t head_dim = 0;

  [[nodiscard]] std::vector<int64_t> list() const {
    return {batch, nheads_q, nheads_k, seqlen_q, seqlen_k, head_dim};
  }
  /// "1x8x2 4096x4096 d128": batch, query heads, kv heads, lengths, head_dim.
  [[nodiscard]] std::string label() const;
};

/// Number of (query, key) pairs of one head that the mask lets through.
double visible_pairs(int64_t seqlen_q, int64_t seqlen_k, const Mask& mask);

/// Operands of one problem.
struct Qkv {
  HostTensor q, k, v;
  std::optional<HostTensor> attn_mask = std::nullopt, alibi_slopes = std::nullopt,
                            sinks = std::nullopt;
  [[nodiscard]] AttentionInputs inputs() const;
  [[nodiscard]] Shape shape() const;
};

/// Synthetic operands of a recipe of recipes.hpp: float32, with values that float16 holds too.
/// Unknown names are kInvalidArgument.
Qkv make_qkv(const std::string& recipe, uint64_t seed, const Shape& shape);

/// The three tensors in another float type.
Qkv convert(const Qkv& qkv, DType dtype);

/// A plan with an output and a workspace of its own. On a CUDA device the operands are copied there
/// once, by the constructor.
class Runner {
 public:
  /// `layout` is the memory order of the output, whose type is that of q unless given.
  Runner(const Qkv& qkv, const AttentionOptions& options, const Context& context,
         bool with_lse = false, Layout layout = Layout::kBshd,
         std::optional<DType> out_dtype = std::nullopt);
  /// On a CUDA device all of the time is attention_ms: quantizing and attending, without copies.
  RunTimes run();
  [[nodiscard]] const AttentionPlan& plan() const { return *plan_; }
  [[nodiscard]] const HostTensor& out() const { return out_; }
  [[nodiscard]] const HostTensor& lse() const { return lse_; }

 private:
  [[nodiscard]] AttentionOutputs outputs();
  RunTimes run_on_cuda();
  void copy_to_cuda(const Qkv& qkv);
  Device device_;
  std::vector<CudaMemory> cuda_;  ///< q, k, v, out, lse, workspace
  AttentionInputs inputs_;
  HostTensor out_;
  HostTensor lse_;
  bool with_lse_;
  std::optional<AttentionPlan> plan_;
  AlignedBytes workspace_;
};

/// Which rows of which heads an oracle computes. Results of a sample are dense
/// [head of the sample, row, dim].
struct Sample {
  std::vector<std::pair<int64_t, int64_t>> heads;  ///< (batch, query head)
  std::vector<int64_t> rows;

  /// At most that many rows and heads, evenly spread, the first and the last among them.
  static Sample spread(const Shape& shape, int64_t max_rows, int64_t max_heads);
};

/// Evenly spread positions in [0, count), at most `wanted`, the first and the last among them.
std::vector<int64_t> spread_positions(int64_t count, int64_t wanted);

std::vector<double> gather(const ConstTensorView& x, const Sample& sample);

/// reference::exact_attention of the sample.
std::vector<double> exact_rows(const Qkv& qkv, const AttentionOptions& options,
                               const Sample& sample, int32_t threads);
std::vector<double> exact_rows(const Qkv& qkv, std::optional<float> softmax_scale, const Mask& mask,
                               const Sample& sample, int32_t threads);

/// reference::emulation of the sample.
std::vector<double> emulated_rows(const Qkv& qkv, const reference::EmulationOptions& options,
                                  const Sample& sample, int32_t threads);

/// What `mode` computes for the sample: by its kernel, or, for Mode::kFp8, which has none worth
/// running over every row, by its emulation.
std::vector<double> mode_rows(const Qkv& qkv, const AttentionOptions& options,
                              const Context& context, const Sample& sample);

/// A mode as the comparisons name it: fp8 comes as fp8_e4m3 and fp8_e5m2.
struct NamedMode {
  std::string name;
  AttentionOptions options;
  int color;  ///< of its series in every plot
};

/// accurate, half, paper, fp8_e4m3, fp8_e5m2.
std::vector<NamedMode> compared_modes();

double median(std::vector<double> values);

}  // namespace attn8::app
