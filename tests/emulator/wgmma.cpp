// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "emulator/wgmma.hpp"

#include <cstring>

#include "emulator/block.hpp"
#include "emulator/product.hpp"

/// wgmma: products of a warpgroup that run on their own between commit and wait. Until then the
/// accumulators hold a poison that must still be there at the end, registers of A must keep their
/// values, and nothing may be delivered to the operands in shared memory.
namespace attn8::emulator {
namespace {

constexpr int kRows = 64;

/// What accumulators hold while in flight: by the seed, a NaN that is far outside any score as an
/// integer, or an integer like any score, which a kernel does not single out.
uint32_t poison(const Block& b) { return b.config.seed % 2 == 0 ? 0x7FC0A77E : 12345; }

Warpgroup& warpgroup(const char* op) {
  Block& b = block();
  const size_t index = static_cast<size_t>(b.current / kWarpgroupThreads);
  if (index >= b.warpgroups.size()) fail("%s: this warp is in no complete warpgroup", op);
  return *b.warpgroups[index];
}

/// A K-major swizzled operand: where the 32 bytes of k of each row lie. Decoded here from the PTX
/// ISA on its own, not with layout.hpp.
struct Operand {
  uint32_t start, row_group_bytes, span;

  static Operand decode(uint64_t descriptor) {
    const uint32_t mode = static_cast<uint32_t>(descriptor >> 62);
    if (mode == 0) fail("wgmma: descriptor without a swizzle, which no kernel here uses");
    Operand operand;
    operand.start = static_cast<uint32_t>(descriptor % (1 << 14)) * 16;
    operand.row_group_bytes = static_cast<uint32_t>((descriptor >> 32) % (1 << 14)) * 16;
    operand.span = mode == 1 ? 128 : mode == 2 ? 64 : 32;
    if ((descriptor >> 49) % 8 != 0) fail("wgmma: descriptor with a base offset");
    // Past the start of a pattern of 8 rows, only a step within the first row keeps the swizzle
    // phase that a base offset of 0 promises.
    if (operand.start % (8 * operand.span) >= operand.span) {
      fail("wgmma: operand at smem+%u does not start in the first row of a %u-byte pattern",
           operand.start - kSharedBase, 8 * operand.span);
    }
    if (operand.start % operand.span + kProductBytes > operand.span) {
      fail("wgmma: k step at smem+%u leaves its %u-byte row", operand.start - kSharedBase,
           operand.span);
    }
    return operand;
  }

  /// Address of 16-byte chunk `chunk` (0 or 1) of `row`.
  [[nodiscard]] uint32_t chunk_address(int row, int chunk) const {
    const uint32_t address = start + static_cast<uint32_t>(row) / 8 * row_group_bytes +
                             static_cast<uint32_t>(row) % 8 * span +
                             static_cast<uint32_t>(chunk) * 16;
    const uint32_t pattern_row = address >> 7 & 7;
    const uint32_t exchanged = pattern_row & (span / 16 - 1);
    return address ^ exchanged << 4;
  }
};

void read_operand(Block& b, uint64_t descriptor, int rows, uint8_t* out) {
  const Operand operand = Operand::decode(descriptor);
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      copy_bytes(out + row * kProductBytes + chunk * 16,
                 b.shared.read_async(operand.chunk_address(row, chunk), 16, "wgmma"), 16);
    }
  }
}

/// Pins or unpins what an operation reads.
template <class Visit>
void for_each_chunk(const WgmmaOperation& operation, Visit&& visit) {
  const auto visit_operand = [&](uint64_t descriptor, int rows) {
    const Operand operand = Operand::decode(descriptor);
    for (int row = 0; row < rows; ++row) {
      for (int chunk = 0; chunk < 2; ++chunk) visit(operand.chunk_address(row, chunk));
    }
  };
  if (operation.threads[0].a == nullptr) visit_operand(operation.a_descriptor, kRows);
  visit_operand(operation.b_descriptor, operation.n);
}

