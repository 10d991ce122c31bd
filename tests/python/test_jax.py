# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""JAX arrays on the CPU: read in place, results handed over without a copy."""

import numpy as np
import pytest
from dense_attention import distance, operands

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
jax = pytest.importorskip("jax", reason="jax is not installed: pip install jax")
from attn8 import arrays  # noqa: E402
from jax import numpy as jnp  # noqa: E402


def both(dtype=jnp.float32, **sizes):
    """The same operands in JAX and in NumPy (float32)."""
    ours = [jnp.asarray(x).astype(dtype) for x in operands(**sizes)]
    return ours, [np.asarray(x.astype(jnp.float32)) for x in ours]


def address(x):
    return x.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("rotate", [False, True])
def test_attention(dtype, rotate):
    ours, plain = both(dtype)
    out, lse = attn8.attention(*ours, causal=True, rotate=rotate, return_lse=True)
    wanted, wanted_lse = attn8.attention(*plain, causal=True, rotate=rotate, return_lse=True)
    assert isinstance(out, jax.Array)
    assert isinstance(lse, jax.Array)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(np.asarray(lse), wanted_lse)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(jnp.asarray(wanted).astype(dtype)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_nothing_is_copied_on_the_way_in(dtype):
    for x in both(dtype)[0]:
        assert attn8._core.address(x) == address(x)


@pytest.mark.parametrize("shape", [(1, 3, 1, 8), (2, 33, 4, 64), (1, 4096, 8, 64), (0, 2, 1, 8)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nothing_is_copied_on_the_way_out(shape, dtype):
    like = jnp.zeros((1,), dtype)
    written = arrays.empty(like, shape)
    found = arrays.finish(like, written)
    assert found.dtype == dtype
    assert found.shape == shape
    if found.size:
        assert address(found) == written.ctypes.data


def test_results_outlive_the_call():
    ours, plain = both(seqlen_k=300)
    kept = [attn8.attention(*ours) for _ in range(20)]
    wanted = attn8.attention(*plain)
    for out in kept:
        np.testing.assert_array_equal(np.asarray(out), wanted)


def test_the_other_functions():
    (q, k, v), plain = both()
    assert isinstance(attn8.rotate(q), jax.Array)
    held = attn8.quantize(k)
    assert isinstance(held.codes, jax.Array)
    assert isinstance(attn8.dequantize(held), jax.Array)
    out = attn8.attention(q, held, v, attn_mask=jnp.ones((33, 70), bool), sinks=jnp.zeros(4))
    assert isinstance(out, jax.Array)
    starts = [jnp.array([0, n], jnp.int32) for n in (33, 70)]
    out = attn8.flash_attn_varlen_func(q[0], k[0], v[0], *starts, 33, 70)
    np.testing.assert_array_equal(np.asarray(out), attn8.attention(*plain)[0])
    first, second = (
        attn8.attention(q, k[:, part], v[:, part], return_lse=True)
        for part in (slice(0, 32), slice(32, 70))
    )
    merged, _ = attn8.merge_states([first[0], second[0]], [first[1], second[1]])
    assert isinstance(merged, jax.Array)
    assert distance(merged, attn8.attention(*plain)) < 0.02
    cache = attn8.KVCache(nheads_k=2, head_dim=64, max_pages=2)
    sequence = cache.create()
    cache.append(sequence, k[0], v[0])
    out = cache.attend([sequence], q[0])
    assert isinstance(out, jax.Array)
    assert distance(out, attn8.attention(*plain)[0]) < 0.02


def test_jax_arrays_never_change():
    (q, k, v), _ = both()
    before = np.array(q)
    for options in ({}, {"rotate": True}):
        with pytest.raises(TypeError, match="out: got a JAX array, which never changes"):
            attn8.attention(q, k, v, out=q, **options)
    cache = attn8.KVCache(nheads_k=2, head_dim=64, max_pages=2)
    with pytest.raises(TypeError, match="out: got a JAX array"):
        cache.attend([cache.create()], q[0], out=q[0])
    held = [attn8.quantize(x) for x in (k, v)]
    with pytest.raises(TypeError, match="k_cache: got a JAX array"):
        attn8.flash_attn_with_kvcache(
            q[:, :1], *held, k[:, :1], v[:, :1], cache_seqlens=np.array([3, 4], np.int32)
        )
    np.testing.assert_array_equal(np.asarray(q), before)


def test_traced_arrays_have_no_memory():
    (q, k, v), _ = both()
    with pytest.raises(TypeError, match="q: got DynamicJaxprTracer of dtype float32, want an arr"):
        jax.jit(lambda q: attn8.attention(q, k, v))(q)
