// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "plan.hpp"

namespace attn8::cuda {
namespace {

/// Blocks of 256 threads, four to a multiprocessor: loads of 1024 threads in flight.
constexpr int least_blocks(int threads) { return threads <= 256 ? 4 : 1; }

template <class Kernel, class Params>
__global__ void __launch_bounds__(Kernel::kThreads, least_blocks(Kernel::kThreads))
    pack_kernel(const __grid_constant__ Params params) {
  Kernel::run(params);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    pack_dim_kernel(const __grid_constant__ PackVParams params, int packed_dim) {
  Kernel::run(params, packed_dim);
}

__global__ void __launch_bounds__(MergeSplits::kThreads)
    merge_kernel(const __grid_constant__ MergeParams params, int batch) {
  MergeSplits::run(params, batch);
}

/// result[head][channel] = source[batch, 0, head, channel], zeros past head_dim: scales and means
/// of operands that were quantized before.
struct GatherParams {
  const float* source;
  int64_t stride_batch, stride_head, stride_channel;
  int nheads, head_dim, packed;
  float* result;
};
__global__ void gather_kernel(const __grid_constant__ GatherParams p) {
  const int channel = static_cast<int>(threadIdx.x);
  const int64_t batch = blockIdx.x / p.nheads;
  const int64_t head = blockIdx.x % p.nheads;
  if (channel >= p.packed) return;
  p.result[static_cast<int64_t>(blockIdx.x) * p.packed + channel] =
      channel < p.head_dim
          ? p.source[batch * p.stride_batch + head * p.stride_head + channel * p.stride_channel]
          : 0.0f;
}

/// result[i] = what an element of attn_mask adds to a score; 0 hides where it is a bool.
struct MaskParams {
  const void* source;
  DType type;
  int64_t shape[4], strides[4];
  int64_t count;
  float* result;
};
__global__ void mask_kernel(const __grid_constant__ MaskParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count;
       i += step) {
    int64_t offset = 0;
    int64_t rest = i;
    for (int axis = 3; axis >= 0; --axis) {
      offset += rest % p.shape[axis] * p.strides[axis];
      rest /= p.shape[axis];
    }
    float added;
    if (p.type == DType::kBool) {
      added = static_cast<const uint8_t*>(p.source)[offset] != 0 ? 0.0f : -INFINITY;
    } else {
      const uint32_t bits = static_cast<const uint16_t*>(p.source)[offset];
      added = p.type == DType::kFloat16 ? ptx::half_to_float(bits) : ptx::bfloat16_to_float(bits);
    }
    p.result[i] = added;
  }
}

template <class Kernel, class Params>
void launch(const Params& params, int64_t x, int64_t y, cudaStream_t stream) {
  if (x <= 0 || y <= 0) return;
  pack_kernel<Kernel, Params><<<dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
                                Kernel::kThreads, Kernel::kSharedBytes, stream>>>(params);
}

/// Calls visit(std::integral_constant<Source, ...>).
template <class Visit>
void for_source(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(std::integral_constant<Source, Source::kFloat32>());
    case DType::kFloat16:
      return visit(std::integral_constant<Source, Source::kFloat16>());
    case DType::kBFloat16:
      return visit(std::integral_constant<Source, Source::kBFloat16>());
    default:
      return visit(std::integral_constant<Source, Source::kCodes>());
  }
}

template <class Visit>
void for_row_bytes(int row_bytes, const Visit& visit) {
  if (row_bytes == 64) return visit(std::integral_constant<int, 64>());
  if (row_bytes == 128) return visit(std::integral_constant<int, 128>());
  visit(std::integral_constant<int, 256>());
}

template <class Visit>
void for_head_dim(int packed_dim, const Visit& visit) {
  if (packed_dim == 96) return visit(std::integral_constant<int, 96>());
  for_row_bytes(packed_dim, visit);
}

void gather(const ConstTensorView& view, int head_dim, int packed, float* result,
            cudaStream_t stream) {
  const GatherParams params{static_cast<const float*>(view.data),
                            view.strides[0],
                            view.strides[2],
                            view.shape[3] == 1 ? 0 : view.strides[3],
                            static_cast<int>(view.shape[2]),
                            head_dim,
                            packed,
                            result};
  gather_kernel<<<static_cast<unsigned>(view.shape[0] * view.shape[2]), packed, 0, stream>>>(
      params);
}

VisibleTokens visible_tokens(const Plan::State& s, const AttentionInputs& inputs) {
  VisibleTokens visible{};
  visible.first = s.first_key;
  visible.last = s.last_key;
  if (s.inputs.seqlens_k) {
    visible.seqlens_k = static_cast<const int*>(inputs.seqlens_k->data);
    visible.seqlens_k_stride = inputs.seqlens_k->strides[0];
  }
  if (s.inputs.leftpad_k) {
    visible.leftpad_k = static_cast<const int*>(inputs.leftpad_k->data);
    visible.leftpad_k_stride = inputs.leftpad_k->strides[0];
  }
  visible.seqlen_q = s.seqlen_q();
  visible.seqlen_k = s.seqlen_k();
  visible.first_offset = s.first_offset;
  visible.last_offset = s.last_offset;
  visible.bottom_right = s.bottom_right;
  return visible;
}

}  // namespace

