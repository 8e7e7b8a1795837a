"""Recycled Attention: scores, chosen keys, the parallel form and the schedules, on tensors alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.methods.long_context.recycled_attention import (
    full_steps,
    has_drifted,
    ideal_speedup,
    key_scores,
    query_similarity,
    recovered_mass,
    recycled_mask,
    top_keys,
)


def random_weights(heads: int, rows: int, keys: int, seed: int = 0) -> torch.Tensor:
    """Causal rows that are the last of the keys; row 0 sees keys − rows + 1 of them."""
    logits = 2 * torch.randn(1, heads, rows, keys, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def test_the_heads_of_a_group_are_joined_by_their_largest_or_mean_weight():
    weights = torch.tensor([[[0.7, 0.1, 0.2], [0.1, 0.1, 0.8], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]])
    most = key_scores(weights.log(), 2, pool=1).exp()
    torch.testing.assert_close(most, torch.tensor([[[0.7, 0.1, 0.8], [0.4, 0.5, 0.3]]]).double(), atol=1e-6, rtol=0)
    mean = key_scores(weights.log(), 2, pool=1, group="mean").exp()
    torch.testing.assert_close(mean, torch.tensor([[[0.4, 0.1, 0.5], [0.3, 0.45, 0.25]]]).double(), atol=1e-6, rtol=0)


def test_one_head_to_a_group_is_its_own_score():
    weights = random_weights(3, 1, 9)[:, :, 0].log()
    for group in ("max", "mean"):
        torch.testing.assert_close(key_scores(weights, 3, pool=1, group=group), weights.double(), atol=1e-6, rtol=0)


def test_pooling_lifts_the_neighbours_of_a_peak_and_orders_them_by_their_own_weight():
    weights = torch.tensor([[[0.01, 0.03, 0.02, 0.60, 0.04, 0.04, 0.06, 0.20]]])
    scores = key_scores(weights.log(), 1, pool=3)
    assert scores.argsort(descending=True)[0, 0, :3].tolist() == [3, 4, 2]
    assert top_keys(key_scores(weights.log(), 1, pool=1), 3).tolist() == [[[3, 6, 7]]]
    assert top_keys(scores, 3).tolist() == [[[2, 3, 4]]]


def test_a_hidden_key_is_never_lifted_by_its_neighbours():
    weights = torch.tensor([[[-torch.inf, -0.1, -3.0, -4.0]]])
    assert key_scores(weights, 1, pool=3)[0, 0, 0] == -torch.inf


def test_weights_too_small_for_a_float_are_still_ordered():
    scores = key_scores(torch.tensor([[[0.0, -400.0, -300.0, -500.0]]]), 1, pool=1)
    assert top_keys(scores, 2).tolist() == [[[0, 2]]]


def test_top_keys_come_in_the_order_of_the_text_and_are_all_where_the_budget_is_large():
    scores = torch.tensor([[[1.0, 5.0, 3.0, 4.0]]])
    assert top_keys(scores, 2).tolist() == [[[1, 3]]]
    assert top_keys(scores, 9).tolist() == [[[0, 1, 2, 3]]]


def test_each_new_token_takes_the_place_of_the_lowest_score():
    mask = recycled_mask(torch.tensor([[[1.0, 5.0, 3.0, 4.0]]]), 2, 3)
    assert mask.int().tolist() == [[[[0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1]]]]


@settings(max_examples=60, deadline=None)
@given(
    keys=st.integers(1, 30), budget=st.integers(1, 40), steps=st.integers(0, 12), hidden=st.integers(0, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_recycled_set_never_exceeds_the_budget_and_holds_every_token_since(keys, budget, steps, hidden, seed):
    scores = torch.randn(2, 3, keys, generator=torch.Generator().manual_seed(seed)).double()
    scores[0, :, : min(hidden, keys - 1)] = -torch.inf
    if steps >= budget:
        with pytest.raises(ArgumentError, match="tokens since the full step must stay"):
            recycled_mask(scores, steps, budget)
        return
    mask = recycled_mask(scores, steps, budget)
    real = (scores > -torch.inf).sum(-1)
    for step in range(steps):
        assert bool((mask[:, :, step].sum(-1) == (real + step + 1).clamp(max=budget)).all())
        assert bool(mask[:, :, step, keys : keys + step + 1].all())
        assert not bool(mask[:, :, step, keys + step + 1 :].any())
    assert not bool((mask[..., :keys] & (scores == -torch.inf)[:, :, None]).any())
    if steps > 1:
        assert not bool((mask[:, :, 1:, :keys] & ~mask[:, :, :-1, :keys]).any())


def test_all_mass_is_recovered_where_the_budget_holds_every_key():
    weights = random_weights(4, 6, 20)
    torch.testing.assert_close(recovered_mass(weights, 2, 20), torch.ones(1, 4, 5))


def test_recovered_mass_is_that_of_the_chosen_keys_by_hand():
    weights = torch.tensor([[[[0.5, 0.1, 0.4, 0.0], [0.2, 0.3, 0.4, 0.1]]]])
    assert recovered_mass(weights, 1, 3, pool=1).item() == pytest.approx(0.2 + 0.4 + 0.1)


def test_steady_queries_are_recovered_and_drifting_ones_are_not():
    """64 clusters of 64 keys; a query reads one cluster, and changes to another after 8 steps."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=-1)
    keys = 6 * centres.repeat_interleave(64, 0) + 0.3 * torch.randn(4096, 32, generator=generator)
    queries = 2 * torch.cat([centres[5].expand(9, 32), centres[40].expand(7, 32)])
    weights = (queries @ keys.T).softmax(-1)
    weights = torch.cat([weights, torch.zeros(16, 15)], 1)
    mass = recovered_mass(weights[None, None], 1, 128, pool=1)[0, 0]
    assert float(mass[:8].min()) > 0.9
    assert float(mass[8:].max()) < 0.3


