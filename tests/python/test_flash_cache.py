# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""flash_attn_with_kvcache against attention by its definition."""

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, visible

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")

BATCH, ROOM, HEADS_Q, HEADS_K, DIM = 3, 96, 4, 2, 32
HELD = np.array([40, 0, 90], np.int32)


def caches(rows=BATCH, room=ROOM, seed=0):
    return [normal(rows, room, HEADS_K, DIM, seed=seed + i) for i in range(2)]


def queries(tokens, batch=BATCH):
    return normal(batch, tokens, HEADS_Q, DIM, seed=5)


def new_tokens(tokens):
    return [normal(BATCH, tokens, HEADS_K, DIM, seed=20 + i) for i in range(2)]


def check(out, lse, q, k_of, v_of, lengths, starts=None, bound=2e-6, **mask):
    """Compare with dense attention over tokens [start, length) of each sequence."""
    for i, last in enumerate(lengths):
        first = 0 if starts is None else min(starts[i], last)
        k, v = k_of(i)[None, first:last], v_of(i)[None, first:last]
        seen = visible(q.shape[1], last - first, **mask)
        wanted, wanted_lse = dense_attention(q[i : i + 1], k, v, seen=seen)
        if wanted.any():
            assert distance(out[i], wanted[0]) < bound
        else:
            assert not np.any(out[i])
        np.testing.assert_allclose(lse[i], wanted_lse[0], atol=max(bound, 1e-5))


@pytest.mark.parametrize(("mode", "bound"), [("exact", 2e-6), ("accurate", 0.02)])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (10, 2)}])
@pytest.mark.parametrize("tokens", [1, 5])
def test_new_tokens_go_to_the_cache_first(tokens, mask, mode, bound):
    (k_cache, v_cache), (k, v), q = caches(), new_tokens(tokens), queries(tokens)
    k_wanted, v_wanted = k_cache.copy(), v_cache.copy()
    for i, first in enumerate(HELD):
        k_wanted[i, first : first + tokens] = k[i]
        v_wanted[i, first : first + tokens] = v[i]
    out, lse = attn8.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=HELD, return_softmax_lse=True, mode=mode, **mask
    )
    np.testing.assert_array_equal(k_cache, k_wanted)
    np.testing.assert_array_equal(v_cache, v_wanted)
    lengths = HELD + tokens
    check(
        out, lse, q, lambda i: k_wanted[i], lambda i: v_wanted[i], lengths, bound=bound, **mask
    )  # fmt: skip


@pytest.mark.parametrize(("mode", "bound"), [("exact", 1e-5), ("accurate", 0.03)])
@pytest.mark.parametrize("rows", [1, BATCH])
def test_score_changes(rows, mode, bound):
    (k_cache, v_cache), q = caches(), queries(4)
    slopes = (
        np.float32([[0.5, 0.25, 0.1, 0.01]]) * np.arange(1, rows + 1, dtype=np.float32)[:, None]
    )
    sinks = np.float32([-1, 0, 2, 5])
    lengths = np.array([40, 7, 90], np.int32)
    out, lse = attn8.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, causal=True, softcap=2.0, sinks=sinks,
        alibi_slopes=slopes if rows > 1 else slopes[0], return_softmax_lse=True, mode=mode,
    )  # fmt: skip
    for i, length in enumerate(lengths):
        away = np.abs(np.arange(length - 4, length)[:, None] - np.arange(length))
        wanted, wanted_lse = dense_attention(
            q[i : i + 1], k_cache[None, i, :length], v_cache[None, i, :length],
            seen=visible(4, length, True), softcap=2, sinks=sinks,
            bias=-slopes[i if rows > 1 else 0][:, None, None] * away,
        )  # fmt: skip
        assert distance(out[i], wanted[0]) < bound
        np.testing.assert_allclose(lse[i], wanted_lse[0], atol=bound)


def test_without_new_tokens():
    (k, v), q = caches(), queries(2)
    out, lse = attn8.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=HELD, causal=True, return_softmax_lse=True, mode="exact"
    )
    check(out, lse, q, lambda i: k[i], lambda i: v[i], HELD, causal=True)
    whole = attn8.flash_attn_with_kvcache(q, k, v, mode="exact")
    np.testing.assert_array_equal(whole, attn8.attention(q, k, v, mode="exact"))
    some = attn8.flash_attn_with_kvcache(q, k, v, cache_seqlens=30, mode="exact")
    np.testing.assert_array_equal(some, attn8.attention(q, k[:, :30], v[:, :30], mode="exact"))


def test_rows_and_padding():
    (k, v), q = caches(rows=5), queries(3)
    rows, starts = np.array([4, 0, 2], np.int32), np.array([7, 0, 90], np.int32)
    out, lse = attn8.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=HELD, cache_batch_idx=rows, cache_leftpad=starts, causal=True,
        return_softmax_lse=True, mode="exact",
    )  # fmt: skip
    check(out, lse, q, lambda i: k[rows[i]], lambda i: v[rows[i]], HELD, starts, causal=True)


