// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <span>

#include "attn8/context.hpp"
#include "cpu/isa_tables.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace attn8 {
namespace {

#if defined(__x86_64__)

/// What the operating system saves on a context switch (XCR0); a register it does not save cannot
/// be used, whatever the CPU offers.
uint64_t saved_state() noexcept {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf = 0) noexcept {
  Leaf r;
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
  return r;
}

constexpr bool has(uint32_t bits, int bit) noexcept { return (bits >> bit & 1u) != 0; }

constexpr uint64_t kYmmState = 0x6;   // XMM and upper YMM halves
constexpr uint64_t kZmmState = 0xe6;  // and the opmasks and both parts of ZMM

std::string_view missing_for_avx2() noexcept {
  const Leaf one = cpuid(1);
  if (!has(one.c, 27) || (saved_state() & kYmmState) != kYmmState) {
    return "the operating system does not save AVX registers";
  }
  if (!has(cpuid(7).b, 5)) return "the CPU has no AVX2";
  if (!has(one.c, 12)) return "the CPU has no FMA";
  if (!has(one.c, 29)) return "the CPU has no F16C";
  return {};
}

std::string_view missing_for_avx512_vnni() noexcept {
  if (const std::string_view reason = missing_for_avx2(); !reason.empty()) return reason;
  if ((saved_state() & kZmmState) != kZmmState) {
    return "the operating system does not save AVX-512 registers";
  }
  const Leaf seven = cpuid(7);
  if (!has(seven.b, 16)) return "the CPU has no AVX-512F";
  if (!has(seven.b, 17)) return "the CPU has no AVX-512DQ";
  if (!has(seven.b, 30)) return "the CPU has no AVX-512BW";
  if (!has(seven.b, 31)) return "the CPU has no AVX-512VL";
  if (!has(seven.c, 1)) return "the CPU has no AVX-512VBMI";
  if (!has(seven.c, 11)) return "the CPU has no AVX-512VNNI";
  return {};
}

// Asked once: in a virtual machine CPUID goes to the hypervisor, which takes microseconds.

/// AVX-VNNI; the operating system saves what AVX2 needs.
bool has_avx_vnni() noexcept {
  static const bool has_it = cpuid(7).a >= 1 && has(cpuid(7, 1).a, 4);
  return has_it;
}

/// The 256-bit vpdpbusd of either encoding.
std::string_view missing_for_avx_vnni() noexcept {
  if (const std::string_view reason = missing_for_avx2(); !reason.empty()) return reason;
  if (has_avx_vnni() || missing_for_avx512_vnni().empty()) return {};
  return "the CPU has no AVX-VNNI";
}

/// AVX512-BF16, for a CPU that has AVX-512.
bool has_bfloat16_pairs() noexcept {
  static const bool has_it = cpuid(7).a >= 1 && has(cpuid(7, 1).a, 5);
  return has_it;
}

#else

std::string_view missing_for_avx2() noexcept { return "not an x86-64 build"; }
std::string_view missing_for_avx_vnni() noexcept { return "not an x86-64 build"; }
std::string_view missing_for_avx512_vnni() noexcept { return "not an x86-64 build"; }

#endif

}  // namespace

std::span<const IsaSupport> isa_support() noexcept {
  static const std::array<IsaSupport, 4> support = [] {
    const std::string_view avx512_vnni = missing_for_avx512_vnni();
    const std::string_view avx_vnni = missing_for_avx_vnni();
    const std::string_view avx2 = missing_for_avx2();
    return std::array<IsaSupport, 4>{{{Isa::kAvx512Vnni, avx512_vnni.empty(), avx512_vnni},
                                      {Isa::kAvxVnni, avx_vnni.empty(), avx_vnni},
                                      {Isa::kAvx2, avx2.empty(), avx2},
                                      {Isa::kScalar, true, {}}}};
  }();
  return support;
}

Isa best_isa() noexcept {
  for (const IsaSupport& support : isa_support()) {
    if (support.available) return support.isa;
  }
  return Isa::kScalar;
}

const KernelTable* find_kernel_table(Isa isa) noexcept {
  for (const IsaSupport& support : isa_support()) {
    if (support.isa == isa && !support.available) return nullptr;
  }
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
      return has_bfloat16_pairs() ? &avx512_vnni::table_with_bf16() : &avx512_vnni::table();
    case Isa::kAvxVnni:
      return has_avx_vnni() ? &avx_vnni::table() : &avx_vnni_evex::table();
    case Isa::kAvx2:
      return &avx2::table();
#else
    case Isa::kAvx512Vnni:
    case Isa::kAvxVnni:
    case Isa::kAvx2:
      return nullptr;
#endif
    case Isa::kScalar:
      return &scalar::table();
  }
  return nullptr;
}

}  // namespace attn8
