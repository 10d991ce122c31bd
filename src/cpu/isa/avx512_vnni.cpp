// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Compiled with this ISA's flags (cmake/isa_flags.cmake); nothing here may run before the CPU was
// asked, and nothing defined here may be shared with other files: see tests/isa_symbols.
#include <bit>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "core/element.hpp"
#include "core/kernel_table.hpp"
#include "core/packed_layout.hpp"
#include "core/quant_math.hpp"
#include "cpu/isa/simd_avx512.hpp"
#include "cpu/isa_tables.hpp"

#define ATTN8_HAS_SKEWED
namespace attn8::avx512_vnni {
namespace {
// Order matters: each file uses the ones above it.
// clang-format off
#include "cpu/kernels/rows-inl.hpp"
#include "cpu/kernels/tile_walk-inl.hpp"
#include "cpu/kernels/products-inl.hpp"
#include "cpu/kernels/online_softmax-inl.hpp"
#include "cpu/kernels/score_changes-inl.hpp"
#include "cpu/kernels/score_grid-inl.hpp"
#include "cpu/kernels/attend_accurate-inl.hpp"
#include "cpu/isa/skewed_items_avx512-inl.hpp"
#include "cpu/isa/skewed_softmax_avx512-inl.hpp"
#include "cpu/isa/attend_skewed_avx512-inl.hpp"
#include "cpu/isa/attend_few_avx512-inl.hpp"
#include "cpu/kernels/attend_paper-inl.hpp"
#include "cpu/kernels/attend_float-inl.hpp"
#include "cpu/kernels/table-inl.hpp"
// clang-format on

constexpr KernelTable kPairTable = [] {
  KernelTable table = kTable;
  table.bfloat16_pairs = true;
  table.attend = attend<true>;
  return table;
}();
}  // namespace

const KernelTable& table() noexcept { return kTable; }
const KernelTable& table_with_bf16() noexcept { return kPairTable; }

}  // namespace attn8::avx512_vnni
