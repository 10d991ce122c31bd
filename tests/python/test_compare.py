# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""python -m attn8 compare."""

import json
import math

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
from attn8 import comparison  # noqa: E402

SMALL = ["--shape", "2,4,2,33,70,16", "--repeats", "2", "--threads", "1"]
has_gpu = torch.cuda.is_available() and attn8.info()["cuda"]["built"]
gpu = pytest.mark.skipif(
    not has_gpu, reason="no CUDA device that torch sees, or attn8 built without CUDA"
)


@pytest.fixture(autouse=True)
def _threads():
    torch_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(torch_threads)
    attn8.set_num_threads(None)


def results_of(capsys, *arguments):
    assert comparison.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results(capsys, causal, dtype, monkeypatch):
    monkeypatch.setitem(comparison.SECONDS, "cpu", 1e-4)
    flags = ["--mode", "accurate", "--mode", "exact", "--dtype", dtype]
    found = results_of(capsys, *SMALL, "--device", "cpu", *flags, *(["--causal"] if causal else []))
    assert found["on"].endswith("1 threads")
    (problem,) = found["problems"]
    assert problem["shape"] == [2, 4, 2, 33, 70, 16]
    rows = {row["name"]: row for row in problem["rows"]}
    assert list(rows) == ["torch", "accurate", "exact"]
    rounding = 1e-6 if dtype == "float32" else 5e-3
    # Every kernel is held against one reference: a mask or a head that went wrong would show.
    assert rows["torch"]["error"] < 2 * rounding
    assert rows["exact"]["error"] < rounding
    assert 1e-3 < rows["accurate"]["error"] < 0.03
    assert rows["torch"]["speedup"] == 1
    for row in rows.values():
        pairs = 33 * 34 // 2 if causal else 33 * 70
        wanted = 4 * 2 * 4 * 16 * pairs / (1e-3 * row["ms"]) / 1e12
        assert math.isclose(row["tops"], wanted, rel_tol=1e-6)


@pytest.mark.parametrize("sizes", [(3, 7), (7, 3), (5, 5), (1, 4)])
def test_pairs_under_a_causal_mask(sizes):
    seen = torch.ones(sizes).tril().sum()
    assert comparison.Shape(1, 1, 1, *sizes, 8).pairs(causal=True) == int(seen)


def test_table(capsys, monkeypatch):
    monkeypatch.setitem(comparison.SECONDS, "cpu", 1e-4)
    assert comparison.main([*SMALL, "--device", "cpu"]) == 0
    first, _, shape, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("CPU, ")
    assert shape == "2,4,2,33,70,16"
    assert head.split() == ["ms", "TOPS", "times", "torch", "error", "%"]
    assert [row.split()[0] for row in rows] == ["torch", "accurate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "argument --shape: got '1,2,3', want six numbers"),
        (["--shape", "1,4,3,8,8,8"], "argument --shape: got '1,4,3,8,8,8', want Hkv to divide"),
        (["--device", "tpu"], "argument --device: got 'tpu', want cpu, cuda or cuda:N"),
        (["--device", "cpu:1"], "argument --device: got 'cpu:1', want cpu, cuda or cuda:N"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        comparison.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_values(capsys):
    for arguments, status, message in (
        (["--repeats", "0"], 2, "compare: --repeats: got 0, want at least 1"),
        (["--shape", "1,1,1,8,8,300", "--device", "cpu"], 2, "compare: "),
    ):
        assert comparison.main(arguments) == status
        printed = capsys.readouterr().err
        assert printed.startswith(message)
        assert len(printed.splitlines()) == 1


@pytest.mark.skipif(has_gpu, reason="there is a CUDA device")
def test_no_device(capsys):
    assert comparison.main(["--device", "cuda", *SMALL]) == 3
    assert capsys.readouterr().err.startswith("compare: --device: got cuda:0 ")


@gpu
def test_on_cuda(capsys):
    found = results_of(capsys, "--shape", "1,4,2,200,300,64", "--repeats", "2", "--mode", "half")
    rows = {row["name"]: row for row in found["problems"][0]["rows"]}
    assert list(rows) == ["torch", "torch cuDNN", "half"]
    assert rows["torch"]["error"] < 5e-3
    assert 1e-4 < rows["half"]["error"] < 0.02
    found = results_of(capsys, "--shape", "1,4,2,20,30,64", "--repeats", "1", "--mode", "exact")
    assert found["problems"][0]["rows"][-1]["refused"].startswith("mode")
