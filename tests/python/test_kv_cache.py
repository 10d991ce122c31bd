# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.KVCache against attention() on its codes, the emulation, and attention by definition."""

import threading

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, visible

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")

HEADS_Q, HEADS_K, DIM, PAGE = 4, 2, 48, 64


def make(max_pages=40, **options):
    options = {"nheads_k": HEADS_K, "head_dim": DIM, "page_size": PAGE, **options}
    return attn8.KVCache(max_pages=max_pages, **options)


def keys(tokens, seed=0):
    # A mean of K that is not 0: what smoothing is for.
    k = normal(tokens, HEADS_K, DIM, seed=seed) + 2 * normal(1, HEADS_K, DIM, seed=99)
    return k, normal(tokens, HEADS_K, DIM, seed=seed + 1)


def queries(tokens, seed=7):
    return normal(tokens, HEADS_Q, DIM, seed=seed)


def quantized(k, v, prompt):
    """The operands that a sequence holds whose first append were ``prompt`` tokens."""
    mean = attn8.quantize(k[None, :prompt], smooth=True).mean
    return attn8.quantize(k[None], mean=mean), attn8.quantize(v[None])


@pytest.mark.parametrize("pieces", [[150], [64, 86], [100, 1, 1, 48], [1, 149]])
def test_a_sequence_is_attention_on_its_codes(pieces):
    cache, (k, v) = make(), keys(150)
    a = cache.create()
    at = 0
    for piece in pieces:
        cache.append(a, k[at : at + piece], v[at : at + piece])
        at += piece
    assert cache.length(a) == 150
    operands = quantized(k, v, pieces[0])
    for tokens, causal in ((1, False), (1, True), (20, True), (150, True), (3, False)):
        q = queries(tokens)
        out, lse = cache.attend([a], q, causal=causal, return_lse=True)
        wanted, wanted_lse = attn8.attention(
            q[None], *operands, causal=causal, kv_block=PAGE, return_lse=True
        )
        np.testing.assert_array_equal(out, wanted[0])
        np.testing.assert_array_equal(lse, wanted_lse[0])
        emulated = attn8.reference.emulation(q[None], *operands, causal=causal, kv_block=PAGE)
        assert np.all(np.abs(out - emulated.out[0]) <= emulated.bound[0])
        seen = visible(tokens, 150, causal)
        exact, exact_lse = dense_attention(q[None], k[None], v[None], seen=seen)
        assert distance(out, exact[0]) < 0.02
        np.testing.assert_allclose(lse, exact_lse[0], atol=0.05)


SLOPES, SINKS = np.float32([0.5, 0.25, 0.1, 0.01]), np.float32([-1, 0, 2, 5])


@pytest.mark.parametrize(
    "changes",
    [{"softcap": 2.0}, {"alibi_slopes": SLOPES}, {"sinks": SINKS},
     {"softcap": 3.0, "alibi_slopes": SLOPES, "sinks": SINKS}],
    ids=lambda changes: ", ".join(changes),
)  # fmt: skip
@pytest.mark.parametrize(("tokens", "causal"), [(1, False), (20, True), (150, True)])
def test_score_changes(changes, tokens, causal):
    cache, (k, v), q = make(), keys(150), queries(tokens)
    a = cache.create()
    cache.append(a, k, v)
    out, lse = cache.attend([a], q, causal=causal, return_lse=True, **changes)
    wanted, wanted_lse = attn8.attention(
        q[None], *quantized(k, v, 150), causal=causal, kv_block=PAGE, return_lse=True, **changes
    )
    np.testing.assert_array_equal(out, wanted[0])
    np.testing.assert_array_equal(lse, wanted_lse[0])
    distances = np.abs(np.arange(150 - tokens, 150)[:, None] - np.arange(150))
    bias = -SLOPES[:, None, None] * distances if "alibi_slopes" in changes else None
    exact, exact_lse = dense_attention(
        q[None], k[None], v[None], seen=visible(tokens, 150, causal), bias=bias,
        softcap=changes.get("softcap", 0), sinks=changes.get("sinks"),
    )  # fmt: skip
    assert distance(out, exact[0]) < 0.02
    np.testing.assert_allclose(lse, exact_lse[0], atol=0.05)


