// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

/// What the emulated PTX wrappers call, from inside a kernel only.
namespace attn8::emulator {

int thread_index();
int block_index(int axis);

/// Ends the run with "[block x,y,z thread t] <message>".
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// The first shared address handed out. Not zero, so that an address computed from a forgotten base
/// is out of bounds.
inline constexpr uint32_t kSharedBase = 1024;

// Memory.
void load_shared(uint32_t address, void* value, uint32_t bytes);
void store_shared(uint32_t address, const void* value, uint32_t bytes);
void check_global(const void* data, size_t bytes, bool write, const char* op);
void cp_async16(uint32_t target, const void* source, bool valid);
void cp_commit();
void cp_wait(int pending);

// Warps and barriers.
uint32_t shuffle(uint32_t value, int source_lane, const char* op);
bool any(bool predicate);
void sync_warp();
void barrier(int id, int threads, bool wait);  ///< threads 0: the whole block

// mma.sync. Operands are registers as bytes; see src/cuda/layout.hpp.
enum class Product : uint8_t { kS8S8, kU8S8, kF16F16, kBF16BF16 };
void mma(Product product, void* d, const uint32_t* a, const uint32_t* b);
void ldmatrix_x4(uint32_t* r, uint32_t address, bool transpose);

// mbarrier, TMA.
struct TensorMap {
  const void* base = nullptr;
  int rank = 0;
  uint32_t element_bytes = 1;
  uint64_t shape[5] = {};         ///< in elements, innermost first
  uint64_t stride_bytes[5] = {};  ///< stride_bytes[0] == element_bytes
  uint32_t box[5] = {};           ///< in elements
  uint32_t swizzle = 0;           ///< span in bytes: 0 (none), 32, 64 or 128
};
void mbar_init(uint32_t barrier, uint32_t count);
void fence_barrier_init();
void mbar_arrive(uint32_t barrier, uint32_t expected_bytes);
void mbar_wait(uint32_t barrier, uint32_t parity);
void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int rank, const int* start);
void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier);
void fence_proxy_async();

// wgmma.
void set_registers(int count, bool increase);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
/// d: n / 2 accumulators. a: four registers, or nullptr for the operand at a_descriptor.
void wgmma(Product product, int n, void* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, bool accumulate);

}  // namespace attn8::emulator
