// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "emulator/block.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "emulator/wgmma.hpp"

namespace attn8::emulator {
namespace {

thread_local Block* running_block = nullptr;

std::string format_line(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string format_line(const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

void thread_main() {
  Block& b = block();
  if (!b.aborting) {
    tsan::acquire(&b.sync_begin);
    try {
      b.kernel();
      Thread& self = b.running();
      if (self.retired < self.committed) fail("exit while a wgmma group is in flight");
      for (auto& group : self.groups) {
        for (CpAsync& copy : group) b.complete(copy, b.current);
      }
      for (CpAsync& copy : self.open) b.complete(copy, b.current);
    } catch (const Aborted&) {
    } catch (const std::exception& exception) {
      if (b.error.empty()) b.error = format_line("[thread %d] %s", b.current, exception.what());
      b.aborting = true;
    }
  }
  b.running().exited = true;
  ++b.exited;
  tsan::release(&b.sync_end);
  b.running().fiber.leave();
  std::abort();  // an exited thread is never entered again
}

}  // namespace

Block& block() { return *running_block; }

Block::Block(const Config& config_in, int x, int y, int z, Report& report,
             const std::function<void()>& kernel_in)
    : config(config_in),
      index{x, y, z},
      stats(report.stats),
      sync_sites(report.sync_sites),
      kernel(kernel_in),
      random(config_in.seed * 1000003 + static_cast<uint64_t>(x) * 8191 +
             static_cast<uint64_t>(y) * 131 + static_cast<uint64_t>(z)),
      shared(static_cast<uint32_t>(config_in.shared_bytes), random),
      mbarriers(config_in.shared_bytes / 8),
      tsan_runtime(tsan::create()) {
  for (void*& fiber : tsan_tma) fiber = tsan::create();
  const int count = config.threads;
  threads.reserve(static_cast<size_t>(count));
  ready.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    threads.emplace_back(thread_main);
    ready.push_back(i);
  }
  for (int i = 0; i < count; i += kWarpThreads) {
    warps.emplace_back();
    warps.back().size = kWarpThreads;
    warps.back().first_thread = i;
  }
  for (int i = 0; i + kWarpgroupThreads <= count; i += kWarpgroupThreads) {
    warpgroup_places.emplace_back();
    warpgroup_places.back().size = kWarpgroupThreads;
    warpgroup_places.back().first_thread = i;
    warpgroups.push_back(std::make_unique<Warpgroup>(i));
  }
}

Block::~Block() {
  for (void* fiber : tsan_tma) tsan::destroy(fiber);
  tsan::destroy(tsan_runtime);
}

std::string Block::run() {
  running_block = this;
  tsan::release(&sync_begin);
  {
    tsan::Scope scope(tsan_runtime);
    tsan::acquire(&sync_begin);
  }
  tsan::clear_race();
  while (exited < config.threads && !aborting) {
    if (tsan::race_found()) {
      error = format_line("[block %d,%d,%d thread %d] data race, see ThreadSanitizer's report",
                          index[0], index[1], index[2], current);
      aborting = true;
      break;
    }
    if (config.async == Async::kRandom) complete_something_at_random();
    if (ready.empty()) {
      if (!bulk_copies.empty()) {
        complete_some_bulk_copy();
        continue;
      }
      error = describe_deadlock();
      aborting = true;
      break;
    }
    // A random thread runs until it has to wait; that is every interleaving a race-free kernel can
    // tell apart, with some probability.
    const size_t pick = random.below(static_cast<uint32_t>(ready.size()));
    current = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    ++stats.switches;
    threads[current].fiber.enter();
  }
  if (aborting) {
    // Let every thread unwind, so that what the kernel holds on its stacks is destroyed.
    for (current = 0; current < config.threads; ++current) {
      if (!threads[current].exited) threads[current].fiber.enter();
    }
  } else {
    while (!bulk_copies.empty()) complete_some_bulk_copy();
    tsan::Scope scope(tsan_runtime);
    shared.count_pending();
  }
  {
    tsan::Scope scope(tsan_runtime);
    tsan::release(&sync_end);
  }
  tsan::acquire(&sync_end);
  running_block = nullptr;
  return error;
}

void Block::wait(const Wait& reason) {
  Thread& self = running();
  self.wait = reason;
  self.fiber.leave();
  if (aborting) {
    // Exceptions reuse each other's heap blocks, one thread after the other.
    tsan::acquire(&sync_end);
    throw Aborted{};
  }
  self.wait = {};
}

bool Block::skips(Sync sync, const void* address) {
  const SyncSite site{sync, address};
  if (std::find(sync_sites.begin(), sync_sites.end(), site) == sync_sites.end()) {
    tsan::Scope scope(tsan_runtime);
    sync_sites.push_back(site);
  }
  return site == config.skip;
}

void Block::arrive(Rendezvous& place, const char* op, void* argument) {
  if (place.arrived == 0) {
    place.op = op;
    place.first_arrived = current;
  } else if (std::strcmp(place.op, op) != 0) {
    fail("divergent collective: this thread is at %s while thread %d is at %s", op,
         place.first_arrived, place.op);
  }
  place.arguments[current - place.first_thread] = argument;
  ++place.arrived;
}

void Block::complete_something_at_random() {
  for (size_t i = 0; i < bulk_copies.size(); ++i) {
    if (bulk_copies[i].due <= stats.switches) {
      complete_bulk_copy(i);
      break;
    }
  }
  // Rare enough that most copies are still under way some hundred switches later, when a kernel
  // that forgot to wait reads them.
  const uint64_t r = random();
  if (r % 64 != 0) return;
  const int thread = static_cast<int>((r >> 16) % threads.size());
  for (auto& group : threads[thread].groups) {
    for (CpAsync& copy : group) {
      if (random() % 2 == 0) complete(copy, thread);
    }
  }
}

std::string Block::describe(const Wait& reason) const {
  switch (reason.kind) {
    case Wait::Kind::kNone:
      return "ready";
    case Wait::Kind::kRendezvous:
      return format_line("at %s, waiting for other lanes", reason.op);
    case Wait::Kind::kBarrier:
      return format_line("at barrier %u (%d of %d threads arrived)", reason.id,
                         barriers[reason.id].arrived, barriers[reason.id].expected);
    case Wait::Kind::kMbarrier: {
      const Mbarrier& m = mbarriers[(reason.id - kSharedBase) / 8];
      return format_line(
          "at mbarrier smem+%u, waiting for parity %u (in phase %u, which wants %u of %u arrivals "
          "and %lld bytes)",
          reason.id - kSharedBase, reason.parity, m.phase, m.pending, m.count,
          static_cast<long long>(m.bytes));
    }
  }
  return "";
}

std::string Block::describe_deadlock() const {
  std::string text = format_line("[block %d,%d,%d] deadlock:", index[0], index[1], index[2]);
  const auto what = [this](int i) {
    return threads[i].exited ? std::string("exited") : describe(threads[i].wait);
  };
  // Neighbours that wait for the same thing are told together.
  for (int first = 0, last = 0; first < config.threads; first = last + 1) {
    const std::string reason = what(first);
    last = first;
    while (last + 1 < config.threads && what(last + 1) == reason) ++last;
    text += format_line(" threads %d-%d (warps %d-%d) %s;", first, last, first / kWarpThreads,
                        last / kWarpThreads, reason.c_str());
  }
  text.pop_back();
  return text;
}

int thread_index() { return block().current; }
int block_index(int axis) { return block().index[axis]; }

void fail(const char* format, ...) {
  Block& b = block();
  // The exception is freed by the thread whose kernel ends, so it is allocated as that thread.
  tsan::switch_to(b.running().fiber.tsan_fiber());
  if (b.error.empty()) {
    char message[448];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    b.error = format_line("[block %d,%d,%d thread %d] %s", b.index[0], b.index[1], b.index[2],
                          b.current, message);
  }
  b.aborting = true;
  throw Aborted{};
}

void check_global(const void* data, size_t bytes, bool write, const char* op) {
  Block& b = block();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const size_t alignment = bytes < 16 ? bytes : 16;
  if (begin % alignment != 0) fail("%s: %zu bytes at %p are not aligned", op, bytes, data);
  if (b.config.buffers.empty()) return;
  const Buffer* below = nullptr;
  for (const Buffer& buffer : b.config.buffers) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(buffer.data);
    if (begin < start) continue;
    if (begin + bytes <= start + buffer.bytes) {
      if (write && !buffer.writable) {
        fail("%s: writes %s+%zu, which the kernel may only read", op, buffer.name, begin - start);
      }
      return;
    }
    if (below == nullptr || start > reinterpret_cast<uintptr_t>(below->data)) below = &buffer;
  }
  if (below == nullptr) fail("%s: %zu bytes at %p are in no buffer", op, bytes, data);
  fail("%s: %zu bytes at %s+%zu are out of bounds (%zu bytes)", op, bytes, below->name,
       begin - reinterpret_cast<uintptr_t>(below->data), below->bytes);
}

const char* to_string(Sync sync) {
  switch (sync) {
    case Sync::kNone:
      break;
    case Sync::kCpWait:
      return "cp.async.wait_group";
    case Sync::kBarrier:
      return "bar";
    case Sync::kWarpBarrier:
      return "bar.warp.sync";
    case Sync::kMbarWait:
      return "mbarrier.try_wait";
    case Sync::kProxyFence:
      return "fence.proxy.async";
    case Sync::kInitFence:
      return "fence.mbarrier_init";
    case Sync::kWgmmaFence:
      return "wgmma.fence";
    case Sync::kWgmmaWait:
      return "wgmma.wait_group";
  }
  return "none";
}

bool finds_races() { return tsan::kEnabled; }

Report run(const Config& config, const Grid& grid, const std::function<void()>& kernel) {
  // 227 KiB is what one block may have on sm_90.
  constexpr size_t kMaxSharedBytes = 227 << 10;
  Report report;
  if (config.threads <= 0 || config.threads > 1024 || config.threads % kWarpThreads != 0 ||
      config.shared_bytes > kMaxSharedBytes || config.shared_bytes % 16 != 0) {
    report.ok = false;
    report.error = format_line(
        "launch: threads=%d must be a multiple of 32 in [32, 1024] and "
        "shared_bytes=%zu one of 16 up to %zu",
        config.threads, config.shared_bytes, kMaxSharedBytes);
    return report;
  }
  for (int z = 0; z < grid.z && report.ok; ++z) {
    for (int y = 0; y < grid.y && report.ok; ++y) {
      for (int x = 0; x < grid.x && report.ok; ++x) {
        Block running(config, x, y, z, report, kernel);
        report.error = running.run();
        report.ok = report.error.empty();
      }
    }
  }
  return report;
}

}  // namespace attn8::emulator
