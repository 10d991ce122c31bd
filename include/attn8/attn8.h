/* SPDX-FileCopyrightText: The attn8 authors */
/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ATTN8_H_
#define ATTN8_H_

/* The C interface of attn8 (C11): all that C, or a language that calls C, needs. docs/c-abi.md is
 * its guide; what the functions compute stands with their C++ namesakes.
 *
 * Results: a function that returns attn8_status returns ATTN8_OK or says in attn8_last_error() what
 * was wrong. Arguments are checked before anything is written. No function throws, aborts, prints
 * or reads the environment.
 *
 * Structs: each begins with struct_size, its size as the caller was compiled with, a multiple of 8.
 * A release appends fields and changes nothing else. Fields beyond a smaller struct_size have their
 * defaults; bytes beyond the size this library knows must be 0. The _init functions fill in
 * struct_size and defaults, and never write past the struct_size they are given.
 *
 * Threads: every function may be called from any thread, and any number of threads may use a
 * handle; only destroying it excludes all other use. A KV cache is the one handle that changes, and
 * orders the calls itself.
 *
 * Lifetime: nothing is kept of what an argument points to once a call returns, except `pool`,
 * `parallel_for` and `stream` of a context. */
#include <stddef.h>
#include <stdint.h>

#ifndef ATTN8_API
#if defined(_WIN32)
#define ATTN8_API
#else
#define ATTN8_API __attribute__((visibility("default")))
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The enumerations stand in the structs as int32_t. */

typedef int32_t attn8_status;
enum attn8_status_code {
  ATTN8_OK = 0,
  ATTN8_INVALID_ARGUMENT = 1, /* an argument breaks a stated rule; retrying cannot help */
  ATTN8_UNSUPPORTED = 2,      /* a valid request that no kernel of this library implements */
  ATTN8_UNAVAILABLE = 3,      /* implemented, but this machine lacks the ISA or the device */
  ATTN8_OUT_OF_MEMORY = 4,
  ATTN8_DEVICE_ERROR = 5,
  ATTN8_INTERNAL = 6 /* a bug in this library */
};

enum attn8_dtype {
  ATTN8_FLOAT32 = 0,
  ATTN8_FLOAT16 = 1,
  ATTN8_BFLOAT16 = 2,
  ATTN8_INT8 = 3,
  ATTN8_INT32 = 4,
  ATTN8_BOOL = 5
};

enum attn8_device_type { ATTN8_CPU = 0, ATTN8_CUDA = 1 };

enum attn8_isa {
  ATTN8_ISA_BEST = -1, /* the best that this machine runs */
  ATTN8_ISA_SCALAR = 0,
  ATTN8_ISA_AVX2 = 1,
  ATTN8_ISA_AVX_VNNI = 2,
  ATTN8_ISA_AVX512_VNNI = 3
};

enum attn8_mode {
  ATTN8_ACCURATE = 0, /* INT8 Q, K, V, P: what users run */
  ATTN8_PAPER = 1,    /* Algorithm 1 of arXiv:2409.16997 */
  ATTN8_HALF = 2,     /* INT8 scores; P and V in bfloat16 */
  ATTN8_EXACT = 3,    /* float32 */
  ATTN8_FP8 = 4       /* in software, for error studies */
};

/* Which elements share a scale; shapes of scale in attn8_scale_shape(). */
enum attn8_granularity {
  ATTN8_PER_TOKEN = 0,
  ATTN8_PER_TENSOR = 1,
  ATTN8_PER_CHANNEL = 2,
  ATTN8_PER_BLOCK = 3,
  ATTN8_PER_BLOCK_CHANNEL = 4
};

/* What attn8_quantize() does with the mean over the tokens of each (batch, head). */
enum attn8_mean { ATTN8_MEAN_NONE = 0, ATTN8_MEAN_COMPUTE = 1, ATTN8_MEAN_GIVEN = 2 };

/* The diagonal that causal masks and windows are measured from when seqlen_q != seqlen_k:
 * flash-attn's or torch SDPA's. */
enum attn8_causal_align { ATTN8_BOTTOM_RIGHT = 0, ATTN8_TOP_LEFT = 1 };

