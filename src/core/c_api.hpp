// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "attn8/attention.hpp"
#include "attn8/attn8.h"
#include "attn8/context.hpp"
#include "attn8/kv_cache.hpp"
#include "attn8/status.hpp"
#include "attn8/tensor.hpp"

struct attn8_context {
  attn8::Context value;
};

/// What the functions of attn8.h have in common.
namespace attn8::c_api {

/// Keeps the status as this thread's last error and returns its number.
attn8_status finish(const Status& status) noexcept;

/// Runs the body of a function of attn8.h; what it throws becomes a status.
template <class Body>
attn8_status call(Body body) noexcept {
  try {
    return finish(body());
  } catch (const std::bad_alloc&) {
    return finish({StatusCode::kOutOfMemory, {}});
  } catch (...) {
    return finish({StatusCode::kInternal, {}});
  }
}

/// A tensor without quantization; `name` stands in the message.
Status read_plain(const std::string& name, const attn8_tensor* in, TensorView& view);
/// The same, or nothing for NULL.
Status read_optional(const std::string& name, const attn8_tensor* in,
                     std::optional<TensorView>& view);
/// What changes scores; NULL: nothing.
Status read_scores(const attn8_score_operands* in, AttentionInputs& inputs);
/// The modes of the kv heads; `count` 0: none.
Status read_head_modes(const int32_t* in, int64_t count, int64_t nheads_k,
                       std::vector<Mode>& head_modes);
/// Options of attention from either KV cache.
struct KvAttendParams {
  KvCacheAttentionOptions options;
  std::vector<Mode> head_modes;  ///< what options.head_modes views
};
/// `in` NULL: defaults.
Status read_kv_attend_params(const attn8_kv_attention_params* in, int64_t nheads_k,
                             KvAttendParams& out);
/// With or without quantization.
Status read_operand(const std::string& name, const attn8_tensor* in, Operand& operand);

inline Context context_of(const attn8_context* context) noexcept {
  return context != nullptr ? context->value : Context{};
}

}  // namespace attn8::c_api
