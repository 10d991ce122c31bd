# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 on CUDA tensors: results, streams, graphs, memory, and what is refused."""

import itertools

import numpy as np
import pytest
from dense_attention import dense_attention, distance, normal, operands, visible

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
try:
    import torch

    has_torch = True
    has_gpu = torch.cuda.is_available() and attn8.info()["cuda"]["built"]
except ModuleNotFoundError:
    has_torch = has_gpu = False
needs_torch = pytest.mark.skipif(not has_torch, reason="torch is not installed")
gpu = pytest.mark.skipif(
    not has_gpu, reason="no CUDA device that torch sees, or attn8 built without CUDA"
)

BOUNDS = {"accurate": 0.02, "half": 0.02, "paper": 0.03}
"""Relative L2 from float64 attention of N(0, 1) data."""


def tensors(dtype=None, **sizes):
    given = tuple(torch.from_numpy(x).cuda() for x in operands(**sizes))
    return given if dtype is None else tuple(x.to(dtype) for x in given)


def on_host(x):
    return x.double().cpu().numpy()


# ---- without a device ---------------------------------------------------------------------------


def test_info_says_what_there_is():
    found = attn8.info()["cuda"]
    assert isinstance(found["built"], bool)
    assert bool(found["reason"]) == (not found["devices"])


class Elsewhere:
    """An array that says it lies on a CUDA device."""

    shape = (1, 4, 2, 8)
    dtype = "float32"

    def __dlpack_device__(self):
        return 2, 0


def test_cuda_arrays_of_other_frameworks_are_refused():
    with pytest.raises(TypeError, match=r"q: got Elsewhere on a CUDA device, want a torch tensor"):
        attn8.attention(Elsewhere(), *operands()[1:])


def test_cache_wants_cuda():
    if attn8.info()["cuda"]["devices"]:
        pytest.skip("there is a CUDA device")
    with pytest.raises(attn8.UnavailableError):
        attn8.CudaKVCache(nheads_k=2, head_dim=64, num_pages=4)


@needs_torch
def test_operators_know_their_results_on_cuda():
    from attn8 import torch_ops
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.empty(2, 9, 2, d, device="cuda", dtype=torch.bfloat16) for d in (64, 32))
        out, lse = torch_ops.attention(q, k, v)
        assert out.shape == (2, 5, 4, 32)
        assert out.dtype == torch.bfloat16
        assert lse.shape == (2, 4, 5)
        assert out.device == lse.device == q.device
        assert torch_ops.rotate(q).device == q.device


@needs_torch
def test_build_without_cuda_says_so():
    if attn8.info()["cuda"]["built"]:
        pytest.skip("attn8 was built with CUDA")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 64, device="cuda")
        with pytest.raises(attn8.UnavailableError, match=r"q: got a tensor on cuda:0, want .*CUDA"):
            attn8.attention(q, q, q)


# ---- results ------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("mode", BOUNDS)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (40, 3)}])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention(mode, mask, dtype):
    q, k, v = tensors(
        getattr(torch, dtype), seqlen_q=130, seqlen_k=300, nheads_q=4, nheads_k=2, head_dim=64
    )
    out, lse = attn8.attention(q, k, v, mode=mode, return_lse=True, **mask)
    assert out.device == q.device
    assert out.dtype == q.dtype
    seen = visible(q.shape[1], k.shape[1], **mask)
    wanted, wanted_lse = dense_attention(*(on_host(x) for x in (q, k, v)), seen=seen)
    assert distance(on_host(out), wanted) < BOUNDS[mode]
    np.testing.assert_allclose(on_host(lse), wanted_lse, atol=0.03)


@gpu
@pytest.mark.parametrize("granularity", ["token", "channel"])
@pytest.mark.parametrize("mode", BOUNDS)
def test_everything_that_changes_scores(mode, granularity):
    batch, heads, rows, keys = 2, 4, 70, 200
    q, k, v = tensors(batch=batch, seqlen_q=rows, seqlen_k=keys, nheads_q=heads, head_dim=64)
    generator = torch.Generator().manual_seed(3)
    given = {
        "softcap": 5.0,
        "attn_mask": torch.rand(batch, 1, rows, keys, generator=generator) < 0.7,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "seqlens_k": torch.tensor([200, 133], dtype=torch.int32),
        "leftpad_k": torch.tensor([0, 17], dtype=torch.int32),
    }
    on_device = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    out, lse = attn8.attention(
        q, k, v, mode=mode, v_granularity=granularity, causal=True, return_lse=True, **on_device
    )
    wanted, wanted_lse = attn8.attention(
        *(x.cpu() for x in (q, k, v)), mode="exact", causal=True, return_lse=True, **given
    )
    assert distance(on_host(out), on_host(wanted)) < BOUNDS[mode]
    np.testing.assert_allclose(on_host(lse), on_host(wanted_lse), atol=0.03)


