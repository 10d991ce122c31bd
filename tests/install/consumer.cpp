// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cstdio>

#include "attn8/attn8.hpp"

// One key: whatever q and k are, the output is v.
int main() {
  const attn8::Extents shape = {1, 1, 1, 2};
  const std::array<float, 2> q = {1, 2};
  const std::array<float, 2> v = {3, -1.5};
  std::array<float, 2> out = {};
  const auto q_view = attn8::bshd(q.data(), attn8::DType::kFloat32, shape);
  const auto v_view = attn8::bshd(v.data(), attn8::DType::kFloat32, shape);
  const attn8::Status status =
      attn8::attention({.q = q_view, .k = q_view, .v = v_view},
                       {.out = attn8::bshd(out.data(), attn8::DType::kFloat32, shape)},
                       {.mode = attn8::Mode::kExact}, attn8::Context::cpu(1));
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    return 1;
  }
  std::printf("attn8 %.*s: %g %g\n", static_cast<int>(attn8::version().size()),
              attn8::version().data(), static_cast<double>(out[0]), static_cast<double>(out[1]));
  return out == v ? 0 : 1;
}
