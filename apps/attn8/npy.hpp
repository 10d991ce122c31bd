// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attn8/tensor.hpp"
#include "file.hpp"
#include "host_tensor.hpp"

namespace attn8::app {

/// An array as a NumPy .npy file (format 1.0 and 2.0) holds it: float32 or float16, little endian,
/// or bool, one to four axes, in C or Fortran order.
struct NpyArray {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  bool fortran_order = false;
  AlignedBytes bytes;
};

/// Reads a whole file. Whatever is not exactly such an array (wrong magic, a header that does not
/// parse, another dtype, missing or trailing bytes) is kInvalidArgument, with a line that begins
/// with `argument`, the flag the path came from.
NpyArray read_npy(const std::string& argument, const std::string& path);

/// A four-axis array of floats as a tensor; `layout` says what its axes mean.
HostTensor read_npy_tensor(const std::string& argument, const std::string& path, Layout layout);

/// A [batch, head, seqlen_q, seqlen_k] array of bool or floats as attn_mask (AttentionInputs).
HostTensor read_npy_mask(const std::string& argument, const std::string& path);

/// A float32 array [heads], or [batch, heads], as a tensor [batch or 1, 1, heads, 1].
HostTensor read_npy_heads(const std::string& argument, const std::string& path);

/// Writes `x` (float32 or float16) in the axis order `layout`; `axes` is 4, or 3 to drop the last
/// axis, whose extent is then 1.
void write_npy(const OutputFile& file, const ConstTensorView& x, Layout layout, int axes = 4);

}  // namespace attn8::app
