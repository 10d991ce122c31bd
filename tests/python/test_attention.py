# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.attention and its relatives on NumPy arrays."""

import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, operands, visible

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
_core = attn8._core

MODES = ("accurate", "paper", "half", "exact", "fp8")
# Loose on purpose: what a mode's error is, the C++ tests and docs/numerics.md say. These bounds
# tell a right result from a mask, a layout or an option that went wrong.
QUALITY = {"accurate": 0.03, "paper": 0.1, "half": 0.03, "exact": 1e-5, "fp8": 0.1}


def bhsd(x):
    return x.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_every_mode_in_both_layouts(mode, layout):
    q, k, v = operands()
    given = (q, k, v) if layout == "bshd" else tuple(map(bhsd, (q, k, v)))
    out, lse = attn8.attention(*given, mode=mode, layout=layout, return_lse=True)
    wanted, wanted_lse = dense_attention(q, k, v)
    assert out.shape == given[0].shape
    assert out.flags.c_contiguous
    assert out.dtype == np.float32
    assert distance(out if layout == "bshd" else bhsd(out), wanted) < QUALITY[mode]
    assert lse.shape == (2, 4, 33)
    assert distance(lse, wanted_lse) < QUALITY[mode]


@pytest.mark.parametrize(
    "mask",
    [
        {"causal": True},
        {"causal": True, "align": "top_left"},
        {"window_size": (5, -1)},
        {"window_size": (3, 2), "align": "top_left"},
        {"causal": True, "window_size": (0, 0)},
        {"causal": True, "window_size": [7, 3]},
    ],
)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(33, 70), (70, 33), (1, 70), (40, 40)])
def test_masks(mask, seqlen_q, seqlen_k):
    q, k, v = operands(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    out, lse = attn8.attention(q, k, v, mode="exact", return_lse=True, **mask)
    wanted, wanted_lse = dense_attention(q, k, v, seen=visible(seqlen_q, seqlen_k, **mask))
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
    assert distance(attn8.attention(q, k, v, **mask), wanted) < QUALITY["accurate"]


def test_softmax_scale():
    q, k, v = operands()
    out = attn8.attention(q, k, v, mode="exact", softmax_scale=0.3)
    np.testing.assert_allclose(out, dense_attention(q, k, v, 0.3)[0], atol=1e-5)
    for scale in (1, np.float32(1), np.float64(1)):
        np.testing.assert_array_equal(
            attn8.attention(q, k, v, softmax_scale=scale),
            attn8.attention(q, k, v, softmax_scale=1.0),
        )


def test_options_reach_the_library():
    q, k, v = operands(seqlen_k=700)
    plain = attn8.attention(q, k, v)
    for options in (
        {"kv_block": 64},
        {"kv_block": 512},
        {"v_granularity": "tensor"},
        {"v_granularity": "channel"},
        {"v_granularity": "block"},
        {"v_granularity": "block_channel"},
        {"smooth_k": False},
        {"mode": "fp8", "fp8_format": "e5m2"},
    ):
        out = attn8.attention(q, k, v, **options)
        assert not np.array_equal(out, plain), options
        emulated = attn8.reference.emulation(q, k, v, **options)
        assert np.all(np.abs(out - emulated.out) <= emulated.bound + 1e-6), options


@pytest.mark.parametrize("mode", ["accurate", "paper", "half"])
def test_results_lie_within_the_emulation_s_bound(mode):
    q, k, v = operands()
    emulated = attn8.reference.emulation(q, k, v, mode=mode, causal=True)
    out, lse = attn8.attention(q, k, v, mode=mode, causal=True, return_lse=True)
    assert np.all(np.abs(out - emulated.out) <= emulated.bound)
    np.testing.assert_allclose(lse, emulated.lse, atol=1e-4)


def test_threads_and_instruction_sets_do_not_change_a_bit():
    q, k, v = operands(seqlen_q=200, seqlen_k=300)
    wanted = attn8.attention(q, k, v, causal=True, threads=1)
    np.testing.assert_array_equal(attn8.attention(q, k, v, causal=True, threads=3), wanted)
    names = [isa["name"] for isa in attn8.info()["isas"] if isa["available"]]
    assert "scalar" in names
    for name in names:
        np.testing.assert_array_equal(attn8.attention(q, k, v, causal=True, isa=name), wanted)


def test_float16():
    q, k, v = (x.astype(np.float16) for x in operands())
    out = attn8.attention(q, k, v, mode="exact")
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, dense_attention(q, k, v)[0], atol=2e-3)