@gpu
def test_layouts_strides_and_out():
    q, k, v = tensors(seqlen_q=70, seqlen_k=90, nheads_k=4)
    out = attn8.attention(q, k, v)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attn8.attention(*turned, layout="bhsd").transpose(1, 2), out)
    assert torch.equal(attn8.scaled_dot_product_attention(*turned).transpose(1, 2), out)
    assert torch.equal(attn8.flash_attn_func(q, k, v), out)
    given = torch.full_like(out, float("nan"))
    assert attn8.attention(q, k, v, out=given) is given
    assert torch.equal(given, out)
    with pytest.raises(ValueError, match="out: got memory that overlaps"):
        attn8.attention(q, k, v, out=q)


@gpu
def test_sdpa_with_a_mask_of_torch():
    q, k, v = tensors(torch.float16, seqlen_q=64, seqlen_k=64, nheads_k=4)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(64, 64, device="cuda", dtype=torch.bool).tril(3)
    for given in (mask, torch.zeros(64, 64, device="cuda").masked_fill(~mask, float("-inf"))):
        same_type = given if given.dtype == torch.bool else given.to(q.dtype)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, same_type)
        out = attn8.scaled_dot_product_attention(q, k, v, given)
        assert distance(on_host(out), on_host(wanted)) < BOUNDS["accurate"]


@gpu
def test_rotation():
    q, k, v = tensors(torch.float16, seqlen_q=64, seqlen_k=64, head_dim=128)
    wanted = dense_attention(*(on_host(x) for x in (q, k, v)))[0]
    assert distance(on_host(attn8.attention(q, k, v, rotate=True)), wanted) < 0.02


LENGTHS_Q, LENGTHS_K = [3, 0, 70, 129], [300, 5, 70, 200]


def packed(dtype=None):
    starts = [
        torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
        for lengths in (LENGTHS_Q, LENGTHS_K)
    ]
    q = normal(sum(LENGTHS_Q), 4, 64, seed=1)
    k, v = (normal(sum(LENGTHS_K), 2, 64, seed=i) for i in (2, 3))
    given = [torch.from_numpy(x).cuda() for x in (q, k, v)]
    return [x if dtype is None else x.to(dtype) for x in given], starts


@gpu
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", BOUNDS)
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"causal": True, "align": "top_left"}, {"window_size": (9, 2)}]
)
def test_packed_sequences(place, mode, mask):
    given, starts = packed()
    starts = [x.to(place) for x in starts]
    out, lse = attn8.attention_varlen(
        *given, *starts, mode=mode, return_lse=True, max_seqlen_q=129, max_seqlen_k=300, **mask
    )
    wanted, wanted_lse = attn8.attention_varlen(
        *(x.cpu() for x in given), *(x.cpu() for x in starts), mode="exact", return_lse=True, **mask
    )
    assert distance(on_host(out), on_host(wanted)) < BOUNDS[mode]
    np.testing.assert_allclose(on_host(lse), on_host(wanted_lse), atol=0.03)


@gpu
def test_packed_sequences_with_slopes_of_their_own():
    given, starts = packed()
    slopes = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    wanted = attn8.flash_attn_varlen_func(
        *(x.cpu() for x in given), *starts, 129, 300, causal=True, alibi_slopes=slopes, mode="exact"
    )
    for place in ("cpu", "cuda"):
        out = attn8.flash_attn_varlen_func(
            *given, *(x.to(place) for x in starts), 129, 300, causal=True,
            alibi_slopes=slopes.cuda(),
        )  # fmt: skip
        assert distance(on_host(out), on_host(wanted)) < BOUNDS["accurate"]


