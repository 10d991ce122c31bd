# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m attn8``: info, compare, eval, and the commands of the command line attn8."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from attn8.runtime import info

OWN = {"compare": "attn8.comparison", "eval": "attn8.evaluation.command"}
NEEDS = {
    "compare": ("torch",),
    "eval": ("torch", "transformers", "accelerate", "gguf", "matplotlib"),
}
FORWARDED = ("bench", "paper", "report", "run", "study", "verify")
USAGE = f"""usage: python -m attn8 COMMAND ...

info [--json]   version, instruction sets, threads, torch and transformers found
compare         time and error beside torch's attention, on the CPU or a GPU (--device cuda)
eval            INT8 attention in whole models; both explain themselves with --help
{", ".join(FORWARDED)}
                the command line attn8, built from the same sources: found through ATTN8_CLI,
                beside this Python, or on PATH
"""


def command_line() -> str | None:
    """Return the path of the program attn8, or None."""
    named = os.environ.get("ATTN8_CLI")
    if named:
        return named
    beside = Path(sys.executable).parent / "attn8"
    return str(beside) if beside.is_file() else shutil.which("attn8")


def _info(arguments: list[str]) -> int:
    if arguments not in ([], ["--json"]):
        print(f"info: got {' '.join(arguments)}, want nothing or --json", file=sys.stderr)
        return 2
    found = info()
    if arguments:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        if key == "cuda":
            print(f"{key:13} {value['reason'] or 'available'}")
            for device in value["devices"]:
                runs = device["kernels"] or f"not used: {device['reason']}"
                print(f"  {device['name']}, compute capability {device['capability']}: {runs}")
            continue
        if key != "isas":
            print(f"{key:13} {'not installed' if value is None else value}")
            continue
        for isa in value:
            reason = "available" if isa["available"] else f"not available: {isa['reason']}"
            print(f"  {isa['name']:11} {reason}")
    return 0


def main(arguments: list[str]) -> int:
    """Run a command; return its exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "info":
        return _info(rest)
    if name in OWN:
        try:
            main_of = importlib.import_module(OWN[name]).main
        except ImportError as error:
            how = f"pip install {' '.join(NEEDS[name])}"
            print(f"{name}: got no {error.name}, want it: {how}", file=sys.stderr)
            return 3
        return int(main_of(rest))
    if name not in FORWARDED:
        known = ", ".join(("info", *OWN, *FORWARDED))
        print(f"command: got {name}, want {known}", file=sys.stderr)
        return 2
    program = command_line()
    if program is None:
        print(
            f"{name}: got no program attn8, want it on PATH, or its path in ATTN8_CLI",
            file=sys.stderr,
        )
        return 3
    try:
        return subprocess.run([program, name, *rest], check=False).returncode
    except OSError as error:
        print(f"{name}: got {program} ({error.strerror}), want the program attn8", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