@pytest.mark.parametrize("quantize", [False, True])
def test_pages(quantize):
    page, table = 16, np.random.default_rng(3).permutation(30)[:18].reshape(3, 6).astype(np.int32)
    pages = [normal(30, page, HEADS_K, DIM, seed=i) for i in range(2)]
    rows = [x[table].reshape(BATCH, -1, HEADS_K, DIM) for x in pages]
    (k, v), q = new_tokens(20), queries(4)
    held = np.array([40, 0, 76], np.int32)  # 20 more cross a page and fill the last one
    if quantize:
        paged = [attn8.quantize(x) for x in pages]
        flat = [attn8.quantize(x) for x in rows]
    else:
        paged, flat = pages, rows
    options = {"cache_seqlens": held, "causal": True, "return_softmax_lse": True}
    out, lse = attn8.flash_attn_with_kvcache(q, *paged, k, v, block_table=table, **options)
    wanted, wanted_lse = attn8.flash_attn_with_kvcache(q, *flat, k, v, **options)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)
    if not quantize:
        np.testing.assert_array_equal(pages[0][table].reshape(rows[0].shape), rows[0])
        np.testing.assert_array_equal(rows[1][2, 76:96], v[2])


@pytest.mark.parametrize("smooth", [False, True])
def test_an_int8_cache_is_quantized_once(smooth):
    (k_all, v_all), q = caches(), queries(2)
    k_all += 3 * normal(1, 1, HEADS_K, DIM, seed=9)
    wanted_k, wanted_v = attn8.quantize(k_all, smooth=smooth), attn8.quantize(v_all)
    empty = [np.zeros((BATCH, ROOM, HEADS_K, n), t) for n, t in ((DIM, np.int8), (1, np.float32))]
    k_cache = attn8.QuantizedTensor(empty[0], empty[1], mean=wanted_k.mean)
    v_cache = attn8.QuantizedTensor(empty[0].copy(), empty[1].copy())
    for first, last in ((0, 50), (50, 51), (51, ROOM)):
        out = attn8.flash_attn_with_kvcache(
            q, k_cache, v_cache, k_all[:, first:last], v_all[:, first:last], cache_seqlens=first
        )
    np.testing.assert_array_equal(k_cache.codes, wanted_k.codes)
    np.testing.assert_array_equal(v_cache.scale, wanted_v.scale)
    np.testing.assert_array_equal(out, attn8.attention(q, wanted_k, wanted_v))


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
    (k_cache, v_cache), (k, v), q = caches(), new_tokens(2), queries(2)
    theirs = [torch.from_numpy(x.copy()) for x in (q, k_cache, v_cache, k, v)]
    wanted = attn8.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=HELD)
    out = attn8.flash_attn_with_kvcache(*theirs, cache_seqlens=torch.from_numpy(HELD))
    np.testing.assert_array_equal(out.numpy(), wanted)
    np.testing.assert_array_equal(theirs[1].numpy(), k_cache)
    halves = [x.to(torch.bfloat16) for x in theirs]
    assert attn8.flash_attn_with_kvcache(*halves, cache_seqlens=3).dtype == torch.bfloat16


def numbers(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rotary_cos": np.ones(3)}, attn8.UnsupportedError, "rotary_cos: got ndarray"),
        ({"rotary_sin": np.ones(3)}, attn8.UnsupportedError, "rotary_sin: got ndarray"),
        ({"num_splits": 1.5}, TypeError, "num_splits: got float"),
        ({"return_softmax_lse": 1}, TypeError, "return_softmax_lse: got int"),
        ({"cache_seqlens": None}, ValueError, "cache_seqlens: got None with k"),
        ({"cache_seqlens": 96}, ValueError, "cache_seqlens: got 96 to 96, want 0 to 95"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens: got -1 to -1"),
        ({"cache_seqlens": True}, TypeError, "cache_seqlens: got bool"),
        ({"cache_seqlens": np.ones(3)}, TypeError, "cache_seqlens: got dtype float64"),
        ({"cache_seqlens": numbers(1, 2)}, ValueError, r"cache_seqlens: got shape \(2,\), want"),
        ({"cache_batch_idx": numbers(0, 1, 3)}, ValueError, "cache_batch_idx: got 0 to 3"),
        ({"cache_leftpad": numbers(0, 1, 99)}, ValueError, "cache_leftpad: got 0 to 99"),
        ({"block_table": numbers(0, 1, 2)}, ValueError, "block_table: got shape"),
        ({"block_table": [[0], [1], [2]]}, TypeError, "block_table: got list"),
        (
            {
                "block_table": numbers(0, 1, 2)[:, None],
                "cache_seqlens": 0,
                "k": None,
                "v": None,
                "k_cache": caches(room=0)[0],
                "v_cache": caches(room=0)[1],
            },
            ValueError,
            "k_cache: got a page_size of 0 with block_table, want at least 1",
        ),
        ({"v": None}, ValueError, "v: got None, want an array, as k"),
        ({"k": new_tokens(2)[0]}, ValueError, r"v: got shape \(3, 1, 2, 32\), want"),
        ({"q": queries(1, batch=2)}, ValueError, "k"),
        ({"v_cache": caches(room=95)[0]}, ValueError, "v_cache: got shape"),
        (
            {"k_cache": caches(rows=4)[0], "v_cache": caches(rows=4)[1]},
            ValueError,
            "k_cache: got 4",
        ),
        ({"mode": "best"}, ValueError, "mode"),
    ],
)
def test_bad_arguments(change, error, message):
    (k_cache, v_cache), (k, v) = caches(), new_tokens(1)
    arguments = {
        "q": queries(1), "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v,
        "cache_seqlens": HELD,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        attn8.flash_attn_with_kvcache(**{**arguments, **change})
