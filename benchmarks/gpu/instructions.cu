// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "cuda/ptx.hpp"

/// How many cycles of one scheduler the softmax's instructions take: what decides between an
/// integer conversion and a magic number, between the exponential unit and a polynomial, and
/// between rescaling an output at every block and only when its maximum moves.

namespace {

namespace ptx = attn8::cuda::ptx;

constexpr int kValues = 16;  // independent chains of a thread
constexpr int kTurns = 256;
constexpr int kMaxWarps = 16;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23

/// 2^x for x in [-60, 60] without the exponential unit: a degree-4 polynomial, error 2^-14.
__device__ __forceinline__ float polynomial_ex2(float x) {
  const float whole = ptx::add(x, kMagic);
  const float f = ptx::add(x, -ptx::add(whole, -kMagic));
  float p = ptx::fma(f, 0.0096181f, 0.0555041f);
  p = ptx::fma(p, f, 0.2402265f);
  p = ptx::fma(p, f, 0.6931472f);
  p = ptx::fma(p, f, 1.0f);
  return ptx::as_float(ptx::as_uint(p) + (ptx::as_uint(whole) << 23));
}

struct IntegerConversion {
  static constexpr const char* kName = "int -> float, conversion";
  static __device__ float step(float x, float, float) {
    return static_cast<float>(static_cast<int>(ptx::as_uint(x)));
  }
};
struct MagicConversion {
  static constexpr const char* kName = "int -> float, add to the bits and subtract";
  static __device__ float step(float x, float, float) {
    return ptx::add(ptx::as_float(ptx::as_uint(x) + 0x4B400000u), -kMagic);
  }
};
struct ExponentialUnit {
  static constexpr const char* kName = "2^x, exponential unit";
  static __device__ float step(float x, float, float) { return ptx::ex2(x); }
};
/// Pairs of float16: whether weights of half the size would take half the time.
struct HalfExponentialUnit {
  static constexpr const char* kName = "2^x of two float16, exponential unit";
  static __device__ float step(float x, float, float) {
    uint32_t y;
    asm("ex2.approx.f16x2 %0, %1;" : "=r"(y) : "r"(ptx::as_uint(x)));
    return ptx::as_float(y);
  }
};
struct PackHalf {
  static constexpr const char* kName = "two floats -> two float16";
  static __device__ float step(float x, float a, float) {
    return ptx::as_float(ptx::pack_half2(x, a));
  }
};
struct MultiplyHalf {
  static constexpr const char* kName = "two float16 times two float16";
  static __device__ float step(float x, float a, float) {
    uint32_t y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(ptx::as_uint(x)), "r"(ptx::as_uint(a)));
    return ptx::as_float(y);
  }
};
struct MaximumHalf {
  static constexpr const char* kName = "maximum of three pairs of 16 bits";
  static __device__ float step(float x, float a, float b) {
    return ptx::as_float(__vimax3_u16x2(ptx::as_uint(x), ptx::as_uint(a), ptx::as_uint(b)));
  }
};
struct Maximum {
  static constexpr const char* kName = "maximum of three integers";
  static __device__ float step(float x, float a, float b) {
    return ptx::as_float(static_cast<uint32_t>(ptx::max3(static_cast<int>(ptx::as_uint(x)),
                                                         static_cast<int>(ptx::as_uint(a)),
                                                         static_cast<int>(ptx::as_uint(b)))));
  }
};
struct Polynomial {
  static constexpr const char* kName = "2^x, polynomial of degree 4";
  static __device__ float step(float x, float, float) { return polynomial_ex2(x); }
};
/// An output is the sum of products that arrive as integers.
struct Accumulate {
  static constexpr const char* kName = "output, o += product scale";
  static __device__ float step(float x, float a, float b) { return ptx::fma(b, a, x); }
};
struct Rescale {
  static constexpr const char* kName = "output, o = o shrink + product scale";
  static __device__ float step(float x, float a, float b) { return ptx::fma(b, a, ptx::mul(x, a)); }
};

/// When a warp began and ended; those of a block run on one multiprocessor and share its clock.
struct Span {
  long long begin, end;
};

template <class Operation>
__global__ void measure(float* data, float a, float b, Span* spans) {
  float x[kValues];
  for (int i = 0; i < kValues; ++i) x[i] = data[i];
  __syncthreads();
  const long long begin = clock64();  // after the barrier, which lets warps go one by one
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      x[i] = Operation::step(x[i], a, b);
      asm volatile("" : "+f"(x[i]));
    }
  }
  const long long end = clock64();
  float sum = 0;
  for (int i = 0; i < kValues; ++i) sum += x[i];
  data[kValues + threadIdx.x] = sum;
  if (threadIdx.x % 32 == 0) spans[threadIdx.x / 32] = {begin, end};
}

template <class Operation>
bool report(float* data, Span* spans) {
  std::printf("%-44s", Operation::kName);
  for (const int warps : {4, 8, kMaxWarps}) {
    float values[kValues];
    for (int i = 0; i < kValues; ++i) values[i] = 0.25f * static_cast<float>(i) - 2;
    cudaMemcpy(data, values, sizeof values, cudaMemcpyHostToDevice);
    measure<Operation><<<1, 32 * warps>>>(data, 0.99f, 1e-3f, spans);
    measure<Operation><<<1, 32 * warps>>>(data, 0.99f, 1e-3f, spans);
    Span got[kMaxWarps];
    const cudaError_t error = cudaMemcpy(got, spans, sizeof got, cudaMemcpyDeviceToHost);
    if (error != cudaSuccess) {
      std::printf(" %s\n", cudaGetErrorString(error));
      return false;
    }
    Span all = got[0];
    for (int warp = 1; warp < warps; ++warp) {
      all.begin = std::min(all.begin, got[warp].begin);
      all.end = std::max(all.end, got[warp].end);
    }
    const double steps = static_cast<double>(kValues) * kTurns * warps / 4;
    std::printf("  %6.2f", static_cast<double>(all.end - all.begin) / steps);
  }
  std::printf("\n");
  return true;
}

}  // namespace

int main() {
  float* data = nullptr;
  Span* spans = nullptr;
  if (cudaMalloc(&data, (kValues + 1024) * sizeof(float)) != cudaSuccess ||
      cudaMalloc(&spans, kMaxWarps * sizeof(Span)) != cudaSuccess) {
    std::printf("no CUDA device can be used\n");
    return 1;
  }
  std::printf("%-44s  cycles of a scheduler per warp, with 1, 2 and 4 warps on it\n", "");
  const bool ok = report<IntegerConversion>(data, spans) && report<MagicConversion>(data, spans) &&
                  report<ExponentialUnit>(data, spans) &&
                  report<HalfExponentialUnit>(data, spans) && report<PackHalf>(data, spans) &&
                  report<MultiplyHalf>(data, spans) && report<MaximumHalf>(data, spans) &&
                  report<Maximum>(data, spans) && report<Polynomial>(data, spans) &&
                  report<Accumulate>(data, spans) && report<Rescale>(data, spans);
  return ok ? 0 : 1;
}
