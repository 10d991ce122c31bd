// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Bytes to calls of attn8.h with wrong arguments of every kind: NULL, numbers outside their
// enumerations, sizes of structs, shapes and strides that overflow or leave their memory. A call
// answers one of its statuses, with one line exactly when it is not ATTN8_OK, and writes nothing
// when it refuses.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/attn8.h"
#include "fuzz_target.hpp"

namespace attn8::fuzz {
namespace {

/// Elements of 4 bytes behind each tensor; its data pointer is in the middle.
constexpr int64_t kArena = 1 << 14;

/// A tensor of attn8.h with memory that it may or may not stay within.
struct Arena {
  std::vector<float> memory = std::vector<float>(kArena, 0.5F);
  attn8_tensor tensor = {};
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  [[nodiscard]] bool untouched() const {
    return std::ranges::all_of(memory, [](float x) { return x == 0.5F; });
  }
};

int64_t bytes_of(int32_t dtype) {
  return dtype == ATTN8_INT8 ? 1 : dtype == ATTN8_FLOAT16 || dtype == ATTN8_BFLOAT16 ? 2 : 4;
}

/// Whether every element lies in the arena, or there is none. In long double, where nothing
/// overflows and whatever comes near the arena's size is exact.
bool stays_inside(const attn8_tensor& tensor) {
  long double low = 0;
  long double high = 0;
  for (int i = 0; i < 4; ++i) {
    if (tensor.shape[i] <= 0) return true;
    const auto reach =
        static_cast<long double>(tensor.strides[i]) * static_cast<long double>(tensor.shape[i] - 1);
    (reach < 0 ? low : high) += reach;
  }
  constexpr long double kHalf = kArena / 2 * 4;  // in bytes
  const auto size = static_cast<long double>(bytes_of(tensor.dtype));
  return low * size >= -kHalf && (high + 1) * size <= kHalf;
}

int64_t odd_number(ByteReader& bytes) {
  return bytes.pick({int64_t{0}, int64_t{1}, int64_t{-1}, int64_t{2}, int64_t{3}, int64_t{257},
                     int64_t{64}, INT64_MAX, INT64_MIN, INT64_MAX / 2, int64_t{1} << 31,
                     int64_t{1} << 32, int64_t{1} << 48, -(int64_t{1} << 48),
                     static_cast<int64_t>(bytes.word())});
}

/// Replaces one thing of a good tensor now and then.
void spoil(ByteReader& bytes, attn8_tensor& tensor) {
  if (!bytes.one_in(3)) return;
  switch (bytes.below(10)) {
    case 0:
      tensor.struct_size = bytes.pick(
          {uint32_t{0}, uint32_t{8}, uint32_t{88}, uint32_t{92}, uint32_t{80}, UINT32_MAX});
      break;
    case 1:
      tensor.dtype = bytes.pick({5, -1, 255, 256, 3, 4, 1, 2, INT32_MIN});
      break;
    case 2:
      tensor.device_type = bytes.pick({1, 2, -1, 300});
      break;
    case 3:
      tensor.device_index = bytes.pick({1, -1, INT32_MAX});
      break;
    case 4:
      tensor.data = nullptr;
      break;
    case 5:
    case 6:
      tensor.shape[bytes.below(4)] = odd_number(bytes);
      break;
    default:
      tensor.strides[bytes.below(4)] = odd_number(bytes);
  }
}

/// After this a call that takes the tensor may touch all of it.
void make_safe(attn8_tensor& tensor) {
  if (!stays_inside(tensor)) tensor.data = nullptr;
}

void make(ByteReader& bytes, Arena& arena, int32_t dtype, const std::array<int64_t, 4>& shape) {
  float* middle = arena.memory.data() + kArena / 2;
  const bool bhsd = bytes.one_in(3);
  const attn8_status status = (bhsd ? attn8_tensor_bhsd : attn8_tensor_bshd)(
      &arena.tensor, sizeof(attn8_tensor), middle, dtype, shape.data());
  expect(status == ATTN8_OK, attn8_last_error());
  spoil(bytes, arena.tensor);
  make_safe(arena.tensor);
}

const attn8_tensor* or_null(ByteReader& bytes, const Arena& arena) {
  return bytes.one_in(40) ? nullptr : &arena.tensor;
}

/// The status as promised; whether it is ATTN8_OK.
bool answered(const char* function, attn8_status status) {
  const std::string_view line = attn8_last_error();
  expect(status >= ATTN8_OK && status <= ATTN8_DEVICE_ERROR,
         std::string(function) + " answers " + std::to_string(status) + ": " + std::string(line));
  expect((status == ATTN8_OK) == line.empty() && line.find('\n') == std::string_view::npos,
         std::string(function) + " answers " + attn8_status_name(status) + " and '" +
             std::string(line) + "'");
  return status == ATTN8_OK;
}

struct DestroyContext {
  void operator()(attn8_context* context) const { attn8_context_destroy(context); }
};

std::unique_ptr<attn8_context, DestroyContext> make_context(ByteReader& bytes) {
  attn8_context_params params;
  expect(attn8_context_params_init(&params, sizeof params) == ATTN8_OK, attn8_last_error());
  if (bytes.one_in(4)) params.threads = bytes.pick({0, 2, -1, 3, INT32_MIN});
  if (bytes.one_in(4)) params.isa = bytes.pick({0, 1, 2, 3, -2, 256, INT32_MAX});
  if (bytes.one_in(16)) params.device_type = bytes.pick({2, -1, 77});
  if (bytes.one_in(16)) params.reserved = 1;
  if (bytes.one_in(16)) params.struct_size = bytes.pick({0U, 8U, 12U, 48U, 56U, 4096U, 4104U});
  if (params.struct_size > sizeof params) params.struct_size = 44;  // no memory behind it
  attn8_context* context = nullptr;
  const bool made = answered("attn8_context_create", attn8_context_create(&params, &context));
  expect(made == (context != nullptr), "attn8_context_create: a context although it refuses");
  return std::unique_ptr<attn8_context, DestroyContext>(context);
}

attn8_attention_params make_params(ByteReader& bytes) {
  attn8_attention_params params;
  expect(attn8_attention_params_init(&params, sizeof params) == ATTN8_OK, attn8_last_error());
  params.mode = bytes.pick({0, 0, 1, 2, 3});
  params.causal = bytes.one_in(3) ? 1 : 0;
  if (bytes.one_in(4)) {
    switch (bytes.below(10)) {
      case 0:
        params.mode = bytes.pick({-1, 5, 256, 4});
        break;
      case 1:
        params.has_softmax_scale = 1;
        params.softmax_scale =
            bytes.pick({0.0F, -1.0F, 3e38F, __builtin_inff(), __builtin_nanf("")});
        break;
      case 2:
        params.causal_align = bytes.pick({-1, 1, 2});
        break;
      case 3:
        params.window_left = odd_number(bytes);
        break;
      case 4:
        params.window_right = odd_number(bytes);
        break;
      case 5:
        params.kv_block = static_cast<int32_t>(odd_number(bytes));
        break;
      case 6:
        params.v_granularity = static_cast<int32_t>(odd_number(bytes));
        break;
      case 7:
        params.struct_size = bytes.pick({0U, 8U, 16U, 48U, 63U});
        break;
      case 8:
        params.softcap =
            bytes.pick({-1.0F, 1e-30F, 3e38F, __builtin_inff(), __builtin_nanf(""), 5.0F});
        break;
      default:
        params.q_offset = odd_number(bytes);
        params.k_offset = odd_number(bytes);
    }
  }
  return params;
}

int32_t float_type(ByteReader& bytes) { return static_cast<int32_t>(bytes.below(3)); }

/// Score operands, each there or not, with the tensors they point at.
struct Scores {
  Arena attn_mask, alibi_slopes, sinks, seqlens_k, leftpad_k;
  std::array<int32_t, 3> starts_q = {}, starts_k = {};
  attn8_tensor cu_seqlens_q = {}, cu_seqlens_k = {};
  attn8_score_operands operands = {};

