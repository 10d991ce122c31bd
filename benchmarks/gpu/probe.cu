// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/layout.hpp"
#include "cuda/ptx.hpp"

/// Fragment probe: random bytes through each tensor-core instruction the kernels use, compared with
/// a plain product laid out by layout.hpp, which is also what the emulator on the CPU is built on.
/// Prints one line per instruction; exits 1 on a mismatch.
namespace attn8::cuda {
namespace {

constexpr int kRows = 64;     // of A; mma and ldmatrix use the first 16
constexpr int kColumns = 64;  // of B; mma uses the first 8
enum Probe { kMmaS8, kMmaU8, kLdmatrix, kSs64, kSs128, kRs128, kProbes };
const char* const kNames[] = {"mma.m16n8k32.s8.s8",
                              "mma.m16n8k32.u8.s8",
                              "ldmatrix.x4",
                              "wgmma.m64n64k32.s8 swizzle 64",
                              "wgmma.m64n64k32.s8 swizzle 128",
                              "wgmma.m64n64k32.u8 A in registers"};

/// Fills a swizzled K-major tile [64][span] whose first 32 bytes of each row are `matrix`.
template <int kSpan>
__device__ void fill(uint32_t tile, const int8_t* matrix) {
  using Tile = SharedTile<kRows, kSpan>;
  for (int i = ptx::thread_index(); i < kRows * kSpan; i += blockDim.x) {
    const int row = i / kSpan;
    const int byte = i % kSpan;
    ptx::st_shared_byte(tile + Tile::offset(row, byte),
                        byte < 32 ? static_cast<uint8_t>(matrix[row * 32 + byte]) : 0x55);
  }
}

/// One warpgroup. a [64][32], b [64][32] (columns of B), d [128 threads][32].
template <int kProbe>
__global__ void __launch_bounds__(128, 1) probe_kernel(const int8_t* a, const int8_t* b, int* d) {
  const uint32_t shared = ptx::smem_base();
  const int lane = ptx::thread_index() % 32;
  const int warp = ptx::thread_index() / 32;
  constexpr int kSpan = kProbe == kSs64 ? 64 : 128;
  using Tile = SharedTile<kRows, kSpan>;
  fill<kSpan>(shared, a);
  fill<kSpan>(shared + Tile::kBytes, b);
  ptx::fence_proxy_async();
  ptx::sync_block();
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    const int row = warp * 16 * (kProbe == kRs128) + a_row(lane, i);
    memcpy(&fragment[i], a + row * 32 + a_byte(lane, i), 4);
  }
  int sums[32] = {};
  if constexpr (kProbe == kMmaS8 || kProbe == kMmaU8) {
    uint32_t columns[2];
    for (int i = 0; i < 2; ++i) {
      memcpy(&columns[i], b + b_column(lane) * 32 + b_byte(lane, i), 4);
    }
    int part[4] = {};
    kProbe == kMmaS8 ? ptx::mma_s8(part, fragment, columns) : ptx::mma_u8(part, fragment, columns);
    for (int i = 0; i < 4; ++i) sums[i] = part[i];
  } else if constexpr (kProbe == kLdmatrix) {
    uint32_t loaded[4];
    ptx::ldmatrix_x4(loaded, shared + Tile::offset(ldmatrix_a_row(lane), ldmatrix_a_byte(lane)));
    for (int i = 0; i < 4; ++i) sums[i] = static_cast<int>(loaded[i]);
  } else {
    const uint64_t q = matrix_descriptor(shared, kSpan);
    const uint64_t k = matrix_descriptor(shared + Tile::kBytes, kSpan);
    ptx::wgmma_fence();
    if constexpr (kProbe == kRs128) {
      ptx::wgmma_rs_u8<kColumns>(sums, fragment, k, false);
    } else {
      ptx::wgmma_ss_s8<kColumns>(sums, q, k, false);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  for (int i = 0; i < 32; ++i) d[ptx::thread_index() * 32 + i] = sums[i];
}

int expected(int probe, const std::vector<int8_t>& a, const std::vector<int8_t>& b, int thread,
             int i) {
  const int lane = thread % 32;
  if (probe == kLdmatrix) {
    uint32_t word;
    memcpy(&word, &a[a_row(lane, i) * 32 + a_byte(lane, i)], 4);
    return static_cast<int>(word);
  }
  const int row = (probe >= kSs64 ? thread / 32 * 16 : 0) + c_row(lane, i);
  const int column = c_column(lane, i);
  int sum = 0;
  for (int k = 0; k < 32; ++k) {
    const int8_t x = a[row * 32 + k];
    sum += (probe == kMmaU8 || probe == kRs128 ? static_cast<uint8_t>(x) : x) * b[column * 32 + k];
  }
  return sum;
}

template <int kProbe>
int run() {
  std::mt19937 generator(kProbe);
  std::vector<int8_t> a(kRows * 32);
  std::vector<int8_t> b(kColumns * 32);
  for (int8_t& x : a) x = static_cast<int8_t>(generator());
  for (int8_t& x : b) x = static_cast<int8_t>(generator());
  int8_t* device;
  int* result;
  cudaMalloc(&device, a.size() + b.size());
  cudaMalloc(&result, 128 * 32 * sizeof(int));
  cudaMemcpy(device, a.data(), a.size(), cudaMemcpyHostToDevice);
  cudaMemcpy(device + a.size(), b.data(), b.size(), cudaMemcpyHostToDevice);
  probe_kernel<kProbe><<<1, 128, 2 * kRows * 128>>>(device, device + a.size(), result);
  std::vector<int> got(128 * 32);
  const cudaError_t error = cudaMemcpy(got.data(), result, got.size() * 4, cudaMemcpyDeviceToHost);
  cudaFree(device);
  cudaFree(result);
  if (error != cudaSuccess) {
    std::printf("%-36s %s\n", kNames[kProbe], cudaGetErrorString(error));
    return 1;
  }
  int mismatches = 0;
  const int elements = kProbe >= kSs64 ? 32 : 4;
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < elements; ++i) {
      mismatches += got[thread * 32 + i] != expected(kProbe, a, b, thread, i);
    }
  }
  std::printf("%-36s %d elements, %d mismatches\n", kNames[kProbe], 128 * elements, mismatches);
  return mismatches != 0;
}

}  // namespace
}  // namespace attn8::cuda

int main() {
  using namespace attn8::cuda;
  return run<kMmaS8>() | run<kMmaU8>() | run<kLdmatrix>() | run<kSs64>() | run<kSs128>() |
         run<kRs128>();
}
