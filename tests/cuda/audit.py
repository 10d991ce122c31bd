#!/usr/bin/env python3
# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the machine code of the attention kernels and checks what a GPU is not needed for.

    tests/cuda/audit.py build/cuda [--markdown]

Looks at every object file of the CUDA backend below the folder. In the interior loop of each
kernel, the one without a mask, there must be no access to local memory (a spilled register) and no
more waits for the tensor cores than the source has (ptxas adds one around every wgmma when it
serializes them, advisories C7510 to C7520); the kernel must keep to its registers, and the loop to
a number of instructions per score. Needs Python alone: no disassembler, no toolkit, no GPU.
"""

import argparse
import dataclasses
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

CUDA_MACHINE = 190  # e_machine of a cubin
# The low 9 bits of an instruction of compute capability 8.0 to 9.0 say what it is.
BRANCH, EXPONENTIAL, LOCAL_LOAD, LOCAL_STORE, WARPGROUP = 0x147, 0x108, 0x183, 0x187, 0x1C5
MMA, WGMMA = 0x037, 0x1F1

#: Instructions per score and thread that the interior loop may have, by family and head_dim: what
#: docs/performance-cuda.md records, rounded up. First those that leave scores alone.
LIMITS = {
    "": {
        ("sm80", 64): 12.5,
        ("sm80", 96): 14.5,
        ("sm80", 128): 15.0,
        ("sm80", 256): 22.0,
        ("sm90", 64): 10.5,
        ("sm90", 96): 11.0,
        ("sm90", 128): 11.5,
        ("sm90", 256): 16.0,
        ("decode", 64): 21.5,
        ("decode", 96): 24.0,
        ("decode", 128): 25.5,
    },
    "softcap": {
        ("sm80", 64): 19.0,
        ("sm80", 128): 21.5,
        ("sm80", 256): 28.0,
        ("sm90", 64): 16.5,
        ("sm90", 128): 17.5,
        ("sm90", 256): 22.0,
    },
    "biased": {("sm80", 64): 42.0, ("sm80", 128): 45.0, ("sm80", 256): 50.5},
    "half": {("sm80", 64): 10.5, ("sm80", 128): 13.0, ("sm80", 256): 18.5},
    "half_softcap": {("sm80", 64): 17.0, ("sm80", 128): 19.5, ("sm80", 256): 24.5},
    "half_biased": {("sm80", 64): 39.5, ("sm80", 128): 41.0, ("sm80", 256): 47.5},
}
#: Registers at launch: 65,536 over the threads of a multiprocessor's blocks.
REGISTERS = {"sm80": 255, "sm90": 168, "decode": 255}
#: Local memory accesses in the interior loop, where ptxas finds no place for all there is.
LOCAL_ACCESSES = {("softcap", "sm90", 128): 10}
#: Waits, fences and commits around wgmma in one turn of the loop; twice this many is serialized.
WARPGROUP_INSTRUCTIONS = 10


@dataclasses.dataclass
class Section:
    """One function's code."""

    name: str
    architecture: int
    registers: int
    code: bytes


@dataclasses.dataclass
class Kernel:
    """What was found in the interior loop of one kernel."""

    name: str
    variant: str
    family: str
    head_dim: int
    kv_block: int
    architecture: int
    registers: int
    instructions: int
    local: int
    warpgroup: int

    @property
    def per_score(self) -> float:
        """Instructions per score and thread: a warp has 16 rows of the block."""
        return self.instructions / (self.kv_block / 2)

    def complaints(self) -> Iterator[str]:
        """One line per broken rule."""
        local_limit = LOCAL_ACCESSES.get((self.variant, self.family, self.head_dim), 0)
        if self.local > local_limit:
            yield f"{self.local} accesses to local memory in the interior loop, want {local_limit}"
        if self.registers > REGISTERS[self.family]:
            yield f"{self.registers} registers, want at most {REGISTERS[self.family]}"
        limit = LIMITS[self.variant][self.family, self.head_dim]
        if self.per_score > limit:
            yield f"{self.per_score:.2f} instructions per score, want at most {limit}"
        if self.warpgroup > WARPGROUP_INSTRUCTIONS:
            yield f"{self.warpgroup} waits and fences around wgmma: ptxas serialized them"


def cubins(data: bytes) -> Iterator[bytes]:
    """ELF images of GPU code inside an object file."""
    at = data.find(b"\x7fELF", 1)
    while at >= 0:
        if struct.unpack_from("<H", data, at + 18)[0] == CUDA_MACHINE:
            yield data[at:]
        at = data.find(b"\x7fELF", at + 4)


def text_at(elf: bytes, at: int) -> str:
    """Zero-terminated string."""
    return elf[at : elf.index(b"\0", at)].decode()


