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
#include "attn8/reference.hpp"

/// AttentionPlan on a CUDA device: what it says without one, and what it computes on one.
namespace attn8 {
namespace {

struct Shape {
  int64_t batch, nheads_q, nheads_k, seqlen_q, seqlen_k, head_dim;
};

/// float32 operands on the host and on device 0, with out and lse.
class Problem {
 public:
  explicit Problem(const Shape& s)
      : q_shape({s.batch, s.seqlen_q, s.nheads_q, s.head_dim}),
        k_shape({s.batch, s.seqlen_k, s.nheads_k, s.head_dim}),
        lse_shape({s.batch, s.seqlen_q, s.nheads_q, 1}) {
    std::mt19937 generator(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](const Extents& e, float shift) {
      std::vector<float> values(static_cast<size_t>(e[0] * e[1] * e[2] * e[3]));
      for (float& x : values) x = normal(generator) + shift;
      return values;
    };
    q = fill(q_shape, 0);
    k = fill(k_shape, 0.5F);
    v = fill(k_shape, 0);
    out.resize(q.size());
    lse.resize(q.size() / static_cast<size_t>(s.head_dim));
  }

  [[nodiscard]] AttentionInputs host_inputs() const {
    return {Operand(bshd(static_cast<const void*>(q.data()), DType::kFloat32, q_shape)),
            Operand(bshd(static_cast<const void*>(k.data()), DType::kFloat32, k_shape)),
            Operand(bshd(static_cast<const void*>(v.data()), DType::kFloat32, k_shape))};
  }

  /// Copies the operands; views of device memory from then on.
  Status upload() {
    for (const std::vector<float>* data : {&q, &k, &v, &out, &lse}) {
      Result<CudaMemory> memory = CudaMemory::allocate(data->size() * sizeof(float), 0);
      if (!memory.ok()) return memory.status();
      memory_.push_back(std::move(memory).value());
      if (Status status = memory_.back().upload(data->data()); !status.ok()) return status;
    }
    return {};
  }
  [[nodiscard]] AttentionInputs inputs() const {
    return {Operand(view(0, q_shape)), Operand(view(1, k_shape)), Operand(view(2, k_shape))};
  }
  [[nodiscard]] AttentionOutputs outputs() const {
    return {bshd(memory(3), DType::kFloat32, q_shape, kDevice),
            bshd(memory(4), DType::kFloat32, lse_shape, kDevice)};
  }
  Status run(const AttentionPlan& plan) {
    Result<CudaMemory> workspace = CudaMemory::allocate(plan.workspace_bytes(), 0);
    if (!workspace.ok()) return workspace.status();
    Status status =
        plan.run(inputs(), outputs(), {workspace.value().data(), workspace.value().size()});
    if (status.ok()) status = cuda_synchronize(0);
    if (status.ok()) status = memory_[3].download(out.data());
    if (status.ok()) status = memory_[4].download(lse.data());
    return status;
  }

  static constexpr Device kDevice = {DeviceType::kCuda, 0};
  Extents q_shape, k_shape, lse_shape;
  std::vector<float> q, k, v, out, lse;

 private:
  [[nodiscard]] void* memory(size_t i) const {
    return i < memory_.size() ? memory_[i].data() : nullptr;
  }
  [[nodiscard]] ConstTensorView view(size_t i, const Extents& shape) const {
    return bshd(static_cast<const void*>(memory(i)), DType::kFloat32, shape, kDevice);
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
  EXPECT_EQ(refused({1, 2, 1, 16, 40, 61}, options).code(), StatusCode::kUnsupported);
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
};

TEST(Cuda, AgreesWithTheEmulation) {
  SKIP_WITHOUT_DEVICE();
  const Mask causal = {true, CausalAlign::kBottomRight, -1, -1};
  const Mask window = {false, CausalAlign::kTopLeft, 20, 30};
  const Case cases[] = {
      {{1, 2, 1, 33, 300, 128}, Mode::kAccurate, Granularity::kToken, {}},
      {{2, 4, 2, 129, 257, 64}, Mode::kAccurate, Granularity::kToken, causal},
      {{1, 2, 2, 65, 501, 96}, Mode::kAccurate, Granularity::kChannel, causal},
      {{1, 3, 1, 70, 130, 256}, Mode::kAccurate, Granularity::kTensor, window},
      {{1, 2, 1, 100, 300, 128}, Mode::kPaper, Granularity::kTensor, causal},
      {{1, 1, 1, 300, 40, 72}, Mode::kAccurate, Granularity::kToken, causal},
  };
  for (const Case& one : cases) {
    Problem problem(one.shape);
    ASSERT_TRUE(problem.upload().ok());
    AttentionOptions options;
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
      const double allowed = bound[i] + 1e-6 * std::fabs(out[i]) + 1e-30;
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