/// Tells ThreadSanitizer what the tensor cores read: each warp its 16 rows of A and all of B.
void annotate_reads(Block& b, const Warpgroup& group, const WgmmaOperation& operation) {
  if (!tsan::kEnabled) return;
  for (int warp = 0; warp < Warpgroup::kWarps; ++warp) {
    tsan::Scope scope(group.tensor_core[warp]);
    for (int chunk = 0; chunk < 2; ++chunk) {
      if (operation.threads[0].a == nullptr) {
        const Operand a = Operand::decode(operation.a_descriptor);
        for (int row = warp * 16; row < warp * 16 + 16; ++row) {
          tsan::read(b.shared.read_async(a.chunk_address(row, chunk), 16, "wgmma"), 16);
        }
      }
      const Operand operand = Operand::decode(operation.b_descriptor);
      for (int row = 0; row < operation.n; ++row) {
        tsan::read(b.shared.read_async(operand.chunk_address(row, chunk), 16, "wgmma"), 16);
      }
    }
  }
}

void gather_a_registers(const WgmmaOperation& operation, int first_thread, uint8_t* out) {
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    const WgmmaThread& thread = operation.threads[static_cast<size_t>(i)];
    if (std::memcmp(thread.a, thread.a_at_issue, sizeof thread.a_at_issue) != 0) {
      fail("wgmma: thread %d overwrote A registers of a group in flight", first_thread + i);
    }
    const int row = i / 32 * 16 + i % 32 / 4;
    for (int r = 0; r < 4; ++r) {
      std::memcpy(out + (row + r % 2 * 8) * kProductBytes + i % 4 * 4 + r / 2 * 16, &thread.a[r],
                  4);
    }
  }
}

/// Gives the accumulators back the values they had at issue.
void end_poison(const Block& b, Warpgroup& group, WgmmaOperation& operation) {
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    WgmmaThread& thread = operation.threads[static_cast<size_t>(i)];
    if (!thread.owns_poison) continue;
    for (int j = 0; j < operation.n / 2; ++j) {
      if (thread.d[j] != poison(b)) {
        fail("wgmma: thread %d wrote accumulator %d of a group in flight", group.first_thread + i,
             j);
      }
      if (operation.accumulate) thread.d[j] = thread.d_at_issue[static_cast<size_t>(j)];
    }
    std::erase(group.in_flight[static_cast<size_t>(i)], thread.d);
  }
}

void execute(Block& b, Warpgroup& group, WgmmaOperation& operation) {
  ++b.stats.wgmma;
  annotate_reads(b, group, operation);
  end_poison(b, group, operation);
  const int n = operation.n;
  uint8_t a[kRows * kProductBytes];
  uint8_t columns[256 * kProductBytes];
  uint32_t result[kRows * 256];
  if (operation.threads[0].a != nullptr) {
    gather_a_registers(operation, group.first_thread, a);
  } else {
    read_operand(b, operation.a_descriptor, kRows, a);
  }
  read_operand(b, operation.b_descriptor, n, columns);
  for_each_chunk(operation, [&](uint32_t address) { b.shared.unpin(address, 16); });
  multiply(operation.product, kRows, n, a, columns, result);
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    uint32_t* d = operation.threads[static_cast<size_t>(i)].d;
    const int row = i / 32 * 16 + i % 32 / 4;
    for (int j = 0; j < n / 2; ++j) {
      const uint32_t value = result[(row + j / 2 % 2 * 8) * n + j / 4 * 8 + i % 4 * 2 + j % 2];
      d[j] = operation.accumulate ? accumulate(operation.product, d[j], value) : value;
    }
    tsan::Scope scope(group.tensor_core[i / kWarpThreads]);
    tsan::write(d, static_cast<unsigned long>(n) * 2);
  }
}

void execute_oldest_group(Block& b, Warpgroup& group) {
  {
    tsan::Scope scope(b.tsan_runtime);
    for (WgmmaOperation& operation : group.groups.front()) execute(b, group, operation);
    group.groups.pop_front();
  }
  for (void* tensor_core : group.tensor_core) {
    tsan::Scope scope(tensor_core);
    tsan::release(&group.done[group.executed % Warpgroup::kDoneSlots]);
  }
  ++group.executed;
}

struct IssueArgument {
  uint32_t* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool accumulate;
};

