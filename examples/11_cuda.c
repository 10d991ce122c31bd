/* SPDX-FileCopyrightText: The attn8 authors */
/* SPDX-License-Identifier: Apache-2.0 */

/* Plain C on a GPU, as an inference engine would use it: attention of a prompt, and decode steps of
 * two sequences that share the prompt's pages in an INT8 cache; compared with float64. Where attn8
 * or the machine has no CUDA it says what is missing and exits with 77. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "attn8/attn8.h"

enum { kPage = 256, kPrompt = 2 * kPage, kHeads = 8, kKvHeads = 2, kDim = 64, kSequences = 2 };
enum { kKeys = kPrompt + 1 }; /* of each sequence: the prompt and a token of its own */
enum { kQRow = kHeads * kDim, kKvRow = kKvHeads * kDim };

static float q[kPrompt * kQRow], k[kKeys * kKvRow], v[kKeys * kKvRow], out[kPrompt * kQRow];
static double exact[kPrompt * kQRow], result[kPrompt * kQRow];
static attn8_cuda_memory* memory[16];
static int memories;

static void check(attn8_status status) {
  if (status == ATTN8_OK) return;
  fprintf(stderr, "%s: %s\n", attn8_status_name(status), attn8_last_error());
  exit(1);
}

/* Device memory, with `host` copied there if it is not NULL; freed at the end. An engine has its
 * own. */
static attn8_cuda_memory* on_device(size_t bytes, const void* host) {
  attn8_cuda_memory* made = NULL;
  check(attn8_cuda_memory_create(0, bytes, &made));
  if (host != NULL) check(attn8_cuda_memory_upload(made, host));
  memory[memories++] = made;
  return made;
}

/* Roughly normal numbers: sums of twelve uniform ones. */
static void fill(float* x, int count) {
  static uint32_t state = 1;
  for (int i = 0; i < count; ++i) {
    float sum = 0;
    for (int j = 0; j < 12; ++j) {
      state = state * 1664525u + 1013904223u;
      sum += (float)(state >> 8) / 16777216.0f;
    }
    x[i] = sum - 6;
  }
}

/* A tensor of dense memory [batch, seq, heads, dim], on the GPU unless `device_type` says else. */
static attn8_tensor tensor(const void* data, int32_t dtype, int32_t device_type, int64_t batch,
                           int64_t seq, int64_t heads, int64_t dim) {
  attn8_tensor made;
  check(attn8_tensor_bshd(&made, sizeof made, data, dtype,
                          (const int64_t[4]){batch, seq, heads, dim}));
  made.device_type = device_type;
  return made;
}

/* Relative L2 error of the last `queries` of a sequence of `keys`, whose attention `got` holds. */
static double error_of(const float* got, const float* queries, int64_t count, int64_t keys) {
  const attn8_tensor q_host = tensor(queries, ATTN8_FLOAT32, ATTN8_CPU, 1, count, kHeads, kDim);
  const attn8_tensor k_host = tensor(k, ATTN8_FLOAT32, ATTN8_CPU, 1, keys, kKvHeads, kDim);
  const attn8_tensor v_host = tensor(v, ATTN8_FLOAT32, ATTN8_CPU, 1, keys, kKvHeads, kDim);
  attn8_attention_params params;
  check(attn8_attention_params_init(&params, sizeof params));
  params.causal = 1;
  const size_t elements = (size_t)count * kQRow;
  check(attn8_reference_attention(&q_host, &k_host, &v_host, &params, exact, elements, NULL, 0));
  for (size_t i = 0; i < elements; ++i) result[i] = (double)got[i];
  attn8_error_report report = {.struct_size = sizeof report};
  check(attn8_compare(result, exact, elements, &report));
  return report.rel_l2;
}

