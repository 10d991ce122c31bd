// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0

// The softmax of `accurate` on the score grid of docs/numerics.md: scores are integers in 1/64
// octaves, an exponential is a table and a shift. Included inside the namespace of an ISA after its
// vocabulary.

/// F[f] = 2^(f / 64).
alignas(64) constexpr float kGridPower[64] = {
    0x1p+0f,        0x1.02c9a4p+0f, 0x1.059b0ep+0f, 0x1.087452p+0f, 0x1.0b5586p+0f, 0x1.0e3ec4p+0f,
    0x1.11301ep+0f, 0x1.1429aap+0f, 0x1.172b84p+0f, 0x1.1a35bep+0f, 0x1.1d4874p+0f, 0x1.2063b8p+0f,
    0x1.2387a6p+0f, 0x1.26b456p+0f, 0x1.29e9ep+0f,  0x1.2d285ap+0f, 0x1.306fep+0f,  0x1.33c08cp+0f,
    0x1.371a74p+0f, 0x1.3a7db4p+0f, 0x1.3dea64p+0f, 0x1.4160a2p+0f, 0x1.44e086p+0f, 0x1.486a2cp+0f,
    0x1.4bfdaep+0f, 0x1.4f9b28p+0f, 0x1.5342b6p+0f, 0x1.56f474p+0f, 0x1.5ab07ep+0f, 0x1.5e76f2p+0f,
    0x1.6247ecp+0f, 0x1.662388p+0f, 0x1.6a09e6p+0f, 0x1.6dfb24p+0f, 0x1.71f75ep+0f, 0x1.75feb6p+0f,
    0x1.7a1148p+0f, 0x1.7e2f34p+0f, 0x1.82589ap+0f, 0x1.868d9ap+0f, 0x1.8ace54p+0f, 0x1.8f1aeap+0f,
    0x1.93737cp+0f, 0x1.97d82ap+0f, 0x1.9c4918p+0f, 0x1.a0c668p+0f, 0x1.a5503cp+0f, 0x1.a9e6b6p+0f,
    0x1.ae89fap+0f, 0x1.b33a2cp+0f, 0x1.b7f77p+0f,  0x1.bcc1eap+0f, 0x1.c199bep+0f, 0x1.c67f12p+0f,
    0x1.cb720ep+0f, 0x1.d072d4p+0f, 0x1.d5818ep+0f, 0x1.da9e6p+0f,  0x1.dfc974p+0f, 0x1.e502eep+0f,
    0x1.ea4afap+0f, 0x1.efa1bep+0f, 0x1.f50766p+0f, 0x1.fa7c18p+0f,
};

/// Scores further out are clamped to +-2^30, so that what one lies below another fits 32 bits
/// without a sign.
inline constexpr float kGridLimit = 0x1p30f;
/// Score of a key that a row does not see: 2^30 below every other.
inline constexpr int32_t kHiddenScore = std::numeric_limits<int32_t>::min();
/// The reference of a row that has seen no block.
inline constexpr int32_t kNoReference = std::numeric_limits<int32_t>::min();
/// How far a block's maximum may lie above the reference, and how far below before it counts for
/// nothing, in octaves: sums of 2^20 blocks times 2^60 and single ones times 2^-100 stay normal
/// floats.
inline constexpr int32_t kGridHeadroom = 60;
inline constexpr int32_t kGridDepth = -100;

/// 2^(n / 64) for n up to kGridHeadroom octaves; 0 below kGridDepth.
ATTN8_INLINE float grid_power(int32_t n) {
  const int32_t octave = n >> 6;
  if (octave < kGridDepth) return 0.0f;
  const auto bits = std::bit_cast<uint32_t>(kGridPower[n & 63]);
  return std::bit_cast<float>(bits + (static_cast<uint32_t>(octave) << 23));
}

/// What a block with this maximum does to a row: its weight, and what the past is multiplied by
/// first (1 almost always). Moves the reference.
ATTN8_INLINE void advance_reference(int32_t block_max, int32_t* ref, float* weight,
                                    float* rescale) {
  *rescale = 1.0f;
  if (block_max == kHiddenScore) {
    *weight = 0.0f;
    return;
  }
  const int32_t octave = block_max >> 6 << 6;
  if (*ref == kNoReference) {
    *ref = octave;
  } else if (block_max > *ref + kGridHeadroom * 64) [[unlikely]] {  // 2^30 + 2^30 is no int32
    *rescale = grid_power(*ref - octave);
    *ref = octave;
  }
  *weight = grid_power(block_max - *ref);
}
