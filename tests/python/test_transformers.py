# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8 in Transformers, on small random models, against their own SDPA."""

import copy
import gc
import json

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import attn8.transformers as integration  # noqa: E402
from attn8.policy import HeadPolicy  # noqa: E402

# In 4.57 encoders choose among their own attention classes and never ask for a registered one.
V5 = int(transformers.__version__.split(".")[0]) >= 5
ENCODER = pytest.mark.skipif(not V5, reason="encoders of transformers 4 take no attention function")

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
BATCH, TOKENS = 3, 50


@pytest.fixture(scope="module", autouse=True)
def _registered():
    integration.register()
    integration.register("attn8-exact", mode="exact")


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


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("make", [llama, mistral])
def test_int8_cache(make, side):
    model, mask = make(), padding(side)
    wanted = forward(model, "sdpa", input_ids=ids(), attention_mask=mask)
    cache = integration.Int8Cache()
    for first, last in ((0, 20), (20, 21), (21, 50)):
        out = forward(
            model, "attn8", input_ids=ids()[:, first:last], past_key_values=cache,
            attention_mask=mask[:, :last],
        )  # fmt: skip
        seen = mask[:, first:last].bool()
        assert distance(out[seen], wanted[:, first:last][seen]) < 0.02
    assert cache.get_seq_length() == TOKENS
    # Padding is not stored: rows of 40 to 50 tokens take the first page of each layer.
    usage = cache.pages.of(2, 32, 32).usage()
    assert (usage.sequences, usage.pages_used) == (2 * BATCH, 2 * BATCH)
    assert cache.nbytes == usage.bytes_used
    assert [row.length for row in cache.layers[0].rows] == mask.sum(1).tolist()
    for layer in cache.layers:
        assert layer.keys.dtype == layer.values.dtype == torch.int8
        assert layer.keys.shape == (BATCH, 2, TOKENS, 32)


