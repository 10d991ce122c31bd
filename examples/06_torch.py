# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 in PyTorch: tensors, torch.compile, and a module whose SDPA is answered by attn8."""

import attn8
import attn8.torch_ops
import torch

torch.manual_seed(0)
q = torch.randn(1, 8, 200, 64)  # [batch, nheads_q, seqlen_q, head_dim], as torch's SDPA has it
k, v = torch.randn(2, 1, 2, 200, 64).unbind()

out = attn8.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
sdpa = torch.nn.functional.scaled_dot_product_attention
wanted = sdpa(q, k, v, is_causal=True, enable_gqa=True)
error = float((out - wanted).norm() / wanted.norm())
print(f"against torch's SDPA: {100 * error:.2f} %")
assert error < 0.02


@torch.compile(fullgraph=True, backend="aot_eager")
def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention amid other operations: one graph."""
    return 2 * attn8.attention(q, k, v, layout="bhsd", causal=True)


assert torch.equal(block(q, k, v), 2 * out)

# Inside the block SDPA is attn8's; outside it is torch's own, and nothing was patched.
with attn8.torch_ops.route_sdpa() as calls:
    routed = sdpa(q, k, v, is_causal=True, enable_gqa=True)
assert torch.equal(routed, out)
assert not torch.equal(sdpa(q, k, v, is_causal=True, enable_gqa=True), out)
print(f"calls answered by attn8: {calls.routed}, left to torch: {calls.left}")
