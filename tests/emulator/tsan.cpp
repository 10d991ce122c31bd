// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "emulator/tsan.hpp"

#ifdef ATTN8_EMULATOR_TSAN

namespace {
bool found = false;
}

/// Called by ThreadSanitizer for every report.
extern "C" void __tsan_on_report(void*) { found = true; }

/// A race fails the run it happens in, not the process, and a second planted bug with the stack of
/// the first must be reported again.
extern "C" const char* __tsan_default_options() {
  return "exitcode=0:suppress_equal_stacks=0:suppress_equal_addresses=0:report_thread_leaks=0";
}

namespace attn8::emulator::tsan {
bool race_found() { return found; }
void clear_race() { found = false; }
}  // namespace attn8::emulator::tsan

#endif
