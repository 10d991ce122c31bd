# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 in Transformers, on small random models, against their own SDPA."""

import json

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import attn8.transformers as integration  # noqa: E402
from attn8.policy import HeadPolicy  # noqa: E402
from small_models import (  # noqa: E402
    BATCH,
    TOKENS,
    bert,
    distance,
    forward,
    gemma2,
    generate,
    gpt_oss,
    ids,
    llama,
    mistral,
    modernbert,
    padding,
)

# In 4.57 encoders choose among their own attention classes and never ask for a registered one.
V5 = int(transformers.__version__.split(".")[0]) >= 5
ENCODER = pytest.mark.skipif(not V5, reason="encoders of transformers 4 take no attention function")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    integration.register()
    integration.register("attn8-exact", mode="exact")


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    "make",
    [llama, mistral, pytest.param(bert, marks=ENCODER), pytest.param(modernbert, marks=ENCODER)],
)
def test_forward(make, side):
    model, mask = make(), padding(side)
    seen = mask.bool()
    wanted = forward(model, "sdpa", input_ids=ids(), attention_mask=mask)[seen]
    # exact: the same numbers as SDPA in other order of sums; a mask that went wrong shows.
    out = forward(model, "attn8-exact", input_ids=ids(), attention_mask=mask)[seen]
    assert distance(out, wanted) < 1e-5
    out = forward(model, "attn8", input_ids=ids(), attention_mask=mask)[seen]
    assert 0 < distance(out, wanted) < 0.02


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("make", [llama, mistral])
def test_a_prompt_in_pieces_is_the_whole_prompt(make, side):
    model, mask = make(), padding(side)
    wanted = forward(model, "sdpa", input_ids=ids(), attention_mask=mask)
    for implementation, bound in (("attn8-exact", 1e-5), ("attn8", 0.02)):
        cache = transformers.DynamicCache(config=model.config)
        for first, last in ((0, 20), (20, 21), (21, 50)):
            out = forward(
                model, implementation, input_ids=ids()[:, first:last], past_key_values=cache,
                attention_mask=mask[:, :last],
            )  # fmt: skip
            seen = mask[:, first:last].bool()
            assert distance(out[seen], wanted[:, first:last][seen]) < bound


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(make, num_beams):
    model = make()
    wanted = generate(model, "sdpa", num_beams=num_beams)
    assert torch.equal(generate(model, "attn8-exact", num_beams=num_beams), wanted)
    out = generate(model, "attn8", num_beams=num_beams, past_key_values=integration.Int8Cache())
    # A token may differ where two logits nearly tie, and all after it then.
    assert (out[:, :3] == wanted[:, :3]).float().mean() > 0.6


# Masks that are not padding, and scores that models change.


def agree(model, bound=0.02, reference="sdpa", **inputs):
    inputs = {"input_ids": ids(), **inputs}
    seen = inputs.get("attention_mask", torch.ones(BATCH, TOKENS))
    seen = seen.bool() if seen.ndim == 2 else torch.ones(BATCH, TOKENS, dtype=torch.bool)
    wanted = forward(model, reference, **inputs)[seen]
    assert distance(forward(model, "attn8-exact", **inputs)[seen], wanted) < 2e-5
    assert 0 < distance(forward(model, "attn8", **inputs)[seen], wanted) < bound


@pytest.mark.parametrize("make", [llama, mistral])
def test_padding_with_holes(make):
    holes = padding("left")
    holes[1, 20] = holes[0, 15:18] = 0
    agree(make(), attention_mask=holes)


def test_masks_of_four_dimensions():
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=generator) < 0.5
    seen |= torch.eye(TOKENS, dtype=torch.bool)
    agree(llama(), attention_mask=seen)
    agree(llama(), attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min))


def test_packed_sequences():
    positions = torch.arange(TOKENS) % 25
    agree(llama(), position_ids=positions.expand(BATCH, -1), use_cache=False)


