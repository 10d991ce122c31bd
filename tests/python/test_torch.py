# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 on torch tensors: memory, types, operators, torch.compile, the routing of SDPA."""

import inspect
import threading

import numpy as np
import pytest
from dense_attention import dense_attention, distance, operands

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
from attn8 import torch_ops  # noqa: E402

F = torch.nn.functional


def tensors(**sizes):
    return tuple(map(torch.from_numpy, operands(**sizes)))


def bhsd(*given):
    return tuple(x.transpose(1, 2) for x in given)


def test_same_bits_as_numpy():
    q, k, v = tensors()
    out, lse = attn8.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, torch.Tensor)
    wanted, wanted_lse = attn8.attention(*operands(), causal=True, return_lse=True)
    np.testing.assert_array_equal(out.numpy(), wanted)
    np.testing.assert_array_equal(lse.numpy(), wanted_lse)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_half_precision(dtype, bound):
    q, k, v = (x.to(dtype) for x in tensors())
    out = attn8.attention(q, k, v, mode="exact")
    assert out.dtype == dtype
    assert (
        distance(out.float(), dense_attention(*(x.float().numpy() for x in (q, k, v)))[0]) < bound
    )


def test_memory_is_shared():
    q, _, _ = tensors()
    for x in (q, q.transpose(1, 2), q[:, 3:, :, ::2], q[:1].expand(5, -1, -1, -1)):
        assert attn8._core.address(x) == x.data_ptr()
    out = torch.empty(q.shape)
    assert attn8.attention(*tensors(), out=out) is out
    assert torch.equal(out, attn8.attention(*tensors()))


def test_strides():
    q, k, v = tensors()
    assert torch.equal(
        attn8.attention(*bhsd(q, k, v), layout="bhsd").transpose(1, 2), attn8.attention(q, k, v)
    )


def test_quantized_tensors_stay_in_torch():
    q, k, v = tensors()
    k8, v8 = attn8.quantize(k, smooth=True), attn8.quantize(v)
    for x in (k8.codes, k8.scale, k8.mean, attn8.dequantize(k8)):
        assert isinstance(x, torch.Tensor)
    assert torch.equal(attn8.attention(q, k8, v8), attn8.attention(q, k, v))


def test_merge_states():
    q, k, v = tensors(seqlen_k=100)
    parts = [
        attn8.attention(q, k[:, a:b], v[:, a:b], mode="exact", return_lse=True)
        for a, b in ((0, 30), (30, 100))
    ]
    out, lse = attn8.merge_states(*zip(*parts, strict=True))
    wanted, wanted_lse = attn8.attention(q, k, v, mode="exact", return_lse=True)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-6, rtol=0)


def test_gradients_are_refused_unless_torch_records_none():
    q, k, v = tensors()
    q.requires_grad_()
    with pytest.raises(ValueError, match="q: got a tensor that requires grad, want"):
        attn8.attention(q, k, v)
    with torch.no_grad():
        out = attn8.attention(q, k, v)
    assert torch.equal(out, attn8.attention(q.detach(), k, v))
    leaf = torch.empty(q.shape, requires_grad=True)
    with pytest.raises(ValueError, match="out: got a tensor that requires grad"):
        attn8.attention(q.detach(), k, v, out=leaf)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 4, 2, 8, dtype=torch.float64),
        torch.zeros(1, 4, 2, 8, dtype=torch.complex64),
        torch.zeros(1, 4, 2, 8).to_sparse(),
        torch.zeros(1, 4, 2, 8, device="meta"),
    ],
    ids=["float64", "complex64", "sparse", "meta"],
)
def test_other_tensors_are_refused(x):
    good = torch.zeros(1, 4, 2, 8)
    for operand in ("q", "k", "v"):
        with pytest.raises((TypeError, ValueError), match=f"{operand}: got"):
            attn8.attention(**{"q": good, "k": good, "v": good, operand: x})


def test_negative_bits_are_refused():
    """torch flips the sign of such tensors when it reads them; DLPack does not say so."""
    q, k, v = (torch.from_numpy(x) for x in operands())
    flipped = torch._neg_view(v)
    for call in (
        lambda: attn8.attention(q, k, flipped),
        lambda: attn8.quantize(flipped),
        lambda: attn8.attention(q, k, v, attn_mask=torch._neg_view(torch.zeros(5, 5))[:1, :1]),
    ):
        with pytest.raises(
            ValueError, match="got Tensor with torch's negative bit, want one witho"
        ):
            call()
    assert torch.equal(attn8.attention(q, k, flipped.resolve_neg()), attn8.attention(q, k, -v))


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert attn8.runtime.threads_for(torch.zeros(1), None) == 3
        assert attn8.runtime.threads_for(torch.zeros(1), 5) == 5
    finally:
        torch.set_num_threads(before)


# SDPA against torch's own.


