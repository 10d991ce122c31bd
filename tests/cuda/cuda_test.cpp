// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attn8/attention.hpp"
#include "attn8/cuda.hpp"
#include "attn8/cuda_kv_cache.hpp"
#include "attn8/merge.hpp"
#include "attn8/reference.hpp"

/// AttentionPlan on a CUDA device: what it says without one, and what it computes on one.
namespace attn8 {
namespace {

struct Shape {
  int64_t batch, nheads_q, nheads_k, seqlen_q, seqlen_k, head_dim;
  int64_t head_dim_v = 0;  ///< 0: head_dim
};

/// What changes scores or lengths; see AttentionInputs.
struct Changes {
  float softcap = 0;
  bool mask_bool = false, mask_float = false, alibi = false, sinks = false, lengths = false;
};

/// float32 operands on the host and on device 0, with out and lse.
class Problem {
 public:
  explicit Problem(const Shape& s, const Changes& c = {})
      : q_shape({s.batch, s.seqlen_q, s.nheads_q, s.head_dim}),
        k_shape({s.batch, s.seqlen_k, s.nheads_k, s.head_dim}),
        v_shape({s.batch, s.seqlen_k, s.nheads_k, s.head_dim_v > 0 ? s.head_dim_v : s.head_dim}),
        out_shape({s.batch, s.seqlen_q, s.nheads_q, v_shape[3]}),
        lse_shape({s.batch, s.seqlen_q, s.nheads_q, 1}),
        mask_shape({1, s.seqlen_q, s.nheads_q, s.seqlen_k}),
        changes(c) {
    std::mt19937 generator(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](const Extents& e, float shift) {
      std::vector<float> values(static_cast<size_t>(e[0] * e[1] * e[2] * e[3]));
      for (float& x : values) x = normal(generator) + shift;
      return values;
    };
    q = fill(q_shape, 0);
    k = fill(k_shape, 0.5F);
    v = fill(v_shape, 0);
    lse.resize(q.size() / static_cast<size_t>(s.head_dim));
    out.resize(lse.size() * static_cast<size_t>(v_shape[3]));
    const auto elements = static_cast<size_t>(s.seqlen_q * s.nheads_q * s.seqlen_k);
    for (size_t i = 0; i < elements; ++i) {
      const bool hidden = generator() % 4 == 0;
      mask_bytes.push_back(hidden ? 0 : 1);
      mask_floats.push_back(hidden ? -INFINITY : 0.25F * normal(generator));
    }
    for (int64_t h = 0; h < s.nheads_q; ++h) {
      slopes.push_back(0.125F / static_cast<float>(h + 1));
      sinks.push_back(1.0F - static_cast<float>(h));
    }
    for (int64_t b = 0; b < s.batch; ++b) {
      seqlens_k.push_back(static_cast<int32_t>(s.seqlen_k - 7 * b));
      leftpad_k.push_back(static_cast<int32_t>(11 * b));
    }
  }

  [[nodiscard]] AttentionInputs host_inputs() const {
    return inputs_at({q.data(), k.data(), v.data(), mask_bytes.data(), mask_floats.data(),
                      slopes.data(), sinks.data(), seqlens_k.data(), leftpad_k.data()},
                     {});
  }