SourceTensor source_of(const Operand& operand) {
  SourceTensor x{};
  const auto* quantized = std::get_if<QuantizedView>(&operand);
  const ConstTensorView& view =
      quantized != nullptr ? quantized->codes : *std::get_if<ConstTensorView>(&operand);
  x.data = view.data;
  x.stride_batch = view.strides[0];
  x.stride_row = view.strides[1];
  x.stride_head = view.strides[2];
  x.stride_channel = view.strides[3];
  x.seqlen = static_cast<int>(view.shape[1]);
  x.nheads = static_cast<int>(view.shape[2]);
  x.head_dim = static_cast<int>(view.shape[3]);
  x.vectors = view.strides[3] == 1 && view.shape[3] % 8 == 0 &&
              reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (size_t axis = 0; axis < 3; ++axis) {
    x.vectors = x.vectors && (view.shape[axis] == 1 || view.strides[axis] % 8 == 0);
  }
  if (quantized != nullptr && quantized->spec.granularity == Granularity::kToken) {
    x.scale = static_cast<const float*>(quantized->scale.data);
    x.scale_stride_batch = quantized->scale.strides[0];
    x.scale_stride_row = quantized->scale.strides[1];
    x.scale_stride_head = quantized->scale.strides[2];
  }
  return x;
}

void enqueue_query_rows(const RowsParams& params, DType dtype, int row_bytes, int64_t queries,
                        int64_t heads, cudaStream_t stream) {
  for_row_bytes(row_bytes, [&](auto bytes) {
    for_source(dtype, [&](auto source) {
      using Rows = QuantizeRows<source(), bytes(), true>;
      launch<Rows>(params, (queries + Rows::kBlockTokens - 1) / Rows::kBlockTokens, heads, stream);
    });
  });
}

