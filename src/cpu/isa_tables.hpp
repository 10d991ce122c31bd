// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/kernel_table.hpp"

// One function per file of cpu/isa.
namespace attn8 {
namespace scalar {
const KernelTable& table() noexcept;
}
namespace avx2 {
const KernelTable& table() noexcept;
}
/// AVX-VNNI in its VEX encoding, and the same from the vpdpbusd of AVX-512.
namespace avx_vnni {
const KernelTable& table() noexcept;
}
namespace avx_vnni_evex {
const KernelTable& table() noexcept;
}
namespace avx512_vnni {
const KernelTable& table() noexcept;
/// For CPUs that have AVX512-BF16 as well.
const KernelTable& table_with_bf16() noexcept;
}  // namespace avx512_vnni
}  // namespace attn8
