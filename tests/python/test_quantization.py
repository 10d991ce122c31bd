# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.quantize, dequantize, quantized operands, and the oracles."""

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, operands

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")

SCALES = {
    "token": (2, 70, 3, 1),
    "tensor": (2, 1, 3, 1),
    "channel": (2, 1, 3, 16),
    "block": (2, 3, 3, 1),
    "block_channel": (2, 3, 3, 16),
}


@pytest.mark.parametrize("granularity", SCALES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_codes_and_scales(granularity, layout):
    x = normal(2, 70, 3, 16)
    given = x if layout == "bshd" else x.transpose(0, 2, 1, 3)
    quantized = attn8.quantize(given, granularity, block=32, layout=layout)
    back = attn8.dequantize(quantized)
    codes, scale = quantized.codes, quantized.scale
    if layout == "bhsd":
        codes, scale, back = (y.transpose(0, 2, 1, 3) for y in (codes, scale, back))
    assert codes.dtype == np.int8
    assert codes.shape == x.shape
    assert scale.shape == SCALES[granularity]
    assert np.abs(codes.astype(int)).max() == 127
    if "block" in granularity:
        scale = np.repeat(scale, 32, 1)[:, :70]
    np.testing.assert_array_equal(back, codes.astype(np.float32) * scale)
    # Half a step, and the 2^-20 by which a scale may be short of max / 127.
    assert np.all(np.abs(back - x) <= 0.5 * scale + 2e-6 * np.abs(x) + 1e-12 + 127 * 2e-6 * scale)


def test_smoothing_takes_the_mean_out_and_gives_it_back():
    x = normal(2, 50, 3, 16) + 10 * normal(1, 1, 3, 16, seed=1)
    quantized = attn8.quantize(x, smooth=True)
    np.testing.assert_allclose(quantized.mean, x.mean(1, keepdims=True, dtype=np.float64), 1e-6)
    assert distance(attn8.dequantize(quantized), x) < distance(
        attn8.dequantize(attn8.quantize(x)), x
    )
    given = attn8.quantize(x, mean=quantized.mean)
    np.testing.assert_array_equal(given.codes, quantized.codes)
    assert given.mean is quantized.mean


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
def test_quantized_operands_give_the_bits_of_float_ones(layout, causal):
    q, k, v = operands(seqlen_q=70)
    if layout == "bhsd":
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    wanted, wanted_lse = attn8.attention(q, k, v, layout=layout, causal=causal, return_lse=True)
    k8 = attn8.quantize(k, smooth=True, layout=layout)
    v8 = attn8.quantize(v, layout=layout)
    out, lse = attn8.attention(q, k8, v8, layout=layout, causal=causal, return_lse=True)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)
    out = attn8.attention(attn8.quantize(q, layout=layout), k8, v8, layout=layout, causal=causal)
    np.testing.assert_array_equal(out, wanted)


def test_out_of_dequantize():
    x = attn8.quantize(normal(1, 4, 2, 8))
    out = np.empty((1, 4, 2, 8), np.float16)
    assert attn8.dequantize(x, out=out) is out
    np.testing.assert_array_equal(out, attn8.dequantize(x).astype(np.float16))


def test_bytes():
    x = attn8.quantize(normal(1, 10, 2, 64), smooth=True)
    assert x.nbytes == 10 * 2 * (64 + 4) + 2 * 64 * 4
    assert x.shape == (1, 10, 2, 64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"granularity": "row"}, ValueError, "granularity: got 'row', want token"),
        ({"granularity": "block"}, ValueError, "block: got 0, want at least 1"),
        ({"granularity": "block", "block": "x"}, TypeError, "block: got str, want an int"),
        ({"layout": "hnd"}, ValueError, "layout: got 'hnd'"),
        ({"x": normal(2, 3)}, ValueError, "x: got 2 dimensions, want 4"),
        ({"x": np.zeros((1, 2, 3, 4))}, TypeError, "x: got ndarray of dtype float64"),
        ({"x": [1]}, TypeError, "x: got list"),
        ({"smooth": 1}, TypeError, "smooth: got int, want a bool"),
        ({"smooth": True, "mean": normal(1, 1, 2, 8)}, ValueError, "mean: got an array"),
        ({"mean": normal(1, 2, 2, 8)}, ValueError, "mean.shape got"),
        ({"mean": np.zeros((1, 1, 2, 8), np.float16)}, ValueError, "mean.dtype got float16"),
        ({"threads": 0}, ValueError, "threads: got 0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        attn8.quantize(**{"x": normal(1, 4, 2, 8), **change})


def test_a_quantized_operand_of_another_layout_is_refused():
    q, k, v = operands()
    k8 = attn8.quantize(k.transpose(0, 2, 1, 3), layout="bhsd")
    with pytest.raises(ValueError, match=r"k.layout: got 'bhsd', want layout='bshd'"):
        attn8.attention(q, k8, v)


def test_codes_where_floats_are_wanted():
    q, k, v = operands()
    with pytest.raises(ValueError, match="k got int8 codes, mode exact wants float"):
        attn8.attention(q, attn8.quantize(k), v, mode="exact")
    with pytest.raises(TypeError, match="k: got ndarray of dtype int8"):
        attn8.attention(q, attn8.quantize(k).codes, v)
    with pytest.raises(TypeError, match="x: got ndarray, want a QuantizedTensor"):
        attn8.dequantize(q)


# The oracles.


def test_exact_reference():
    q, k, v = operands()
    out, lse = attn8.reference.attention(q, k, v, causal=True)
    seen = np.tril(np.ones((33, 70), bool), 70 - 33)
    wanted, wanted_lse = dense_attention(q, k, v, seen=seen)
    np.testing.assert_allclose(out, wanted, atol=1e-12)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-12)
    swapped, _ = attn8.reference.attention(
        *(x.transpose(0, 2, 1, 3) for x in (q, k, v)), layout="bhsd", causal=True
    )
    np.testing.assert_array_equal(swapped.transpose(0, 2, 1, 3), out)


def test_reference_of_some_rows():
    q, k, v = operands()
    out, _ = attn8.reference.attention(q, k, v)
    some, _ = attn8.reference.attention(q, k, v, rows=[3, 32])
    np.testing.assert_array_equal(some[:, [3, 32]], out[:, [3, 32]])
    assert not some[:, :3].any()
    for rows, error in (([33], ValueError), ([-1], ValueError), ([], ValueError)):
        with pytest.raises(error):
            attn8.reference.attention(q, k, v, rows=rows)


def test_error_report():
    reference = normal(100).astype(np.float64)
    out = reference + 0.01
    report = attn8.reference.error_report(out, reference)
    assert report.rel_l2 == pytest.approx(0.1 / np.linalg.norm(reference))
    assert report.max_abs == pytest.approx(0.01)
    assert attn8.reference.error_report(reference, reference).rel_l2 == 0
    with pytest.raises(ValueError, match=r"reference: got shape \(99,\), want \(100,\)"):
        attn8.reference.error_report(out, reference[1:])
