// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cuda/layout.hpp"
#include "cuda/ptx.hpp"
#include "emulator/run_checks.hpp"

/// Each emulated instruction against a plain account of what it does.
namespace attn8::cuda {
namespace {

// ---- Arithmetic ---------------------------------------------------------------------------------

TEST(Float16, EveryHalfSurvivesARoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = ptx::half_to_float(bits);
    if (std::isnan(value)) {
      EXPECT_EQ(ptx::pack_half2(value, 0) & 0x7FFF, 0x7FFFu);
    } else {
      EXPECT_EQ(ptx::pack_half2(value, 0), bits);
      EXPECT_EQ(ptx::pack_half2(0, value), bits << 16);
    }
  }
}

TEST(Float16, HalvesRoundToNearestEven) {
  // Between every pair of neighbouring finite halves: a quarter down, the middle to even, three
  // quarters up.
  for (uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const float low = ptx::half_to_float(bits);
    const float high = ptx::half_to_float(bits + 1);
    const float step = high - low;
    ASSERT_EQ(ptx::pack_half2(low + step / 4, 0), bits);
    ASSERT_EQ(ptx::pack_half2(low + step / 2, 0), bits + (bits & 1));
    ASSERT_EQ(ptx::pack_half2(low + step * 3 / 4, 0), bits + 1);
    ASSERT_EQ(ptx::pack_half2(-(low + step * 3 / 4), 0), (bits + 1) | 0x8000);
  }
  EXPECT_EQ(ptx::pack_half2(65519.0f, 0), 0x7BFFu);
  EXPECT_EQ(ptx::pack_half2(65520.0f, 0), 0x7C00u);
  EXPECT_EQ(ptx::pack_half2(std::numeric_limits<float>::infinity(), 0), 0x7C00u);
}

TEST(Float16, BFloat16RoundsToNearestEven) {
  EXPECT_EQ(ptx::pack_bfloat162(1.0f, 2.0f), 0x40003F80u);
  EXPECT_EQ(ptx::pack_bfloat162(ptx::as_float(0x3F808000), 0), 0x3F80u);
  EXPECT_EQ(ptx::pack_bfloat162(ptx::as_float(0x3F818000), 0), 0x3F82u);
  EXPECT_EQ(ptx::pack_bfloat162(ptx::as_float(0x3F808001), 0), 0x3F81u);
  EXPECT_EQ(ptx::bfloat16_to_float(0x3FC0), 1.5f);
}

TEST(Arithmetic, PrmtExp2AndRounding) {
  EXPECT_EQ(ptx::prmt(0x33221100, 0x77665544, 0x3210), 0x33221100u);
  EXPECT_EQ(ptx::prmt(0x33221100, 0x77665544, 0x7641), 0x77664411u);
  EXPECT_EQ(ptx::ex2(3.0f), 8.0f);
  EXPECT_EQ(ptx::ex2(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(ptx::ex2(-127.0f), 0.0f) << "subnormals are flushed";
  EXPECT_EQ(ptx::round_to_int(2.5f), 2);
  EXPECT_EQ(ptx::round_to_int(-3.5f), -4);
  EXPECT_EQ(ptx::round_to_int(NAN), 0);
  EXPECT_EQ(ptx::round_to_int(1e20f), std::numeric_limits<int>::max());
}

// ---- Warp instructions --------------------------------------------------------------------------

/// c [16][8] = a [16][32] b [8][32]^T over bytes, through the fragments of layout.hpp.
void check_mma(bool unsigned_a) {
  const std::vector<uint8_t> a = random_bytes(16 * 32, 1);
  const std::vector<uint8_t> b = random_bytes(8 * 32, 2);
  std::vector<int> c(16 * 8, -1);
  expect_ok(config(32, 0), [&] {
    const int lane = ptx::thread_index();
    uint32_t a_registers[4];
    uint32_t b_registers[2];
    for (int r = 0; r < 4; ++r) a_registers[r] = word(&a[a_row(lane, r) * 32 + a_byte(lane, r)]);
    for (int r = 0; r < 2; ++r) b_registers[r] = word(&b[b_column(lane) * 32 + b_byte(lane, r)]);
    int d[4];
    for (int i = 0; i < 4; ++i) d[i] = 1000 * c_row(lane, i) + c_column(lane, i);
    if (unsigned_a) {
      ptx::mma_u8(d, a_registers, b_registers);
    } else {
      ptx::mma_s8(d, a_registers, b_registers);
    }
    for (int i = 0; i < 4; ++i) c[c_row(lane, i) * 8 + c_column(lane, i)] = d[i];
  });
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int want = 1000 * row + column;
      for (int k = 0; k < 32; ++k) {
        const int left = unsigned_a ? a[row * 32 + k] : static_cast<int8_t>(a[row * 32 + k]);
        want += left * static_cast<int8_t>(b[column * 32 + k]);
      }
      EXPECT_EQ(c[row * 8 + column], want) << row << ' ' << column;
    }
  }
}

TEST(Warp, MmaSigned) { check_mma(false); }
TEST(Warp, MmaUnsigned) { check_mma(true); }

TEST(Warp, MmaHalf) {
  // Small integers and halves: sums are exact in float32 whatever their order.
  std::vector<float> a(16 * 16);
  std::vector<float> b(8 * 16);
  std::mt19937 random(3);
  for (float& x : a) x = static_cast<float>(static_cast<int>(random() % 64) - 32) / 2;
  for (float& x : b) x = static_cast<float>(static_cast<int>(random() % 64) - 32) / 2;
  std::vector<float> c(16 * 8);
  expect_ok(config(32, 0), [&] {
    const int lane = ptx::thread_index();
    uint32_t a_registers[4];
    uint32_t b_registers[2];
    for (int r = 0; r < 4; ++r) {
      const float* at = &a[a_row(lane, r) * 16 + a_byte(lane, r) / 2];
      a_registers[r] = ptx::pack_half2(at[0], at[1]);
    }
    for (int r = 0; r < 2; ++r) {
      const float* at = &b[b_column(lane) * 16 + b_byte(lane, r) / 2];
      b_registers[r] = ptx::pack_half2(at[0], at[1]);
    }
    float d[4] = {0.5f, 0.5f, 0.5f, 0.5f};
    ptx::mma_f16(d, a_registers, b_registers);
    for (int i = 0; i < 4; ++i) c[c_row(lane, i) * 8 + c_column(lane, i)] = d[i];
  });
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float want = 0.5f;
      for (int k = 0; k < 16; ++k) want += a[row * 16 + k] * b[column * 16 + k];
      EXPECT_EQ(c[row * 8 + column], want);
    }
  }
}

