// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The KV cache of attn8.h over attn8::KvCache, by the rules of core/c_api.cpp.
#include <algorithm>
#include <iterator>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "attn8/kv_cache.hpp"
#include "core/c_api.hpp"
#include "core/c_structs.hpp"
#include "core/message.hpp"

struct attn8_kv_cache {
  attn8::KvCache value;
};

namespace attn8 {
namespace {

using namespace c_api;      // NOLINT: written for this
using namespace c_structs;  // NOLINT

attn8_kv_cache_params default_cache_params() noexcept {
  attn8_kv_cache_params params = {};
  params.page_size = kDefaultKvBlock;
  params.smooth_k = 1;
  return params;
}

attn8_kv_attention_params default_attention_params() noexcept {
  attn8_kv_attention_params params = {};
  params.window_left = -1;
  params.window_right = -1;
  return params;
}

KvSequence sequence_of(attn8_kv_sequence sequence) noexcept {
  return {sequence.cache, sequence.id};
}

Status read_sequences(const attn8_kv_sequence* in, size_t count, std::vector<KvSequence>& out) {
  if (in == nullptr && count > 0) return invalid("sequences got NULL");
  out.reserve(count);
  std::transform(in, in + count, std::back_inserter(out), sequence_of);
  return {};
}

/// `make` gives the KvSequence; checks what both ways to a new one share.
template <class Make>
Status new_sequence(attn8_kv_cache* cache, attn8_kv_sequence* sequence, Make make) {
  if (sequence == nullptr) return invalid("sequence got NULL");
  *sequence = {0, 0};
  if (cache == nullptr) return invalid("cache got NULL");
  const Result<KvSequence> made = make(cache->value);
  if (!made.ok()) return made.status();
  *sequence = {made.value().cache, made.value().id};
  return {};
}

}  // namespace

Status c_api::read_kv_attend_params(const attn8_kv_attention_params* in, int64_t nheads_k,
                                    KvAttendParams& out) {
  if (in == nullptr) return {};
  attn8_kv_attention_params params = default_attention_params();
  ATTN8_RETURN_IF_ERROR(read("params", in, kUnit, params));
  ATTN8_RETURN_IF_ERROR(check_reserved("params", params.reserved));
  KvCacheAttentionOptions& options = out.options;
  options.mode = enumerator<Mode>(params.mode);
  ATTN8_RETURN_IF_ERROR(
      read_head_modes(params.head_modes, params.head_modes_count, nheads_k, out.head_modes));
  options.head_modes = out.head_modes;
  if (params.has_softmax_scale != 0) options.softmax_scale = params.softmax_scale;
  options.mask.causal = params.causal != 0;
  options.mask.align = enumerator<CausalAlign>(params.causal_align);
  options.mask.window_left = params.window_left;
  options.mask.window_right = params.window_right;
  options.softcap = params.softcap;
  AttentionInputs scores;
  ATTN8_RETURN_IF_ERROR(read_scores(params.scores, scores));
  if (scores.seqlens_k || scores.leftpad_k || scores.cu_seqlens_q || scores.cu_seqlens_k) {
    return invalid("params.scores sets lengths of sequences, ",
                   "wants attn_mask, alibi_slopes and sinks only");
  }
  options.attn_mask = scores.attn_mask;
  options.alibi_slopes = scores.alibi_slopes;
  options.sinks = scores.sinks;
  return {};
}

}  // namespace attn8

using namespace attn8;  // NOLINT: what follows is attn8.h's side of it

extern "C" {

attn8_status attn8_kv_cache_params_init(attn8_kv_cache_params* params, uint32_t struct_size) {
  return call(
      [&] { return initialize("params", default_cache_params(), params, struct_size, kUnit); });
}

attn8_status attn8_kv_attention_params_init(attn8_kv_attention_params* params,
                                            uint32_t struct_size) {
  return call(
      [&] { return initialize("params", default_attention_params(), params, struct_size, kUnit); });
}

attn8_status attn8_kv_cache_create(const attn8_kv_cache_params* in, attn8_kv_cache** cache) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    *cache = nullptr;
    attn8_kv_cache_params params = default_cache_params();
    ATTN8_RETURN_IF_ERROR(read("params", in, kUnit, params));
    ATTN8_RETURN_IF_ERROR(check_reserved("params", params.reserved));
    Result<KvCache> made = KvCache::make({.nheads_k = params.nheads_k,
                                          .head_dim = params.head_dim,
                                          .head_dim_v = params.head_dim_v,
                                          .page_size = params.page_size,
                                          .max_pages = params.max_pages,
                                          .smooth_k = params.smooth_k != 0});
    if (!made.ok()) return made.status();
    *cache = new attn8_kv_cache{std::move(made).value()};
    return {};
  });
}

