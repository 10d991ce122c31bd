# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Which mode each head of a model runs in: the file of ``attn8 calibrate`` (docs/precision.md)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_FORMAT, _VERSION = "attn8-head-policy", 1
_MODES = ("accurate", "half", "exact")
_MAX_INDEX = 1 << 20  # of layers and heads; no model comes near it


class HeadPolicy:
    """Modes of the kv heads of a model; a head that is not named runs in ``accurate``.

    Parameters
    ----------
    path : str or os.PathLike
        The file.

    Raises
    ------
    OSError, ValueError
        The file cannot be read, or is no policy.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"policy: got {type(path).__name__}, want a path")
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"policy: got {path} ({type(error).__name__}), want JSON") from None
        known = isinstance(found, dict) and all(
            type(found.get(key)) is type(want) and found[key] == want
            for key, want in (("format", _FORMAT), ("version", _VERSION), ("default", "accurate"))
        )
        if not known or not isinstance(found.get("heads"), list):
            raise ValueError(
                f"policy: got {path}, want JSON with format {_FORMAT!r}, version {_VERSION}, "
                "default 'accurate' and heads"
            )
        self._modes: dict[tuple[int, int], str] = {}
        for i, entry in enumerate(found["heads"]):
            self._add(f"policy: got {path}, heads[{i}]", entry)

    def _add(self, where: str, entry: Any) -> None:
        def index(key: str) -> int:
            value = entry.get(key)
            if type(value) is not int or not 0 <= value <= _MAX_INDEX:
                raise ValueError(f"{where} has {key} {value!r}, want 0 to {_MAX_INDEX}")
            return value

        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {type(entry).__name__}, want an object")
        head = index("layer"), index("kv_head")
        if entry.get("mode") not in _MODES:
            raise ValueError(f"{where} has mode {entry.get('mode')!r}, want {', '.join(_MODES)}")
        if head in self._modes:
            raise ValueError(f"{where} names layer {head[0]}, kv_head {head[1]} again, want once")
        self._modes[head] = entry["mode"]

    def modes(self, layer: int, nheads_k: int) -> tuple[str, ...] | None:
        """Return ``head_modes`` of a layer; None where all heads run in ``accurate``."""
        modes = tuple(self._modes.get((layer, head), "accurate") for head in range(nheads_k))
        return None if set(modes) == {"accurate"} else modes