def test_chunked_attention():
    from transformers.masking_utils import chunked_causal_mask_function

    starts = torch.zeros(1, dtype=torch.long)
    mask = integration._mask(
        **({"q_length": 50, "q_offset": 0} if V5 else {"cache_position": torch.arange(50)}),
        batch_size=1, kv_length=50, kv_offset=0,
        mask_function=chunked_causal_mask_function(8, starts),
    )  # fmt: skip
    i, j = torch.arange(50)[:, None], torch.arange(50)
    assert torch.equal(mask[0, 0], (j <= i) & (j // 8 == i // 8))


def test_a_cache_with_room_to_spare():
    model = llama()
    wanted = generate(model, "sdpa", cache_implementation="static")
    out = generate(model, "attn8-exact", cache_implementation="static")
    assert torch.equal(out, wanted)


def test_softcap():
    model = gemma2()
    agree(model, 0.05, reference="eager", attention_mask=padding("left"))
    uncapped = gemma2()
    for layer in uncapped.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    out, plain = (forward(m, "attn8-exact", input_ids=ids()) for m in (model, uncapped))
    assert distance(plain, out) > 1e-4  # the cap is felt


def test_attention_sinks():
    agree(gpt_oss(), reference="eager", attention_mask=padding("left"))


def test_policy(tmp_path):
    path = tmp_path / "policy.json"
    heads = [{"layer": n, "kv_head": 0, "mode": "exact"} for n in range(2)]
    known = {"format": "attn8-head-policy", "version": 1, "default": "accurate"}
    path.write_text(json.dumps({**known, "heads": heads}))
    integration.register("attn8-policy", policy=path)
    model = llama()
    wanted = forward(model, "sdpa", input_ids=ids())
    plain, some = (forward(model, name, input_ids=ids()) for name in ("attn8", "attn8-policy"))
    assert 0 < distance(some, wanted) < 0.9 * distance(plain, wanted)
    heads += [{"layer": n, "kv_head": 1, "mode": "exact"} for n in range(2)]
    path.write_text(json.dumps({**known, "heads": heads}))
    assert torch.equal(forward(model, "attn8-policy", input_ids=ids()), some)  # read once
    integration.register("attn8-policy", policy=path)
    assert distance(forward(model, "attn8-policy", input_ids=ids()), wanted) < 1e-5
    with pytest.raises(ValueError, match="mode: got 'half' with a policy, want accurate"):
        integration.register("attn8-policy", mode="half", policy=path)
    x = torch.zeros(1, 2, 4, 8)
    function = integration.attention_function(policy=HeadPolicy(path))
    with pytest.raises(attn8.UnsupportedError, match="policy: got Module without layer_idx"):
        function(torch.nn.Module(), x, x, x, None)
    cached, plain = (
        forward(model, name, input_ids=ids(), past_key_values=integration.Int8Cache())
        for name in ("attn8-policy", "attn8")
    )
    assert 0 < distance(cached, wanted) < 0.95 * distance(plain, wanted)  # P is not rounded


# What cannot be honoured.


def refused(match, *, make=llama, error=None, implementation="attn8", **inputs):
    with pytest.raises(error or attn8.UnsupportedError, match=match):
        forward(make(), implementation, **{"input_ids": ids(), **inputs})


def test_position_bias_is_refused():
    x = torch.zeros(1, 2, 4, 8)
    for name in ("position_bias", "cu_seq_lens_q"):
        with pytest.raises(attn8.UnsupportedError, match=f"{name}: got Tensor, want None"):
            integration._attention(torch.nn.Module(), x, x, x, None, **{name: torch.zeros(2)})


def test_training_is_refused():
    model = llama()
    model.set_attn_implementation("attn8")
    with pytest.raises(ValueError, match="q: got a tensor that requires grad"):
        model(input_ids=ids())


def test_rotation_is_a_choice():
    model = llama()
    integration.register("attn8-plain", rotate=False)
    wanted = forward(model, "sdpa", input_ids=ids())
    rotated, plain = (forward(model, n, input_ids=ids()) for n in ("attn8", "attn8-plain"))
    assert not torch.equal(rotated, plain)
    assert distance(plain, wanted) < 0.02
    outs = []
    for rotate in (True, False):
        cache = integration.Int8Cache(rotate=rotate)
        outs.append(forward(model, "attn8", input_ids=ids(), past_key_values=cache))
        assert distance(outs[-1], wanted) < 0.02
    assert not torch.equal(*outs)


def test_register_checks_its_arguments():
    with pytest.raises(TypeError, match="rotate: got int, want a bool"):
        integration.register(rotate=1)
    with pytest.raises(TypeError, match="rotate: got int, want a bool"):
        integration.Int8Cache(rotate=1)
    with pytest.raises(ValueError, match="mode: got 'best', want accurate"):
        integration.register(mode="best")
    with pytest.raises(TypeError, match="name: got ''"):
        integration.register("")
