#!/usr/bin/env python3
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""What an instruction costs beside a saturated vpdpbusd zmm.

    benchmarks/port_costs.py

One step of a matrix product (four loads, four broadcasts, sixteen products, as in the AVX-512
kernel) is timed alone and with other instructions strewn in. The difference, in cycles per step, is
what they take from the products: 0 where they run beside them. Needs g++ and AVX512-VNNI, -VBMI.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ADDED = {
    "vmulps": "vmulps %zmm30, %zmm31, %zmm@",
    "vpdpwssd": "vpdpwssd %zmm30, %zmm31, %zmm@",
    "vcvtdq2ps": "vcvtdq2ps %zmm30, %zmm@",
    "vpaddw": "vpaddw %zmm30, %zmm31, %zmm@",
    "vpsrlvw": "vpsrlvw %zmm30, %zmm31, %zmm@",
    "vpackssdw": "vpackssdw %zmm30, %zmm31, %zmm@",
    "vpermi2w": "vpermi2w %zmm30, %zmm31, %zmm@",
    "load": "vmovdqa64 2048(%rdi), %zmm@",
    "store": "vmovdqa64 %zmm30, #(%rdi)",
}
COUNTS = (1, 2, 4, 8, 16)
STEPS = 4  # per round of the loop
PRODUCTS = 16  # per step: four rows by four vectors of 16 columns

PROGRAM = """
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
%s
int main() {
  auto* rows = static_cast<char*>(std::aligned_alloc(4096, 8192));
  auto* columns = static_cast<char*>(std::aligned_alloc(4096, 16384));
  std::memset(rows, 1, 8192);
  std::memset(columns, 1, 16384);
  void (*const bodies[])(const char*, const char*, long, const char*) = {%s};
  constexpr int kBodies = sizeof(bodies) / sizeof(*bodies);
  double best[kBodies];
  std::fill_n(best, kBodies, 1e9);
  for (int round = 0; round < 60; ++round) {
    for (int i = 0; i < kBodies; ++i) {
      const auto start = std::chrono::steady_clock::now();
      bodies[i](rows, columns, 2000, columns + 16384);
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      best[i] = std::min(best[i], time.count());
    }
  }
  for (double seconds : best) std::printf("%%.9g\\n", seconds);
}
"""


def step(index: int, added: list[str]) -> list[str]:
    """Return the instructions of one step, `added` spread evenly among them."""
    plain = [f"vmovdqa64 {256 * index + 64 * c}(%rsi), %zmm{16 + c}" for c in range(4)]
    for r in range(4):
        plain.append(f"vpbroadcastd {16 * index + 4 * r}(%rdi), %zmm20")
        plain += [f"vpdpbusd %zmm{16 + c}, %zmm20, %zmm{4 * r + c}" for c in range(4)]
    lines: list[str] = []
    done = 0
    for i, line in enumerate(plain, start=1):
        lines.append(line)
        while done < len(added) and (done + 1) * len(plain) <= i * (len(added) + 1):
            address = 1024 + 1024 * (index % 2) + 64 * done
            lines.append(added[done].replace("@", str(21 + done % 8)).replace("#", str(address)))
            done += 1
    return lines


def function(name: str, added: list[str]) -> str:
    """Return a function that repeats the steps, its loop in assembly."""
    body = [line for index in range(STEPS) for line in step(index, added)]
    lines = ["mov %rsi, %r8", ".p2align 6", "1:", *body]
    lines += ["add $1024, %rsi", "cmp %rcx, %rsi", "cmovae %r8, %rsi", "dec %rdx", "jnz 1b"]
    text = "".join(f'"{line}\\n"\n' for line in [*lines, "vzeroupper", "ret"])
    signature = f"void {name}(const char*, const char*, long, const char*)"
    return f"__attribute__((naked, noinline)) {signature} {{ asm volatile(\n{text}); }}\n"


def main() -> int:
    """Build and run the program, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cxx", default="g++", help="compiler, g++ unless given")
    compiler = parser.parse_args().cxx
    cases = [("", 0)] + [(name, count) for name in ADDED for count in COUNTS]
    names = [f"body_{i}" for i in range(len(cases))]
    bodies = "".join(
        function(body, [ADDED[name]] * count if name else [])
        for body, (name, count) in zip(names, cases, strict=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "port_costs.cpp")
        binary = Path(folder, "port_costs")
        source.write_text(PROGRAM % (bodies, ", ".join(names)))
        subprocess.run([compiler, "-O2", "-o", binary, source], check=True)
        ran = subprocess.run([binary], check=False, capture_output=True, text=True)
    if ran.returncode != 0:
        print("port_costs: the program stopped; this CPU may lack AVX512-VNNI", file=sys.stderr)
        return 1
    seconds = [float(line) for line in ran.stdout.split()]
    print("| cycles per step, added per step | " + " | ".join(map(str, COUNTS)) + " |")
    print("|---|" + "--:|" * len(COUNTS))
    for i, name in enumerate(ADDED):
        times = seconds[1 + i * len(COUNTS) : 1 + (i + 1) * len(COUNTS)]
        cycles = [(time / seconds[0] - 1) * PRODUCTS for time in times]
        print(f"| {name} | " + " | ".join(f"{c:.1f}" for c in cycles) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
