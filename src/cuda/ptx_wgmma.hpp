// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

/// wgmma wrappers, apart from ptx.hpp because their operand lists are long. Included by ptx.hpp
/// under nvcc only.

// Comma-separated operand numbers %first .. %(first + 7), and the accumulators they stand for.
#define ATTN8_OPERANDS_32                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTN8_OPERANDS_48 \
  ATTN8_OPERANDS_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ATTN8_OPERANDS_64 \
  ATTN8_OPERANDS_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ATTN8_D8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define ATTN8_D32(c) ATTN8_D8(c, 0), ATTN8_D8(c, 8), ATTN8_D8(c, 16), ATTN8_D8(c, 24)
#define ATTN8_D48(c) ATTN8_D32(c), ATTN8_D8(c, 32), ATTN8_D8(c, 40)
#define ATTN8_D64(c) ATTN8_D48(c), ATTN8_D8(c, 48), ATTN8_D8(c, 56)

// p0..p5 are the operand numbers after the accumulators.
#define ATTN8_WGMMA_SS(shape, types, count, c, p0, p1, p2)                                  \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p2                                        \
               ", 0; wgmma.mma_async.sync.aligned." shape types " {" ATTN8_OPERANDS_##count \
               "}, %" #p0 ", %" #p1 ", p;}"                                                 \
               : ATTN8_D##count(c)                                                          \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define ATTN8_WGMMA_RS(shape, types, count, c, p0, p1, p2, p3, p4, p5)                         \
  asm volatile(                                                                                \
      "{.reg .pred p; setp.ne.b32 p, %" #p5 ", 0; wgmma.mma_async.sync.aligned." shape types   \
      " {" ATTN8_OPERANDS_##count "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p;}" \
      : ATTN8_D##count(c)                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))
#define ATTN8_WGMMA_RS_F16(shape, count, c, p0, p1, p2, p3, p4, p5)                              \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p5 ", 0; wgmma.mma_async.sync.aligned." shape  \
               ".f32.f16.f16 {" ATTN8_OPERANDS_##count "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 \
                                                       "}, %" #p4 ", p, 1, 1, 0;}"               \
               : ATTN8_D##count(c)                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                 "r"(static_cast<int>(accumulate)))
#define ATTN8_INT_REGISTER(x) "+r"(x)
#define ATTN8_FLOAT_REGISTER(x) "+f"(x)

namespace attn8::cuda::ptx {

/// d = (accumulate ? d : 0) + a b, 64 x kN x 32, both int8 and in shared memory (matrix_descriptor
/// of layout.hpp). Asynchronous: d is the tensor core's until wgmma_wait.
template <int kN>
ATTN8_DEVICE void wgmma_ss_s8(int (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 96 || kN == 128);
  if constexpr (kN == 64) {
    ATTN8_WGMMA_SS("m64n64k32", ".s32.s8.s8", 32, ATTN8_INT_REGISTER, 32, 33, 34);
  } else if constexpr (kN == 96) {
    ATTN8_WGMMA_SS("m64n96k32", ".s32.s8.s8", 48, ATTN8_INT_REGISTER, 48, 49, 50);
  } else {
    ATTN8_WGMMA_SS("m64n128k32", ".s32.s8.s8", 64, ATTN8_INT_REGISTER, 64, 65, 66);
  }
}

/// As wgmma_ss_s8 with a in registers, uint8 x int8.
template <int kN>
ATTN8_DEVICE void wgmma_rs_u8(int (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                              bool accumulate) {
  static_assert(kN == 64 || kN == 96 || kN == 128);
  if constexpr (kN == 64) {
    ATTN8_WGMMA_RS("m64n64k32", ".s32.u8.s8", 32, ATTN8_INT_REGISTER, 32, 33, 34, 35, 36, 37);
  } else if constexpr (kN == 96) {
    ATTN8_WGMMA_RS("m64n96k32", ".s32.u8.s8", 48, ATTN8_INT_REGISTER, 48, 49, 50, 51, 52, 53);
  } else {
    ATTN8_WGMMA_RS("m64n128k32", ".s32.u8.s8", 64, ATTN8_INT_REGISTER, 64, 65, 66, 67, 68, 69);
  }
}

/// As wgmma_rs_u8, float16 x float16 with float32 sums, 64 x kN x 16; b is K-major.
template <int kN>
ATTN8_DEVICE void wgmma_rs_f16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                               bool accumulate) {
  static_assert(kN == 64 || kN == 96 || kN == 128);
  if constexpr (kN == 64) {
    ATTN8_WGMMA_RS_F16("m64n64k16", 32, ATTN8_FLOAT_REGISTER, 32, 33, 34, 35, 36, 37);
  } else if constexpr (kN == 96) {
    ATTN8_WGMMA_RS_F16("m64n96k16", 48, ATTN8_FLOAT_REGISTER, 48, 49, 50, 51, 52, 53);
  } else {
    ATTN8_WGMMA_RS_F16("m64n128k16", 64, ATTN8_FLOAT_REGISTER, 64, 65, 66, 67, 68, 69);
  }
}

}  // namespace attn8::cuda::ptx

#undef ATTN8_OPERANDS_32
#undef ATTN8_OPERANDS_48
#undef ATTN8_OPERANDS_64
#undef ATTN8_D8
#undef ATTN8_D32
#undef ATTN8_D48
#undef ATTN8_D64
#undef ATTN8_WGMMA_SS
#undef ATTN8_WGMMA_RS
#undef ATTN8_WGMMA_RS_F16
#undef ATTN8_INT_REGISTER
#undef ATTN8_FLOAT_REGISTER
