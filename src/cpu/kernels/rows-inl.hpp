// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// Rows of a tensor: widening, rounding, quantizing and packing. Included inside the namespace of an
// ISA after its vocabulary; see core/kernel_table.hpp for what each function promises.

/// Longest row that a function here holds as floats.
inline constexpr int kMaxRow = 256;

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
    int i = 0;
    if (stride == 1 && row_max_abs_bits(x, n) <= kInfBits) {  // store_bfloat16() takes no NaN
      for (; i + 16 <= n; i += 16) {
        store_bfloat16<false>(reinterpret_cast<std::byte*>(p + i), load(x + i));
      }
    }
    for (; i < n; ++i) p[i * stride] = float_to_bfloat16(x[i]);
    return;
  }
  int i = 0;
  if (stride == 1) {
    for (; i + 16 <= n; i += 16) store_float16(p + i, load(x + i));
  }
  for (; i < n; ++i) p[i * stride] = float_to_float16(x[i]);
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

template <DType kType>
inline constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;
/// Bytes from what is computed to what is asked for (into L2, hence the 2 of the prefetches): 32
/// rows, where there are more than a few. Rows of a head lie apart where there are more heads,
/// which no prefetcher of the CPU follows for long.
ATTN8_INLINE int64_t bytes_ahead(int64_t row_bytes, int64_t rows) {
  return rows > 8 ? 32 * row_bytes : 0;
}

template <DType kType>
ATTN8_INLINE F32 load_elements(const void* p, int i) {
  if constexpr (kType == DType::kFloat32) return load(static_cast<const float*>(p) + i);
  if constexpr (kType == DType::kFloat16) return load_float16(static_cast<const uint16_t*>(p) + i);
  if constexpr (kType == DType::kBFloat16) {
    return load_bfloat16(static_cast<const uint16_t*>(p) + i);
  }
}

/// kCount vectors of 16 channels of `rows` rows, added to sums.
template <DType kType, int kCount>
ATTN8_INLINE void add_columns(const void* src, int64_t row_bytes, int64_t rows, int64_t ahead,
                              int channel, double* sums) {
  F64 sum[kCount];
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) sum[c] = load(sums + channel + 16 * c);
  for (int64_t r = 0; r < rows; ++r) {
    const std::byte* row = static_cast<const std::byte*>(src) + r * row_bytes;
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      __builtin_prefetch(row + ahead + (channel + 16 * c) * kBytes<kType>, 0, 2);
      add_to(sum[c], load_elements<kType>(row, channel + 16 * c));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) store(sums + channel + 16 * c, sum[c]);
}

template <DType kType>
inline void add_contiguous_rows(const void* src, int64_t row_bytes, int64_t rows, int64_t ahead,
                                int n, double* sums) {
  int i = 0;
  for (; i + 16 * kVectors <= n; i += 16 * kVectors) {
    add_columns<kType, kVectors>(src, row_bytes, rows, ahead, i, sums);
  }
  for (; i + 16 <= n; i += 16) add_columns<kType, 1>(src, row_bytes, rows, ahead, i, sums);
  for (int64_t r = 0; i < n && r < rows; ++r) {
    float rest[16];
    const auto* row = static_cast<const std::byte*>(src) + r * row_bytes;
    load_row(row + i * kBytes<kType>, kType, 1, n - i, rest);
    for (int d = i; d < n; ++d) sums[d] += static_cast<double>(rest[d - i]);
  }
}

inline void add_rows(const RowSpan& src, double* sums) {
  // Rows that fit L1 together, for each of the passes over their columns.
  constexpr int64_t kRows = 16;
  const int64_t ahead = bytes_ahead(src.row_bytes, src.rows);
  for (int64_t first = 0; first < src.rows; first += kRows) {
    const auto* p = static_cast<const std::byte*>(src.data) + first * src.row_bytes;
    const int64_t count = src.rows - first < kRows ? src.rows - first : kRows;
    if (src.stride == 1 && src.dtype == DType::kFloat32) {
      add_contiguous_rows<DType::kFloat32>(p, src.row_bytes, count, ahead, src.n, sums);
    } else if (src.stride == 1 && src.dtype == DType::kFloat16) {
      add_contiguous_rows<DType::kFloat16>(p, src.row_bytes, count, ahead, src.n, sums);
    } else if (src.stride == 1 && src.dtype == DType::kBFloat16) {
      add_contiguous_rows<DType::kBFloat16>(p, src.row_bytes, count, ahead, src.n, sums);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        float row[kMaxRow];
        load_row(p + r * src.row_bytes, src.dtype, src.stride, src.n, row);
        add_contiguous_rows<DType::kFloat32>(row, 0, 1, 0, src.n, sums);
      }
    }
  }
}

inline void subtract(const float* x, const float* mean, int n, float* dst) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(dst + i, load(x + i) - load(mean + i));
  for (; i < n; ++i) dst[i] = x[i] - mean[i];
}

