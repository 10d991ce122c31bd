// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The softmax of the modes with float32 scores: one exp2, the running state of four rows.
// Included inside the namespace of an ISA after its vocabulary.

/// Coefficients of f^1.. of 2^f on [-0.5, 0.5] with the constant term fixed to 1, fitted to the
/// smallest maximum relative error: 2.82e-6 and 9.2e-8.
inline constexpr float kExp2Degree4[] = {0x1.62e12cp-1f, 0x1.ec0378p-3f, 0x1.c9fc46p-5f,
                                         0x1.3a02cap-7f};
inline constexpr float kExp2Degree5[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f,
                                         0x1.3cea88p-7f, 0x1.5bba12p-10f};

/// kScale * 2^x for x <= 0 and NaN; x below -126 counts as -126. Relative error with float32
/// rounding, for kScale 1, 127 and 255: degree 4: 3.0e-6, degree 5: 2.0e-7; exact at x = 0.
template <int kDegree, int kScale>
ATTN8_INLINE F32 exp2_scaled(F32 x) {
  static_assert(kDegree == 4 || kDegree == 5);
  constexpr auto scale = static_cast<float>(kScale);
  const float* c = kDegree == 4 ? kExp2Degree4 : kExp2Degree5;
  x = max(broadcast(-126.0f), x);  // this order keeps a NaN
  const F32 magic = broadcast(0x1.8p23f);
  const F32 shifted = x + magic;        // the integer nearest to x, in the low bits
  const F32 f = x - (shifted - magic);  // in [-0.5, 0.5]
  F32 y = broadcast(c[kDegree - 1] * scale);
#pragma GCC unroll 8
  for (int i = kDegree - 2; i >= 0; --i) y = fused(y, f, broadcast(c[i] * scale));
  y = fused(y, f, broadcast(scale));
  return scale_by_power(y, shifted);
}

/// Running state of a group of rows and what the next block does to it.
struct RowState {
  float max[kRowGroup];       ///< m, log2 units; -inf before the first visible key
  float rescale[kRowGroup];   ///< a: what the past is multiplied by
  float subtract[kRowGroup];  ///< what is subtracted from the block's scores before exp2
};

/// Advances the state by a block with these maxima (-inf where a row sees none of its keys).
ATTN8_KERNEL_INLINE void advance(RowState& state, const float* block_max, int rows) {
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  float exponent[16] = {};
  for (int r = 0; r < rows; ++r) {
    const float previous = state.max[r];
    const float next = previous > block_max[r] ? previous : block_max[r];
    // exp2 takes this as a power; a row that has seen nothing is set right below.
    exponent[r] = previous > kMinusInf ? previous - next : 0.0f;
  }
  float power[16];
  store(power, exp2_scaled<5, 1>(load(exponent)));
  for (int r = 0; r < rows; ++r) {
    state.rescale[r] = state.max[r] > kMinusInf ? power[r] : 0.0f;
    if (block_max[r] > state.max[r]) state.max[r] = block_max[r];
    state.subtract[r] = state.max[r] > kMinusInf ? state.max[r] : 0.0f;
    if (block_max[r] == kMinusInf) state.rescale[r] = 1.0f;
  }
}

/// Sum of 16 lanes in a fixed order, the same on every ISA.
inline float reduce_add(const float* lanes) {
  float sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) sum[i] += sum[i + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
