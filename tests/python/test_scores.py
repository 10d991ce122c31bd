# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Softcap, masks, ALiBi, sinks, lengths and offsets, against attention by its definition."""

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, operands, visible

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")

BATCH, SEQLEN_Q, SEQLEN_K, HEADS = 2, 33, 70, 4
SLOPES = np.float32([0.5, 0.25, 0.125, 0.0625])
LENGTHS, LEFTPAD = np.array([50, 70], np.int32), np.array([0, 9], np.int32)


def bools(*shape):
    return np.random.default_rng(2).random(shape) < 0.6


def distances(align="bottom_right", lengths=(SEQLEN_K, SEQLEN_K)):
    offsets = [n - SEQLEN_Q if align == "bottom_right" else 0 for n in lengths]
    rows = np.arange(SEQLEN_Q)[:, None] - np.arange(SEQLEN_K)
    return np.abs(np.stack([rows + offset for offset in offsets]))[:, None]  # [batch, 1, i, j]


def padded(causal):
    """What is seen where keys are [LEFTPAD, LENGTHS) and the last query stands at the last key."""
    seen = np.zeros((BATCH, 1, SEQLEN_Q, SEQLEN_K), bool)
    for i, (first, last) in enumerate(zip(LEFTPAD, LENGTHS, strict=True)):
        seen[i, 0, :, :last] = visible(SEQLEN_Q, last, causal)
        seen[i, 0, :, :first] = False
    return seen


