// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/layout.hpp"
#include "cuda/ptx.hpp"
#include "emulator/run_checks.hpp"

/// Each rule of the machine against a kernel that keeps it and one that breaks it.
namespace attn8::cuda {
namespace {

// ---- Rules of memory ----------------------------------------------------------------------------

TEST(Rules, SharedMemory) {
  expect_error(config(32, 64), "out of bounds (64 bytes)",
               [] { ptx::ld_shared<float>(ptx::smem_base() + 64); });
  expect_error(config(32, 64), "out of bounds", [] { ptx::ld_shared<float>(16); });
  expect_error(config(32, 64), "smem+4 is not 8-byte aligned", [] {
    ptx::st_shared(ptx::smem_base() + 4, float2{1, 2});
  });
  expect_error(config(32, 64), "reads smem+0, which was never written",
               [] { ptx::ld_shared<float>(ptx::smem_base()); });
  expect_error(config(32, 64), "ldmatrix: smem+8 is not 16-byte aligned", [] {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, ptx::smem_base() + 8);
  });
  expect_error(config(48, 0), "threads=48 must be a multiple of 32", [] {});
  expect_error(config(32, 228 << 10), "shared_bytes=233472", [] {});
}

TEST(Rules, GlobalMemory) {
  alignas(16) float data[8] = {};
  Config c = config(32, 0);
  c.buffers = {{"data", data, sizeof data, false}};
  expect_error(c, "16 bytes at data+32 are out of bounds (32 bytes)",
               [&] { ptx::ld_global(reinterpret_cast<const float4*>(data + 8)); });
  expect_error(c, "4 bytes at 0x40 are in no buffer",
               [] { ptx::ld_global(reinterpret_cast<const float*>(64)); });
  expect_error(c, "writes data+4, which the kernel may only read",
               [&] { ptx::st_global(data + 1, 1.0f); });
  expect_error(c, "are not aligned",
               [&] { ptx::ld_global(reinterpret_cast<const float4*>(data + 1)); });
}

TEST(Rules, AsynchronousCopies) {
  alignas(16) float data[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<float> got(2);
  const auto copy = [&](bool wait) {
    return [&, wait] {
      if (ptx::thread_index() != 0) return;
      const uint32_t base = ptx::smem_base();
      ptx::cp_async16(base, data, true);
      ptx::cp_commit();
      ptx::cp_async16(base + 16, data, false);
      ptx::cp_commit();
      if (wait) ptx::cp_wait<1>();
      got[0] = ptx::ld_shared<float>(base + 8);
      ptx::cp_wait<0>();
      got[1] = ptx::ld_shared<float>(base + 16);
    };
  };
  expect_ok(config(32, 32), copy(true));
  EXPECT_EQ(got, (std::vector<float>{3, 0}));
  expect_ok(config(32, 32, Async::kEarly), copy(false));
  expect_error(config(32, 32), "reads smem+8, which cp.async of thread 0 is still delivering",
               copy(false));
  expect_error(config(32, 32), "writes smem+0, which cp.async of thread 0", [&] {
    if (ptx::thread_index() != 0) return;
    ptx::cp_async16(ptx::smem_base(), data, true);
    ptx::st_shared(ptx::smem_base(), 1.0f);
  });
}

TEST(Rules, BankConflicts) {
  const auto conflicts = [](auto kernel) {
    const Report report = emulator::run(config(32, 8192), {}, kernel);
    EXPECT_TRUE(report.ok) << report.error;
    return report.stats;
  };
  const auto lane = [] { return static_cast<uint32_t>(ptx::thread_index()); };
  // One word per lane, then with a stride of 2, 32 and 33 words.
  EXPECT_EQ(conflicts([&] { ptx::st_shared(ptx::smem_base() + lane() * 4, 1.0f); }).st_conflicts,
            0u);
  EXPECT_EQ(conflicts([&] { ptx::st_shared(ptx::smem_base() + lane() * 8, 1.0f); }).st_conflicts,
            1u);
  EXPECT_EQ(conflicts([&] { ptx::st_shared(ptx::smem_base() + lane() * 128, 1.0f); }).st_conflicts,
            31u);
  EXPECT_EQ(conflicts([&] { ptx::st_shared(ptx::smem_base() + lane() * 132, 1.0f); }).st_conflicts,
            0u);
  // Wide accesses go in phases; a broadcast is free.
  EXPECT_EQ(conflicts([&] {
              ptx::st_shared(ptx::smem_base() + lane() * 16, float4{1, 2, 3, 4});
            }).st_conflicts,
            0u);
  EXPECT_EQ(conflicts([&] {
              ptx::st_shared(ptx::smem_base() + lane() * 32, float4{1, 2, 3, 4});
            }).st_conflicts,
            4u);
  EXPECT_EQ(conflicts([&] {
              if (lane() == 0) ptx::st_shared(ptx::smem_base(), 1.0f);
              ptx::sync_warp();
              ptx::ld_shared<float>(ptx::smem_base());
            }).bank_conflicts(),
            0u);
  // Half of the warp: still one instruction.
  EXPECT_EQ(conflicts([&] {
              if (lane() < 16) ptx::st_shared(ptx::smem_base() + lane() * 128, 1.0f);
            }).st_conflicts,
            15u);
}

// ---- Barriers -----------------------------------------------------------------------------------

TEST(Barriers, Deadlocks) {
  expect_error(config(64, 0),
               "deadlock: threads 0-31 (warps 0-0) at barrier 1 (32 of 64 threads "
               "arrived); threads 32-63 (warps 1-1) exited",
               [] {
                 if (ptx::thread_index() < 32) ptx::bar_sync(1, 64);
               });
  expect_error(config(64, 0), "barrier 1: this thread expects", [] {
    ptx::bar_sync(1, ptx::thread_index() < 32 ? 32 : 64);
    ptx::bar_sync(1, 64);
  });
  expect_error(config(64, 0), "barrier 1: 40 threads are no whole warps",
               [] { ptx::bar_sync(1, 40); });
  expect_error(config(32, 0), "at bar.warp.sync, waiting for other lanes", [] {
    if (ptx::thread_index() != 3) ptx::sync_warp();
  });
}

TEST(Barriers, ArriveDoesNotWait) {
  // The first warp signals, the second waits.
  std::vector<int> order;
  const Report report = expect_ok(config(64, 16), [&] {
    const uint32_t base = ptx::smem_base();
    if (ptx::thread_index() == 0) ptx::st_shared(base, 7);
    if (ptx::thread_index() < 32) {
      ptx::bar_arrive(2, 64);
    } else {
      ptx::bar_sync(2, 64);
      if (ptx::thread_index() == 32) order.push_back(ptx::ld_shared<int>(base));
    }
  });
  EXPECT_EQ(order, std::vector<int>{7});
  EXPECT_EQ(report.stats.barrier, 64u);
}

TEST(Barriers, MbarrierPhases) {
  expect_ok(config(32, 16), [] {
    const uint32_t barrier = ptx::smem_base();
    if (ptx::thread_index() == 0) ptx::mbar_init(barrier, 31);
    ptx::sync_warp();
    ptx::mbar_wait(barrier, 1);  // the phase before the first has ended
    for (uint32_t phase = 0; phase < 3; ++phase) {
      if (ptx::thread_index() != 0) ptx::mbar_arrive(barrier);
      ptx::mbar_wait(barrier, phase & 1);
      ptx::sync_warp();
    }
  });
  expect_error(config(32, 16),
               "at mbarrier smem+0, waiting for parity 0 (in phase 0, which wants 1 "
               "of 2 arrivals and 0 bytes)",
               [] {
                 const uint32_t barrier = ptx::smem_base();
                 if (ptx::thread_index() != 0) return;
                 ptx::mbar_init(barrier, 2);
                 ptx::mbar_arrive(barrier);
                 ptx::mbar_wait(barrier, 0);
               });
  expect_error(config(32, 16), "st.shared: writes over the mbarrier at smem+4", [] {
    if (ptx::thread_index() != 0) return;
    ptx::mbar_init(ptx::smem_base(), 2);
    ptx::st_shared(ptx::smem_base() + 4, 1);
  });
}

// ---- wgmma
// ----------------------------------------------------------------------------------------

/// A wgmma of zeros that `around` may spoil.
template <class Around>
auto small_wgmma(Around around) {
  return [around] {
    using Tile = SharedTile<64, 64>;
    const uint32_t base = ptx::smem_base();
    for (uint32_t i = static_cast<uint32_t>(ptx::thread_index()) * 16; i < Tile::kBytes;
         i += 2048) {
      ptx::st_shared(base + i, uint4{0, 0, 0, 0});
    }
    ptx::fence_proxy_async();
    ptx::sync_block();
    int d[32];
    uint32_t a[4] = {0, 0, 0, 0};
    ptx::wgmma_fence();
    around(base, d, a);
  };
}

TEST(Wgmma, Rules) {
  const Config c = config(128, SharedTile<64, 64>::kBytes);
  const auto descriptor = [](uint32_t base) { return matrix_descriptor(base, 64); };
  expect_error(c, "overwrote A registers of a group in flight",
               small_wgmma([=](uint32_t base, int(&d)[32], uint32_t(&a)[4]) {
                 ptx::wgmma_rs_u8<64>(d, a, descriptor(base), false);
                 ptx::wgmma_commit();
                 a[1] = 5;
                 ptx::wgmma_wait<0>();
               }));
  expect_error(c, "wrote accumulator 3 of a group in flight",
               small_wgmma([=](uint32_t base, int(&d)[32], uint32_t(&a)[4]) {
                 ptx::wgmma_rs_u8<64>(d, a, descriptor(base), false);
                 ptx::wgmma_commit();
                 d[3] = 5;
                 ptx::wgmma_wait<0>();
               }));
  expect_error(c, "st.shared: writes smem+0, which a wgmma of warpgroup 0 may still be reading",
               small_wgmma([=](uint32_t base, int(&d)[32], uint32_t(&a)[4]) {
                 ptx::wgmma_rs_u8<64>(d, a, descriptor(base), false);
                 ptx::wgmma_commit();
                 ptx::st_shared(base, 1);
                 ptx::wgmma_wait<0>();
               }));
  expect_error(c, "disagree on shape, descriptors or scale-d",
               small_wgmma([=](uint32_t base, int(&d)[32], uint32_t(&a)[4]) {
                 ptx::wgmma_rs_u8<64>(d, a, descriptor(base), ptx::thread_index() == 9);
               }));
  expect_error(c, "does not start in the first row of a 512-byte pattern",
               small_wgmma([=](uint32_t base, int(&d)[32], uint32_t(&a)[4]) {
                 ptx::wgmma_rs_u8<64>(d, a, descriptor(base + 128), false);
               }));
  expect_error(c, "leaves its 64-byte row",
               small_wgmma([=](uint32_t base, int(&d)[32], uint32_t(&a)[4]) {
                 ptx::wgmma_rs_u8<64>(d, a, descriptor(base + 48), false);
               }));
  expect_error(config(64, 0), "this warp is in no complete warpgroup", [] { ptx::wgmma_commit(); });
  expect_error(c, "setmaxnreg.inc: 250 registers, want a multiple of 8",
               [] { ptx::regs_inc<250>(); });
}

// ---- Blocks
// ---------------------------------------------------------------------------------------

TEST(Run, VisitsEveryBlockAndStopsAtTheFirstError) {
  std::vector<int> visits(2 * 3 * 4);
  const Report all = emulator::run(config(32, 0), {2, 3, 4}, [&] {
    if (ptx::thread_index() == 0) {
      ++visits[(ptx::block_z() * 3 + ptx::block_y()) * 2 + ptx::block_x()];
    }
  });
  EXPECT_TRUE(all.ok) << all.error;
  EXPECT_EQ(visits, std::vector<int>(24, 1));
  const Report one = emulator::run(config(32, 0), {5, 1, 1}, [&] {
    if (ptx::block_x() == 3 && ptx::thread_index() == 7) emulator::fail("planted %d", 3);
  });
  EXPECT_EQ(one.error, "[block 3,0,0 thread 7] planted 3");
}

}  // namespace
}  // namespace attn8::cuda
