"""Receiver heads: block means, vertical scores, kurtosis, and whether content or place draws attention."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis.thought_anchors import (
    ablate,
    kurtosis,
    layered_maps,
    mean_kurtosis,
    position_null,
    receiver_heads,
    receiver_scores,
    sentence_maps,
    split_half_reliability,
    vertical_scores,
)
from headway.methods.diagnosis.thought_anchors import receivers as module

SPANS = [(0, 4), (4, 9), (9, 12), (12, 16), (16, 21), (21, 26), (26, 29), (29, 34)]
COUNT = len(SPANS)


@pytest.fixture(scope="module")
def host():
    return tiny_host("llama", num_hidden_layers=3)[0]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(8, 60, (1, 34), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def maps(host, ids):
    return sentence_maps(host, ids, SPANS)


def full_maps(host, ids):
    import headway

    with torch.no_grad(), headway.capture(host, what=("weights",)) as handle:
        host(input_ids=ids, use_cache=False)
    found = handle.result()
    return np.stack([found[layer]["weights"][0].numpy() for layer in range(3)])


def test_streamed_block_means_are_those_of_the_whole_map(host, ids, maps):
    whole = full_maps(host, ids)
    for i, (first, last) in enumerate(SPANS):
        for j, (start, stop) in enumerate(SPANS[:i]):
            wanted = whole[..., first:last, start:stop].mean((-1, -2))
            np.testing.assert_allclose(maps[..., i, j], wanted, atol=1e-5)
    assert np.isnan(maps[..., 0, 1]).all()


def test_rows_covered_by_sentences_sum_to_one(maps):
    """Off the diagonal every pair is seen; of a sentence's own pairs (length + 1) / 2 for each row."""
    sizes = np.array([b - a for a, b in SPANS], dtype=float)
    weight = np.tril(np.tile(sizes, (COUNT, 1)), -1) + np.diag((sizes + 1) / 2)
    np.testing.assert_allclose(np.nansum(maps * weight, -1), 1, atol=1e-5)


def test_the_last_sentences_have_no_vertical_score(maps):
    found = vertical_scores(maps, proximity=3)
    assert np.isnan(found[..., -3:]).all()
    assert np.isfinite(found[..., :-3]).all()
    wanted = np.mean([maps[1, 2, i, 1] for i in range(4, COUNT)])
    assert found[1, 2, 1] == pytest.approx(wanted)


def test_depth_control_makes_a_row_ranks():
    plain = np.full((8, 8), np.nan)
    for i in range(8):
        plain[i, : i + 1] = np.arange(i + 1) + 1.0
    scaled = plain * np.linspace(1, 9, 8)[:, None]
    assert not np.allclose(vertical_scores(plain, proximity=2)[:6], vertical_scores(scaled, proximity=2)[:6])
    controlled = [vertical_scores(m, proximity=2, depth_control=True) for m in (plain, scaled)]
    np.testing.assert_allclose(*controlled)
    assert controlled[0][5] == pytest.approx(1.0)


@pytest.mark.parametrize("size", [3, 7, 20])
def test_the_kurtosis_of_one_spike_is_known(size):
    spike = np.zeros(size)
    spike[1] = 5.0
    assert kurtosis(spike) == pytest.approx((size**2 - 3 * size + 3) / (size - 1) - 3)


def test_missing_entries_are_left_out_of_the_kurtosis():
    spike = np.array([0.0, 5.0, 0.0, 0.0, np.nan, np.nan])
    assert kurtosis(spike) == pytest.approx(kurtosis(spike[:4]))


def test_a_head_that_looks_at_all_alike_has_no_kurtosis_and_never_ranks():
    scores = kurtosis(np.stack([np.full(6, 0.1), [0, 0, 1.0, 0, 0, 0]]))
    assert scores[0] == -np.inf
    table = np.stack([[5.0, 6.0], [scores[0], scores[1]], [-np.inf, 0.5]])
    assert receiver_heads(table, top=20) == [(1, 1), (2, 1)]
    assert receiver_heads(table, top=1, skip_layers=()) == [(0, 1)]


def test_traces_without_a_kurtosis_do_not_spoil_the_mean():
    found = mean_kurtosis([np.array([[1.0, -np.inf]]), np.array([[3.0, -np.inf]])])
    assert found.tolist() == [[2.0, -np.inf]]


def test_a_planted_receiver_head_is_found_and_names_its_sentence():
    random = np.random.default_rng(0)
    maps = random.uniform(0.01, 0.02, (3, 4, 20, 20))
    maps[2, 1, :, 5] = 0.5
    vertical = vertical_scores(maps)
    heads = receiver_heads(kurtosis(vertical), top=1)
    assert heads == [(2, 1)]
    assert np.nanargmax(receiver_scores(vertical, heads)) == 5


