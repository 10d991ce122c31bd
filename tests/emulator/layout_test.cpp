// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "cuda/layout.hpp"
#include "cuda/params.hpp"

#include <gtest/gtest.h>

#include <array>
#include <set>
#include <utility>
#include <vector>

/// layout.hpp exhaustively: every index function is a bijection onto what it describes, and the
/// parts fit each other. The emulator's own account of the PTX ISA is compared in
/// instructions_test.cpp.
namespace attn8::cuda {
namespace {

TEST(Fragment, AHoldsEveryByteOnce) {
  std::set<std::pair<int, int>> seen;
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      for (int byte = 0; byte < 4; ++byte) {
        const int row = a_row(lane, reg);
        const int column = a_byte(lane, reg) + byte;
        EXPECT_TRUE(row >= 0 && row < 16 && column >= 0 && column < 32);
        EXPECT_TRUE(seen.emplace(row, column).second) << row << ' ' << column;
      }
    }
  }
  EXPECT_EQ(seen.size(), 16u * 32u);
}

TEST(Fragment, BHoldsEveryByteOnce) {
  std::set<std::pair<int, int>> seen;
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 2; ++reg) {
      for (int byte = 0; byte < 4; ++byte) seen.emplace(b_column(lane), b_byte(lane, reg) + byte);
    }
  }
  EXPECT_EQ(seen.size(), 8u * 32u);
  EXPECT_EQ(*seen.begin(), std::pair(0, 0));
  EXPECT_EQ(*seen.rbegin(), std::pair(7, 31));
}

TEST(Fragment, CHoldsEveryElementOnce) {
  for (const int columns : {8, 64, 128, 256}) {
    std::set<std::pair<int, int>> seen;
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < columns / 2; ++i) seen.emplace(c_row(lane, i), c_column(lane, i));
    }
    EXPECT_EQ(seen.size(), 16u * static_cast<size_t>(columns));
    EXPECT_EQ(*seen.rbegin(), std::pair(15, columns - 1));
  }
}

/// ldmatrix gives lane l of matrix m the 4 bytes l % 4 of the row that lane 8 m + l / 4 points at.
TEST(Fragment, LdmatrixFillsA) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int source = 8 * matrix + lane / 4;
      EXPECT_EQ(ldmatrix_a_row(source), a_row(lane, matrix));
      EXPECT_EQ(ldmatrix_a_byte(source) + lane % 4 * 4, a_byte(lane, matrix));
    }
  }
}

TEST(Fragment, LdmatrixFillsTwoB) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int source = 8 * matrix + lane / 4;
      EXPECT_EQ(ldmatrix_b_column(source), b_column(lane) + matrix / 2 * 8);
      EXPECT_EQ(ldmatrix_b_byte(source) + lane % 4 * 4, b_byte(lane, matrix % 2));
    }
  }
}

TEST(PackedKey, IsTheTableAndItsInverse) {
  constexpr std::array<int, 16> kKeys = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
  for (int64_t position = 0; position < 4096; ++position) {
    EXPECT_EQ(packed_key(position), position / 16 * 16 + kKeys[static_cast<size_t>(position % 16)]);
    EXPECT_EQ(packed_position(packed_key(position)), position);
    EXPECT_EQ(packed_key(packed_position(position)), position);
  }
  constexpr int64_t kFar = (int64_t{1} << 40) + 5;
  EXPECT_EQ(packed_key(packed_position(kFar)), kFar);
}

/// What the order is for: the four scores a thread holds of 16 keys are, as bytes, its A register.
TEST(PackedKey, TurnsScoresIntoAFragment) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 2; ++half) {  // registers r and r + 2: 16 keys each
      for (int r = 0; r < 2; ++r) {         // rows g and g + 8
        // Elements of C groups 2 half and 2 half + 1, packed low byte first.
        const int groups = half * 2;
        const std::array<int, 4> elements = {groups * 4 + r * 2, groups * 4 + r * 2 + 1,
                                             groups * 4 + 4 + r * 2, groups * 4 + 4 + r * 2 + 1};
        for (int byte = 0; byte < 4; ++byte) {
          const int reg = half * 2 + r;
          const int element = elements[static_cast<size_t>(byte)];
          EXPECT_EQ(c_row(lane, element), a_row(lane, reg));
          EXPECT_EQ(c_column(lane, element), packed_key(a_byte(lane, reg) + byte));
        }
      }
    }
  }
}

TEST(Swizzle, IsAnInvolutionWithinAPattern) {
  for (const uint32_t span : {32u, 64u, 128u}) {
    std::set<uint32_t> seen;
    for (uint32_t offset = 0; offset < 8 * span; ++offset) {
      const uint32_t there = swizzle(offset, span);
      EXPECT_EQ(swizzle(there, span), offset);
      EXPECT_EQ(there / span, offset / span) << "bytes stay in their row";
      EXPECT_EQ(there % 16, offset % 16) << "16-byte chunks stay whole";
      seen.insert(there);
    }
    EXPECT_EQ(seen.size(), 8 * span);
    // The pattern repeats after 8 rows of 128 bytes at the latest.
    for (uint32_t offset = 0; offset < 1024; ++offset) {
      EXPECT_EQ(swizzle(offset + 1024, span), swizzle(offset, span) + 1024);
    }
  }
}