/// Stores 512 bytes, then lets one ldmatrix deal them out.
std::vector<uint32_t> deal(bool transpose, const std::vector<uint8_t>& bytes) {
  std::vector<uint32_t> registers(32 * 4);
  expect_ok(config(32, 512), [&] {
    const uint32_t base = ptx::smem_base();
    const int lane = ptx::thread_index();
    for (int i = 0; i < 4; ++i) {
      ptx::st_shared(base + static_cast<uint32_t>(lane * 16 + i * 4),
                     word(&bytes[lane * 16 + i * 4]));
    }
    ptx::sync_warp();
    uint32_t r[4];
    if (transpose) {
      ptx::ldmatrix_x4_trans(r, base + static_cast<uint32_t>(lane) * 16);
    } else {
      ptx::ldmatrix_x4(r, base + static_cast<uint32_t>(lane) * 16);
    }
    for (int i = 0; i < 4; ++i) registers[lane * 4 + i] = r[i];
  });
  return registers;
}

TEST(Warp, Ldmatrix) {
  const std::vector<uint8_t> bytes = random_bytes(512, 4);
  const std::vector<uint32_t> plain = deal(false, bytes);
  const std::vector<uint32_t> transposed = deal(true, bytes);
  const auto element = [&](int matrix, int row, int column) {
    const uint8_t* at = &bytes[matrix * 128 + row * 16 + column * 2];
    return static_cast<uint32_t>(at[0] | at[1] << 8);
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int i = lane / 4;
      const int j = lane % 4 * 2;
      EXPECT_EQ(plain[lane * 4 + matrix], element(matrix, i, j) | element(matrix, i, j + 1) << 16);
      EXPECT_EQ(transposed[lane * 4 + matrix], element(matrix, j, i) | element(matrix, j + 1, i)
                                                                           << 16);
    }
  }
}

TEST(Warp, ShufflesAndVotes) {
  std::vector<int> bfly(64);
  std::vector<int> idx(64);
  std::vector<int> vote(64);
  expect_ok(config(64, 0), [&] {
    const int i = ptx::thread_index();
    bfly[i] = ptx::shfl_xor(i, 5);
    idx[i] = ptx::shfl(i * 2, i + 1);
    vote[i] = ptx::any(i == 40);
  });
  for (int i = 0; i < 64; ++i) {
    EXPECT_EQ(bfly[i], i ^ 5);
    EXPECT_EQ(idx[i], (i / 32 * 32 + (i + 1) % 32) * 2);
    EXPECT_EQ(vote[i], i >= 32);
  }
}

// ---- TMA ----------------------------------------------------------------------------------------