def test_similarity_is_the_mean_over_heads_of_the_cosine_of_each():
    reference = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])
    query = torch.tensor([[[[3.0, 0.0]], [[1.0, 0.0]]]])
    assert query_similarity(query, reference).tolist() == [0.5]


def test_a_threshold_of_one_always_asks_and_one_below_every_cosine_never_does():
    same = torch.randn(50, 3, 1, 64, generator=torch.Generator().manual_seed(0))
    assert bool(has_drifted(query_similarity(same, same), 1.0).all())
    assert bool(has_drifted(torch.tensor([1.0, 0.3, -1.0]), 1.0).all())
    assert not bool(has_drifted(torch.tensor([1.0, 0.3, -0.99]), -1.0).any())
    assert has_drifted(torch.tensor([0.81, 0.79]), 0.8).tolist() == [False, True]


@pytest.mark.parametrize(("steps", "stride"), [(10, 3), (9, 3), (1, 5), (7, 1), (0, 4)])
def test_full_steps_are_the_ceiling_or_the_floor_of_their_number(steps, stride):
    assert len(full_steps(steps, stride, first="full")) == -(-steps // stride)
    assert len(full_steps(steps, stride)) == steps // stride
    assert full_steps(10, 4, first="full") == [0, 4, 8]
    assert full_steps(10, 4) == [3, 7]


def test_the_ideal_speedup_is_one_for_stride_one_or_a_budget_of_everything():
    assert ideal_speedup(5000, 100, 1) == 1
    assert ideal_speedup(5000, 9000, 10) == 1
    assert ideal_speedup(32_000, 1000, 32) == pytest.approx(32 * 32_000 / (32_000 + 31 * 1000))


def test_bad_numbers_are_named():
    scores = torch.zeros(1, 2, 4)
    with pytest.raises(ArgumentError, match="pool: got 4"):
        key_scores(scores, 1, pool=4)
    with pytest.raises(ArgumentError, match="group"):
        key_scores(scores, 1, group="median")
    with pytest.raises(ArgumentError, match="kv_heads: got 3 for 2"):
        key_scores(scores, 3)
    with pytest.raises(ArgumentError, match="budget: got 0"):
        top_keys(scores, 0)
    with pytest.raises(ArgumentError, match="stride, first: got 0"):
        full_steps(4, 0)
    with pytest.raises(ArgumentError, match="tokens, budget, stride: got 0, 1, 1"):
        ideal_speedup(0, 1, 1)