  Scores(ByteReader& bytes, int64_t seqlen_q, int64_t nheads_q, int64_t seqlen_k) {
    expect(attn8_score_operands_init(&operands, sizeof operands) == ATTN8_OK, attn8_last_error());
    const auto either = [&](int64_t extent) { return bytes.one_in(2) ? extent : int64_t{1}; };
    make(bytes, attn_mask, bytes.pick<int32_t>({ATTN8_BOOL, 0, 1, 2}),
         {1, either(seqlen_q), either(nheads_q), either(seqlen_k)});
    make(bytes, alibi_slopes, ATTN8_FLOAT32, {1, 1, nheads_q, 1});
    make(bytes, sinks, ATTN8_FLOAT32, {1, 1, nheads_q, 1});
    // Read as int32 their memory is far beyond any length, so that these are always refused.
    make(bytes, seqlens_k, ATTN8_INT32, {1, 1, 1, 1});
    make(bytes, leftpad_k, ATTN8_INT32, {1, 1, 1, 1});
    const auto packed = [&](std::array<int32_t, 3>& starts, attn8_tensor& tensor, int64_t total) {
      const auto all = static_cast<int32_t>(total);
      starts = {0, bytes.pick({all / 2, 0, all, -1, all + 1}), bytes.one_in(16) ? all + 1 : all};
      const std::array<int64_t, 4> shape = {bytes.pick({3, 3, 2, 1, 0}), 1, 1, 1};
      expect(attn8_tensor_bshd(&tensor, sizeof tensor, starts.data(), ATTN8_INT32, shape.data()) ==
                 ATTN8_OK,
             attn8_last_error());
    };
    packed(starts_q, cu_seqlens_q, seqlen_q);
    packed(starts_k, cu_seqlens_k, seqlen_k);
    if (bytes.one_in(4)) {
      operands.cu_seqlens_q = &cu_seqlens_q;
      if (!bytes.one_in(16)) operands.cu_seqlens_k = &cu_seqlens_k;
    }
    if (bytes.one_in(2)) operands.attn_mask = &attn_mask.tensor;
    if (bytes.one_in(2)) operands.alibi_slopes = &alibi_slopes.tensor;
    if (bytes.one_in(2)) operands.sinks = &sinks.tensor;
    if (bytes.one_in(16)) operands.seqlens_k = &seqlens_k.tensor;
    if (bytes.one_in(16)) operands.leftpad_k = &leftpad_k.tensor;
    if (bytes.one_in(16)) operands.reserved = 1;
    if (bytes.one_in(16)) operands.struct_size = bytes.pick({0U, 8U, 16U, 20U, 40U});
  }
};

/// Modes of heads in params that have such fields, the right number of them most of the time.
template <class Params>
void set_head_modes(ByteReader& bytes, const std::array<int32_t, 3>& modes, int64_t nheads_k,
                    Params& params) {
  params.head_modes = bytes.one_in(8) ? nullptr : modes.data();
  params.head_modes_count =
      bytes.one_in(4) ? bytes.pick({int64_t{0}, int64_t{-1}, int64_t{3}}) : nheads_k;
}

int call_attention(ByteReader& bytes) {
  const int64_t dim = bytes.pick({8, 1, 16, 33});
  const int64_t nheads_k = bytes.pick({1, 2});
  const int64_t nheads_q = nheads_k * bytes.pick({1, 2});
  const int64_t seqlen_q = bytes.below(6);
  const int64_t seqlen_k = bytes.below(40);
  Arena q, k, v, out, lse;
  make(bytes, q, float_type(bytes), {1, seqlen_q, nheads_q, dim});
  make(bytes, k, float_type(bytes), {1, seqlen_k, nheads_k, dim});
  make(bytes, v, float_type(bytes), {1, seqlen_k, nheads_k, dim});
  make(bytes, out, float_type(bytes), {1, seqlen_q, nheads_q, dim});
  make(bytes, lse, ATTN8_FLOAT32, {1, seqlen_q, nheads_q, 1});
  const auto context = make_context(bytes);
  attn8_attention_params params = make_params(bytes);
  const Scores scores(bytes, seqlen_q, nheads_q, seqlen_k);
  if (bytes.one_in(3)) params.scores = &scores.operands;
  const std::array<int32_t, 3> modes = {0, bytes.pick({0, 1, 2, 3, 5, -1}), 2};
  if (bytes.one_in(6)) set_head_modes(bytes, modes, nheads_k, params);
  const attn8_tensor* lse_or_null = bytes.one_in(3) ? nullptr : &lse.tensor;
  const attn8_attention_params* params_or_null = bytes.one_in(8) ? nullptr : &params;
  const bool one_shot = bytes.one_in(2);
  bool done = false;
  if (one_shot) {
    done = answered("attn8_attention", attn8_attention(or_null(bytes, q), or_null(bytes, k),
                                                       or_null(bytes, v), or_null(bytes, out),
                                                       lse_or_null, params_or_null, context.get()));
  } else {
    attn8_plan* plan = nullptr;
    const bool made = answered(
        "attn8_plan_create",
        attn8_plan_create(or_null(bytes, q), or_null(bytes, k), or_null(bytes, v),
                          or_null(bytes, out), lse_or_null, params_or_null, context.get(), &plan));
    expect(made == (plan != nullptr), "attn8_plan_create: a plan although it refuses");
    const size_t needed = attn8_plan_workspace_bytes(plan);
    const size_t size = bytes.one_in(8) ? needed / 2 : needed;
    std::vector<std::byte> workspace(size + 128);
    auto* aligned = reinterpret_cast<std::byte*>(
        (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
    if (bytes.one_in(16)) ++aligned;
    // A run with other strides, or other shapes, than planned.
    if (bytes.one_in(4)) {
      spoil(bytes, k.tensor);
      make_safe(k.tensor);
    }
    attn8_run_times times = {};
    times.struct_size = bytes.pick({24U, 24U, 24U, 8U, 0U, 7U});
    done = answered("attn8_plan_run",
                    attn8_plan_run_with_scores(plan, &q.tensor, or_null(bytes, k), &v.tensor,
                                               bytes.one_in(16) ? nullptr : params.scores,
                                               &out.tensor, lse_or_null,
                                               bytes.one_in(16) ? nullptr : aligned, size, &times));
    attn8_plan_destroy(plan);
  }
  expect(done || (out.untouched() && lse.untouched()), "a refused call writes");
  expect(q.untouched() && k.untouched() && v.untouched(), "a call writes to its inputs");
  return done ? 0 : -1;
}

int call_quantize(ByteReader& bytes) {
  const std::array<int64_t, 4> shape = {1, bytes.below(20), 1 + bytes.below(2),
                                        1 + bytes.below(20)};
  const int32_t granularity = bytes.pick({0, 1, 2, 3, 4, 5, -1, 256});
  const int32_t block = bytes.pick({4, 0, -1, 1, INT32_MAX});
  std::array<int64_t, 4> scale_shape = {1, 1, 1, 1};
  answered("attn8_scale_shape",
           attn8_scale_shape(shape.data(), granularity, block, scale_shape.data()));
  Arena x, codes, scale, mean;
  make(bytes, x, float_type(bytes), shape);
  make(bytes, codes, ATTN8_INT8, shape);
  make(bytes, scale, ATTN8_FLOAT32, scale_shape);
  make(bytes, mean, ATTN8_FLOAT32, {1, 1, shape[2], shape[3]});
  attn8_quantize_params params;
  expect(attn8_quantize_params_init(&params, sizeof params) == ATTN8_OK, attn8_last_error());
  params.granularity = granularity;
  params.block = block;
  params.mean_use = bytes.pick({0, 1, 2, 3, -1});
  const auto context = make_context(bytes);
  const bool done =
      answered("attn8_quantize",
               attn8_quantize(or_null(bytes, x), or_null(bytes, codes), or_null(bytes, scale),
                              params.mean_use == 0 ? nullptr : or_null(bytes, mean), &params,
                              context.get()));
  expect(x.untouched(), "attn8_quantize writes to its input");
  if (!done) {
    expect(codes.untouched() && scale.untouched() && mean.untouched(), "a refused call writes");
    return -1;
  }
  attn8_quantization quantization;
  expect(attn8_quantization_init(&quantization, sizeof quantization) == ATTN8_OK,
         attn8_last_error());
  quantization.granularity = bytes.one_in(8) ? odd_number(bytes) & 7 : granularity;
  quantization.block = block;
  quantization.scale = or_null(bytes, scale);
  codes.tensor.quantization = bytes.one_in(16) ? nullptr : &quantization;
  codes.tensor.struct_size = sizeof(attn8_tensor);
  answered("attn8_dequantize", attn8_dequantize(&codes.tensor, or_null(bytes, x), nullptr));
  return 0;
}

int call_merge(ByteReader& bytes) {
  const std::array<int64_t, 4> shape = {1, bytes.below(4), 1 + bytes.below(2), 1 + bytes.below(9)};
  const std::array<int64_t, 4> lse_shape = {shape[0], shape[1], shape[2], 1};
  std::array<Arena, 3> outs, lses;
  std::array<const attn8_tensor*, 3> out_list = {}, lse_list = {};
  const size_t count = bytes.below(4);
  for (size_t i = 0; i < count; ++i) {
    make(bytes, outs[i], float_type(bytes), shape);
    make(bytes, lses[i], ATTN8_FLOAT32, lse_shape);
    out_list[i] = or_null(bytes, outs[i]);
    lse_list[i] = or_null(bytes, lses[i]);
  }
  Arena out, lse;
  make(bytes, out, float_type(bytes), shape);
  make(bytes, lse, ATTN8_FLOAT32, lse_shape);
  const bool done = answered(
      "attn8_merge_states",
      attn8_merge_states(bytes.one_in(32) ? nullptr : out_list.data(), lse_list.data(), count,
                         or_null(bytes, out), bytes.one_in(3) ? nullptr : &lse.tensor, nullptr));
  expect(done || (out.untouched() && lse.untouched()), "a refused call writes");
  return done ? 0 : -1;
}

struct DestroyCache {
  void operator()(attn8_kv_cache* cache) const { attn8_kv_cache_destroy(cache); }
};

std::unique_ptr<attn8_kv_cache, DestroyCache> make_cache(ByteReader& bytes) {
  attn8_kv_cache_params params;
  expect(attn8_kv_cache_params_init(&params, sizeof params) == ATTN8_OK, attn8_last_error());
  params.nheads_k = 2;
  params.head_dim = 8;
  params.page_size = 64;
  params.max_pages = 4;
  if (bytes.one_in(4)) {
    switch (bytes.below(6)) {
      case 0:
        params.nheads_k = bytes.pick({int64_t{0}, int64_t{-1}, INT64_MAX, int64_t{1} << 40});
        break;
      case 1:
        params.head_dim = bytes.pick({int64_t{0}, int64_t{257}, INT64_MIN});
        break;
      case 2:
        params.max_pages = bytes.pick({int64_t{0}, int64_t{-1}, INT64_MAX, int64_t{1} << 31});
        break;
      case 3:
        params.page_size = bytes.pick({0, 63, 65, -64, 1024, INT32_MAX});
        break;
      case 4:
        params.reserved = 1;
        break;
      default:
        params.struct_size = bytes.pick({0U, 4U, 7U, 8U, 16U, 32U, 40U});
    }
  }
  attn8_kv_cache* cache = nullptr;
  const bool made = answered("attn8_kv_cache_create",
                             attn8_kv_cache_create(bytes.one_in(32) ? nullptr : &params, &cache));
  expect(made == (cache != nullptr), "attn8_kv_cache_create: a cache although it refuses");
  return std::unique_ptr<attn8_kv_cache, DestroyCache>(cache);
}

/// Calls on two sequences of a cache, one of another cache, and handles that never were.
int call_kv_cache(ByteReader& bytes) {
  const auto cache = make_cache(bytes);
  const auto other = make_cache(bytes);
  std::array<attn8_kv_sequence, 4> sequences = {};
  answered("create", attn8_kv_sequence_create(cache.get(), &sequences[0]));
  answered("create", attn8_kv_sequence_create(cache.get(), &sequences[1]));
  answered("create", attn8_kv_sequence_create(other.get(), &sequences[2]));
  sequences[3] = {bytes.word(), bytes.word()};
  const auto pick = [&] { return sequences[bytes.one_in(8) ? bytes.below(4) : bytes.below(2)]; };
  int done = 0;
  for (int step = 0; step < 12 && !bytes.at_end(); ++step) {
    attn8_kv_cache* target = bytes.one_in(32) ? nullptr : cache.get();
    const attn8_kv_sequence sequence = pick();
    switch (bytes.below(8)) {
      case 0:
      case 1: {
        Arena k, v;
        const std::array<int64_t, 4> shape = {1, bytes.below(80), 2, 8};
        make(bytes, k, float_type(bytes), shape);
        make(bytes, v, float_type(bytes), shape);
        if (bytes.one_in(3)) {
          const std::array<attn8_kv_sequence, 2> both = {sequence, pick()};
          const auto total = static_cast<int32_t>(shape[1]);
          const std::array<int32_t, 3> cu_seqlens = {
              0, bytes.pick({total / 2, 0, total, -1, total + 1}), total};
          done += answered(
              "append batch",
              attn8_kv_cache_append(target, bytes.one_in(16) ? nullptr : both.data(), 2,
                                    or_null(bytes, k), or_null(bytes, v),
                                    bytes.one_in(16) ? nullptr : cu_seqlens.data(), nullptr));
          break;
        }
        done += answered("append", attn8_kv_sequence_append(target, sequence, or_null(bytes, k),
                                                            or_null(bytes, v), nullptr));
        break;
      }
      case 2: {
        attn8_kv_sequence child = {7, 7};
        const bool forked =
            answered("fork", attn8_kv_sequence_fork(target, sequence, bytes.below(90), &child));
        expect(forked == (child.id != 0), "fork: a sequence although it refuses");
        if (forked) sequences[1] = child;
        break;
      }
      case 3:
        answered("truncate",
                 attn8_kv_sequence_truncate(target, sequence,
                                            bytes.one_in(4) ? odd_number(bytes) : bytes.below(90)));
        break;
      case 4:
        if (bytes.one_in(4)) answered("free", attn8_kv_sequence_free(target, sequence));
        break;
      case 5: {
        attn8_kv_cache_usage usage = {};
        usage.struct_size = bytes.pick({48U, 8U, 24U, 0U, 13U});
        answered("usage", attn8_kv_cache_get_usage(target, &usage));
        int64_t length = -1;
        const bool known = answered("length", attn8_kv_sequence_length(target, sequence, &length));
        expect(known == (length >= 0), "length: written although it refuses");
        break;
      }
      default: {
        const int64_t rows = bytes.below(5);
        Arena q, out, lse;
        make(bytes, q, float_type(bytes), {1, rows, 4, 8});
        make(bytes, out, float_type(bytes), {1, rows, 4, 8});
        make(bytes, lse, ATTN8_FLOAT32, {1, rows, 4, 1});
        attn8_kv_attention_params params;
        expect(attn8_kv_attention_params_init(&params, sizeof params) == ATTN8_OK,
               attn8_last_error());
        if (bytes.one_in(8)) params.causal_align = bytes.pick({1, 2, -1});
        if (bytes.one_in(8)) params.window_left = odd_number(bytes);
        if (bytes.one_in(8)) params.softcap = bytes.pick({5.0F, -1.0F, __builtin_inff()});
        const Scores scores(bytes, rows, 4, bytes.pick({80, 200, 30}));
        if (bytes.one_in(3)) params.scores = &scores.operands;
        if (bytes.one_in(4)) params.mode = bytes.pick({2, 3, 1, 4, -1});
        const std::array<int32_t, 3> modes = {0, bytes.pick({0, 1, 2, 3, 5, -1}), 2};
        if (bytes.one_in(6)) set_head_modes(bytes, modes, 2, params);
        const std::array<attn8_kv_sequence, 2> batch = {sequence, pick()};
        std::array<int32_t, 3> cu_seqlens_q = {0, static_cast<int32_t>(rows) / 2,
                                               static_cast<int32_t>(rows)};
        if (bytes.one_in(8)) {
          cu_seqlens_q[bytes.below(3)] = static_cast<int32_t>(odd_number(bytes));
        }
        const bool attended = answered(
            "attend", attn8_kv_cache_attend(
                          target, bytes.one_in(32) ? nullptr : batch.data(), 2, or_null(bytes, q),
                          bytes.one_in(32) ? nullptr : cu_seqlens_q.data(), or_null(bytes, out),
                          bytes.one_in(2) ? nullptr : &lse.tensor,
                          bytes.one_in(4) ? nullptr : &params, nullptr));
        expect(attended || (out.untouched() && lse.untouched()), "a refused call writes");
        done += attended;
      }
    }
  }
  return done > 1 ? 0 : -1;
}

}  // namespace

std::vector<Bytes> seeds() { return {}; }

}  // namespace attn8::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace attn8::fuzz;  // NOLINT: this is the target
  ByteReader bytes(data, size);
  switch (bytes.below(5)) {
    case 0:
      return call_quantize(bytes);
    case 1:
      return call_merge(bytes);
    case 2:
      return call_kv_cache(bytes);
    default:
      return call_attention(bytes);
  }
}