void attn8_kv_cache_destroy(attn8_kv_cache* cache) { delete cache; }

attn8_status attn8_kv_sequence_create(attn8_kv_cache* cache, attn8_kv_sequence* sequence) {
  return call(
      [&] { return new_sequence(cache, sequence, [](KvCache& value) { return value.create(); }); });
}

attn8_status attn8_kv_sequence_fork(attn8_kv_cache* cache, attn8_kv_sequence parent, int64_t length,
                                    attn8_kv_sequence* sequence) {
  return call([&] {
    return new_sequence(cache, sequence,
                        [&](KvCache& value) { return value.fork(sequence_of(parent), length); });
  });
}

attn8_status attn8_kv_sequence_append(attn8_kv_cache* cache, attn8_kv_sequence sequence,
                                      const attn8_tensor* k, const attn8_tensor* v,
                                      const attn8_context* context) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    TensorView k_view, v_view;
    ATTN8_RETURN_IF_ERROR(read_plain("k", k, k_view));
    ATTN8_RETURN_IF_ERROR(read_plain("v", v, v_view));
    return cache->value.append(sequence_of(sequence), k_view, v_view, context_of(context));
  });
}

attn8_status attn8_kv_cache_append(attn8_kv_cache* cache, const attn8_kv_sequence* sequences,
                                   size_t count, const attn8_tensor* k, const attn8_tensor* v,
                                   const int32_t* cu_seqlens, const attn8_context* context) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    std::vector<KvSequence> handles;
    ATTN8_RETURN_IF_ERROR(read_sequences(sequences, count, handles));
    if (cu_seqlens == nullptr) return invalid("cu_seqlens got NULL");
    TensorView k_view, v_view;
    ATTN8_RETURN_IF_ERROR(read_plain("k", k, k_view));
    ATTN8_RETURN_IF_ERROR(read_plain("v", v, v_view));
    return cache->value.append(handles, k_view, v_view, {cu_seqlens, count + 1},
                               context_of(context));
  });
}

attn8_status attn8_kv_sequence_truncate(attn8_kv_cache* cache, attn8_kv_sequence sequence,
                                        int64_t length) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    return cache->value.truncate(sequence_of(sequence), length);
  });
}

attn8_status attn8_kv_sequence_free(attn8_kv_cache* cache, attn8_kv_sequence sequence) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    return cache->value.free(sequence_of(sequence));
  });
}

attn8_status attn8_kv_sequence_length(const attn8_kv_cache* cache, attn8_kv_sequence sequence,
                                      int64_t* length) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    if (length == nullptr) return invalid("length got NULL");
    const Result<int64_t> result = cache->value.length(sequence_of(sequence));
    if (!result.ok()) return result.status();
    *length = result.value();
    return {};
  });
}

attn8_status attn8_kv_cache_get_usage(const attn8_kv_cache* cache, attn8_kv_cache_usage* usage) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    if (usage == nullptr) return invalid("usage got NULL");
    ATTN8_RETURN_IF_ERROR(check_size("usage", usage->struct_size, kUnit));
    const KvCacheUsage from = cache->value.usage();
    attn8_kv_cache_usage result = {};
    result.sequences = from.sequences;
    result.pages_used = from.pages_used;
    result.pages_free = from.pages_free;
    result.bytes_used = from.bytes_used;
    result.bytes_per_page = from.bytes_per_page;
    write(result, usage);
    return {};
  });
}

attn8_status attn8_kv_cache_attend(const attn8_kv_cache* cache, const attn8_kv_sequence* sequences,
                                   size_t count, const attn8_tensor* q, const int32_t* cu_seqlens_q,
                                   const attn8_tensor* out, const attn8_tensor* lse,
                                   const attn8_kv_attention_params* params,
                                   const attn8_context* context) {
  return call([&]() -> Status {
    if (cache == nullptr) return invalid("cache got NULL");
    std::vector<KvSequence> handles;
    ATTN8_RETURN_IF_ERROR(read_sequences(sequences, count, handles));
    if (cu_seqlens_q == nullptr) return invalid("cu_seqlens_q got NULL");
    Operand q_operand;
    AttentionOutputs outputs;
    KvAttendParams attend;
    ATTN8_RETURN_IF_ERROR(read_operand("q", q, q_operand));
    ATTN8_RETURN_IF_ERROR(read_plain("out", out, outputs.out));
    ATTN8_RETURN_IF_ERROR(read_optional("lse", lse, outputs.lse));
    ATTN8_RETURN_IF_ERROR(read_kv_attend_params(params, cache->value.options().nheads_k, attend));
    return cache->value.attend(handles, q_operand, {cu_seqlens_q, count + 1}, outputs,
                               attend.options, context_of(context));
  });
}

}  // extern "C"