  /// Copies the operands; views of device memory from then on.
  Status upload() {
    Status status;
    const auto copy = [&](const auto& data) {
      if (!status.ok()) return;
      Result<CudaMemory> memory = CudaMemory::allocate(data.size() * sizeof(data[0]), 0);
      if (memory.ok()) {
        memory_.push_back(std::move(memory).value());
        status = memory_.back().upload(data.data());
      } else {
        status = memory.status();
      }
    };
    for (const std::vector<float>* data : {&out, &lse, &q, &k, &v}) copy(*data);
    copy(mask_bytes);
    for (const std::vector<float>* data : {&mask_floats, &slopes, &sinks}) copy(*data);
    copy(seqlens_k);
    copy(leftpad_k);
    return status;
  }
  [[nodiscard]] AttentionInputs inputs() const {
    std::vector<const void*> data;
    for (size_t i = 2; i < 11; ++i) data.push_back(memory(i));
    return inputs_at(data, kDevice);
  }
  [[nodiscard]] AttentionOutputs outputs() const {
    return {bshd(memory(0), DType::kFloat32, out_shape, kDevice),
            bshd(memory(1), DType::kFloat32, lse_shape, kDevice)};
  }
  Status run(const AttentionPlan& plan) {
    Result<CudaMemory> workspace = CudaMemory::allocate(plan.workspace_bytes(), 0);
    if (!workspace.ok()) return workspace.status();
    Status status =
        plan.run(inputs(), outputs(), {workspace.value().data(), workspace.value().size()});
    if (status.ok()) status = cuda_synchronize(0);
    return status.ok() ? download() : status;
  }
  Status download() {
    Status status = cuda_synchronize(0);
    if (status.ok()) status = memory_[0].download(out.data());
    if (status.ok()) status = memory_[1].download(lse.data());
    return status;
  }

  static constexpr Device kDevice = {DeviceType::kCuda, 0};
  Extents q_shape, k_shape, v_shape, out_shape, lse_shape, mask_shape;
  Changes changes;
  std::vector<float> q, k, v, out, lse, mask_floats, slopes, sinks;
  std::vector<uint8_t> mask_bytes;
  std::vector<int32_t> seqlens_k, leftpad_k;