enum attn8_fp8_format { ATTN8_FP8_E4M3_TENSOR = 0, ATTN8_FP8_E5M2_RAW = 1 };

/* "0.1.0" */
ATTN8_API const char* attn8_version(void);

/* One line that says what was wrong with this thread's last call that returned an attn8_status; ""
 * when that call succeeded. Never NULL. It belongs to the library, until the thread's next call. */
ATTN8_API const char* attn8_last_error(void);

/* "Ok", "InvalidArgument", ...; "?" for any other number. */
ATTN8_API const char* attn8_status_name(attn8_status status);

/* Instruction sets with kernels of their own: attn8_isa_count() of them, best first. Strings are
 * static; a pointer that is NULL is not written to.
 *   isa        of enum attn8_isa
 *   available  1 when this build has it and this machine runs it, else 0
 *   name       "avx512_vnni"
 *   reason     why it is not available; "" when it is */
ATTN8_API size_t attn8_isa_count(void);
ATTN8_API attn8_status attn8_isa_at(size_t index, int32_t* isa, int32_t* available,
                                    const char** name, const char** reason);

/* tensors */

struct attn8_quantization;

/* Non-owning tensor of rank 4. shape and strides are in the order [batch, seq, head, dim]; strides
 * count elements, the memory order is free. data may be NULL where an extent is 0; the data of
 * inputs is only read. */
typedef struct attn8_tensor {
  uint32_t struct_size;
  int32_t dtype;
  int32_t device_type;
  int32_t device_index;
  void* data;
  int64_t shape[4];
  int64_t strides[4];
  /* Set on an int8 input that stands for codes * scale (+ mean); NULL on every other tensor. */
  const struct attn8_quantization* quantization;
} attn8_tensor;

/* What belongs to the codes of a quantized tensor. */
typedef struct attn8_quantization {
  uint32_t struct_size;
  int32_t granularity;
  int32_t block;    /* tokens per block, > 0; read with ATTN8_PER_BLOCK and _PER_BLOCK_CHANNEL */
  int32_t reserved; /* 0 */
  const attn8_tensor* scale; /* float32, shape of attn8_scale_shape() */
  const attn8_tensor* mean;  /* K only, may be NULL: [batch, 1, head, dim] float32, what was
                                subtracted before quantizing */
} attn8_quantization;

/* Fill in a tensor of dense memory on the CPU in the order [batch, seq, head, dim] or
 * [batch, head, seq, dim]; `shape` is [batch, seq, head, dim] for both. struct_size:
 * sizeof(attn8_tensor). */
ATTN8_API attn8_status attn8_tensor_bshd(attn8_tensor* tensor, uint32_t struct_size,
                                         const void* data, int32_t dtype, const int64_t shape[4]);
ATTN8_API attn8_status attn8_tensor_bhsd(attn8_tensor* tensor, uint32_t struct_size,
                                         const void* data, int32_t dtype, const int64_t shape[4]);

/* PER_TOKEN, no scale yet. struct_size: sizeof(attn8_quantization). */
ATTN8_API attn8_status attn8_quantization_init(attn8_quantization* quantization,
                                               uint32_t struct_size);

/* context */

/* Runs body(argument, i) for every i in [0, count), in any order, on any threads, and returns when
 * all are done. Must not throw. */
typedef void (*attn8_parallel_for)(void* pool, int64_t count,
                                   void (*body)(void* argument, int64_t i), void* argument);

typedef struct attn8_context_params {
  uint32_t struct_size;
  int32_t threads; /* default 1; tasks that may run at the same time; never changes results */
  int32_t isa;     /* default ATTN8_ISA_BEST */
  int32_t device_type;
  int32_t device_index;
  int32_t reserved;                /* 0 */
  attn8_parallel_for parallel_for; /* default NULL: OpenMP */
  void* pool;                      /* first argument of parallel_for */
  void* stream; /* cudaStream_t of runs on ATTN8_CUDA; default NULL: the default stream */
} attn8_context_params;

/* Where and how calls run. A NULL context: the CPU, the best ISA, the calling thread only. What
 * runs on a CUDA device stands under "CUDA"; all else runs on the CPU. */
typedef struct attn8_context attn8_context;