def test_signature_is_torch_s_own():
    documented = " ".join(F.scaled_dot_product_attention.__doc__.split(") ->")[0].split())
    parameters = inspect.signature(attn8.scaled_dot_product_attention).parameters.values()
    ours = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert documented == "scaled_dot_product_attention(" + ", ".join(ours)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(33, 70), (70, 33), (40, 40)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa(seqlen_q, seqlen_k, is_causal):
    given = bhsd(*tensors(seqlen_q=seqlen_q, seqlen_k=seqlen_k))
    options = {"is_causal": is_causal, "scale": 0.2, "enable_gqa": True}
    out = attn8.scaled_dot_product_attention(*given, **options, mode="exact")
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(*given, **options), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_sdpa_padding(dtype):
    q, k, v = bhsd(*tensors(nheads_k=4))
    seen = torch.ones(2, 1, 1, 70, dtype=torch.bool)
    seen[0, ..., 50:] = False
    seen[1, ..., :7] = False
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(
        ~seen, -torch.inf
    )  # fmt: skip
    out = attn8.scaled_dot_product_attention(q, k, v, mask, mode="exact")
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k, v, seen), atol=1e-5, rtol=1e-5
    )


# Operators.


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(layout, dtype):
    q, k, v = (x.to(dtype) for x in tensors())
    if layout == "bhsd":
        q, k, v = bhsd(q, k, v)
    torch.library.opcheck(torch_ops.attention, (q, k, v, layout), {"causal": True})
    k8, v8 = attn8.quantize(k, smooth=True, layout=layout), attn8.quantize(v, layout=layout)
    torch.library.opcheck(
        torch_ops.attention_quantized,
        (q, k8.codes, k8.scale, k8.mean, v8.codes, v8.scale, layout),
    )


def test_compile_without_a_graph_break():
    q, k, v = tensors()
    k8, v8 = attn8.quantize(k, smooth=True), attn8.quantize(v)

    def work(q, k, v, k8, k8_scale, k8_mean, v8, v8_scale):
        out, lse = attn8.attention(q, k, v, causal=True, return_lse=True)
        keys = attn8.QuantizedTensor(k8, k8_scale, mean=k8_mean)
        eight = attn8.attention(q, keys, attn8.QuantizedTensor(v8, v8_scale), window_size=(9, 0))
        flash = attn8.flash_attn_func(q, k, v, causal=True)
        sdpa = attn8.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        return 2 * out, lse, eight, flash, sdpa

    given = (q, k, v, k8.codes, k8.scale, k8.mean, v8.codes, v8.scale)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for out, wanted in zip(compiled(*given), work(*given), strict=True):
        assert torch.equal(out, wanted)


def test_compile_with_dynamic_lengths():
    compiled = torch.compile(
        lambda q, k, v: attn8.attention(q, k, v, causal=True),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for length in (5, 9, 70):
        q, k, v = tensors(seqlen_q=length)
        assert torch.equal(compiled(q, k, v), attn8.attention(q, k, v, causal=True))


def test_what_cannot_be_traced_raises():
    q, k, v = tensors()
    compiled = torch.compile(
        lambda q, k, v, out: attn8.attention(q, k, v, out=out), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="out: got a tensor under"):
        compiled(q, k, v, torch.empty_like(q))


# Routing.


def test_routing_answers_inside_the_block_only():
    q, k, v = bhsd(*tensors(nheads_k=4))
    torchs = F.scaled_dot_product_attention
    ours = attn8.scaled_dot_product_attention(q, k, v, is_causal=True)
    with torch_ops.route_sdpa() as calls:
        assert F.scaled_dot_product_attention is torchs
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), ours)
    assert (calls.routed, calls.left) == (1, 0)
    assert not torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), ours)
    assert calls.routed == 1


def test_routing_leaves_the_rest_to_torch():
    q, k, v = bhsd(*tensors(nheads_k=4))
    leaf = q.clone().requires_grad_()
    with torch_ops.route_sdpa() as calls:
        F.scaled_dot_product_attention(leaf, k, v).sum().backward()
        F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert (calls.routed, calls.left) == (0, 3)
    assert leaf.grad is not None
    with (
        torch_ops.route_sdpa(fallback=False),
        pytest.raises(attn8.UnsupportedError, match=r"dropout_p: got 0\.5"),
    ):
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def test_routing_takes_masks():
    q, k, v = bhsd(*tensors(nheads_k=4))
    mask = torch.rand(33, 70, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch_ops.route_sdpa(mode="exact") as calls:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    assert (calls.routed, calls.left) == (1, 0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))


def test_routing_does_not_reach_other_threads():
    q, k, v = bhsd(*tensors(nheads_k=4))
    elsewhere = []
    thread = threading.Thread(
        target=lambda: elsewhere.append(F.scaled_dot_product_attention(q, k, v))
    )
    with torch_ops.route_sdpa() as calls:
        thread.start()
        thread.join()
    assert (calls.routed, calls.left) == (0, 0)
    assert torch.equal(elsewhere[0], F.scaled_dot_product_attention(q, k, v))
