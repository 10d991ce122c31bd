// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// CUDA in attn8.h against the shared library: what it says without a device, every argument that is
// wrong, and with a device the results of the C++ API.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attn8/attn8.h"
#include "attn8/attn8.hpp"
#include "attn8/cuda.hpp"
#include "attn8/cuda_kv_cache.hpp"

namespace attn8::testing {
namespace {

constexpr int64_t kTokens = 300, kHeadsQ = 4, kHeadsK = 2, kDim = 40;
constexpr int32_t kPage = 256;

void expect_refused(attn8_status got, attn8_status want, const std::string& message) {
  EXPECT_EQ(got, want);
  EXPECT_EQ(attn8_last_error(), message);
}
void expect_invalid(attn8_status got, const std::string& message) {
  expect_refused(got, ATTN8_INVALID_ARGUMENT, message);
}
void expect_ok(attn8_status status) { ASSERT_EQ(status, ATTN8_OK) << attn8_last_error(); }

std::string reason_for_no_device() {
  return attn8_cuda_device_at(0, nullptr) == ATTN8_OK ? "" : attn8_last_error();
}

struct DestroyContext {
  void operator()(attn8_context* context) const { attn8_context_destroy(context); }
};
std::unique_ptr<attn8_context, DestroyContext> cuda_context() {
  attn8_context_params params;
  EXPECT_EQ(attn8_context_params_init(&params, sizeof params), ATTN8_OK);
  params.device_type = ATTN8_CUDA;
  attn8_context* context = nullptr;
  EXPECT_EQ(attn8_context_create(&params, &context), ATTN8_OK);
  return std::unique_ptr<attn8_context, DestroyContext>(context);
}

struct DestroyMemory {
  void operator()(attn8_cuda_memory* memory) const { attn8_cuda_memory_destroy(memory); }
};
using Memory = std::unique_ptr<attn8_cuda_memory, DestroyMemory>;

/// float32 in host and device memory.
struct Floats {
  Floats(const Extents& extents, int seed)
      : shape(extents), host(static_cast<size_t>(shape[0] * shape[1] * shape[2] * shape[3])) {
    for (size_t i = 0; i < host.size(); ++i) {
      host[i] = static_cast<float>((i * 37 + static_cast<size_t>(seed) * 11) % 23) / 11 - 1;
    }
    attn8_cuda_memory* made = nullptr;
    EXPECT_EQ(attn8_cuda_memory_create(0, host.size() * 4, &made), ATTN8_OK);
    memory.reset(made);
    EXPECT_EQ(attn8_cuda_memory_upload(made, host.data()), ATTN8_OK);
    EXPECT_EQ(attn8_tensor_bshd(&tensor, sizeof tensor, attn8_cuda_memory_data(made), ATTN8_FLOAT32,
                                shape.data()),
              ATTN8_OK);
    tensor.device_type = ATTN8_CUDA;
  }
  [[nodiscard]] TensorView view() const {
    return bshd(tensor.data, DType::kFloat32, shape, {DeviceType::kCuda, 0});
  }
  [[nodiscard]] std::vector<float> download() const {
    std::vector<float> data(host.size());
    EXPECT_EQ(attn8_cuda_memory_download(memory.get(), data.data()), ATTN8_OK);
    return data;
  }

