// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/params.hpp"
#include "emulator/emulator.hpp"

/// A small attention problem for kernel tests: float16 inputs, the quantize and pack kernels run in
/// the emulator, and a float64 account of docs/numerics.md written a second time in plain loops.
namespace attn8::cuda::testing {

struct Shape {
  int batch = 1, nheads_q = 1, nheads_k = 1, seqlen_q = 1, seqlen_k = 1, head_dim = 64;
  bool causal = false;
  bool top_left = false;
  int window_left = -1;
  int window_right = -1;
  int q_offset = 0;  ///< added to the position of every query
  float softcap = 0;
  bool alibi = false;                               ///< head h has slope(h)
  bool sinks = false;                               ///< head h has sink(h)
  bool attn_mask = false;                           ///< added() to every query, key and head
  std::vector<int> seqlens_k = {}, leftpad_k = {};  ///< one per batch, or none

  [[nodiscard]] int seqlen_of(int b) const { return seqlens_k.empty() ? seqlen_k : seqlens_k[b]; }
  [[nodiscard]] int leftpad_of(int b) const { return leftpad_k.empty() ? 0 : leftpad_k[b]; }
  [[nodiscard]] static float added(int head, int row, int key);  ///< in nats; -infinity hides
  [[nodiscard]] static float slope(int head) { return 0.25f / static_cast<float>(head + 1); }
  [[nodiscard]] static float sink(int head) { return 1.5f - static_cast<float>(head); }
  /// Where query 0 stands among the keys.
  [[nodiscard]] int position_offset(int b = 0) const;
  [[nodiscard]] int first_offset() const;  ///< row i sees keys from i + first_offset()
  [[nodiscard]] int last_offset() const;   ///< row i sees keys to i + last_offset()
  /// By position alone.
  [[nodiscard]] bool sees(int row, int key, int b = 0) const;
  /// Keys visible to at least one row: [first, last).
  [[nodiscard]] std::pair<int, int> visible_keys(int b = 0) const;
};

/// Float16 inputs, dense [batch, seqlen, nheads, head_dim].
struct Inputs {
  Shape shape;
  std::vector<uint16_t> q, k, v;
};
/// q is scaled by `q_size`: large values give scores that 2^score cannot hold.
Inputs random_inputs(const Shape& shape, unsigned seed, float q_size = 1.0f);

/// Codes, scales and constants by plain loops, unpacked.
struct Quantized {
  std::vector<int8_t> q, k, v;          // as the inputs
  std::vector<uint16_t> v_half;         // bfloat16, for Weights::kHalf
  std::vector<float> q_scale, k_scale;  // [batch][seqlen][nheads]
  std::vector<float> v_token_scale;     // [batch][seqlen][nheads]; 0: a token of zeros
  std::vector<float> v_scale;           // [batch][nheads][head_dim] multiplies the output
  std::vector<float> ratio;             // [batch][seqlen][nheads] r of docs/numerics.md
  std::vector<float> k_mean;            // [batch][nheads][head_dim]
};
Quantized quantize(const Inputs& inputs, Weights weights, bool smooth_k, int kv_block);

/// Packed arrays as the kernels read them.
struct Packed {
  std::vector<int8_t> q, k, v;
  std::vector<float> q_scale, key_constants, v_scale, lse_shift, slopes, sinks;
  std::vector<float> attn_mask;  // [seqlen_q][nheads_q][seqlen_k]
  int rows_q = 0, rows_k = 0;
};
/// Packs by the layout functions, without kernels; `group` heads of Q to an image, see
/// AttendParams.
Packed pack(const Inputs& inputs, const Quantized& quantized, Weights weights, int group = 1);
/// What the LSE of row (batch, query, head), in the order of the inputs, gets beside `expected`.
double expected_shift(const Shape& shape, const Packed& packed, size_t row, int group = 1);
/// Quantizes and packs with the kernels, in the emulator; "" or what went wrong.
std::string pack_with_kernels(const Inputs& inputs, Weights weights, bool smooth_k, int kv_block,
                              emulator::Async async, Packed& packed, int group = 1);

/// Attention kernel parameters over `packed`, writing float32 out and lse (dense, in the order of
/// the inputs), for heads and keys that are not divided.
AttendParams attend_params(const Shape& shape, const Packed& packed, std::vector<float>& out,
                           std::vector<float>& lse);

/// What the kernel must produce, and how far it may be off: float32 rounding, and every code so
/// close to a rounding boundary that float32 scores may round it the other way.
struct Expected {
  std::vector<double> out, bound;  // [batch, seqlen_q, nheads_q, head_dim]
  std::vector<double> lse;         // [batch, seqlen_q, nheads_q]
};
Expected expected(const Shape& shape, const Quantized& quantized, const Packed& packed,
                  Weights weights, int kv_block, int group = 1);

}  // namespace attn8::cuda::testing
