// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

/// Where bytes and matrix elements lie: shared-memory tiles, tensor-core fragments, packed V.
/// Every function is constexpr and means the same on host and device, so that loaders, kernels and
/// tests share one picture; tests/emulator/layout_test.cpp checks each exhaustively.
///
/// Fragments follow the PTX ISA. With lane = 4 * group + thread (group 0..7, thread 0..3), one
/// mma.m16n8k32 (8-bit) or mma.m16n8k16 (16-bit) has the same picture in bytes of k, 32 per row:
///   A [16 rows][32 bytes]  register r: row group + 8 (r & 1), bytes 4 thread + 16 (r >> 1) + 0..3
///   B [8 columns][32 bytes] register r: column group, bytes 4 thread + 16 r + 0..3
///   C [16 rows][8 columns] element i: row group + 8 (i >> 1), column 2 thread + (i & 1)
/// wgmma.m64nNk32 (m64nNk16) stacks four A and C pictures, one per warp, and repeats C every 8
/// columns.

#if defined(__CUDACC__)
#define ATTN8_HOST_DEVICE __host__ __device__
#else
#define ATTN8_HOST_DEVICE
#endif

namespace attn8::cuda {

// ---- Fragments ----------------------------------------------------------------------------------

/// Row of A (of 16) that register `reg` (0..3) of `lane` holds.
ATTN8_HOST_DEVICE constexpr int a_row(int lane, int reg) { return lane / 4 + 8 * (reg & 1); }
/// First of the four bytes of k (of 32) that register `reg` (0..3) of `lane` holds.
ATTN8_HOST_DEVICE constexpr int a_byte(int lane, int reg) { return lane % 4 * 4 + 16 * (reg >> 1); }
/// Column of B (of 8).
ATTN8_HOST_DEVICE constexpr int b_column(int lane) { return lane / 4; }
/// First of the four bytes of k that register `reg` (0..1) of B holds.
ATTN8_HOST_DEVICE constexpr int b_byte(int lane, int reg) { return lane % 4 * 4 + 16 * reg; }
/// Row of C (of 16) of element `i`. Elements i and i + 4 n (the n-th group of 8 columns) share it.
ATTN8_HOST_DEVICE constexpr int c_row(int lane, int i) { return lane / 4 + 8 * (i >> 1 & 1); }
/// Column of C of element `i`; i may run over several groups of 8 columns, 4 elements each.
ATTN8_HOST_DEVICE constexpr int c_column(int lane, int i) {
  return i / 4 * 8 + lane % 4 * 2 + (i & 1);
}

/// ldmatrix.x4 that fills a whole A fragment: row (of 16) and byte (0 or 16) `lane` points at.
ATTN8_HOST_DEVICE constexpr int ldmatrix_a_row(int lane) { return lane % 16; }
ATTN8_HOST_DEVICE constexpr int ldmatrix_a_byte(int lane) { return lane / 16 * 16; }
/// ldmatrix.x4 that fills two B fragments, registers {0, 1} for columns 0..7 and {2, 3} for columns
/// 8..15: column (of 16) and byte (0 or 16) `lane` points at, B stored with k contiguous.
ATTN8_HOST_DEVICE constexpr int ldmatrix_b_column(int lane) { return lane % 8 + lane / 16 * 8; }
ATTN8_HOST_DEVICE constexpr int ldmatrix_b_byte(int lane) { return lane / 8 % 2 * 16; }

// ---- Keys of packed V^T -------------------------------------------------------------------------

/// A C fragment of scores holds, per thread, keys 2t, 2t+1, 2t+8, 2t+9 of each 16; an 8-bit A
/// fragment wants bytes 4t..4t+3. Storing V^T with its keys in the order below makes the weights an
/// A fragment by byte packing alone.
///   position  0 1 2 3 4 5  6  7 8 9 10 11 12 13 14 15
///   key       0 1 8 9 2 3 10 11 4 5 12 13  6  7 14 15

/// Key that `position` of packed V^T holds; permutes within groups of 16.
ATTN8_HOST_DEVICE constexpr int64_t packed_key(int64_t position) {
  const int64_t p = position & 15;
  return (position & ~int64_t{15}) + (p >> 2) * 2 + (p & 1) + 8 * (p >> 1 & 1);
}

/// Inverse of packed_key(): where `key` is stored.
ATTN8_HOST_DEVICE constexpr int64_t packed_position(int64_t key) {
  const int64_t k = key & 15;
  return (key & ~int64_t{15}) + (k >> 1 & 3) * 4 + (k >> 3) * 2 + (k & 1);
}

// ---- Shared-memory tiles ------------------------------------------------------------------------

/// The TMA swizzles: 16-byte chunks of `span`-byte rows (32, 64 or 128) are exchanged by bits of
/// the address three places higher, which spreads 8 consecutive rows over all banks. `offset` is
/// counted from an address that is a multiple of 8 * span.
ATTN8_HOST_DEVICE constexpr uint32_t swizzle(uint32_t offset, uint32_t span) {
  return offset ^ (offset >> 3 & (span - 16));
}

/// Swizzle span of rows of `row_bytes`: the largest of 128, 64 and 32 that divides it.
ATTN8_HOST_DEVICE constexpr uint32_t swizzle_span(uint32_t row_bytes) {
  return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32;
}

/// A tile of kRows x kRowBytes bytes in shared memory, kept as panels of kSpan-byte columns:
///   panel 0 [kRows][kSpan] swizzled, panel 1 [kRows][kSpan] swizzled, ...
/// One panel is what one TMA box writes and one wgmma descriptor walks. The tile starts at a
/// multiple of 1024 bytes. Examples: 64-byte rows are one panel of span 64, 128-byte rows one of
/// 128, 96-byte rows three of 32, 256-byte rows two of 128.
template <int kRowsIn, int kRowBytesIn>
struct SharedTile {
  static_assert(kRowsIn % 8 == 0, "a swizzle pattern spans 8 rows");
  static_assert(kRowBytesIn % 32 == 0, "rows are whole k32 steps");
  static constexpr int kRows = kRowsIn;
  static constexpr int kRowBytes = kRowBytesIn;
  static constexpr int kSpan = static_cast<int>(swizzle_span(kRowBytes));
  static constexpr int kPanels = kRowBytes / kSpan;
  static constexpr int kPanelBytes = kRows * kSpan;
  static constexpr int kBytes = kRows * kRowBytes;