ATTN8_API attn8_status attn8_context_params_init(attn8_context_params* params,
                                                 uint32_t struct_size);
/* params NULL: defaults. On failure *context is NULL. */
ATTN8_API attn8_status attn8_context_create(const attn8_context_params* params,
                                            attn8_context** context);
/* NULL does nothing. */
ATTN8_API void attn8_context_destroy(attn8_context* context);

/* quantization */

/* Shape of the scales of a tensor of this shape, blocks = ceil(seq / block):
 *   PER_TOKEN          [batch, seq, head, 1]
 *   PER_TENSOR         [batch, 1, head, 1]
 *   PER_CHANNEL        [batch, 1, head, dim]
 *   PER_BLOCK          [batch, blocks, head, 1]
 *   PER_BLOCK_CHANNEL  [batch, blocks, head, dim] */
ATTN8_API attn8_status attn8_scale_shape(const int64_t x_shape[4], int32_t granularity,
                                         int32_t block, int64_t shape[4]);

typedef struct attn8_quantize_params {
  uint32_t struct_size;
  int32_t granularity; /* default PER_TOKEN */
  int32_t block;       /* default 0 */
  int32_t mean_use;    /* default ATTN8_MEAN_NONE */
} attn8_quantize_params;

ATTN8_API attn8_status attn8_quantize_params_init(attn8_quantize_params* params,
                                                  uint32_t struct_size);
/* codes = round-half-even(x / scale) in [-127, 127], scale = max|group| / 127: attn8::quantize().
 *   x      [batch, seq, head, dim] float32, float16 or bfloat16
 *   codes  the same shape, int8; scale float32, shape of attn8_scale_shape()
 *   mean   [batch, 1, head, dim] float32; written with MEAN_COMPUTE, read with MEAN_GIVEN, else
 *          NULL
 *   params NULL: defaults */
ATTN8_API attn8_status attn8_quantize(const attn8_tensor* x, const attn8_tensor* codes,
                                      const attn8_tensor* scale, const attn8_tensor* mean,
                                      const attn8_quantize_params* params,
                                      const attn8_context* context);
/* out = codes * scale (+ mean) for an x with quantization set; out is a float tensor. */
ATTN8_API attn8_status attn8_dequantize(const attn8_tensor* x, const attn8_tensor* out,
                                        const attn8_context* context);

/* attention */

/* What changes scores or what counts beside q, k and v: the operands of attn8::AttentionInputs.
 * NULL: none. */
typedef struct attn8_score_operands {
  uint32_t struct_size;
  int32_t reserved; /* 0 */
  /* [batch or 1, seqlen_q or 1, nheads_q or 1, seqlen_k or 1] bool (0 hides) or a float type
   * (added, in nats) */
  const attn8_tensor* attn_mask;
  const attn8_tensor* alibi_slopes; /* [batch or 1, 1, nheads_q, 1] float32 */
  const attn8_tensor* sinks;        /* [1, 1, nheads_q, 1] float32, in nats */
  const attn8_tensor* seqlens_k;    /* [batch, 1, 1, 1] int32: keys of each sequence */
  const attn8_tensor* leftpad_k;    /* [batch, 1, 1, 1] int32: first keys that do not count */
  /* [sequences + 1, 1, 1, 1] int32, both or neither: packed sequences of any lengths, batch 1, as
   * of attn8::AttentionInputs, which also says what attn_mask and alibi_slopes then are */
  const attn8_tensor* cu_seqlens_q;
  const attn8_tensor* cu_seqlens_k;
} attn8_score_operands;

ATTN8_API attn8_status attn8_score_operands_init(attn8_score_operands* scores,
                                                 uint32_t struct_size);