@pytest.mark.parametrize("shape", [(HEADS_Q, 20, 150), (1, 1, 150), (20, 150), (1, 20, 1)])
@pytest.mark.parametrize("kind", ["bool", "float32", "float16"])
def test_masks(shape, kind):
    cache, (k, v), q = make(), keys(150), queries(20)
    a = cache.create()
    cache.append(a, k, v)
    mask = normal(*shape, seed=3)
    mask = mask > -0.5 if kind == "bool" else mask.astype(kind)
    out = cache.attend([a], q, attn_mask=mask, causal=True)
    definition = {"seen": visible(20, 150, True)}
    if kind == "bool":
        definition["seen"] = definition["seen"] & mask
    else:
        definition["bias"] = mask
    wanted, _ = dense_attention(q[None], k[None], v[None], **definition)
    assert distance(out, wanted[0]) < 0.02


def test_append_to_several():
    counts = np.array([0, 70, 70, 71, 200], np.int32)
    together, each = make(), make()
    a = [together.create() for _ in range(4)]
    b = [each.create() for _ in range(4)]
    k, v = keys(200)
    together.append(a, k, v, counts)
    token = keys(4, seed=30)
    together.append(a, *token)  # one for each
    for i, sequence in enumerate(b):
        rows = slice(counts[i], counts[i + 1])
        each.append(sequence, k[rows], v[rows])
        each.append(sequence, *(x[i : i + 1] for x in token))
    assert [together.length(x) for x in a] == [71, 1, 2, 130]
    q = queries(4)
    np.testing.assert_array_equal(together.attend(a, q), each.attend(b, q))
    with pytest.raises(ValueError, match="sequences holds sequence 1 twice, wants it once"):
        together.append([a[0], a[0]], *keys(2))
    with pytest.raises(ValueError, match="k: got 3 tokens, want a multiple of 4"):
        together.append(a, *keys(3))
    with pytest.raises(ValueError, match="cu_seqlens: got ndarray with one sequence, want None"):
        together.append(a[0], *keys(3), np.array([0, 3], np.int32))
    with pytest.raises(TypeError, match=r"sequences\[1\]: got str"):
        together.append([a[0], "b"], *keys(2))
    with pytest.raises(TypeError, match="sequence: got int"):
        together.append(5, *keys(2))
    assert [together.length(x) for x in a] == [71, 1, 2, 130]


def test_a_mask_over_a_batch():
    cache, named = make(), []
    for i, length in enumerate((60, 90)):
        named.append(cache.create())
        cache.append(named[-1], *keys(length, seed=10 * i))
    q, starts = queries(5), np.array([0, 2, 5], np.int32)
    mask = normal(HEADS_Q, 5, 90, seed=3) > 0
    out = cache.attend(named, q, starts, attn_mask=mask)
    for i, length in enumerate((60, 90)):
        rows = slice(starts[i], starts[i + 1])
        alone = cache.attend([named[i]], q[rows], attn_mask=mask[:, rows, :length])
        np.testing.assert_array_equal(out[rows], alone)
    with pytest.raises(ValueError, match="attn_mask"):
        cache.attend(named, q, starts, attn_mask=mask[..., :80])
    with pytest.raises(ValueError, match=r"attn_mask: got shape \(4, 4, 90\)"):
        cache.attend(named, q, starts, attn_mask=mask[:, :4])


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dim_v", [16, 100])
def test_v_has_a_head_dim_of_its_own(dim_v, rotate):
    cache, k, q = make(head_dim_v=dim_v, rotate=rotate), keys(150)[0], queries(20)
    v = normal(150, HEADS_K, dim_v, seed=4)
    a = cache.create()
    cache.append(a, k, v)
    out = cache.attend([a], q, causal=True)
    assert out.shape == (20, HEADS_Q, dim_v)
    wanted, _ = dense_attention(q[None], k[None], v[None], seen=visible(20, 150, True))
    assert distance(out, wanted[0]) < 0.02
    with pytest.raises(ValueError, match="v"):
        cache.append(a, k, k)


