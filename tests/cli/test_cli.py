# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The command line from outside: exit codes, messages, files, JSON.

``ATTN8_CLI`` names the binary.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

CLI = os.environ.get("ATTN8_CLI", "")
SAMPLE = Path(__file__).parents[2] / "data" / "real_sample.safetensors"
pytestmark = pytest.mark.skipif(not CLI, reason="ATTN8_CLI does not name the binary")


def attn8(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line with no terminal attached."""
    return subprocess.run(
        [CLI, *map(str, args)], capture_output=True, text=True, timeout=300, check=False
    )


def succeed(*args: str | Path) -> str:
    """Run, expect exit 0 and a silent stderr, and return stdout."""
    result = attn8(*args)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def refuse(code: int, *args: str | Path) -> str:
    """Run, expect that exit code, nothing on stdout and one line on stderr; return the line."""
    result = attn8(*args)
    assert result.returncode == code, (result.returncode, result.stderr)
    assert result.stdout == ""
    assert result.stderr.startswith("attn8: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    return result.stderr


def softmax_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 attention of (b, s, h, d) arrays; returns out and the (b, s, h) LSE."""
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2).astype(np.float64) for x in (k, v))
    s = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k) / np.sqrt(q.shape[3])
    if mask is not None:
        s = np.where(mask, s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    out = np.einsum("bhij,bjhd->bihd", p / total, v)
    return out, (top + np.log(total))[..., 0].transpose(0, 2, 1)


def rel_l2(x: np.ndarray, y: np.ndarray) -> float:
    """Relative L2 error of x against y."""
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@pytest.fixture
def qkv(tmp_path: Path) -> dict[str, Path]:
    """Three .npy files in bshd order: 4 query heads, 2 kv heads."""
    rng = np.random.default_rng(1)
    paths = {}
    for name, heads, seq in (("q", 4, 33), ("k", 2, 70), ("v", 2, 70)):
        paths[name] = tmp_path / f"{name}.npy"
        np.save(paths[name], rng.standard_normal((2, seq, heads, 64)).astype(np.float32))
    return paths


def operands(paths: dict[str, Path]) -> list[str | Path]:
    """The three input flags."""
    return [item for name in "qkv" for item in (f"--{name}", paths[name])]


def load(paths: dict[str, Path]) -> list[np.ndarray]:
    """The three arrays."""
    return [np.load(paths[name]) for name in "qkv"]


BOUNDS = {"exact": 1e-5, "half": 0.02, "accurate": 0.03, "paper": 0.06, "fp8": 0.12}


@pytest.mark.parametrize("mode", BOUNDS)
def test_run_computes_attention(qkv: dict[str, Path], tmp_path: Path, mode: str) -> None:
    out = tmp_path / "o.npy"
    text = succeed("run", *operands(qkv), "--out", out, "--mode", mode, "--check", "--json")
    report = json.loads(text)
    expected = (
        "mode kernel isa threads kv_block v_granularity shape quantize_ms attention_ms "
        "rel_l2 mean_rel max_abs cosine mre"
    )
    assert set(expected.split()) <= set(report)
    assert report["mode"] == mode
    assert report["shape"] == [2, 4, 2, 33, 70, 64]
    error = rel_l2(np.load(out), softmax_attention(*load(qkv))[0])
    assert error < BOUNDS[mode]
    assert report["rel_l2"] == pytest.approx(error, rel=1e-3, abs=1e-7)
    if mode != "exact":
        assert error > 1e-4  # another mode's arithmetic must not stand in


def test_run_lse_causal_and_window(qkv: dict[str, Path], tmp_path: Path) -> None:
    q, k, v = load(qkv)
    out, lse = tmp_path / "o.npy", tmp_path / "l.npy"
    i, j = np.arange(33)[:, None], np.arange(70)[None, :]
    cases: dict[tuple[str, ...], np.ndarray] = {
        ("--causal",): j <= i + 37,
        ("--causal", "--align", "top_left"): j <= i,
        ("--window", "5,2"): (j >= i + 37 - 5) & (j <= i + 37 + 2),
        ("--window", "-1,0"): j <= i + 37,
    }
    for flags, mask in cases.items():
        succeed("run", *operands(qkv), "--out", out, "--lse", lse, "--mode", "exact", *flags)
        want, want_lse = softmax_attention(q, k, v, mask)
        assert rel_l2(np.load(out), want) < 1e-5, flags
        assert np.abs(np.load(lse) - want_lse).max() < 1e-4, flags


def test_layouts_and_fortran_order_agree(qkv: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "o.npy"
    succeed("run", *operands(qkv), "--out", out)
    swapped = {name: tmp_path / f"{name}_bhsd.npy" for name in "qkv"}
    for name, array in zip("qkv", load(qkv), strict=True):
        np.save(swapped[name], np.asfortranarray(array.transpose(0, 2, 1, 3)))
    out_bhsd = tmp_path / "o_bhsd.npy"
    succeed("run", *operands(swapped), "--out", out_bhsd, "--layout", "bhsd")
    assert np.array_equal(np.load(out_bhsd).transpose(0, 2, 1, 3), np.load(out))


def test_float16_and_threads(qkv: dict[str, Path], tmp_path: Path) -> None:
    for name, array in zip("qkv", load(qkv), strict=True):
        np.save(qkv[name], array.astype(np.float16))
    outs = []
    for threads in (1, 3):
        out = tmp_path / f"o{threads}.npy"
        succeed("run", *operands(qkv), "--out", out, "--threads", str(threads))
        outs.append(out.read_bytes())
    assert outs[0] == outs[1]
    assert np.load(tmp_path / "o1.npy").dtype == np.float16


def test_safetensors_input(qkv: dict[str, Path], tmp_path: Path) -> None:
    header, data, at = {}, b"", 0
    for name, array in zip("qkv", load(qkv), strict=True):
        raw = array.tobytes()
        header[f"layer.00.{name}"] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [at, at + len(raw)],
        }
        data, at = data + raw, at + len(raw)
    text = json.dumps(header).encode()
    file = tmp_path / "t.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    succeed("run", *operands(qkv), "--out", one)
    succeed("run", "--qkv", file, "--entry", "layer.00.", "--out", two)
    assert one.read_bytes() == two.read_bytes()
    assert "no tensor 'q'" in refuse(2, "run", "--qkv", file, "--out", two)


def test_bad_files_are_one_line_and_leave_nothing(qkv: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "o.npy"
    whole = qkv["k"].read_bytes()
    bad = dict(qkv, k=tmp_path / "bad.npy")
    for content, words in (
        (None, "cannot be read"),
        (b"", "does not begin"),
        (whole[:-1], "truncated"),
        (whole[:50], "truncated"),
        (whole + b"x", "trailing"),
    ):
        bad["k"].unlink(missing_ok=True)
        if content is not None:
            bad["k"].write_bytes(content)
        line = refuse(2, "run", *operands(bad), "--out", out)
        assert "--k: '" in line
        assert words in line
    k = np.load(qkv["k"])
    for array, words in (
        (k.astype(np.float64), "dtype"),
        (k[0], "axes"),
        (k[:, :, :, :32], "k.shape[3]"),
        (k[:, :, [0, 1, 0]], "shape got [2, 70, 2, 64]"),
        (k[:1], "k.shape[0]"),
        (np.where(np.arange(k.size).reshape(k.shape) == 7, np.nan, k).astype(np.float32), "k"),
        (np.where(np.arange(k.size).reshape(k.shape) == 7, np.inf, k).astype(np.float32), "k"),
    ):
        np.save(bad["k"], array)
        assert words in refuse(2, "run", *operands(bad), "--out", out)
    for name in "kv":  # 3 kv heads for 4 query heads
        np.save(tmp_path / f"{name}.npy", k[:, :, [0, 1, 0]])
    assert "k.shape[2]=3" in refuse(2, "run", *operands(qkv), "--out", out)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.npy", "k.npy", "q.npy", "v.npy"]


def test_nan_reaches_only_the_rows_that_see_it(qkv: dict[str, Path], tmp_path: Path) -> None:
    q = np.load(qkv["q"])
    q[0, 3, 1, 5] = np.nan
    np.save(qkv["q"], q)
    out = tmp_path / "o.npy"
    succeed("run", *operands(qkv), "--out", out, "--allow-nonfinite")
    poisoned = np.isnan(np.load(out)).all(axis=-1)
    assert poisoned[0, 3, 1]
    assert poisoned.sum() == 1
    assert np.isnan(np.load(out)).any(axis=-1).sum() == 1


def test_zero_rows_are_fine(qkv: dict[str, Path], tmp_path: Path) -> None:
    for name in "qkv":
        np.save(qkv[name], np.zeros_like(np.load(qkv[name])))
    out = tmp_path / "o.npy"
    succeed("run", *operands(qkv), "--out", out)
    assert not np.load(out).any()


def test_empty_lengths(qkv: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "o.npy"
    for name in "kv":
        np.save(qkv[name], np.zeros((2, 0, 2, 64), np.float32))
    succeed("run", *operands(qkv), "--out", out)
    assert np.load(out).shape == (2, 33, 4, 64)
    assert not np.load(out).any()


def test_output_paths_are_checked(qkv: dict[str, Path], tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "o.npy", tmp_path, "/proc/o.npy"):
        assert "--out: '" in refuse(2, "run", *operands(qkv), "--out", path)
    line = refuse(
        2, "run", *operands(qkv), "--out", tmp_path / "o.npy", "--lse", tmp_path / "o.npy"
    )
    assert "--lse" in line
    assert not (tmp_path / "o.npy").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mode", "exakt"], "exakt"),
        (["--isa", "sse9"], "sse9"),
        (["--layout", "sbhd"], "--layout: got 'sbhd'"),
        (["--threads", "0"], "--threads: got '0'"),
        (["--threads", "many"], "--threads: got 'many'"),
        (["--scale", "nan"], "--scale: got 'nan'"),
        (["--window", "3"], "--window: got '3'"),
        (["--window", "-2,0"], "--window: got '-2,0'"),
        (["--kv-block", "100"], "kv_block"),
        (["--v-granularity", "row"], "row"),
        (["--align", "middle"], "--align"),
        (["--device", "cuda:x"], "--device: got 'cuda:x'"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--softcap", "-30"], "options.softcap got -30.000000, wants 0 or 2^-20 to 2^20"),
        (["--alibi", "a.npy"], "--alibi"),
        (["--bias", "b.npy"], "--bias"),
        (["--sinks", "c.npy"], "--sinks"),
        (["--qkv", "x.safetensors"], "--qkv"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_flags(qkv: dict[str, Path], tmp_path: Path, flags: list[str], words: str) -> None:
    assert words in refuse(2, "run", *operands(qkv), "--out", tmp_path / "o.npy", *flags)


def test_score_changes(tmp_path: Path) -> None:
    """Softcap, bias, boolean mask, ALiBi, sinks and a head_dim of V against NumPy."""
    rng = np.random.default_rng(3)
    q, k = (rng.standard_normal((2, 40, 4, 16)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((2, 40, 4, 24)).astype(np.float32)
    bias = rng.standard_normal((1, 4, 40, 40)).astype(np.float32)
    visible = rng.random((2, 1, 40, 40)) < 0.7
    visible[..., 0] = True
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    sinks = np.array([0.0, 1.0, -1.0, 2.0], np.float32)
    files = {"q": q, "k": k, "v": v, "bias": bias, "visible": visible, "alibi": slopes}
    for name, array in {**files, "sinks": sinks}.items():
        np.save(tmp_path / f"{name}.npy", array)
    flags = [f for n in "qkv" for f in (f"--{n}", tmp_path / f"{n}.npy")]
    flags += ["--out", tmp_path / "o.npy", "--mode", "exact"]

    def softmax(scores: np.ndarray, sink: np.ndarray) -> np.ndarray:
        weights = np.exp(scores)
        return weights / (weights.sum(-1, keepdims=True) + np.exp(sink)[None, :, None, None])

    def attend(weights: np.ndarray) -> np.ndarray:
        return np.einsum("bhij,bjhd->bihd", weights, v)

    scores = np.einsum("bihd,bjhd->bhij", q, k) / 4
    no_sink = np.full(4, -np.inf)
    succeed("run", *flags, "--softcap", "2", "--bias", tmp_path / "bias.npy")
    wanted = attend(softmax(2 * np.tanh(scores / 2) + bias, no_sink))
    assert np.abs(np.load(tmp_path / "o.npy") - wanted).max() < 1e-5
    succeed("run", *flags, "--alibi", tmp_path / "alibi.npy", "--bias", tmp_path / "visible.npy")
    distance = np.abs(np.arange(40)[:, None] - np.arange(40))
    slanted = np.where(visible, scores - slopes[None, :, None, None] * distance, -np.inf)
    assert np.abs(np.load(tmp_path / "o.npy") - attend(softmax(slanted, no_sink))).max() < 1e-5
    report = json.loads(
        succeed("run", *flags, "--sinks", tmp_path / "sinks.npy", "--check", "--json")
    )
    assert np.abs(np.load(tmp_path / "o.npy") - attend(softmax(scores, sinks))).max() < 1e-5
    assert report["max_abs"] < 1e-5
    line = refuse(2, "run", *flags, "--sinks", tmp_path / "q.npy")
    assert "has 4 axes of float32, want 1 of float32" in line
    line = refuse(2, "run", *flags, "--bias", tmp_path / "sinks.npy")
    assert "--bias" in line
    assert "has 1 axes of float32, want 4" in line
    np.save(tmp_path / "bias.npy", bias[:, :3])
    assert "attn_mask.shape got" in refuse(2, "run", *flags, "--bias", tmp_path / "bias.npy")


def test_a_device_the_build_lacks_is_exit_3(qkv: dict[str, Path], tmp_path: Path) -> None:
    if json.loads(succeed("info", "--json"))["cuda"]["built"]:
        pytest.skip("this build has CUDA kernels")
    words = refuse(3, "run", *operands(qkv), "--out", tmp_path / "o.npy", "--device", "cuda")
    assert "context.device got cuda, this build has no CUDA kernels" in words
    assert not (tmp_path / "o.npy").exists()


def test_missing_flags_and_commands() -> None:
    assert "subcommand: got nothing" in refuse(2)
    assert "subcommand: got 'no-such-command', want one of info, run" in refuse(
        2, "no-such-command"
    )
    assert "--out" in refuse(2, "run")
    assert "--q: got nothing" in refuse(2, "run", "--out", "o.npy")
    assert "--shape" in refuse(2, "bench")
    assert "--shape: got '1,2,3'" in refuse(2, "bench", "--shape", "1,2,3")
    assert "divisor" in refuse(2, "bench", "--shape", "1,3,2,4,4,64")


def test_an_isa_the_machine_lacks_is_exit_3(qkv: dict[str, Path], tmp_path: Path) -> None:
    missing = [
        one["name"] for one in json.loads(succeed("info", "--json"))["isas"] if not one["available"]
    ]
    if not missing:
        pytest.skip("this machine has every instruction set")
    line = refuse(3, "run", *operands(qkv), "--out", tmp_path / "o.npy", "--isa", missing[0])
    assert missing[0] in line


def test_info() -> None:
    report = json.loads(succeed("info", "--json"))
    assert report["self_test"] == "ok"
    assert [one["name"] for one in report["isas"]] == ["avx512_vnni", "avx_vnni", "avx2", "scalar"]
    assert any(one["name"] == report["isa"] and one["available"] for one in report["isas"])
    text = succeed("info")
    assert "self-test" in text
    assert "chosen" in text


@pytest.mark.parametrize(
    "command",
    ["", "info", "run", "bench", "verify", "paper", "study", "report", "soak", "calibrate"],
)
def test_help(command: str) -> None:
    text = succeed(*([command] if command else []), "--help")
    assert "--help" in text


def test_bench_json(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.txt"
    shapes.write_text("# two\n1,2,1,64,96,64 causal  # prefill\n\n1,2,1,1,512,64\n")
    report = json.loads(
        succeed("bench", "--shapes", shapes, "--json", "--repeats", "2", "--threads", "1")
    )
    prefill, decode = report["results"]
    keys = (
        "shape causal mode kernel threads median_ms min_ms quantize_ms gops peak_gops "
        "peak_fraction end_to_end_gops bytes_per_s stream_fraction rel_l2"
    )
    assert set(keys.split()) <= set(prefill)
    assert prefill["shape"] == [1, 2, 1, 64, 96, 64]
    assert prefill["causal"] is True
    assert decode["causal"] is False
    pairs = sum(i + 1 + 32 for i in range(64))
    assert prefill["gops"] == pytest.approx(4 * 2 * 64 * pairs / prefill["median_ms"] / 1e6)
    assert prefill["end_to_end_gops"] < prefill["gops"]
    assert prefill["bytes_per_s"] is None
    assert decode["bytes_per_s"] > 0
    assert 0 < prefill["rel_l2"] < 0.05
    both = json.loads(
        succeed(
            "bench", "--shape", "1,1,1,32,32,32", "--repeats", "1", "--threads", "1,2", "--json"
        )
    )
    assert [result["threads"] for result in both["results"]] == [1, 2]
    assert [one["threads"] for one in both["ceilings"]] == [1, 2]
    assert all(one["stream_bytes_per_s"] > 0 for one in both["ceilings"])
    assert "--threads" in refuse(2, "bench", "--shape", "1,1,1,8,8,32", "--threads", "1,0")
    shapes.write_text("1,1,1,1,1\n")
    assert "line 1" in refuse(2, "bench", "--shapes", shapes)
    shapes.write_text("# none\n")
    assert "no shape" in refuse(2, "bench", "--shapes", shapes)


def test_calibrate_keeps_the_budget(tmp_path: Path) -> None:
    """The policy holds what the report says, and no more heads than the budget needs."""
    moved = []
    for budget in ("0.5", "0.015", "0"):
        out = tmp_path / f"{budget}.json"
        args = ("calibrate", "--model", "smollm2", "--budget", budget, "--out", out, "--json")
        report = json.loads(succeed(*args))
        assert report["error"] <= float(budget)
        assert report["error_accurate"] > 0.01
        policy = json.loads(out.read_text())
        assert policy == report["policy"]
        assert (policy["format"], policy["version"]) == ("attn8-head-policy", 1)
        chosen = [
            {key: head[key] for key in ("layer", "kv_head", "mode")}
            for head in report["heads"]
            if head["mode"] != "accurate"
        ]
        assert chosen == policy["heads"]
        moved.append(len(chosen))
    assert moved[0] == 0 < moved[1] < moved[2] == 5
    assert "minilm, smollm2" in refuse(2, "calibrate")
    assert "minilm, smollm2" in refuse(2, "calibrate", "--model", "gpt")
    missing = tmp_path / "missing" / "x.json"
    assert "--out" in refuse(2, "calibrate", "--model", "minilm", "--out", missing)


def test_run_follows_a_policy(qkv: dict[str, Path], tmp_path: Path) -> None:
    """Heads that the policy names have the bits of their mode; other layers are accurate."""
    policy = tmp_path / "policy.json"
    heads = [{"layer": 3, "kv_head": 1, "mode": "exact"}]
    head = {"format": "attn8-head-policy", "version": 1, "default": "accurate"}
    policy.write_text(json.dumps({**head, "heads": heads}))
    outs = {}
    cases: dict[str, tuple[str | Path, ...]] = {
        "accurate": (),
        "exact": ("--mode", "exact"),
        "layer 3": ("--policy", policy, "--layer", "3"),
        "layer 2": ("--policy", policy, "--layer", "2"),
    }
    for name, args in cases.items():
        out = tmp_path / "o.npy"
        report = json.loads(succeed("run", *operands(qkv), "--out", out, *args, "--json"))
        assert report.get("head_modes") == (["accurate", "exact"] if name == "layer 3" else None)
        outs[name] = np.load(out)
    assert (outs["layer 2"] == outs["accurate"]).all()
    assert (outs["layer 3"][:, :, :2] == outs["accurate"][:, :, :2]).all()
    assert (outs["layer 3"][:, :, 2:] == outs["exact"][:, :, 2:]).all()
    assert not (outs["exact"] == outs["accurate"]).all()
    out = tmp_path / "none.npy"
    both = ("--policy", policy, "--mode", "half")
    assert "--policy" in refuse(2, "run", *operands(qkv), "--out", out, *both)
    policy.write_text("{}")
    assert "is not a policy" in refuse(2, "run", *operands(qkv), "--out", out, *both[:2])
    assert not out.exists()


def test_soak_json() -> None:
    """Same seed, same life; another seed, another."""
    lives = []
    for seed in ("7", "7", "8"):
        args = ("soak", "--operations", "600", "--pages", "16", "--seed", seed, "--json")
        report = json.loads(succeed(*args))
        assert report["operations"] == 600
        assert report["failures"] == []
        assert report["counts"]["out_of_pages"] > 0
        assert 0 < report["worst_out_ratio"] <= 1
        assert report["checks"] > 0
        assert report["peak_pages"] <= report["pages"] == 16
        assert report["rss_peak_bytes"] >= report["rss_end_bytes"] > 0
        lives.append((report["counts"], report["tokens"], report["rows"]))
    assert lives[0] == lives[1] != lives[2]
    assert "--pages" in refuse(2, "soak", "--pages", "0")


def test_study_and_report_write_their_files(tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    text = succeed(
        "study",
        "--recipe",
        "normal",
        "--lengths",
        "128,256",
        "--grid-length",
        "256",
        "--rows",
        "4",
        "--head-dim",
        "32",
        "--out",
        out,
        "--json",
    )
    records = json.loads(text)["records"]
    assert records == json.loads(out.read_text())["records"]
    assert {one["seqlen_k"] for one in records} == {128, 256}
    assert {"tensor", "channel", "block", "block_channel", "token"} == {
        one["v_granularity"] for one in records if "v_granularity" in one
    }
    assert all(0 < one["rel_l2"] < 1 for one in records)
    text = succeed(
        *("study", "--recipe", "normal", "--lengths", "128", "--rows", "4", "--kv-block", "64,512"),
        *("--by-entry", "--qkv", SAMPLE, "--json"),
    )
    records = [one for one in json.loads(text)["records"] if "mode" not in one]
    assert {(one["kv_block"], one["p_scale"]) for one in records} == {
        (64, "block_255"),
        (512, "block_255"),
    }
    assert len({one["data"] for one in records}) > 2
    assert "--recipe: got 'none'" in refuse(2, "study", "--recipe", "none")
    assert "--out: '" in refuse(2, "study", "--out", tmp_path / "missing" / "x.json")
    assert "--data: '" in refuse(
        2, "report", "--out", tmp_path / "r.html", "--data", tmp_path / "none.safetensors"
    )
    assert not (tmp_path / "r.html").exists()