typedef struct attn8_attention_params {
  uint32_t struct_size;
  int32_t mode;              /* default ATTN8_ACCURATE */
  int32_t has_softmax_scale; /* default 0: 1 / sqrt(head_dim) */
  float softmax_scale;       /* finite; read when has_softmax_scale */
  int32_t causal;            /* default 0 */
  int32_t causal_align;      /* default ATTN8_BOTTOM_RIGHT */
  int64_t window_left;       /* default -1: unlimited */
  int64_t window_right;      /* default -1: unlimited */
  int32_t kv_block;          /* default 0: the library's; else a multiple of 64 in [64, 512] */
  int32_t v_granularity;     /* default PER_TOKEN; of a float V in ACCURATE */
  int32_t smooth_k;          /* default 1: subtract the mean of a float K */
  int32_t check_finite;      /* default 0; else a NaN or an Inf of a float input is an error */
  int32_t fp8_format;        /* default ATTN8_FP8_E4M3_TENSOR */
  float softcap;             /* default 0: none; else scores s become softcap tanh(s / softcap) */
  int64_t q_offset;          /* default 0: attn8::Mask */
  int64_t k_offset;          /* default 0 */
  const attn8_score_operands* scores; /* default NULL: none */
  int64_t head_modes_count;           /* default 0: all heads run in `mode`; else nheads_k */
  /* [head_modes_count] of enum attn8_mode: of each kv head and of the query heads that read it, in
   * place of `mode`; a plan copies them */
  const int32_t* head_modes;
} attn8_attention_params;

ATTN8_API attn8_status attn8_attention_params_init(attn8_attention_params* params,
                                                   uint32_t struct_size);

/* Quantizes what is float, and computes softmax(softmax_scale Q K^T) V: attn8::attention().
 *   q    [batch, seqlen_q, nheads_q, head_dim]; k, v [batch, seqlen_k, nheads_k, head_dim];
 *        float32, float16, bfloat16, or int8 with quantization set
 *   out  as q, float32, float16 or bfloat16; may not overlap an input
 *   lse  [batch, seqlen_q, nheads_q, 1] float32; NULL: not wanted
 *   params, context NULL: defaults */
ATTN8_API attn8_status attn8_attention(const attn8_tensor* q, const attn8_tensor* k,
                                       const attn8_tensor* v, const attn8_tensor* out,
                                       const attn8_tensor* lse,
                                       const attn8_attention_params* params,
                                       const attn8_context* context);

/* A problem checked once, to be run many times without allocating. Made from tensors whose data
 * need only be non-NULL; runs may bring other data and strides, not other shapes and dtypes. */
typedef struct attn8_plan attn8_plan;

/* On failure *plan is NULL. A plan outlives its context. */
ATTN8_API attn8_status attn8_plan_create(const attn8_tensor* q, const attn8_tensor* k,
                                         const attn8_tensor* v, const attn8_tensor* out,
                                         const attn8_tensor* lse,
                                         const attn8_attention_params* params,
                                         const attn8_context* context, attn8_plan** plan);
/* NULL does nothing. */
ATTN8_API void attn8_plan_destroy(attn8_plan* plan);

/* Properties of a plan; for NULL 0, "" and -1. */
ATTN8_API size_t attn8_plan_workspace_bytes(const attn8_plan* plan);
ATTN8_API const char* attn8_plan_kernel(const attn8_plan* plan); /* lives as long as the plan */
ATTN8_API int32_t attn8_plan_isa(const attn8_plan* plan);
ATTN8_API int32_t attn8_plan_kv_block(const attn8_plan* plan);
ATTN8_API int32_t attn8_plan_v_granularity(const attn8_plan* plan);

/* Wall-clock times of one run. */
typedef struct attn8_run_times {
  uint32_t struct_size; /* set before the call */
  int32_t reserved;     /* 0 */
  double quantize_ms;   /* quantizing, smoothing and packing K and V */
  double attention_ms;  /* everything after */
} attn8_run_times;

/* workspace: attn8_plan_workspace_bytes() bytes, 64-byte aligned, not shared with a concurrent run;
 * on ATTN8_CUDA device memory, 256-byte aligned, and the work is only enqueued. times NULL: not
 * wanted. */
ATTN8_API attn8_status attn8_plan_run(const attn8_plan* plan, const attn8_tensor* q,
                                      const attn8_tensor* k, const attn8_tensor* v,
                                      const attn8_tensor* out, const attn8_tensor* lse,
                                      void* workspace, size_t workspace_bytes,
                                      attn8_run_times* times);

