// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cpu/parallel.hpp"

namespace attn8::cpu {

void parallel_for(const Context& context, int64_t count, void (*body)(void*, int64_t),
                  void* argument) noexcept {
  if (context.parallel_for != nullptr) {
    context.parallel_for(context.pool, count, body, argument);
    return;
  }
#if defined(ATTN8_HAS_OPENMP)
#pragma omp parallel for schedule(static, 1) num_threads(context.threads)
#endif
  for (int64_t i = 0; i < count; ++i) body(argument, i);
}

}  // namespace attn8::cpu
