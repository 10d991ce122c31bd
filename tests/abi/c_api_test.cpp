// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// attn8.h against the shared library: structs of other sizes, bad arguments, texts by thread, and
// the same results as the C++ API.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "attn8/attn8.h"
#include "attn8/attn8.hpp"

namespace attn8::testing {
namespace {

/// A valid problem: two query heads, one kv head.
struct Call {
  static constexpr int64_t kQueries = 5, kKeys = 9, kDim = 8;
  std::vector<float> q, k, v, out, lse;
  attn8_tensor q_tensor, k_tensor, v_tensor, out_tensor, lse_tensor;
  attn8_attention_params params;

  Call() : q(kQueries * 2 * kDim), k(kKeys * kDim), v(k.size()), out(q.size()), lse(kQueries * 2) {
    for (auto* x : {&q, &k, &v}) {
      for (size_t i = 0; i < x->size(); ++i) {
        (*x)[i] = static_cast<float>((i * 37 + x->size()) % 19) / 9 - 1;
      }
    }
    tensor(q_tensor, q, {1, kQueries, 2, kDim});
    tensor(k_tensor, k, {1, kKeys, 1, kDim});
    tensor(v_tensor, v, {1, kKeys, 1, kDim});
    tensor(out_tensor, out, {1, kQueries, 2, kDim});
    tensor(lse_tensor, lse, {1, kQueries, 2, 1});
    EXPECT_EQ(attn8_attention_params_init(&params, sizeof params), ATTN8_OK);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  static void tensor(attn8_tensor& tensor, std::vector<float>& data, const Extents& shape) {
    EXPECT_EQ(attn8_tensor_bshd(&tensor, sizeof tensor, data.data(), ATTN8_FLOAT32, shape.data()),
              ATTN8_OK);
  }
  attn8_status run(const attn8_attention_params* options) {
    return attn8_attention(&q_tensor, &k_tensor, &v_tensor, &out_tensor, &lse_tensor, options,
                           nullptr);
  }
  attn8_status run() { return run(&params); }
};

void expect_refused(attn8_status got, attn8_status want, const std::string& message) {
  EXPECT_EQ(got, want);
  EXPECT_EQ(attn8_last_error(), message);
}
void expect_invalid(attn8_status got, const std::string& message) {
  expect_refused(got, ATTN8_INVALID_ARGUMENT, message);
}

/// A copy of the first `size` bytes of a struct in an allocation of just that size, so that an
/// address sanitizer sees what reads or writes beyond; further bytes are 0.
template <class T>
class Resized {
 public:
  Resized(const T& value, uint32_t size) : memory_(new std::max_align_t[words(size)]) {
    std::memset(memory_.get(), 0, size);
    std::memcpy(memory_.get(), &value, std::min<size_t>(size, sizeof(T)));
    std::memcpy(memory_.get(), &size, sizeof size);
  }
  T* get() { return reinterpret_cast<T*>(memory_.get()); }
  unsigned char* bytes() { return reinterpret_cast<unsigned char*>(memory_.get()); }

