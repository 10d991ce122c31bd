# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The field's signatures, word for word, and the conventions they bring along."""

import inspect

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, operands, visible

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")

# torch 2.13's documentation of scaled_dot_product_attention, and flash_attn_interface.py of
# flash-attn 2.8.4: names, order and defaults.
SDPA = (
    "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, "
    "enable_gqa=False"
)
FLASH = (
    "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
FLASH_VARLEN = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False, block_table=None"
)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("scaled_dot_product_attention", SDPA),
        ("flash_attn_func", FLASH),
        ("flash_attn_varlen_func", FLASH_VARLEN),
    ],
)
def test_signatures(name, wanted):
    parameters = inspect.signature(getattr(attn8, name)).parameters.values()
    positional = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(positional) == wanted
    ours = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert ours == ["mode", "threads"]


def bhsd(x):
    return x.transpose(0, 2, 1, 3)


def test_causal_is_top_left_for_sdpa_and_bottom_right_for_flash_attn():
    q, k, v = operands()
    flash = attn8.flash_attn_func(q, k, v, causal=True, mode="exact")
    wanted, _ = dense_attention(q, k, v, seen=visible(33, 70, True, "bottom_right"))
    np.testing.assert_allclose(flash, wanted, atol=1e-5)
    sdpa = attn8.scaled_dot_product_attention(
        bhsd(q), bhsd(k), bhsd(v), is_causal=True, enable_gqa=True, mode="exact"
    )
    wanted, _ = dense_attention(q, k, v, seen=visible(33, 70, True, "top_left"))
    np.testing.assert_allclose(bhsd(sdpa), wanted, atol=1e-5)
    assert distance(bhsd(sdpa), flash) > 0.1


def test_lse_is_the_natural_logarithm():
    q = np.zeros((1, 1, 1, 8), np.float32)
    _, lse, probabilities = attn8.flash_attn_func(
        q, np.zeros((1, 10, 1, 8), np.float32), np.zeros((1, 10, 1, 8), np.float32),
        return_attn_probs=True,
    )  # fmt: skip
    assert lse.shape == (1, 1, 1)
    assert lse[0, 0, 0] == pytest.approx(np.log(10), abs=1e-5)
    assert probabilities is None


def test_flash_attn_window():
    q, k, v = operands()
    out = attn8.flash_attn_func(q, k, v, window_size=(4, 2), mode="exact", softmax_scale=0.2)
    wanted, _ = dense_attention(q, k, v, 0.2, visible(33, 70, window_size=(4, 2)))
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_flash_attn_varlen():
    starts_q, starts_k = np.int32([0, 4, 10]), np.int32([0, 7, 20])
    q, k, v = normal(10, 4, 64), normal(20, 2, 64, seed=1), normal(20, 2, 64, seed=2)
    out, lse, _ = attn8.flash_attn_varlen_func(
        q, k, v, starts_q, starts_k, 6, 13, causal=True, return_attn_probs=True
    )
    wanted, wanted_lse = attn8.attention_varlen(
        q, k, v, starts_q, starts_k, causal=True, return_lse=True
    )
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)
    with pytest.raises(ValueError, match="max_seqlen_k: got 12, want at least 13"):
        attn8.flash_attn_varlen_func(q, k, v, starts_q, starts_k, 6, 12)


X = np.zeros((1, 4, 2, 8), np.float32)
UNSUPPORTED = [
    ({"dropout_p": 0.1}, "dropout_p: got 0.1, want 0.0"),
]


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED)
def test_flash_attn_refuses_what_it_cannot_honour(change, message):
    with pytest.raises(attn8.UnsupportedError, match=message):
        attn8.flash_attn_func(X, X, X, **change)
    starts = np.int32([0, 4])
    with pytest.raises(attn8.UnsupportedError, match=message):
        attn8.flash_attn_varlen_func(X[0], X[0], X[0], starts, starts, 4, 4, **change)


def test_paged_keys_are_refused():
    starts = np.int32([0, 4])
    with pytest.raises(attn8.UnsupportedError, match="block_table: got ndarray, want None"):
        attn8.flash_attn_varlen_func(X[0], X[0], X[0], starts, starts, 4, 4, block_table=starts)


@pytest.mark.parametrize("name", ["dropout_p", "softcap", "deterministic", "return_attn_probs"])
def test_flash_attn_types(name):
    with pytest.raises(TypeError, match=f"{name}: got str, want a"):
        attn8.flash_attn_func(X, X, X, **{name: "x"})


# SDPA.


def test_sdpa_without_a_batch():
    q, k, v = (bhsd(x) for x in operands(nheads_k=4))
    out = attn8.scaled_dot_product_attention(q[0], k[0], v[0], scale=0.1)
    np.testing.assert_array_equal(out, attn8.scaled_dot_product_attention(q, k, v, scale=0.1)[0])


def padding(kind, batch, keys):
    seen = np.ones((batch, keys), bool)
    seen[0, keys - 20 :] = False
    seen[1, :13] = False
    mask = seen[:, None, None, :]
    return mask if kind == "bool" else np.where(mask, np.float32(0), np.float32(-np.inf))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("whole", [False, True])
def test_sdpa_padding(kind, whole):
    q, k, v = operands()
    mask = padding(kind, 2, 70)
    if whole:
        mask = np.broadcast_to(mask, (2, 4, 33, 70))
    out = attn8.scaled_dot_product_attention(
        bhsd(q), bhsd(k), bhsd(v), mask, enable_gqa=True, mode="exact"
    )
    wanted, _ = dense_attention(q, k, v, seen=padding("bool", 2, 70))
    np.testing.assert_allclose(bhsd(out), wanted, atol=1e-5)


def test_sdpa_all_masked_gives_zero():
    q, k, v = (bhsd(x) for x in operands(nheads_k=4))
    out = attn8.scaled_dot_product_attention(q, k, v, np.zeros((1, 70), bool))
    assert not out.any()


Q = np.zeros((2, 4, 3, 8), np.float32)
K = np.zeros((2, 4, 5, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn_mask": np.ones((3, 4), bool)}, ValueError, r"attn_mask: got shape \(3, 4\), want"),
        ({"attn_mask": np.ones((1, 2, 4, 3, 5), bool)}, ValueError, "attn_mask: got shape"),
        ({"attn_mask": np.ones((3, 5), int)}, TypeError, "attn_mask: got dtype int64, want bool"),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask: got list, want an array or None"),
        ({"attn_mask": np.ones(5, bool), "is_causal": True}, ValueError, "attn_mask: got a mask w"),
        ({"dropout_p": 0.5}, NotImplementedError, "dropout_p: got 0.5, want 0.0"),
        ({"dropout_p": "x"}, TypeError, "dropout_p: got str"),
        ({"is_causal": 1}, TypeError, "is_causal: got int, want a bool"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa: got int, want a bool"),
        ({"key": K[:, :2], "value": K[:, :2]}, ValueError, "key: got 2 heads with enable_gqa=Fal"),
        ({"query": Q[0]}, ValueError, "key: got 4 dimensions, want 3"),
        ({"query": Q[0, 0]}, ValueError, "query: got 2 dimensions, want 3 or 4"),
        ({"value": K[:, :, :4]}, ValueError, "v.shape"),
    ],
)
def test_sdpa_refuses(change, error, message):
    with pytest.raises(error, match=message):
        attn8.scaled_dot_product_attention(**{"query": Q, "key": K, "value": K, **change})