@gpu
@pytest.mark.parametrize("changes", [{}, {"softcap": 15.0}, {"sinks": True}, {"alibi": True}])
def test_packed_sequences_in_pages_are_those_in_rectangles(changes):
    given, starts = packed(torch.float16)
    on_device = [x.cuda() for x in starts]
    options = {"causal": True, "softcap": changes.get("softcap", 0.0)}
    if "sinks" in changes:
        options["sinks"] = torch.linspace(-1, 2, 4, device="cuda")
    if "alibi" in changes:
        options["alibi_slopes"] = torch.rand(4, 4, device="cuda")
    # A mode per head knows rectangles alone.
    in_pages = attn8.attention_varlen(
        *given, *on_device, max_seqlen_q=129, max_seqlen_k=300, return_lse=True, **options
    )
    in_rectangles = attn8.attention_varlen(
        *given, *on_device, max_seqlen_q=129, max_seqlen_k=300, return_lse=True,
        head_modes=["accurate", "accurate"], **options,
    )  # fmt: skip
    for got, wanted in zip(in_pages, in_rectangles, strict=True):
        assert distance(on_host(got), on_host(wanted)) < 0.01


@gpu
def test_head_modes():
    q, k, v = tensors(seqlen_q=70, seqlen_k=300, nheads_q=6, nheads_k=3, head_dim=64)
    out, lse = attn8.attention(
        q, k, v, head_modes=["accurate", "half", "paper"], causal=True, return_lse=True
    )
    for head, mode in enumerate(("accurate", "half", "paper")):
        rows = slice(2 * head, 2 * head + 2)
        wanted, wanted_lse = attn8.attention(
            q[:, :, rows], k[:, :, head : head + 1], v[:, :, head : head + 1], mode=mode,
            causal=True, return_lse=True,
        )  # fmt: skip
        assert torch.equal(out[:, :, rows], wanted)
        assert torch.equal(lse[:, rows], wanted_lse)
    with pytest.raises(attn8.UnsupportedError, match="mode=exact, the CUDA backend has"):
        attn8.attention(q, k, v, head_modes=["accurate", "exact", "paper"])


@gpu
def test_packed_sequences_that_are_wrong_are_nan():
    given, starts = packed()
    on_device = [x.cuda() for x in starts]
    good = attn8.flash_attn_varlen_func(*given, *on_device, 129, 300)
    out = attn8.flash_attn_varlen_func(*given, *on_device, 70, 300)
    assert torch.equal(out[:73], attn8.flash_attn_varlen_func(*given, *on_device, 70, 300)[:73])
    assert not out[:73].isnan().any()
    assert out[73:].isnan().all()
    short = attn8.flash_attn_varlen_func(*given, *on_device, 129, 200)
    assert short[:3].isnan().all()
    torch.testing.assert_close(short[3:], good[3:], rtol=0, atol=1e-5)  # keys divide otherwise
    broken = on_device[1].clone()
    broken[-1] = 1000
    assert attn8.flash_attn_varlen_func(*given, on_device[0], broken, 129, 300)[73:].isnan().all()
    with pytest.raises(ValueError, match="cu_seqlens_k: got another device than cu_seqlens_q"):
        attn8.flash_attn_varlen_func(*given, on_device[0], starts[1], 129, 300)