Status enqueue_pack(const Plan::State& s, const AttentionInputs& inputs, char* workspace,
                    cudaStream_t stream) {
  const auto at = [&](size_t offset) { return workspace + offset; };
  const auto floats_at = [&](size_t offset) { return reinterpret_cast<float*>(at(offset)); };
  const int64_t q_heads = static_cast<int64_t>(s.batch()) * s.nheads_q();
  const int64_t kv_heads = static_cast<int64_t>(s.batch()) * s.nheads_k();
  const int packed_dim = s.packed_dim();
  const VisibleTokens visible = visible_tokens(s, inputs);
  const SourceTensor q = source_of(inputs.q);
  const SourceTensor k = source_of(inputs.k);
  const SourceTensor v = source_of(inputs.v);
  const int chunks = (s.last_key - s.first_key + 255) / 256;

  if (s.converts_mask()) {
    const ConstTensorView& mask = *inputs.attn_mask;
    MaskParams params{};
    params.source = mask.data;
    params.type = mask.dtype;
    params.count = 1;
    for (size_t axis = 0; axis < 4; ++axis) {
      params.shape[axis] = mask.shape[axis];
      params.strides[axis] = mask.strides[axis];
      params.count *= mask.shape[axis];
    }
    params.result = floats_at(s.workspace.attn_mask);
    const int64_t blocks = std::min<int64_t>((params.count + 255) / 256, 4096);
    if (blocks > 0) mask_kernel<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(params);
  }

  if (s.has_mean) {
    if (s.k_type == DType::kInt8) {
      gather(*std::get_if<QuantizedView>(&inputs.k)->mean, s.head_dim(), s.row_bytes(),
             floats_at(s.workspace.k_mean), stream);
    } else {
      const StatisticsParams params{k,
                                    visible,
                                    at(s.workspace.partial),
                                    chunks,
                                    floats_at(s.workspace.k_mean),
                                    s.row_bytes(),
                                    false};
      for_source(s.k_type, [&](auto source) {
        launch<ChannelStatistics<source(), Statistic::kSum>>(params, chunks, kv_heads, stream);
      });
      launch<FinishStatistics<Statistic::kSum>>(params, kv_heads, 1, stream);
    }
  }

  RowsParams k_rows{};
  k_rows.x = k;
  k_rows.codes = reinterpret_cast<int8_t*>(at(s.workspace.k));
  k_rows.rows = s.rows_k;
  k_rows.key_constants = floats_at(s.workspace.key_constants);
  k_rows.mean = s.has_mean && s.k_type != DType::kInt8 ? floats_at(s.workspace.k_mean) : nullptr;
  k_rows.heads_per_mean = 1;
  k_rows.mean_channels = s.row_bytes();
  k_rows.last_image = static_cast<int>(kv_heads) - 1;
  RowsParams q_rows{};
  q_rows.x = q;
  q_rows.codes = reinterpret_cast<int8_t*>(at(s.workspace.q));
  q_rows.rows = s.rows_q;
  q_rows.q_scale = floats_at(s.workspace.q_scale);
  if (s.needs_shift()) {
    q_rows.mean = floats_at(s.workspace.k_mean);
    q_rows.lse_shift = floats_at(s.workspace.lse_shift);
  }
  q_rows.group = s.division.group;
  k_rows.group = 1;
  q_rows.heads_per_mean = s.nheads_k() > 0 ? s.nheads_q() / s.nheads_k() : 1;
  q_rows.mean_channels = s.row_bytes();
  q_rows.softmax_scale = s.softmax_scale;
  for_row_bytes(s.row_bytes(), [&](auto row_bytes) {
    for_source(s.k_type, [&](auto source) {
      using Rows = QuantizeRows<source(), row_bytes(), false>;
      launch<Rows>(k_rows, s.rows_k / Rows::kBlockTokens, kv_heads, stream);
    });
  });
  // Queries whose rows fill the packed length, padding included.
  const int queries = (s.rows_q + s.division.group - 1) / s.division.group;
  enqueue_query_rows(q_rows, s.q_type, s.row_bytes(), queries, q_heads, stream);

  PackVParams pack{};
  pack.x = v;
  pack.codes = reinterpret_cast<int8_t*>(at(s.workspace.v));
  pack.rows = s.rows_k;
  pack.visible = visible;
  pack.scale = floats_at(s.workspace.v_scale);
  pack.v_scale = floats_at(s.workspace.v_scale);
  pack.token_scale = floats_at(s.workspace.token_scale);
  pack.panel_scale = floats_at(s.workspace.panel_scale);
  pack.key_constants = floats_at(s.workspace.key_constants);
  pack.kv_block = s.entry->kv_block;
  if (s.entry->weights == Weights::kHalf) {
    for_source(s.v_type, [&](auto source) {
      const int64_t threads = static_cast<int64_t>(s.rows_k) * (packed_dim / 8);
      const int64_t blocks =
          (threads + PackHalfV<source()>::kThreads - 1) / PackHalfV<source()>::kThreads;
      if (blocks == 0 || kv_heads == 0) return;
      pack_dim_kernel<PackHalfV<source()>>
          <<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(kv_heads)),
             PackHalfV<source()>::kThreads, 0, stream>>>(pack, packed_dim);
    });
    return device_status(cudaGetLastError(), "launching the quantize kernels");
  }
  const bool per_token = s.v_granularity == Granularity::kToken;
  if (!per_token) {
    if (s.v_type == DType::kInt8) {
      gather(std::get_if<QuantizedView>(&inputs.v)->scale, s.head_dim_v(), packed_dim,
             floats_at(s.workspace.v_scale), stream);
    } else {
      const StatisticsParams params{v,
                                    visible,
                                    at(s.workspace.partial),
                                    chunks,
                                    floats_at(s.workspace.v_scale),
                                    packed_dim,
                                    s.v_granularity == Granularity::kTensor};
      for_source(s.v_type, [&](auto source) {
        launch<ChannelStatistics<source(), Statistic::kMagnitude>>(params, chunks, kv_heads,
                                                                   stream);
      });
      launch<FinishStatistics<Statistic::kMagnitude>>(params, kv_heads, 1, stream);
    }
  }
  for_head_dim(packed_dim, [&](auto dim) {
    for_source(s.v_type, [&](auto source) {
      const int64_t panels = s.rows_k / kPanelKeys;
      if (per_token) {
        launch<PackV<source(), dim(), true>>(pack, panels, kv_heads, stream);
      } else {
        launch<PackV<source(), dim(), false>>(pack, panels, kv_heads, stream);
      }
    });
  });
  if (per_token && s.rows_k > 0 && kv_heads > 0) {
    pack_dim_kernel<FoldV>
        <<<dim3(static_cast<unsigned>(s.rows_k / pack.kv_block), static_cast<unsigned>(kv_heads)),
           FoldV::kThreads, FoldV::kSharedBytes, stream>>>(pack, packed_dim);
  }
  if (s.rows_k == 0) {
    // No key: the outputs are 0 times these scales.
    const size_t bytes = static_cast<size_t>(kv_heads) * packed_dim * sizeof(float);
    const cudaError_t error = cudaMemsetAsync(at(s.workspace.v_scale), 0, bytes, stream);
    if (error != cudaSuccess) return device_status(error, "cudaMemsetAsync");
  }
  return device_status(cudaGetLastError(), "launching the quantize kernels");
}

Status enqueue_merge(const MergeParams& params, int batch, cudaStream_t stream) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, merge_kernel);
  if (error != cudaSuccess) return device_status(error, "cudaFuncGetAttributes");
  const int64_t rows =
      static_cast<int64_t>(batch) * params.result.seqlen_q * params.result.nheads_q;
  // Launched while the parts are attended: the launch then takes no time of its own.
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows));
  config.blockDim = dim3(MergeSplits::kThreads);
  config.dynamicSmemBytes = MergeSplits::kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  // Code for chips before Hopper does not wait for them, on whatever chip it runs.
  config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
  return device_status(cudaLaunchKernelEx(&config, merge_kernel, params, batch),
                       "launching the merge kernel");
}

}  // namespace attn8::cuda
