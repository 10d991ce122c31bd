// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Compiled with this ISA's flags (cmake/isa_flags.cmake); nothing here may run before the CPU was
// asked, and nothing defined here may be shared with other files: see tests/isa_symbols.
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/element.hpp"
#include "core/kernel_table.hpp"
#include "core/packed_layout.hpp"
#include "core/quant_math.hpp"
#include "cpu/isa/simd_scalar.hpp"
#include "cpu/isa_tables.hpp"

namespace attn8::scalar {
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
#include "cpu/kernels/attend_paper-inl.hpp"
#include "cpu/kernels/attend_float-inl.hpp"
#include "cpu/kernels/table-inl.hpp"
// clang-format on
}  // namespace

const KernelTable& table() noexcept { return kTable; }

}  // namespace attn8::scalar
