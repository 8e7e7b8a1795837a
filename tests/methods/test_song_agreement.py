"""How alike two rankings are: hand examples, scipy, planted orders, and the table with its ceilings and controls."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.methods.song_hosts import example

from headway.errors import ArgumentError, NumericError
from headway.methods.diagnosis.song_of_disagreement import (
    MEASURES,
    agreement_table,
    ap_correlation,
    chance_interval,
    disattenuated,
    frequency_scores,
    items_of,
    kendall,
    measure_named,
    near_tie_share,
    non_zero_k,
    overlap,
    pair_agreement,
    position_scores,
    random_scores,
    rank_biased_overlap,
    top_k_kendall,
    weighted_kendall,
)
from headway.methods.diagnosis.song_of_disagreement.agreement import resolve_k, top_items
from headway.methods.diagnosis.song_of_disagreement.table import mean_off_diagonal
from headway.statistics import auroc

VECTORS = st.lists(st.integers(0, 6), min_size=3, max_size=12).filter(lambda values: len(set(values)) > 1)
PAIRS = st.integers(3, 10).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n).filter(lambda v: len(set(v)) > 1)] * 2)
)
NAMES = [*MEASURES, "top-3", "top-50%"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(values=VECTORS)
def test_a_list_agrees_wholly_with_itself(name, values):
    assert measure_named(name)(values, values) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["kendall", "spearman", "pearson", "weighted", "ap", "top-1", "top-4", "top-100%"])
def test_a_reversed_order_without_ties_is_minus_one(name):
    values = np.random.default_rng(0).permutation(9).astype(float)
    assert measure_named(name)(values, -values) == pytest.approx(-1.0)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(pair=PAIRS)
def test_agreement_is_symmetric(name, pair):
    measure = measure_named(name)
    assert measure(*pair) == pytest.approx(measure(*pair[::-1]), abs=1e-9)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "pearson"])
@settings(max_examples=40, deadline=None)
@given(pair=PAIRS)
def test_only_the_order_counts(name, pair):
    measure = measure_named(name)
    assert measure(*pair) == pytest.approx(measure(np.exp(pair[0]), np.array(pair[1]) ** 3.0), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(pair=PAIRS)
def test_tau_is_scipys_with_ties(pair):
    assert kendall(*pair) == pytest.approx(stats.kendalltau(*pair).statistic)
    assert measure_named("spearman")(*pair) == pytest.approx(stats.spearmanr(*pair).statistic)
    assert weighted_kendall(*pair) == pytest.approx(stats.weightedtau(*pair).statistic)


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_side_without_an_order_has_no_correlation(name):
    assert math.isnan(measure_named(name)([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(measure_named(name)([1.0], [2.0]))


@pytest.mark.parametrize(
    ("k", "expected"), [(7, 1 - 2 * 13 / 21), (3, 1 - 2 * 13 / 21), (2, 1 - 2 * 10 / 13), (1, -1.0)]
)
def test_top_k_by_hand(k, expected):
    x, y = [1, 2, 3, 1, 1, 2, 2], [3, 2, 1, 2, 1, 2, 1]
    assert top_k_kendall(x, y, k) == pytest.approx(expected)


def test_top_n_without_ties_is_tau():
    random = np.random.default_rng(1)
    for _ in range(20):
        x, y = random.permutation(8), random.permutation(8)
        assert top_k_kendall(x, y, 8) == pytest.approx(kendall(x, y))


@pytest.mark.parametrize("k", range(1, 8))
def test_identical_and_reversed_lists_for_every_k(k):
    values = np.random.default_rng(2).permutation(7)
    assert top_k_kendall(values, values, k) == 1.0
    assert top_k_kendall(values, -values, k) == -1.0


def test_what_stands_below_both_tops_does_not_count():
    random = np.random.default_rng(3)
    top = [9.0, 8.0, 7.0]
    one, other = ([*top, *random.random(20)] for _ in range(2))
    assert top_k_kendall(one, other, 3) == 1.0
    assert kendall(one, other) < 0.7


def test_ties_at_the_border_of_the_top_are_all_in():
    assert top_items([3, 2, 2, 1], 2).tolist() == [True, True, True, False]


def test_ap_correlation_looks_at_the_top():
    best = np.arange(10.0)[::-1]
    swapped_top, swapped_end = best.copy(), best.copy()
    swapped_top[[0, 1]] = swapped_top[[1, 0]]
    swapped_end[[8, 9]] = swapped_end[[9, 8]]
    assert kendall(best, swapped_top) == kendall(best, swapped_end)
    assert ap_correlation(best, swapped_top) < ap_correlation(best, swapped_end)
    # Yilmaz et al. 2008 without ties: τ_AP = 2 / (n − 1) Σ_{i ≥ 2} C(i) / (i − 1) − 1, here 1 − 2 / 9 by one side.
    assert ap_correlation(best, swapped_top) == pytest.approx(1 - 2 / 9)


def test_overlap_counts_a_tie_by_its_chance():
    assert overlap([3, 2, 1, 0], [3, 2, 0, 1], 2) == 1.0
    assert overlap([3, 2, 1, 0], [0, 1, 2, 3], 2) == 0.0
    assert overlap([3, 2, 1, 0], [3, 1, 1, 0], 2) == pytest.approx(1.5 / 2.5)


def test_rank_biased_overlap_of_orders_that_meet_late():
    one, other = [4, 3, 2, 1], [1, 2, 3, 4]
    p = 0.5
    shares = [0, 0, 2 / 3, 1]
    expected = (1 - p) * sum(p**d * a for d, a in enumerate(shares)) + p**4
    assert rank_biased_overlap(one, other, persistence=p) == pytest.approx(expected)


def test_sizes_of_a_top():
    assert resolve_k(0.25, 8) == 2
    assert resolve_k(5, 3) == 3
    assert resolve_k(0.01, 8) == 1
    assert non_zero_k([np.array([0, 1.0, 2]), np.array([1.0, 1, 1])]) == 2


@pytest.mark.parametrize("name", ["tau", "top-", "top-0", "top-x", "top-120%", "overlap-1.5", "kendall-3"])
def test_an_unknown_measure_is_refused(name):
    with pytest.raises(ArgumentError, match="measure: got"):
        measure_named(name)


def test_bad_vectors_are_refused():
    with pytest.raises(ArgumentError, match="one length"):
        kendall([1, 2], [1, 2, 3])
    with pytest.raises(ArgumentError, match="one length"):
        kendall([], [])
    with pytest.raises(NumericError, match="NaN"):
        kendall([1, math.nan], [1, 2])
    with pytest.raises(ArgumentError, match="k: got 0"):
        top_k_kendall([1, 2], [1, 2], 0)
    with pytest.raises(ArgumentError, match="penalty"):
        top_k_kendall([1, 2], [1, 2], 1, penalty=2)
    with pytest.raises(ArgumentError, match="persistence"):
        rank_biased_overlap([1, 2], [1, 2], persistence=1.0)
    with pytest.raises(ArgumentError, match="non-zero"):
        non_zero_k([np.zeros(3)])


def test_the_paper_in_one_planted_case():
    """Two methods put the three tokens that decide on top and order the rest at random: both are right, τ is low."""
    random = np.random.default_rng(0)
    decides = np.arange(24) < 3
    scores = [[np.where(decides, 2.0, 0.0) + random.random(24) for _ in range(60)] for _ in range(2)]
    assert all(auroc(row, decides) == 1.0 for side in scores for row in side)
    tau = pair_agreement(("one", "other"), *scores)
    # 63 of 276 pairs are between the deciding and the rest and agree; the others are coins.
    assert tau.mean.value == pytest.approx(63 / 276, abs=0.05)
    assert pair_agreement(("one", "other"), *scores, measure="overlap-3").mean.value == 1.0


def test_undefined_and_short_texts_are_counted_and_left_out():
    x = [np.array([1.0, 2, 3]), np.array([1.0, 1, 1]), np.array([1.0, 2]), np.array([3.0])]
    found = pair_agreement(("a", "b"), x, [np.arange(float(len(v))) for v in x])
    assert (found.n, found.undefined, found.short) == (1, 1, 2)
    assert found.mean.value == 1.0
    assert [math.isnan(v) for v in found.values] == [False, True, True, True]
    assert pair_agreement(("a", "b"), x, [np.arange(float(len(v))) for v in x], minimum=2).short == 1


def test_a_pair_without_any_value_is_not_a_number():
    found = pair_agreement(("a", "b"), [np.ones(4)], [np.arange(4.0)])
    assert math.isnan(found.mean.value)
    assert found.undefined == 1


def test_models_are_the_units_where_there_are_several():
    random = np.random.default_rng(0)
    x, y = ([random.random(8) for _ in range(30)] for _ in range(2))
    found = pair_agreement(("a", "b"), x, y, model_seeds=[i // 10 for i in range(30)])
    assert found.mean.n == 3
    assert found.n == 30
    assert found.mean.value == pytest.approx(np.mean(found.values))


def test_the_table_has_every_pair_once():
    scores = {name: random_scores([np.empty(6)] * 5, seed) for seed, name in enumerate("abc")}
    found = agreement_table(scores)
    assert [(p.first, p.second) for p in found] == list(itertools.combinations("abc", 2))
    assert mean_off_diagonal(found) == pytest.approx(np.mean([p.mean.value for p in found]))
    with pytest.raises(ArgumentError, match="at least two"):
        agreement_table({"a": scores["a"]})
    with pytest.raises(ArgumentError, match="same examples"):
        agreement_table({"a": scores["a"], "b": scores["b"][:2]})


def test_random_scores_stay_within_chance():
    like = [np.empty(15)] * 400
    found = pair_agreement(("a", "b"), random_scores(like, 0), random_scores(like, 1))
    low, high = chance_interval(15)
    assert abs(found.mean.value) < 0.03
    assert 0.92 < np.mean([low < v < high for v in found.values]) < 0.98
    with pytest.raises(ArgumentError, match="at least 2"):
        chance_interval(1)


def test_noise_that_lowers_agreement_is_taken_out_of_it():
    random = np.random.default_rng(0)
    truth = random.normal(size=(300, 40))
    noisy = [truth + random.normal(size=truth.shape) for _ in range(4)]

    def tau(a, b):
        return pair_agreement(("a", "b"), list(a), list(b)).mean.value

    across = tau(noisy[0], noisy[1])
    assert across < 0.4
    assert disattenuated(across, tau(noisy[0], noisy[2]), tau(noisy[1], noisy[3])) == pytest.approx(1.0, abs=0.05)
    assert math.isnan(disattenuated(0.3, 0.0, 0.5))


def test_earlier_and_rarer_items_as_controls():
    assert position_scores([np.empty(4)])[0].tolist() == [4, 3, 2, 1]
    one, other = example(5), example(5)
    one.ids[1:4], other.ids[1:4] = torch.tensor([7, 8, 7]), torch.tensor([7, 9, 9])
    rare, again = frequency_scores([one, other])
    # 7 stands three times, 9 twice, 8 once; special tokens do not count.
    assert rare == pytest.approx([-math.log(3), 0, -math.log(3)])
    assert again == pytest.approx([-math.log(3), -math.log(2), -math.log(2)])


def test_near_ties_are_counted():
    assert near_tie_share([np.array([0.0, 0.001, 1.0])]) == pytest.approx(1 / 3)
    assert math.isnan(near_tie_share([]))


def test_special_tokens_and_padding_are_left_out_for_all_alike():
    given = example(6).padded(0, 2)
    scores = np.arange(8.0)
    assert items_of(scores, given).tolist() == [1, 2, 3, 4]
    assert items_of(scores, given, special="include").tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ArgumentError, match="special"):
        items_of(scores, given, special="some")
    with pytest.raises(ArgumentError, match="one for each"):
        items_of(scores[:3], given)


def test_sub_words_are_joined():
    given = example(6)
    object.__setattr__(given, "words", np.array([-1, 0, 0, 1, 1, -1]))
    scores = np.array([9.0, 1, 2, 3, 5, 9])
    assert items_of(scores, given, words="sum").tolist() == [3, 8]
    assert items_of(scores, given, words="max").tolist() == [2, 5]
    assert items_of(scores, given, words="sum", special="include").tolist() == [9, 3, 8, 9]
    with pytest.raises(ArgumentError, match="words"):
        items_of(scores, given, words="mean")
