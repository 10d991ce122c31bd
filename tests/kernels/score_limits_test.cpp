// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>

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

/// An Inf in V of block_channel reaches the rows that read its block, and not those that are
/// computed together with such rows but see only earlier blocks.
TEST_P(ScoreLimits, PoisonStaysInItsBlock) {
  KernelCase problem = {.seqlen_q = 128, .seqlen_k = 128, .head_dim = 4};
  problem.options.kv_block = 64;
  problem.options.v_granularity = Granularity::kBlockChannel;
  problem.options.mask.causal = true;
  KernelInputs inputs = make_inputs(problem);
  inputs.v.set(0, 100, 0, 2, std::numeric_limits<double>::infinity());
  for (const int64_t first_query : {60, 61, 62, 63}) {  // of the rows that are computed together
    problem.seqlen_q = 128 - first_query;
    KernelInputs shifted = {Tensor(DType::kFloat32, {1, problem.seqlen_q, 1, 4}), inputs.k,
                            inputs.v};
    shifted.q.fill([&](int64_t b, int64_t s, int64_t h, int64_t d) {
      return inputs.q.get(b, s + first_query, h, d);
    });
    const KernelResult result = run_kernel(problem, shifted.operands(), GetParam());
    for (int64_t s = 0; s < problem.seqlen_q; ++s) {
      EXPECT_EQ(std::isnan(result.out.get(0, s, 0, 2)), s + first_query >= 64) << "row " << s;
      EXPECT_FALSE(std::isnan(result.out.get(0, s, 0, 1))) << "row " << s;
    }
  }
}

}  // namespace
}  // namespace attn8::testing