def test_modes_over_the_pages():
    cache, (k, v), q = make(), keys(150), queries(20)
    a = cache.create()
    cache.append(a, k, v)
    stored = [attn8.dequantize(x) for x in quantized(k, v, 150)]
    wanted, _ = dense_attention(q[None], *stored, seen=visible(20, 150, True))
    out = {
        mode: cache.attend([a], q, causal=True, mode=mode) for mode in ("accurate", "half", "exact")
    }
    assert distance(out["exact"], wanted[0]) < 1e-5
    assert 1e-4 < distance(out["half"], wanted[0]) < distance(out["accurate"], wanted[0]) < 0.02
    some = cache.attend([a], q, causal=True, head_modes=["exact", "accurate"])
    np.testing.assert_array_equal(some[:, :2], out["exact"][:, :2])
    np.testing.assert_array_equal(some[:, 2:], out["accurate"][:, 2:])
    with pytest.raises(attn8.UnsupportedError, match="paper"):
        cache.attend([a], q, mode="paper")
    with pytest.raises(ValueError, match="mode: got 'half' with head_modes"):
        cache.attend([a], q, mode="half", head_modes=["half", "half"])
    with pytest.raises(TypeError, match="head_modes: got str"):
        cache.attend([a], q, head_modes="half")


def test_bad_score_changes():
    cache = make()
    a = cache.create()
    cache.append(a, *keys(9))

    def refused(error, match, **changes):
        with pytest.raises(error, match=match):
            cache.attend([a], queries(2), **changes)

    refused(TypeError, "softcap: got str, want a float", softcap="1")
    refused(ValueError, "softcap", softcap=float("nan"))
    refused(ValueError, r"sinks: got shape \(3,\), want \(4,\)", sinks=SINKS[:3])
    refused(TypeError, "sinks: got list", sinks=[0.0] * 4)
    refused(ValueError, r"alibi_slopes: got shape \(2, 4\)", alibi_slopes=np.stack([SLOPES] * 2))
    refused(ValueError, "sinks", sinks=SINKS.astype(np.float16))


def test_a_batch_of_prefill_and_decode():
    cache = make()
    lengths, counts = [10, 200, 65], [10, 1, 3]
    named = []
    for i, length in enumerate(lengths):
        named.append(cache.create())
        cache.append(named[-1], *keys(length, seed=10 * i))
    starts = np.cumsum([0, *counts]).astype(np.int32)
    q = queries(int(starts[-1]))
    out, lse = cache.attend(
        named, q, starts, causal=True, window_size=(40, -1), softmax_scale=0.2, return_lse=True
    )
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        rows = slice(starts[i], starts[i + 1])
        alone = cache.attend(
            [named[i]], q[rows], causal=True, window_size=(40, -1), softmax_scale=0.2
        )
        np.testing.assert_array_equal(out[rows], alone)
        k, v = keys(length, seed=10 * i)
        seen = visible(count, length, True, window_size=(40, -1))
        wanted, wanted_lse = dense_attention(q[None, rows], k[None], v[None], 0.2, seen)
        assert distance(out[rows], wanted[0]) < 0.02
        np.testing.assert_allclose(lse[:, rows], wanted_lse[0], atol=0.05)
    # Without starts: the same number of queries for each sequence.
    each = cache.attend(named, q[:6])
    np.testing.assert_array_equal(each[2:4], cache.attend([named[1]], q[2:4]))


def test_fork_truncate_free_and_usage():
    cache, (k, v) = make(max_pages=8), keys(200)
    assert cache.page_size == PAGE
    a = cache.create()
    cache.append(a, k, v)
    pages = cache.usage().pages_used
    assert pages == 4
    b = cache.fork(a)
    assert cache.usage().pages_used == pages  # shared
    c = cache.fork(a, 64)
    assert cache.length(c) == 64
    assert cache.usage().sequences == 3
    q = queries(2)
    whole = cache.attend([a], q)
    np.testing.assert_array_equal(cache.attend([b], q), whole)
    cache.append(b, *keys(1, seed=50))  # takes a copy of the last page
    assert cache.usage().pages_used == pages + 1
    np.testing.assert_array_equal(cache.attend([a], q), whole)
    assert not np.array_equal(cache.attend([b], q), whole)
    cache.truncate(b, 200)
    np.testing.assert_array_equal(cache.attend([b], q), whole)
    cache.truncate(a, 64)
    np.testing.assert_array_equal(cache.attend([a], q), cache.attend([c], q))
    for sequence in (a, b, c):
        cache.free(sequence)
    usage = cache.usage()
    assert (usage.sequences, usage.pages_used, usage.pages_free, usage.bytes_used) == (0, 0, 8, 0)
    assert usage.bytes_per_page > PAGE * HEADS_K * 2 * DIM
    with pytest.raises(ValueError, match="sequence"):
        cache.length(a)