 private:
  static size_t words(uint32_t size) {
    return (size + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t);
  }
  std::unique_ptr<std::max_align_t[]> memory_;
};

TEST(CApi, SameAsTheCppApi) {
  Call call;
  call.params.causal = 1;
  call.params.window_left = 3;
  call.params.has_softmax_scale = 1;
  call.params.softmax_scale = 0.7f;
  for (const int mode : {ATTN8_ACCURATE, ATTN8_PAPER, ATTN8_HALF, ATTN8_EXACT, ATTN8_FP8}) {
    call.params.mode = mode;
    ASSERT_EQ(call.run(), ATTN8_OK) << attn8_last_error();
    EXPECT_STREQ(attn8_last_error(), "");
    const std::vector<float> out = call.out, lse = call.lse;
    const auto view = [](std::vector<float>& x, const Extents& shape) {
      return bshd(x.data(), DType::kFloat32, shape);
    };
    const Status status =
        attention({ConstTensorView(view(call.q, {1, Call::kQueries, 2, Call::kDim})),
                   ConstTensorView(view(call.k, {1, Call::kKeys, 1, Call::kDim})),
                   ConstTensorView(view(call.v, {1, Call::kKeys, 1, Call::kDim}))},
                  {view(call.out, {1, Call::kQueries, 2, Call::kDim}),
                   view(call.lse, {1, Call::kQueries, 2, 1})},
                  {.mode = static_cast<Mode>(mode),
                   .softmax_scale = 0.7f,
                   .mask = {.causal = true, .window_left = 3}},
                  {});
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(call.out, out) << mode;
    EXPECT_EQ(call.lse, lse) << mode;
  }
}

TEST(CApi, TextsEndWhereTheirViewsDo) {
  EXPECT_EQ(attn8_version(), version());
  for (int32_t code = -1; code <= 7; ++code) {
    EXPECT_EQ(attn8_status_name(code), to_string(static_cast<StatusCode>(code)));
  }
  ASSERT_EQ(attn8_isa_count(), isa_support().size());
  for (size_t i = 0; i < attn8_isa_count(); ++i) {
    int32_t isa = -1, available = -1;
    const char *name = nullptr, *reason = nullptr;
    ASSERT_EQ(attn8_isa_at(i, &isa, &available, &name, &reason), ATTN8_OK);
    const IsaSupport& support = isa_support()[i];
    EXPECT_EQ(isa, static_cast<int32_t>(support.isa));
    EXPECT_EQ(available, support.available ? 1 : 0);
    EXPECT_EQ(name, to_string(support.isa));
    EXPECT_EQ(reason, support.reason);
  }
  EXPECT_EQ(attn8_isa_at(0, nullptr, nullptr, nullptr, nullptr), ATTN8_OK);
  expect_invalid(attn8_isa_at(99, nullptr, nullptr, nullptr, nullptr),
                 "index got 99, wants below 4");
}

/// What a program compiled with an older header passes: fewer fields.
TEST(CApi, SmallerStructsHaveDefaults) {
  Call call;
  call.params.causal = 1;
  ASSERT_EQ(call.run(), ATTN8_OK);
  const std::vector<float> causal = call.out;
  call.params.window_left = 1;
  call.params.window_right = 0;
  ASSERT_EQ(call.run(), ATTN8_OK);
  const std::vector<float> windowed = call.out;
  ASSERT_NE(causal, windowed);
  call.params.kv_block = 1;  // refused where it is read
  for (const auto& [size, want] :
       {std::pair<uint32_t, const std::vector<float>*>{24, &causal}, {40, &windowed}}) {
    Resized<attn8_attention_params> params(call.params, size);
    ASSERT_EQ(call.run(params.get()), ATTN8_OK) << attn8_last_error();
    EXPECT_EQ(call.out, *want) << size;
  }
  expect_invalid(call.run(), "options.kv_block got 1, wants 0 or a multiple of 64 in [64, 512]");

  // A tensor from before tensors had a quantization.
  call.q_tensor.quantization = reinterpret_cast<const attn8_quantization*>(uintptr_t{1});
  Resized<attn8_tensor> q(call.q_tensor, offsetof(attn8_tensor, quantization));
  EXPECT_EQ(attn8_attention(q.get(), &call.k_tensor, &call.v_tensor, &call.out_tensor, nullptr,
                            nullptr, nullptr),
            ATTN8_OK)
      << attn8_last_error();

  attn8_context_params context_params;
  ASSERT_EQ(attn8_context_params_init(&context_params, sizeof context_params), ATTN8_OK);
  context_params.threads = 2;
  context_params.isa = 77;
  Resized<attn8_context_params> only_threads(context_params, 8);
  attn8_context* context = nullptr;
  ASSERT_EQ(attn8_context_create(only_threads.get(), &context), ATTN8_OK) << attn8_last_error();
  attn8_context_destroy(context);

  Resized<attn8_error_report> report(attn8_error_report{}, 16);
  const double one = 1, two = 2;
  ASSERT_EQ(attn8_compare(&two, &one, 1, report.get()), ATTN8_OK) << attn8_last_error();
  EXPECT_EQ(report.get()->rel_l2, 1);
}

/// What a program compiled with a newer header passes: fields unknown here, 0 unless it uses them.
TEST(CApi, LargerStructsMustNotUseUnknownFields) {
  Call call;
  ASSERT_EQ(call.run(), ATTN8_OK);
  const std::vector<float> want = call.out;
  Resized<attn8_attention_params> params(call.params, sizeof call.params + 16);
  Resized<attn8_tensor> q(call.q_tensor, sizeof call.q_tensor + 8);
  const auto run = [&] {
    return attn8_attention(q.get(), &call.k_tensor, &call.v_tensor, &call.out_tensor, nullptr,
                           params.get(), nullptr);
  };
  std::fill(call.out.begin(), call.out.end(), 0.0f);
  ASSERT_EQ(run(), ATTN8_OK) << attn8_last_error();
  EXPECT_EQ(call.out, want);
  params.bytes()[sizeof call.params + 9] = 1;
  expect_refused(run(), ATTN8_UNSUPPORTED,
                 "params sets a field at byte " + std::to_string(sizeof call.params + 9) +
                     " that version " + std::string(attn8_version()) + " does not have");
  params.bytes()[sizeof call.params + 9] = 0;
  q.bytes()[sizeof call.q_tensor] = 1;
  expect_refused(
      run(), ATTN8_UNSUPPORTED,
      "q sets a field at byte 96 that version " + std::string(attn8_version()) + " does not have");

  // Results: what this library does not know is 0.
  Resized<attn8_error_report> report(attn8_error_report{}, sizeof(attn8_error_report) + 8);
  report.bytes()[sizeof(attn8_error_report)] = 7;
  const double one = 1;
  ASSERT_EQ(attn8_compare(&one, &one, 1, report.get()), ATTN8_OK);
  EXPECT_EQ(report.bytes()[sizeof(attn8_error_report)], 0);
}

template <class T, class Init>
void expect_init_keeps_to_size(Init init, size_t least) {
  for (uint32_t size = 8; size <= sizeof(T) + 16; size += 8) {
    std::vector<uint64_t> memory(sizeof(T) / 8 + 4, ~uint64_t{0});
    T* const out = reinterpret_cast<T*>(memory.data());
    EXPECT_EQ(init(out, size), size < least ? ATTN8_INVALID_ARGUMENT : ATTN8_OK) << size;
    if (size < least) continue;
    EXPECT_EQ(out->struct_size, size);
    for (size_t i = sizeof(T) / 8; i < memory.size(); ++i) {
      EXPECT_EQ(memory[i], i < size / 8 ? 0 : ~uint64_t{0}) << "word " << i << " of " << size;
    }
    for (size_t i = size / 8; i < memory.size(); ++i) EXPECT_EQ(memory[i], ~uint64_t{0});
  }
  EXPECT_EQ(init(nullptr, sizeof(T)), ATTN8_INVALID_ARGUMENT);
  T value;
  for (const uint32_t size : {0u, 4u, 12u, 4104u, ~0u, ~0u - 7}) {
    EXPECT_EQ(init(&value, size), ATTN8_INVALID_ARGUMENT) << size;
  }
}

TEST(CApi, InitKeepsToTheGivenSize) {
  expect_init_keeps_to_size<attn8_attention_params>(attn8_attention_params_init, 8);
  expect_init_keeps_to_size<attn8_context_params>(attn8_context_params_init, 8);
  expect_init_keeps_to_size<attn8_quantize_params>(attn8_quantize_params_init, 8);
  expect_init_keeps_to_size<attn8_quantization>(attn8_quantization_init, 24);
  const auto tensor_init = [](attn8_tensor* tensor, uint32_t size) {
    const int64_t shape[4] = {1, 2, 3, 4};
    return attn8_tensor_bhsd(tensor, size, nullptr, ATTN8_FLOAT16, shape);
  };
  expect_init_keeps_to_size<attn8_tensor>(tensor_init, 88);
}

TEST(CApi, Strides) {
  const int64_t shape[4] = {2, 3, 5, 7};
  attn8_tensor tensor;
  ASSERT_EQ(attn8_tensor_bshd(&tensor, sizeof tensor, shape, ATTN8_INT8, shape), ATTN8_OK);
  EXPECT_EQ(tensor.data, shape);
  EXPECT_EQ(tensor.dtype, ATTN8_INT8);
  EXPECT_EQ(tensor.quantization, nullptr);
  EXPECT_EQ(std::vector<int64_t>(tensor.shape, tensor.shape + 4),
            (std::vector<int64_t>{2, 3, 5, 7}));
  EXPECT_EQ(std::vector<int64_t>(tensor.strides, tensor.strides + 4),
            (std::vector<int64_t>{105, 35, 7, 1}));
  ASSERT_EQ(attn8_tensor_bhsd(&tensor, sizeof tensor, shape, ATTN8_INT8, shape), ATTN8_OK);
  EXPECT_EQ(std::vector<int64_t>(tensor.shape, tensor.shape + 4),
            (std::vector<int64_t>{2, 3, 5, 7}));
  EXPECT_EQ(std::vector<int64_t>(tensor.strides, tensor.strides + 4),
            (std::vector<int64_t>{105, 7, 21, 1}));
  const int64_t huge = int64_t{1} << 40;
  const int64_t overflowing[4] = {huge, huge, 1, 1};
  expect_invalid(attn8_tensor_bshd(&tensor, sizeof tensor, shape, ATTN8_INT8, overflowing),
                 "shape[0] got 1099511627776, more elements than 64 bits count");
  const int64_t negative[4] = {1, 1, -2, 1};
  expect_invalid(attn8_tensor_bshd(&tensor, sizeof tensor, shape, ATTN8_INT8, negative),
                 "shape[2] got -2, wants >= 0");
  expect_invalid(attn8_tensor_bshd(&tensor, sizeof tensor, shape, ATTN8_INT8, nullptr),
                 "shape got NULL");
}

TEST(CApi, NullArguments) {
  Call c;
  attn8_tensor *q = &c.q_tensor, *k = &c.k_tensor, *v = &c.v_tensor, *out = &c.out_tensor;
  ASSERT_EQ(attn8_attention(q, k, v, out, nullptr, nullptr, nullptr), ATTN8_OK);
  expect_invalid(attn8_attention(nullptr, k, v, out, nullptr, nullptr, nullptr), "q got NULL");
  expect_invalid(attn8_attention(q, nullptr, v, out, nullptr, nullptr, nullptr), "k got NULL");
  expect_invalid(attn8_attention(q, k, nullptr, out, nullptr, nullptr, nullptr), "v got NULL");
  expect_invalid(attn8_attention(q, k, v, nullptr, nullptr, nullptr, nullptr), "out got NULL");
  expect_invalid(attn8_plan_create(q, k, v, out, nullptr, nullptr, nullptr, nullptr),
                 "plan got NULL");
  attn8_plan* plan = reinterpret_cast<attn8_plan*>(q);
  expect_invalid(attn8_plan_create(q, k, nullptr, out, nullptr, nullptr, nullptr, &plan),
                 "v got NULL");
  EXPECT_EQ(plan, nullptr);
  expect_invalid(attn8_plan_run(nullptr, q, k, v, out, nullptr, nullptr, 0, nullptr),
                 "plan got NULL");
  EXPECT_EQ(attn8_plan_workspace_bytes(nullptr), 0u);
  EXPECT_STREQ(attn8_plan_kernel(nullptr), "");
  EXPECT_EQ(attn8_plan_isa(nullptr), -1);
  EXPECT_EQ(attn8_plan_kv_block(nullptr), -1);
  EXPECT_EQ(attn8_plan_v_granularity(nullptr), -1);
  attn8_plan_destroy(nullptr);
  attn8_context_destroy(nullptr);
  expect_invalid(attn8_context_create(nullptr, nullptr), "context got NULL");
  expect_invalid(attn8_quantize(nullptr, out, out, nullptr, nullptr, nullptr), "x got NULL");
  expect_invalid(attn8_quantize(q, nullptr, out, nullptr, nullptr, nullptr), "codes got NULL");
  expect_invalid(attn8_quantize(q, out, nullptr, nullptr, nullptr, nullptr), "scale got NULL");
  expect_invalid(attn8_dequantize(nullptr, out, nullptr), "x got NULL");
  expect_invalid(attn8_dequantize(q, out, nullptr), "x.quantization got NULL");
  int64_t shape[4] = {1, 2, 3, 4};
  expect_invalid(attn8_scale_shape(nullptr, 0, 0, shape), "x_shape got NULL");
  expect_invalid(attn8_scale_shape(shape, 0, 0, nullptr), "shape got NULL");
  const attn8_tensor* const one[] = {out};
  const attn8_tensor* const none[] = {nullptr};
  expect_invalid(attn8_merge_states(nullptr, one, 1, out, nullptr, nullptr), "outs got NULL");
  expect_invalid(attn8_merge_states(one, nullptr, 1, out, nullptr, nullptr), "lses got NULL");
  expect_invalid(attn8_merge_states(one, none, 1, out, nullptr, nullptr), "lses[0] got NULL");
  expect_invalid(attn8_merge_states(nullptr, nullptr, 0, nullptr, nullptr, nullptr),
                 "out got NULL");
  EXPECT_EQ(attn8_merge_states(nullptr, nullptr, 0, out, nullptr, nullptr), ATTN8_OK);
  std::vector<double> wide(c.out.size());
  expect_invalid(
      attn8_reference_attention(nullptr, k, v, nullptr, wide.data(), wide.size(), nullptr, 0),
      "q got NULL");
  expect_invalid(attn8_reference_attention(q, k, v, nullptr, nullptr, wide.size(), nullptr, 0),
                 "out.data got nullptr, wants [1, 5, 2, 8]");
  expect_invalid(attn8_reference_attention(q, k, v, nullptr, wide.data(), wide.size(), nullptr, 4),
                 "lse got NULL, lse_count 4");
  attn8_error_report report = {};
  expect_invalid(attn8_compare(wide.data(), wide.data(), 1, nullptr), "report got NULL");
  expect_invalid(attn8_compare(wide.data(), wide.data(), 1, &report),
                 "report.struct_size got 0, wants a multiple of 8 in [8, 4096]");
  report.struct_size = sizeof report;
  expect_invalid(attn8_compare(nullptr, wide.data(), 1, &report), "out got NULL");
  expect_invalid(attn8_compare(wide.data(), nullptr, 1, &report), "reference got NULL");
}

/// What attn8_attention() answers to a valid call that `change` breaks.
void expect_refused_after(const std::string& message, const std::function<void(Call&)>& change,
                          attn8_status status = ATTN8_INVALID_ARGUMENT) {
  Call call;
  ASSERT_EQ(call.run(), ATTN8_OK) << attn8_last_error();
  const std::vector<float> before = call.out;
  change(call);
  expect_refused(call.run(), status, message);
  EXPECT_EQ(call.out, before);
}

TEST(CApi, GarbageInStructs) {
  const std::string sizes = ", wants a multiple of 8 in [";
  expect_refused_after("params.struct_size got 0" + sizes + "8, 4096]",
                       [](Call& c) { c.params.struct_size = 0; });
  expect_refused_after("params.struct_size got 60" + sizes + "8, 4096]",
                       [](Call& c) { c.params.struct_size = 60; });
  expect_refused_after("params.struct_size got 3735928559" + sizes + "8, 4096]",
                       [](Call& c) { c.params.struct_size = 0xdeadbeef; });
  expect_refused_after("v.struct_size got 80" + sizes + "88, 4096]",
                       [](Call& c) { c.v_tensor.struct_size = 80; });
  expect_refused_after("options.softcap got -5.000000, wants 0 or 2^-20 to 2^20",
                       [](Call& c) { c.params.softcap = -5; });
  // Numbers that a narrowing conversion would turn into valid enumerators.
  for (const int32_t number : {-1, 5, 255, 256, 257, 65536, std::numeric_limits<int32_t>::min()}) {
    expect_refused_after("options.mode is not a value of attn8::Mode",
                         [&](Call& c) { c.params.mode = number; });
    expect_refused_after("options.mask.align is not a value of attn8::CausalAlign",
                         [&](Call& c) { c.params.causal_align = number; });
    expect_refused_after("options.v_granularity is not a value of attn8::Granularity",
                         [&](Call& c) { c.params.v_granularity = number; });
    expect_refused_after("options.fp8_format is not a value of attn8::Fp8Format",
                         [&](Call& c) { c.params.fp8_format = number; });
    expect_refused_after("k.dtype is not a type of attn8::DType",
                         [&](Call& c) { c.k_tensor.dtype = number == ATTN8_BOOL ? 6 : number; });
    attn8_context_params params;
    ASSERT_EQ(attn8_context_params_init(&params, sizeof params), ATTN8_OK);
    params.isa = number == -1 ? -2 : number;
    attn8_context* context = reinterpret_cast<attn8_context*>(&params);
    expect_invalid(attn8_context_create(&params, &context),
                   "context.isa is not a value of attn8::Isa");
    EXPECT_EQ(context, nullptr);
    int64_t shape[4] = {1, 2, 3, 4};
    expect_invalid(attn8_scale_shape(shape, number, 4, shape),
                   "spec.granularity is not a value of attn8::Granularity");
  }
  expect_refused_after("q.device got cuda:0, wants cpu, as the context's",
                       [](Call& c) { c.q_tensor.device_type = ATTN8_CUDA; });
  expect_refused_after("k.shape=[1, -9, 1, 8] wants no negative",
                       [](Call& c) { c.k_tensor.shape[1] = -9; });
  expect_refused_after("v.data got nullptr, wants [1, 9, 1, 8]",
                       [](Call& c) { c.v_tensor.data = nullptr; });
  expect_refused_after("out.quantization is set, wants NULL", [](Call& c) {
    c.out_tensor.quantization = reinterpret_cast<const attn8_quantization*>(uintptr_t{8});
  });
  attn8_quantization quantization;
  ASSERT_EQ(attn8_quantization_init(&quantization, sizeof quantization), ATTN8_OK);
  expect_refused_after("k.scale got NULL",
                       [&](Call& c) { c.k_tensor.quantization = &quantization; });
  expect_refused_after("k.codes.dtype got float32, wants int8", [&](Call& c) {
    quantization.scale = &c.lse_tensor;
    c.k_tensor.quantization = &quantization;
  });
  expect_refused_after("k.quantization.reserved got 1, wants 0", [&](Call& c) {
    quantization.reserved = 1;
    c.k_tensor.quantization = &quantization;
  });
}

TEST(CApi, GarbageElsewhere) {
  attn8_context_params params;
  ASSERT_EQ(attn8_context_params_init(&params, sizeof params), ATTN8_OK);
  attn8_context* context = nullptr;
  params.threads = 0;
  expect_invalid(attn8_context_create(&params, &context), "context.threads got 0, wants >= 1");
  params.threads = 1;
  params.device_type = ATTN8_CUDA;
  ASSERT_EQ(attn8_context_create(&params, &context), ATTN8_OK) << attn8_last_error();
  Call on_cuda;
  expect_refused(attn8_attention(&on_cuda.q_tensor, &on_cuda.k_tensor, &on_cuda.v_tensor,
                                 &on_cuda.out_tensor, nullptr, nullptr, context),
                 ATTN8_UNSUPPORTED,
                 "context.device got cuda, attention() allocates no device memory: use "
                 "AttentionPlan with a workspace");
  attn8_context_destroy(context);
  params.device_type = 2;
  EXPECT_EQ(attn8_context_create(&params, &context), ATTN8_UNSUPPORTED);
  EXPECT_EQ(context, nullptr);

  int64_t shape[4] = {1, 10, 3, 4};
  expect_invalid(attn8_scale_shape(shape, ATTN8_PER_BLOCK, 0, shape),
                 "spec.block got 0, wants > 0");
  ASSERT_EQ(attn8_scale_shape(shape, ATTN8_PER_BLOCK_CHANNEL, 4, shape), ATTN8_OK);
  EXPECT_EQ(std::vector<int64_t>(shape, shape + 4), (std::vector<int64_t>{1, 3, 3, 4}));
  shape[1] = std::numeric_limits<int64_t>::max();
  expect_invalid(attn8_scale_shape(shape, ATTN8_PER_BLOCK, 4, shape),
                 "x.shape=[1, 9223372036854775807, 3, 4] has over 2^48 elements");

  Call c;
  std::vector<double> wide(c.out.size()), lse(c.lse.size());
  const auto reference = [&](size_t out_count, size_t lse_count) {
    return attn8_reference_attention(&c.q_tensor, &c.k_tensor, &c.v_tensor, &c.params, wide.data(),
                                     out_count, lse.data(), lse_count);
  };
  EXPECT_EQ(reference(80, 10), ATTN8_OK) << attn8_last_error();
  expect_invalid(reference(79, 10), "out_count got 79, wants 80");
  expect_invalid(reference(80, 0), "lse_count got 0, wants 10");
  c.k_tensor.shape[3] = 7;
  expect_invalid(reference(80, 10), "k.shape[3]=7 must equal q.shape[3]=8 (head_dim)");
}

TEST(CApi, PlanRefusesOtherProblems) {
  Call c;
  attn8_plan* plan = nullptr;
  ASSERT_EQ(attn8_plan_create(&c.q_tensor, &c.k_tensor, &c.v_tensor, &c.out_tensor, &c.lse_tensor,
                              &c.params, nullptr, &plan),
            ATTN8_OK);
  const size_t bytes = attn8_plan_workspace_bytes(plan);
  std::vector<std::max_align_t> memory(bytes / sizeof(std::max_align_t) + 8);
  void* workspace = memory.data();
  size_t space = memory.size() * sizeof(std::max_align_t);
  ASSERT_NE(std::align(64, bytes, workspace, space), nullptr);
  const auto run = [&](void* at, size_t size, attn8_run_times* times = nullptr) {
    return attn8_plan_run(plan, &c.q_tensor, &c.k_tensor, &c.v_tensor, &c.out_tensor, &c.lse_tensor,
                          at, size, times);
  };
  EXPECT_EQ(run(workspace, bytes), ATTN8_OK) << attn8_last_error();
  expect_invalid(run(workspace, bytes - 1), "workspace got " + std::to_string(bytes - 1) +
                                                " bytes, wants " + std::to_string(bytes));
  expect_invalid(run(nullptr, bytes), "workspace got 0 bytes, wants " + std::to_string(bytes));
  expect_invalid(run(static_cast<char*>(workspace) + 8, bytes),
                 "workspace.data() wants an alignment of 64 bytes");
  attn8_run_times times = {};
  expect_invalid(run(workspace, bytes, &times),
                 "times.struct_size got 0, wants a multiple of 8 in [8, 4096]");
  c.q_tensor.shape[1] = c.out_tensor.shape[1] = c.lse_tensor.shape[1] = 4;
  expect_invalid(run(workspace, bytes), "inputs do not have the shapes the plan was made for");
  attn8_plan_destroy(plan);
}

TEST(CApi, LastErrorBelongsToTheThread) {
  expect_invalid(attn8_scale_shape(nullptr, 0, 0, nullptr), "x_shape got NULL");
  const char* const here = attn8_last_error();
  for (const int granularity : {0, 9}) {
    std::thread other([&] {
      EXPECT_STREQ(attn8_last_error(), "");
      int64_t shape[4] = {1, 2, 3, 4};
      const bool valid = granularity == ATTN8_PER_TOKEN;  // 0; there is no 9
      for (int i = 0; i < 1000; ++i) {
        EXPECT_EQ(attn8_scale_shape(shape, granularity, 0, shape),
                  valid ? ATTN8_OK : ATTN8_INVALID_ARGUMENT);
        EXPECT_STREQ(attn8_last_error(),
                     valid ? "" : "spec.granularity is not a value of attn8::Granularity");
      }
      EXPECT_NE(attn8_last_error(), here);
    });
    for (int i = 0; i < 1000; ++i) {
      expect_invalid(attn8_context_create(nullptr, nullptr), "context got NULL");
    }
    other.join();
    EXPECT_STREQ(here, "context got NULL");
  }
  int64_t shape[4] = {1, 2, 3, 4};
  EXPECT_EQ(attn8_scale_shape(shape, 0, 0, shape), ATTN8_OK);
  EXPECT_STREQ(attn8_last_error(), "");
}

TEST(CApi, HandlesServeManyThreads) {
  Call c;
  ASSERT_EQ(c.run(), ATTN8_OK);
  attn8_context* context = nullptr;
  ASSERT_EQ(attn8_context_create(nullptr, &context), ATTN8_OK);
  attn8_plan* plan = nullptr;
  ASSERT_EQ(attn8_plan_create(&c.q_tensor, &c.k_tensor, &c.v_tensor, &c.out_tensor, nullptr,
                              &c.params, context, &plan),
            ATTN8_OK);
  attn8_context_destroy(context);
  const auto work = [&] {
    std::vector<float> out(c.out.size());
    attn8_tensor out_tensor;
    Call::tensor(out_tensor, out, {1, Call::kQueries, 2, Call::kDim});
    const size_t bytes = (attn8_plan_workspace_bytes(plan) + 63) / 64 * 64;
    void* workspace = std::aligned_alloc(64, bytes);
    for (int i = 0; i < 20; ++i) {
      EXPECT_EQ(attn8_plan_run(plan, &c.q_tensor, &c.k_tensor, &c.v_tensor, &out_tensor, nullptr,
                               workspace, bytes, nullptr),
                ATTN8_OK)
          << attn8_last_error();
      EXPECT_EQ(out, c.out);
    }
    std::free(workspace);
  };
  std::thread a(work), b(work);
  a.join();
  b.join();
  attn8_plan_destroy(plan);
}

}  // namespace
}  // namespace attn8::testing
