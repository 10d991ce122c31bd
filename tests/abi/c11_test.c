/* SPDX-FileCopyrightText: The attn8 authors */
/* SPDX-License-Identifier: Apache-2.0 */

/* attn8.h as a C11 compiler sees it: it compiles alone, its layout is what it was released with,
 * and a C program gets right results through it. */
#include "attn8/attn8.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The first release's layout. Later fields only come after these. */
#if UINTPTR_MAX == UINT64_MAX
#define AT(type, field, offset) \
  static_assert(offsetof(type, field) == (offset), #type "." #field " has moved")

AT(attn8_tensor, struct_size, 0);
AT(attn8_tensor, dtype, 4);
AT(attn8_tensor, device_type, 8);
AT(attn8_tensor, device_index, 12);
AT(attn8_tensor, data, 16);
AT(attn8_tensor, shape, 24);
AT(attn8_tensor, strides, 56);
AT(attn8_tensor, quantization, 88);
static_assert(sizeof(attn8_tensor) == 96, "attn8_tensor");

AT(attn8_quantization, struct_size, 0);
AT(attn8_quantization, granularity, 4);
AT(attn8_quantization, block, 8);
AT(attn8_quantization, reserved, 12);
AT(attn8_quantization, scale, 16);
AT(attn8_quantization, mean, 24);
static_assert(sizeof(attn8_quantization) == 32, "attn8_quantization");

AT(attn8_context_params, struct_size, 0);
AT(attn8_context_params, threads, 4);
AT(attn8_context_params, isa, 8);
AT(attn8_context_params, device_type, 12);
AT(attn8_context_params, device_index, 16);
AT(attn8_context_params, reserved, 20);
AT(attn8_context_params, parallel_for, 24);
AT(attn8_context_params, pool, 32);
AT(attn8_context_params, stream, 40);
static_assert(sizeof(attn8_context_params) == 48, "attn8_context_params");

AT(attn8_quantize_params, struct_size, 0);
AT(attn8_quantize_params, granularity, 4);
AT(attn8_quantize_params, block, 8);
AT(attn8_quantize_params, mean_use, 12);
static_assert(sizeof(attn8_quantize_params) == 16, "attn8_quantize_params");

AT(attn8_attention_params, struct_size, 0);
AT(attn8_attention_params, mode, 4);
AT(attn8_attention_params, has_softmax_scale, 8);
AT(attn8_attention_params, softmax_scale, 12);
AT(attn8_attention_params, causal, 16);
AT(attn8_attention_params, causal_align, 20);
AT(attn8_attention_params, window_left, 24);
AT(attn8_attention_params, window_right, 32);
AT(attn8_attention_params, kv_block, 40);
AT(attn8_attention_params, v_granularity, 44);
AT(attn8_attention_params, smooth_k, 48);
AT(attn8_attention_params, check_finite, 52);
AT(attn8_attention_params, fp8_format, 56);
AT(attn8_attention_params, softcap, 60);
AT(attn8_attention_params, q_offset, 64);
AT(attn8_attention_params, k_offset, 72);
AT(attn8_attention_params, scores, 80);
AT(attn8_attention_params, head_modes_count, 88);
AT(attn8_attention_params, head_modes, 96);
static_assert(sizeof(attn8_attention_params) == 104, "attn8_attention_params");

AT(attn8_score_operands, struct_size, 0);
AT(attn8_score_operands, reserved, 4);
AT(attn8_score_operands, attn_mask, 8);
AT(attn8_score_operands, alibi_slopes, 16);
AT(attn8_score_operands, sinks, 24);
AT(attn8_score_operands, seqlens_k, 32);
AT(attn8_score_operands, leftpad_k, 40);
static_assert(sizeof(attn8_score_operands) == 64, "attn8_score_operands");

AT(attn8_run_times, struct_size, 0);
AT(attn8_run_times, reserved, 4);
AT(attn8_run_times, quantize_ms, 8);
AT(attn8_run_times, attention_ms, 16);
static_assert(sizeof(attn8_run_times) == 24, "attn8_run_times");

AT(attn8_kv_cache_params, struct_size, 0);
AT(attn8_kv_cache_params, page_size, 4);
AT(attn8_kv_cache_params, nheads_k, 8);
AT(attn8_kv_cache_params, head_dim, 16);
AT(attn8_kv_cache_params, max_pages, 24);
AT(attn8_kv_cache_params, smooth_k, 32);
AT(attn8_kv_cache_params, reserved, 36);
AT(attn8_kv_cache_params, head_dim_v, 40);
static_assert(sizeof(attn8_kv_cache_params) == 48, "attn8_kv_cache_params");

AT(attn8_kv_sequence, cache, 0);
AT(attn8_kv_sequence, id, 8);
static_assert(sizeof(attn8_kv_sequence) == 16, "attn8_kv_sequence");

AT(attn8_kv_cache_usage, struct_size, 0);
AT(attn8_kv_cache_usage, reserved, 4);
AT(attn8_kv_cache_usage, sequences, 8);
AT(attn8_kv_cache_usage, pages_used, 16);
AT(attn8_kv_cache_usage, pages_free, 24);
AT(attn8_kv_cache_usage, bytes_used, 32);
AT(attn8_kv_cache_usage, bytes_per_page, 40);
static_assert(sizeof(attn8_kv_cache_usage) == 48, "attn8_kv_cache_usage");

AT(attn8_kv_attention_params, struct_size, 0);
AT(attn8_kv_attention_params, has_softmax_scale, 4);
AT(attn8_kv_attention_params, softmax_scale, 8);
AT(attn8_kv_attention_params, causal, 12);
AT(attn8_kv_attention_params, causal_align, 16);
AT(attn8_kv_attention_params, softcap, 20);
AT(attn8_kv_attention_params, window_left, 24);
AT(attn8_kv_attention_params, window_right, 32);
AT(attn8_kv_attention_params, scores, 40);
AT(attn8_kv_attention_params, mode, 48);
AT(attn8_kv_attention_params, reserved, 52);
AT(attn8_kv_attention_params, head_modes_count, 56);
AT(attn8_kv_attention_params, head_modes, 64);
static_assert(sizeof(attn8_kv_attention_params) == 72, "attn8_kv_attention_params");

AT(attn8_cuda_device, struct_size, 0);
AT(attn8_cuda_device, reserved, 4);
AT(attn8_cuda_device, major, 8);
AT(attn8_cuda_device, minor, 12);
AT(attn8_cuda_device, multiprocessors, 16);
AT(attn8_cuda_device, name, 24);
AT(attn8_cuda_device, kernels, 88);
static_assert(sizeof(attn8_cuda_device) == 104, "attn8_cuda_device");

AT(attn8_cuda_kv_cache_params, struct_size, 0);
AT(attn8_cuda_kv_cache_params, page_size, 4);
AT(attn8_cuda_kv_cache_params, nheads_k, 8);
AT(attn8_cuda_kv_cache_params, head_dim, 16);
AT(attn8_cuda_kv_cache_params, num_pages, 24);
AT(attn8_cuda_kv_cache_params, smooth_k, 32);
AT(attn8_cuda_kv_cache_params, reserved, 36);
AT(attn8_cuda_kv_cache_params, memory, 40);
AT(attn8_cuda_kv_cache_params, memory_bytes, 48);
static_assert(sizeof(attn8_cuda_kv_cache_params) == 56, "attn8_cuda_kv_cache_params");

AT(attn8_cuda_kv_tables, struct_size, 0);
AT(attn8_cuda_kv_tables, reserved, 4);
AT(attn8_cuda_kv_tables, block_table, 8);
AT(attn8_cuda_kv_tables, cache_seqlens, 16);
AT(attn8_cuda_kv_tables, cu_seqlens, 24);
AT(attn8_cuda_kv_tables, max_seqlen, 32);
static_assert(sizeof(attn8_cuda_kv_tables) == 40, "attn8_cuda_kv_tables");

AT(attn8_error_report, struct_size, 0);
AT(attn8_error_report, reserved, 4);
AT(attn8_error_report, rel_l2, 8);
AT(attn8_error_report, mean_rel, 16);
AT(attn8_error_report, max_abs, 24);
AT(attn8_error_report, cosine, 32);
AT(attn8_error_report, mre, 40);
static_assert(sizeof(attn8_error_report) == 48, "attn8_error_report");
#endif

static_assert(_Alignof(attn8_tensor) <= 8 && _Alignof(attn8_attention_params) <= 8, "alignment");

#define EXPECT(condition)                                                            \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, \
              attn8_last_error());                                                   \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)
