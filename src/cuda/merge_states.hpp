// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <cstdint>

#include "params.hpp"
#include "ptx.hpp"

/// Merges the attention of the same queries over disjoint sets of keys: attn8::merge_states(), with
/// its arithmetic (docs/numerics.md): weights and LSE in float64, sums over parts in float32.
namespace attn8::cuda {

struct StateOut {
  void* data;
  int64_t strides[4];  ///< of batch, query, head, channel
  Element type;
  bool vectors;  ///< four neighbouring channels may be loaded or stored at once
};
struct StateLse {
  float* data;
  int64_t strides[3];  ///< of batch, query, head
};

/// Passed by value, so that the parts need no memory of the device.
template <int kMaxStates>
struct MergeStatesParams {
  StateOut out;
  StateLse lse;  ///< data nullptr: not wanted
  int64_t rows;  ///< batch * seqlen_q * nheads
  int count;     ///< of parts
  int seqlen_q, nheads, head_dim;
  StateOut outs[kMaxStates];
  StateLse lses[kMaxStates];
};

/// One warp per row, four channels a thread and pass. Each element of a part is read by the thread
/// that writes its place in the result, before it does: the result may be a part.
template <int kMaxStates>
struct MergeStates {
  using Params = MergeStatesParams<kMaxStates>;
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / 32;
  static constexpr int kChannels = 4;
  static constexpr uint32_t kSharedBytes = kRows * kMaxStates * 8;
  /// Stands for the weight of a part that saw no key.
  static constexpr double kEmpty = -1;

  static ATTN8_DEVICE float load(const StateOut& x, int64_t at) {
    if (x.type == Element::kFloat32) return ptx::ld_written(static_cast<const float*>(x.data) + at);
    const uint32_t bits = ptx::ld_written(static_cast<const uint16_t*>(x.data) + at);
    return x.type == Element::kFloat16 ? ptx::half_to_float(bits) : ptx::bfloat16_to_float(bits);
  }
  static ATTN8_DEVICE void load(const StateOut& x, int64_t at, int channels,
                                float (&value)[kChannels]) {
    if (!x.vectors || channels < kChannels) {
      ATTN8_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        value[i] = i < channels ? load(x, at + i * x.strides[3]) : 0.0f;
      }
    } else if (x.type == Element::kFloat32) {
      const float4 four =
          ptx::ld_written(reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + at));
      value[0] = four.x;
      value[1] = four.y;
      value[2] = four.z;
      value[3] = four.w;
    } else {
      const int2 four =
          ptx::ld_written(reinterpret_cast<const int2*>(static_cast<const uint16_t*>(x.data) + at));
      const uint32_t words[2] = {static_cast<uint32_t>(four.x), static_cast<uint32_t>(four.y)};
      ATTN8_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        const uint32_t bits = words[i / 2] >> (i % 2 * 16) & 0xFFFF;
        value[i] =
            x.type == Element::kFloat16 ? ptx::half_to_float(bits) : ptx::bfloat16_to_float(bits);
      }
    }
  }

  static ATTN8_DEVICE void store(const StateOut& x, int64_t at, int channels,
                                 const float (&value)[kChannels]) {
    if (x.type == Element::kFloat32) {
      float* out = static_cast<float*>(x.data) + at;
      if (x.vectors && channels >= kChannels) {
        ptx::st_global(reinterpret_cast<float4*>(out),
                       float4{value[0], value[1], value[2], value[3]});
        return;
      }
      ATTN8_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        if (i < channels) ptx::st_global(out + i * x.strides[3], value[i]);
      }
      return;
    }
    uint32_t words[2];
    ATTN8_UNROLL
    for (int i = 0; i < 2; ++i) {
      words[i] = x.type == Element::kFloat16 ? ptx::pack_half2(value[2 * i], value[2 * i + 1])
                                             : ptx::pack_bfloat162(value[2 * i], value[2 * i + 1]);
    }
    uint16_t* out = static_cast<uint16_t*>(x.data) + at;
    if (x.vectors && channels >= kChannels) {
      ptx::st_global(reinterpret_cast<int2*>(out),
                     int2{static_cast<int>(words[0]), static_cast<int>(words[1])});
      return;
    }
    ATTN8_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      if (i < channels) {
        ptx::st_global(out + i * x.strides[3], static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
      }
    }
  }

  static ATTN8_DEVICE void run(const Params& p) {
    const int warp = ptx::thread_index() / 32;
    const int lane = ptx::thread_index() % 32;
    const int64_t row = static_cast<int64_t>(ptx::block_x()) * kRows + warp;
    if (row >= p.rows) return;
    const int64_t head = row % p.nheads;
    const int64_t query = row / p.nheads % p.seqlen_q;
    const int64_t batch = row / p.nheads / p.seqlen_q;
    const auto lse_address = [&](const StateLse& x) {
      return x.data + batch * x.strides[0] + query * x.strides[1] + head * x.strides[2];
    };
    const auto row_offset = [&](const StateOut& x) {
      return batch * x.strides[0] + query * x.strides[1] + head * x.strides[2];
    };
    const uint32_t weights = ptx::smem_base() + warp * (kMaxStates * 8);

    // A NaN, which the maximum passes over, reaches the sum all the same.
    float largest = -INFINITY;
    for (int i = lane; i < p.count; i += 32) {
      largest = ptx::max(largest, ptx::ld_written(lse_address(p.lses[i])));
    }
    ATTN8_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      largest = ptx::max(largest, ptx::shfl_xor(largest, step));
    }
    const double reference = largest;
    for (int i = lane; i < p.count; i += 32) {
      const float lse = ptx::ld_written(lse_address(p.lses[i]));
      ptx::st_shared(weights + i * 8, lse == -INFINITY ? kEmpty : exp(lse - reference));
    }
    ptx::sync_warp();
    double sum = 0;
    for (int i = 0; i < p.count; ++i) {
      const double weight = ptx::ld_shared<double>(weights + i * 8);
      if (weight != kEmpty) sum += weight;
    }
    ptx::sync_warp();
    for (int i = lane; i < p.count; i += 32) {
      const double weight = ptx::ld_shared<double>(weights + i * 8);
      if (weight != kEmpty) ptx::st_shared(weights + i * 8, weight / sum);
    }
    ptx::sync_warp();

    const int64_t target = row_offset(p.out);
    for (int column = lane * kChannels; column < p.head_dim; column += 32 * kChannels) {
      const int channels = p.head_dim - column;
      // x + -0 is x for every x, -0 included: a single part goes through unchanged.
      const float start = sum == 0 ? 0.0f : -0.0f;
      float total[kChannels] = {start, start, start, start};
      for (int i = 0; i < p.count; ++i) {
        const double exact_weight = ptx::ld_shared<double>(weights + i * 8);
        if (exact_weight == kEmpty) continue;
        const auto weight = static_cast<float>(exact_weight);
        const StateOut& part = p.outs[i];
        float value[kChannels];
        load(part, row_offset(part) + column * part.strides[3], channels, value);
        ATTN8_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          total[c] = ptx::add(total[c], ptx::mul(weight, value[c]));
        }
      }
      store(p.out, target + column * p.out.strides[3], channels, total);
    }
    // After the barriers above: it may be the memory of a part's.
    if (p.lse.data != nullptr && lane == 0) {
      ptx::st_global(lse_address(p.lse),
                     sum == 0 ? -INFINITY : static_cast<float>(reference + log(sum)));
    }
  }
};

}  // namespace attn8::cuda
