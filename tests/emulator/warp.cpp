// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "emulator/block.hpp"
#include "emulator/product.hpp"

/// Instructions that the 32 lanes of a warp execute together, and shared-memory accesses of one.
namespace attn8::emulator {

void load_shared(uint32_t address, void* value, uint32_t bytes) {
  Block& b = block();
  ++b.stats.ld_shared;
  copy_bytes(value, b.shared.read(address, bytes, bytes, "ld.shared"), bytes);
  tsan::Scope scope(b.tsan_runtime);
  b.shared.count_access(__builtin_return_address(0), b.current, address, bytes,
                        &b.stats.ld_conflicts);
}

void store_shared(uint32_t address, const void* value, uint32_t bytes) {
  Block& b = block();
  ++b.stats.st_shared;
  copy_bytes(b.shared.write(address, bytes, bytes, "st.shared"), value, bytes);
  tsan::Scope scope(b.tsan_runtime);
  b.shared.count_access(__builtin_return_address(0), b.current, address, bytes,
                        &b.stats.st_conflicts);
}

uint32_t shuffle(uint32_t value, int source_lane, const char* op) {
  struct Argument {
    uint32_t in, out;
    int source;
  } mine{value, 0, source_lane};
  Block& b = block();
  b.meet(b.warp(), op, &mine, [&b](void** arguments) {
    ++b.stats.shuffle;
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      auto* to = static_cast<Argument*>(arguments[lane]);
      to->out = static_cast<Argument*>(arguments[to->source])->in;
    }
  });
  return mine.out;
}

bool any(bool predicate) {
  struct Argument {
    bool in, out;
  } mine{predicate, false};
  Block& b = block();
  b.meet(b.warp(), "vote.any", &mine, [](void** arguments) {
    bool result = false;
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      result = result || static_cast<Argument*>(arguments[lane])->in;
    }
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      static_cast<Argument*>(arguments[lane])->out = result;
    }
  });
  return mine.out;
}

void sync_warp() {
  Block& b = block();
  if (b.skips(Sync::kWarpBarrier, __builtin_return_address(0))) return;
  Rendezvous& warp = b.warp();
  void* const order = warp.order.now();
  tsan::release(order);
  b.meet(warp, "bar.warp.sync", nullptr, [](void**) {});
  tsan::acquire(order);
}

void barrier(int id, int threads, bool wait) {
  Block& b = block();
  if (b.skips(Sync::kBarrier, __builtin_return_address(0))) return;
  if (id < 0 || id > 15) fail("barrier %d: there are barriers 0 to 15", id);
  if (threads == 0) threads = b.config.threads;
  if (threads % kWarpThreads != 0) fail("barrier %d: %d threads are no whole warps", id, threads);
  NamedBarrier& barrier = b.barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
  } else if (barrier.expected != threads) {
    fail("barrier %d: this thread expects %d threads, others %d", id, threads, barrier.expected);
  }
  ++b.stats.barrier;
  void* const order = barrier.order.now();
  tsan::release(order);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.order.uses;
    for (int thread : barrier.waiting) b.wake(thread);
    barrier.waiting.clear();
  } else if (wait) {
    {
      tsan::Scope scope(b.tsan_runtime);
      barrier.waiting.push_back(b.current);
    }
    b.wait({Wait::Kind::kBarrier, "", static_cast<uint32_t>(id), 0});
  }
  if (wait) tsan::acquire(order);
}

void mma(Product product, void* d, const uint32_t* a, const uint32_t* b_registers) {
  struct Argument {
    void* d;
    const uint32_t* a;
    const uint32_t* b;
  } mine{d, a, b_registers};
  Block& b = block();
  b.meet(b.warp(), mma_name(product), &mine, [&b, product](void** arguments) {
    ++b.stats.mma;
    // In bytes of k the 8-bit and the 16-bit fragments have one picture.
    uint8_t a_bytes[16][kProductBytes];
    uint8_t b_bytes[8][kProductBytes];
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const auto* x = static_cast<const Argument*>(arguments[lane]);
      const int group = lane / 4;
      const int thread = lane % 4;
      for (int r = 0; r < 4; ++r) {
        std::memcpy(&a_bytes[group + r % 2 * 8][thread * 4 + r / 2 * 16], &x->a[r], 4);
      }
      for (int r = 0; r < 2; ++r) {
        std::memcpy(&b_bytes[group][thread * 4 + r * 16], &x->b[r], 4);
      }
    }
    uint32_t result[16][8];
    multiply(product, 16, 8, &a_bytes[0][0], &b_bytes[0][0], &result[0][0]);
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      auto* target = static_cast<uint32_t*>(static_cast<Argument*>(arguments[lane])->d);
      for (int i = 0; i < 4; ++i) {
        const uint32_t product_bits = result[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        target[i] = accumulate(product, target[i], product_bits);
      }
    }
  });
}

void ldmatrix_x4(uint32_t* r, uint32_t address, bool transpose) {
  struct Argument {
    uint32_t* r;
    uint32_t address;
    uint8_t row[16];
  } mine{r, address, {}};
  Block& b = block();
  copy_bytes(mine.row, b.shared.read(address, 16, 16, "ldmatrix"), 16);
  b.meet(
      b.warp(), transpose ? "ldmatrix.x4.trans" : "ldmatrix.x4", &mine,
      [&b, transpose](void** arguments) {
        ++b.stats.ldmatrix;
        uint32_t addresses[kWarpThreads];
        for (int lane = 0; lane < kWarpThreads; ++lane) {
          addresses[lane] = static_cast<Argument*>(arguments[lane])->address;
        }
        b.stats.ldmatrix_conflicts += extra_wavefronts(~0u, addresses, 16);
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t elements[8][8];
          for (int row = 0; row < 8; ++row) {
            copy_bytes(elements[row], static_cast<Argument*>(arguments[matrix * 8 + row])->row, 16);
          }
          for (int lane = 0; lane < kWarpThreads; ++lane) {
            const int row = lane / 4;
            const int column = lane % 4 * 2;
            const uint32_t low = transpose ? elements[column][row] : elements[row][column];
            const uint32_t high = transpose ? elements[column + 1][row] : elements[row][column + 1];
            static_cast<Argument*>(arguments[lane])->r[matrix] = low | high << 16;
          }
        }
      });
}

}  // namespace attn8::emulator
