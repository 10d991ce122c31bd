// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

class ScoreLimits : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(ScoreLimits);

/// Every score of a block at one end of the score grid, those of the next at the other: each way
/// the larger block is all that counts.
TEST_P(ScoreLimits, BlocksAtOppositeEnds) {
  for (const double sign : {-1.0, 1.0}) {
    KernelCase problem = {.seqlen_q = 2, .seqlen_k = 192, .head_dim = 4};
    problem.options.kv_block = 64;
    problem.options.smooth_k = false;
    KernelInputs inputs = make_inputs(problem);
    inputs.q.fill([](int64_t, int64_t, int64_t, int64_t) { return 1e30; });
    inputs.k.fill([=](int64_t, int64_t s, int64_t, int64_t) {
      return (s / 64 % 2 == 0 ? sign : -sign) * 1e-20;
    });
    const KernelResult result = run_kernel(problem, inputs.operands(), GetParam());
    expect_matches_oracle(problem, inputs.operands(), result, GetParam());
  }
}

}  // namespace
}  // namespace attn8::testing