/* The same with score operands; lengths of sequences as the plan was made with or without them. */
ATTN8_API attn8_status attn8_plan_run_with_scores(const attn8_plan* plan, const attn8_tensor* q,
                                                  const attn8_tensor* k, const attn8_tensor* v,
                                                  const attn8_score_operands* scores,
                                                  const attn8_tensor* out, const attn8_tensor* lse,
                                                  void* workspace, size_t workspace_bytes,
                                                  attn8_run_times* times);

/* Merges attention over disjoint sets of keys into that over all: attn8::merge_states().
 *   outs, lses  `count` tensors each: what attn8_attention() wrote for the parts
 *   out, lse    as of attn8_attention(); may be tensors of a part; lse NULL: not wanted */
ATTN8_API attn8_status attn8_merge_states(const attn8_tensor* const* outs,
                                          const attn8_tensor* const* lses, size_t count,
                                          const attn8_tensor* out, const attn8_tensor* lse,
                                          const attn8_context* context);

/* KV cache */

/* Paged KV cache in INT8 on the CPU, with attention from it: attn8::KvCache, docs/kv-cache.md. A
 * call that fails changes nothing. Out of pages is ATTN8_OUT_OF_MEMORY. */
typedef struct attn8_kv_cache attn8_kv_cache;

typedef struct attn8_kv_cache_params {
  uint32_t struct_size;
  int32_t page_size;  /* default 256: tokens per page, a multiple of 64 in [64, 512] */
  int64_t nheads_k;   /* >= 1; default 0, so to be set */
  int64_t head_dim;   /* 1 to 256; to be set */
  int64_t max_pages;  /* >= 1; to be set. Reserved at once, touched when first used */
  int32_t smooth_k;   /* default 1: subtract the mean K of a sequence's first append */
  int32_t reserved;   /* 0 */
  int64_t head_dim_v; /* default 0: head_dim; else 1 to 256 */
} attn8_kv_cache_params;

/* Names a sequence of one cache; never reused. {0, 0} names none. */
typedef struct attn8_kv_sequence {
  uint64_t cache;
  uint64_t id;
} attn8_kv_sequence;

typedef struct attn8_kv_cache_usage {
  uint32_t struct_size; /* set before the call */
  int32_t reserved;     /* 0 */
  int64_t sequences;
  int64_t pages_used; /* a page that several sequences share counts once */
  int64_t pages_free;
  uint64_t bytes_used;     /* pages_used * bytes_per_page */
  uint64_t bytes_per_page; /* codes, scales and what attention wants to know of a page */
} attn8_kv_cache_usage;

typedef struct attn8_kv_attention_params {
  uint32_t struct_size;
  int32_t has_softmax_scale; /* default 0: 1 / sqrt(head_dim) */
  float softmax_scale;       /* finite; read when has_softmax_scale */
  int32_t causal;            /* default 0 */
  int32_t causal_align;      /* default ATTN8_BOTTOM_RIGHT */
  float softcap;             /* default 0: none */
  int64_t window_left;       /* default -1: unlimited */
  int64_t window_right;      /* default -1: unlimited */
  /* default NULL; no lengths, which the cache knows; batch 1. attn_mask is [1, total or 1,
   * nheads_q or 1, keys or 1]; keys count from the start of a row's sequence, at least as many as
   * the longest sequence has */
  const attn8_score_operands* scores;
  int32_t mode;              /* default ATTN8_ACCURATE; else ATTN8_HALF or ATTN8_EXACT */
  int32_t reserved;          /* 0 */
  int64_t head_modes_count;  /* as in attn8_attention_params */
  const int32_t* head_modes; /* [head_modes_count] */
} attn8_kv_attention_params;

ATTN8_API attn8_status attn8_kv_cache_params_init(attn8_kv_cache_params* params,
                                                  uint32_t struct_size);
ATTN8_API attn8_status attn8_kv_attention_params_init(attn8_kv_attention_params* params,
                                                      uint32_t struct_size);

/* On failure *cache is NULL. */
ATTN8_API attn8_status attn8_kv_cache_create(const attn8_kv_cache_params* params,
                                             attn8_kv_cache** cache);
/* With all its sequences. NULL does nothing. */
ATTN8_API void attn8_kv_cache_destroy(attn8_kv_cache* cache);