CASES = {
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "bool mask of 2 dimensions": (
        {"attn_mask": bools(SEQLEN_Q, SEQLEN_K)}, {"seen": bools(SEQLEN_Q, SEQLEN_K)},
    ),
    "bool mask of the keys": (
        {"attn_mask": bools(BATCH, 1, 1, SEQLEN_K)}, {"seen": bools(BATCH, 1, 1, SEQLEN_K)},
    ),
    "float mask of the heads": (
        {"attn_mask": normal(HEADS, SEQLEN_Q, SEQLEN_K)},
        {"bias": normal(HEADS, SEQLEN_Q, SEQLEN_K)},
    ),
    "float16 mask of all": (
        {"attn_mask": normal(BATCH, HEADS, SEQLEN_Q, SEQLEN_K, dtype=np.float16)},
        {"bias": normal(BATCH, HEADS, SEQLEN_Q, SEQLEN_K, dtype=np.float16)},
    ),
    "slopes": ({"alibi_slopes": SLOPES}, {"bias": -SLOPES[:, None, None] * distances()}),
    "slopes of each sequence, causal": (
        {"alibi_slopes": np.stack([SLOPES, 2 * SLOPES]), "causal": True},
        {
            "bias": -np.stack([SLOPES, 2 * SLOPES])[:, :, None, None] * distances(),
            "seen": visible(SEQLEN_Q, SEQLEN_K, True),
        },
    ),
    "sinks": (
        {"sinks": np.float32([-1, 0, 2, 5])}, {"sinks": np.float32([-1, 0, 2, 5])},
    ),
    "lengths and padding": (
        {"seqlens_k": LENGTHS, "leftpad_k": LEFTPAD}, {"seen": padded(False)},
    ),
    "lengths and padding, causal": (
        {"seqlens_k": LENGTHS, "leftpad_k": LEFTPAD, "causal": True}, {"seen": padded(True)},
    ),
    "offsets": (
        {"q_offset": 30, "k_offset": 10, "causal": True, "align": "top_left"},
        {"seen": np.arange(SEQLEN_K) <= np.arange(SEQLEN_Q)[:, None] + 20},
    ),
    "all together": (
        {
            "softcap": 3.0, "attn_mask": normal(SEQLEN_Q, SEQLEN_K), "causal": True,
            "alibi_slopes": SLOPES, "sinks": np.float32([0, 1, 2, 3]), "seqlens_k": LENGTHS,
            "leftpad_k": LEFTPAD,
        },
        {
            "softcap": 3.0, "sinks": np.float32([0, 1, 2, 3]), "seen": padded(True),
            "bias": normal(SEQLEN_Q, SEQLEN_K)
            - SLOPES[:, None, None] * distances(lengths=LENGTHS),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("mode", "bound"), [("exact", 2e-5), ("accurate", 0.03), ("half", 0.03)])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_against_the_definition(case, mode, bound, layout):
    options, definition = case
    q, k, v = operands()
    wanted, wanted_lse = dense_attention(q, k, v, **definition)
    given = [x if layout == "bshd" else x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    out, lse = attn8.attention(*given, mode=mode, layout=layout, return_lse=True, **options)
    out = out if layout == "bshd" else out.transpose(0, 2, 1, 3)
    assert distance(out, wanted) < bound
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(wanted_lse))
    finite = np.isfinite(wanted_lse)
    np.testing.assert_allclose(lse[finite], wanted_lse[finite], atol=max(bound, 1e-5))
    if mode == "exact" and layout == "bshd":
        oracle, oracle_lse = attn8.reference.attention(q, k, v, **options)
        assert distance(oracle, wanted) < 1e-7
        np.testing.assert_allclose(oracle_lse[finite], wanted_lse[finite], atol=1e-7)
    if mode == "accurate":
        emulated = attn8.reference.emulation(*given, layout=layout, **options)
        found = out if layout == "bshd" else out.transpose(0, 2, 1, 3)
        assert np.all(np.abs(found - emulated.out) <= emulated.bound)


@pytest.mark.parametrize("mode", ["exact", "accurate", "half", "paper"])
@pytest.mark.parametrize("dim_v", [8, 64, 100])
def test_v_has_a_head_dim_of_its_own(mode, dim_v):
    q, k, _ = operands()
    v = normal(BATCH, SEQLEN_K, 2, dim_v, seed=4)
    out, lse = attn8.attention(q, k, v, mode=mode, return_lse=True)
    wanted, wanted_lse = dense_attention(q, k, v)
    assert out.shape == (BATCH, SEQLEN_Q, HEADS, dim_v)
    assert distance(out, wanted) < 0.05
    np.testing.assert_allclose(lse, wanted_lse, atol=0.05)


def test_signature_of_flash_attn():
    q, k, v = operands()
    slopes = np.stack([SLOPES, 2 * SLOPES])
    bias = -slopes[:, :, None, None] * distances()
    wanted, _ = dense_attention(q, k, v, softcap=2.0, bias=bias)
    out = attn8.flash_attn_func(q, k, v, softcap=2.0, alibi_slopes=slopes, mode="exact")
    assert distance(out, wanted) < 2e-5
    cached = attn8.flash_attn_with_kvcache(
        q, k, v, softcap=2.0, alibi_slopes=slopes, mode="exact"
    )  # fmt: skip
    np.testing.assert_array_equal(cached, out)
    starts = [np.array([0, n, 2 * n], np.int32) for n in (SEQLEN_Q, SEQLEN_K)]
    packed = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    options = {"softcap": 2.0, "alibi_slopes": slopes, "mode": "exact"}
    out = attn8.flash_attn_varlen_func(*packed, *starts, SEQLEN_Q, SEQLEN_K, **options)
    assert distance(out.reshape(wanted.shape), wanted) < 2e-5
    sinks = np.float32([0, 1, 2, 3])
    out = attn8.attention_varlen(*packed, *starts, sinks=sinks, mode="exact")
    wanted, _ = dense_attention(q, k, v, sinks=sinks)
    assert distance(out.reshape(wanted.shape), wanted) < 2e-5


def test_signature_of_torch():
    torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.from_numpy(x.transpose(0, 2, 1, 3).copy()) for x in operands(nheads_k=4))
    seen = torch.from_numpy(bools(SEQLEN_Q, SEQLEN_K))
    lowest = torch.finfo(torch.float32).min
    for mask in (
        seen, seen.expand(BATCH, 1, -1, -1), torch.from_numpy(normal(HEADS, 1, SEQLEN_K)),
        torch.where(seen, 0.0, -torch.inf), torch.where(seen, 1.0, lowest),
        torch.from_numpy(normal(BATCH, 1, SEQLEN_Q, SEQLEN_K)).bfloat16(),
    ):  # fmt: skip
        wide = mask if mask.dtype == torch.bool else mask.float()
        out = attn8.scaled_dot_product_attention(q, k, v, mask, mode="exact")
        torch.testing.assert_close(out, sdpa(q, k, v, wide), atol=1e-5, rtol=1e-5)
    one = attn8.scaled_dot_product_attention(q[0], k[0], v[0], seen, mode="exact")
    torch.testing.assert_close(one, sdpa(q[0], k[0], v[0], seen), atol=1e-5, rtol=1e-5)


def test_torch_operator():
    torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
    from attn8 import torch_ops

    q, k, v = (torch.from_numpy(x) for x in operands())
    v = v[..., :48].contiguous()
    options = {
        "softcap": 2.0, "attn_mask": torch.from_numpy(bools(BATCH, 1, SEQLEN_Q, SEQLEN_K)),
        "alibi_slopes": torch.from_numpy(SLOPES)[None], "sinks": torch.ones(HEADS),
        "seqlens_k": torch.from_numpy(LENGTHS), "leftpad_k": torch.from_numpy(LEFTPAD),
    }  # fmt: skip
    torch.library.opcheck(torch_ops.attention, (q, k, v), options)

    def call(q, k, v):
        return attn8.attention(q, k, v, **options)

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(traced, call(q, k, v))
    assert traced.shape == (BATCH, SEQLEN_Q, HEADS, 48)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": "2"}, TypeError, "softcap: got str, want a float"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softcap": float("nan")}, ValueError, "softcap"),
        ({"attn_mask": [True]}, TypeError, "attn_mask: got list"),
        ({"attn_mask": bools(3, SEQLEN_K)}, ValueError, r"attn_mask: got shape \(3, 70\), want"),
        ({"attn_mask": bools(1, 2, 1, 1, 70)}, ValueError, "attn_mask: got shape"),
        ({"attn_mask": np.ones((33, 70))}, TypeError, "attn_mask: got ndarray of dtype float64"),
        ({"attn_mask": np.ones((33, 70), np.int32)}, ValueError, "attn_mask"),
        ({"alibi_slopes": np.float32([1, 2])}, ValueError, r"alibi_slopes: got shape \(1, 2\)"),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes: got float"),
        ({"alibi_slopes": SLOPES.astype(np.float16)}, ValueError, "alibi_slopes"),
        ({"sinks": np.float32([1, 2])}, ValueError, r"sinks: got shape \(2,\), want \(4,\)"),
        ({"seqlens_k": LENGTHS[:1]}, ValueError, r"seqlens_k: got shape \(1,\), want \(2,\)"),
        ({"seqlens_k": LENGTHS + 1}, ValueError, "seqlens_k"),
        ({"seqlens_k": LENGTHS.astype(np.float32)}, ValueError, "seqlens_k"),
        ({"seqlens_k": LEFTPAD, "leftpad_k": LENGTHS}, ValueError, "leftpad_k"),
        ({"leftpad_k": [0, 0]}, TypeError, "leftpad_k: got list"),
        ({"q_offset": 1.5}, TypeError, "q_offset: got float 1.5, want an int"),
        ({"k_offset": 1 << 60}, ValueError, "k_offset"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        attn8.attention(*operands(), **options)