/* A prompt through a plan: checked once, run as often as it is wanted. */
static double run_plan(const attn8_context* context, const attn8_tensor* q_gpu,
                       const attn8_tensor* k_gpu, const attn8_tensor* v_gpu) {
  attn8_cuda_memory* out_memory = on_device(sizeof out, NULL);
  const attn8_tensor out_gpu = tensor(attn8_cuda_memory_data(out_memory), ATTN8_FLOAT32, ATTN8_CUDA,
                                      1, kPrompt, kHeads, kDim);
  attn8_attention_params params;
  check(attn8_attention_params_init(&params, sizeof params));
  params.causal = 1;
  attn8_plan* plan = NULL;
  check(attn8_plan_create(q_gpu, k_gpu, v_gpu, &out_gpu, NULL, &params, context, &plan));
  const size_t bytes = attn8_plan_workspace_bytes(plan);
  void* workspace = attn8_cuda_memory_data(on_device(bytes, NULL));
  check(attn8_plan_run(plan, q_gpu, k_gpu, v_gpu, &out_gpu, NULL, workspace, bytes, NULL));
  printf("prompt by %s, ", attn8_plan_kernel(plan));
  attn8_plan_destroy(plan);
  check(attn8_cuda_memory_download(out_memory, out));
  return error_of(out, q, kPrompt, kPrompt);
}

/* Two sequences with the same prompt, whose pages both tables name; each appends one token to a
 * page of its own and attends to all. */
static double decode_from_pages(const attn8_context* context, const attn8_tensor* k_prompt,
                                const attn8_tensor* v_prompt) {
  attn8_cuda_kv_cache_params params;
  check(attn8_cuda_kv_cache_params_init(&params, sizeof params));
  params.page_size = kPage;
  params.nheads_k = kKvHeads;
  params.head_dim = kDim;
  params.num_pages = 8;
  attn8_cuda_kv_cache* cache = NULL;
  check(attn8_cuda_kv_cache_create(&params, context, &cache));

  /* Tables may lie in either memory; on the CPU what they say is checked. */
  const int32_t table[kSequences][3] = {{5, 2, 7}, {5, 2, 0}};
  int32_t lengths[kSequences] = {0, 0};
  const attn8_tensor table_of_first = tensor(table, ATTN8_INT32, ATTN8_CPU, 1, 3, 1, 1);
  const attn8_tensor table_of_all = tensor(table, ATTN8_INT32, ATTN8_CPU, kSequences, 3, 1, 1);
  const attn8_tensor length_of_first = tensor(lengths, ATTN8_INT32, ATTN8_CPU, 1, 1, 1, 1);
  const attn8_tensor length_of_all = tensor(lengths, ATTN8_INT32, ATTN8_CPU, kSequences, 1, 1, 1);
  attn8_cuda_kv_tables tables;
  check(attn8_cuda_kv_tables_init(&tables, sizeof tables));

  size_t bytes = 0;
  tables.block_table = &table_of_first;
  tables.cache_seqlens = &length_of_first;
  check(attn8_cuda_kv_cache_workspace_bytes(cache, k_prompt->shape, &tables, &bytes));
  void* workspace = attn8_cuda_memory_data(on_device(bytes, NULL));
  check(attn8_cuda_kv_cache_append(cache, k_prompt, v_prompt, &tables, workspace, bytes, context));

  /* The same token for both, so that the results can be compared with each other too. */
  float k_tokens[kSequences][kKvRow], v_tokens[kSequences][kKvRow], q_tokens[kSequences][kQRow];
  for (int i = 0; i < kSequences; ++i) {
    for (int j = 0; j < kKvRow; ++j) k_tokens[i][j] = k[kPrompt * kKvRow + j];
    for (int j = 0; j < kKvRow; ++j) v_tokens[i][j] = v[kPrompt * kKvRow + j];
    for (int j = 0; j < kQRow; ++j) q_tokens[i][j] = q[j];
    lengths[i] = kPrompt;
  }
  const attn8_tensor k_gpu = tensor(attn8_cuda_memory_data(on_device(sizeof k_tokens, k_tokens)),
                                    ATTN8_FLOAT32, ATTN8_CUDA, kSequences, 1, kKvHeads, kDim);
  const attn8_tensor v_gpu = tensor(attn8_cuda_memory_data(on_device(sizeof v_tokens, v_tokens)),
                                    ATTN8_FLOAT32, ATTN8_CUDA, kSequences, 1, kKvHeads, kDim);
  const attn8_tensor q_gpu = tensor(attn8_cuda_memory_data(on_device(sizeof q_tokens, q_tokens)),
                                    ATTN8_FLOAT32, ATTN8_CUDA, kSequences, 1, kHeads, kDim);
  attn8_cuda_memory* out_memory = on_device(sizeof q_tokens, NULL);
  const attn8_tensor out_gpu = tensor(attn8_cuda_memory_data(out_memory), ATTN8_FLOAT32, ATTN8_CUDA,
                                      kSequences, 1, kHeads, kDim);
  tables.block_table = &table_of_all;
  tables.cache_seqlens = &length_of_all;
  check(attn8_cuda_kv_cache_workspace_bytes(cache, k_gpu.shape, &tables, &bytes));
  workspace = attn8_cuda_memory_data(on_device(bytes, NULL));
  check(attn8_cuda_kv_cache_append(cache, &k_gpu, &v_gpu, &tables, workspace, bytes, context));
  for (int i = 0; i < kSequences; ++i) ++lengths[i];
  check(attn8_cuda_kv_cache_workspace_bytes(cache, q_gpu.shape, &tables, &bytes));
  workspace = attn8_cuda_memory_data(on_device(bytes, NULL));
  check(attn8_cuda_kv_cache_attend(cache, &q_gpu, &tables, &out_gpu, NULL, NULL, workspace, bytes,
                                   context));
  check(attn8_cuda_memory_download(out_memory, out));
  attn8_cuda_kv_cache_destroy(cache);
  double largest = 0;
  for (int i = 0; i < kSequences; ++i) {
    const double error = error_of(out + i * kQRow, q_tokens[i], 1, kKeys);
    if (error > largest) largest = error;
  }
  return largest;
}