/* A new sequence without tokens. On failure *sequence is {0, 0}, here and in fork. */
ATTN8_API attn8_status attn8_kv_sequence_create(attn8_kv_cache* cache, attn8_kv_sequence* sequence);
/* A new sequence with the first `length` tokens of `parent`, whose pages it shares until one of
 * both writes. */
ATTN8_API attn8_status attn8_kv_sequence_fork(attn8_kv_cache* cache, attn8_kv_sequence parent,
                                              int64_t length, attn8_kv_sequence* sequence);
/* k: [1, tokens, nheads_k, head_dim], v: [1, tokens, nheads_k, head_dim_v]; float32, float16 or
 * bfloat16 */
ATTN8_API attn8_status attn8_kv_sequence_append(attn8_kv_cache* cache, attn8_kv_sequence sequence,
                                                const attn8_tensor* k, const attn8_tensor* v,
                                                const attn8_context* context);
/* The same for `count` sequences, each once at most, divided over the threads: tokens
 * [cu_seqlens[i], cu_seqlens[i + 1]) of k and v, [1, total, ...], go to sequences[i]. All are
 * appended to, or none.
 *   cu_seqlens  count + 1 numbers from 0 to total, not decreasing */
ATTN8_API attn8_status attn8_kv_cache_append(attn8_kv_cache* cache,
                                             const attn8_kv_sequence* sequences, size_t count,
                                             const attn8_tensor* k, const attn8_tensor* v,
                                             const int32_t* cu_seqlens,
                                             const attn8_context* context);
/* Drops the tokens from `length` on. */
ATTN8_API attn8_status attn8_kv_sequence_truncate(attn8_kv_cache* cache, attn8_kv_sequence sequence,
                                                  int64_t length);
/* Ends the sequence and gives back the pages that are its alone. */
ATTN8_API attn8_status attn8_kv_sequence_free(attn8_kv_cache* cache, attn8_kv_sequence sequence);
/* Its number of tokens. */
ATTN8_API attn8_status attn8_kv_sequence_length(const attn8_kv_cache* cache,
                                                attn8_kv_sequence sequence, int64_t* length);
ATTN8_API attn8_status attn8_kv_cache_get_usage(const attn8_kv_cache* cache,
                                                attn8_kv_cache_usage* usage);

/* Attention of a batch of `count` sequences, each with any number of queries.
 *   q             [1, total, nheads_q, head_dim] float32, float16, bfloat16, or int8 with
 *                 quantization set (PER_TOKEN; not in ATTN8_EXACT); rows [cu_seqlens_q[i],
 *                 cu_seqlens_q[i + 1]) are the
 *                 queries of sequences[i]
 *   cu_seqlens_q  count + 1 numbers from 0 to total, not decreasing
 *   out, lse      [1, total, nheads_q, head_dim_v] and [1, total, nheads_q, 1], as of
 *                 attn8_attention()
 *   params, context NULL: defaults */
ATTN8_API attn8_status attn8_kv_cache_attend(const attn8_kv_cache* cache,
                                             const attn8_kv_sequence* sequences, size_t count,
                                             const attn8_tensor* q, const int32_t* cu_seqlens_q,
                                             const attn8_tensor* out, const attn8_tensor* lse,
                                             const attn8_kv_attention_params* params,
                                             const attn8_context* context);

/* CUDA */

/* Attention on a device: a context with device_type ATTN8_CUDA and the caller's stream, tensors
 * whose device_type and device_index say where their data lie, and attn8_plan_create() and
 * attn8_plan_run() as on the CPU. Plans, attn8_merge_states() and the cache below run there; they
 * only enqueue, neither synchronize nor allocate, and can be captured into a CUDA graph. Nothing of
 * CUDA is touched before the first call that needs it. */

typedef struct attn8_cuda_device {
  uint32_t struct_size; /* set before the call, to all of the struct */
  int32_t reserved;     /* 0 */
  int32_t major;        /* compute capability */
  int32_t minor;
  int64_t multiprocessors;
  char name[64];    /* the driver's, cut where it is longer */
  char kernels[16]; /* "sm90a" or "sm80": the kernels it runs */
} attn8_cuda_device;