@gpu
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_merged_states(layout):
    given = tensors(batch=2, seqlen_q=70, seqlen_k=300, nheads_q=4, nheads_k=2, head_dim=64)
    q, k, v = (x.transpose(1, 2).contiguous() if layout == "bhsd" else x for x in given)
    tokens = 2 if layout == "bhsd" else 1
    parts = [
        attn8.attention(
            q.to(dtype), k.narrow(tokens, first, 100).to(dtype),
            v.narrow(tokens, first, 100).to(dtype), return_lse=True, layout=layout,
        )
        for first, dtype in zip((0, 100, 200), (torch.float16, torch.float32, torch.bfloat16),
                                strict=True)
    ]  # fmt: skip
    outs, lses = zip(*parts, strict=True)
    lses[1][0, 1] = -torch.inf
    out, lse = attn8.merge_states(outs, lses, layout=layout)
    assert (out.device, out.dtype, lse.dtype) == (q.device, torch.float16, torch.float32)
    wanted = attn8.merge_states([x.cpu() for x in outs], [x.cpu() for x in lses], layout=layout)
    np.testing.assert_allclose(on_host(out), wanted[0].double(), atol=1e-3)
    np.testing.assert_allclose(on_host(lse), wanted[1].double(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"lses\[2\]: got a tensor on cpu, want a tensor on cuda"):
        attn8.merge_states(outs, [*lses[:2], lses[2].cpu()], layout=layout)


# ---- streams, graphs, memory --------------------------------------------------------------------


@gpu
def test_work_goes_to_the_current_stream():
    q, k, v = tensors(torch.float16, batch=2, seqlen_q=256, seqlen_k=256, nheads_q=4, head_dim=64)
    wanted = attn8.attention(q, k, v)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # what would read `late` on another stream finds zeros
        late.copy_(q)
        out = attn8.attention(late, k, v)
        again = out.clone()
        assert not torch.cuda.current_stream().query()  # the call did not wait
    torch.cuda.synchronize()
    assert torch.equal(again, wanted)


@gpu
@pytest.mark.parametrize("mode", BOUNDS)
def test_capture_into_a_graph(mode):
    q, k, v = tensors(torch.float16, seqlen_q=130, seqlen_k=300, head_dim=64)
    attn8.attention(q, k, v, mode=mode, causal=True)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn8.attention(q, k, v, mode=mode, causal=True)
    for seed in (1, 2):
        for i, x in enumerate((q, k, v)):
            x.copy_(torch.from_numpy(normal(*x.shape, seed=10 * seed + i)))
        graph.replay()
        assert torch.equal(out, attn8.attention(q, k, v, mode=mode, causal=True))


@gpu
def test_capture_of_packed_sequences():
    given, starts = packed(torch.float16)
    starts = [x.cuda() for x in starts]
    wanted = attn8.flash_attn_varlen_func(*given, *starts, 129, 300, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn8.flash_attn_varlen_func(*given, *starts, 129, 300, causal=True)
    graph.replay()
    assert torch.equal(out, wanted)


@gpu
def test_memory_is_that_of_torch():
    q, k, v = tensors(torch.float16, seqlen_q=4096, seqlen_k=4096, head_dim=64)
    attn8.attention(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    for _ in range(5):
        attn8.attention(q, k, v)
    torch.cuda.synchronize()
    assert (torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()) == before


# ---- operators ----------------------------------------------------------------------------------


@gpu
def test_opcheck():
    from attn8 import torch_ops

    q, k, v = tensors(torch.float16, seqlen_q=16, seqlen_k=32, head_dim=64)
    torch.library.opcheck(torch_ops.attention, (q, k, v), {"causal": True})
    torch.library.opcheck(torch_ops.rotate, (q,))


@gpu
def test_compile():
    q, k, v = tensors(torch.float16, seqlen_q=16, seqlen_k=32, head_dim=64)

    def model(q, k, v):
        return attn8.attention(q * 2, k, v, causal=True) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), model(q, k, v))


@gpu
def test_routing():
    from attn8.torch_ops import route_sdpa

    q = tensors(torch.float16, seqlen_q=16, seqlen_k=32, head_dim=64)[0].transpose(1, 2)
    with route_sdpa(fallback=False) as calls:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert calls.routed == 1
    assert out.device == q.device


# ---- caches -------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("new", [0, 1, 5])
def test_flash_attn_with_kvcache(paged, new):
    batch, room, page = 3, 512, 256
    held = torch.tensor([40, 0, 500], dtype=torch.int32)
    k_cache, v_cache = (torch.from_numpy(normal(batch, room, 2, 64, seed=i)) for i in (1, 2))
    k, v = (torch.from_numpy(normal(batch, new, 2, 64, seed=i)) for i in (3, 4))
    q = torch.from_numpy(normal(batch, 5, 4, 64, seed=5))
    table = None
    if paged:
        table = torch.tensor([[3, 0], [5, 1], [2, 4]], dtype=torch.int32)
        pages = [torch.zeros(6, page, 2, 64) for _ in "kv"]
        for paged_cache, cache in zip(pages, (k_cache, v_cache), strict=True):
            paged_cache[table.flatten().long()] = cache.reshape(6, page, 2, 64)
        k_cache, v_cache = pages
    extra = {"k": k, "v": v} if new else {}
    options = {"causal": True, "window_size": (200, 0), "return_softmax_lse": True}
    on_device = [x.cuda() for x in (q, k_cache, v_cache)]
    out, lse = attn8.flash_attn_with_kvcache(
        *on_device, cache_seqlens=held.cuda(), block_table=None if table is None else table.cuda(),
        **{n: x.cuda() for n, x in extra.items()}, **options,
    )  # fmt: skip
    wanted, wanted_lse = attn8.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=held, block_table=table, mode="exact", **extra, **options
    )
    assert torch.equal(on_device[1].cpu(), k_cache)
    assert torch.equal(on_device[2].cpu(), v_cache)
    assert distance(on_host(out), on_host(wanted)) < BOUNDS["accurate"]
    np.testing.assert_allclose(on_host(lse), on_host(wanted_lse), atol=0.03)


