// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Rows of a tensor: widening, rounding, quantizing and packing. Included inside the namespace of an
// ISA after its vocabulary; see core/kernel_table.hpp for what each function promises.

inline void load_row(const void* src, DType dtype, int64_t stride, int n, float* dst) {
  if (dtype == DType::kFloat32) {
    const auto* p = static_cast<const float*>(src);
    if (stride == 1) {
      std::memcpy(dst, p, static_cast<size_t>(n) * sizeof(float));
    } else {
      for (int i = 0; i < n; ++i) dst[i] = p[i * stride];
    }
    return;
  }
  const auto* p = static_cast<const uint16_t*>(src);
  const bool bfloat16 = dtype == DType::kBFloat16;
  int i = 0;
  if (stride == 1) {
    for (; i + 16 <= n; i += 16) {
      store(dst + i, bfloat16 ? load_bfloat16(p + i) : load_float16(p + i));
    }
  }
  for (; i < n; ++i) {
    dst[i] = bfloat16 ? bfloat16_to_float(p[i * stride]) : float16_to_float(p[i * stride]);
  }
}

inline void store_row(const float* x, int n, DType dtype, int64_t stride, void* dst) {
  if (dtype == DType::kFloat32) {
    auto* p = static_cast<float*>(dst);
    if (stride == 1) {
      std::memcpy(p, x, static_cast<size_t>(n) * sizeof(float));
    } else {
      for (int i = 0; i < n; ++i) p[i * stride] = x[i];
    }
    return;
  }
  auto* p = static_cast<uint16_t*>(dst);
  if (dtype == DType::kBFloat16) {
    for (int i = 0; i < n; ++i) p[i * stride] = float_to_bfloat16(x[i]);
    return;
  }
  int i = 0;
  if (stride == 1) {
    for (; i + 16 <= n; i += 16) store_float16(p + i, load(x + i));
  }
  for (; i < n; ++i) p[i * stride] = float_to_float16(x[i]);
}

inline uint32_t row_max_abs_bits(const float* x, int n) {
  I32 largest = zero_i32();
  int i = 0;
  for (; i + 16 <= n; i += 16) largest = max_abs_bits(largest, load(x + i));
  uint32_t bits = reduce_max_u32(largest);
  for (; i < n; ++i) {
    const uint32_t one = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu;
    bits = one > bits ? one : bits;
  }
  return bits;
}

inline void row_max_abs_bits_each(const float* x, int n, uint32_t* bits) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    store_u32(bits + i, max_abs_bits(load_u32(bits + i), load(x + i)));
  }
  for (; i < n; ++i) {
    const uint32_t one = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu;
    bits[i] = one > bits[i] ? one : bits[i];
  }
}

inline void add_to_sums(const float* x, int n, double* sums) {
  int i = 0;
  for (; i + 16 <= n; i += 16) add_to_doubles(sums + i, load(x + i));
  for (; i < n; ++i) sums[i] += static_cast<double>(x[i]);
}

inline void subtract(const float* x, const float* mean, int n, float* dst) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(dst + i, load(x + i) - load(mean + i));
  for (; i < n; ++i) dst[i] = x[i] - mean[i];
}

/// x / divisor to the last bit from the reciprocal, for divisors of at most 21 significant bits in
/// [2^-100, 2^100]: one correction makes the quotient faithful, the second one correctly rounded
/// (P. Markstein, IA-64 and Elementary Functions, theorem 8.5). A fifth of what a division takes.
ATTN8_INLINE F32 divide_by(F32 x, F32 divisor, F32 reciprocal) {
  F32 q = x * reciprocal;
  q = fused(fused(broadcast(0.0f) - q, divisor, x), reciprocal, q);
  return fused(fused(broadcast(0.0f) - q, divisor, x), reciprocal, q);
}

inline void encode(const float* x, int n, const float* scale, int scale_step, int8_t* codes) {
  int i = 0;
  const uint32_t low_bits = std::bit_cast<uint32_t>(scale[0]) & 7u;
  if (kFastFused && scale_step == 0 && low_bits == 0 && scale[0] >= 0x1p-100f &&
      scale[0] <= 0x1p100f) {
    const F32 divisor = broadcast(scale[0]);
    const F32 reciprocal = divide(broadcast(1.0f), divisor);
    for (; i + 16 <= n; i += 16) {
      store_signed_bytes(codes + i, round_to_int(divide_by(load(x + i), divisor, reciprocal)));
    }
  }
  for (; i + 16 <= n; i += 16) {
    const F32 divisor = scale_step == 0 ? broadcast(scale[0]) : load(scale + i);
    store_signed_bytes(codes + i, round_to_int(divide(load(x + i), divisor)));
  }
  for (; i < n; ++i) {
    // The sum with 1.5 * 2^23 rounds half to even and holds the integer in its low bits.
    const float rounded = x[i] / scale[i * scale_step] + 0x1.8p23f;
    codes[i] = static_cast<int8_t>(std::bit_cast<int32_t>(rounded) & 0xff);
  }
}

