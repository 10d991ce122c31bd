# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Quantization of tensors on a device, which torch computes, has the library's bits."""

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch is not installed")
from attn8 import device_quantization  # noqa: E402

GRANULARITIES = ("token", "tensor", "channel", "block", "block_channel")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that torch sees")


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def values(layout, tokens, dtype):
    """Small and large numbers, zeros, denormals, a NaN and an Inf."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, 3, 24, generator=generator) * 3 + 1
    if tokens > 2:
        x[1, : tokens // 2] = 0
        x[0, 1, 1] *= 1e-42
        x[0, -1, 2, 5] = float("nan")
        x[1, -1, 0, 3] = float("inf")
    x = x.to(dtype)
    return x if layout == "bshd" else x.transpose(1, 2)


def check(x, granularity, smooth, layout, device):
    wanted = attn8.quantize(x, granularity, block=64, smooth=smooth, layout=layout)
    axis = 1 if layout == "bshd" else 2
    mean = None if wanted.mean is None else wanted.mean.to(device)
    codes, scale, _ = device_quantization.quantize(x.to(device), granularity, 64, False, mean, axis)
    assert torch.equal(codes.cpu(), wanted.codes)
    assert scale.shape == wanted.scale.shape
    assert same(scale.cpu(), wanted.scale)
    back = device_quantization.dequantize(codes, scale, granularity, 64, mean, axis)
    assert same(back.cpu(), attn8.dequantize(wanted))
    if smooth:
        computed = device_quantization.quantize(x.to(device), granularity, 64, True, None, axis)[2]
        torch.testing.assert_close(computed.cpu(), wanted.mean, rtol=2**-22, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits(granularity, smooth, layout, dtype):
    for tokens in (0, 1, 70, 200):
        check(values(layout, tokens, dtype), granularity, smooth, layout, "cpu")


@gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_bits_on_cuda(granularity, layout):
    for tokens in (0, 1, 200):
        check(values(layout, tokens, torch.bfloat16), granularity, True, layout, "cuda")


@gpu
def test_public_functions_stay_on_cuda():
    x = torch.randn(2, 70, 3, 24, generator=torch.Generator().manual_seed(0)).half().cuda()
    quantized = attn8.quantize(x, smooth=True)
    assert all(y.is_cuda for y in (quantized.codes, quantized.scale, quantized.mean))
    out = torch.empty_like(x)
    assert attn8.dequantize(quantized, out=out) is out
    torch.testing.assert_close(out, x, rtol=0, atol=0.1)
    plain = attn8.quantize(x)
    out, lse = attn8.attention(plain, quantized, plain, return_lse=True)
    # The same codes, so that nothing but P is rounded.
    wanted, wanted_lse = attn8.attention(
        *(attn8.dequantize(y).cpu() for y in (plain, quantized, plain)),
        mode="exact", return_lse=True,
    )  # fmt: skip
    assert (out.cpu() - wanted).norm() < 0.02 * wanted.norm()
    torch.testing.assert_close(lse.cpu(), wanted_lse, rtol=0, atol=0.03)


def test_bad_arguments():
    x = torch.zeros(2, 4, 3, 8)
    with pytest.raises(TypeError, match=r"x.dtype: got torch.int32, want float32, float16 or"):
        device_quantization.quantize(x.int(), "token", 0, False, None, 1)
    for mean, error, message in (
        (
            torch.zeros(2, 1, 3, 7),
            ValueError,
            r"mean: got shape \(2, 1, 3, 7\), want \(2, 1, 3, 8\)",
        ),
        (torch.zeros(2, 1, 3, 8, device="meta"), ValueError, "mean: got a tensor on meta, want"),
        (torch.zeros(2, 1, 3, 8).double(), TypeError, "mean.dtype: got torch.float64, want"),
        ([0.0], ValueError, "mean: got a list, want a tensor on cpu, as x"),
    ):
        with pytest.raises(error, match=message):
            device_quantization.quantize(x, "token", 0, False, mean, 1)
