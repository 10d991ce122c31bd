# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""attn8.transformers.Int8Cache: by itself, and under small random models."""

import copy
import gc

import pytest

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")
torch = pytest.importorskip("torch", reason="torch (CPU) is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import attn8.transformers as integration  # noqa: E402
from small_models import (  # noqa: E402
    BATCH,
    TOKENS,
    distance,
    forward,
    gemma2,
    generate,
    gpt_oss,
    ids,
    llama,
    mistral,
    padding,
    steps,
)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    integration.register()


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


def test_int8_cache_with_another_implementation_does_not_go_unseen():
    with pytest.raises((RuntimeError, ValueError)):
        forward(llama(), "sdpa", input_ids=ids(), past_key_values=integration.Int8Cache())


def test_codes_without_a_cache():
    codes = torch.zeros(1, 2, 4, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="key: got int8 codes that belong to no Int8Cache"):
        integration._attention(torch.nn.Module(), torch.zeros(1, 2, 4, 8), codes, codes, None)