 private:
  [[nodiscard]] void* memory(size_t i) const {
    return i < memory_.size() ? memory_[i].data() : nullptr;
  }
  /// `data` in the order of upload(), from q on.
  [[nodiscard]] AttentionInputs inputs_at(const std::vector<const void*>& data,
                                          Device device) const {
    const auto view = [&](size_t i, const Extents& shape, DType dtype = DType::kFloat32) {
      return bshd(data[i], dtype, shape, device);
    };
    AttentionInputs result = {Operand(view(0, q_shape)), Operand(view(1, k_shape)),
                              Operand(view(2, v_shape))};
    const int64_t heads = q_shape[2];
    if (changes.mask_bool) result.attn_mask = view(3, mask_shape, DType::kBool);
    if (changes.mask_float) result.attn_mask = view(4, mask_shape);
    if (changes.alibi) result.alibi_slopes = view(5, {1, 1, heads, 1});
    if (changes.sinks) result.sinks = view(6, {1, 1, heads, 1});
    if (changes.lengths) {
      result.seqlens_k = view(7, {q_shape[0], 1, 1, 1}, DType::kInt32);
      result.leftpad_k = view(8, {q_shape[0], 1, 1, 1}, DType::kInt32);
    }
    return result;
  }
  std::vector<CudaMemory> memory_;
};

std::string reason_for_no_device() {
  const CudaSupport support = cuda_support();
  for (const CudaDevice& device : support.devices) {
    if (!device.kernels.empty()) return {};
  }
  return support.devices.empty() ? support.reason : support.devices[0].reason;
}

#define SKIP_WITHOUT_DEVICE()                                             \
  if (const std::string reason = reason_for_no_device(); !reason.empty()) \
  GTEST_SKIP() << "no CUDA device: " << reason

TEST(Cuda, SaysWhatThereIs) {
  const CudaSupport support = cuda_support();
  EXPECT_TRUE(support.built);
  EXPECT_GE(support.kernel_images.size(), 12U);
  for (const std::string& name : support.kernel_images) EXPECT_EQ(name.rfind("attend_", 0), 0U);
  EXPECT_EQ(support.devices.empty(), !support.reason.empty()) << support.reason;
  for (const CudaDevice& device : support.devices) {
    EXPECT_EQ(device.kernels.empty(), !device.reason.empty()) << device.reason;
  }
}

/// Pointers that nothing may touch: the device is asked first.
TEST(Cuda, DeviceThatIsMissing) {
  const int32_t count = static_cast<int32_t>(cuda_support().devices.size());
  const Device device = {DeviceType::kCuda, count};
  const Extents shape = {1, 4, 1, 64};
  auto* nowhere = reinterpret_cast<void*>(0x1000);
  const TensorView x = bshd(nowhere, DType::kFloat16, shape, device);
  const auto plan = AttentionPlan::make(
      {Operand(ConstTensorView(x)), Operand(ConstTensorView(x)), Operand(ConstTensorView(x))}, {x},
      {}, Context::cuda(count));
  EXPECT_EQ(plan.status().code(), StatusCode::kUnavailable);
  EXPECT_NE(plan.status().message().find("CUDA"), std::string::npos) << plan.status().message();
  EXPECT_EQ(CudaMemory::allocate(16, count).status().code(), StatusCode::kUnavailable);
}

TEST(Cuda, RefusesWhatItHasNoKernelFor) {
  SKIP_WITHOUT_DEVICE();
  const auto refused = [](const Shape& shape, const AttentionOptions& options) {
    Problem problem(shape);
    EXPECT_TRUE(problem.upload().ok());
    return AttentionPlan::make(problem.inputs(), problem.outputs(), options, Context::cuda(0))
        .status();
  };
  const Shape shape = {1, 2, 1, 16, 40, 64};
  AttentionOptions options;
  EXPECT_TRUE(refused(shape, options).ok());
  options.mode = Mode::kPaper;
  options.softcap = 20;
  EXPECT_TRUE(refused(shape, options).ok());
  EXPECT_EQ(refused({1, 2, 1, 16, 40, 129}, options).code(), StatusCode::kUnsupported);
  options = {};
  options.mode = Mode::kExact;
  EXPECT_EQ(refused(shape, options).code(), StatusCode::kUnsupported);
  options = {};
  options.v_granularity = Granularity::kBlock;
  EXPECT_EQ(refused(shape, options).code(), StatusCode::kUnsupported);
  options = {};
  options.kv_block = 512;
  EXPECT_EQ(refused(shape, options).code(), StatusCode::kUnsupported);
}

TEST(Cuda, RefusesHostMemory) {
  SKIP_WITHOUT_DEVICE();
  Problem problem({1, 2, 1, 16, 40, 64});
  ASSERT_TRUE(problem.upload().ok());
  const auto plan = AttentionPlan::make(problem.inputs(), problem.outputs(), {}, Context::cuda(0));
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  Result<CudaMemory> workspace = CudaMemory::allocate(plan.value().workspace_bytes(), 0);
  ASSERT_TRUE(workspace.ok());
  AttentionInputs inputs = problem.inputs();
  std::get_if<ConstTensorView>(&inputs.k)->data = problem.k.data();
  const Status status = plan.value().run(inputs, problem.outputs(),
                                         {workspace.value().data(), workspace.value().size()});
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "k.data is host memory, want memory of CUDA device 0");
}

struct Case {
  Shape shape;
  Mode mode;
  Granularity v_granularity;
  Mask mask;
  Changes changes = {};
};

TEST(Cuda, AgreesWithTheEmulation) {
  SKIP_WITHOUT_DEVICE();
  const Mask causal = {true, CausalAlign::kBottomRight, -1, -1};
  const Mask window = {false, CausalAlign::kTopLeft, 20, 30};
  const Mask shifted = {true, CausalAlign::kTopLeft, 150, -1, 500, 340};
  const Case cases[] = {
      {{1, 2, 1, 33, 300, 128}, Mode::kAccurate, Granularity::kToken, {}},
      {{2, 4, 2, 129, 257, 64}, Mode::kAccurate, Granularity::kToken, causal},
      {{1, 2, 2, 65, 501, 96}, Mode::kAccurate, Granularity::kChannel, causal},
      {{1, 3, 1, 70, 130, 256}, Mode::kAccurate, Granularity::kTensor, window},
      {{1, 2, 1, 100, 300, 128}, Mode::kPaper, Granularity::kTensor, causal},
      {{1, 1, 1, 300, 40, 72}, Mode::kAccurate, Granularity::kToken, causal},
      {{2, 4, 2, 65, 300, 61}, Mode::kAccurate, Granularity::kToken, shifted},
      {{1, 2, 1, 40, 200, 61, 100}, Mode::kAccurate, Granularity::kChannel, causal},
      {{1, 2, 2, 33, 130, 128, 3}, Mode::kAccurate, Granularity::kToken, {}},
      {{2, 4, 2, 70, 333, 128}, Mode::kAccurate, Granularity::kToken, causal, {.softcap = 20}},
      {{2, 4, 2, 1, 700, 64},
       Mode::kAccurate,
       Granularity::kToken,
       causal,
       {.softcap = 5, .sinks = true}},
      {{2, 4, 2, 70, 333, 128},
       Mode::kAccurate,
       Granularity::kToken,
       shifted,
       {.mask_bool = true, .alibi = true}},
      {{2, 4, 1, 3, 600, 96},
       Mode::kAccurate,
       Granularity::kToken,
       causal,
       {.softcap = 30, .mask_float = true, .sinks = true}},
      {{3, 2, 1, 90, 700, 256},
       Mode::kAccurate,
       Granularity::kToken,
       causal,
       {.sinks = true, .lengths = true}},
      {{3, 2, 1, 90, 300, 64}, Mode::kAccurate, Granularity::kChannel, window, {.lengths = true}},
      {{3, 4, 2, 2, 900, 128},
       Mode::kAccurate,
       Granularity::kToken,
       causal,
       {.alibi = true, .lengths = true}},
      {{2, 4, 2, 70, 333, 250},
       Mode::kAccurate,
       Granularity::kToken,
       causal,
       {.mask_float = true, .alibi = true}},
      {{2, 4, 2, 70, 333, 61},
       Mode::kAccurate,
       Granularity::kChannel,
       causal,
       {.softcap = 20, .sinks = true}},
      {{1, 4, 2, 3, 700, 128},
       Mode::kAccurate,
       Granularity::kTensor,
       causal,
       {.mask_bool = true, .alibi = true}},
      {{2, 4, 2, 70, 333, 128}, Mode::kPaper, Granularity::kTensor, causal, {.softcap = 20}},
      {{1, 4, 1, 65, 301, 64},
       Mode::kPaper,
       Granularity::kTensor,
       shifted,
       {.mask_bool = true, .alibi = true, .sinks = true}},
      {{2, 4, 2, 70, 333, 64}, Mode::kHalf, Granularity::kToken, causal},
      {{2, 4, 2, 1, 3000, 128}, Mode::kHalf, Granularity::kToken, causal},
      {{2, 4, 2, 129, 333, 90},
       Mode::kHalf,
       Granularity::kToken,
       shifted,
       {.softcap = 20, .sinks = true}},
      {{1, 2, 1, 65, 257, 256, 200},
       Mode::kHalf,
       Granularity::kToken,
       {},
       {.mask_bool = true, .alibi = true}},
  };
  for (const Case& one : cases) {
    Problem problem(one.shape, one.changes);
    ASSERT_TRUE(problem.upload().ok());
    AttentionOptions options;
    options.softcap = one.changes.softcap;
    options.mode = one.mode;
    options.v_granularity = one.v_granularity;
    options.mask = one.mask;
    const auto plan =
        AttentionPlan::make(problem.inputs(), problem.outputs(), options, Context::cuda(0));
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    const Status status = problem.run(plan.value());
    ASSERT_TRUE(status.ok()) << status.message();

    options.kv_block = plan.value().kv_block();
    reference::EmulationOptions emulation = reference::emulation_options(options);
    emulation.score_grid = false;
    emulation.residual_mean = false;
    std::vector<double> out(problem.out.size());
    std::vector<double> bound(problem.out.size());
    std::vector<double> lse(problem.lse.size());
    ASSERT_TRUE(reference::emulation(problem.host_inputs(), emulation, out, lse, bound).ok());
    for (size_t i = 0; i < out.size(); ++i) {
      // `half` rounds weights that are relative to a power of two, the emulation others: each is
      // off by at most 2^-9 of the weight, and so is the mean of V.
      const double rounding = one.mode == Mode::kHalf ? 0x1p-8 * 5 : 0;
      const double allowed = bound[i] + 1e-6 * std::fabs(out[i]) + rounding + 1e-30;
      ASSERT_LE(std::fabs(problem.out[i] - out[i]), allowed)
          << plan.value().kernel() << " out[" << i << "]";
    }
    for (size_t i = 0; i < lse.size(); ++i) {
      if (std::isinf(lse[i])) {
        ASSERT_EQ(problem.lse[i], -INFINITY) << plan.value().kernel();
      } else {
        ASSERT_NEAR(problem.lse[i], lse[i], 1e-4 * (1 + std::fabs(lse[i])))
            << plan.value().kernel() << " lse[" << i << "]";
      }
    }
  }
}

/// Tokens of a few sequences, appended in two calls to odd pages, and attention over them.
TEST(Cuda, PagedCache) {
  SKIP_WITHOUT_DEVICE();
  const Device device = Problem::kDevice;
  for (const bool on_host : {false, true}) {
    const Shape shape = {1, 4, 2, 70, 600, 128};
    Problem problem(shape);
    ASSERT_TRUE(problem.upload().ok());
    const auto made =
        CudaKvCache::make({.nheads_k = 2, .head_dim = 128, .num_pages = 7}, Context::cuda(0));
    ASSERT_TRUE(made.ok()) << made.status().message();
    const CudaKvCache& cache = made.value();
    // Two sequences of the same tokens, the second with its last query alone.
    const std::vector<int32_t> host = {4, 0, 6, 1, 5, 2, /*lengths*/ 0, 0, /*cu*/ 0, 600, 1200};
    Result<CudaMemory> ints = CudaMemory::allocate(host.size() * 4, 0);
    ASSERT_TRUE(ints.ok() && ints.value().upload(host.data()).ok());
    const auto* base =
        on_host ? host.data() : reinterpret_cast<const int32_t*>(ints.value().data());
    const Device where = on_host ? Device{} : device;
    const auto table = [&](const int32_t* data, const Extents& extents) {
      return bshd(static_cast<const void*>(data), DType::kInt32, extents, where);
    };
    CudaKvTables tables;
    tables.block_table = ConstTensorView(base, DType::kInt32, where, {2, 3, 1, 1}, {3, 1, 1, 1});
    tables.cache_seqlens = table(base + 6, {2, 1, 1, 1});
    Result<CudaMemory> workspace =
        CudaMemory::allocate(cache.workspace_bytes({2, 600, 4, 128}, tables), 0);
    ASSERT_TRUE(workspace.ok());
    const std::span<std::byte> bytes(workspace.value().data(), workspace.value().size());

    // Both sequences from one tensor: a batch stride of 0.
    const AttentionInputs inputs = problem.inputs();
    ConstTensorView k = *std::get_if<ConstTensorView>(&inputs.k);
    ConstTensorView v = *std::get_if<ConstTensorView>(&inputs.v);
    k.shape[0] = v.shape[0] = 2;
    k.strides[0] = v.strides[0] = 0;
    Status status = cache.append(k, v, tables, bytes, Context::cuda(0));
    ASSERT_TRUE(status.ok()) << status.message();

    const std::vector<int32_t> after = {600, 600};
    Result<CudaMemory> lengths = CudaMemory::allocate(8, 0);
    ASSERT_TRUE(lengths.ok() && lengths.value().upload(after.data()).ok());
    tables.cache_seqlens =
        table(on_host ? after.data() : reinterpret_cast<const int32_t*>(lengths.value().data()),
              {2, 1, 1, 1});
    ConstTensorView q = *std::get_if<ConstTensorView>(&inputs.q);
    AttentionOutputs outputs = problem.outputs();
    AttentionOptions options;
    options.mask.causal = true;
    const auto compare = [&](int64_t first_query) {
      options.kv_block = 256;
      reference::EmulationOptions emulation = reference::emulation_options(options);
      std::vector<double> want(problem.out.size());
      std::vector<double> lse(problem.lse.size());
      ASSERT_TRUE(reference::emulation(problem.host_inputs(), emulation, want, lse, {}).ok());
      double error = 0;
      double norm = 0;
      for (size_t i = static_cast<size_t>(first_query * 4 * 128); i < want.size(); ++i) {
        error += (problem.out[i] - want[i]) * (problem.out[i] - want[i]);
        norm += want[i] * want[i];
      }
      // The emulation is that of the score grid: apart from it by less than either from the truth.
      EXPECT_LT(std::sqrt(error / norm), 0.02);
      for (size_t i = static_cast<size_t>(first_query * 4); i < lse.size(); ++i) {
        ASSERT_NEAR(problem.lse[i], lse[i], 0.01) << i;
      }
    };
    // A prefill of sequence 1 alone, as a ragged batch.
    const std::vector<int32_t> cu = {0, 0, 70};
    Result<CudaMemory> device_cu = CudaMemory::allocate(12, 0);
    ASSERT_TRUE(device_cu.ok() && device_cu.value().upload(cu.data()).ok());
    tables.cu_seqlens =
        table(on_host ? cu.data() : reinterpret_cast<const int32_t*>(device_cu.value().data()),
              {3, 1, 1, 1});
    status = cache.attend(q, tables, outputs, {.mask = options.mask}, bytes, Context::cuda(0));
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE(problem.download().ok());
    compare(0);

    // A decode of both: the last query of the problem, twice; the second overwrites the first.
    tables.cu_seqlens = std::nullopt;
    q.data = static_cast<const float*>(q.data) + size_t{69} * 4 * 128;
    q.shape = {2, 1, 4, 128};
    q.strides[0] = 0;
    outputs.out.data = static_cast<float*>(outputs.out.data) + size_t{69} * 4 * 128;
    outputs.out.shape = q.shape;
    outputs.out.strides[0] = 0;
    outputs.lse->data = static_cast<float*>(outputs.lse->data) + size_t{69} * 4;
    outputs.lse->shape = {2, 1, 4, 1};
    outputs.lse->strides[0] = 0;
    status = cache.attend(q, tables, outputs, {.mask = options.mask}, bytes, Context::cuda(0));
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE(problem.download().ok());
    compare(69);

    // Tables that point outside.
    std::vector<int32_t> wrong = host;
    wrong[3] = 7;
    ASSERT_TRUE(ints.value().upload(wrong.data()).ok());
    tables.block_table =
        ConstTensorView(on_host ? static_cast<const void*>(wrong.data()) : ints.value().data(),
                        DType::kInt32, where, {2, 3, 1, 1}, {3, 1, 1, 1});
    status = cache.attend(q, tables, outputs, {.mask = options.mask}, bytes, Context::cuda(0));
    if (on_host) {
      EXPECT_EQ(status.message(), "block_table[1, 0]=7, there are 7 pages");
    } else {
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_TRUE(cuda_synchronize(0).ok());
    }
  }
}

/// What the kernel computes the emulator's tests say; here it is held to the CPU's.
TEST(Cuda, MergesStates) {
  SKIP_WITHOUT_DEVICE();
  constexpr size_t kParts = 20;
  const Extents shape = {2, 37, 3, 72};
  const Extents lse_shape = {2, 37, 3, 1};
  const size_t rows = 2 * 37 * 3;
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> outs(kParts);
  std::vector<std::vector<float>> lses(kParts);
  std::vector<CudaMemory> memory;
  const auto to_device = [&](const std::vector<float>& data) -> std::byte* {
    Result<CudaMemory> copy = CudaMemory::allocate(data.size() * 4, 0);
    if (!copy.ok() || !copy.value().upload(data.data()).ok()) return nullptr;
    memory.push_back(std::move(copy).value());
    return memory.back().data();
  };
  std::vector<AttentionState> on_host;
  std::vector<AttentionState> on_device;
  const Device device = {DeviceType::kCuda, 0};
  for (size_t i = 0; i < kParts; ++i) {
    for (size_t j = 0; j < rows * 72; ++j) outs[i].push_back(normal(generator));
    for (size_t j = 0; j < rows; ++j) {
      lses[i].push_back(generator() % 3 == 0 ? -INFINITY : 5 * normal(generator));
    }
    on_host.push_back({bshd(outs[i].data(), DType::kFloat32, shape),
                       bshd(lses[i].data(), DType::kFloat32, lse_shape)});
    on_device.push_back({bshd(to_device(outs[i]), DType::kFloat32, shape, device),
                         bshd(to_device(lses[i]), DType::kFloat32, lse_shape, device)});
  }
  for (const size_t count : {size_t{3}, kParts}) {
    std::vector<float> want(rows * 72);
    std::vector<float> want_lse(rows);
    ASSERT_TRUE(merge_states({on_host.data(), count},
                             {bshd(want.data(), DType::kFloat32, shape),
                              bshd(want_lse.data(), DType::kFloat32, lse_shape)},
                             {})
                    .ok());
    std::vector<float> out(rows * 72, NAN);
    std::vector<float> lse(rows, NAN);
    to_device(out);
    to_device(lse);
    const CudaMemory& lse_memory = memory.back();
    const CudaMemory& out_memory = memory[memory.size() - 2];
    const Status status =
        merge_states({on_device.data(), count},
                     {bshd(out_memory.data(), DType::kFloat32, shape, device),
                      bshd(lse_memory.data(), DType::kFloat32, lse_shape, device)},
                     Context::cuda(0));
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE(out_memory.download(out.data()).ok());
    ASSERT_TRUE(lse_memory.download(lse.data()).ok());
    for (size_t j = 0; j < out.size(); ++j) {
      ASSERT_NEAR(out[j], want[j], 1e-6 * (1 + std::fabs(want[j]))) << count << " " << j;
    }
    for (size_t j = 0; j < rows; ++j) {
      if (std::isinf(want_lse[j])) {
        ASSERT_EQ(lse[j], want_lse[j]);
      } else {
        ASSERT_NEAR(lse[j], want_lse[j], 1e-6 * (1 + std::fabs(want_lse[j])));
      }
    }
  }
  const std::vector<AttentionState> many(257, on_device[0]);
  EXPECT_EQ(
      merge_states(many, {bshd(memory[0].data(), DType::kFloat32, shape, device)}, Context::cuda(0))
          .code(),
      StatusCode::kUnsupported);
}

TEST(Cuda, TheSameDataGiveTheSameBits) {
  SKIP_WITHOUT_DEVICE();
  Problem problem({1, 4, 2, 200, 700, 128});
  ASSERT_TRUE(problem.upload().ok());
  const auto plan = AttentionPlan::make(problem.inputs(), problem.outputs(), {}, Context::cuda(0));
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  ASSERT_TRUE(problem.run(plan.value()).ok());
  const std::vector<float> first = problem.out;
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(problem.run(plan.value()).ok());
    ASSERT_EQ(std::memcmp(first.data(), problem.out.data(), first.size() * sizeof(float)), 0);
  }
}

}  // namespace
}  // namespace attn8