/// Loads one box of a [3][20][48] tensor of bytes at (x, y, z) and returns shared memory
/// unswizzled.
template <int kSpan>
std::vector<uint8_t> load_box(const std::vector<uint8_t>& data, int x, int y, int z, Async async) {
  using Tile = SharedTile<16, kSpan>;
  std::vector<uint8_t> box(Tile::kBytes);
  ptx::TensorMap map;
  map.base = data.data();
  map.rank = 3;
  const uint64_t shape[] = {48, 20, 3};
  const uint32_t box_shape[] = {kSpan, 16, 1};
  uint64_t stride = 1;
  for (int i = 0; i < 3; ++i) {
    map.shape[i] = shape[i];
    map.stride_bytes[i] = stride;
    stride *= shape[i];
    map.box[i] = box_shape[i];
  }
  map.swizzle = kSpan;
  Config c = config(32, Tile::kBytes + 16, async);
  c.buffers = {{"data", data.data(), data.size(), false}};
  expect_ok(c, [&] {
    const uint32_t tile = ptx::smem_base();
    const uint32_t barrier = tile + Tile::kBytes;
    if (ptx::thread_index() == 0) {
      ptx::mbar_init(barrier, 1);
      ptx::fence_barrier_init();
      ptx::mbar_expect_tx(barrier, Tile::kBytes);
      ptx::tma_load3(tile, &map, barrier, x, y, z);
    }
    ptx::sync_warp();
    ptx::mbar_wait(barrier, 0);
    for (uint32_t i = static_cast<uint32_t>(ptx::thread_index()); i < Tile::kBytes; i += 32) {
      box[i] = static_cast<uint8_t>(ptx::ld_shared_byte(tile + Tile::offset(i / kSpan, i % kSpan)));
    }
  });
  return box;
}

template <int kSpan>
void check_boxes() {
  std::vector<uint8_t> data = random_bytes(48 * 20 * 3 + 16, 5);
  for (const auto& [x, y, z] : {std::array{0, 0, 0}, std::array{16, 7, 1}, std::array{-16, -3, 2},
                                std::array{0, 19, 3}, std::array{0, 0, -1}}) {
    for (const Async async : {Async::kLate, Async::kEarly, Async::kRandom}) {
      const std::vector<uint8_t> box = load_box<kSpan>(data, x, y, z, async);
      for (int row = 0; row < 16; ++row) {
        for (int byte = 0; byte < kSpan; ++byte) {
          const bool inside =
              x + byte >= 0 && x + byte < 48 && y + row >= 0 && y + row < 20 && z >= 0 && z < 3;
          const int want =
              inside ? data[static_cast<size_t>((z * 20 + y + row) * 48 + x + byte)] : 0;
          ASSERT_EQ(box[static_cast<size_t>(row * kSpan + byte)], want)
              << x << ' ' << y << ' ' << z << ": " << row << ' ' << byte;
        }
      }
    }
  }
}

TEST(Tma, BoxesSwizzlesAndZeroFill) {
  check_boxes<32>();
  check_boxes<64>();
  check_boxes<128>();
}