int main(void) {
  attn8_cuda_device device = {.struct_size = sizeof device};
  const attn8_status status = attn8_cuda_device_at(0, &device);
  if (status == ATTN8_UNAVAILABLE) {
    printf("attn8 %s: no attention on a GPU here: %s\n", attn8_version(), attn8_last_error());
    return 77;
  }
  check(status);
  printf("attn8 %s on %s (%s kernels): ", attn8_version(), device.name, device.kernels);

  fill(q, kPrompt * kQRow);
  fill(k, kKeys * kKvRow);
  fill(v, kKeys * kKvRow);
  attn8_context_params context_params;
  check(attn8_context_params_init(&context_params, sizeof context_params));
  context_params.device_type = ATTN8_CUDA; /* and .stream, the engine's cudaStream_t */
  attn8_context* context = NULL;
  check(attn8_context_create(&context_params, &context));

  const attn8_tensor q_gpu = tensor(attn8_cuda_memory_data(on_device(sizeof q, q)), ATTN8_FLOAT32,
                                    ATTN8_CUDA, 1, kPrompt, kHeads, kDim);
  const attn8_tensor k_gpu = tensor(attn8_cuda_memory_data(on_device(sizeof k, k)), ATTN8_FLOAT32,
                                    ATTN8_CUDA, 1, kPrompt, kKvHeads, kDim);
  const attn8_tensor v_gpu = tensor(attn8_cuda_memory_data(on_device(sizeof v, v)), ATTN8_FLOAT32,
                                    ATTN8_CUDA, 1, kPrompt, kKvHeads, kDim);
  const double of_prompt = run_plan(context, &q_gpu, &k_gpu, &v_gpu);
  const double of_pages = decode_from_pages(context, &k_gpu, &v_gpu);
  attn8_context_destroy(context);
  for (int i = 0; i < memories; ++i) attn8_cuda_memory_destroy(memory[i]);
  /* 2 %: README.md states 1.35 % for normal data and many keys. */
  printf("relative L2 error %.2f %%; from pages %.2f %%\n", 100 * of_prompt, 100 * of_pages);
  return of_prompt < 0.02 && of_pages < 0.02 ? 0 : 1;
}
