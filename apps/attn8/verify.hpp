// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "attn8/attention.hpp"
#include "measure.hpp"

namespace attn8::app {

/// What the tensors of a case hold.
enum class Data : uint8_t {
  kNormal,    ///< N(0, 1)
  kZeros,     ///< equal logits
  kOneHot,    ///< one 1 per token
  kOutliers,  ///< every seventh token 100 times larger
  kHuge,      ///< scores near the largest float (kExact: only 30 times the normal ones)
};

/// One problem of the sweep, to be run on every ISA.
struct VerifyCase {
  Shape shape;
  AttentionOptions options;
  DType dtype = DType::kFloat32;
  Data data = Data::kNormal;
  Layout out_layout = Layout::kBshd;

  [[nodiscard]] std::string label() const;
};

/// How one kernel did on one case.
struct VerifyOutcome {
  double out_ratio = 0;         ///< worst |out - oracle| / bound; at most 1
  double lse_ratio = 0;         ///< the same for the LSE
  double rel_l2 = 0;            ///< against float64 attention
  double rel_l2_emulation = 0;  ///< what the arithmetic of the mode alone costs
  std::string failure;          ///< one line; empty when everything holds
  std::string unsupported;      ///< why there was nothing to verify; of devices only
};

/// Lengths, masks, head counts, head_dims, types, granularities and data, each against each other
/// as far as a short run allows; `full` takes five times as many.
std::vector<VerifyCase> verify_cases(Mode mode, bool full);

/// Runs one case on each of the ISAs; the oracles run once. Out must stay within the oracle's
/// bound, the error against float64 within 1.1 times the emulation's, and one and three threads
/// must give the same bits.
std::vector<VerifyOutcome> verify_case(const VerifyCase& one, std::span<const Isa> isas);

/// Runs one case on a CUDA device, with the kernels' own kv_block, against the oracles of what they
/// compute. A case they do not support is no failure.
VerifyOutcome verify_on_device(const VerifyCase& one, const Context& context);

/// One line per (granularity, type) for which an ISA's codes, scales or mean differ from the
/// scalar ones, or leave [-127, 127]; empty when all agree.
std::vector<std::string> verify_quantize(std::span<const Isa> isas);

/// The ISAs this machine can run, best first.
std::vector<Isa> available_isas();

}  // namespace attn8::app
