// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "core/packed_layout.hpp"

#include <array>
#include <cstdint>
#include <vector>

#include "core/kernel_table.hpp"
#include "support/kernel_case.hpp"

namespace attn8::testing {
namespace {

constexpr int64_t kDims[] = {1, 3, 4, 15, 16, 17, 63, 64, 65, 80, 127, 128, 200, 255, 256};

TEST(PackedLayout, Sizes) {
  EXPECT_EQ(round_up(0, 16), 0);
  EXPECT_EQ(round_up(1, 16), 16);
  EXPECT_EQ(round_up(16, 16), 16);
  EXPECT_EQ(round_up(17, 16), 32);
  EXPECT_EQ(padded_dim(1), 16);
  EXPECT_EQ(padded_dim(80), 80);
  EXPECT_EQ(padded_dim(81), 96);
  EXPECT_EQ(padded_dim(256), 256);
  EXPECT_EQ(key_groups(0), 0);
  EXPECT_EQ(key_groups(1), 1);
  EXPECT_EQ(key_groups(64), 1);
  EXPECT_EQ(key_groups(65), 2);
}

/// P's order is what packing four vectors of 16 s32 by lanes of 128 bits gives: packssdw of
/// vectors 0, 1 and of 2, 3, then packuswb of the two.
TEST(PackedLayout, PositionsArePackingOrder) {
  std::array<int, 64> order{};
  for (int lane = 0; lane < 4; ++lane) {
    // Of lane `lane`: 4 numbers of each vector, in the order of the vectors.
    for (int vector = 0; vector < 4; ++vector) {
      for (int i = 0; i < 4; ++i) order[lane * 16 + vector * 4 + i] = vector * 16 + lane * 4 + i;
    }
  }
  for (int position = 0; position < 64; ++position) {
    EXPECT_EQ(p_position(order[position]), position) << "key " << order[position];
  }
}

/// The 16-bit scores of 32 keys are what packssdw makes of two vectors of 16.
TEST(PackedLayout, ScorePositionsArePackingOrder) {
  std::array<int, 64> order{};
  for (int half = 0; half < 2; ++half) {
    for (int lane = 0; lane < 4; ++lane) {
      for (int i = 0; i < 8; ++i) {
        order[half * 32 + lane * 8 + i] = half * 32 + i / 4 * 16 + lane * 4 + i % 4;
      }
    }
  }
  for (int position = 0; position < 64; ++position) {
    EXPECT_EQ(score_position(order[position]), position) << "key " << order[position];
  }
}

/// Four rows of Q share their bytes; each (row, dim) has one.
TEST(PackedLayout, QueryOffsetsFillTheTile) {
  for (const int64_t dim : kDims) {
    const int64_t padded = padded_dim(dim);
    std::vector<int> used(static_cast<size_t>(8 * padded));
    for (int64_t row = 0; row < 8; ++row) {
      for (int64_t d = 0; d < padded; ++d) {
        ++used.at(static_cast<size_t>(packed_q_offset(row, d, padded)));
        ASSERT_EQ(packed_q_offset(row, d, padded) - packed_q_offset(row, d / 4 * 4, padded), d % 4);
      }
    }
    EXPECT_EQ(used, std::vector<int>(used.size(), 1)) << "head_dim " << dim;
  }
}

/// The parts of a block follow one another without overlap.
TEST(PackedLayout, BlocksHoldTheirParts) {
  for (const int64_t dim : kDims) {
    const auto padded = static_cast<size_t>(padded_dim(dim));
    const BlockLayout codes = block_layout(192, dim, 1, 1, true);
    EXPECT_EQ(codes.k - codes.records, 3 * sizeof(KeyRecord));
    EXPECT_EQ(codes.v - codes.k, 192 * padded);
    EXPECT_EQ(codes.bytes - codes.v, 192 * padded);
    EXPECT_EQ(codes.channel_scale - codes.mean, padded * sizeof(float));
    EXPECT_EQ(codes.header_bytes - codes.channel_scale, padded * sizeof(float));
    const BlockLayout floats = block_layout(64, dim, 4, 2, false);
    EXPECT_EQ(floats.v - floats.k, 64 * static_cast<size_t>(dim) * 4);
    EXPECT_EQ(floats.bytes - floats.v, 64 * padded * 2);
    EXPECT_EQ(floats.header_bytes, sizeof(BlockHeader) + 64);
  }
}

/// Each byte of a group belongs to exactly one (key, dim).
TEST(PackedLayout, OffsetsFillTheGroup) {
  for (const int64_t dim : kDims) {
    const int64_t qk = padded_dim(dim);
    const int64_t v = padded_dim(dim);
    std::vector<int> used_k(static_cast<size_t>(kKeyGroup * qk));
    std::vector<int> used_v(static_cast<size_t>(kKeyGroup * v));
    for (int64_t key = 0; key < kKeyGroup; ++key) {
      for (int64_t d = 0; d < qk; ++d) {
        ++used_k.at(static_cast<size_t>(packed_k_offset(key, d)));
      }
      for (int64_t d = 0; d < v; ++d) {
        ++used_v.at(static_cast<size_t>(packed_v_offset(key, d, v)));
      }
    }
    EXPECT_EQ(used_k, std::vector<int>(used_k.size(), 1)) << "head_dim " << dim;
    EXPECT_EQ(used_v, std::vector<int>(used_v.size(), 1)) << "head_dim " << dim;
  }
}

/// Four dims of a key of K, and the four keys of a quad of a channel of V, are one word; vectors
/// of 16 keys or 16 channels are 64 bytes in a row.
TEST(PackedLayout, OperandsOfOneInstructionAreAdjacent) {
  for (const int64_t dim : kDims) {
    const int64_t v = padded_dim(dim);
    for (int64_t key = 0; key < kKeyGroup; ++key) {
      for (int64_t d = 0; d < padded_dim(dim); ++d) {
        ASSERT_EQ(packed_k_offset(key, d) - packed_k_offset(key, d / 4 * 4), d % 4);
        ASSERT_EQ(packed_k_offset(key, d) - packed_k_offset(0, d), key * 4);
      }
      for (int64_t d = 0; d < v; ++d) {
        ASSERT_EQ(packed_v_offset(key, d, v) - packed_v_offset(key / 4 * 4, d, v), key % 4);
        ASSERT_EQ(packed_v_offset(key, d, v) - packed_v_offset(key, d / 16 * 16, v), d % 16 * 4);
        ASSERT_EQ(packed_v_offset(key / 4 * 4, d / 16 * 16, v) % 64, 0);
      }
    }
  }
}

class Packing : public EachIsa {};
ATTN8_INSTANTIATE_EACH_ISA(Packing);

/// What the kernels pack lies where the offsets say, whatever the stride of the rows.
TEST_P(Packing, WritesWhereTheOffsetsSay) {
  const KernelTable* table = find_kernel_table(GetParam());
  ASSERT_NE(table, nullptr);
  for (const int64_t dim : kDims) {
    for (const int64_t gap : {0, 3}) {
      const int64_t qk = padded_dim(dim);
      const int64_t v = padded_dim(dim);
      const int64_t stride = v + gap;
      std::vector<int8_t> codes(static_cast<size_t>(kKeyGroup * stride));
      for (size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<int8_t>(static_cast<int>(i * 37 % 255) - 127);
      }
      const auto code = [&](int64_t key, int64_t d) {
        return codes[static_cast<size_t>(key * stride + d)];
      };
      constexpr std::byte kGuard{0xa5};
      std::vector<std::byte> k_group(static_cast<size_t>(kKeyGroup * qk) + 64, kGuard);
      std::vector<std::byte> v_group(static_cast<size_t>(kKeyGroup * v) + 64, kGuard);
      std::array<int32_t, kKeyGroup> correction{};
      std::array<int32_t, kKeyGroup> squares{};
      const auto row_stride = static_cast<int>(stride);
      table->pack_k(codes.data(), row_stride, static_cast<int>(qk), k_group.data(),
                    correction.data(), squares.data());
      table->pack_v(codes.data(), row_stride, static_cast<int>(v), v_group.data());
      for (int64_t key = 0; key < kKeyGroup; ++key) {
        int32_t sum = 0;
        int32_t square = 0;
        for (int64_t d = 0; d < qk; ++d) {
          sum += code(key, d);
          square += code(key, d) * code(key, d);
          ASSERT_EQ(std::to_integer<int8_t>(k_group[static_cast<size_t>(packed_k_offset(key, d))]),
                    code(key, d))
              << "K key " << key << " dim " << d << " head_dim " << dim;
        }
        ASSERT_EQ(correction[static_cast<size_t>(key)], -128 * sum) << "head_dim " << dim;
        ASSERT_EQ(squares[static_cast<size_t>(key)], square) << "head_dim " << dim;
        for (int64_t d = 0; d < v; ++d) {
          ASSERT_EQ(
              std::to_integer<int8_t>(v_group[static_cast<size_t>(packed_v_offset(key, d, v))]),
              code(key, d))
              << "V key " << key << " channel " << d << " head_dim " << dim;
        }
      }
      for (size_t i = 0; i < 64; ++i) {
        ASSERT_EQ(k_group[k_group.size() - 64 + i], kGuard);
        ASSERT_EQ(v_group[v_group.size() - 64 + i], kGuard);
      }
    }
  }
}

}  // namespace
}  // namespace attn8::testing
