# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.rotate: what it leaves as it is, and what it gains."""

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, operands, visible

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")


def matrix(dim):
    """What rotate multiplies by: sign (-1)^popcount(i & j) in blocks of a power of 2."""
    block = next(2**n for n in range(8, -1, -1) if dim % 2**n == 0)
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return np.kron(np.eye(dim // block), np.array(signs)) / np.sqrt(block)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 16, 48, 64, 80, 96, 128, 256])
def test_is_the_product_with_a_hadamard_matrix(dim):
    x = normal(2, 19, 3, dim)
    turned = attn8.rotate(x)
    assert turned.dtype == np.float32
    np.testing.assert_allclose(turned, x.astype(np.float64) @ matrix(dim), atol=3e-6)
    np.testing.assert_allclose(attn8.rotate(turned), x, atol=3e-6)


@pytest.mark.parametrize("dim", [64, 80])
def test_layouts_types_and_threads_share_their_bits(dim):
    x = normal(3, 700, 2, dim)
    wanted = attn8.rotate(x, threads=1)
    np.testing.assert_array_equal(attn8.rotate(x, threads=3), wanted)
    np.testing.assert_array_equal(attn8.rotate(x.reshape(-1, dim)).reshape(x.shape), wanted)
    np.testing.assert_array_equal(attn8.rotate(x[None, None])[0, 0], wanted)
    np.testing.assert_array_equal(attn8.rotate(x[1, 5, 1]), wanted[1, 5, 1])
    np.testing.assert_array_equal(attn8.rotate(x[::-1, ::7, :1]), wanted[::-1, ::7, :1])
    columns = np.asfortranarray(x)
    np.testing.assert_array_equal(attn8.rotate(columns), wanted)
    half = x.astype(np.float16)
    np.testing.assert_array_equal(attn8.rotate(half), attn8.rotate(half.astype(np.float32)))
    for shape in ((0, 700, 2, dim), (2, 0, 3, 1, dim)):
        assert attn8.rotate(np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize("mode", ["accurate", "paper"])
def test_outlying_channels_of_v_cost_less(mode):
    q, k, _ = operands()
    v = normal(2, 70, 2, 80)
    v[..., 3] *= 30
    wanted, _ = dense_attention(q, k, v, 0.125, visible(33, 70, True))
    others = [i for i in range(80) if i != 3]
    options = {"causal": True, "mode": mode}
    plain = attn8.attention(q, k, v, **options)
    turned = attn8.attention(q, k, v, rotate=True, **options)
    assert turned.shape == plain.shape
    assert distance(turned[..., others], wanted[..., others]) < 0.5 * distance(
        plain[..., others], wanted[..., others]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_out(dtype):
    q, k, v = operands()
    wanted = attn8.attention(q, k, v, rotate=True)
    out = np.full((2, 33, 4, 128), 9, dtype)[..., ::2]
    assert attn8.attention(q, k, v, rotate=True, out=out) is out
    np.testing.assert_array_equal(out, wanted.astype(dtype))
    with pytest.raises(ValueError, match=r"out: got shape \(2, 33, 4, 32\), want \(2, 33, 4, 64\)"):
        attn8.attention(q, k, v, rotate=True, out=np.empty((2, 33, 4, 32), np.float32))
    with pytest.raises(TypeError, match="out: got ndarray of dtype int32"):
        attn8.attention(q, k, v, rotate=True, out=np.empty(q.shape, np.int32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_cache_has_the_bits_of_attention(dtype):
    q, k, v = (x[0].astype(dtype) for x in operands(seqlen_q=70, seqlen_k=200))
    cache = attn8.KVCache(nheads_k=2, head_dim=64, max_pages=9, page_size=128, rotate=True)
    held = cache.create()
    cache.append(held, k, v)
    wanted, wanted_lse = attn8.attention(
        q[None], k[None], v[None], causal=True, kv_block=128, rotate=True, return_lse=True
    )
    out, lse = cache.attend([held], q, causal=True, return_lse=True)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, wanted[0])
    np.testing.assert_array_equal(lse, wanted_lse[0])
    with pytest.raises(TypeError, match="rotate: got int, want a bool"):
        attn8.KVCache(nheads_k=2, head_dim=64, max_pages=9, rotate=1)


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
    with pytest.raises(TypeError, match="v: got a QuantizedTensor with rotate=True, want floats"):
        attn8.attention(q, k, attn8.quantize(v), rotate=True)
    for dim in (0, 257):
        with pytest.raises(ValueError, match=rf"x: got shape \(3, {dim}\), want"):
            attn8.rotate(np.zeros((3, dim), np.float32))
    with pytest.raises(TypeError, match="x: got ndarray of dtype int32"):
        attn8.rotate(np.zeros((3, 8), np.int32))
