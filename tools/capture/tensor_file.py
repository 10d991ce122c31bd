# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Reads and writes safetensors files of captured Q, K, V.

The writer is deterministic: the same tensors and metadata give the same bytes. (The writer of the
safetensors package orders ``__metadata__`` by a hash table.) bfloat16, which NumPy does not have,
is rounded from float32 when it is written and widened when it is read.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from command_line import InputError
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]

# Storage type -> (name in the safetensors header, bytes per element).
STORAGE = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}

# Longest header that the safetensors format allows.
MAX_HEADER_BYTES = 100_000_000


def round_to_bfloat16(x: FloatArray) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, ties to even.

    Parameters
    ----------
    x : array of any shape
        Finite values.

    Returns
    -------
    array of uint16, shape of ``x``
        The upper halves of the rounded float32 words.
    """
    words = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    # 0x7fff plus the lowest kept bit rounds halves to even.
    rounded = words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def widen_bfloat16(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 words to float32 exactly."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def as_stored(x: FloatArray, dtype: str) -> FloatArray:
    """Round ``x`` to a storage type and return the rounded values as floats.

    Raises
    ------
    InputError
        If a finite value of ``x`` overflows the storage type.
    """
    if dtype == "bfloat16":
        stored: FloatArray = widen_bfloat16(round_to_bfloat16(x))
    else:
        with np.errstate(over="ignore"):
            stored = x.astype(np.dtype(dtype))
    if np.isfinite(x).all() and not np.isfinite(stored).all():
        largest = float(np.abs(x).max())
        raise InputError(f"dtype: got {dtype} with values up to {largest:g}, want float32")
    return stored


def check_writable(path: Path) -> None:
    """Raise `InputError` unless a file can be created at ``path``."""
    if path.is_dir():
        raise InputError(f"out: got the directory {path}, want a file")
    parent = path.parent
    if not parent.is_dir():
        raise InputError(f"out: got {path}, want a file in a directory that exists")
    if not os.access(parent, os.W_OK):
        raise InputError(f"out: got {path}, want a directory that can be written")


def write(path: Path, tensors: dict[str, FloatArray], metadata: dict[str, str], dtype: str) -> int:
    """Write tensors to a safetensors file.

    Parameters
    ----------
    path : Path
        Replaced in one step: after a failure it is as it was.
    tensors : dict
        Names to float arrays; written in sorted order of the names.
    metadata : dict
        Names to text; written in sorted order.
    dtype : {"float16", "bfloat16", "float32"}
        Storage type of every tensor.

    Returns
    -------
    int
        Bytes written.
    """
    code, width = STORAGE[dtype]
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, x in sorted(tensors.items()):
        end = offset + x.size * width
        header[name] = {"dtype": code, "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The data starts at a multiple of 8 bytes, as the format asks.
    text += b" " * (-len(text) % 8)
    check_writable(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, x in sorted(tensors.items()):
                stored = as_stored(x, dtype)
                words = round_to_bfloat16(stored) if dtype == "bfloat16" else stored
                file.write(np.ascontiguousarray(words).tobytes())
        # mkstemp gives 0600; a file of data is as readable as one made by open().
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise InputError(f"out: got {path} ({error.strerror}), want room to write it") from None
        raise
    return 8 + len(text) + offset


def read(path: Path) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """Read a safetensors file of floats.

    Parameters
    ----------
    path : Path
        The file; its data is memory-mapped, so that large captures are read piece by piece.

    Returns
    -------
    tensors : dict
        Names to arrays, float16 or float32 (bfloat16 is widened), in the order of the names.
    metadata : dict
        The texts of ``__metadata__``.

    Raises
    ------
    InputError
        If the file is missing, truncated or not a safetensors file of floats.
    """
    if not path.is_file():
        raise InputError(f"file: got {path}, want a safetensors file that exists")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > min(size, MAX_HEADER_BYTES):
            raise InputError(f"file: got {path} with {size} bytes, want a whole safetensors file")
        try:
            header = json.loads(file.read(start - 8))
            metadata = header.pop("__metadata__", {})
            entries = {
                name: (entry["dtype"], entry["shape"], *entry["data_offsets"])
                for name, entry in sorted(header.items())
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"file: got {path}, want a safetensors header") from None
    types = {
        code: (np.dtype(np.uint16 if code == "BF16" else name), width)
        for name, (code, width) in STORAGE.items()
    }
    tensors: dict[str, FloatArray] = {}
    for name, (code, shape, begin, end) in entries.items():
        if code not in types:
            raise InputError(f"{name}: got dtype {code}, want one of {', '.join(types)}")
        dtype, width = types[code]
        if end - begin != int(np.prod(shape)) * width or not 0 <= begin <= end <= size - start:
            raise InputError(
                f"{name}: got bytes {begin}..{end} of {size - start} for shape {shape}, "
                "want offsets that hold the shape inside the file"
            )
        if end == begin:
            tensors[name] = np.zeros(shape, dtype)
            continue
        data = np.memmap(path, dtype, "r", start + begin, tuple(shape))
        tensors[name] = widen_bfloat16(data) if code == "BF16" else data
    return tensors, metadata


def triples(tensors: dict[str, FloatArray], metadata: dict[str, str]) -> list[str]:
    """List the prefixes for which a file holds q, k and v, in the order of the names.

    Raises
    ------
    InputError
        If a triple is incomplete or its shapes do not fit each other, or if there is none.
    """
    prefixes = sorted({m.group(1) for name in tensors if (m := re.fullmatch(r"(.+)\.[qkv]", name))})
    if not prefixes:
        raise InputError("file: got no tensors NAME.q, NAME.k, NAME.v, want at least one triple")
    for prefix in prefixes:
        for part in "qkv":
            x = tensors.get(f"{prefix}.{part}")
            if x is None or x.ndim != 4:
                got = "nothing" if x is None else f"shape {list(x.shape)}"
                raise InputError(f"{prefix}.{part}: got {got}, want [batch, seq, head, dim]")
        q, k, v = (tensors[f"{prefix}.{part}"] for part in "qkv")
        if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise InputError(
                f"{prefix}.v: got shape {list(v.shape)}, want {list(k.shape)} of k "
                f"and the batch and dim of q {list(q.shape)}"
            )
        if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
            raise InputError(
                f"{prefix}.k: got {k.shape[2]} heads, want a divisor of the {q.shape[2]} of q"
            )
        for key, wanted in (("causal", "true or false"), ("softmax_scale", "a number")):
            value = metadata.get(f"{prefix}.{key}")
            good = value in ("true", "false") if key == "causal" else _is_number(value)
            if not good:
                raise InputError(f"{prefix}.{key}: got {value!r} in the metadata, want {wanted}")
    return prefixes


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and bool(np.isfinite(float(text)))
    except ValueError:
        return False
