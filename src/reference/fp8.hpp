// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Rounding to narrow floating-point formats in software: to nearest, ties to even, straight from
/// float64 so that nothing is rounded twice.
namespace attn8::reference {

/// 8 significand bits, exponents of binary32; overflow gives Inf.
double round_bfloat16(double x) noexcept;

/// OCP FP8 E4M3: 4 significand bits, smallest normal 2^-6, largest 448. Saturates: nothing but a
/// NaN gives NaN, an Inf gives 448.
double round_e4m3(double x) noexcept;

/// OCP FP8 E5M2: 3 significand bits, smallest normal 2^-14, largest 57344; overflow gives Inf, as
/// a raw cast does.
double round_e5m2(double x) noexcept;

}  // namespace attn8::reference