inline int32_t squared_length(const int8_t* codes, int n) {
  I32 sum = zero_i32();
  for (int i = 0; i < n; i += 64) {
    const I32 x = absolute_bytes(load_bytes(reinterpret_cast<const std::byte*>(codes + i)));
    dot4_u7_s8(sum, x, x);
  }
  int32_t lanes[16];
  store(lanes, sum);
  int32_t total = 0;
  for (const int32_t lane : lanes) total += lane;
  return total;
}

inline void normalize(float* x, int n, float divisor, const float* scale) {
  const F32 l = broadcast(divisor);
  for (int i = 0; i < n; i += 16) {
    F32 y = divide(load(x + i), l);
    if (scale != nullptr) y = y * load(scale + i);
    store(x + i, y);
  }
}

/// Four codes of 1: a product with them is a sum.
inline constexpr std::byte kOnes[4] = {std::byte{1}, std::byte{1}, std::byte{1}, std::byte{1}};

inline void pack_k(const int8_t* codes, int row_stride, int padded, std::byte* group,
                   int32_t* correction, int32_t* squares) {
  int done = 0;  // dims
  if constexpr (kTransposesRows) {
    for (; done + 64 <= padded; done += 64) {
      for (int key = 0; key < kKeyGroup; key += 16) {
        transpose_words(codes + key * row_stride + done, row_stride,
                        group + packed_k_offset(key, done));
      }
    }
  }
  for (int key = 0; key < kKeyGroup; ++key) {
    const int8_t* row = codes + key * row_stride;
    for (int dim = done; dim < padded; dim += 4) {
      std::memcpy(group + packed_k_offset(key, dim), row + dim, 4);
    }
  }
  for (int key = 0; key < kKeyGroup; key += 16) {
    I32 sum = zero_i32();
    I32 square = zero_i32();
    for (int dim = 0; dim < padded; dim += 4) {
      const I32 k = load_bytes(group + packed_k_offset(key, dim));
      dot4_u7_s8(sum, broadcast4(kOnes), k);
      const I32 magnitude = absolute_bytes(k);
      dot4_u7_s8(square, magnitude, magnitude);
    }
    store(correction + key, sum);
    store(squares + key, square);
  }
  for (int key = 0; key < kKeyGroup; ++key) correction[key] *= -128;
}

inline void pack_v(const int8_t* codes, int row_stride, int padded, std::byte* group) {
  for (int key = 0; key < kKeyGroup; key += 4) {
    const int8_t* rows = codes + key * row_stride;
    int done = 0;  // channels
    if constexpr (kTransposesRows) {
      for (; done + 64 <= padded; done += 64) {
        interleave_rows(rows + done, row_stride, group + packed_v_offset(key, done, padded));
      }
    }
    for (int channel = done; channel < padded; channel += 4) {
      // A 4 x 4 transpose of bytes: word r holds 4 channels of key r, word c of the result 4 keys
      // of channel c.
      uint32_t w[4];
      for (int r = 0; r < 4; ++r) std::memcpy(&w[r], rows + r * row_stride + channel, 4);
      const uint32_t even01 = (w[0] & 0x00ff00ffu) | (w[1] & 0x00ff00ffu) << 8;
      const uint32_t odd01 = (w[0] >> 8 & 0x00ff00ffu) | (w[1] & 0xff00ff00u);
      const uint32_t even23 = (w[2] & 0x00ff00ffu) | (w[3] & 0x00ff00ffu) << 8;
      const uint32_t odd23 = (w[2] >> 8 & 0x00ff00ffu) | (w[3] & 0xff00ff00u);
      const uint32_t out[4] = {(even01 & 0xffffu) | even23 << 16, (odd01 & 0xffffu) | odd23 << 16,
                               even01 >> 16 | (even23 & 0xffff0000u),
                               odd01 >> 16 | (odd23 & 0xffff0000u)};
      std::memcpy(group + packed_v_offset(key, channel, padded), out, 16);
    }
  }
}

inline void sum_v(const std::byte* group, int padded, int32_t* sums) {
  for (int channel = 0; channel < padded; channel += 16) {
    const int slab = channel / 64 * 64;
    const int64_t quad_stride = slab_width(padded, slab) * 4;
    const std::byte* v = group + slab * kKeyGroup + (channel - slab) * 4;
    I32 sum = zero_i32();
    for (int quad = 0; quad < 16; ++quad) {
      dot4_u7_s8(sum, broadcast4(kOnes), load_bytes(v + quad * quad_stride));
    }
    store(sums + channel, sum);
  }
}