template <class Tile>
void check_tile() {
  static_assert(Tile::kPanels * Tile::kSpan == Tile::kRowBytes);
  std::set<uint32_t> seen;
  for (uint32_t row = 0; row < Tile::kRows; ++row) {
    for (uint32_t byte = 0; byte < Tile::kRowBytes; ++byte) {
      const uint32_t offset = Tile::offset(row, byte);
      EXPECT_LT(offset, static_cast<uint32_t>(Tile::kBytes));
      EXPECT_EQ(offset, Tile::offset(row, byte & ~15u) + byte % 16);
      seen.insert(offset);
    }
  }
  EXPECT_EQ(seen.size(), static_cast<size_t>(Tile::kBytes));
  // Eight rows read at one column (an ldmatrix phase) and the chunks of eight neighbouring lanes (a
  // cp.async phase) touch every bank once.
  for (uint32_t first = 0; first < Tile::kRows; first += 8) {
    for (uint32_t byte = 0; byte < Tile::kRowBytes; byte += 16) {
      std::set<uint32_t> banks;
      for (uint32_t row = 0; row < 8; ++row) {
        banks.insert(Tile::offset(first + row, byte) / 16 % 8);
      }
      EXPECT_EQ(banks.size(), 8u) << "rows from " << first << ", byte " << byte;
    }
  }
}

TEST(SharedTile, IsABijectionWithoutBankConflicts) {
  check_tile<SharedTile<64, 32>>();
  check_tile<SharedTile<64, 64>>();
  check_tile<SharedTile<128, 96>>();
  check_tile<SharedTile<128, 128>>();
  check_tile<SharedTile<128, 256>>();
  check_tile<SharedTile<256, 128>>();
}

/// advance() from every fragment's start, in the tile and at an address, is offset().
template <class Tile>
void check_advance() {
  constexpr uint32_t kAddress = 5 * 1024;
  for (uint32_t row = 0; row < Tile::kRows; ++row) {
    for (uint32_t byte = 0; byte < 32; ++byte) {
      const uint32_t start = Tile::offset(row, byte);
      for (uint32_t rows = 0; row + rows < Tile::kRows; rows += 8) {
        for (uint32_t bytes = 0; bytes < Tile::kRowBytes; bytes += 32) {
          const uint32_t end = Tile::offset(row + rows, byte + bytes);
          ASSERT_EQ(Tile::advance(start, rows, bytes), end);
          ASSERT_EQ(Tile::advance(kAddress + start, rows, bytes), kAddress + end);
        }
      }
    }
  }
}

TEST(SharedTile, AdvanceIsADifferenceOfOffsets) {
  check_advance<SharedTile<64, 32>>();
  check_advance<SharedTile<64, 64>>();
  check_advance<SharedTile<128, 96>>();
  check_advance<SharedTile<128, 128>>();
  check_advance<SharedTile<64, 256>>();
  check_advance<SharedTile<64, 512>>();
}

/// The swizzle of operand_offset(), as hardware applies it to the address, is offset().
template <class Tile>
void check_operand() {
  for (uint32_t row = 0; row < Tile::kRows; row += 8) {
    for (uint32_t byte = 0; byte < Tile::kRowBytes; byte += 32) {
      const uint32_t start = Tile::operand_offset(row, byte);
      for (uint32_t r = 0; r < 8; ++r) {
        for (uint32_t b = 0; b < 32; ++b) {
          EXPECT_EQ(swizzle(start + r * Tile::kSpan + b, Tile::kSpan),
                    Tile::offset(row + r, byte + b));
        }
      }
    }
  }
}

TEST(SharedTile, OperandOffsetFitsTheSwizzle) {
  check_operand<SharedTile<64, 64>>();
  check_operand<SharedTile<64, 96>>();
  check_operand<SharedTile<128, 128>>();
  check_operand<SharedTile<64, 256>>();
}

TEST(MatrixDescriptor, RoundTrips) {
  for (const uint32_t span : {32u, 64u, 128u}) {
    for (uint32_t address = 0; address < 256 * 1024; address += 16) {
      const MatrixDescriptor fields = decode_matrix_descriptor(matrix_descriptor(address, span));
      ASSERT_EQ(fields.address, address);
      ASSERT_EQ(fields.stride_bytes, 8 * span);
      ASSERT_EQ(fields.base_offset, 0u);
      ASSERT_EQ(fields.span, span);
      ASSERT_EQ(fields.leading_bytes, 16u);
    }
  }
  // One descriptor written out by hand: address 0x4400, 128-byte swizzle, stride 1024.
  EXPECT_EQ(matrix_descriptor(0x4400, 128), 0x4000004000010440u);
}

TEST(Packed, GroupInverseDivides) {
  for (int group = 1; group <= kGroupedRows; ++group) {
    for (int row = 0; row < kGroupedRows; ++row) {
      ASSERT_EQ(row * group_inverse_of(group) >> 16, row / group) << row << ' ' << group;
    }
  }
}

}  // namespace
}  // namespace attn8::cuda