/// What the last of 128 threads does with everybody's operands.
void issue(Block& b, Warpgroup& group, Product product, int n, void** arguments) {
  for (int warp = 0; warp < Warpgroup::kWarps; ++warp) {
    tsan::Scope scope(group.tensor_core[warp]);
    tsan::acquire(&group.issue[warp]);
  }
  tsan::Scope scope(b.tsan_runtime);
  const auto* first = static_cast<const IssueArgument*>(arguments[0]);
  WgmmaOperation operation{product, n, first->accumulate, first->a_descriptor, first->b_descriptor,
                           {}};
  operation.threads.reserve(kWarpgroupThreads);
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    const auto* x = static_cast<const IssueArgument*>(arguments[i]);
    if (x->n != n || x->accumulate != first->accumulate || x->a_descriptor != first->a_descriptor ||
        x->b_descriptor != first->b_descriptor || (x->a == nullptr) != (first->a == nullptr)) {
      fail("wgmma: threads %d and %d disagree on shape, descriptors or scale-d", group.first_thread,
           group.first_thread + i);
    }
    WgmmaThread thread{x->d, x->a, {}, true, {}};
    if (x->a != nullptr) std::memcpy(thread.a_at_issue, x->a, sizeof thread.a_at_issue);
    auto& in_flight = group.in_flight[static_cast<size_t>(i)];
    for (const uint32_t* d : in_flight) thread.owns_poison = thread.owns_poison && d != x->d;
    if (thread.owns_poison) {
      if (x->accumulate) thread.d_at_issue.assign(x->d, x->d + n / 2);
      for (int j = 0; j < n / 2; ++j) x->d[j] = poison(b);
      in_flight.push_back(x->d);
    }
    operation.threads.push_back(std::move(thread));
  }
  const int index = group.first_thread / kWarpgroupThreads;
  for_each_chunk(operation, [&](uint32_t address) { b.shared.pin(address, 16, index); });
  group.open.push_back(std::move(operation));
}

}  // namespace

Warpgroup::Warpgroup(int first_thread_in)
    : first_thread(first_thread_in), in_flight(kWarpgroupThreads) {
  for (void*& fiber : tensor_core) fiber = tsan::create();
}

Warpgroup::~Warpgroup() {
  for (void* fiber : tensor_core) tsan::destroy(fiber);
}

void set_registers(int count, bool increase) {
  const char* op = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  if (count < 24 || count > 256 || count % 8 != 0) {
    fail("%s: %d registers, want a multiple of 8 in [24, 256]", op, count);
  }
  Block& b = block();
  b.meet(b.warp(), op, nullptr, [](void**) {});
}

void wgmma_fence() {
  Block& b = block();
  if (b.skips(Sync::kWgmmaFence, __builtin_return_address(0))) return;
  b.running().fenced = true;
  b.meet(b.warp(), "wgmma.fence", nullptr, [](void**) {});
}

void wgmma(Product product, int n, void* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, bool accumulate) {
  Block& b = block();
  const char* op = wgmma_name(product);
  Warpgroup& group = warpgroup(op);
  if (!b.running().fenced) fail("%s: no wgmma.fence since registers were the thread's own", op);
  tsan::release(&group.issue[b.current % kWarpgroupThreads / kWarpThreads]);
  IssueArgument mine{static_cast<uint32_t*>(d), a, a_descriptor, b_descriptor, n, accumulate};
  b.meet(b.warpgroup_places[static_cast<size_t>(b.current / kWarpgroupThreads)], op, &mine,
         [&](void** arguments) { issue(b, group, product, n, arguments); });
}

void wgmma_commit() {
  Block& b = block();
  Warpgroup& group = warpgroup("wgmma.commit_group");
  b.meet(b.warp(), "wgmma.commit_group", nullptr, [](void**) {});
  Thread& self = b.running();
  // The first thread closes the group for all: they issued together, and none can issue again
  // before the others are here too.
  if (++self.committed > group.executed + group.groups.size()) {
    tsan::Scope scope(b.tsan_runtime);
    group.groups.push_back(std::move(group.open));
    group.open.clear();
    if (b.completes_now()) {
      while (!group.groups.empty()) execute_oldest_group(b, group);
    }
  }
}

void wgmma_wait(int pending) {
  Block& b = block();
  if (b.skips(Sync::kWgmmaWait, __builtin_return_address(0))) return;
  Warpgroup& group = warpgroup("wgmma.wait_group");
  b.meet(b.warp(), "wgmma.wait_group", nullptr, [](void**) {});
  Thread& self = b.running();
  while (self.retired + static_cast<uint64_t>(pending) < self.committed) {
    while (group.executed <= self.retired) execute_oldest_group(b, group);
    tsan::acquire(&group.done[self.retired % Warpgroup::kDoneSlots]);
    ++self.retired;
  }
  self.fenced = false;
}

}  // namespace attn8::emulator
