// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "params.hpp"
#include "ptx.hpp"

/// Tensors of the caller's as the quantize and pack kernels read them: eight channels at a time,
/// several rows in flight.
namespace attn8::cuda {

/// A [batch, seqlen, nheads, head_dim] tensor on the device, any strides.
struct SourceTensor {
  const void* data;
  int64_t stride_batch, stride_row, stride_head, stride_channel;  // elements
  bool vectors;  // channels contiguous, rows at multiples of 8 elements from a 16-byte aligned
                 // start, head_dim a multiple of 8
  const float* scale;  // of codes: one per token; else nullptr
  int64_t scale_stride_batch, scale_stride_row, scale_stride_head;
  int seqlen, nheads, head_dim;

  ATTN8_DEVICE int64_t offset(int batch, int row, int head) const {
    return batch * stride_batch + row * stride_row + head * stride_head;
  }
  ATTN8_DEVICE float token_scale(int batch, int row, int head) const {
    return ptx::ld_global(scale + batch * scale_stride_batch + row * scale_stride_row +
                          head * scale_stride_head);
  }
};

/// What a source holds.
enum class Source : int32_t { kFloat32, kFloat16, kBFloat16, kCodes };

template <Source kSource>
ATTN8_DEVICE void widen_pair(uint32_t bits, float& low, float& high) {
  if constexpr (kSource == Source::kFloat16) {
    low = ptx::half_to_float(bits & 0xFFFF);
    high = ptx::half_to_float(bits >> 16);
  } else {
    low = ptx::bfloat16_to_float(bits & 0xFFFF);
    high = ptx::as_float(bits & 0xFFFF0000u);
  }
}

ATTN8_DEVICE float signed_byte(uint32_t word, int index) {
  return static_cast<float>(static_cast<int8_t>(word >> 8 * index));
}

/// Eight floats, 16-byte aligned.
ATTN8_DEVICE void load_floats(const float* source, float (&values)[8]) {
  ATTN8_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float4 part = ptx::ld_global(reinterpret_cast<const float4*>(source) + i);
    values[4 * i] = part.x;
    values[4 * i + 1] = part.y;
    values[4 * i + 2] = part.z;
    values[4 * i + 3] = part.w;
  }
}

/// Eight channels of a row as they lie in memory. Loading is apart from widening, so that many
/// loads are in flight before the first is waited for.
template <Source kSource>
struct EightChannels {
  static constexpr int kBytes = kSource == Source::kFloat32 ? 4 : kSource == Source::kCodes ? 1 : 2;
  uint32_t words[2 * kBytes];

  /// From a multiple of 8 * kBytes.
  ATTN8_DEVICE void load(const void* source) {
    if constexpr (kSource == Source::kCodes) {
      const uint2 bits = ptx::ld_global(static_cast<const uint2*>(source));
      words[0] = bits.x;
      words[1] = bits.y;
    } else {
      ATTN8_UNROLL
      for (int i = 0; i < kBytes / 2; ++i) {
        const uint4 bits = ptx::ld_global(static_cast<const uint4*>(source) + i);
        words[4 * i] = bits.x;
        words[4 * i + 1] = bits.y;
        words[4 * i + 2] = bits.z;
        words[4 * i + 3] = bits.w;
      }
    }
  }
  /// Channel by channel, as far as there are any.
  ATTN8_DEVICE void gather(const void* data, int64_t offset, int64_t stride, int channels) {
    ATTN8_UNROLL
    for (int c = 0; c < 8; ++c) {
      if (c >= channels) continue;
      if constexpr (kSource == Source::kFloat32) {
        words[c] = ptx::as_uint(ptx::ld_global(static_cast<const float*>(data) + offset));
      } else if constexpr (kSource == Source::kCodes) {
        const int8_t code = ptx::ld_global(static_cast<const int8_t*>(data) + offset);
        words[c / 4] |= uint32_t{static_cast<uint8_t>(code)} << c % 4 * 8;
      } else {
        const uint16_t bits = ptx::ld_global(static_cast<const uint16_t*>(data) + offset);
        words[c / 2] |= uint32_t{bits} << c % 2 * 16;
      }
      offset += stride;
    }
  }
  /// As floats; codes as integers.
  ATTN8_DEVICE void widen(float (&values)[8]) const {
    ATTN8_UNROLL
    for (int i = 0; i < 8; ++i) {
      if constexpr (kSource == Source::kFloat32) {
        values[i] = ptx::as_float(words[i]);
      } else if constexpr (kSource == Source::kCodes) {
        values[i] = signed_byte(words[i / 4], i % 4);
      } else if (i % 2 == 0) {
        widen_pair<kSource>(words[i / 2], values[i], values[i + 1]);
      }
    }
  }
};

/// What stands for the offset of a row that is not there; offsets themselves may be negative.
inline constexpr int64_t kNoRow = INT64_MIN;

/// Channels [8 lane, 8 lane + 8) of kRows rows, zeros past head_dim. offset_of(i) says where row i
/// begins; kNoRow is a row of zeros.
template <Source kSource, int kRows, class OffsetOf>
ATTN8_DEVICE void load_rows(const SourceTensor& x, int lane, const OffsetOf& offset_of,
                            EightChannels<kSource> (&rows)[kRows]) {
  const int channels = x.head_dim - lane * 8;
  const bool vectors = x.vectors;
  ATTN8_UNROLL
  for (int i = 0; i < kRows; ++i) {
    rows[i] = {};
    const int64_t offset = offset_of(i);
    if (vectors && offset != kNoRow && channels > 0) {
      rows[i].load(static_cast<const int8_t*>(x.data) +
                   (offset + lane * 8) * EightChannels<kSource>::kBytes);
    }
  }
  if (vectors) return;
  ATTN8_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int64_t offset = offset_of(i);
    if (offset == kNoRow) continue;
    rows[i].gather(x.data, offset + lane * 8 * x.stride_channel, x.stride_channel, channels);
  }
}

/// One row of load_rows(), as floats.
template <Source kSource>
ATTN8_DEVICE void load8(const SourceTensor& x, int64_t offset, int lane, float (&values)[8]) {
  EightChannels<kSource> row[1];
  load_rows<kSource>(
      x, lane, [offset](int) { return offset; }, row);
  row[0].widen(values);
}

}  // namespace attn8::cuda
