// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "emulator/device.hpp"
#include "emulator/float16.hpp"

/// The names of src/cuda/ptx.hpp for a host compiler, forwarded to the emulator. Documented there.

#define ATTN8_DEVICE inline __attribute__((always_inline))
#define ATTN8_DEVICE_NOINLINE inline __attribute__((noinline))
#define ATTN8_UNROLL
#define ATTN8_NO_UNROLL

// CUDA's vector types and keywords, as far as kernels use them.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
#define __grid_constant__

namespace attn8::cuda::ptx {

ATTN8_DEVICE int thread_index() { return emulator::thread_index(); }
ATTN8_DEVICE int block_x() { return emulator::block_index(0); }
ATTN8_DEVICE int block_y() { return emulator::block_index(1); }
ATTN8_DEVICE int block_z() { return emulator::block_index(2); }

ATTN8_DEVICE float ex2(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}
ATTN8_DEVICE float lg2(float x) { return std::log2(x < FLT_MIN && x > 0 ? 0.0f : x); }
ATTN8_DEVICE float rcp(float x) { return 1.0f / x; }
ATTN8_DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }
ATTN8_DEVICE float add(float a, float b) { return a + b; }
ATTN8_DEVICE float mul(float a, float b) { return a * b; }
ATTN8_DEVICE float max(float a, float b) { return std::fmax(a, b); }
ATTN8_DEVICE float min(float a, float b) { return std::fmin(a, b); }
ATTN8_DEVICE int max3(int a, int b, int c) {
  const int ab = a > b ? a : b;
  return ab > c ? ab : c;
}
ATTN8_DEVICE uint32_t sum_bytes(uint32_t a, uint32_t c) {
  return c + (a & 0xFF) + (a >> 8 & 0xFF) + (a >> 16 & 0xFF) + (a >> 24);
}
ATTN8_DEVICE uint32_t mad(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }
ATTN8_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t index = selector >> 4 * i & 7;
    result |= static_cast<uint32_t>(bytes >> 8 * index & 0xFF) << 8 * i;
  }
  return result;
}
ATTN8_DEVICE float as_float(uint32_t x) { return std::bit_cast<float>(x); }
ATTN8_DEVICE uint32_t as_uint(float x) { return std::bit_cast<uint32_t>(x); }
ATTN8_DEVICE int round_to_int(float x) {
  if (std::isnan(x)) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  if (x <= -2147483648.0f) return INT32_MIN;
  return static_cast<int>(std::nearbyint(x));
}
ATTN8_DEVICE uint32_t pack_half2(float low, float high) {
  return emulator::half_bits(low) | uint32_t{emulator::half_bits(high)} << 16;
}
ATTN8_DEVICE uint32_t pack_bfloat162(float low, float high) {
  return emulator::bfloat16_bits(low) | uint32_t{emulator::bfloat16_bits(high)} << 16;
}
ATTN8_DEVICE float half_to_float(uint32_t x) {
  return emulator::half_value(static_cast<uint16_t>(x));
}
ATTN8_DEVICE float bfloat16_to_float(uint32_t x) { return std::bit_cast<float>(x << 16); }

/// Grids do not overlap here.
ATTN8_DEVICE void launch_dependents() {}
ATTN8_DEVICE void wait_for_previous_grid() {}

ATTN8_DEVICE uint32_t smem_base() { return emulator::kSharedBase; }
template <class T>
ATTN8_DEVICE T ld_shared(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  emulator::load_shared(address, &value, sizeof(T));
  return value;
}
template <class T>
ATTN8_DEVICE void st_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulator::store_shared(address, &value, sizeof(T));
}
ATTN8_DEVICE uint32_t ld_shared_byte(uint32_t address) {
  uint8_t value;
  emulator::load_shared(address, &value, 1);
  return value;
}
ATTN8_DEVICE void st_shared_byte(uint32_t address, uint32_t value) {
  const uint8_t byte = static_cast<uint8_t>(value);
  emulator::store_shared(address, &byte, 1);
}
template <class T>
ATTN8_DEVICE T ld_global(const T* source) {
  emulator::check_global(source, sizeof(T), false, "ld.global");
  return *source;
}
template <class T>
ATTN8_DEVICE T ld_written(const T* source) {
  return ld_global(source);
}
template <class T>
ATTN8_DEVICE void st_global(T* target, T value) {
  emulator::check_global(target, sizeof(T), true, "st.global");
  *target = value;
}
ATTN8_DEVICE void cp_async16(uint32_t target, const void* source, bool valid) {
  emulator::cp_async16(target, source, valid);
}
ATTN8_DEVICE void cp_commit() { emulator::cp_commit(); }
template <int kPending>
ATTN8_DEVICE void cp_wait() {
  emulator::cp_wait(kPending);
}

