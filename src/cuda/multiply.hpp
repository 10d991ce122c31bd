// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "params.hpp"
#include "ptx.hpp"

namespace attn8::cuda {

/// Integer products of 16 query rows and the 16 keys of one group by mma.sync, as floats in the
/// element order of OnlineSoftmax. For the rare block that is done twice.
///   q, k    shared addresses of a QTile and a KTile
///   q_row   first of the warp's rows in the QTile
template <class QTile, class KTile>
ATTN8_DEVICE void multiply_key_group(uint32_t q, int q_row, uint32_t k, int group,
                                     float (&products)[8]) {
  const int lane = ptx::thread_index() % 32;
  int sums[2][4] = {};
  ATTN8_UNROLL
  for (int step = 0; step < QTile::kRowBytes / 32; ++step) {
    uint32_t a[4];
    uint32_t b[4];
    ptx::ldmatrix_x4(
        a, q + QTile::offset(q_row + ldmatrix_a_row(lane), step * 32 + ldmatrix_a_byte(lane)));
    ptx::ldmatrix_x4(b, k + KTile::offset(group * kKeyGroup + ldmatrix_b_column(lane),
                                          step * 32 + ldmatrix_b_byte(lane)));
    ATTN8_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t columns[2] = {b[2 * half], b[2 * half + 1]};
      ptx::mma_s8(sums[half], a, columns);
    }
  }
  ATTN8_UNROLL
  for (int i = 0; i < 8; ++i) products[i] = static_cast<float>(sums[i / 4][i % 4]);
}

}  // namespace attn8::cuda
