// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "attn8/cuda.hpp"
#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr int64_t kMany = int64_t{1} << 50;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// A valid call of attention() that a test then breaks in one place.
struct Call {
  Tensor q{DType::kFloat32, {2, 3, 4, 8}};
  Tensor k{DType::kFloat32, {2, 5, 2, 8}};
  Tensor v{DType::kFloat32, {2, 5, 2, 8}};
  Tensor out{DType::kFloat32, {2, 3, 4, 8}};
  Tensor lse{DType::kFloat32, {2, 3, 4, 1}};
  Tensor q_codes{DType::kInt8, {2, 3, 4, 8}}, k_codes{DType::kInt8, {2, 5, 2, 8}},
      v_codes{DType::kInt8, {2, 5, 2, 8}};
  Tensor q_scale{DType::kFloat32, {2, 3, 4, 1}}, k_scale{DType::kFloat32, {2, 5, 2, 1}},
      v_scale{DType::kFloat32, {2, 5, 2, 8}};
  Tensor k_mean{DType::kFloat32, {2, 1, 2, 8}};
  AttentionInputs inputs;
  AttentionOutputs outputs;
  AttentionOptions options;
  Context context;

  Call() {
    for (Tensor* t : {&q, &k, &v, &q_codes, &k_codes, &v_codes, &k_mean}) {
      t->fill([](int64_t, int64_t s, int64_t, int64_t d) { return (s + d) % 5 - 2; });
    }
    for (Tensor* t : {&q_scale, &k_scale, &v_scale}) {
      t->fill([](int64_t, int64_t, int64_t, int64_t) { return 0.25; });
    }
    inputs = {q.view(), k.view(), v.view()};
    outputs = {out.view(), lse.view()};
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  ConstTensorView& float_view(Operand& operand) { return *std::get_if<ConstTensorView>(&operand); }
  ConstTensorView& q_view() { return float_view(inputs.q); }
  ConstTensorView& k_view() { return float_view(inputs.k); }
  ConstTensorView& v_view() { return float_view(inputs.v); }
  /// Makes the operand quantized and returns its view.
  QuantizedView& quantized_q() {
    return inputs.q.emplace<QuantizedView>(q_codes.view(), q_scale.view());
  }
  QuantizedView& quantized_k() {
    return inputs.k.emplace<QuantizedView>(k_codes.view(), k_scale.view(), QuantSpec{},
                                           k_mean.view());
  }
  /// Of the granularity that wants a scale of this shape.
  QuantizedView& quantized_v(Granularity granularity, const Extents& scale_extents,
                             int32_t block = 0) {
    ConstTensorView scale = v_scale.view();
    scale.shape = scale_extents;
    return inputs.v.emplace<QuantizedView>(v_codes.view(), scale, QuantSpec{granularity, block});
  }
  [[nodiscard]] Status run() const { return attention(inputs, outputs, options, context); }
};

void expect_one_line(const Status& status, StatusCode code, const std::string& message) {
  EXPECT_EQ(to_string(status.code()), to_string(code)) << status.message();
  EXPECT_EQ(status.message(), message);
  EXPECT_EQ(status.message().find('\n'), std::string::npos);
}

/// What attention() answers to a call broken by `change`; the unbroken one succeeds.
void expect_refused(const std::string& message, const std::function<void(Call&)>& change,
                    StatusCode code = StatusCode::kInvalidArgument) {
  Call call;
  const Status good = call.run();
  ASSERT_TRUE(good.ok()) << good.message();
  change(call);
  expect_one_line(call.run(), code, message);
}

TEST(Validation, ValidCallsOfEveryForm) {
  Call call;
  call.quantized_q();
  call.quantized_k();
  call.quantized_v(Granularity::kToken, {2, 5, 2, 1});
  EXPECT_TRUE(call.run().ok()) << call.run().message();
  call.quantized_v(Granularity::kBlockChannel, {2, 1, 2, 8}, 256);
  EXPECT_TRUE(call.run().ok()) << call.run().message();
  call.outputs.lse.reset();
  EXPECT_TRUE(call.run().ok()) << call.run().message();
  call.options.kv_block = 512;
  call.quantized_v(Granularity::kBlock, {2, 1, 2, 1}, 512);
  EXPECT_TRUE(call.run().ok()) << call.run().message();
}

TEST(Validation, Context) {
  expect_refused("context.threads got 0, wants >= 1", [](Call& c) { c.context.threads = 0; });
  expect_refused("context.threads got -3, wants >= 1", [](Call& c) { c.context.threads = -3; });
  expect_refused("context.isa is not a value of attn8::Isa",
                 [](Call& c) { c.context = Context::with_isa(static_cast<Isa>(4)); });
  expect_refused(
      "context.device got cuda, attention() allocates no device memory: "
      "use AttentionPlan with a workspace",
      [](Call& c) { c.context = Context::cuda(0); }, StatusCode::kUnsupported);
}

TEST(Validation, CudaDevice) {
  Call call;
  const auto plan = [&] {
    return AttentionPlan::make(call.inputs, call.outputs, call.options, Context::cuda(1)).status();
  };
  EXPECT_EQ(plan().message(), "q.device got cpu, wants cuda:1, as the context's");
  const Device device = {DeviceType::kCuda, 1};
  call.q_view().device = call.k_view().device = call.v_view().device = device;
  call.outputs.out.device = call.outputs.lse->device = device;
  call.k_view().device.index = 0;
  EXPECT_EQ(plan().message(), "k.device got cuda:0, wants cuda:1, as the context's");
  call.k_view().device = device;
  call.options.check_finite = true;
  EXPECT_EQ(plan().code(), StatusCode::kUnsupported);
  EXPECT_EQ(plan().message(),
            "options.check_finite got true, device memory is not read by the host");
}

TEST(Validation, CudaOfABuildWithoutIt) {
  const CudaSupport support = cuda_support();
  if (support.built) GTEST_SKIP() << "this build has CUDA kernels";
  const std::string reason =
      "context.device got cuda, this build has no CUDA kernels (CMake: ATTN8_CUDA=ON)";
  EXPECT_EQ(support.reason, reason);
  EXPECT_TRUE(support.devices.empty());
  EXPECT_TRUE(support.kernel_images.empty());
  Call call;
  const Device device = {DeviceType::kCuda, 0};
  call.q_view().device = call.k_view().device = call.v_view().device = device;
  call.outputs.out.device = call.outputs.lse->device = device;
  const auto plan = AttentionPlan::make(call.inputs, call.outputs, call.options, Context::cuda(0));
  EXPECT_EQ(plan.status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(plan.status().message(), reason);
  EXPECT_EQ(CudaMemory::allocate(16, 0).status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(cuda_synchronize(0).code(), StatusCode::kUnavailable);
}

TEST(Validation, ForcedIsaThatIsMissing) {
  bool missing = false;
  for (const IsaSupport& support : isa_support()) {
    if (support.available) continue;
    missing = true;
    expect_refused(
        "isa " + std::string(to_string(support.isa)) +
            " is not available: " + std::string(support.reason),
        [&](Call& c) { c.context = Context::with_isa(support.isa); }, StatusCode::kUnavailable);
  }
  if (!missing) GTEST_SKIP() << "this machine has every ISA";
}

TEST(Validation, Options) {
  expect_refused("options.mode is not a value of attn8::Mode",
                 [](Call& c) { c.options.mode = static_cast<Mode>(5); });
  expect_refused("options.v_granularity is not a value of attn8::Granularity",
                 [](Call& c) { c.options.v_granularity = static_cast<Granularity>(5); });
  expect_refused("options.fp8_format is not a value of attn8::Fp8Format",
                 [](Call& c) { c.options.fp8_format = static_cast<Fp8Format>(2); });
  expect_refused("options.mask.align is not a value of attn8::CausalAlign",
                 [](Call& c) { c.options.mask.align = static_cast<CausalAlign>(2); });
  expect_refused("options.softmax_scale got nan, wants a finite number",
                 [](Call& c) { c.options.softmax_scale = kNan; });
  expect_refused("options.softmax_scale got -inf, wants a finite number", [](Call& c) {
    c.options.softmax_scale = -std::numeric_limits<float>::infinity();
  });
  expect_refused("options.mask.window_left got -2, wants >= -1",
                 [](Call& c) { c.options.mask.window_left = -2; });
  expect_refused("options.mask.window_right got -9223372036854775808, wants >= -1", [](Call& c) {
    c.options.mask.window_right = std::numeric_limits<int64_t>::min();
  });
  for (const int32_t kv_block : {-64, 1, 63, 65, 100, 576, 1024}) {
    expect_refused("options.kv_block got " + std::to_string(kv_block) +
                       ", wants 0 or a multiple of 64 in [64, 512]",
                   [&](Call& c) { c.options.kv_block = kv_block; });
  }
  for (const int32_t kv_block : {0, 64, 128, 192, 512}) {
    Call call;
    call.options.kv_block = kv_block;
    EXPECT_TRUE(call.run().ok()) << call.run().message();
  }
}

TEST(Validation, Shapes) {
  expect_refused("k.shape[0]=1 must equal q.shape[0]=2 (batch)",
                 [](Call& c) { c.k_view().shape[0] = 1; });
  expect_refused("k.shape[3]=7 must equal q.shape[3]=8 (head_dim)",
                 [](Call& c) { c.k_view().shape[3] = 7; });
  expect_refused("v.shape got [2, 4, 2, 8], wants k.shape=[2, 5, 2, 8] but for head_dim_v",
                 [](Call& c) { c.v_view().shape[1] = 4; });
  expect_refused("out.shape got [2, 3, 4, 8], wants [2, 3, 4, 7], as q and head_dim_v",
                 [](Call& c) { c.v_view().shape[3] = 7; });
  expect_refused("k.shape[2]=2 (nheads_k) must divide q.shape[2]=3 (nheads_q)",
                 [](Call& c) { c.q_view().shape[2] = 3; });
  expect_refused("k.shape[2]=2 (nheads_k) must divide q.shape[2]=1 (nheads_q)",
                 [](Call& c) { c.q_view().shape[2] = 1; });
  expect_refused("q.shape[2]=0 (nheads_q) wants >= 1", [](Call& c) { c.q_view().shape[2] = 0; });
  expect_refused("k.shape[2]=0 (nheads_k) wants >= 1",
                 [](Call& c) { c.k_view().shape[2] = c.v_view().shape[2] = 0; });
  for (const int64_t dim : {0, 257}) {
    expect_refused("q.shape[3]=" + std::to_string(dim) + " (head_dim) wants 1 to 256",
                   [&](Call& c) {
                     for (auto* view : {&c.q_view(), &c.k_view(), &c.v_view()}) {
                       view->shape[3] = dim;
                       view->strides = {0, 0, 0, 0};
                     }
                   });
  }
  expect_refused("q.shape=[2, -1, 4, 8] wants no negative",
                 [](Call& c) { c.q_view().shape[1] = -1; });
  expect_refused("out.shape got [2, 3, 4, 4], wants [2, 3, 4, 8], as q",
                 [](Call& c) { c.outputs.out.shape[3] = 4; });
  expect_refused("lse.shape got [2, 3, 4, 8], wants [2, 3, 4, 1]", [](Call& c) {
    c.outputs.lse->shape[3] = 8;
    c.outputs.lse->strides[3] = 1;
  });
}

TEST(Validation, TypesAndPointers) {
  expect_refused("q.dtype got int8, wants float32, float16 or bfloat16",
                 [](Call& c) { c.q_view().dtype = DType::kInt8; });
  expect_refused("v.dtype got int32, wants float32, float16 or bfloat16",
                 [](Call& c) { c.v_view().dtype = DType::kInt32; });
  expect_refused("k.dtype is not a type of attn8::DType",
                 [](Call& c) { c.k_view().dtype = static_cast<DType>(6); });
  expect_refused("out.dtype got int8, wants float32, float16 or bfloat16",
                 [](Call& c) { c.outputs.out.dtype = DType::kInt8; });
  expect_refused("lse.dtype got float16, wants float32",
                 [](Call& c) { c.outputs.lse->dtype = DType::kFloat16; });
  expect_refused("k.data got nullptr, wants [2, 5, 2, 8]",
                 [](Call& c) { c.k_view().data = nullptr; });
  expect_refused("out.data got nullptr, wants [2, 3, 4, 8]",
                 [](Call& c) { c.outputs.out.data = nullptr; });
  expect_refused("lse.data got nullptr, wants [2, 3, 4, 1]",
                 [](Call& c) { c.outputs.lse->data = nullptr; });
  expect_refused("v.device got cuda:0, wants cpu, as the context's",
                 [](Call& c) { c.v_view().device.type = DeviceType::kCuda; });
}

TEST(Validation, StridesAndSizes) {
  for (size_t dim = 0; dim < 4; ++dim) {
    expect_refused(
        "out.strides[" + std::to_string(dim) + "]=0 wants distinct elements, because it is written",
        [&](Call& c) { c.outputs.out.strides[dim] = 0; });
  }
  expect_refused("lse.strides[1]=0 wants distinct elements, because it is written",
                 [](Call& c) { c.outputs.lse->strides[1] = 0; });
  expect_refused(
      "q.shape=[2, 3, 4, 8] with strides=[96, 1125899906842624, 8, 1] reaches over 2^48 bytes",
      [](Call& c) { c.q_view().strides[1] = kMany; });
  expect_refused(
      "k.shape=[2, 5, 2, 8] with strides=[80, -9223372036854775808, 8, 1] reaches over 2^48 bytes",
      [](Call& c) { c.k_view().strides[1] = std::numeric_limits<int64_t>::min(); });
  expect_refused("v.shape=[2, 1125899906842624, 2, 8] has over 2^48 elements",
                 [](Call& c) { c.v_view().shape[1] = kMany; });
  // Broadcast or empty: no memory behind it, and still no size to compute with.
  expect_refused("k.shape=[2, 9223372036854775807, 2, 8] has over 2^48 elements", [](Call& c) {
    c.k_view().shape[1] = std::numeric_limits<int64_t>::max();
    c.k_view().strides[1] = 0;
  });
  expect_refused("q.shape=[0, 9223372036854775807, 4, 8] has over 2^48 elements", [](Call& c) {
    c.q_view().shape[0] = 0;
    c.q_view().shape[1] = std::numeric_limits<int64_t>::max();
  });
  // Strides of a dimension of one element are of no interest, and inputs may repeat elements.
  Call call;
  call.k_view().strides[0] = 0;
  EXPECT_TRUE(call.run().ok()) << call.run().message();
  call.k_view().shape[0] = call.v_view().shape[0] = call.q_view().shape[0] = 1;
  call.outputs.out.shape[0] = call.outputs.lse->shape[0] = 1;
  call.outputs.out.strides[0] = 0;
  call.outputs.lse->strides[0] = kMany;
  EXPECT_TRUE(call.run().ok()) << call.run().message();
}

TEST(Validation, QuantizedOperands) {
  expect_refused("q got int8 codes, mode exact wants float", [](Call& c) {
    c.options.mode = Mode::kExact;
    c.quantized_q();
  });
  expect_refused("k got int8 codes, mode fp8 wants float", [](Call& c) {
    c.options.mode = Mode::kFp8;
    c.quantized_k();
  });
  expect_refused("v got int8 codes, mode half wants float", [](Call& c) {
    c.options.mode = Mode::kHalf;
    c.quantized_v(Granularity::kToken, {2, 5, 2, 1});
  });
  expect_refused("q.codes.dtype got float32, wants int8",
                 [](Call& c) { c.quantized_q().codes = c.q.view(); });
  expect_refused("k.scale.dtype got float16, wants float32",
                 [](Call& c) { c.quantized_k().scale.dtype = DType::kFloat16; });
  expect_refused("k.scale.shape got [2, 4, 2, 1], wants [2, 5, 2, 1] for this granularity",
                 [](Call& c) { c.quantized_k().scale.shape[1] = 4; });
  expect_refused("k.scale.data got nullptr, wants [2, 5, 2, 1]",
                 [](Call& c) { c.quantized_k().scale.data = nullptr; });
  expect_refused("k.mean.shape got [2, 1, 2, 7], wants [2, 1, 2, 8]",
                 [](Call& c) { c.quantized_k().mean->shape[3] = 7; });
  expect_refused("k.mean.dtype got bfloat16, wants float32",
                 [](Call& c) { c.quantized_k().mean->dtype = DType::kBFloat16; });
  expect_refused("q.mean is set, only k may have had its mean subtracted", [](Call& c) {
    ConstTensorView mean = c.q_scale.view();
    mean.shape = {2, 1, 4, 8};
    mean.strides = {0, 0, 0, 0};
    c.quantized_q().mean = mean;
  });
  expect_refused("q.spec.granularity got tensor, wants token", [](Call& c) {
    QuantizedView& q = c.quantized_q();
    q.spec.granularity = Granularity::kTensor;
    q.scale.shape = {2, 1, 4, 1};
  });
  expect_refused("k.spec.granularity is not a value of attn8::Granularity",
                 [](Call& c) { c.quantized_k().spec.granularity = static_cast<Granularity>(7); });
  expect_refused("v.spec.granularity got token, mode paper wants tensor", [](Call& c) {
    c.options.mode = Mode::kPaper;
    c.quantized_v(Granularity::kToken, {2, 5, 2, 1});
  });
  expect_refused("v.spec.block got 64, wants kv_block=256", [](Call& c) {
    c.quantized_v(Granularity::kBlock, {2, 1, 2, 1}, 64);
  });
  expect_refused("v.spec.block got 128, wants kv_block=192", [](Call& c) {
    c.options.kv_block = 192;
    c.quantized_v(Granularity::kBlockChannel, {2, 1, 2, 8}, 128);
  });
  expect_refused("v.spec.block got 0, wants > 0", [](Call& c) {
    c.quantized_v(Granularity::kBlock, {2, 1, 2, 1}, 0);
  });
}

/// Codes are read while the call runs; -128 is found in the operand that holds it.
TEST(Validation, CodesOfMinus128) {
  for (const char operand : {'q', 'k', 'v'}) {
    expect_refused(
        std::string(1, operand) + ".codes holds -128, wants codes in [-127, 127]", [&](Call& c) {
          c.quantized_q();
          c.quantized_k();
          c.quantized_v(Granularity::kToken, {2, 5, 2, 1});
          Tensor& codes = operand == 'q' ? c.q_codes : operand == 'k' ? c.k_codes : c.v_codes;
          codes.set(1, 2, 1, 7, -128);
        });
  }
}

TEST(Validation, CheckFinite) {
  expect_refused("k[1, 4, 0, 7] got nan, wants finite numbers", [](Call& c) {
    c.options.check_finite = true;
    c.k.set(1, 4, 0, 7, static_cast<double>(kNan));
    c.v.set(0, 0, 0, 0, static_cast<double>(kNan));
  });
  expect_refused("v[0, 3, 1, 2] got -inf, wants finite numbers", [](Call& c) {
    c.options.check_finite = true;
    c.options.mode = Mode::kExact;
    c.v.set(0, 3, 1, 2, -std::numeric_limits<double>::infinity());
  });
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    Tensor narrow(dtype, {2, 3, 4, 8}, Memory::kReversed);
    narrow.set(1, 2, 3, 0, std::numeric_limits<double>::infinity());
    expect_refused("q[1, 2, 3, 0] got inf, wants finite numbers", [&](Call& c) {
      c.options.check_finite = true;
      c.inputs.q = narrow.view();
    });
  }
  Call call;  // codes cannot be anything else
  call.options.check_finite = true;
  call.quantized_q();
  EXPECT_TRUE(call.run().ok()) << call.run().message();
}

/// Quantizing refuses the same things with the names of its own arguments.
TEST(Validation, Quantize) {
  Call call;
  const auto refused = [&](const std::string& message, const ConstTensorView& x,
                           const QuantSpec& spec, const TensorView& codes, const TensorView& scale,
                           Mean mean_use = Mean::kNone,
                           const std::optional<TensorView>& mean = std::nullopt) {
    expect_one_line(quantize(x, spec, codes, scale, {}, mean_use, mean),
                    StatusCode::kInvalidArgument, message);
  };
  const ConstTensorView x = call.k.view();
  const TensorView codes = call.k_codes.view();
  const TensorView scale = call.k_scale.view();
  const TensorView mean = call.k_mean.view();
  ASSERT_TRUE(quantize(x, {}, codes, scale, {}, Mean::kCompute, mean).ok());
  refused("x.dtype got int8, wants float32, float16 or bfloat16", codes, {}, codes, scale);
  refused("codes.dtype got float32, wants int8", x, {}, call.v.view(), scale);
  TensorView wrong = codes;
  wrong.shape[1] = 4;
  refused("codes.shape got [2, 4, 2, 8], wants [2, 5, 2, 8], as x", x, {}, wrong, scale);
  wrong = codes;
  wrong.strides[3] = 0;
  refused("codes.strides[3]=0 wants distinct elements, because it is written", x, {}, wrong, scale);
  refused("scale.shape got [2, 5, 2, 1], wants [2, 1, 2, 1] for this granularity", x,
          {Granularity::kTensor, 0}, codes, scale);
  refused("scale.shape got [2, 5, 2, 1], wants [2, 2, 2, 1] for this granularity", x,
          {Granularity::kBlock, 3}, codes, scale);
  refused("scale.dtype got int8, wants float32", x, {}, codes, codes);
  refused("spec.block got -1, wants > 0", x, {Granularity::kBlockChannel, -1}, codes, scale);
  refused("spec.granularity is not a value of attn8::Granularity", x,
          {static_cast<Granularity>(200), 0}, codes, scale);
  refused("mean is not set, mean_use wants it", x, {}, codes, scale, Mean::kGiven);
  refused("mean_use is not a value of attn8::Mean", x, {}, codes, scale, static_cast<Mean>(3),
          mean);
  wrong = mean;
  wrong.strides[0] = 0;
  refused("mean.strides[0]=0 wants distinct elements, because it is written", x, {}, codes, scale,
          Mean::kCompute, wrong);
  EXPECT_TRUE(quantize(x, {}, codes, scale, {}, Mean::kGiven, wrong).ok());
  wrong.shape[1] = 5;
  refused("mean.shape got [2, 5, 2, 8], wants [2, 1, 2, 8]", x, {}, codes, scale, Mean::kGiven,
          wrong);
  expect_one_line(quantize(x, {}, codes, scale, Context::cpu(0)), StatusCode::kInvalidArgument,
                  "context.threads got 0, wants >= 1");
}

TEST(Validation, Dequantize) {
  Call call;
  const auto refused = [](const std::string& message, const QuantizedView& x,
                          const TensorView& out) {
    expect_one_line(dequantize(x, out, {}), StatusCode::kInvalidArgument, message);
  };
  const QuantizedView& x = call.quantized_k();
  ASSERT_TRUE(dequantize(x, call.k.view(), {}).ok());
  refused("out.shape got [2, 3, 4, 8], wants [2, 5, 2, 8], as x.codes", x, call.q.view());
  refused("out.dtype got int8, wants float32, float16 or bfloat16", x, call.k_codes.view());
  QuantizedView wrong = x;
  wrong.spec = {Granularity::kBlock, 0};
  refused("x.spec.block got 0, wants > 0", wrong, call.k.view());
  wrong = x;
  wrong.mean->shape[1] = 5;
  wrong.mean->strides[1] = 0;
  refused("x.mean.shape got [2, 5, 2, 8], wants [2, 1, 2, 8]", wrong, call.k.view());
}

}  // namespace
}  // namespace attn8::testing