def test_names_of_sequences():
    cache, other = make(), make()
    a, b = cache.create(), cache.create()
    assert a == a
    assert a != b
    assert len({a, b, a}) == 2
    assert repr(a).startswith("KVSequence(")
    with pytest.raises(ValueError, match="sequence"):
        other.length(a)


def test_out_of_pages_changes_nothing():
    cache, (k, v) = make(max_pages=2), keys(129)
    a = cache.create()
    cache.append(a, k[:100], v[:100])
    q = queries(1)
    before = cache.attend([a], q)
    with pytest.raises(MemoryError, match="pages"):
        cache.append(a, k[100:], v[100:])
    assert cache.length(a) == 100
    np.testing.assert_array_equal(cache.attend([a], q), before)


def test_empty_sequences():
    cache = make()
    a = cache.create()
    cache.append(a, *keys(0))
    out, lse = cache.attend([a], queries(3), return_lse=True)
    assert not out.any()
    assert np.all(lse == -np.inf)
    assert cache.attend([], queries(0)).shape == (0, HEADS_Q, DIM)
    assert cache.attend([a, a], queries(0)).shape == (0, HEADS_Q, DIM)


def test_any_strides_types_and_out():
    cache, (k, v) = make(), keys(70)
    a, b = cache.create(), cache.create()
    cache.append(a, k, v)
    strided = np.asfortranarray(np.repeat(k, 2, axis=0))[::2]
    cache.append(b, strided, v[:, ::-1][:, ::-1])
    q = queries(5)
    wanted = cache.attend([a], q)
    np.testing.assert_array_equal(cache.attend([b], q), wanted)
    out = np.empty((5, 2 * HEADS_Q, DIM), np.float32)[:, ::2]
    assert cache.attend([b], np.asfortranarray(q), out=out) is out
    np.testing.assert_array_equal(out, wanted)
    half = cache.attend([a], q.astype(np.float16))
    assert half.dtype == np.float16
    assert distance(half, wanted) < 0.01


def test_threads_change_nothing():
    cache, (k, v) = make(), keys(600)
    a, b = cache.create(), cache.create()
    cache.append(a, k, v, threads=1)
    cache.append(b, k, v, threads=3)
    q = queries(100)
    one = cache.attend([a, b], np.concatenate([q, q]), causal=True, threads=1)
    many = cache.attend([a, b], np.concatenate([q, q]), causal=True, threads=4)
    np.testing.assert_array_equal(one, many)
    np.testing.assert_array_equal(one[:100], one[100:])


