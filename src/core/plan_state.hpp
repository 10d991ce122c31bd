// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attn8/attention.hpp"
#include "core/device_plan.hpp"
#include "core/kernel_table.hpp"

namespace attn8 {

/// How one operand arrives.
struct OperandKind {
  bool quantized = false;
  DType dtype = DType::kFloat32;  ///< of the float tensor; kInt8 when quantized
};

/// Byte offsets into the workspace of one run; H = sequences * nheads_k heads. What lies by block
/// lies sequence by sequence, [nheads_k][kv blocks of the sequence].
struct WorkspaceLayout {
  BlockLayout block;                           ///< of one kv block
  size_t blocks = 0;                           ///< by block: data
  size_t block_headers = 0;                    ///< by block: headers
  size_t packed_blocks = 0;                    ///< PackedBlock by block, also those no query sees
  size_t heads = 0;                            ///< cpu::PackedHead [H]
  size_t sequences = 0;                        ///< cpu::AttendSequence [sequences]
  size_t sequence_keys = 0;                    ///< cpu::SequenceKeys [sequences]
  size_t k_mean = 0;                           ///< float [H][head_dim]
  size_t k_mean_sums = 0;                      ///< double, likewise by chunk: [head_dim]
  size_t v_max_bits = 0;                       ///< uint32 by block: [head_dim_v]
  size_t v_out_scale = 0;                      ///< float [H][padded_dim]
  size_t partials = 0, bytes_per_partial = 0;  ///< results of parts of the keys
  size_t workers = 0;                          ///< [threads] tile buffers
  size_t total = 0;
};

/// Consecutive kv heads of one mode, and the plan of their part of the problem.
struct HeadPart {
  int64_t first = 0;
  int64_t count = 0;
  AttentionPlan plan;
};

/// A validated problem.
struct AttentionPlan::State {
  AttentionOptions options;  ///< every default resolved
  Context context;
  std::shared_ptr<const DevicePlan> device_plan;  ///< set when the device is no CPU
  const KernelTable* table = nullptr;  ///< nullptr in kFp8, which is emulated, and on a device
  OperandKind q, k, v;
  int64_t batch = 0, seqlen_q = 0, seqlen_k = 0, nheads_q = 0, nheads_k = 0, head_dim = 0,
          head_dim_v = 0;
  float softmax_scale = 0;
  Granularity v_granularity = Granularity::kToken;
  bool with_lse = false;
  bool changes_lengths = false;  ///< whether seqlens_k or leftpad_k is given
  bool ragged = false;           ///< whether cu_seqlens_q and cu_seqlens_k are given
  int64_t sequences = 0;         ///< of them; else batch
  KeyRange keys;  ///< visible to at least one query; with changes_lengths: that may be
  WorkspaceLayout layout;
  std::string kernel;
  std::vector<HeadPart> parts;  ///< with head_modes; empty: the whole is one problem

  /// head_dim of packed operands: the shorter of K and V ends in zeros.
  [[nodiscard]] int64_t packed_dim() const noexcept { return std::max(head_dim, head_dim_v); }
  [[nodiscard]] int64_t heads() const noexcept { return sequences * nheads_k; }
  [[nodiscard]] bool int8_scores() const noexcept { return options.mode != Mode::kExact; }
  [[nodiscard]] bool int8_values() const noexcept {
    return options.mode == Mode::kAccurate || options.mode == Mode::kPaper;
  }
  /// `exact` of bfloat16 on a CPU that multiplies it.
  [[nodiscard]] bool exact_bfloat16() const noexcept {
    const auto is_bfloat16 = [](const OperandKind& x) { return x.dtype == DType::kBFloat16; };
    return options.mode == Mode::kExact && table->bfloat16_pairs && is_bfloat16(q) &&
           is_bfloat16(k) && is_bfloat16(v);
  }
  [[nodiscard]] bool smooths_k() const noexcept {
    return !k.quantized && options.smooth_k &&
           (options.mode == Mode::kAccurate || options.mode == Mode::kHalf);
  }
  [[nodiscard]] bool fold_v() const noexcept {
    return int8_values() && v_granularity == Granularity::kToken;
  }
};

/// The float tensor of an operand, or its codes.
inline const ConstTensorView& data_view(const Operand& operand) noexcept {
  if (const auto* view = std::get_if<ConstTensorView>(&operand)) return *view;
  return std::get_if<QuantizedView>(&operand)->codes;
}

/// Of validated inputs: those of cu_seqlens_q, or batch.
inline int64_t sequences_of(const AttentionInputs& inputs) noexcept {
  return inputs.cu_seqlens_q.has_value() ? inputs.cu_seqlens_q->shape[0] - 1
                                         : data_view(inputs.q).shape[0];
}

namespace cpu {

/// Everything after validation, on the CPU. workspace is 64-byte aligned and large enough.
Status run(const AttentionPlan::State& plan, const AttentionInputs& inputs,
           const AttentionOutputs& outputs, std::byte* workspace, RunTimes* times) noexcept;

/// Fills the layout and kernel of a plan whose other members are set.
Status lay_out(AttentionPlan::State& plan) noexcept;

}  // namespace cpu
}  // namespace attn8
