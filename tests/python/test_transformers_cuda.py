# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 in Transformers with models on a CUDA device, against float attention on the CPU."""

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if not (torch.cuda.is_available() and attn8.info()["cuda"]["built"]):
    pytest.skip(
        "no CUDA device that torch sees, or attn8 built without CUDA", allow_module_level=True
    )
import attn8.transformers as integration  # noqa: E402
from small_models import (  # noqa: E402
    BATCH,
    TOKENS,
    bert,
    distance,
    forward,
    gemma2,
    gpt_oss,
    ids,
    llama,
    mistral,
    modernbert,
    padding,
)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    integration.register()
    integration.register("attn8-half", mode="half")


def on_cuda(model, implementation, dtype=torch.float32, **inputs):
    moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    return forward(model.to("cuda", dtype), implementation, **moved).float().cpu()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("make", [llama, mistral, bert, modernbert, gemma2, gpt_oss])
def test_forward(make, side):
    mask = padding(side)
    seen = mask.bool()
    wanted = forward(make(), "eager", input_ids=ids(), attention_mask=mask)[seen]
    bound = 0.05 if make is gemma2 else 0.02
    for name in ("attn8", "attn8-half"):
        out = on_cuda(make(), name, input_ids=ids(), attention_mask=mask)[seen]
        assert 0 < distance(out, wanted) < bound, name


def test_bfloat16():
    wanted = forward(llama(), "eager", input_ids=ids())
    out = on_cuda(llama(), "attn8", torch.bfloat16, input_ids=ids())
    assert 0 < distance(out, wanted) < 0.05


def test_masks_with_holes_and_of_four_dimensions():
    holes = padding("left")
    holes[1, 20] = holes[0, 15:18] = 0
    seen = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.5
    seen |= torch.eye(TOKENS, dtype=torch.bool)
    for mask, rows in ((holes, holes.bool()), (seen, ...)):
        wanted = forward(llama(), "sdpa", input_ids=ids(), attention_mask=mask)[rows]
        out = on_cuda(llama(), "attn8", input_ids=ids(), attention_mask=mask)[rows]
        assert 0 < distance(out, wanted) < 0.02


@pytest.mark.parametrize("make", [llama, mistral])
def test_a_prompt_in_pieces_is_the_whole_prompt(make):
    model, mask = make(), padding("left")
    wanted = forward(make(), "sdpa", input_ids=ids(), attention_mask=mask)
    cache = transformers.DynamicCache(config=model.config)
    for first, last in ((0, 20), (20, 21), (21, 50)):
        out = on_cuda(
            model, "attn8", input_ids=ids()[:, first:last], past_key_values=cache,
            attention_mask=mask[:, :last],
        )  # fmt: skip
        seen = mask[:, first:last].bool()
        assert distance(out[seen], wanted[:, first:last][seen]) < 0.02


def test_an_int8_cache_says_where_it_lives():
    with pytest.raises(attn8.UnsupportedError, match="key_states: got device cuda:0, want cpu"):
        on_cuda(llama(), "attn8", input_ids=ids(), past_key_values=integration.Int8Cache())