@gpu
def test_flash_attn_with_kvcache_outside_of_the_cache_is_nan():
    q, k_cache, v_cache = tensors(batch=2, seqlen_q=1, seqlen_k=64, head_dim=64)
    held = torch.tensor([64, 65], dtype=torch.int32, device="cuda")
    out = attn8.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=held)
    assert not out[0].isnan().any()
    assert out[1].isnan().all()


@gpu
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_cache_in_pages(place):
    lengths, more = [300, 17, 512], [1, 3, 0]
    cache = attn8.CudaKVCache(nheads_k=2, head_dim=64, num_pages=12)
    assert cache.bytes_per_page > 256 * 2 * 64 * 2
    table = torch.tensor([[7, 2, 9], [0, 5, 1], [3, 8, 4]], dtype=torch.int32, device=place)
    held = torch.zeros(3, dtype=torch.int32, device=place)
    tokens = []
    for seed, counts in enumerate((lengths, more)):
        k, v = (
            torch.from_numpy(normal(sum(counts), 2, 64, seed=10 * seed + i)).cuda() for i in (1, 2)
        )
        starts = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32, device=place)
        cache.append(k, v, table, held, cu_seqlens=starts, max_seqlen=max(counts))
        held = held + torch.tensor(counts, dtype=torch.int32, device=place)
        tokens.append([x.cpu().split(counts) for x in (k, v)])
    q = torch.from_numpy(normal(3, 5, 4, 64, seed=50)).cuda()
    out, lse = cache.attend(q, table, held, causal=True, return_lse=True)
    flat, flat_lse = cache.attend(
        q.flatten(0, 1), table, held, causal=True, return_lse=True, max_seqlen=5,
        cu_seqlens=torch.tensor([0, 5, 10, 15], dtype=torch.int32, device=place),
    )  # fmt: skip
    assert torch.equal(flat.reshape(out.shape), out)
    assert torch.equal(flat_lse.reshape(4, 3, 5).transpose(0, 1), lse)
    for i in range(3):
        k, v = (torch.cat([part[j][i] for part in tokens])[None] for j in (0, 1))
        wanted, wanted_lse = attn8.attention(
            q[i : i + 1].cpu(), k, v, causal=True, mode="exact", return_lse=True
        )
        assert distance(on_host(out[i]), on_host(wanted[0])) < BOUNDS["accurate"]
        np.testing.assert_allclose(on_host(lse[i]), on_host(wanted_lse[0]), atol=0.03)


@gpu
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_cache_in_pages_with_score_changes(softcap):
    lengths, heads = [300, 17, 512], 4
    cache = attn8.CudaKVCache(nheads_k=2, head_dim=64, num_pages=6)
    table = torch.tensor([[5, 2], [0, 1], [3, 4]], dtype=torch.int32, device="cuda")
    held = torch.zeros(3, dtype=torch.int32, device="cuda")
    k, v = (torch.from_numpy(normal(sum(lengths), 2, 64, seed=i)).cuda() for i in (1, 2))
    starts = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
    cache.append(k, v, table, held, cu_seqlens=starts)
    held += starts.diff()
    slopes = torch.rand(3, heads, generator=torch.Generator().manual_seed(1))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for rows in (1, 5, 100):
        q = torch.from_numpy(normal(3, rows, heads, 64, seed=rows)).cuda()
        for given in (slopes, slopes[0]):
            out, lse = cache.attend(
                q, table, held, causal=True, softcap=softcap, sinks=sinks.cuda(),
                alibi_slopes=given.cuda(), return_lse=True,
            )  # fmt: skip
            for i, (a, b) in enumerate(itertools.pairwise(starts.tolist())):
                wanted, wanted_lse = attn8.attention(
                    q[i : i + 1].cpu(), k[None, a:b].cpu(), v[None, a:b].cpu(), causal=True,
                    softcap=softcap, sinks=sinks, mode="exact", return_lse=True,
                    alibi_slopes=given if given.ndim == 1 else given[i : i + 1],
                )  # fmt: skip
                assert distance(on_host(out[i]), on_host(wanted[0])) < BOUNDS["accurate"]
                np.testing.assert_allclose(on_host(lse[i]), on_host(wanted_lse[0]), atol=0.03)