TEST(Tma, BulkLoadAndItsRules) {
  alignas(16) int data[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  Config c = config(32, 64);
  c.buffers = {{"data", data, sizeof data, false}};
  const auto load = [&](const int* source, uint32_t bytes) {
    return [&, source, bytes] {
      const uint32_t base = ptx::smem_base();
      if (ptx::thread_index() != 0) return;
      ptx::mbar_init(base + 32, 1);
      ptx::fence_barrier_init();
      ptx::mbar_expect_tx(base + 32, bytes);
      ptx::bulk_load(base, source, bytes, base + 32);
      ptx::mbar_wait(base + 32, 0);
      if (ptx::ld_shared<int>(base + 20) != 6) emulator::fail("wrong value");
    };
  };
  expect_ok(c, load(data, 32));
  expect_error(c, "cp.async.bulk: 1 bytes at data+47 are out of bounds", load(data + 4, 32));
  expect_error(c, "want a multiple of 16", load(data, 20));
}

// ---- wgmma --------------------------------------------------------------------------------------

/// d [64][n] = a [64][kRowBytes] b [n][kRowBytes]^T for int8 tiles in shared memory.
template <int kN, int kRowBytes>
void check_wgmma_ss() {
  using ATile = SharedTile<64, kRowBytes>;
  using BTile = SharedTile<kN, kRowBytes>;
  const std::vector<uint8_t> a = random_bytes(ATile::kBytes, 6);
  const std::vector<uint8_t> b = random_bytes(BTile::kBytes, 7);
  std::vector<int> d(64 * kN);
  for (const Async async : {Async::kLate, Async::kEarly, Async::kRandom}) {
    const Report report = expect_ok(config(128, ATile::kBytes + BTile::kBytes, async), [&] {
      const uint32_t a_base = ptx::smem_base();
      const uint32_t b_base = a_base + ATile::kBytes;
      const int thread = ptx::thread_index();
      for (uint32_t i = static_cast<uint32_t>(thread) * 4; i < ATile::kBytes; i += 512) {
        ptx::st_shared(a_base + ATile::offset(i / kRowBytes, i % kRowBytes), word(&a[i]));
      }
      for (uint32_t i = static_cast<uint32_t>(thread) * 4; i < BTile::kBytes; i += 512) {
        ptx::st_shared(b_base + BTile::offset(i / kRowBytes, i % kRowBytes), word(&b[i]));
      }
      ptx::fence_proxy_async();
      ptx::sync_block();
      int c[kN / 2];
      ptx::wgmma_fence();
      for (uint32_t byte = 0; byte < kRowBytes; byte += 32) {
        ptx::wgmma_ss_s8<kN>(
            c, matrix_descriptor(a_base + ATile::operand_offset(0, byte), ATile::kSpan),
            matrix_descriptor(b_base + BTile::operand_offset(0, byte), BTile::kSpan), byte > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      for (int i = 0; i < kN / 2; ++i) {
        d[(thread / 32 * 16 + c_row(thread % 32, i)) * kN + c_column(thread % 32, i)] = c[i];
      }
    });
    EXPECT_EQ(report.stats.wgmma, static_cast<uint64_t>(kRowBytes / 32));
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < kN; ++column) {
        int want = 0;
        for (int k = 0; k < kRowBytes; ++k) {
          want += static_cast<int8_t>(a[row * kRowBytes + k]) *
                  static_cast<int8_t>(b[column * kRowBytes + k]);
        }
        ASSERT_EQ(d[row * kN + column], want) << row << ' ' << column;
      }
    }
  }
}

TEST(Wgmma, SharedOperands) {
  check_wgmma_ss<64, 32>();
  check_wgmma_ss<64, 64>();
  check_wgmma_ss<96, 96>();
  check_wgmma_ss<128, 128>();
  check_wgmma_ss<64, 256>();
}

/// A in registers, for both element sizes: a [64][32 bytes], b [64][32 bytes] of shared memory.
template <bool kHalf>
void check_wgmma_rs() {
  using BTile = SharedTile<64, 64>;
  std::vector<uint8_t> a = random_bytes(64 * 32, 8);
  std::vector<uint8_t> b = random_bytes(64 * 32, 9);
  if (kHalf) {
    // Halves that are small integers: 0x4C00 + x is 16 + x / 64 for x < 1024.
    for (auto* bytes : {&a, &b}) {
      for (size_t i = 1; i < bytes->size(); i += 2) (*bytes)[i] = 0x4C;
    }
  }
  std::vector<float> d(64 * 64);
  expect_ok(config(128, BTile::kBytes, Async::kRandom), [&] {
    const uint32_t base = ptx::smem_base();
    const int thread = ptx::thread_index();
    const int lane = thread % 32;
    for (uint32_t i = static_cast<uint32_t>(thread) * 4; i < 64 * 32; i += 512) {
      ptx::st_shared(base + BTile::offset(i / 32, i % 32), word(&b[i]));
    }
    ptx::fence_proxy_async();
    ptx::sync_block();
    uint32_t registers[4];
    for (int r = 0; r < 4; ++r) {
      registers[r] = word(&a[(thread / 32 * 16 + a_row(lane, r)) * 32 + a_byte(lane, r)]);
    }
    const uint64_t descriptor = matrix_descriptor(base, BTile::kSpan);
    int integers[32] = {};
    float floats[32] = {};
    ptx::wgmma_fence();
    if (kHalf) {
      ptx::wgmma_rs_f16<64>(floats, registers, descriptor, true);
    } else {
      ptx::wgmma_rs_u8<64>(integers, registers, descriptor, true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (int i = 0; i < 32; ++i) {
      d[(thread / 32 * 16 + c_row(lane, i)) * 64 + c_column(lane, i)] =
          kHalf ? floats[i] : static_cast<float>(integers[i]);
    }
  });
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      double want = 0;
      for (int k = 0; k < 32; k += kHalf ? 2 : 1) {
        const uint8_t* left = &a[row * 32 + k];
        const uint8_t* right = &b[column * 32 + k];
        want += kHalf ? double{ptx::half_to_float(left[0] | left[1] << 8)} *
                            ptx::half_to_float(right[0] | right[1] << 8)
                      : left[0] * static_cast<int8_t>(right[0]);
      }
      ASSERT_EQ(d[row * 64 + column], static_cast<float>(want)) << row << ' ' << column;
    }
  }
}

TEST(Wgmma, RegisterOperands) {
  check_wgmma_rs<false>();
  check_wgmma_rs<true>();
}

}  // namespace
}  // namespace attn8::cuda