def register_counts(elf: bytes, info: bytes, symbols: bytes, names: int) -> dict[str, int]:
    """Registers by function, from the attributes in .nv.info."""
    counts = {}
    at = 0
    while at + 4 <= len(info):
        layout, attribute, length = struct.unpack_from("<BBH", info, at)
        if (layout, attribute) == (4, 0x2F):
            symbol, registers = struct.unpack_from("<II", info, at + 4)
            counts[text_at(elf, names + struct.unpack_from("<I", symbols, symbol * 24)[0])] = (
                registers
            )
        at += 4 + (length if layout == 4 else 0)
    return counts


def sections(elf: bytes) -> Iterator[Section]:
    """Code sections of a cubin."""
    table = struct.unpack_from("<Q", elf, 40)[0]
    flags = struct.unpack_from("<I", elf, 48)[0]
    size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    by_name = {text_at(elf, headers[names_index][4] + header[0]): header for header in headers}

    def content(name: str) -> bytes:
        return elf[by_name[name][4] : by_name[name][4] + by_name[name][5]]

    counts = register_counts(elf, content(".nv.info"), content(".symtab"), by_name[".strtab"][4])
    for name in by_name:
        if name.startswith(".text."):
            function = name.removeprefix(".text.")
            yield Section(function, flags >> 8 & 0xFF, counts.get(function, 0), content(name))


def branch_target(architecture: int, address: int, low: int, high: int) -> int:
    """Where the BRA at `address` goes."""
    offset, bits = low >> 34 | (high & 0x3FFFF) << 30, 48
    if architecture >= 90:
        offset, bits = offset << 8 | low >> 16 & 0xFF, 56
    if offset >> bits - 1:
        offset -= 1 << bits
    return address + 16 + 4 * offset


def interior_loop(architecture: int, code: bytes, kv_block: int) -> list[int]:
    """Opcodes of the shortest innermost loop that multiplies matrices and takes exponentials."""
    words = [struct.unpack_from("<QQ", code, i) for i in range(0, len(code), 16)]
    opcodes = [low & 0x1FF for low, _ in words]
    loops = []
    for i, (low, high) in enumerate(words):
        if opcodes[i] == BRANCH:
            target = branch_target(architecture, 16 * i, low, high)
            if 0 <= target <= 16 * i:
                body = opcodes[target // 16 : i + 1]
                multiplies = MMA in body or WGMMA in body
                # The loops of scores beyond float have a few, a block has one per score.
                if multiplies and body.count(EXPONENTIAL) >= kv_block // 2:
                    loops.append(body)
    return min(loops, key=len, default=[])


def variant_of(name: str) -> str:
    """What a kernel is beside `accurate` and `paper`: "", "softcap", "half", "half_biased", ..."""
    return "_".join(part for part in name.split("_") if part in ("half", "softcap", "biased"))


def kernels(root: Path) -> list[Kernel]:
    """Every attention kernel of the object files below `root`."""
    found = []
    for path in sorted(root.rglob("attend_*.o")):
        match = re.match(r"attend_(\w+)_(sm80|sm90|decode)_d(\d+)", path.name)
        if match is None:
            continue
        family, head_dim = match[2], int(match[3])
        kv_block = 256 if family == "sm90" and head_dim <= 128 else 128
        if match[1].startswith("half") or family == "decode":
            kv_block = 64
        for elf in cubins(path.read_bytes()):
            for section in sections(elf):
                if "attend_kernel" not in section.name:
                    continue
                loop = interior_loop(section.architecture, section.code, kv_block)
                found.append(
                    Kernel(
                        name=match[0],
                        variant=variant_of(match[1]),
                        family=family,
                        head_dim=head_dim,
                        kv_block=kv_block,
                        architecture=section.architecture,
                        registers=section.registers,
                        instructions=len(loop),
                        local=loop.count(LOCAL_LOAD) + loop.count(LOCAL_STORE),
                        warpgroup=loop.count(WARPGROUP),
                    )
                )
    return found


def main() -> int:
    """Check all kernels; 1 when a rule is broken or there is nothing to check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="build folder with the objects of attn8_cuda")
    parser.add_argument("--markdown", action="store_true", help="print a table for the docs")
    arguments = parser.parse_args()
    found = kernels(arguments.folder)
    failures = []
    if arguments.markdown:
        print("| kernel | code for | registers | interior loop | per score | local accesses |")
        print("|---|---|---|---|---|---|")
    for kernel in found:
        where = f"{kernel.name} sm_{kernel.architecture}"
        if arguments.markdown:
            print(
                f"| {kernel.name} | sm_{kernel.architecture} | {kernel.registers} | "
                f"{kernel.instructions} | {kernel.per_score:.2f} | {kernel.local} |"
            )
        if kernel.instructions == 0:
            failures.append(f"{where}: no interior loop was found")
        failures += [f"{where}: {line}" for line in kernel.complaints()]
    if not found:
        failures.append(f"no attention kernel below {arguments.folder}")
    print(f"audit: {len(found)} kernels, {len(failures)} complaints")
    for line in failures:
        print(f"  {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
