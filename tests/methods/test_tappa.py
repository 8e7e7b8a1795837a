"""TAPPA: similarity over time, exact bounds, predictability, profiles, labels, and the observer on hosts."""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headway
from headway.door.call import AttentionCall, Forward
from headway.errors import ArgumentError, NumericError
from headway.evidence.recipes.tappa import CLASSES, planted_head
from headway.hosts.tiny import tiny_host
from headway.kernels.dense import grouped_scores
from headway.kernels.rope import LAYOUTS, rope_frequencies, rotate
from headway.methods.long_context.tappa import (
    PatternObserver,
    RowSimilarity,
    Rules,
    adjacent_overlap,
    average_profiles,
    classify,
    diagonal_bound,
    dominant_pairs,
    host_frequencies,
    key_similarity,
    lag_bound,
    peak_lag,
    predictability,
    profile_call,
    query_similarity,
    row_autocorrelation,
    row_windows,
    site_frequencies,
    time_autocorrelation,
    vertical_bound,
)

FREQUENCIES = rope_frequencies(16, 1e4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call_of(
    tokens: int = 40, heads: int = 4, kv_heads: int = 2, batch: int = 1, seed: int = 0, **fields
) -> AttentionCall:
    """A causal call with rotary positions."""
    query, key = random(batch, heads, tokens, 16, seed=seed), random(batch, kv_heads, tokens, 16, seed=seed + 1)
    positions = torch.arange(tokens)
    query, key = (rotate(x, positions, FREQUENCIES).float() for x in (2 * query, key))
    return AttentionCall.from_tensors(query, key, key, **{"causal": True, **fields})


def profile(call: AttentionCall, **options):
    found = profile_call(call, **{"frequencies": FREQUENCIES, "max_lag": 8, **options})
    assert len(found) == 1
    return found[0]


def equal(first, second, **options) -> None:
    """Two profiles say the same of every head."""
    for name in ("vertical", "diagonal", "overlap", "returns", "autocorrelation", "query_autocorrelation"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-5, err_msg=name, **options)
    np.testing.assert_allclose(first.channel_shares, second.channel_shares, atol=1e-5)
    for pairs in ("all", "adjacent"):
        for stage in ("pre_rope", "post_rope"):
            for side in ("query_similarity", "key_similarity"):
                ours, theirs = (getattr(p, side).pick(pairs, stage) for p in (first, second))
                np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=f"{side} {pairs} {stage}")
    for name in ("vertical_bound", "diagonal_bound"):
        np.testing.assert_allclose(getattr(first, name).bound, getattr(second, name).bound, rtol=1e-4)
        np.testing.assert_allclose(getattr(first, name).change, getattr(second, name).change, rtol=1e-4)


