// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
//
// FlashAttention-3's forward kernels without torch: fills their parameters as flash_api.cpp does
// for fixed lengths and launches one.
#include <cuda_runtime.h>
#include <cutlass/numeric_types.h>

#include <cmath>

#include "flash.h"

namespace {

template <class T>
void launch(Flash_fwd_params& params, cudaStream_t stream) {
  if (params.d == 64) {
    run_mha_fwd_<90, T, 64, 64, false, false, false, false>(params, stream);
  } else {
    run_mha_fwd_<90, T, 128, 128, false, false, false, false>(params, stream);
  }
}

}  // namespace

/// q, k, v [batch, seqlen, heads, head_dim] contiguous, float16 or (fp8) e4m3 with `descale`
/// [3][batch][heads]; out the same shape, float16, or bfloat16 for fp8. head_dim 64 or 128. lse
/// [batch][heads][seqlen]. `semaphore` is an int of the caller's on the device.
extern "C" void fa3_forward(void* q, void* k, void* v, void* out, float* lse, float* descale,
                            int* semaphore, int batch, int seqlen, int heads, int head_dim, int fp8,
                            int causal, int multiprocessors, cudaStream_t stream) {
  Flash_fwd_params params = {};
  params.q_ptr = q;
  params.k_ptr = k;
  params.v_ptr = v;
  params.o_ptr = out;
  params.softmax_lse_ptr = lse;
  const int64_t row = int64_t{heads} * head_dim;
  params.q_row_stride = params.k_row_stride = params.v_row_stride = params.o_row_stride = row;
  params.q_head_stride = params.k_head_stride = params.v_head_stride = params.o_head_stride =
      head_dim;
  params.q_batch_stride = params.k_batch_stride = params.v_batch_stride = params.o_batch_stride =
      row * seqlen;
  params.v_dim_stride = 1;
  params.b = params.b_k = batch;
  params.h = params.h_k = heads;
  params.seqlen_q = params.seqlen_k = seqlen;
  params.seqlen_q_rounded = params.seqlen_k_rounded = (seqlen + 127) / 128 * 128;
  params.total_q = params.total_k = batch * seqlen;
  params.d = params.d_rounded = params.dv = params.dv_rounded = head_dim;
  params.scale_softmax = 1 / std::sqrt(static_cast<float>(head_dim));
  params.p_dropout = params.rp_dropout = 1;
  params.is_e4m3 = fp8;
  params.is_causal = causal;
  params.window_size_left = seqlen - 1;
  params.window_size_right = causal ? 0 : seqlen - 1;
  params.num_splits = 1;
  params.tile_count_semaphore = semaphore;
  if (causal) cudaMemsetAsync(semaphore, 0, sizeof(int), stream);
  params.arch = 90;
  params.num_sm = multiprocessors;
  if (fp8) {
    params.q_descale_ptr = descale;
    params.k_descale_ptr = descale + batch * heads;
    params.v_descale_ptr = descale + 2 * batch * heads;
    params.q_descale_batch_stride = params.k_descale_batch_stride = params.v_descale_batch_stride =
        heads;
    params.q_descale_head_stride = params.k_descale_head_stride = params.v_descale_head_stride = 1;
    launch<cutlass::float_e4m3_t>(params, stream);
  } else {
    launch<cutlass::half_t>(params, stream);
  }
}
