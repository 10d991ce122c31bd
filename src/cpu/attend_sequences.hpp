// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

#include "attn8/attention.hpp"
#include "core/kernel_table.hpp"

/// The sequences of a call, and how their work is divided into tasks.
namespace attn8::cpu {

/// Packed K and V of one kv head of a sequence, and what finishing its rows needs.
struct PackedHead {
  PackedKv kv;
  bool poisoned = false;               ///< whether a key holds a NaN or an Inf
  const float* k_mean = nullptr;       ///< [head_dim] what was subtracted from K, if anything
  const float* v_out_scale = nullptr;  ///< [padded_dim] of the output; nullptr where V is float
};

/// Few queries against many keys are computed in parts of the keys that are added up at the end.
struct KeySplit {
  int64_t parts = 1;
  int64_t blocks_per_part = 0;
};

/// A function of the shape alone, so that threads and neighbours in a batch do not change results.
/// rows: query rows of one kv head.
KeySplit split_keys(Mode mode, int64_t rows, KeyRange keys, int64_t kv_block) noexcept;

/// The most parts that sequences of seqlen_k keys in all may have, `group` query heads per kv head:
/// parts of a kv head.
int64_t most_partials(Mode mode, int64_t group, int64_t seqlen_k, int64_t kv_block) noexcept;

/// One sequence of a call.
struct AttendSequence {
  int64_t index = 0;                      ///< among those of the call, as they were given
  int64_t batch = 0, first_position = 0;  ///< where its first query lies in q, out and lse
  int64_t seqlen_q = 0, seqlen_k = 0;
  int64_t leftpad_k = 0;              ///< keys before it count for nothing
  KeyRange keys;                      ///< what counts; where empty, heads is not read
  KeySplit split;                     ///< of split_keys()
  const PackedHead* heads = nullptr;  ///< [nheads_k]
  int64_t first_task = 0;             ///< set by begin_tasks()
  int64_t first_partial = 0;          ///< set by begin_tasks()
};

struct TaskCount {
  int64_t tasks = 0;
  int64_t partials = 0;
};

/// Puts sequences with long tasks first, so that the threads end together.
/// group: query heads per kv head.
void longest_first(std::span<AttendSequence> sequences, int64_t group) noexcept;

/// Numbers the tasks of the sequences, in their order.
TaskCount begin_tasks(std::span<AttendSequence> sequences, int64_t nheads_q,
                      int64_t nheads_k) noexcept;

}  // namespace attn8::cpu