def filled(tokens=10, batch=3):
    """A cache of one layer, what it holds in floats, and queries."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, batch, 2, tokens, 16, generator=generator).unbind()
    cache = integration.Int8Cache(max_bytes=1 << 20, page_size=64)
    cache.update(k, v, 0)
    return cache, k, v, torch.randn(batch, 4, 1, 16, generator=generator)


def attended(cache, q, ranges=None):
    out = cache.layers[0].attend(q, ranges, causal=False, window_size=(-1, -1))
    return out.transpose(1, 2)


def wanted_of(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_padding_is_not_stored():
    cache, k, v, q = filled()
    ranges = [(0, 10), (4, 10), (9, 10)]
    out = attended(cache, q, ranges)
    for i, (first, last) in enumerate(ranges):
        rows = slice(i, i + 1)
        wanted = wanted_of(q[rows], k[rows, :, first:last], v[rows, :, first:last])
        assert distance(out[rows], wanted) < 0.02
    assert [row.length for row in cache.layers[0].rows] == [10, 6, 1]


def test_a_mask_that_changes_its_mind():
    for first, then, message in (
        ([(0, 10), (4, 10), (0, 10)], [(0, 11)] * 3, "row 1 with a cache that holds 4 to 10"),
        ([(0, 10)] * 3, [(0, 11), (1, 11), (0, 11)], "row 1 with a cache that holds 0 to 10"),
        ([(0, 6), (0, 10), (0, 10)], [(0, 11)] * 3, "row 0 with a cache that holds 0 to 6"),
    ):
        cache, k, v, q = filled()
        attended(cache, q, first)
        cache.update(k[:, :, :1], v[:, :, :1], 0)
        with pytest.raises(attn8.UnsupportedError, match=f"attention_mask: got tokens .*{message}"):
            attended(cache, q, then)


def test_a_row_of_nothing_but_padding():
    cache, k, v, q = filled()
    out = attended(cache, q, [(0, 0), (0, 10), (0, 10)])
    assert not out[0].any()
    cache.update(k[:, :, :3], v[:, :, :3], 0)
    out = attended(cache, q, [(11, 13), (0, 13), (0, 13)])
    assert distance(out[:1], wanted_of(q[:1], k[:1, :, 1:3], v[:1, :, 1:3])) < 0.02


def generate(model, implementation, **options):
    model.set_attn_implementation(implementation)
    out = model.generate(
        input_ids=ids(), attention_mask=padding("left"), do_sample=False, max_new_tokens=12,
        min_new_tokens=12, pad_token_id=0, **options,
    )  # fmt: skip
    return out[:, TOKENS:]


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(make, num_beams):
    model = make()
    wanted = generate(model, "sdpa", num_beams=num_beams)
    assert torch.equal(generate(model, "attn8-exact", num_beams=num_beams), wanted)
    out = generate(model, "attn8", num_beams=num_beams, past_key_values=integration.Int8Cache())
    # A token may differ where two logits nearly tie, and all after it then.
    assert (out[:, :3] == wanted[:, :3]).float().mean() > 0.6


def test_cache_can_be_cut_and_rearranged():
    cache, k, v, q = filled()
    attended(cache, q)
    cache.crop(-4)
    assert cache.get_seq_length() == 6
    out = attended(cache, q)
    assert distance(out, wanted_of(q, k[:, :, :6], v[:, :, :6])) < 0.02
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert torch.equal(attended(cache, q[order]), out[order])
    # Beams share what they have in common: two pages until one of the last two writes.
    usage = cache.pages.of(2, 16, 16).usage()
    assert (usage.sequences, usage.pages_used) == (3, 2)
    cache.update(k[:, :, :1], v[:, :, :1], 0)
    attended(cache, q)
    assert cache.pages.of(2, 16, 16).usage().pages_used == 3
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert torch.equal(attended(cache, q[[0, 0]]), out[[0, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    cache.update(k, v, 0)
    assert distance(attended(cache, q), wanted_of(q, k, v)) < 0.02


def test_copies_of_a_cache_part_when_they_write():
    cache, k, v, q = filled()
    out = attended(cache, q)
    copied = copy.deepcopy(cache)
    assert copied.layers[0].keys.attn8_layer is copied.layers[0]
    assert cache.pages.of(2, 16, 16).usage().pages_used == 3
    cache.update(k[:, :, :2], v[:, :, :2], 0)
    assert not torch.equal(attended(cache, q), out)
    assert torch.equal(attended(copied, q), out)
    del cache
    gc.collect()
    assert copied.pages.of(2, 16, 16).usage().pages_used == 3
    assert torch.equal(attended(copied, q), out)


def test_a_cache_that_is_full():
    cache, _, _, q = filled()
    limit = cache.pages.of(2, 16, 16).usage()
    room = (limit.pages_free + limit.pages_used) * 64
    many = torch.zeros(3, 2, room, 16)
    cache.update(many, many, 0)
    with pytest.raises(MemoryError, match="pages"):
        attended(cache, q)


def test_cache_without_tokens():
    model = llama()
    cache = integration.Int8Cache()
    assert cache.get_seq_length() == 0
    empty = torch.zeros(1, 2, 0, 32)
    cache.update(empty, empty, 0)
    assert cache.get_seq_length() == 0
    cache.reset()
    forward(model, "attn8", input_ids=ids(), past_key_values=cache)
    assert cache.get_seq_length() == TOKENS


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


@pytest.mark.parametrize(
    "change", [{"softcap": 1.0}, {"s_aux": torch.tensor([0.0, 1.0, 2.0, 3.0])}]
)
def test_an_int8_cache_hands_score_changes_on(change):
    cache, k, v, q = filled()
    stand_ins = cache.layers[0].keys, cache.layers[0].values
    out, _ = integration._attention(torch.nn.Module(), q, *stand_ins, None, **change)
    plain, _ = integration._attention(torch.nn.Module(), q, *stand_ins, None)
    wanted, _ = integration._attention(torch.nn.Module(), q, k, v, None, mode="exact", **change)
    assert distance(out, wanted) < 0.02
    assert distance(plain, wanted) > 0.1


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
def test_score_changes_over_an_int8_cache(make):
    model = make()
    wanted = generate(model, "eager")
    out = generate(model, "attn8", past_key_values=integration.Int8Cache())
    assert (out == wanted).float().mean() > 0.6  # a tie of two logits changes the rest of a row
    tokens = ids()[:, :8]
    wanted = steps(model, "eager", tokens, lambda: transformers.DynamicCache(config=model.config))
    out = steps(model, "attn8", tokens, integration.Int8Cache)
    assert distance(out, wanted) < 0.03


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


def test_an_int8_cache_takes_masks_of_any_shape():
    holes = padding("left")
    holes[1, 20] = holes[0, 15:18] = 0
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=generator) < 0.5
    seen |= torch.eye(TOKENS, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    model = llama()
    for mask, rows in ((holes, holes.bool()), (seen, ...), (added, ...)):
        wanted = forward(model, "sdpa", input_ids=ids(), attention_mask=mask)[rows]
        cache = integration.Int8Cache()
        out = forward(model, "attn8", input_ids=ids(), attention_mask=mask, past_key_values=cache)
        assert 0 < distance(out[rows], wanted) < 0.02


def test_an_int8_cache_decodes_over_holes():
    holes, tokens, model = padding("left"), ids()[:, :8], llama()
    holes[1, 20] = holes[0, 15:18] = 0
    wanted = steps(model, "sdpa", tokens, transformers.DynamicCache, holes)
    assert distance(steps(model, "attn8", tokens, integration.Int8Cache, holes), wanted) < 0.02
    plain = steps(model, "sdpa", tokens, transformers.DynamicCache, padding("left"))
    assert distance(plain, wanted) > 0.03  # the holes are felt


def test_values_of_another_head_dim():
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(3, 2, 10, 16, generator=generator)
    v = torch.randn(3, 2, 10, 24, generator=generator)
    q = torch.randn(3, 4, 1, 16, generator=generator)
    for ranges in (None, [(0, 10), (4, 10), (9, 10)]):
        cache = integration.Int8Cache(max_bytes=1 << 20, page_size=64)
        keys, values = cache.update(k, v, 0)
        assert (keys.shape, values.shape) == (k.shape, v.shape)
        out = attended(cache, q, ranges)
        for i, (first, last) in enumerate(ranges or [(0, 10)] * 3):
            rows = slice(i, i + 1)
            wanted = wanted_of(q[rows], k[rows, :, first:last], v[rows, :, first:last])
            assert distance(out[rows], wanted) < 0.03


def test_training_is_refused():
    model = llama()
    model.set_attn_implementation("attn8")
    with pytest.raises(ValueError, match="q: got a tensor that requires grad"):
        model(input_ids=ids())


def test_int8_cache_with_another_implementation_does_not_go_unseen():
    with pytest.raises((RuntimeError, ValueError)):
        forward(llama(), "sdpa", input_ids=ids(), past_key_values=integration.Int8Cache())


def test_codes_without_a_cache():
    codes = torch.zeros(1, 2, 4, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="key: got int8 codes that belong to no Int8Cache"):
        integration._attention(torch.nn.Module(), torch.zeros(1, 2, 4, 8), codes, codes, None)


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