@gpu
@pytest.mark.parametrize("kind", ["bool", "float16", "float32"])
def test_cache_in_pages_with_a_mask(kind):
    lengths = [300, 40]
    cache = attn8.CudaKVCache(nheads_k=2, head_dim=64, num_pages=4)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device="cuda")
    held = torch.zeros(2, dtype=torch.int32, device="cuda")
    k, v = (torch.from_numpy(normal(sum(lengths), 2, 64, seed=i)).cuda() for i in (1, 2))
    starts = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
    cache.append(k, v, table, held, cu_seqlens=starts, max_seqlen=300)
    held = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    q = torch.from_numpy(normal(2, 5, 4, 64, seed=3)).cuda()
    mask = torch.from_numpy(normal(2, 4, 5, 300, seed=4)).cuda()
    mask = mask > -0.5 if kind == "bool" else mask.to(getattr(torch, kind))
    out = cache.attend(q, table, held, attn_mask=mask)
    flat = cache.attend(
        q.flatten(0, 1), table, held, max_seqlen=5,
        cu_seqlens=torch.tensor([0, 5, 10], dtype=torch.int32, device="cuda"),
        attn_mask=mask.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None],
    )  # fmt: skip
    assert torch.equal(flat.reshape(out.shape), out)
    for i, (first, count) in enumerate(zip((0, 300), lengths, strict=True)):
        keys = slice(first, first + count)
        wanted = attn8.attention(
            q[i : i + 1].cpu(), k[None, keys].cpu(), v[None, keys].cpu(), mode="exact",
            attn_mask=mask[i : i + 1, ..., :count].cpu(),
        )  # fmt: skip
        assert distance(on_host(out[i]), on_host(wanted[0])) < BOUNDS["accurate"]
    short = cache.attend(q, table, held, attn_mask=mask[..., :100])
    assert short[0].isnan().all()
    assert not short[1].isnan().any()


@gpu
def test_capture_of_decode_from_pages():
    cache = attn8.CudaKVCache(nheads_k=2, head_dim=64, num_pages=4)
    table = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32, device="cuda")
    held = torch.zeros(2, dtype=torch.int32, device="cuda")
    k, v = (torch.from_numpy(normal(2, 255, 2, 64, seed=i)).cuda() for i in (1, 2))
    cache.append(k, v, table, held)
    held += 255
    q = torch.from_numpy(normal(2, 1, 4, 64, seed=3)).cuda()

    def step():
        cache.append(k[:, :1], v[:, :1], table, held)
        held.add_(1)
        return cache.attend(q, table, held)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert held.tolist() == [257, 257]
    wanted = cache.attend(q, table, held)
    assert torch.equal(out, wanted)


# ---- what is refused ----------------------------------------------------------------------------


@gpu
def test_refusals():
    q, k, v = tensors(seqlen_q=16, seqlen_k=16, head_dim=64)
    cases = [
        ({"k": k.cpu()}, ValueError, "k: got a tensor on cpu, want a tensor on cuda:0"),
        ({"v": v.cpu().numpy()}, ValueError, "v: got ndarray, want a tensor on cuda:0"),
        ({"out": torch.empty(q.shape)}, ValueError, "out: got a tensor on cpu"),
        ({"attn_mask": torch.ones(16, 16)}, ValueError, "attn_mask: got a tensor on cpu"),
        ({"sinks": torch.ones(q.shape[2])}, ValueError, "sinks: got a tensor on cpu"),
        ({"isa": "avx2"}, attn8.UnsupportedError, "isa: got 'avx2' with CUDA tensors"),
        ({"mode": "exact"}, attn8.UnsupportedError, "mode=exact, the CUDA backend has accurate"),
        ({"check_finite": True}, attn8.UnsupportedError, "check_finite got true"),
        ({"v_granularity": "block"}, attn8.UnsupportedError, "v_granularity=block"),
    ]
    for change, error, text in cases:
        with pytest.raises(error, match=text):
            attn8.attention(**{"q": q, "k": k, "v": v, **change})
    with pytest.raises(ValueError, match=r"k.device got cuda:0, wants cpu"):
        attn8.attention(q.cpu(), k, v.cpu())
    with pytest.raises(ValueError, match="q: got cpu, want a torch tensor on cuda:0"):
        attn8.CudaKVCache(nheads_k=2, head_dim=64, num_pages=1).attend(q.cpu(), None, None)
