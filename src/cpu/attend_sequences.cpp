// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cpu/attend_sequences.hpp"

#include <algorithm>

namespace attn8::cpu {
namespace {

/// Few queries against at least twice this many keys are split over the keys: enough parts for the
/// threads of a machine, each long enough that starting it costs little.
constexpr int64_t kKeysPerSplit = 8192;

}  // namespace

KeySplit split_keys(Mode mode, int64_t rows, KeyRange keys, int64_t kv_block) noexcept {
  // `paper` and `half` round P relative to a running maximum that parts would not share.
  const bool can = mode == Mode::kAccurate || mode == Mode::kExact;
  if (!can || keys.hi - keys.lo < 2 * kKeysPerSplit || rows > kQueryTile) return {};
  const int64_t blocks = (keys.hi + kv_block - 1) / kv_block - keys.lo / kv_block;
  KeySplit split;
  split.blocks_per_part = kKeysPerSplit / kv_block;
  split.parts = (blocks + split.blocks_per_part - 1) / split.blocks_per_part;
  return split;
}

int64_t most_partials(Mode mode, int64_t group, int64_t seqlen_k, int64_t kv_block) noexcept {
  // One query and all keys are split if anything is. A sequence of 2 kKeysPerSplit keys or more has
  // at most keys / kKeysPerSplit + 2 parts, the first and the last of them shorter.
  if (split_keys(mode, group, {0, seqlen_k}, kv_block).parts == 1) return 0;
  return seqlen_k / kKeysPerSplit + 2 * (seqlen_k / (2 * kKeysPerSplit));
}

void longest_first(std::span<AttendSequence> sequences, int64_t group) noexcept {
  const auto cost = [group](const AttendSequence& sequence) {
    return sequence.seqlen_k / sequence.split.parts *
           std::min<int64_t>(sequence.seqlen_q * group, kQueryTile);
  };
  std::ranges::sort(sequences, [&](const AttendSequence& a, const AttendSequence& b) {
    const int64_t cost_a = cost(a);
    const int64_t cost_b = cost(b);
    return cost_a != cost_b ? cost_a > cost_b : a.index < b.index;
  });
}

TaskCount begin_tasks(std::span<AttendSequence> sequences, int64_t nheads_q,
                      int64_t nheads_k) noexcept {
  TaskCount count;
  for (AttendSequence& sequence : sequences) {
    sequence.first_task = count.tasks;
    sequence.first_partial = count.partials;
    const int64_t rows = sequence.seqlen_q * (nheads_q / nheads_k);
    const int64_t tiles = (rows + kQueryTile - 1) / kQueryTile;
    count.tasks += nheads_k * tiles * sequence.split.parts;
    if (sequence.split.parts > 1) count.partials += nheads_k * sequence.split.parts;
  }
  return count;
}

}  // namespace attn8::cpu
