// SPDX-FileCopyrightText: The attn8 authors
// SPDX-License-Identifier: Apache-2.0
#include "emulator/tsan.hpp"

#ifdef ATTN8_EMULATOR_TSAN

namespace {
unsigned long reports = 0;
}

/// Called by ThreadSanitizer for every report.
extern "C" void __tsan_on_report(void*) { ++reports; }

/// Races are counted by the tests, not by the exit code, and a second planted bug with the stack of
/// the first must be reported again.
extern "C" const char* __tsan_default_options() {
  return "exitcode=0:suppress_equal_stacks=0:suppress_equal_addresses=0:report_thread_leaks=0";
}

namespace attn8::emulator::tsan {
unsigned long race_reports() { return reports; }
}  // namespace attn8::emulator::tsan

#endif
