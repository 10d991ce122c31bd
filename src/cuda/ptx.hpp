// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The instructions the kernels are written in: thin wrappers, one PTX instruction each, no policy.
/// A host compiler with ATTN8_EMULATE gets the same names from the emulator in tests/emulator, so
/// that one kernel source runs on a GPU and, lane by lane, on a CPU. Shared memory is addressed by
/// 32-bit shared-window addresses throughout; global memory that a kernel touches with ordinary
/// loads and stores goes through ld_global / st_global, which the emulator checks.

#if defined(__CUDACC__)

#include <cuda.h>

#include <cstdint>

#define ATTN8_DEVICE __device__ __forceinline__
#define ATTN8_DEVICE_NOINLINE __device__ __noinline__
#define ATTN8_UNROLL _Pragma("unroll")
#define ATTN8_NO_UNROLL _Pragma("unroll 1")

namespace attn8::cuda::ptx {

// ---- Position, arithmetic -----------------------------------------------------------------------

ATTN8_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ATTN8_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
ATTN8_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
ATTN8_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

/// 2^x, relative error 2^-22.5, subnormals flushed. ex2(-inf) = 0.
ATTN8_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// log2(x), absolute error 2^-22 around 1. lg2(0) = -inf.
ATTN8_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// 1 / x, relative error 2^-23, subnormals flushed.
ATTN8_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// Rounded once; fma() is never split, add() and mul() are never contracted.
ATTN8_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ATTN8_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
ATTN8_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
/// The operand that is no NaN when one is.
ATTN8_DEVICE float max(float a, float b) { return fmaxf(a, b); }
ATTN8_DEVICE float min(float a, float b) { return fminf(a, b); }
/// Largest of three integers; one instruction on sm_90, two before.
ATTN8_DEVICE int max3(int a, int b, int c) {
#if __CUDA_ARCH__ >= 900
  return __vimax3_s32(a, b, c);
#else
  const int ab = a > b ? a : b;
  return ab > c ? ab : c;
#endif
}
/// c + the four unsigned bytes of a.
ATTN8_DEVICE uint32_t sum_bytes(uint32_t a, uint32_t c) { return __dp4a(a, 0x01010101u, c); }
/// a * b + c, low 32 bits, in the pipe of the float multiply-adds.
ATTN8_DEVICE uint32_t mad(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
/// Four bytes picked by the nibbles of `selector` from b:a (a holds bytes 0..3).
ATTN8_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
ATTN8_DEVICE float as_float(uint32_t x) { return __uint_as_float(x); }
ATTN8_DEVICE uint32_t as_uint(float x) { return __float_as_uint(x); }
/// Nearest integer, ties to even.
ATTN8_DEVICE int round_to_int(float x) { return __float2int_rn(x); }

/// Two floats rounded to nearest even, `low` in the low half.
ATTN8_DEVICE uint32_t pack_half2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
ATTN8_DEVICE uint32_t pack_bfloat162(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
/// Value of the binary16 number in the low 16 bits.
ATTN8_DEVICE float half_to_float(uint32_t x) {
  float y;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x));
  return y;
}
/// Value of the bfloat16 number in the low 16 bits.
ATTN8_DEVICE float bfloat16_to_float(uint32_t x) { return __uint_as_float(x << 16); }

// ---- Memory -------------------------------------------------------------------------------------

/// First shared address the block may use, a multiple of 1024.
ATTN8_DEVICE uint32_t smem_base() {
  extern __shared__ __align__(1024) uint8_t attn8_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(attn8_shared_memory));
}

