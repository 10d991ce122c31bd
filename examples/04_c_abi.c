/* SPDX-FileCopyrightText: The attn8 authors */
/* SPDX-License-Identifier: Apache-2.0 */

/* Plain C: a long prompt is attended in two parts, as two workers would, and merged, and then from
 * a KV cache; the results are compared with float64. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "attn8/attn8.h"

enum { kQueries = 64, kKeys = 1024, kHeads = 4, kKvHeads = 2, kDim = 64 };
enum { kQ = kQueries * kHeads * kDim, kK = kKeys * kKvHeads * kDim, kRows = kQueries * kHeads };

static float q[kQ], k[kK], v[kK];
static float part_out[2][kQ], part_lse[2][kRows], out[kQ];
static double exact[kQ], result[kQ];

static void check(attn8_status status) {
  if (status == ATTN8_OK) return;
  fprintf(stderr, "%s: %s\n", attn8_status_name(status), attn8_last_error());
  exit(1);
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

/* A tensor of dense float32 memory [1, seq, heads, dim]. */
static attn8_tensor tensor(float* data, int64_t seq, int64_t heads, int64_t dim) {
  attn8_tensor result;
  check(attn8_tensor_bshd(&result, sizeof result, data, ATTN8_FLOAT32,
                          (const int64_t[4]){1, seq, heads, dim}));
  return result;
}

static double error_of(const float* x) {
  for (int i = 0; i < kQ; ++i) result[i] = (double)x[i];
  attn8_error_report report = {.struct_size = sizeof report};
  check(attn8_compare(result, exact, kQ, &report));
  return report.rel_l2;
}

int main(void) {
  fill(q, kQ);
  fill(k, kK);
  fill(v, kK);

  attn8_context_params context_params;
  check(attn8_context_params_init(&context_params, sizeof context_params));
  context_params.threads = 2;
  attn8_context* context = NULL;
  check(attn8_context_create(&context_params, &context));

  attn8_attention_params params;
  check(attn8_attention_params_init(&params, sizeof params));
  params.mode = ATTN8_ACCURATE;

  const attn8_tensor q_tensor = tensor(q, kQueries, kHeads, kDim);
  attn8_tensor outs[2], lses[2];
  for (int part = 0; part < 2; ++part) {
    const int begin = part * kK / 2;
    const attn8_tensor k_part = tensor(k + begin, kKeys / 2, kKvHeads, kDim);
    const attn8_tensor v_part = tensor(v + begin, kKeys / 2, kKvHeads, kDim);
    outs[part] = tensor(part_out[part], kQueries, kHeads, kDim);
    lses[part] = tensor(part_lse[part], kQueries, kHeads, 1);
    check(attn8_attention(&q_tensor, &k_part, &v_part, &outs[part], &lses[part], &params, context));
  }
  const attn8_tensor out_tensor = tensor(out, kQueries, kHeads, kDim);
  check(attn8_merge_states((const attn8_tensor*[]){&outs[0], &outs[1]},
                           (const attn8_tensor*[]){&lses[0], &lses[1]}, 2, &out_tensor, NULL,
                           context));

  const attn8_tensor k_tensor = tensor(k, kKeys, kKvHeads, kDim);
  const attn8_tensor v_tensor = tensor(v, kKeys, kKvHeads, kDim);
  check(attn8_reference_attention(&q_tensor, &k_tensor, &v_tensor, &params, exact, kQ, NULL, 0));
  const double merged = error_of(out);

  /* The keys into INT8 pages, as an engine keeps them; the queries are the last tokens. */
  attn8_kv_cache_params cache_params;
  check(attn8_kv_cache_params_init(&cache_params, sizeof cache_params));
  cache_params.nheads_k = kKvHeads;
  cache_params.head_dim = kDim;
  cache_params.max_pages = 8;
  attn8_kv_cache* cache = NULL;
  check(attn8_kv_cache_create(&cache_params, &cache));
  attn8_kv_sequence sequence;
  check(attn8_kv_sequence_create(cache, &sequence));
  check(attn8_kv_sequence_append(cache, sequence, &k_tensor, &v_tensor, context));
  const int32_t cu_seqlens_q[2] = {0, kQueries};
  check(attn8_kv_cache_attend(cache, &sequence, 1, &q_tensor, cu_seqlens_q, &out_tensor, NULL, NULL,
                              context));
  attn8_kv_cache_usage usage = {.struct_size = sizeof usage};
  check(attn8_kv_cache_get_usage(cache, &usage));
  attn8_kv_cache_destroy(cache);
  attn8_context_destroy(context);
  const double from_pages = error_of(out);

  /* 2 %: README.md states 1.35 % for normal data and many keys. */
  printf(
      "attn8 %s: relative L2 error of two merged parts: %.2f %%, from %lld pages of %llu bytes: "
      "%.2f %%\n",
      attn8_version(), 100 * merged, (long long)usage.pages_used,
      (unsigned long long)usage.bytes_per_page, 100 * from_pages);
  return merged < 0.02 && from_pages < 0.02 ? 0 : 1;
}