def test_mixed_types_of_q_and_k():
    q, k, v = operands()
    out = attn8.attention(q, k.astype(np.float16), v, mode="exact")
    assert distance(out, dense_attention(q, k, v)[0]) < 1e-3


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (1, 0, 2, 8)])
def test_empty_queries(shape):
    keys = np.zeros((shape[0], 3, 2, 8), np.float32)
    out, lse = attn8.attention(np.zeros(shape, np.float32), keys, keys, return_lse=True)
    assert out.shape == shape
    assert lse.shape == (shape[0], shape[2], shape[1])


def test_no_key_gives_zero_and_minus_infinity():
    q, k, v = operands(seqlen_k=0)
    out, lse = attn8.attention(q, k, v, return_lse=True)
    assert not out.any()
    assert np.all(np.isneginf(lse))


# Memory.


def test_strides_of_every_kind_are_read_in_place():
    q, k, v = operands()
    wanted = attn8.attention(q, k, v)
    wide = normal(2, 66, 4, 128)
    wide[:, ::2, :, ::2] = q
    odd = np.asfortranarray(k)
    backwards = np.ascontiguousarray(v[:, ::-1])[:, ::-1]
    assert backwards.strides[1] < 0
    np.testing.assert_array_equal(attn8.attention(wide[:, ::2, :, ::2], odd, backwards), wanted)
    one_head = np.broadcast_to(k[:, :, :1], k.shape)
    assert one_head.strides[2] == 0
    np.testing.assert_array_equal(
        attn8.attention(q, one_head, v), attn8.attention(q, one_head.copy(), v)
    )


def test_read_only_operands():
    q, k, v = operands()
    wanted = attn8.attention(q, k, v)
    for x in (q, k, v):
        x.flags.writeable = False
    np.testing.assert_array_equal(attn8.attention(q, k, v), wanted)


def test_operands_are_not_copied():
    q, _, _ = operands()
    for x in (q, q[:, 3::2, :, ::-1], np.asfortranarray(q), np.broadcast_to(q[:1], q.shape)):
        assert _core.address(x) == x.ctypes.data


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_out_is_written_where_it_lies(dtype):
    q, k, v = operands()
    buffer = np.full((2, 4, 66, 128), 7, dtype)
    out = buffer.transpose(0, 2, 1, 3)[:, ::2, :, ::2]
    result = attn8.attention(q, k, v, out=out)
    assert result is out
    np.testing.assert_array_equal(out, attn8.attention(q, k, v).astype(dtype))
    assert np.all(buffer[:, :, 1::2] == 7)
    assert np.all(buffer[..., 1::2] == 7)


def test_arrays_are_released():
    q, k, v = operands()
    held = weakref.ref(q)
    attn8.attention(q, k, v)
    with pytest.raises(ValueError, match="kv_block"):
        attn8.attention(q, k, v, kv_block=1)
    del q
    gc.collect()
    assert held() is None


def test_other_threads_run_during_a_call():
    q, k, v = operands(batch=1, seqlen_q=2000, seqlen_k=2000, nheads_q=1, nheads_k=1)
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.0005):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    thread.start()
    before = len(ticks)
    attn8.attention(q, k, v, mode="fp8", threads=1)  # in software: takes seconds
    during = len(ticks) - before
    done.set()
    thread.join()
    assert during > 1


def test_calls_from_many_threads_at_once():
    q, k, v = operands()
    wanted = attn8.attention(q, k, v)
    results = [None] * 8

    def work(i):
        for _ in range(20):
            results[i] = attn8.attention(q, k, v, threads=1 + i % 2)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, wanted)


