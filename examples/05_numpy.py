# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of NumPy arrays in eight bits, with K and V quantized once and read many times."""

import attn8
import numpy as np

rng = np.random.default_rng(0)
q = rng.standard_normal((1, 256, 8, 64), np.float32)  # [batch, seqlen_q, nheads_q, head_dim]
k = rng.standard_normal((1, 512, 2, 64), np.float32)  # [batch, seqlen_k, nheads_k, head_dim]
v = rng.standard_normal((1, 512, 2, 64), np.float32)

out, lse = attn8.attention(q, k, v, causal=True, return_lse=True)
exact, _ = attn8.reference.attention(q, k, v, causal=True)
error = attn8.reference.error_report(out, exact).rel_l2
print(f"relative L2 error of mode accurate: {100 * error:.2f} %")
assert error < 0.02

# The mean of K is taken out before quantizing: softmax does not see it, and the codes get finer.
k8, v8 = attn8.quantize(k, smooth=True), attn8.quantize(v)
print(f"K and V: {k.nbytes + v.nbytes} bytes as floats, {k8.nbytes + v8.nbytes} in INT8")
assert np.array_equal(attn8.attention(q, k8, v8, causal=True), out)

# Two halves of the keys, merged.
parts = [
    attn8.attention(q, k[:, keys], v[:, keys], return_lse=True)
    for keys in (slice(0, 256), slice(256, 512))
]
merged, _ = attn8.merge_states(*zip(*parts, strict=True))
whole = attn8.attention(q, k, v)
difference = attn8.reference.error_report(merged, whole).rel_l2
print(f"merged halves against the whole: {100 * difference:.2f} %")
assert difference < 0.02