#define EXPECT_OK(call) EXPECT((call) == ATTN8_OK)

enum { kTokens = 40, kHeads = 2, kDim = 16, kElements = kTokens * kHeads * kDim };

static float q[kElements], k[kElements], v[kElements], out[kElements], again[kElements];
static float lse[kTokens * kHeads];
static double exact[kElements], wide[kElements];
static int8_t codes[3][kElements];
static float scale[3][kTokens * kHeads];

static double error_of(const float* result) {
  for (int i = 0; i < kElements; ++i) wide[i] = (double)result[i];
  attn8_error_report report = {.struct_size = sizeof report};
  EXPECT_OK(attn8_compare(wide, exact, kElements, &report));
  EXPECT(report.cosine > 0.99 && report.max_abs > 0 && report.mre > 0 && report.mean_rel > 0);
  return report.rel_l2;
}

static void inline_for(void* pool, int64_t count, void (*body)(void*, int64_t), void* argument) {
  *(int64_t*)pool += count;
  for (int64_t i = 0; i < count; ++i) body(argument, i);
}

int main(void) {
  EXPECT(strlen(attn8_version()) >= 5);
  EXPECT(strcmp(attn8_last_error(), "") == 0);
  EXPECT(strcmp(attn8_status_name(ATTN8_INVALID_ARGUMENT), "InvalidArgument") == 0);
  EXPECT(attn8_isa_count() >= 1);

  uint32_t random = 1;
  for (int i = 0; i < kElements; ++i) {
    float* const arrays[] = {q, k, v};
    for (int a = 0; a < 3; ++a) {
      random = random * 1664525u + 1013904223u;
      arrays[a][i] = (float)(random >> 8) / 8388608.0f - 1.0f;
    }
  }
  const int64_t shape[4] = {1, kTokens, kHeads, kDim};
  const int64_t row_shape[4] = {1, kTokens, kHeads, 1};
  attn8_tensor q_tensor, k_tensor, v_tensor, out_tensor, lse_tensor;
  EXPECT_OK(attn8_tensor_bshd(&q_tensor, sizeof q_tensor, q, ATTN8_FLOAT32, shape));
  EXPECT_OK(attn8_tensor_bshd(&k_tensor, sizeof k_tensor, k, ATTN8_FLOAT32, shape));
  EXPECT_OK(attn8_tensor_bshd(&v_tensor, sizeof v_tensor, v, ATTN8_FLOAT32, shape));
  EXPECT_OK(attn8_tensor_bshd(&out_tensor, sizeof out_tensor, out, ATTN8_FLOAT32, shape));
  EXPECT_OK(attn8_tensor_bshd(&lse_tensor, sizeof lse_tensor, lse, ATTN8_FLOAT32, row_shape));

  attn8_attention_params params;
  EXPECT_OK(attn8_attention_params_init(&params, sizeof params));
  params.causal = 1;
  EXPECT_OK(attn8_reference_attention(&q_tensor, &k_tensor, &v_tensor, &params, exact, kElements,
                                      NULL, 0));

  /* One shot, in the two modes whose errors say whether `mode` arrives. */
  EXPECT_OK(
      attn8_attention(&q_tensor, &k_tensor, &v_tensor, &out_tensor, &lse_tensor, &params, NULL));
  const double accurate = error_of(out);
  EXPECT(accurate < 0.03);
  params.mode = ATTN8_EXACT;
  EXPECT_OK(attn8_attention(&q_tensor, &k_tensor, &v_tensor, &out_tensor, NULL, &params, NULL));
  EXPECT(error_of(out) < 1e-5);
  EXPECT(accurate > 1e-4);
  params.mode = ATTN8_ACCURATE;

  /* A plan, on threads of ours; the same bits. */
  EXPECT_OK(
      attn8_attention(&q_tensor, &k_tensor, &v_tensor, &out_tensor, &lse_tensor, &params, NULL));
  memcpy(again, out, sizeof again);
  memset(out, 0, sizeof out);
  int64_t pool = 0;
  attn8_context_params context_params;
  EXPECT_OK(attn8_context_params_init(&context_params, sizeof context_params));
  context_params.threads = 2;
  context_params.parallel_for = inline_for;
  context_params.pool = &pool;
  attn8_context* context = NULL;
  EXPECT_OK(attn8_context_create(&context_params, &context));
  attn8_plan* plan = NULL;
  EXPECT_OK(attn8_plan_create(&q_tensor, &k_tensor, &v_tensor, &out_tensor, &lse_tensor, &params,
                              context, &plan));
  attn8_context_destroy(context);
  EXPECT(strncmp(attn8_plan_kernel(plan), "attend_accurate_", 16) == 0);
  EXPECT(attn8_plan_kv_block(plan) >= 64);
  EXPECT(attn8_plan_v_granularity(plan) == ATTN8_PER_TOKEN);
  EXPECT(attn8_plan_isa(plan) >= ATTN8_ISA_SCALAR);
  const size_t bytes = attn8_plan_workspace_bytes(plan);
  void* workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
  EXPECT(workspace != NULL);
  attn8_run_times times = {.struct_size = sizeof times, .attention_ms = -1};
  EXPECT_OK(attn8_plan_run(plan, &q_tensor, &k_tensor, &v_tensor, &out_tensor, &lse_tensor,
                           workspace, bytes, &times));
  EXPECT(times.attention_ms >= 0 && times.quantize_ms >= 0);
  EXPECT(pool > 0);
  EXPECT(memcmp(again, out, sizeof again) == 0);
  free(workspace);
  attn8_plan_destroy(plan);

  /* Quantized operands: there and back, and attention of codes. */
  attn8_tensor floats[3] = {q_tensor, k_tensor, v_tensor};
  attn8_tensor code_tensors[3], scale_tensors[3];
  attn8_quantization quantization[3];
  int64_t scale_shape[4];
  EXPECT_OK(attn8_scale_shape(shape, ATTN8_PER_TOKEN, 0, scale_shape));
  EXPECT(memcmp(scale_shape, row_shape, sizeof scale_shape) == 0);
  for (int a = 0; a < 3; ++a) {
    EXPECT_OK(
        attn8_tensor_bshd(&code_tensors[a], sizeof(attn8_tensor), codes[a], ATTN8_INT8, shape));
    EXPECT_OK(attn8_tensor_bshd(&scale_tensors[a], sizeof(attn8_tensor), scale[a], ATTN8_FLOAT32,
                                scale_shape));
    EXPECT_OK(attn8_quantize(&floats[a], &code_tensors[a], &scale_tensors[a], NULL, NULL, NULL));
    EXPECT_OK(attn8_quantization_init(&quantization[a], sizeof quantization[a]));
    quantization[a].scale = &scale_tensors[a];
    code_tensors[a].quantization = &quantization[a];
  }
  EXPECT_OK(attn8_dequantize(&code_tensors[0], &out_tensor, NULL));
  for (int i = 0; i < kElements; ++i) EXPECT(fabsf(out[i] - q[i]) <= scale[0][i / kDim]);
  EXPECT_OK(attn8_attention(&code_tensors[0], &code_tensors[1], &code_tensors[2], &out_tensor, NULL,
                            &params, NULL));
  EXPECT(error_of(out) < 0.03);

  /* The same attention from a KV cache of two pages. */
  attn8_kv_cache_params cache_params;
  EXPECT_OK(attn8_kv_cache_params_init(&cache_params, sizeof cache_params));
  cache_params.nheads_k = kHeads;
  cache_params.head_dim = kDim;
  cache_params.max_pages = 2;
  attn8_kv_cache* cache = NULL;
  attn8_kv_sequence sequence;
  EXPECT_OK(attn8_kv_cache_create(&cache_params, &cache));
  EXPECT_OK(attn8_kv_sequence_create(cache, &sequence));
  EXPECT_OK(attn8_kv_sequence_append(cache, sequence, &k_tensor, &v_tensor, NULL));
  attn8_kv_attention_params kv_params;
  EXPECT_OK(attn8_kv_attention_params_init(&kv_params, sizeof kv_params));
  kv_params.causal = 1;
  EXPECT_OK(attn8_kv_cache_attend(cache, &sequence, 1, &q_tensor, (const int32_t[2]){0, kTokens},
                                  &out_tensor, NULL, &kv_params, NULL));
  EXPECT(error_of(out) < 0.03);
  attn8_kv_cache_destroy(cache);

  /* A state merged with nothing is itself. */
  EXPECT_OK(
      attn8_attention(&q_tensor, &k_tensor, &v_tensor, &out_tensor, &lse_tensor, &params, NULL));
  attn8_tensor again_tensor;
  EXPECT_OK(attn8_tensor_bshd(&again_tensor, sizeof again_tensor, again, ATTN8_FLOAT32, shape));
  const attn8_tensor* outs[] = {&out_tensor};
  const attn8_tensor* lses[] = {&lse_tensor};
  memset(again, 0, sizeof again);
  EXPECT_OK(attn8_merge_states(outs, lses, 1, &again_tensor, NULL, NULL));
  EXPECT(memcmp(again, out, sizeof again) == 0);
  return 0;
}
