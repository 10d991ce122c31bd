// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "peak.hpp"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "measure.hpp"

namespace attn8::app {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Sum of the rates that `threads` threads reach when all run `work` at the same time; each call
/// of `work` handles `amount`.
double concurrent_rate(int32_t threads, double amount, const std::function<void(int32_t)>& work) {
  std::barrier start(threads);
  std::vector<double> rates(static_cast<size_t>(threads));
  const auto run = [&](int32_t thread) {
    start.arrive_and_wait();
    const auto begin = Clock::now();
    work(thread);
    rates[static_cast<size_t>(thread)] = amount / seconds_since(begin);
  };
  std::vector<std::thread> workers;
  for (int32_t t = 1; t < threads; ++t) workers.emplace_back(run, t);
  run(0);
  for (auto& worker : workers) worker.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

#if defined(__x86_64__)

// 12 independent accumulators hide the latency of every multiply-add there is (2 ports x 4 to 5
// cycles = 8 to 10). The operands are not zero: zeros would draw less power and clock higher.

#define ATTN8_REPEAT_12(op, wide)                                                                 \
  op(wide, 0) op(wide, 1) op(wide, 2) op(wide, 3) op(wide, 4) op(wide, 5) op(wide, 6) op(wide, 7) \
      op(wide, 8) op(wide, 9) op(wide, 10) op(wide, 11)
#define ATTN8_CLEAR(wide, i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n\t"
#define ATTN8_DPBUSD(wide, i) "vpdpbusd %%" #wide "13, %%" #wide "12, %%" #wide #i "\n\t"
#define ATTN8_DPBF16(wide, i) "vdpbf16ps %%" #wide "13, %%" #wide "12, %%" #wide #i "\n\t"
#define ATTN8_FMA(wide, i) "vfmadd231ps %%" #wide "13, %%" #wide "12, %%" #wide #i "\n\t"
#define ATTN8_CLOBBERS                                                                     \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14", "cc"
#define ATTN8_BURST(wide, operand, body) \
  asm volatile(ATTN8_REPEAT_12(ATTN8_CLEAR, wide) "vmovd %[bits], %%xmm12\n\t"           \
               "vpbroadcastd %%xmm12, %%" #wide "12\n\t"                                 \
               "vpbroadcastd %%xmm12, %%" #wide "13\n\t"                                 \
               ".p2align 5\n"                                                            \
               "1:\n\t" body "dec %[iterations]\n\t"                                     \
               "jnz 1b\n\t"                                                              \
               "vzeroupper"                                                              \
               : [iterations] "+r"(iterations)                                           \
               : [bits] "r"(operand)                                                     \
               : ATTN8_CLOBBERS)

constexpr uint32_t kBytes = 0x15263748;    // four codes
constexpr uint32_t kFloat = 0x3F8CCCCD;    // 1.1
constexpr uint32_t kBFloats = 0x3F8D3F8D;  // two of 1.1
constexpr uint32_t kShorts = 0x00150026;   // two widened codes

void burst_vnni(int64_t iterations) {
  ATTN8_BURST(zmm, kBytes, ATTN8_REPEAT_12(ATTN8_DPBUSD, zmm));
}
// In the encoding that the CPU has.
#define ATTN8_DPBUSD_VEX(wide, i) "%{vex%} " ATTN8_DPBUSD(wide, i)
void burst_vnni_ymm(int64_t iterations) {
  if (__builtin_cpu_supports("avx512vnni")) {
    ATTN8_BURST(ymm, kBytes, ATTN8_REPEAT_12(ATTN8_DPBUSD, ymm));
  } else {
    ATTN8_BURST(ymm, kBytes, ATTN8_REPEAT_12(ATTN8_DPBUSD_VEX, ymm));
  }
}
void burst_bfloat16(int64_t iterations) {
  ATTN8_BURST(zmm, kBFloats, ATTN8_REPEAT_12(ATTN8_DPBF16, zmm));
}
void burst_fma_zmm(int64_t iterations) {
  ATTN8_BURST(zmm, kFloat, ATTN8_REPEAT_12(ATTN8_FMA, zmm));
}
void burst_fma_ymm(int64_t iterations) {
  ATTN8_BURST(ymm, kFloat, ATTN8_REPEAT_12(ATTN8_FMA, ymm));
}

// vpmaddwd has no accumulator: each product goes through a register of its own and an addition.
#define ATTN8_MADD(wide, i)                         \
  "vpmaddwd %%" #wide "13, %%" #wide "12, %%" #wide \
  "14\n\t"                                          \
  "vpaddd %%" #wide "14, %%" #wide #i ", %%" #wide #i "\n\t"
void burst_madd_ymm(int64_t iterations) {
  ATTN8_BURST(ymm, kShorts, ATTN8_REPEAT_12(ATTN8_MADD, ymm));
}

// Reads [data, data + stride) and the three stretches of that length behind it, a few lines of each
// in turn.
void read_zmm(const std::byte* data, size_t stride) {
  for (const std::byte* end = data + stride; data < end; data += 256) {
    for (size_t i = 0; i < 4; ++i) {
      asm volatile(
          "vmovups (%0), %%zmm0\n\t"
          "vmovups 64(%0), %%zmm1\n\t"
          "vmovups 128(%0), %%zmm2\n\t"
          "vmovups 192(%0), %%zmm3" ::"r"(data + i * stride)
          : "memory", "xmm0", "xmm1", "xmm2", "xmm3");
    }
  }
  asm volatile("vzeroupper");
}

void read_ymm(const std::byte* data, size_t stride) {
  for (const std::byte* end = data + stride; data < end; data += 128) {
    for (size_t i = 0; i < 4; ++i) {
      asm volatile(
          "vmovups (%0), %%ymm0\n\t"
          "vmovups 32(%0), %%ymm1\n\t"
          "vmovups 64(%0), %%ymm2\n\t"
          "vmovups 96(%0), %%ymm3" ::"r"(data + i * stride)
          : "memory", "xmm0", "xmm1", "xmm2", "xmm3");
    }
  }
  asm volatile("vzeroupper");
}

#endif

void read_portable(const std::byte* data, size_t size) {
  uint64_t sum = 0;
  for (size_t i = 0; i < size; i += 64) {
    for (size_t j = 0; j < 64; j += 8) {
      uint64_t word = 0;
      std::memcpy(&word, data + i + j, sizeof(word));
      sum ^= word;
    }
  }
  // The compiler must believe that the sum is used.
  asm volatile("" ::"r"(sum));
}

}  // namespace

std::optional<Peak> find_peak(Isa isa, Operands operands) {
#if defined(__x86_64__)
  // Operations of an iteration: 12 instructions x products x 2 (a multiplication and an addition).
  const bool avx512 = isa == Isa::kAvx512Vnni;
  if (!avx512 && isa != Isa::kAvxVnni && isa != Isa::kAvx2) return std::nullopt;
  switch (operands) {
    case Operands::kInt8:
      if (isa == Isa::kAvxVnni) return Peak{"vpdpbusd ymm", burst_vnni_ymm, 12.0 * 32 * 2};
      return avx512 ? Peak{"vpdpbusd zmm", burst_vnni, 12.0 * 64 * 2}
                    : Peak{"vpmaddwd+vpaddd ymm", burst_madd_ymm, 12.0 * 16 * 2};
    case Operands::kBFloat16:
      if (!avx512 || !__builtin_cpu_supports("avx512bf16")) break;
      return Peak{"vdpbf16ps zmm", burst_bfloat16, 12.0 * 32 * 2};
    case Operands::kFloat32:
      return avx512 ? Peak{"vfmadd231ps zmm", burst_fma_zmm, 12.0 * 16 * 2}
                    : Peak{"vfmadd231ps ymm", burst_fma_ymm, 12.0 * 8 * 2};
  }
#else
  static_cast<void>(isa);
  static_cast<void>(operands);
#endif
  return std::nullopt;
}

std::optional<Peak> find_peak(Isa isa, Mode mode) {
  return find_peak(isa, mode == Mode::kExact ? Operands::kFloat32 : Operands::kInt8);
}

double measure_peak_gops(const Peak& peak, int32_t threads, double milliseconds) {
  // Calibrates on this thread, so that a burst lasts as long on any clock.
  int64_t iterations = 1000;
  double seconds = 0;
  while (true) {
    const auto begin = Clock::now();
    peak.burst(iterations);
    seconds = seconds_since(begin);
    if (seconds > 2e-4) break;
    iterations *= 4;
  }
  const auto wanted =
      static_cast<int64_t>(static_cast<double>(iterations) * milliseconds * 1e-3 / seconds);
  const int64_t run = std::max<int64_t>(1, wanted);
  return concurrent_rate(threads, peak.ops_per_iteration * static_cast<double>(run),
                         [&](int32_t) { peak.burst(run); }) *
         1e-9;
}

Stream::Stream(Isa isa, int32_t threads)
    // 256 MiB in total, or 64 MiB per thread on large machines: far beyond the L3 per thread.
    : isa_(isa),
      threads_(threads),
      buffer_(static_cast<size_t>(std::max(256, 64 * threads)) << 20) {
  std::memset(buffer_.data(), 1, buffer_.size());
}

double Stream::measure() {
  constexpr size_t kPage = 4096;
  const size_t stride = buffer_.size() / (4 * static_cast<size_t>(threads_)) / kPage * kPage;
  const size_t part = 4 * stride;
  return concurrent_rate(threads_, static_cast<double>(part), [&](int32_t thread) {
    const std::byte* begin = buffer_.data() + part * static_cast<size_t>(thread);
#if defined(__x86_64__)
    if (isa_ == Isa::kAvx512Vnni) return read_zmm(begin, stride);
    if (isa_ != Isa::kScalar) return read_ymm(begin, stride);
#endif
    read_portable(begin, part);
  });
}

Ceilings measure_ceilings(Isa isa, int32_t threads) {
  constexpr int kRepeats = 5;
  std::vector<Peak> peaks;
  for (const Operands operands : {Operands::kInt8, Operands::kBFloat16, Operands::kFloat32}) {
    if (const auto peak = find_peak(isa, operands)) peaks.push_back(*peak);
  }
  std::vector<std::vector<double>> rates(peaks.size());
  std::vector<double> bandwidths;
  Stream stream(isa, threads);
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    for (size_t i = 0; i < peaks.size(); ++i) {
      rates[i].push_back(measure_peak_gops(peaks[i], threads));
    }
    bandwidths.push_back(stream.measure());
  }
  Ceilings ceilings;
  ceilings.threads = threads;
  for (size_t i = 0; i < peaks.size(); ++i) {
    ceilings.rates.push_back({peaks[i].name, median(rates[i])});
  }
  ceilings.bytes_per_s = median(bandwidths);
  return ceilings;
}

nlohmann::ordered_json Ceilings::json() const {
  nlohmann::ordered_json peaks = nlohmann::ordered_json::array();
  for (const Rate& rate : rates) peaks.push_back({{"name", rate.name}, {"gops", rate.gops}});
  return {{"threads", threads}, {"peaks", peaks}, {"stream_bytes_per_s", bytes_per_s}};
}

}  // namespace attn8::app
