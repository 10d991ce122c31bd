# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""The measures of captured tensors, on tensors built to have a known answer."""

import describe
import numpy as np
import pytest


def test_a_constructed_sink_is_described():
    seqlen, dim = 64, 8
    rng = np.random.default_rng(2)
    q = rng.normal(size=(1, seqlen, 2, dim)) + 3
    k = rng.normal(size=(1, seqlen, dim)) * 0.1
    v = rng.normal(size=(1, seqlen, dim))
    v /= np.linalg.norm(v, axis=2, keepdims=True)
    # Key 5 draws nearly all attention and has a value of a tenth of the others' length.
    k[0, 5], v[0, 5] = 4.0, v[0, 5] * 0.1
    facts = describe.facts_of_head("a", 0, q, k, v, 1.0, causal=True, rows=100)
    assert facts.top_key == 5
    assert facts.top_mass > 0.99
    assert facts.top_v_norm == pytest.approx(0.1)
    assert facts.v_norm_min == pytest.approx(0.1)
    assert facts.v_norm_max == pytest.approx(1.0)
    assert facts.low_v_mass == pytest.approx(facts.top_mass)
    assert facts.low_v_keys == pytest.approx(1 / seqlen)
    assert facts.first_mass < 0.01
    assert facts.effective_keys == pytest.approx(1.0, abs=0.1)
    assert facts.logit_max == pytest.approx(np.abs(q[0, 32:] @ k[0].T).max())


def test_equal_keys_are_read_equally_and_future_keys_not_at_all():
    seqlen = 32
    ones = np.ones((1, seqlen, 4))
    late = ones.copy()
    late[0, -1] = 9.0
    q = np.ones((1, 1, 1, 4))
    # Bottom right: the single query sees every key; two queries, the first all but the last.
    alone = describe.facts_of_head("a", 0, q, ones, ones, 1.0, causal=True, rows=8)
    assert alone.effective_keys == pytest.approx(seqlen)
    assert alone.first_mass == pytest.approx(1 / seqlen)
    assert alone.logit_gap == pytest.approx(0.0)
    assert alone.k_mean_energy == pytest.approx(1.0)
    two = describe.facts_of_head("a", 0, np.ones((1, 2, 1, 4)), late, ones, 1.0, True, rows=8)
    assert two.top_key == seqlen - 1
    assert two.top_mass == pytest.approx(0.5, abs=1e-6)


def test_k_with_one_offset_channel_is_described():
    rng = np.random.default_rng(3)
    k = rng.normal(size=(1, 4000, 8))
    k[0, :, 2] += 20.0
    q, v = np.zeros((1, 10, 1, 8)), rng.normal(size=(1, 4000, 8))
    facts = describe.facts_of_head("a", 0, q, k, v, 1.0, causal=False, rows=10)
    assert facts.k_mean_over_std == pytest.approx(20.0, rel=0.05)
    assert facts.k_mean_energy == pytest.approx(400 / 408, rel=0.01)
    assert facts.k_peak_over_rms == pytest.approx(20 / np.sqrt(408 / 8), rel=0.05)


def test_v_with_one_large_channel_is_described():
    v = np.random.default_rng(5).uniform(-1, 1, size=(1, 4000, 8))
    v[0, :, 3] *= 6
    q = np.zeros((1, 10, 1, 8))
    facts = describe.facts_of_head("a", 0, q, v, v, 1.0, causal=False, rows=10)
    assert facts.v_channel_spread == pytest.approx(6, rel=0.01)