def test_reliability_is_high_where_heads_differ_and_low_where_they_do_not():
    random = np.random.default_rng(0)
    own = random.normal(size=(4, 6))
    reliable = split_half_reliability([own + 0.1 * random.normal(size=own.shape) for _ in range(8)])
    noise = split_half_reliability([random.normal(size=own.shape) for _ in range(8)])
    assert reliable.value > 0.95
    assert noise.low < 0 < noise.high
    with pytest.raises(ArgumentError, match="at least 2"):
        split_half_reliability([own])


def test_too_few_sentences_are_refused(maps):
    with pytest.raises(ArgumentError, match="too short"):
        vertical_scores(maps, proximity=5)


@pytest.mark.parametrize("wrong", [None, np.zeros((3, 4)), np.zeros(5)])
def test_maps_of_another_shape_are_refused(wrong):
    with pytest.raises(ArgumentError, match="sentence_maps"):
        vertical_scores(wrong)


def test_what_a_window_hides_is_not_neglect(ids):
    host = tiny_host("mistral", num_hidden_layers=2, sliding_window=8)[0]
    maps = sentence_maps(host, ids, SPANS)
    assert np.isnan(maps[:, :, 7, 0]).all()
    assert np.isfinite(maps[:, :, 7, 6]).all()
    assert np.isnan(vertical_scores(maps, proximity=4)[..., 0]).all()


def test_sentences_move_whole_and_gaps_stay(ids):
    spans = [(2, 4), (5, 9), (9, 12)]
    moved, places = module.reordered(ids, spans, [2, 0, 1])
    assert places == [(2, 5), (6, 8), (8, 12)]
    assert moved[0, 2:5].tolist() == ids[0, 9:12].tolist()
    assert moved[0, [0, 1, 5]].tolist() == ids[0, [0, 1, 4]].tolist()
    assert moved[0, 12:].tolist() == ids[0, 12:].tolist()


def test_the_null_of_places_says_what_any_sentence_draws_there(host, ids, maps):
    heads = [(1, 0), (2, 3)]
    null = position_null(host, ids, SPANS, heads, generator=np.random.default_rng(0), orders=5, proximity=3)
    assert null.draws.shape == (5, COUNT)
    assert np.isnan(null.draws[:, -3:]).all()
    observed = receiver_scores(vertical_scores(maps, proximity=3), heads)
    assert null.at(0, observed[0]).draws == 5
    assert null.at(COUNT - 1, observed[-1]) is None


def test_a_gate_at_the_head_changes_the_loss_and_one_changes_nothing(host, ids):
    found = ablate(host, ids, [(1, 0), (2, 1)], shape=(3, 4), draws=3)
    same = ablate(host, ids, [(1, 0), (2, 1)], shape=(3, 4), factor=1.0, draws=2)
    assert found.rise != 0
    assert len(found.controls) == 3
    assert same.rise == pytest.approx(0, abs=1e-5)


def test_a_head_of_which_nothing_is_known_has_no_kurtosis_and_says_nothing(ids):
    """A window that no far sentence is in leaves no vertical score at all."""
    host = tiny_host("mistral", num_hidden_layers=2, sliding_window=3)[0]
    vertical = vertical_scores(sentence_maps(host, ids, SPANS))
    assert np.isnan(vertical).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (kurtosis(vertical) == -np.inf).all()


@pytest.fixture(scope="module")
def hybrid():
    """A host whose first two layers mix without attention."""
    kinds = ["conv", "conv", "full_attention", "full_attention"]
    return tiny_host("lfm2", num_hidden_layers=4, layer_types=kinds)[0]


def test_rows_of_a_host_that_mixes_in_other_ways_too_know_their_layers(hybrid, ids):
    maps, layers = layered_maps(hybrid, ids, SPANS)
    assert layers == (2, 3)
    assert len(maps) == 2
    np.testing.assert_array_equal(maps, sentence_maps(hybrid, ids, SPANS))


def test_heads_are_gated_in_the_layer_of_their_row(hybrid, ids):
    from headway.methods.diagnosis.thought_anchors.ablation import gated_loss

    found = ablate(hybrid, ids, [(1, 0)], shape=(2, 4), layers=(2, 3), draws=3)
    assert found.gated == pytest.approx(gated_loss(hybrid, ids, [(3, 0)]), abs=1e-6)
    assert found.gated != pytest.approx(gated_loss(hybrid, ids, [(2, 0)]), abs=1e-6)
