# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""An encoder of Transformers on attn8: embeddings of a padded batch.

A small model with random weights, so that it runs offline; with your own, load it instead::

    model = AutoModel.from_pretrained(path, attn_implementation="attn8")
"""

import attn8.transformers
import torch
from transformers import BertConfig, BertModel

attn8.transformers.register()

torch.manual_seed(0)
config = BertConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    vocab_size=1000,
)
model = BertModel(config).eval()
input_ids = torch.randint(0, 1000, (3, 50))
attention_mask = torch.ones_like(input_ids)
attention_mask[0, 30:] = attention_mask[2, 41:] = 0


def embed() -> torch.Tensor:
    """Return the mean of the hidden states of the tokens that are not padding."""
    with torch.no_grad():
        hidden = model(input_ids, attention_mask=attention_mask).last_hidden_state
    weights = attention_mask[..., None].float()
    return (hidden * weights).sum(1) / weights.sum(1)


wanted = embed()
model.set_attn_implementation("attn8")
cosine = torch.nn.functional.cosine_similarity(embed(), wanted)
print("cosine with torch's SDPA:", [f"{x:.6f}" for x in cosine.tolist()])
assert cosine.min() > 0.999