/* Devices that CUDA shows this process; 0 where there is none or the library was built without
 * CUDA. Not a status: attn8_cuda_device_at(0) says what is missing. */
ATTN8_API int32_t attn8_cuda_device_count(void);
/* Whether attention runs on a device. ATTN8_UNAVAILABLE when it does not, and attn8_last_error()
 * says why: no CUDA in this build, no driver, no such device, a chip that is too old. device NULL:
 * not wanted. */
ATTN8_API attn8_status attn8_cuda_device_at(int32_t index, attn8_cuda_device* device);
/* Waits for everything that was enqueued on the device. */
ATTN8_API attn8_status attn8_cuda_synchronize(int32_t device);

/* Memory of one device, for callers without a CUDA runtime of their own. */
typedef struct attn8_cuda_memory attn8_cuda_memory;

/* On failure *memory is NULL. Aligned to 256 bytes. */
ATTN8_API attn8_status attn8_cuda_memory_create(int32_t device, size_t bytes,
                                                attn8_cuda_memory** memory);
/* NULL does nothing. */
ATTN8_API void attn8_cuda_memory_destroy(attn8_cuda_memory* memory);
/* Its address on the device; NULL for NULL. */
ATTN8_API void* attn8_cuda_memory_data(const attn8_cuda_memory* memory);
/* Copy all of its bytes from or to host memory, after everything enqueued on the default stream,
 * and return when that is done. */
ATTN8_API attn8_status attn8_cuda_memory_upload(attn8_cuda_memory* memory, const void* host);
ATTN8_API attn8_status attn8_cuda_memory_download(const attn8_cuda_memory* memory, void* host);

/* Paged KV cache in INT8 in device memory, for ATTN8_ACCURATE: attn8::CudaKvCache. It owns the
 * pages and knows nothing of sequences: block tables and lengths are the caller's, so that sharing
 * a prefix, forking and truncating are changes of a table. */
typedef struct attn8_cuda_kv_cache attn8_cuda_kv_cache;

typedef struct attn8_cuda_kv_cache_params {
  uint32_t struct_size;
  int32_t page_size; /* default 256: tokens per page, a power of two in [256, 65536] */
  int64_t nheads_k;  /* >= 1; default 0, so to be set */
  int64_t head_dim;  /* 1 to 256; to be set */
  int64_t num_pages; /* >= 1; to be set */
  int32_t smooth_k;  /* default 1: subtract the mean K of a sequence's first append */
  int32_t reserved;  /* 0 */
  /* default NULL: the library allocates; else where the pages go:
   * attn8_cuda_kv_cache_memory_bytes() of device memory, 256-byte aligned, that outlives the cache
   */
  void* memory;
  uint64_t memory_bytes; /* of memory */
} attn8_cuda_kv_cache_params;

/* The sequences of a call: int32 tensors, any strides, all on the cache's device or all on the CPU.
 * Those on the CPU are checked, and one that points outside is ATTN8_INVALID_ARGUMENT; those on the
 * device are checked there: a sequence that points outside gets NaN, and nothing is appended to it.
 */
typedef struct attn8_cuda_kv_tables {
  uint32_t struct_size;
  int32_t reserved; /* 0 */
  /* [batch, max_pages, 1, 1] page of each page_size tokens, in [0, num_pages); entries past a
   * sequence's last page are not read */
  const attn8_tensor* block_table;
  /* [batch, 1, 1, 1] tokens that a sequence has: before an append, and for attention */
  const attn8_tensor* cache_seqlens;
  /* default NULL: the tokens of a call are [batch, seqlen, heads, head_dim]; else [batch + 1, 1, 1,
   * 1]: they are [1, total, heads, head_dim], those of sequence b in rows [cu_seqlens[b],
   * cu_seqlens[b + 1]) */
  const attn8_tensor* cu_seqlens;
  int64_t max_seqlen; /* with cu_seqlens: the most tokens of one sequence; default 0: total */
} attn8_cuda_kv_tables;

ATTN8_API attn8_status attn8_cuda_kv_cache_params_init(attn8_cuda_kv_cache_params* params,
                                                       uint32_t struct_size);
