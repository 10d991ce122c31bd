# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""docs/numerics.md in float64 torch, apart from the library: what the kernels must produce."""

import math

import torch


def visible(seqlen_q, seqlen_k, causal, top_left, window, device):
    """[seqlen_q, seqlen_k] of whether query i sees key j."""
    p = torch.arange(seqlen_q, device=device)[:, None] + (0 if top_left else seqlen_k - seqlen_q)
    j = torch.arange(seqlen_k, device=device)[None, :]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if causal:
        mask &= j <= p
    if window[0] >= 0:
        mask &= j >= p - window[0]
    if window[1] >= 0:
        mask &= j <= p + window[1]
    return mask


def exact(q, k, v, mask):
    """softmax(q k^T / sqrt(head_dim)) v and its log-sum-exp, float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    s = s.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(s, -1)
    return torch.nan_to_num(torch.softmax(s, -1)) @ v, lse


def scale_of(amax):
    """Scale of a group from its largest magnitude."""
    scale = (amax / 127.0).view(torch.int32) & ~7
    scale = scale.view(torch.float32)
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def codes_of(x, scale):
    """Codes as floats."""
    return torch.round(x / scale)


def emulate(q, k, v, mask, *, mode, v_granularity, smooth_k, kv_block):
    """Codes and rounding of P as the mode defines them, everything else in float64.

    Returns out, lse and how far a float32 kernel may be from out: three roundings of a score t cost
    its weight 1e-6 + 2e-7 |t|, and codes within that of a rounding boundary may go either way.
    """
    group = q.shape[1] // k.shape[1]
    head_dim = q.shape[-1]
    device = q.device
    qf, kf, vf = (x.float() for x in (q, k, v))
    used = mask.any(0)
    mean = torch.zeros_like(kf[:, :, :1])
    if smooth_k and mode != "paper":
        mean = (k.double()[:, :, used].sum(2, keepdim=True) / used.sum()).float()
    kf = kf - mean
    sq = scale_of(qf.abs().amax(-1, keepdim=True))
    sk = scale_of(kf.abs().amax(-1, keepdim=True))
    qc, kc = codes_of(qf, sq).double(), codes_of(kf, sk).double()
    seqlen_k = k.shape[2]
    ratio = torch.ones(*k.shape[:3], device=device, dtype=torch.float64)
    if mode == "paper" or v_granularity == "tensor":
        sv = scale_of(vf[:, :, used].abs().amax((2, 3), keepdim=True))
        vc = codes_of(vf, sv)
    elif v_granularity == "channel":
        sv = scale_of(vf[:, :, used].abs().amax(2, keepdim=True))
        vc = codes_of(vf, sv)
    else:
        token = scale_of(vf.abs().amax(-1, keepdim=True))
        vc = codes_of(vf, token)
        zero = (vc == 0).all(-1)
        token = token.squeeze(-1)
        sv = torch.where(zero | ~used, 0, token).amax(-1)[..., None, None]
        sv = torch.where(sv == 0, 1, sv)
        r = token / sv.squeeze(-1)
        for begin in range(0, seqlen_k, kv_block):
            part = slice(begin, min(begin + kv_block, seqlen_k))
            block = torch.where(zero[..., part] | ~used[part], 0, r[..., part])
            largest = block.amax(-1, keepdim=True)
            largest = torch.where(largest == 0, 1, largest)
            r[..., part] = torch.where(zero[..., part], largest * 2.0**-20, r[..., part])
        ratio = r.clamp(min=2.0**-100).double()
    vc = vc.double()
    expand = lambda x: x.repeat_interleave(group, 1)  # noqa: E731
    kc, sk, vc, ratio = expand(kc), expand(sk), expand(vc), expand(ratio)
    c = sq.double() * torch.tensor(math.log2(math.e) / math.sqrt(head_dim)).float().double().item()
    levels = 127 if mode == "paper" else 255
    m = torch.full(q.shape[:3], -math.inf, device=device, dtype=torch.float64)
    total, code_total = torch.zeros_like(m), torch.zeros_like(m)
    out = torch.zeros(q.shape, device=device, dtype=torch.float64)
    bound = torch.zeros_like(out)
    for begin in range(0, seqlen_k, kv_block):
        part = slice(begin, min(begin + kv_block, seqlen_k))
        t = (qc @ kc[:, :, part].transpose(-1, -2)) * sk[:, :, part].double().transpose(-1, -2) * c
        t = t + torch.log2(ratio[:, :, None, part])
        t = t.masked_fill(~mask[:, part], -math.inf)
        m_block = t.amax(-1)
        m_new = torch.maximum(m, m_block)
        m_used = m_new if mode == "paper" else m_block
        w = torch.nan_to_num(torch.exp2(t - m_used[..., None]))
        a = torch.nan_to_num(torch.exp2(m - m_new))
        b = torch.nan_to_num(torch.exp2(m_used - m_new))
        codes = torch.round(levels * w)
        error = 1e-6 + 2e-7 * t.abs().masked_fill(~mask[:, part], 0)
        near = ((levels * w) % 1 - 0.5).abs() < levels * w * error
        part_v = vc[:, :, part]
        slack = (
            near.double() @ part_v.abs()
            + (codes * error) @ part_v.abs()
            + 2e-6 * (codes @ part_v).abs()
        )
        if mode == "paper":
            slack = slack + 127 * near.double().sum(-1, keepdim=True)
        out = a[..., None] * out + b[..., None] * (codes @ part_v)
        bound = a[..., None] * bound + b[..., None] * slack
        total = a * total + b * (w / ratio[:, :, None, part]).sum(-1)
        code_total = a * code_total + b * codes.sum(-1)
        m = m_new
    normalizer = code_total if mode == "paper" else levels * total
    normalizer = torch.where(normalizer == 0, 1, normalizer)[..., None]
    sv = expand(sv.double()) if sv.dim() == 4 else sv
    shift = (q.double() @ expand(mean).double().transpose(-1, -2)).squeeze(-1) / math.sqrt(head_dim)
    lse = torch.log(total) + m * math.log(2) + shift
    lse = torch.where(total == 0, -math.inf, lse)
    return out / normalizer * sv, lse, bound / normalizer * sv