  Extents shape;
  std::vector<float> host;
  Memory memory;
  attn8_tensor tensor = {};
};

attn8_tensor int32_tensor(const std::vector<int32_t>& data, const Extents& shape) {
  attn8_tensor tensor;
  EXPECT_EQ(attn8_tensor_bshd(&tensor, sizeof tensor, data.data(), ATTN8_INT32, shape.data()),
            ATTN8_OK);
  return tensor;
}

TEST(CudaCApi, SaysWhatIsMissing) {
  const CudaSupport support = cuda_support();
  EXPECT_EQ(attn8_cuda_device_count(), static_cast<int32_t>(support.devices.size()));
  const int32_t beyond = attn8_cuda_device_count();
  EXPECT_EQ(attn8_cuda_device_at(beyond, nullptr), ATTN8_UNAVAILABLE);
  if (support.devices.empty()) {
    EXPECT_EQ(attn8_last_error(), support.reason);
  }
  EXPECT_NE(std::string(attn8_last_error()), "");
  EXPECT_EQ(attn8_cuda_device_at(-1, nullptr), ATTN8_UNAVAILABLE);
  auto* memory = reinterpret_cast<attn8_cuda_memory*>(8);
  EXPECT_EQ(attn8_cuda_memory_create(beyond, 64, &memory), ATTN8_UNAVAILABLE);
  EXPECT_EQ(memory, nullptr);
  if (beyond > 0) return;
  EXPECT_EQ(attn8_cuda_synchronize(0), ATTN8_UNAVAILABLE);
  attn8_cuda_kv_cache_params params;
  expect_ok(attn8_cuda_kv_cache_params_init(&params, sizeof params));
  params.nheads_k = kHeadsK;
  params.head_dim = kDim;
  params.num_pages = 2;
  auto* cache = reinterpret_cast<attn8_cuda_kv_cache*>(8);
  EXPECT_EQ(attn8_cuda_kv_cache_create(&params, cuda_context().get(), &cache), ATTN8_UNAVAILABLE);
  EXPECT_EQ(cache, nullptr);
  EXPECT_NE(std::string(attn8_last_error()).find("CUDA"), std::string::npos) << attn8_last_error();
}

TEST(CudaCApi, Device) {
  if (const std::string reason = reason_for_no_device(); !reason.empty()) {
    GTEST_SKIP() << "no CUDA device: " << reason;
  }
  const CudaDevice want = cuda_support().devices.at(0);
  attn8_cuda_device device = {};
  device.struct_size = sizeof device;
  expect_ok(attn8_cuda_device_at(0, &device));
  EXPECT_EQ(device.name, want.name.substr(0, 63));
  EXPECT_EQ(device.kernels, std::string(want.kernels));
  EXPECT_EQ(device.major, want.major);
  EXPECT_EQ(device.minor, want.minor);
  EXPECT_EQ(device.multiprocessors, want.multiprocessors);
  expect_ok(attn8_cuda_synchronize(0));
}

TEST(CudaCApi, RefusesWhatIsNull) {
  attn8_cuda_device device = {};
  device.struct_size = 16;
  expect_invalid(attn8_cuda_device_at(0, &device),
                 "device.struct_size got 16, wants a multiple of 8 in [104, 4096]");
  expect_invalid(attn8_cuda_memory_create(0, 1, nullptr), "memory got NULL");
  expect_invalid(attn8_cuda_memory_upload(nullptr, &device), "memory got NULL");
  expect_invalid(attn8_cuda_memory_download(nullptr, &device), "memory got NULL");
  EXPECT_EQ(attn8_cuda_memory_data(nullptr), nullptr);
  attn8_cuda_memory_destroy(nullptr);
  attn8_cuda_kv_cache_destroy(nullptr);
  EXPECT_EQ(attn8_cuda_kv_cache_bytes_per_page(nullptr), 0U);
  expect_invalid(attn8_cuda_kv_cache_params_init(nullptr, 40), "params got NULL");
  expect_invalid(attn8_cuda_kv_tables_init(nullptr, 40), "tables got NULL");
  attn8_cuda_kv_cache* cache = nullptr;
  expect_invalid(attn8_cuda_kv_cache_create(nullptr, nullptr, nullptr), "cache got NULL");
  expect_invalid(attn8_cuda_kv_cache_create(nullptr, nullptr, &cache), "params got NULL");
  attn8_cuda_kv_cache_params params;
  expect_ok(attn8_cuda_kv_cache_params_init(&params, sizeof params));
  EXPECT_EQ(params.page_size, kPage);
  EXPECT_EQ(params.smooth_k, 1);
  params.reserved = 1;
  expect_invalid(attn8_cuda_kv_cache_create(&params, nullptr, &cache),
                 "params.reserved got 1, wants 0");
  params.reserved = 0;
  params.memory_bytes = 64;
  expect_invalid(attn8_cuda_kv_cache_create(&params, nullptr, &cache),
                 "params.memory got NULL, params.memory_bytes 64");
  expect_invalid(attn8_cuda_kv_cache_memory_bytes(&params, nullptr, nullptr), "bytes got NULL");
  size_t bytes = 0;
  const int64_t shape[4] = {1, 1, 1, 1};
  expect_invalid(attn8_cuda_kv_cache_workspace_bytes(nullptr, shape, nullptr, &bytes),
                 "cache got NULL");
  expect_invalid(
      attn8_cuda_kv_cache_append(nullptr, nullptr, nullptr, nullptr, nullptr, 0, nullptr),
      "cache got NULL");
  expect_invalid(attn8_cuda_kv_cache_attend(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                            nullptr, 0, nullptr),
                 "cache got NULL");
}

TEST(CudaCApi, PlanIsThatOfCxx) {
  if (const std::string reason = reason_for_no_device(); !reason.empty()) {
    GTEST_SKIP() << "no CUDA device: " << reason;
  }
  const Floats q({1, 33, kHeadsQ, kDim}, 1), k({1, kTokens, kHeadsK, kDim}, 2),
      v({1, kTokens, kHeadsK, kDim}, 3), out(q.shape, 4), want(q.shape, 5);
  const auto context = cuda_context();
  attn8_plan* plan = nullptr;
  expect_ok(attn8_plan_create(&q.tensor, &k.tensor, &v.tensor, &out.tensor, nullptr, nullptr,
                              context.get(), &plan));
  const size_t bytes = attn8_plan_workspace_bytes(plan);
  const Floats workspace({1, 1, 1, static_cast<int64_t>(bytes / 4 + 1)}, 0);
  expect_ok(attn8_plan_run(plan, &q.tensor, &k.tensor, &v.tensor, &out.tensor, nullptr,
                           workspace.tensor.data, bytes, nullptr));
  const Result<AttentionPlan> same =
      AttentionPlan::make({q.view(), k.view(), v.view()}, {want.view()}, {}, Context::cuda(0));
  ASSERT_TRUE(same.ok()) << same.status().message();
  EXPECT_EQ(same.value().kernel(), attn8_plan_kernel(plan));
  attn8_plan_destroy(plan);
  const Status status = same.value().run({q.view(), k.view(), v.view()}, {want.view()},
                                         {static_cast<std::byte*>(workspace.tensor.data), bytes});
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(out.download(), want.download());
}

TEST(CudaCApi, CacheIsThatOfCxx) {
  if (const std::string reason = reason_for_no_device(); !reason.empty()) {
    GTEST_SKIP() << "no CUDA device: " << reason;
  }
  const Floats k({1, kTokens, kHeadsK, kDim}, 1), v(k.shape, 2), q({1, 5, kHeadsQ, kDim}, 3),
      out(q.shape, 4), lse({1, 5, kHeadsQ, 1}, 5), want(q.shape, 6), want_lse(lse.shape, 7);
  const auto context = cuda_context();
  attn8_cuda_kv_cache_params params;
  expect_ok(attn8_cuda_kv_cache_params_init(&params, sizeof params));
  params.nheads_k = kHeadsK;
  params.head_dim = kDim;
  params.num_pages = 4;
  // One in memory of the caller's, one in the library's.
  size_t memory_bytes = 0;
  expect_ok(attn8_cuda_kv_cache_memory_bytes(&params, context.get(), &memory_bytes));
  const Floats memory({1, 1, 1, static_cast<int64_t>(memory_bytes / 4)}, 9);
  params.memory = memory.tensor.data;
  params.memory_bytes = memory_bytes - 1;
  attn8_cuda_kv_cache* cache = nullptr;
  EXPECT_EQ(attn8_cuda_kv_cache_create(&params, context.get(), &cache), ATTN8_INVALID_ARGUMENT);
  EXPECT_NE(std::string(attn8_last_error()).find("options.memory got"), std::string::npos);
  params.memory_bytes = memory_bytes;
  expect_ok(attn8_cuda_kv_cache_create(&params, context.get(), &cache));
  Result<CudaKvCache> same =
      CudaKvCache::make({.nheads_k = kHeadsK, .head_dim = kDim, .num_pages = 4}, Context::cuda(0));
  ASSERT_TRUE(same.ok()) << same.status().message();
  EXPECT_EQ(attn8_cuda_kv_cache_bytes_per_page(cache), same.value().bytes_per_page());

  const std::vector<int32_t> table = {3, 1}, start = {0}, end = {static_cast<int32_t>(kTokens)};
  const attn8_tensor table_tensor = int32_tensor(table, {1, 2, 1, 1});
  const attn8_tensor start_tensor = int32_tensor(start, {1, 1, 1, 1});
  const attn8_tensor end_tensor = int32_tensor(end, {1, 1, 1, 1});
  attn8_cuda_kv_tables tables;
  expect_ok(attn8_cuda_kv_tables_init(&tables, sizeof tables));
  tables.block_table = &table_tensor;
  const auto cxx_tables = [&](const std::vector<int32_t>& seqlens) {
    return CudaKvTables{bshd(table.data(), DType::kInt32, {1, 2, 1, 1}),
                        bshd(seqlens.data(), DType::kInt32, {1, 1, 1, 1})};
  };
  size_t bytes = 0;
  expect_invalid(attn8_cuda_kv_cache_workspace_bytes(cache, k.shape.data(), &tables, &bytes),
                 "tables.cache_seqlens got NULL");
  tables.cache_seqlens = &start_tensor;
  expect_ok(attn8_cuda_kv_cache_workspace_bytes(cache, k.shape.data(), &tables, &bytes));
  EXPECT_EQ(bytes, same.value().workspace_bytes(k.shape, cxx_tables(start)));
  const Floats workspace({1, 1, 1, static_cast<int64_t>(bytes / 4 + 65536)}, 0);
  auto* space = static_cast<std::byte*>(workspace.tensor.data);
  expect_ok(attn8_cuda_kv_cache_append(cache, &k.tensor, &v.tensor, &tables, space, bytes,
                                       context.get()));
  Status status =
      same.value().append(k.view(), v.view(), cxx_tables(start), {space, bytes}, Context::cuda(0));
  ASSERT_TRUE(status.ok()) << status.message();

  tables.cache_seqlens = &end_tensor;
  expect_ok(attn8_cuda_kv_cache_workspace_bytes(cache, q.shape.data(), &tables, &bytes));
  attn8_kv_attention_params attend;
  expect_ok(attn8_kv_attention_params_init(&attend, sizeof attend));
  attend.causal = 1;
  attend.softcap = 20;
  CudaKvAttentionOptions options;
  options.mask.causal = true;
  options.softcap = 20;
  const Floats mask({1, 5, 1, kTokens}, 8);
  attn8_score_operands scores;
  expect_ok(attn8_score_operands_init(&scores, sizeof scores));
  scores.attn_mask = &mask.tensor;
  attend.scores = &scores;
  expect_ok(attn8_cuda_kv_cache_attend(cache, &q.tensor, &tables, &out.tensor, &lse.tensor, &attend,
                                       space, bytes, context.get()));
  options.attn_mask = mask.view();
  status = same.value().attend(q.view(), cxx_tables(end), {want.view(), want_lse.view()}, options,
                               {space, bytes}, Context::cuda(0));
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(out.download(), want.download());
  EXPECT_EQ(lse.download(), want_lse.download());

  attend.mode = ATTN8_EXACT;
  EXPECT_EQ(attn8_cuda_kv_cache_attend(cache, &q.tensor, &tables, &out.tensor, nullptr, &attend,
                                       space, bytes, context.get()),
            ATTN8_UNSUPPORTED);
  attn8_cuda_kv_cache_destroy(cache);
}

}  // namespace
}  // namespace attn8::testing