ATTN8_API attn8_status attn8_cuda_kv_tables_init(attn8_cuda_kv_tables* tables,
                                                 uint32_t struct_size);

/* Device memory of the pages of such a cache; `memory` and `memory_bytes` are not read. */
ATTN8_API attn8_status attn8_cuda_kv_cache_memory_bytes(const attn8_cuda_kv_cache_params* params,
                                                        const attn8_context* context,
                                                        size_t* bytes);
/* On the device of the context. On failure *cache is NULL. */
ATTN8_API attn8_status attn8_cuda_kv_cache_create(const attn8_cuda_kv_cache_params* params,
                                                  const attn8_context* context,
                                                  attn8_cuda_kv_cache** cache);
/* With pages of the library's it waits for the device. NULL does nothing. */
ATTN8_API void attn8_cuda_kv_cache_destroy(attn8_cuda_kv_cache* cache);
/* Device memory of one page; 0 for NULL. */
ATTN8_API size_t attn8_cuda_kv_cache_bytes_per_page(const attn8_cuda_kv_cache* cache);

/* Bytes of device memory that an append or attention of tokens of this shape ([batch, seqlen,
 * heads, head_dim], or [1, total, heads, head_dim] with cu_seqlens) wants as workspace, 256-byte
 * aligned. */
ATTN8_API attn8_status attn8_cuda_kv_cache_workspace_bytes(const attn8_cuda_kv_cache* cache,
                                                           const int64_t shape[4],
                                                           const attn8_cuda_kv_tables* tables,
                                                           size_t* bytes);
/* Appends tokens behind cache_seqlens, which the caller raises afterwards.
 *   k, v  float32, float16 or bfloat16, one type, nheads_k heads */
ATTN8_API attn8_status attn8_cuda_kv_cache_append(const attn8_cuda_kv_cache* cache,
                                                  const attn8_tensor* k, const attn8_tensor* v,
                                                  const attn8_cuda_kv_tables* tables,
                                                  void* workspace, size_t workspace_bytes,
                                                  const attn8_context* context);
/* Attention of q over the first cache_seqlens tokens of each sequence.
 *   q         float32, float16 or bfloat16; nheads_k divides its heads
 *   out, lse  as of attn8_attention(); may not overlap q
 *   params    NULL: defaults. mode ATTN8_ACCURATE, no head_modes; attn_mask float32, its first two
 *             extents those of q or 1 */
ATTN8_API attn8_status attn8_cuda_kv_cache_attend(
    const attn8_cuda_kv_cache* cache, const attn8_tensor* q, const attn8_cuda_kv_tables* tables,
    const attn8_tensor* out, const attn8_tensor* lse, const attn8_kv_attention_params* params,
    void* workspace, size_t workspace_bytes, const attn8_context* context);

/* checking */

/* softmax(softmax_scale Q K^T) V in float64 with plain loops; slow. Of params, only softmax_scale
 * and the mask count.
 *   q, k, v  float tensors
 *   out      [batch, seqlen_q, nheads_q, head_dim] dense, out_count doubles
 *   lse      [batch, seqlen_q, nheads_q] dense, lse_count doubles; or NULL and 0 */
ATTN8_API attn8_status attn8_reference_attention(const attn8_tensor* q, const attn8_tensor* k,
                                                 const attn8_tensor* v,
                                                 const attn8_attention_params* params, double* out,
                                                 size_t out_count, double* lse, size_t lse_count);

/* Error of `count` doubles against as many of a reference. */
typedef struct attn8_error_report {
  uint32_t struct_size; /* set before the call */
  int32_t reserved;     /* 0 */
  double rel_l2;        /* ||o - r|| / ||r|| */
  double mean_rel;      /* mean|o - r| / mean|r| */
  double max_abs;       /* max|o - r| */
  double cosine;        /* o.r / (||o|| ||r||) */
  double mre;           /* mean(|o - r| / (|r| + 1e-5)) */
} attn8_error_report;

ATTN8_API attn8_status attn8_compare(const double* out, const double* reference, size_t count,
                                     attn8_error_report* report);

#ifdef __cplusplus
}
#endif

#endif /* ATTN8_H_ */
