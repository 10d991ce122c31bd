// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <span>
#include <string>

#include "backend.hpp"
#include "launch.hpp"
#include "merge_splits.hpp"
#include "pack_v.hpp"

/// What backend.cu and pack.cu share.
namespace attn8::cuda {

/// Byte offsets into the workspace, multiples of 256.
struct Workspace {
  size_t q, k, v, q_scale, key_constants, v_scale, lse_shift, k_mean, token_scale, panel_scale,
      partial, attn_mask, split_out, split_lse, bytes;
};

/// How a call is spread over the grid.
struct Division {
  int group = 1;       ///< query heads that the kernel treats as one, see AttendParams
  int splits = 1;      ///< parts that the keys are attended in
  int split_keys = 0;  ///< keys per part; 0 when there is one part
};

/// Which of AttentionInputs' optional tensors there are.
struct InputsPresent {
  bool attn_mask, alibi_slopes, sinks, seqlens_k, leftpad_k;

  static InputsPresent of(const AttentionInputs& inputs) {
    return {inputs.attn_mask.has_value(), inputs.alibi_slopes.has_value(), inputs.sinks.has_value(),
            inputs.seqlens_k.has_value(), inputs.leftpad_k.has_value()};
  }
  friend bool operator==(const InputsPresent&, const InputsPresent&) = default;
};

struct Plan::State {
  const AttendEntry* entry;
  int device;
  Extents q_shape, k_shape, v_shape, out_shape;
  DType q_type, k_type, v_type;  ///< kInt8: quantized operands
  DType out_type;
  bool has_lse;
  bool has_mean;         ///< K is smoothed here, or came with a mean
  InputsPresent inputs;  ///< beside q, k and v
  Extents mask_shape;    ///< of an attn_mask that is not float32: pack() makes one of it
  DType mask_type;
  float softcap;
  Granularity v_granularity;
  float softmax_scale;
  /// Of the mask, see AttendParams; where sequences have lengths of their own, relative to those.
  int first_offset, last_offset, position_offset;
  bool bottom_right;
  int first_key, last_key;  ///< keys visible to a query: [first_key, last_key), or that may be
  int rows_q, rows_k;
  Division division;
  Workspace workspace;

  [[nodiscard]] int batch() const { return static_cast<int>(q_shape[0]); }
  [[nodiscard]] int seqlen_q() const { return static_cast<int>(q_shape[1]); }
  [[nodiscard]] int nheads_q() const { return static_cast<int>(q_shape[2]); }
  [[nodiscard]] int seqlen_k() const { return static_cast<int>(k_shape[1]); }
  [[nodiscard]] int nheads_k() const { return static_cast<int>(k_shape[2]); }
  [[nodiscard]] int head_dim() const { return static_cast<int>(q_shape[3]); }
  [[nodiscard]] int head_dim_v() const { return static_cast<int>(v_shape[3]); }
  /// head_dim of the kernel.
  [[nodiscard]] int packed_dim() const { return entry->head_dim; }
  /// Whether rows need what smoothing K takes from their scores.
  [[nodiscard]] bool needs_shift() const {
    return has_mean && (has_lse || softcap != 0 || inputs.sinks);
  }
  [[nodiscard]] int kernel_heads() const { return nheads_q() / division.group; }
  [[nodiscard]] int row_bytes() const { return packed_row_bytes(packed_dim()); }
  [[nodiscard]] bool converts_mask() const {
    return inputs.attn_mask && mask_type != DType::kFloat32;
  }
  [[nodiscard]] int value_bytes() const { return entry->weights == Weights::kHalf ? 2 : 1; }
};

/// Ok, or kDeviceError with CUDA's own words (kOutOfMemory, kUnavailable where those are the
/// cause).
Status device_status(cudaError_t error, const char* what);

/// Makes a device current, and the caller's again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) noexcept;
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  [[nodiscard]] cudaError_t error() const noexcept { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// ---- launch.cu ----------------------------------------------------------------------------------

std::span<const AttendEntry> attend_entries();
/// No decode kernel, however few the rows are.
inline constexpr int64_t kManyRows = int64_t{1} << 62;
/// The narrowest kernel that is wide enough: for few rows, those of all queries and heads that
/// share keys, one for decode; else of the family asked for (not kBest), or of those for every chip
/// where that has none. nullptr when there is none.
const AttendEntry* find_entry(Kernels kernels, Weights weights, Scores scores, int head_dim,
                              int64_t rows);
/// kInvalidArgument unless `data` is memory of the device.
Status check_memory(const void* data, const char* name, int device);
/// Which kernels a device runs.
Result<Kernels> kernels_of(int device);
/// Once before its first launch. kUnsupported when the device has not enough shared memory.
Status make_ready(const AttendEntry& entry, int device, const std::string& device_name);

/// first_offset and last_offset of AttendParams for query 0 at position `shift`.
struct MaskOffsets {
  int first, last;
};
MaskOffsets mask_offsets(const Mask& mask, int64_t shift);
float score_scale_of(float softmax_scale);
/// Of a float type.
Element element_of(DType dtype);
/// Where and what the kernel writes.
void set_out(AttendParams& p, const ConstTensorView& out);

/// Few queries leave most multiprocessors idle: heads that share keys are packed into one row tile,
/// and the keys are divided among as many blocks of the grid as there is room for. `seqlen_q` is
/// the most that a sequence has.
Division divide(const AttendEntry& entry, int batch, int nheads_q, int nheads_k, int seqlen_q,
                int64_t seqlen_k, int multiprocessors);

/// Enqueues attention, and what joins the parts that the keys were attended in.
///   p          heads, lengths and outputs as the caller's; not the division
///   batch      sequences
///   out_batch  of out and lse: 1 where the batch is ragged
///   split_out, split_lse  with more than one part: [splits][out_batch][seqlen_q or total_q]
///              [nheads_q] rows of split_row_floats() floats, and of one
Status enqueue_attend(const AttendEntry& entry, const AttendParams& p, const Division& division,
                      int batch, int out_batch, float* split_out, float* split_lse,
                      cudaStream_t stream);

// ---- pack.cu ------------------------------------------------------------------------------------

/// Device memory as the quantize kernels read it.
SourceTensor source_of(const Operand& operand);
/// Enqueues the quantization of Q: `queries` of each of `heads`.
void enqueue_query_rows(const RowsParams& params, DType dtype, int row_bytes, int64_t queries,
                        int64_t heads, cudaStream_t stream);
/// Enqueues the quantize and pack kernels; the operands have been checked against the plan.
Status enqueue_pack(const Plan::State& state, const AttentionInputs& inputs, char* workspace,
                    cudaStream_t stream);

/// Enqueues what joins the parts that the keys were attended in.
Status enqueue_merge(const MergeParams& params, int batch, cudaStream_t stream);

}  // namespace attn8::cuda
