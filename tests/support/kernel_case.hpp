// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "support/tensors.hpp"

namespace attn8::testing {

/// Tests with one instance per ISA of the library; those this machine lacks are skipped by name.
class EachIsa : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    for (const IsaSupport& support : isa_support()) {
      if (support.isa == GetParam() && !support.available) {
        GTEST_SKIP() << to_string(GetParam()) << ": " << support.reason;
      }
    }
  }
};

inline std::string isa_test_name(const ::testing::TestParamInfo<Isa>& info) {
  return std::string(to_string(info.param));
}

#define ATTN8_INSTANTIATE_EACH_ISA(suite)                                                       \
  INSTANTIATE_TEST_SUITE_P(                                                                     \
      Isa, suite, ::testing::Values(Isa::kScalar, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512Vnni), \
      isa_test_name)

enum class Data : uint8_t { kNormal, kZeros, kOneHot, kOutliers, kHuge, kEqual, kSink };

/// What an attn_mask of a case looks like.
enum class MaskKind : uint8_t {
  kNone,
  kBool,       ///< [batch, seqlen_q, nheads_q, seqlen_k]: a third hidden, row 1 sees nothing
  kBoolKeys,   ///< [batch, 1, 1, seqlen_k]
  kAdded,      ///< [1, seqlen_q, nheads_q, seqlen_k] normal numbers, some of them -Inf
  kAddedRows,  ///< [batch, seqlen_q, 1, 1]
};

/// The operands of a case beside q, k and v.
struct ScoreOperands {
  MaskKind attn_mask = MaskKind::kNone;
  DType mask_dtype = DType::kFloat32;  ///< of kAdded and kAddedRows
  bool alibi_slopes = false;
  bool sinks = false;
  bool seqlens_k = false;
  bool leftpad_k = false;
};

/// A problem with its inputs.
struct KernelCase {
  int64_t batch = 1, seqlen_q = 0, seqlen_k = 0, nheads_q = 1, nheads_k = 1, head_dim = 0;
  int64_t head_dim_v = 0;  ///< 0: head_dim
  AttentionOptions options = {};
  DType dtype = DType::kFloat32;
  DType out_dtype = DType::kFloat32;
  Memory memory = Memory::kBshd;
  Data data = Data::kNormal;
  int32_t threads = 1;
  uint64_t seed = 1;
  ScoreOperands scores = {};

  [[nodiscard]] int64_t out_dim() const { return head_dim_v == 0 ? head_dim : head_dim_v; }
  [[nodiscard]] std::string name() const;
};

struct KernelInputs {
  Tensor q, k, v;
  std::optional<Tensor> attn_mask = {}, alibi_slopes = {}, sinks = {}, seqlens_k = {},
                        leftpad_k = {};
  [[nodiscard]] AttentionInputs operands() const;
};

KernelInputs make_inputs(const KernelCase& problem);

struct KernelResult {
  Tensor out, lse;
  std::string kernel = {};
};

/// Runs on this ISA, expecting success and that the kernel of this ISA ran.
KernelResult run_kernel(const KernelCase& problem, const AttentionInputs& inputs, Isa isa);

/// Expects the result within the emulation's derived bound (kExact: within a float32 bound of the
/// float64 oracle). Names the worst element, both values and the bound.
void expect_matches_oracle(const KernelCase& problem, const AttentionInputs& inputs,
                           const KernelResult& result, Isa isa);

/// run_kernel and expect_matches_oracle on inputs of the case.
KernelResult check_kernel(const KernelCase& problem, Isa isa);

}  // namespace attn8::testing
