# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Small random models of Transformers, what they are fed, and how they are run."""

import torch
import transformers

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
BATCH, TOKENS = 3, 50


def build(config, cls):
    torch.manual_seed(0)
    return cls(config).eval()


def llama():
    return build(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2), transformers.LlamaForCausalLM
    )


def mistral():
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16)
    return build(config, transformers.MistralForCausalLM)


def bert():
    return build(transformers.BertConfig(**SIZES), transformers.BertModel)


def modernbert():
    config = transformers.ModernBertConfig(
        **SIZES, local_attention=16, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return build(config, transformers.ModernBertModel)


def gemma2():
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=32, attn_logit_softcapping=5.0,
        query_pre_attn_scalar=1, sliding_window=16,
    )  # fmt: skip
    return build(config, transformers.Gemma2ForCausalLM)


def gpt_oss():
    # Both experts see every token: a choice between them would make small errors large.
    config = transformers.GptOssConfig(
        **SIZES, num_key_value_heads=2, head_dim=32, sliding_window=16, num_local_experts=2,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = build(config, transformers.GptOssForCausalLM)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    return model


def ids():
    return torch.randint(3, 100, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def padding(side):
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    if side == "left":
        mask[0, :10] = mask[2, :3] = 0
    elif side == "right":
        mask[0, 40:] = mask[2, 47:] = 0
    return mask


def forward(model, implementation, **inputs):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs)[0]


def distance(out, wanted):
    return float((out - wanted).norm() / wanted.norm())


def generate(model, implementation, **options):
    model.set_attn_implementation(implementation)
    out = model.generate(
        input_ids=ids(), attention_mask=padding("left"), do_sample=False, max_new_tokens=12,
        min_new_tokens=12, pad_token_id=0, **options,
    )  # fmt: skip
    return out[:, TOKENS:]


def steps(model, implementation, tokens, make_cache, mask=None):
    """Logits of ``tokens`` ``[BATCH, 8]`` after the masked prompt, fed one by one."""
    model.set_attn_implementation(implementation)
    cache = make_cache()
    mask = padding("left") if mask is None else mask
    found = []
    with torch.no_grad():
        model(ids(), attention_mask=mask, past_key_values=cache)
        for i in range(tokens.shape[1]):
            mask = torch.cat([mask, torch.ones(BATCH, 1, dtype=mask.dtype)], 1)
            piece = tokens[:, i : i + 1]
            found.append(model(piece, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(found, 1)
