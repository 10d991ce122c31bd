// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attn8/tensor.hpp"

namespace attn8 {

/// Whether two valid views share a byte. Never true when they do not, however they interleave.
/// Exact where the dimensions of each lie within one another, in memory of the same order or apart,
/// as they do in tensors; gives up, with false, where neither holds and hundreds of rows meet.
bool overlap(const ConstTensorView& a, const ConstTensorView& b) noexcept;

}  // namespace attn8
