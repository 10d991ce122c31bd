# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.rotate: what it leaves as it is, and what it gains."""

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, operands, visible

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 80, 96, 128, 256])
def test_products_stay_what_they_are(dim):
    q, k = normal(2, 9, 3, dim), normal(2, 11, 3, dim, seed=1)
    a, b = attn8.rotate(q), attn8.rotate(k)
    assert a.dtype == np.float32
    wanted = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k)
    np.testing.assert_allclose(np.einsum("bihd,bjhd->bhij", a, b), wanted, atol=1e-4)


@pytest.mark.parametrize(("dim", "block"), [(64, 64), (80, 16), (96, 32), (7, 1)])
def test_one_channel_becomes_its_block(dim, block):
    x = np.zeros((1, dim), np.float32)
    x[0, dim - 1] = 3
    turned = np.abs(attn8.rotate(x))[0]
    np.testing.assert_allclose(turned[-block:], 3 / np.sqrt(block), rtol=1e-6)
    assert not turned[:-block].any()


@pytest.mark.parametrize("mode", ["accurate", "half"])
def test_outlying_channels_cost_less(mode):
    q, k, v = operands(seqlen_q=60)
    for x in (q, k):
        x[..., ::16] *= 8
    options = {"softmax_scale": 0.02, "causal": True, "mode": mode}
    wanted, wanted_lse = dense_attention(q, k, v, 0.02, visible(60, 70, True))
    plain = attn8.attention(q, k, v, **options)
    turned, lse = attn8.attention(q, k, v, rotate=True, return_lse=True, **options)
    assert distance(turned, wanted) < 0.8 * distance(plain, wanted)
    np.testing.assert_allclose(lse, wanted_lse, atol=0.05)
    half = attn8.attention(q.astype(np.float16), k, v, rotate=True, **options)
    assert half.dtype == np.float16
    assert distance(half, wanted) < 0.02
    starts = np.array([0, 60], np.int32), np.array([0, 70], np.int32)
    packed = attn8.attention_varlen(q[0], k[0], v[0], *starts, rotate=True, **options)
    np.testing.assert_array_equal(packed, turned[0])


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
    x = normal(2, 5, 3, 80)
    ours = attn8.rotate(torch.from_numpy(x))
    np.testing.assert_allclose(ours.numpy(), attn8.rotate(x), atol=1e-5)
    assert attn8.rotate(torch.from_numpy(x).bfloat16()).dtype == torch.float32
    q, k, v = (torch.from_numpy(a).bfloat16() for a in operands(head_dim=32))

    def call(q, k, v):
        return attn8.attention(q, k, v, rotate=True, return_lse=True)

    eager, traced = call(q, k, v), torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert eager[0].dtype == traced[0].dtype == torch.bfloat16
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b)
    from attn8 import torch_ops

    torch.library.opcheck(torch_ops.rotate, (q,))


def test_bad_arguments():
    q, k, v = operands()
    with pytest.raises(TypeError, match="rotate: got int, want a bool"):
        attn8.attention(q, k, v, rotate=1)
    with pytest.raises(TypeError, match="k: got a QuantizedTensor with rotate=True, want floats"):
        attn8.attention(q, attn8.quantize(k), v, rotate=True)
    with pytest.raises(TypeError, match="x: got list"):
        attn8.rotate([1.0])
    with pytest.raises(ValueError, match=r"x: got shape \(3, 0\), want"):
        attn8.rotate(np.zeros((3, 0), np.float32))