  /// Offset of a byte from the start of the tile. Sixteen bytes from a multiple of 16 are
  /// contiguous.
  ATTN8_HOST_DEVICE static constexpr uint32_t offset(uint32_t row, uint32_t byte) {
    return byte / kSpan * kPanelBytes + swizzle(row * kSpan + byte % kSpan, kSpan);
  }

  /// From `at`, where offset(row, byte) of some row and byte < 32 is, to where `rows` rows (a
  /// multiple of 8) and `bytes` bytes (a multiple of 32) further are. `at` may be an address: a
  /// tile's start leaves the bits alone that the swizzle changes.
  ATTN8_HOST_DEVICE static constexpr uint32_t advance(uint32_t at, uint32_t rows, uint32_t bytes) {
    return (at ^ bytes % kSpan) + bytes / kSpan * kPanelBytes + rows * kSpan;
  }

  /// Offset, before swizzling, of the 32 bytes of k from `byte` on, starting at `row` (a multiple
  /// of 8): the start of a wgmma operand.
  ATTN8_HOST_DEVICE static constexpr uint32_t operand_offset(uint32_t row, uint32_t byte) {
    return byte / kSpan * kPanelBytes + row * kSpan + byte % kSpan;
  }
};

// ---- wgmma descriptors --------------------------------------------------------------------------

/// Shared-memory matrix descriptor of a K-major (k contiguous) operand in rows of `span` bytes with
/// the swizzle of that span; `address` is a 32-bit shared address, SharedTile::operand_offset()
/// past a tile's start.
///   bits  0..13  address / 16
///   bits 16..29  leading byte offset / 16: unused by swizzled K-major operands, 1 by convention
///   bits 32..45  stride byte offset / 16: from one group of 8 rows to the next, 8 * span
///   bits 49..51  base offset: 0, because tiles start at multiples of 8 * span
///   bits 62..63  swizzle: 1 = 128 bytes, 2 = 64, 3 = 32
ATTN8_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t span) {
  const uint64_t mode = span == 128 ? 1 : span == 64 ? 2 : 3;
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{1} << 16 | uint64_t{8 * span >> 4} << 32 |
         mode << 62;
}

/// The descriptor of an operand `bytes` further, within the same 256 KiB: an addition to its low
/// word, which keeps the compiler from carrying into the high one.
ATTN8_HOST_DEVICE constexpr uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xFFFFFFFF00000000u) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

/// Fields of a matrix descriptor in bytes, for tests and the emulator.
struct MatrixDescriptor {
  uint32_t address, leading_bytes, stride_bytes, base_offset, span;
};

ATTN8_HOST_DEVICE constexpr MatrixDescriptor decode_matrix_descriptor(uint64_t bits) {
  const uint32_t mode = static_cast<uint32_t>(bits >> 62);
  return {static_cast<uint32_t>(bits & 0x3FFF) << 4,
          static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4,
          static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4, static_cast<uint32_t>(bits >> 49 & 7),
          mode == 0 ? 0u : 256u >> mode};
}

}  // namespace attn8::cuda