def test_other_threads_run_while_one_waits():
    cache = make(max_pages=100)
    errors = []

    def work(seed):
        try:
            k, v = keys(300, seed=seed)
            a = cache.create()
            for first in range(0, 300, 30):
                cache.append(a, k[first : first + 30], v[first : first + 30])
                cache.attend([a], queries(2))
            b = cache.fork(a, 100)
            out = cache.attend([b], queries(1))
            exact, _ = dense_attention(queries(1)[None], k[None, :100], v[None, :100])
            assert distance(out, exact[0]) < 0.05
            cache.free(a)
            cache.free(b)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert cache.usage().pages_used == 0


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
    cache, (k, v) = make(), keys(70)
    a, b = cache.create(), cache.create()
    cache.append(a, k, v)
    cache.append(b, torch.from_numpy(k), torch.from_numpy(v))
    q = torch.from_numpy(queries(2))
    out, lse = cache.attend([b], q, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), cache.attend([a], queries(2)))
    assert cache.attend([b], q.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="q: got a tensor that requires grad"):
        cache.attend([b], q.requires_grad_())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nheads_k": 0}, ValueError, "nheads_k"),
        ({"head_dim": 257}, ValueError, "head_dim"),
        ({"page_size": 100}, ValueError, "page_size"),
        ({"max_pages": -1}, ValueError, "max_pages"),
        ({"max_pages": 1 << 60}, (ValueError, MemoryError), "max_pages|^$"),
        ({"smooth_k": 1}, TypeError, "smooth_k: got int 1, want a bool"),
        ({"page_size": "64"}, TypeError, "page_size: got str '64', want an int"),
    ],
)
def test_bad_caches(change, error, message):
    with pytest.raises(error, match=message):
        make(**change)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, _: c.append(1, *keys(1)), TypeError, "sequence: got int 1, want a KVSequence"),
        (lambda c, a: c.append(a, keys(2)[0], keys(1)[1]), ValueError, "v"),
        (lambda c, a: c.append(a, keys(2)[0][..., :8], keys(2)[1]), ValueError, "k"),
        (lambda c, a: c.append(a, keys(2)[0][None], keys(2)[1]), ValueError, "k: got 4 dimensions"),
        (lambda c, a: c.append(a, keys(2)[0].astype(int), keys(2)[1]), TypeError, "k: got ndarray"),
        (lambda c, a: c.append(a, *keys(1), threads=0), ValueError, "threads: got 0"),
        (lambda c, a: c.append(a, *keys(1), isa="mmx"), ValueError, "isa"),
        (lambda c, a: c.fork(a, 6), ValueError, "length"),
        (lambda c, a: c.fork(a, -1), ValueError, "length"),
        (lambda c, a: c.truncate(a, 6), ValueError, "length"),
        (lambda c, a: c.truncate(a, 2.0), TypeError, "length: got float 2.0, want an int"),
        (lambda c, _: c.free(None), TypeError, "sequence: got NoneType"),
        (lambda c, a: c.attend(a, queries(1)), TypeError, "sequences: got KVSequence, want a list"),
        (lambda c, _: c.attend([3], queries(1)), TypeError, r"sequences\[0\]: got int 3"),
        (lambda c, a: c.attend([a, a], queries(3)), ValueError, "q: got 3 tokens, want a multiple"),
        (lambda c, _: c.attend([], queries(1)), ValueError, "q: got 1 tokens"),
        (lambda c, a: c.attend([a], queries(1)[:, :3]), ValueError, "q"),
        (lambda c, a: c.attend([a], queries(1).astype(np.int8)), TypeError, "q: got ndarray"),
        (
            lambda c, a: c.attend([a], queries(2), np.array([0, 1], np.int32)),
            ValueError,
            "cu_seqlens_q: got 0 to 1, want 0 to 2",
        ),
        (
            lambda c, a: c.attend([a], queries(2), np.array([0, 1, 2], np.int32)),
            ValueError,
            "cu_seqlens_q",
        ),
        (lambda c, a: c.attend([a], queries(2), [0, 2]), TypeError, "cu_seqlens_q: got list"),
        (lambda c, a: c.attend([a], queries(1), align="left"), ValueError, "align: got str 'left'"),
        (lambda c, a: c.attend([a], queries(1), return_lse=1), TypeError, "return_lse: got int"),
    ],
)
def test_bad_arguments(call, error, message):
    cache = make()
    a = cache.create()
    cache.append(a, *keys(5))
    with pytest.raises(error, match=message):
        call(cache, a)


def test_out_that_is_the_input():
    cache = make()
    a = cache.create()
    cache.append(a, *keys(5))
    q = queries(2)
    with pytest.raises(ValueError, match="out: got memory that overlaps"):
        cache.attend([a], q, out=q)
    with pytest.raises(ValueError, match="out"):
        cache.attend([a], q, out=np.empty((3, HEADS_Q, DIM), np.float32))


def test_objects_that_were_never_made():
    from attn8 import _core

    with pytest.raises(TypeError):
        _core.KVSequence()
    with pytest.raises(TypeError):
        _core.KvCache()