/// x / divisor to the last bit from the reciprocal r, for divisors of at most 21 significant bits
/// in [2^-100, 2^100] and quotients that round to a code other than 0, in a fifth of the time of a
/// division. q = x r is off by at most 2^-23 of it, two units in its last place, so that x - q
/// divisor is exact: a multiple of the product of the last places below 2^22. Then q + (x - q
/// divisor) r differs from the quotient by at most 2^-47 of it before it is rounded, and a quotient
/// lies 2^-46 or more from every midpoint of two floats: 25 and 21 bits make a product of 46, and
/// none of an odd 25-bit number is x.
struct Divisor {
  ATTN8_INLINE static F32 divide(F32 x, F32 minus_divisor, F32 reciprocal) {
    const F32 q = x * reciprocal;
    return fused(fused(q, minus_divisor, x), reciprocal, q);
  }
  /// Whether divide() holds for this divisor.
  static bool holds(float x) {
    return kFastFused && (std::bit_cast<uint32_t>(x) & 7u) == 0 && x >= 0x1p-100f && x <= 0x1p100f;
  }
};

inline void encode(const float* x, int n, const float* scale, int scale_step, int8_t* codes) {
  int i = 0;
  if (scale_step == 0 && Divisor::holds(scale[0])) {
    const F32 minus = broadcast(-scale[0]);
    const F32 reciprocal = broadcast(1.0f / scale[0]);
    for (; i + 16 <= n; i += 16) {
      store_signed_bytes(codes + i, round_to_int(Divisor::divide(load(x + i), minus, reciprocal)));
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

/// kRows rows at a time, so that the latencies of one row's maximum and divisions are those of all.
/// value(r, i): 16 numbers of row r from the i-th on, zeros beyond n; request(r, i) asks for those
/// of a later row.
template <int kRows, class Value, class Request>
ATTN8_INLINE void quantize_values(Value value, Request request, int n, int8_t* codes,
                                  int64_t codes_stride, uint32_t* bits) {
  I32 largest[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) largest[r] = zero_i32();
  for (int i = 0; i < n; i += 16) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      request(r, i);
      largest[r] = max_abs_bits(largest[r], value(r, i));
    }
  }
  float scale[kRows];
  bool holds = true;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    bits[r] = reduce_max_u32(largest[r]);
    scale[r] = scale_from_bits(bits[r]);  // where all codes are zero, 1 or NaN: so is the quotient
    holds = holds && Divisor::holds(scale[r]);
  }
  if (holds) [[likely]] {
    F32 minus[kRows];
    F32 reciprocal[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      minus[r] = broadcast(-scale[r]);
      reciprocal[r] = broadcast(1.0f / scale[r]);
    }
    for (int i = 0; i < n; i += 16) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        store_signed_bytes(codes + r * codes_stride + i,
                           round_to_int(Divisor::divide(value(r, i), minus[r], reciprocal[r])));
      }
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < n; i += 16) {
      I32 code = zero_i32();
      if (!codes_are_zero(bits[r])) code = round_to_int(divide(value(r, i), broadcast(scale[r])));
      store_signed_bytes(codes + r * codes_stride + i, code);
    }
  }
}

/// What is subtracted where nothing is.
alignas(64) inline constexpr float kNoMean[kMaxRow] = {};

template <DType kType>
inline void quantize_contiguous_rows(const std::byte* src, int64_t row_bytes, int64_t rows, int n,
                                     const float* mean, int8_t* codes, int64_t codes_stride,
                                     uint32_t* bits) {
  const int64_t ahead = bytes_ahead(row_bytes, rows);
  const auto quantize = [&]<int kRows>(int64_t first) ATTN8_INLINE_LAMBDA {
    const std::byte* p = src + first * row_bytes;
    const auto value = [&](int r, int i) ATTN8_INLINE_LAMBDA {
      return load_elements<kType>(p + r * row_bytes, i) - load(mean + i);
    };
    const auto request = [&](int r, int i) ATTN8_INLINE_LAMBDA {
      __builtin_prefetch(p + r * row_bytes + ahead + i * kBytes<kType>, 0, 2);
    };
    quantize_values<kRows>(value, request, n, codes + first * codes_stride, codes_stride,
                           bits + first);
  };
  int64_t first = 0;
  for (; first + 4 <= rows; first += 4) quantize.template operator()<4>(first);
  for (; first < rows; ++first) quantize.template operator()<1>(first);
}

inline void quantize_rows(const RowSpan& src, const float* mean, int8_t* codes,
                          int64_t codes_stride, uint32_t* bits) {
  const auto* p = static_cast<const std::byte*>(src.data);
  if (src.stride != 1 || src.n % 16 != 0) {
    for (int64_t r = 0; r < src.rows; ++r) {
      float row[kMaxRow];
      load_row(p + r * src.row_bytes, src.dtype, src.stride, src.n, row);
      if (mean != nullptr) subtract(row, mean, src.n, row);
      int n = src.n;
      for (; n % 16 != 0; ++n) row[n] = 0;
      quantize_contiguous_rows<DType::kFloat32>(reinterpret_cast<const std::byte*>(row), 0, 1, n,
                                                kNoMean, codes + r * codes_stride, 0, bits + r);
    }
    return;
  }
  if (mean == nullptr) mean = kNoMean;
  if (src.dtype == DType::kFloat16) {
    quantize_contiguous_rows<DType::kFloat16>(p, src.row_bytes, src.rows, src.n, mean, codes,
                                              codes_stride, bits);
  } else if (src.dtype == DType::kBFloat16) {
    quantize_contiguous_rows<DType::kBFloat16>(p, src.row_bytes, src.rows, src.n, mean, codes,
                                               codes_stride, bits);
  } else {
    quantize_contiguous_rows<DType::kFloat32>(p, src.row_bytes, src.rows, src.n, mean, codes,
                                              codes_stride, bits);
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