def test_a_forked_child_can_call():
    code = (
        "import os, sys, attn8, numpy as np\n"
        "x = np.ones((1, 512, 4, 64), np.float32)\n"
        "attn8.attention(x, x, x, threads=2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    attn8.attention(x, x, x)\n"
        "    os._exit(7)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


# Packed sequences.


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_is_attention_of_each_sequence(causal):
    starts_q, starts_k = np.int32([0, 3, 3, 20, 21]), np.int32([0, 9, 12, 29, 40])
    q, k, v = normal(21, 4, 64), normal(40, 2, 64, seed=1), normal(40, 2, 64, seed=2)
    out, lse = attn8.attention_varlen(q, k, v, starts_q, starts_k, causal=causal, return_lse=True)
    assert lse.shape == (4, 21)
    for i in range(4):
        rows, keys = (slice(s[i], s[i + 1]) for s in (starts_q, starts_k))
        wanted, wanted_lse = attn8.attention(
            q[None, rows], k[None, keys], v[None, keys], causal=causal, return_lse=True
        )
        np.testing.assert_array_equal(out[rows], wanted[0])
        np.testing.assert_array_equal(lse[:, rows], wanted_lse[0])


# Partial results.


def test_merge_of_parts_is_the_whole():
    q, k, v = operands(seqlen_k=200)
    parts = [
        attn8.attention(q, k[:, a:b], v[:, a:b], mode="exact", return_lse=True)
        for a, b in ((0, 60), (60, 61), (61, 61), (61, 200))
    ]
    out, lse = attn8.merge_states(*zip(*parts, strict=True))
    wanted, wanted_lse = attn8.attention(q, k, v, mode="exact", return_lse=True)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    np.testing.assert_allclose(lse, wanted_lse, atol=2e-6)


def test_merge_of_parts_of_several_types():
    parts = [normal(2, 5, 3, 8, seed=i) for i in range(3)]
    lses = [normal(2, 3, 5, seed=10 + i) for i in range(3)]
    types = (np.float16, np.float32, np.float16)
    outs = [part.astype(t) for part, t in zip(parts, types, strict=True)]
    weights = np.exp(np.array(lses, np.float64))
    shares = (weights / weights.sum(0)).transpose(0, 1, 3, 2)[..., None]
    wanted = (shares * np.array(outs, np.float64)).sum(0)
    out, lse = attn8.merge_states(outs, lses, threads=2)
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, wanted, atol=2e-3)
    np.testing.assert_allclose(lse, np.log(weights.sum(0)), atol=2e-6)
    wide, _ = attn8.merge_states([outs[1], outs[0], outs[2]], [lses[1], lses[0], lses[2]])
    assert wide.dtype == np.float32
    np.testing.assert_allclose(wide, wanted, atol=2e-6)
    one, one_lse = attn8.merge_states(outs[:1], lses[:1])
    np.testing.assert_array_equal(one, outs[0])
    np.testing.assert_array_equal(one_lse, lses[0])


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_parts_without_keys_change_nothing(layout):
    out, lse = normal(2, 5, 3, 8), normal(2, 3, 5)
    if layout == "bhsd":
        out = np.ascontiguousarray(bhsd(out))
    lse[0, 0, 0] = -np.inf
    row = (0, 0, 0)
    out[row] = 0
    nothing = np.full_like(lse, -np.inf)
    garbage = np.full_like(out, np.nan)
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        outs, lses = (out, garbage, garbage), (lse, nothing, nothing)
        merged, merged_lse = attn8.merge_states(
            [outs[i] for i in order], [lses[i] for i in order], layout=layout
        )
        np.testing.assert_array_equal(merged, out)
        np.testing.assert_array_equal(merged_lse, lse)


def test_merge_refuses_what_does_not_fit():
    out, lse = normal(2, 5, 3, 8), normal(2, 3, 5)
    for outs, lses, message in (
        ([], [], "outs: got none"),
        ([out], [], "lses: got 0 of them, want 1, as outs"),
        ([out], [lse.astype(np.float16)], "lse.dtype got float16"),
        ([out, out[:, :4]], [lse, lse], r"outs\[1\]: got shape \(2, 4, 3, 8\)"),
        ([out], [lse[..., :4]], r"lses\[0\]: got shape \(2, 3, 4\), want \(2, 3, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attn8.merge_states(outs, lses)