/// Shared-memory load and store of 4, 8 or 16 bytes, naturally aligned.
template <class T>
ATTN8_DEVICE T ld_shared(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  union {
    uint32_t words[sizeof(T) / 4];
    T value;
  } u;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(u.words[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(u.words[0]), "=r"(u.words[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
                 : "r"(address)
                 : "memory");
  }
  return u.value;
}
template <class T>
ATTN8_DEVICE void st_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  union {
    T value;
    uint32_t words[sizeof(T) / 4];
  } u{value};
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(u.words[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(u.words[0]), "r"(u.words[1])
                 : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(u.words[0]),
                 "r"(u.words[1]), "r"(u.words[2]), "r"(u.words[3])
                 : "memory");
  }
}
/// One byte, for transposes in the pack kernels.
ATTN8_DEVICE void st_shared_byte(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
ATTN8_DEVICE uint32_t ld_shared_byte(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

/// Global load of memory the grid does not write (ld.global.nc), naturally aligned.
template <class T>
ATTN8_DEVICE T ld_global(const T* source) {
  return __ldg(source);
}
/// Global load of memory the grid may write (ld.global), naturally aligned.
template <class T>
ATTN8_DEVICE T ld_written(const T* source) {
  return *source;
}
template <class T>
ATTN8_DEVICE void st_global(T* target, T value) {
  *target = value;
}

/// 16 bytes from global to shared memory, asynchronously; zeros when !valid (the source is not
/// read). Both 16-byte aligned. Seen by this thread after cp_wait, by others after a barrier too.
ATTN8_DEVICE void cp_async16(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
ATTN8_DEVICE void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
ATTN8_DEVICE void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Warps, barriers ----------------------------------------------------------------------------

ATTN8_DEVICE float shfl_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
ATTN8_DEVICE int shfl_xor(int v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
ATTN8_DEVICE uint32_t shfl_xor(uint32_t v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
ATTN8_DEVICE float shfl(float v, int lane) { return __shfl_sync(~0u, v, lane); }
ATTN8_DEVICE int shfl(int v, int lane) { return __shfl_sync(~0u, v, lane); }
ATTN8_DEVICE uint32_t shfl(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }
/// Whether any lane of the warp says so.
ATTN8_DEVICE bool any(bool predicate) { return __any_sync(~0u, predicate) != 0; }
ATTN8_DEVICE void sync_warp() { __syncwarp(); }
ATTN8_DEVICE void sync_block() { __syncthreads(); }
/// Named barrier `id` (1..15) for `threads` threads, a multiple of 32.
ATTN8_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ATTN8_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Grids that follow each other ---------------------------------------------------------------

/// Lets a grid that was launched to overlap with this one start, once all blocks have said so.
ATTN8_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Waits until the grid that this one overlaps with has ended; its writes are seen by ld_written.
ATTN8_DEVICE void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- mma.sync (sm_80) ---------------------------------------------------------------------------

/// All lanes: four 8 x 16-byte matrices, the rows of matrix i at the addresses of lanes 8i..8i+7.
ATTN8_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
/// As ldmatrix_x4, each matrix transposed as 8 x 8 16-bit elements.
ATTN8_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// d += a b: int8 x int8 (mma_s8), uint8 x int8 (mma_u8), 16 x 8 x 32.
#define ATTN8_MMA_INT8(name, a_type)                                                       \
  ATTN8_DEVICE void name(int(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {       \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." a_type                           \
                 ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));      \
  }
ATTN8_MMA_INT8(mma_s8, "s8")
ATTN8_MMA_INT8(mma_u8, "u8")
#undef ATTN8_MMA_INT8

/// d = c + a b.
#define ATTN8_MMA_INT8_FROM(name, a_type)                                                       \
  ATTN8_DEVICE void name(int(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2],              \
                         const int(&c)[4]) {                                                    \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." a_type                                \
                 ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"  \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), \
                   "r"(c[1]), "r"(c[2]), "r"(c[3]));                                            \
  }
ATTN8_MMA_INT8_FROM(mma_s8_from, "s8")
ATTN8_MMA_INT8_FROM(mma_u8_from, "u8")
#undef ATTN8_MMA_INT8_FROM

/// d += a b in float16 (mma_f16) or bfloat16 (mma_bf16) with float32 sums, 16 x 8 x 16.
#define ATTN8_MMA_16BIT(name, type)                                                     \
  ATTN8_DEVICE void name(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
ATTN8_MMA_16BIT(mma_f16, "f16")
ATTN8_MMA_16BIT(mma_bf16, "bf16")
#undef ATTN8_MMA_16BIT

// ---- mbarrier, TMA (sm_90) ----------------------------------------------------------------------

using TensorMap = CUtensorMap;

/// Barrier of 8 bytes, 8-byte aligned, whose phase ends after `count` arrivals and all bytes.
ATTN8_DEVICE void mbar_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
/// Makes mbar_init visible to the asynchronous proxy; a block barrier shows it to other threads.
ATTN8_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/// Arrives and lets the phase wait for `bytes` more bytes of tma_load / bulk_load.
ATTN8_DEVICE void mbar_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
ATTN8_DEVICE void mbar_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Blocks until the phase of that parity has ended.
ATTN8_DEVICE void mbar_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p; W%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra W%=;}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}

/// One thread: a box of a tensor map to shared memory (128-byte aligned; 1024 with a swizzle);
/// elements outside the tensor arrive as zeros. Signals its whole box's bytes on `barrier`.
ATTN8_DEVICE void tma_load3(uint32_t target, const TensorMap* map, uint32_t barrier, int x, int y,
                            int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
ATTN8_DEVICE void tma_load4(uint32_t target, const TensorMap* map, uint32_t barrier, int x, int y,
                            int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
ATTN8_DEVICE void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/// One thread: `bytes` (a multiple of 16) of contiguous memory, both sides 16-byte aligned.
ATTN8_DEVICE void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}
/// Orders this thread's ordinary writes (cp_async16 included) before wgmma and TMA accesses.
ATTN8_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma (sm_90a) -----------------------------------------------------------------------------

template <int kRegisters>
ATTN8_DEVICE void regs_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ATTN8_DEVICE void regs_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Orders register writes of this warpgroup before the wgmma that follow.
ATTN8_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ATTN8_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most kPending groups are in flight; their accumulators and A registers are the
/// thread's again.
template <int kPending>
ATTN8_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace attn8::cuda::ptx

#include "ptx_wgmma.hpp"

#elif defined(ATTN8_EMULATE)

#include "emulator/ptx_emulated.hpp"

#else
#error "ptx.hpp needs nvcc, or a host compiler with ATTN8_EMULATE and tests/ on its include path"
#endif
