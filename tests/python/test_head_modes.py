# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""A mode for each kv head, and the file that says which."""

import json

import numpy as np
import pytest
from dense_attention import normal, operands

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
from attn8.policy import HeadPolicy  # noqa: E402

MODES = ["half", "accurate", "exact", "accurate"]


def four_heads():
    return operands(nheads_q=8, nheads_k=4)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_each_head_has_the_bits_of_its_mode(layout, rotate):
    order = (0, 1, 2, 3) if layout == "bshd" else (0, 2, 1, 3)
    q, k, v = (x.transpose(order) for x in four_heads())
    options = {
        "layout": layout, "causal": True, "return_lse": True, "softcap": 3.0,
        "sinks": normal(8), "attn_mask": normal(1, 8, 33, 70),
    }  # fmt: skip
    out, lse = attn8.attention(q, k, v, head_modes=MODES, rotate=rotate, **options)
    out = out.transpose(order)
    for head, mode in enumerate(MODES):
        # Every head of one mode, V rotated as it is where one of the modes keeps it in INT8.
        if rotate and mode != "accurate":
            continue
        wanted, wanted_lse = attn8.attention(q, k, v, mode=mode, rotate=rotate, **options)
        rows = slice(2 * head, 2 * head + 2)
        np.testing.assert_array_equal(out[:, :, rows], wanted.transpose(order)[:, :, rows])
        np.testing.assert_array_equal(lse[:, rows], wanted_lse[:, rows])


def test_varlen():
    q, k, v = (x[0] for x in four_heads())
    starts = np.array([0, 10, 33], np.int32), np.array([0, 40, 70], np.int32)
    out = attn8.attention_varlen(q, k, v, *starts, causal=True, head_modes=tuple(MODES))
    for i in range(2):
        part = [x[starts[n][i] : starts[n][i + 1]][None] for n, x in ((0, q), (1, k), (1, v))]
        wanted = attn8.attention(*part, causal=True, head_modes=MODES)
        np.testing.assert_array_equal(out[starts[0][i] : starts[0][i + 1]], wanted[0])


def test_bad_head_modes():
    q, k, v = four_heads()

    def refused(error, match, head_modes, **options):
        with pytest.raises(error, match=match):
            attn8.attention(q, k, v, head_modes=head_modes, **options)

    refused(TypeError, "head_modes: got str, want a list of modes", "half")
    refused(TypeError, "head_modes: got int, want a list of modes", 4, rotate=True)
    refused(TypeError, r"head_modes\[1\]: got int 7, want a str", ["half", 7, "half", "half"])
    refused(ValueError, "head_modes: got none, want one for each kv head", [])
    refused(ValueError, "head_modes got 3 modes, wants nheads_k=4", MODES[:3])
    refused(ValueError, "mode: got 'half' with head_modes", MODES, mode="half")
    refused(ValueError, "fast", ["fast"] * 4)
    with pytest.raises(ValueError, match="k"):
        attn8.attention(q, attn8.quantize(k), v, head_modes=["exact"] * 4)


def test_compiled():
    torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
    q, k, v = (torch.from_numpy(x) for x in four_heads())

    def call(q, k, v):
        return attn8.attention(q, k, v, causal=True, head_modes=MODES)

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(traced, call(q, k, v), rtol=0, atol=0)


def write(path, **changes):
    found = {
        "format": "attn8-head-policy", "version": 1, "model": "tiny", "default": "accurate",
        "heads": [{"layer": 1, "kv_head": 1, "mode": "exact"}], "else": 3,
    }  # fmt: skip
    path.write_text(json.dumps({**found, **changes}))
    return path


def test_policy(tmp_path):
    policy = HeadPolicy(write(tmp_path / "policy.json"))
    assert policy.modes(0, 2) is None
    assert policy.modes(1, 1) is None
    assert policy.modes(1, 3) == ("accurate", "exact", "accurate")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "other"}, "want JSON with format 'attn8-head-policy', version 1"),
        ({"version": True}, "version 1"),
        ({"version": 2}, "version 1"),
        ({"default": "half"}, "default 'accurate'"),
        ({"heads": {}}, "and heads"),
        ({"heads": [3]}, r"heads\[0\] is int, want an object"),
        ({"heads": [{"kv_head": 0, "mode": "half"}]}, r"heads\[0\] has layer None, want 0 to"),
        ({"heads": [{"layer": 0, "kv_head": -1, "mode": "half"}]}, "has kv_head -1"),
        ({"heads": [{"layer": 0, "kv_head": 1.0, "mode": "half"}]}, "has kv_head 1.0"),
        ({"heads": [{"layer": 0, "kv_head": 0, "mode": "paper"}]}, "has mode 'paper', want acc"),
        ({"heads": [{"layer": 0, "kv_head": 0, "mode": []}]}, r"has mode \[\], want accurate"),
        ({"heads": [{"layer": 0, "kv_head": 0, "mode": "half"}] * 2}, r"heads\[1\] names .* again"),
    ],
)
def test_bad_policies(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        HeadPolicy(write(tmp_path / "policy.json", **changes))


def test_what_is_no_policy_at_all(tmp_path):
    path = tmp_path / "policy.json"
    for content in (b"", b"\xff", b"[1", b"[" * 100000, b"7"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"policy: got .*, want JSON"):
            HeadPolicy(path)
    with pytest.raises(FileNotFoundError):
        HeadPolicy(tmp_path / "missing.json")
    with pytest.raises(TypeError, match="policy: got int, want a path"):
        HeadPolicy(7)