ATTN8_DEVICE uint32_t shfl_xor(uint32_t v, int mask) {
  return emulator::shuffle(v, (emulator::thread_index() ^ mask) & 31, "shfl.bfly");
}
ATTN8_DEVICE int shfl_xor(int v, int mask) {
  return static_cast<int>(shfl_xor(static_cast<uint32_t>(v), mask));
}
ATTN8_DEVICE float shfl_xor(float v, int mask) { return as_float(shfl_xor(as_uint(v), mask)); }
ATTN8_DEVICE uint32_t shfl(uint32_t v, int lane) {
  return emulator::shuffle(v, lane & 31, "shfl.idx");
}
ATTN8_DEVICE int shfl(int v, int lane) {
  return static_cast<int>(shfl(static_cast<uint32_t>(v), lane));
}
ATTN8_DEVICE float shfl(float v, int lane) { return as_float(shfl(as_uint(v), lane)); }
ATTN8_DEVICE bool any(bool predicate) { return emulator::any(predicate); }
ATTN8_DEVICE void sync_warp() { emulator::sync_warp(); }
ATTN8_DEVICE void sync_block() { emulator::barrier(0, 0, true); }
ATTN8_DEVICE void bar_sync(int id, int threads) { emulator::barrier(id, threads, true); }
ATTN8_DEVICE void bar_arrive(int id, int threads) { emulator::barrier(id, threads, false); }

ATTN8_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  emulator::ldmatrix_x4(r, address, false);
}
ATTN8_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  emulator::ldmatrix_x4(r, address, true);
}
ATTN8_DEVICE void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Product::kS8S8, d, a, b);
}
ATTN8_DEVICE void mma_u8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Product::kU8S8, d, a, b);
}
ATTN8_DEVICE void mma_s8_from(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const int (&c)[4]) {
  std::copy(c, c + 4, d);
  mma_s8(d, a, b);
}
ATTN8_DEVICE void mma_u8_from(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const int (&c)[4]) {
  std::copy(c, c + 4, d);
  mma_u8(d, a, b);
}
ATTN8_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Product::kF16F16, d, a, b);
}
ATTN8_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma(emulator::Product::kBF16BF16, d, a, b);
}

using TensorMap = emulator::TensorMap;
ATTN8_DEVICE void mbar_init(uint32_t barrier, uint32_t count) {
  emulator::mbar_init(barrier, count);
}
ATTN8_DEVICE void fence_barrier_init() { emulator::fence_barrier_init(); }
ATTN8_DEVICE void mbar_expect_tx(uint32_t barrier, uint32_t bytes) {
  emulator::mbar_arrive(barrier, bytes);
}
ATTN8_DEVICE void mbar_arrive(uint32_t barrier) { emulator::mbar_arrive(barrier, 0); }
ATTN8_DEVICE void mbar_wait(uint32_t barrier, uint32_t parity) {
  emulator::mbar_wait(barrier, parity);
}
ATTN8_DEVICE void tma_load3(uint32_t target, const TensorMap* map, uint32_t barrier, int x, int y,
                            int z) {
  const int start[] = {x, y, z};
  emulator::tma_load(target, map, barrier, 3, start);
}
ATTN8_DEVICE void tma_load4(uint32_t target, const TensorMap* map, uint32_t barrier, int x, int y,
                            int z, int w) {
  const int start[] = {x, y, z, w};
  emulator::tma_load(target, map, barrier, 4, start);
}
ATTN8_DEVICE void tma_prefetch(const TensorMap*) {}
ATTN8_DEVICE void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  emulator::bulk_load(target, source, bytes, barrier);
}
ATTN8_DEVICE void fence_proxy_async() { emulator::fence_proxy_async(); }

template <int kRegisters>
ATTN8_DEVICE void regs_inc() {
  emulator::set_registers(kRegisters, true);
}
template <int kRegisters>
ATTN8_DEVICE void regs_dec() {
  emulator::set_registers(kRegisters, false);
}
ATTN8_DEVICE void wgmma_fence() { emulator::wgmma_fence(); }
ATTN8_DEVICE void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
ATTN8_DEVICE void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <int kN>
ATTN8_DEVICE void wgmma_ss_s8(int (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma(emulator::Product::kS8S8, kN, d, nullptr, a, b, accumulate);
}
template <int kN>
ATTN8_DEVICE void wgmma_rs_u8(int (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                              bool accumulate) {
  emulator::wgmma(emulator::Product::kU8S8, kN, d, a, 0, b, accumulate);
}
template <int kN>
ATTN8_DEVICE void wgmma_rs_f16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                               bool accumulate) {
  emulator::wgmma(emulator::Product::kF16F16, kN, d, a, 0, b, accumulate);
}

}  // namespace attn8::cuda::ptx