@given(tokens=st.integers(2, 12), dim=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_similarity_equals_the_gram_matrix_and_stays_in_its_range(tokens, dim, seed):
    query = random(2, 3, tokens, dim, seed=seed)
    unit = query / query.norm(dim=-1, keepdim=True)
    gram = unit @ unit.transpose(-1, -2)
    expected = (gram.sum((-1, -2)) - tokens) / (tokens * (tokens - 1))
    found = query_similarity(query)
    assert torch.allclose(found, expected, atol=1e-12)
    assert bool((found >= -1 / (tokens - 1) - 1e-12).all())
    assert bool((found <= 1 + 1e-12).all())
    adjacent = torch.diagonal(gram, 1, -2, -1).mean(-1)
    assert torch.allclose(query_similarity(query, pairs="adjacent"), adjacent, atol=1e-12)


def test_the_lower_end_of_the_range_is_reached_by_opposite_queries():
    query = torch.tensor([[[[1.0], [-1.0]]]])
    assert float(query_similarity(query)) == -1


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_constant_queries_are_fully_alike(pairs):
    query = random(1, 2, 1, 8).expand(1, 2, 9, 8)
    assert torch.allclose(query_similarity(query, pairs=pairs), torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_lengths_of_queries_do_not_matter(pairs):
    query = random(1, 2, 9, 8)
    lengths = random(1, 2, 9, 1, seed=3).abs() + 0.1
    assert torch.allclose(query_similarity(lengths * query, pairs=pairs), query_similarity(query, pairs=pairs))


@given(offset=st.integers(1, 5000), layout=st.sampled_from(LAYOUTS), pairs=st.sampled_from(["all", "adjacent"]))
@settings(max_examples=20, deadline=None)
def test_similarity_before_rope_does_not_depend_on_where_the_text_starts(offset, layout, pairs):
    query = random(1, 2, 12, 16)
    options = {"pairs": pairs, "stage": "pre_rope", "frequencies": FREQUENCIES, "layout": layout}
    for start in (0, offset):
        positions = torch.arange(12) + start
        turned = rotate(query, positions, FREQUENCIES, layout)
        found = query_similarity(turned, positions=positions, **options)
        assert torch.allclose(found, query_similarity(query, pairs=pairs), atol=1e-9)


def test_constant_queries_after_rope_have_the_known_similarity_below_one():
    tokens = 30
    constant = random(1, 1, 1, 16).expand(1, 1, tokens, 16)
    energy = constant[0, 0, 0].unflatten(-1, (2, 8)).square().sum(0) / constant[0, 0, 0].square().sum()
    gaps = (torch.arange(tokens)[:, None] - torch.arange(tokens))[..., None]
    cosines = (energy * torch.cos(gaps * FREQUENCIES)).sum(-1)
    expected = (cosines.sum() - tokens) / (tokens * (tokens - 1))
    found = query_similarity(rotate(constant, torch.arange(tokens), FREQUENCIES))
    assert float(found) == pytest.approx(float(expected), abs=1e-12)
    assert float(found) < 1


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_fewer_than_two_tokens_have_similarity_zero(tokens, pairs):
    assert query_similarity(random(1, 2, tokens, 4), pairs=pairs).tolist() == [[0.0, 0.0]]


def test_a_window_keeps_the_last_tokens_without_padding():
    query = random(2, 1, 10, 4)
    valid = torch.tensor([[True] * 7 + [False] * 3, [False] * 2 + [True] * 8])
    found = query_similarity(query, window=4, valid=valid)
    assert float(found[0]) == pytest.approx(float(query_similarity(query[:1, :, 3:7])))
    assert float(found[1]) == pytest.approx(float(query_similarity(query[1:, :, 6:])))


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_padding_does_not_count(pairs):
    query = random(2, 2, 10, 4)
    valid = torch.tensor([[True] * 6 + [False] * 4, [False] * 3 + [True] * 7])
    found = query_similarity(query, pairs=pairs, valid=valid)
    assert torch.allclose(found[0], query_similarity(query[:1, :, :6], pairs=pairs)[0])
    assert torch.allclose(found[1], query_similarity(query[1:, :, 3:], pairs=pairs)[0])


def test_a_zero_query_is_like_nothing():
    query = torch.tensor([[[[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]]])
    assert float(query_similarity(query)) == pytest.approx(1 / 3)


def test_keys_are_measured_like_queries():
    key = random(1, 2, 9, 16)
    assert torch.equal(key_similarity(key, window=5), query_similarity(key, window=5))


def test_time_autocorrelation_equals_its_definition():
    x = random(2, 9, 4)
    unit = x / x.norm(dim=-1, keepdim=True)
    curve = time_autocorrelation(x, 10)
    for lag in range(9):
        assert torch.allclose(curve[:, lag], (unit[:, : 9 - lag] * unit[:, lag:]).sum(-1).mean(-1))
    assert bool(curve[:, 9:].isnan().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "every"}, "pairs: got 'every'"),
        ({"stage": "pre"}, "stage: got 'pre'"),
        ({"window": 0}, "window: got 0"),
        ({"valid": torch.ones(1, 4, dtype=torch.bool)}, "valid: got shape"),
        ({"stage": "pre_rope"}, "frequencies: got None"),
    ],
)
def test_bad_options_of_similarity_are_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        query_similarity(random(1, 2, 5, 4), **options)


def test_a_tensor_without_heads_is_refused():
    with pytest.raises(ArgumentError, match=r"query: got shape \(5, 4\)"):
        query_similarity(random(5, 4))


@st.composite
def sequences(draw):
    """Queries and keys before RoPE, their logits after it, and the frequencies."""
    pairs, rest = draw(st.integers(1, 8)), draw(st.integers(0, 3))
    layout, seed = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 9999))
    frequencies = rope_frequencies(2 * pairs, draw(st.sampled_from([10.0, 1e4, 1e6])))
    shape = (1, 4, draw(st.integers(2, 10)), 2 * pairs + rest)
    query = random(*shape, seed=seed)
    key = random(1, 2, draw(st.integers(2, 12)), shape[3], seed=seed + 1)
    if draw(st.booleans()):
        query, key = (x[:, :, :1] + draw(st.sampled_from([0.0, 0.01])) * x for x in (query, key))
    start = draw(st.integers(0, 3000))
    scores = grouped_scores(
        rotate(query, start + torch.arange(shape[2]), frequencies, layout),
        rotate(key, torch.arange(key.shape[2]), frequencies, layout),
    )
    return query, key, scores, frequencies, layout


