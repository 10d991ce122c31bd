# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""What a call from Python costs over the C++ call it makes, at a shape that takes no time."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import attn8
import numpy as np
from attn8 import _core

SHAPE = (1, 1, 1, 64)  # one query and one key
REPEATS = 20000


def shortest(call: Callable[[], Any]) -> float:
    """Return the shortest time of a call in seconds: other work on the machine only adds."""
    least = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


def main() -> None:
    """Print microseconds: C++, and what each way to call adds."""
    q, k, v, out = (np.ones(SHAPE, np.float32) for _ in range(4))
    core = _core.attention_seconds(q, k, v, out, REPEATS)
    print(f"C++ attn8::attention()          {1e6 * core:6.1f} us")
    calls = {
        "attn8.attention, NumPy": lambda: attn8.attention(q, k, v, threads=1),
        "attn8.attention, NumPy, out": lambda: attn8.attention(q, k, v, out=out, threads=1),
        "flash_attn_func, NumPy": lambda: attn8.flash_attn_func(q, k, v, threads=1),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        tensors = [torch.from_numpy(x) for x in (q, k, v)]
        calls["attn8.attention, torch"] = lambda: attn8.attention(*tensors, threads=1)
        calls["torch's SDPA itself, whole"] = lambda: (
            torch.nn.functional.scaled_dot_product_attention(*tensors)
        )
    for name, call in calls.items():
        taken = shortest(call)
        added = taken if "whole" in name else taken - core
        print(f"{name:30}  {1e6 * added:+6.1f} us")


if __name__ == "__main__":
    main()
