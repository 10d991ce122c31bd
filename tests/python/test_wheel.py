# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The wheel that `make wheel` built: what is inside, and that it works where nothing else is."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEELS = sorted((ROOT / "build" / "dist").glob("attn8-*.whl"))

pytestmark = pytest.mark.skipif(not WHEELS, reason="no wheel in build/dist: make wheel")

SMOKE = """
import attn8, importlib.metadata, numpy as np, sys
assert not {"torch", "transformers"} & set(sys.modules)
assert attn8.__version__ == importlib.metadata.version("attn8")
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 50, 4, 64), np.float32) for _ in "qkv")
out = attn8.attention(q, k, v, causal=True)
exact, _ = attn8.reference.attention(q, k, v, causal=True)
assert attn8.reference.error_report(out, exact).rel_l2 < 0.03
print(attn8.__file__)
"""


def test_contents():
    names = zipfile.ZipFile(WHEELS[-1]).namelist()
    package = [name for name in names if name.startswith("attn8/")]
    assert "attn8/py.typed" in package
    assert "attn8/_core.pyi" in package
    assert sum(name.endswith(".so") for name in package) == 1
    assert all(name.startswith(("attn8/", "attn8-")) for name in names)


def test_one_core_dependency():
    with zipfile.ZipFile(WHEELS[-1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = wheel.read(name).decode()
    needed = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert len(needed) == 1
    assert needed[0].startswith("Requires-Dist: numpy")


def test_a_clean_environment(tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin" / "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", WHEELS[-1]], check=True)
    run = subprocess.run(
        [environment / "bin" / "python", "-c", SMOKE],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(environment))
    typed = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable",
         environment / "bin" / "python", "-c",
         "import attn8\nreveal_type(attn8.get_num_threads())\nattn8.get_num_threads('x')\n"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'Revealed type is "int"' in typed.stdout, typed.stdout + typed.stderr
    assert "Too many arguments" in typed.stdout