def within(change: torch.Tensor, bound: torch.Tensor) -> bool:
    return bool((change.abs() <= bound * (1 + 1e-9) + 1e-9).all())


@given(case=sequences(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_change_of_a_logit_exceeds_its_bound(case, data):
    query, key, scores, frequencies, layout = case
    lag = data.draw(st.integers(1, query.shape[2] - 1))
    assert within(scores[:, :, 1:] - scores[:, :, :-1], vertical_bound(query, key, frequencies, layout=layout))
    assert within(scores[:, :, 1:, 1:] - scores[:, :, :-1, :-1], diagonal_bound(query, key, frequencies))
    assert within(scores[:, :, lag:] - scores[:, :, :-lag], lag_bound(query, key, frequencies, lag=lag, layout=layout))


def test_the_vertical_bound_is_reached_by_a_constant_query_in_one_pair():
    """One pair, equal queries, and a key along the chord that the query moves: nothing is lost in the inequality."""
    theta = torch.tensor([0.4], dtype=torch.float64)
    query = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64)
    chord = rotate(query, torch.arange(2), theta)[0, 0].diff(dim=0)
    key = chord[None, None] / chord.norm()
    scores = rotate(query, torch.arange(2), theta) @ key.transpose(-1, -2)
    assert float(scores.diff(dim=2)) == pytest.approx(float(vertical_bound(query, key, theta)))
    assert float(vertical_bound(query, key, theta)) == pytest.approx(2 * math.sin(0.2))


def test_the_lag_bound_vanishes_when_all_pairs_come_round():
    frequencies = 2 * math.pi * torch.tensor([1 / 4, 1 / 2], dtype=torch.float64)
    query = random(1, 1, 1, 4).expand(1, 1, 6, 4)
    assert float(lag_bound(query, random(1, 1, 5, 4), frequencies, lag=4).max()) < 1e-12
    assert float(lag_bound(query, random(1, 1, 5, 4), frequencies, lag=2).min()) > 0.01


def test_the_diagonal_bound_vanishes_for_constant_queries_and_keys():
    query = random(1, 1, 1, 4).expand(1, 1, 6, 4)
    assert float(diagonal_bound(query, query, rope_frequencies(4)).max()) == 0


@pytest.mark.parametrize("lag", [0, 5])
def test_a_lag_outside_the_rows_is_refused(lag):
    with pytest.raises(ArgumentError, match=f"lag: got {lag} with 5 query rows"):
        lag_bound(random(1, 1, 5, 4), random(1, 1, 5, 4), rope_frequencies(4), lag=lag)


@pytest.mark.parametrize("bound", [vertical_bound, diagonal_bound])
def test_bounds_are_refused_without_rope(bound):
    with pytest.raises(ArgumentError, match="without rotary positions"):
        bound(random(1, 1, 5, 4), random(1, 1, 5, 4), None)


def test_a_column_is_predicted_by_no_shift_and_a_diagonal_by_one():
    column = torch.zeros(6, 8)
    column[:, 2] = 1.0
    diagonal = torch.eye(8)[:6]
    assert float(predictability(column, 0)) == 1
    assert float(predictability(column, 1)) == 0
    assert float(predictability(diagonal, 0)) == 0
    assert float(predictability(diagonal, 1)) == 1
    assert float(adjacent_overlap(column)) == 1
    assert float(adjacent_overlap(diagonal)) == 0


def test_overlap_is_one_minus_the_total_variation():
    weights = torch.softmax(random(3, 5, 9), -1)
    variation = 0.5 * (weights[:, 1:] - weights[:, :-1]).abs().sum(-1).mean(-1)
    assert torch.allclose(adjacent_overlap(weights), 1 - variation)


def test_rows_without_mass_do_not_count():
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert float(predictability(weights)) == 1
    assert float(adjacent_overlap(weights)) == 1
    assert math.isnan(float(predictability(weights[:2])))


@pytest.mark.parametrize("block", [1, 3, 7, 20])
def test_blocks_of_rows_give_what_all_rows_give(block):
    weights = torch.softmax(random(20, 25).masked_fill(torch.ones(20, 25).triu(6).bool(), -torch.inf), -1)
    similarity = RowSimilarity(lags=9)
    for start in range(0, 20, block):
        rows = weights[start : start + block]
        similarity.update(rows[:, : 5 + start + rows.shape[0]])
    assert similarity.vertical == pytest.approx(float(predictability(weights, 0)))
    assert similarity.diagonal == pytest.approx(float(predictability(weights, 1)))
    assert similarity.overlap == pytest.approx(float(adjacent_overlap(weights)))
    unit = weights / weights.norm(dim=-1, keepdim=True)
    for lag in range(10):
        expected = (unit[lag:] * unit[: 20 - lag]).sum(-1).mean()
        assert float(similarity.returns[lag]) == pytest.approx(float(expected))


def test_a_gap_compares_no_rows_across_it():
    first, second = torch.eye(6)[:1].expand(3, 6), torch.eye(6)[1:2].expand(3, 6)
    similarity = RowSimilarity(lags=2)
    similarity.update(first)
    similarity.gap()
    similarity.update(second)
    assert similarity.vertical == 1
    assert similarity.overlap == 1


@pytest.mark.parametrize("period", [7, 12, 20])
def test_autocorrelation_of_a_wave_peaks_at_its_period(period):
    keys = torch.arange(400.0)
    logits = torch.cos(2 * math.pi * keys / period) + 0.3 * random(400).float()
    logits[0] = 50.0
    curve = row_autocorrelation(logits[None], 100)[0]
    assert peak_lag(curve.numpy()) == period


def test_autocorrelation_equals_its_definition_on_the_visible_keys():
    logits = random(2, 30)
    logits[0, 25:] = -torch.inf
    seen = logits[0, 4:25] - logits[0, 4:25].mean()
    expected = [float((seen[: 21 - s] * seen[s:]).sum() / seen.square().sum()) for s in range(6)]
    assert row_autocorrelation(logits, 5)[0].tolist() == pytest.approx(expected)


def test_short_and_constant_rows_have_no_autocorrelation():
    logits = torch.stack([torch.ones(30), random(30).float()])
    logits[1, 12:] = -torch.inf
    assert bool(row_autocorrelation(logits, 5).isnan().all())


def test_bad_weights_shift_and_lags_are_named():
    with pytest.raises(ArgumentError, match="weights: got shape"):
        predictability(torch.zeros(4))
    with pytest.raises(ArgumentError, match="shift: got 4 for 4 keys"):
        predictability(torch.zeros(3, 4), 4)
    with pytest.raises(ArgumentError, match="lags: got 0"):
        RowSimilarity(0)


def test_a_profile_says_what_the_full_weights_say():
    call = call_of(tokens=300)
    found, weights = profile(call, max_rows=None), call.weights()[0]
    np.testing.assert_allclose(found.vertical, predictability(weights, 0), atol=1e-5)
    np.testing.assert_allclose(found.diagonal, predictability(weights, 1), atol=1e-5)
    np.testing.assert_allclose(found.overlap, adjacent_overlap(weights), atol=1e-5)
    np.testing.assert_allclose(found.returns[:, 1], found.vertical, atol=1e-12)
    assert (found.tokens, found.rows, found.heads) == (300, 300, 4)


def test_a_profile_separates_before_and_after_rope():
    tokens = 60
    query = random(1, 1, 1, 16).expand(1, 1, tokens, 16)
    turned = rotate(query, torch.arange(tokens), FREQUENCIES).float()
    found = profile(AttentionCall.from_tensors(turned, turned, turned, causal=True)).query_similarity
    assert found.all_pre_rope[0] == pytest.approx(1, abs=1e-5)
    assert found.adjacent_pre_rope[0] == pytest.approx(1, abs=1e-5)
    assert found.all_post_rope[0] == pytest.approx(float(query_similarity(turned)), abs=1e-6)
    assert found.all_post_rope[0] < 0.9


def test_bounds_of_a_profile_are_those_of_the_functions_on_visible_pairs():
    call = call_of(tokens=30, heads=2, kv_heads=1)
    found = profile(call)
    query, key = random(1, 2, 30, 16) * 2, random(1, 1, 30, 16, seed=1)
    scores = grouped_scores(call.query, call.key)[0]
    seen = torch.ones(30, 30).tril().bool()
    vertical = vertical_bound(query, key, FREQUENCIES)[0]
    counted = seen[1:] & seen[:-1]
    np.testing.assert_allclose(found.vertical_bound.bound, vertical[:, counted].mean(-1) / 4, rtol=1e-4)
    change = (scores[:, 1:] - scores[:, :-1]).abs()
    np.testing.assert_allclose(found.vertical_bound.change, change[:, counted].mean(-1) / 4, rtol=1e-4)
    assert bool((found.vertical_bound.tightness <= 1).all())
    assert bool((found.diagonal_bound.tightness <= 1).all())


def test_sampled_windows_come_near_to_all_rows():
    call = call_of(tokens=1200, heads=2, kv_heads=1)
    sampled, every = profile(call, max_rows=512), profile(call, max_rows=None)
    assert sampled.rows == 512
    np.testing.assert_allclose(sampled.vertical, every.vertical, atol=0.06)
    np.testing.assert_allclose(sampled.overlap, every.overlap, atol=0.06)
    np.testing.assert_array_equal(sampled.query_similarity.all_pre_rope, every.query_similarity.all_pre_rope)


def test_no_more_than_a_block_of_rows_exists_at_once(monkeypatch):
    asked = []
    original = AttentionCall.logits

    def logits(self, rows=None):
        asked.append((self.query.shape[:2], rows.numel()))
        return original(self, rows)

    monkeypatch.setattr(AttentionCall, "logits", logits)
    profile(call_of(tokens=700, heads=2, kv_heads=1), max_rows=None)
    assert {shape for shape, _ in asked} == {(1, 1)}
    assert max(rows for _, rows in asked) == 256
    assert sum(rows for _, rows in asked) == 2 * 700


@given(total=st.integers(1, 5000), max_rows=st.integers(2, 2000))
@settings(max_examples=60, deadline=None)
def test_windows_lie_in_the_sequence_and_reach_its_end(total, max_rows):
    windows = row_windows(total, max_rows)
    assert sum(map(len, windows)) <= max(min(total, max_rows), 1)
    assert all(0 <= window.start < window.stop <= total for window in windows)
    assert windows[-1].stop == total
    assert all(first.stop <= second.start for first, second in pairwise(windows))


def test_heads_that_share_keys_are_profiled_as_if_each_had_its_own():
    call = call_of(tokens=50)
    shared = profile(call)
    own = call.key.repeat_interleave(2, 1)
    equal(shared, profile(AttentionCall.from_tensors(call.query, own, own, causal=True)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_row_by_row(side):
    """Two texts of 30 and 21 tokens in one padded batch say what each says alone."""
    full, short = call_of(tokens=30), call_of(tokens=21, seed=7)
    fill = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    query = torch.cat([full.query, torch.cat(order(short.query, fill[0]), 2)])
    key = torch.cat([full.key, torch.cat(order(short.key, fill[1]), 2)])
    padding = torch.ones(2, 30, dtype=torch.bool)
    padding[1, slice(0, 9) if side == "left" else slice(21, 30)] = False
    if side == "left":
        turn = torch.full((30,), 9)
        query[1], key[1] = rotate(query[1], turn, FREQUENCIES), rotate(key[1], turn, FREQUENCIES)
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    mask = causal & padding[:, None, None]
    call = AttentionCall.from_tensors(query, key, key, causal=True, mask=mask, forward=Forward(padding=padding))
    found = profile_call(call, frequencies=FREQUENCIES, max_lag=8)
    assert [p.tokens for p in found] == [30, 21]
    equal(found[0], profile(full))
    alone = profile(short)
    for name in ("vertical", "diagonal", "overlap", "returns", "autocorrelation"):
        np.testing.assert_allclose(getattr(found[1], name), getattr(alone, name), atol=1e-5, err_msg=name)
    for stage in ("pre_rope", "post_rope"):
        np.testing.assert_allclose(
            found[1].query_similarity.pick("all", stage), alone.query_similarity.pick("all", stage), atol=1e-5
        )
        np.testing.assert_allclose(
            found[1].key_similarity.pick("all", stage), alone.key_similarity.pick("all", stage), atol=1e-5
        )
    np.testing.assert_allclose(found[1].channel_shares, alone.channel_shares, atol=1e-5)
    np.testing.assert_allclose(found[1].vertical_bound.tightness, alone.vertical_bound.tightness, rtol=1e-4)


def test_a_row_of_nothing_but_padding_says_nothing():
    call = call_of(tokens=12, batch=2, forward=Forward(padding=torch.tensor([[True] * 12, [False] * 12])))
    empty = profile_call(call, frequencies=FREQUENCIES, max_lag=4)[1]
    assert empty.tokens == 0
    assert np.isnan(empty.vertical).all()
    assert (empty.query_similarity.all_pre_rope == 0).all()
    both = average_profiles(profile_call(call, frequencies=FREQUENCIES, max_lag=4))
    np.testing.assert_allclose(both.vertical, profile_call(call, frequencies=FREQUENCIES, max_lag=4)[0].vertical)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_few_tokens_make_a_profile(tokens):
    found = profile(call_of(tokens=tokens))
    assert found.tokens == tokens
    assert np.isnan(found.vertical).all() == (tokens == 1)
    if tokens == 1:
        assert (found.query_similarity.all_post_rope == 0).all()
        assert np.isnan(found.vertical_bound.tightness).all()


def test_without_rope_similarity_stands_and_periods_are_left_out():
    found = profile(call_of(), frequencies=None)
    np.testing.assert_array_equal(found.query_similarity.all_pre_rope, found.query_similarity.all_post_rope)
    assert np.isfinite(found.query_similarity.all_post_rope).all()
    assert np.isfinite(found.vertical).all()
    assert found.periods.size == 0
    assert np.isnan(found.vertical_bound.bound).all()
    labelled = classify([found])[0]
    assert (labelled.dominant_pair == -1).all()
    assert np.isnan(labelled.dominant_period).all()


def test_partly_rotated_heads_are_turned_back_in_their_rotated_part():
    frequencies = rope_frequencies(8, 1e4)
    query = random(1, 1, 1, 16).expand(1, 1, 40, 16)
    turned = rotate(query, torch.arange(40), frequencies, "interleaved").float()
    call = AttentionCall.from_tensors(turned, turned, turned, causal=True)
    found = profile(call, frequencies=frequencies, layout="interleaved")
    assert found.query_similarity.all_pre_rope[0] == pytest.approx(1, abs=1e-5)
    assert found.channel_shares.shape == (1, 4)
    wrong = profile(call, frequencies=frequencies, layout="half")
    assert wrong.query_similarity.all_pre_rope[0] < 0.99


def test_later_chunks_of_a_text_know_where_their_keys_stand():
    call = call_of(tokens=40)
    positions = torch.arange(25, 40)[None]
    chunk = call.replace(query=call.query[:, :, 25:], forward=Forward(positions=positions))
    found, weights = profile(chunk), call.weights(torch.arange(25, 40))[0]
    np.testing.assert_allclose(found.vertical, predictability(weights), atol=1e-5)
    pre = random(1, 4, 40, 16)[:, :, 25:]
    np.testing.assert_allclose(found.query_similarity.all_pre_rope, query_similarity(pre)[0], atol=1e-5)
    keys = random(1, 2, 40, 16, seed=1)
    expected = key_similarity(keys)[0].repeat_interleave(2)
    np.testing.assert_allclose(found.key_similarity.all_pre_rope, expected, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"causal": False},
        {"softcap": 2.0},
        {"sinks": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        {"bias": -0.1 * torch.arange(40.0).flip(0)[None, None, None]},
        {"mask": (torch.arange(40)[:, None] - torch.arange(40) < 12)[None, None]},
    ],
)
def test_every_kind_of_call_is_profiled_from_its_own_weights(fields):
    call = call_of(**fields)
    np.testing.assert_allclose(profile(call).vertical, predictability(call.weights()[0]), atol=1e-5)
    np.testing.assert_allclose(profile(call).overlap, adjacent_overlap(call.weights()[0]), atol=1e-5)


def test_queries_that_are_not_finite_are_refused():
    call = call_of()
    call.query[0, 0, 3, 2] = math.nan
    with pytest.raises(NumericError, match="query at"):
        profile(call)


@pytest.mark.parametrize("options", [{"max_rows": 1}, {"max_lag": 0}])
def test_bad_options_of_a_profile_are_named(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        profile(call_of(), **options)


def test_averages_weigh_texts_by_their_steps():
    first, second = profile(call_of(tokens=11)), profile(call_of(tokens=31, seed=5))
    both = average_profiles([first, second])
    np.testing.assert_allclose(both.vertical, (10 * first.vertical + 30 * second.vertical) / 40)
    assert (both.tokens, both.sequences) == (42, 2)
    with pytest.raises(ArgumentError, match="profiles: got none"):
        average_profiles([])


def planted(kinds, *, tokens: int = 256, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    frequencies = rope_frequencies(64, 1e4)
    heads = [planted_head(kind, generator, tokens=tokens) for kind in kinds]
    query, key = (torch.stack(side)[None] for side in zip(*heads, strict=True))
    turned = [rotate(x, torch.arange(tokens), frequencies) for x in (query, key)]
    call = AttentionCall.from_tensors(turned[0], turned[1], turned[1], causal=True)
    return profile_call(call, frequencies=frequencies)[0]


def test_planted_heads_get_their_class():
    kinds = [kind for kind in CLASSES for _ in range(3)]
    assert classify([planted(kinds)])[0].labels == kinds


def test_a_periodic_head_names_its_pair_and_period():
    found = classify([planted(["periodic"] * 3)], Rules(threshold=0.5))[0]
    assert (found.dominant_pair > 0).all()
    np.testing.assert_allclose(found.repeat_lag, found.dominant_period, atol=1)


def test_a_seasonal_head_returns_when_its_queries_return():
    found = classify([planted(["seasonal"] * 3)])[0]
    assert (found.return_lag == found.query_lag).all()
    assert (found.return_lag >= 12).all()


def test_retrieval_heads_are_the_unpredictable_ones():
    found = classify([planted(["retrieval", "re-access", "sequential"])], Rules(threshold=0.3))[0]
    assert found.predictable.tolist() == [False, True, True]


def test_the_threshold_is_one_percentile_for_the_whole_model():
    profiles = [planted(["retrieval"] * 2), planted(["re-access"] * 6, seed=1)]
    labelled = classify(profiles)
    values = np.concatenate([p.query_similarity.all_pre_rope for p in profiles])
    assert labelled[0].threshold == labelled[1].threshold == np.percentile(values, 25)
    assert [label for site in labelled for label in site.labels] == ["retrieval"] * 2 + ["re-access"] * 6
    everything = classify(profiles, Rules(threshold=1.01))
    assert {label for site in everything for label in site.labels} == {"retrieval"}


def test_uniform_attention_is_neither_vertical_nor_diagonal():
    zeros = torch.zeros(1, 2, 64, 16)
    found = profile(AttentionCall.from_tensors(zeros + 1, zeros, zeros, causal=True))
    np.testing.assert_allclose(found.vertical, found.diagonal, atol=1e-6)
    assert classify([found])[0].labels == ["mixed", "mixed"]


def test_a_pair_dominates_by_share_or_against_the_median():
    shares = np.array([[0.6, 0.2, 0.2], [0.4, 0.3, 0.3], [0.4, 0.1, 0.1], [np.nan] * 3])
    assert dominant_pairs(shares).tolist() == [0, -1, 0, -1]
    assert dominant_pairs(np.empty((2, 0))).tolist() == [-1, -1]


def test_the_first_of_equal_peaks_counts_and_flat_curves_have_none():
    lags = np.arange(60)
    assert peak_lag(np.cos(2 * np.pi * lags / 11)) == 11
    assert peak_lag(np.exp(-lags / 9)) == 0
    assert peak_lag(np.full(10, np.nan)) == 0
    assert peak_lag(np.where(lags < 30, np.cos(2 * np.pi * lags / 11), np.nan)) == 11


def test_bad_rules_and_nothing_to_classify_are_named():
    with pytest.raises(ArgumentError, match="percentile: got 120"):
        Rules(percentile=120)
    with pytest.raises(ArgumentError, match="strength: got 2"):
        Rules(strength=2)
    with pytest.raises(ArgumentError, match="profiles: got none"):
        classify([])
    with pytest.raises(ArgumentError, match="stage: got 'after'"):
        classify([planted(["mixed"])], Rules(stage="after"))
    with pytest.raises(ArgumentError, match="pairs: got 'some'"):
        classify([planted(["mixed"])], Rules(pairs="some"))


def raw_queries(model, inputs, name: str = "q_proj") -> list[torch.Tensor]:
    """What each attention module projects, before RoPE."""
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda m, i, o: found.append(o))
        for path, module in model.named_modules()
        if path.endswith(name)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("architecture", "layout"), [("llama", "half"), ("phi", "half"), ("glm", "interleaved"), ("cohere", "interleaved")]
)
def test_the_observer_recovers_what_the_host_projected(architecture, layout):
    model, inputs = tiny_host(architecture)
    observer = PatternObserver.of(model, max_lag=4)
    assert observer.layout == layout
    with headway.observe(model, observer), torch.no_grad():
        model(**inputs)
    profiles = observer.result()
    projected = raw_queries(model, inputs)
    assert len(profiles) == len(projected) > 0
    for found, raw in zip(profiles, projected, strict=True):
        query = raw.unflatten(-1, (found.heads, -1)).transpose(1, 2)
        expected = query_similarity(query).mean(0)
        np.testing.assert_allclose(found.query_similarity.all_pre_rope, expected, atol=1e-4)
        assert found.sequences == query.shape[0]


def test_a_fused_projection_needs_no_splitting_since_the_door_gives_queries():
    model, inputs = tiny_host("phi3")
    observer = PatternObserver.of(model, max_lag=4)
    with headway.observe(model, observer), torch.no_grad():
        model(**inputs)
    config = model.config
    width = config.hidden_size // config.num_attention_heads * config.num_attention_heads
    for found, raw in zip(observer.result(), raw_queries(model, inputs, "qkv_proj"), strict=True):
        query = raw[..., :width].unflatten(-1, (found.heads, -1)).transpose(1, 2)
        np.testing.assert_allclose(found.query_similarity.all_pre_rope, query_similarity(query).mean(0), atol=1e-4)


def test_layers_without_rotation_are_found_by_trying():
    model, _ = tiny_host("cohere2")
    frequencies, layout = site_frequencies(model)
    assert layout == "interleaved"
    kinds = dict(enumerate(model.config.layer_types))
    assert set(kinds.values()) == {"sliding_attention", "full_attention"}
    for name, found in frequencies.items():
        index = int(name.split(".")[2])
        assert (found is None) == (kinds[index] == "full_attention")


def test_layers_with_other_frequencies_get_their_own():
    model, _ = tiny_host("gemma3_text")
    frequencies, _ = site_frequencies(model)
    for name, found in frequencies.items():
        expected, _ = host_frequencies(model, int(name.split(".")[2]))
        assert torch.equal(found, expected)
    assert len({tuple(found.tolist()) for found in frequencies.values()}) == 2
    with pytest.raises(ArgumentError, match="layer: got None"):
        host_frequencies(model)
    with pytest.raises(ArgumentError, match="layer: got 99"):
        host_frequencies(model, 99)


def test_a_host_that_turns_the_other_way_is_understood():
    model, _ = tiny_host("nanochat")
    frequencies, _ = site_frequencies(model)
    inverse, _ = host_frequencies(model)
    assert all(torch.equal(found, -inverse) for found in frequencies.values())


def test_scaled_frequencies_are_those_of_the_host():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model, _ = tiny_host("llama", rope_parameters=rope)
    found, layout = host_frequencies(model)
    assert layout == "half"
    assert torch.allclose(found.double(), rope_frequencies(2 * found.numel(), 1e4) / 4, atol=1e-6)


def test_a_host_without_rotary_positions_has_no_frequencies():
    model, inputs = tiny_host("gpt2")
    assert host_frequencies(model) == (None, "half")
    observer = PatternObserver.of(model, max_lag=4)
    with headway.observe(model, observer), torch.no_grad():
        model(**inputs)
    assert all(p.periods.size == 0 and np.isfinite(p.query_similarity.all_pre_rope).all() for p in observer.result())


def test_smollm3_names_its_layers_without_rotation():
    model, _ = tiny_host("smollm3", no_rope_layers=[1, 0], num_hidden_layers=2)
    assert host_frequencies(model, 0)[0] is not None
    assert host_frequencies(model, 1)[0] is None


def test_latent_attention_is_left_out_with_a_warning(caplog):
    model, _ = tiny_host("deepseek_v3")
    with caplog.at_level(logging.WARNING):
        assert host_frequencies(model)[0] is None
    assert "periods are left out" in caplog.text


def test_the_observer_averages_forwards_and_starts_afresh():
    first, second = call_of(tokens=11), call_of(tokens=31, seed=5)
    observer = PatternObserver(frequencies=FREQUENCIES, max_lag=8)
    observer.start()
    observer.observe(first, first.value)
    observer.observe(second, second.value)
    equal(observer.result()[0], average_profiles([profile(first), profile(second)]))
    observer.start()
    assert observer.result() == []


def test_single_decoding_steps_add_nothing():
    call = call_of(tokens=12)
    observer = PatternObserver(frequencies=FREQUENCIES)
    observer.observe(call, call.value)
    observer.observe(call.replace(query=call.query[:, :, -1:]), call.value)
    assert observer.result()[0].sequences == 1


def test_frequencies_may_differ_by_site():
    rotated, plain = call_of(name="a"), call_of(name="b")
    observer = PatternObserver(frequencies={"a": FREQUENCIES, "b": None})
    observer.observe(rotated, rotated.value)
    observer.observe(plain, plain.value)
    first, second = observer.result()
    assert (first.periods.size, second.periods.size) == (8, 0)


def test_observing_changes_no_output():
    model, inputs = tiny_host("llama")
    with torch.no_grad():
        before = model(**inputs).logits
        with headway.observe(model, PatternObserver.of(model)):
            during = model(**inputs).logits
    assert torch.equal(before, during)
