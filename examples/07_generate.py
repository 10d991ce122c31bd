# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""A causal language model of Transformers on attn8, its KV cache in INT8.

A small model with random weights, so that it runs offline; with your own, load it instead::

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attn8")
"""

import attn8.transformers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

attn8.transformers.register()

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
)
model = LlamaForCausalLM(config).eval()
prompts = torch.randint(0, 1000, (2, 496))
attention_mask = torch.ones_like(prompts)
attention_mask[0, :200] = 0  # the first prompt is shorter: padded on the left

options = {"attention_mask": attention_mask, "max_new_tokens": 16, "do_sample": False}
wanted = model.generate(prompts, **options, pad_token_id=0)

model.set_attn_implementation("attn8")
cache = attn8.transformers.Int8Cache()
out = model.generate(prompts, **options, pad_token_id=0, past_key_values=cache)

same = float((out[:, 496:] == wanted[:, 496:]).float().mean())
print(f"generated tokens that are those of torch's SDPA: {100 * same:.0f} %")
held = cache.nbytes  # whole pages of 256 tokens
floats = 2 * 4 * cache.get_seq_length() * 2 * 2 * 64 * 4  # K, V; layers, batch, heads, dim, bytes
print(f"KV cache: {held} bytes in INT8, {floats} as float32")
assert out.shape == wanted.shape
assert held < 0.33 * floats
