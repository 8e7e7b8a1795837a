"""Statistics against planted truths, and defined results for degenerate samples."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headway.errors import ArgumentError, NumericError
from headway.evidence import Verdict, at_least
from headway.statistics import (
    against_null,
    bootstrap,
    bootstrap_difference,
    bootstrap_over_seeds,
    bootstrap_ratio,
    matched_controls,
    permutation_null,
    proportion,
    rank_correlation,
)


class TestBootstrap:
    @pytest.mark.parametrize("size", [3, 5, 8, 30])
    def test_the_interval_of_a_normal_mean_covers_the_truth(self, size):
        random = np.random.default_rng(size)
        measured = (bootstrap(random.normal(3, 2, size), generator=random, resamples=400) for _ in range(300))
        covered = sum(m.low <= 3 <= m.high for m in measured)
        assert 0.91 * 300 <= covered < 300

    def test_a_large_sample_gives_the_interval_of_student(self):
        sample = np.random.default_rng(0).normal(0, 1, 400)
        expected = stats.ttest_1samp(sample, 0).confidence_interval()
        measured = bootstrap(sample, generator=0)
        assert measured.value == pytest.approx(sample.mean())
        assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high), abs=0.01)

    def test_the_same_seed_gives_the_same_interval(self):
        sample = [1.0, 2, 4, 8, 16, 32]
        assert bootstrap(sample, generator=7) == bootstrap(sample, generator=7)
        first, second = (bootstrap(sample, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert first == second

    def test_the_median_is_not_moved_by_an_outlier(self):
        measured = bootstrap([1.0] * 20 + [1000.0], statistic="median", generator=0)
        assert (measured.value, measured.low, measured.high) == (1, 1, 1)

    def test_one_value_has_an_unknown_interval_and_decides_nothing(self):
        measured = bootstrap([5.0], generator=0)
        assert (measured.value, measured.low, measured.high, measured.n) == (5, -math.inf, math.inf, 1)
        assert at_least(1.0).judge({"measured": measured}).verdict is Verdict.INCONCLUSIVE

    @pytest.mark.parametrize("size", [2, 5, 6, 40])
    def test_a_constant_sample_has_a_point_interval(self, size):
        measured = bootstrap([0.25] * size, generator=0)
        assert (measured.low, measured.high) == pytest.approx((0.25, 0.25))

    @pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf]])
    def test_nan_and_infinity_raise(self, bad):
        with pytest.raises(NumericError, match=r"values: got 1 of \d values NaN"):
            bootstrap(bad, generator=0)

    @pytest.mark.parametrize("bad", [[], [[1.0, 2.0]], 3.0])
    def test_other_shapes_raise(self, bad):
        with pytest.raises(ArgumentError, match="values: got shape"):
            bootstrap(bad, generator=0)

    def test_an_unknown_statistic_is_named(self):
        with pytest.raises(ArgumentError, match="Did you mean 'median'"):
            bootstrap([1.0, 2.0], statistic="medain", generator=0)

    def test_seeds_are_the_units_not_their_items(self):
        by_seed = {3: [1.0] * 100, 4: [2.0] * 50, 5: [6.0]}
        measured = bootstrap_over_seeds(by_seed, generator=0)
        assert (measured.value, measured.n, measured.seeds) == (3.0, 3, (3, 4, 5))
        assert measured.low < 0 < 6 < measured.high


class TestTwoSamples:
    def test_pairing_removes_the_shared_variation(self):
        item = np.random.default_rng(0).normal(0, 50, 30)
        noise = np.random.default_rng(1).normal(1, 0.1, 30)
        paired = bootstrap_difference(item + noise, item, paired=True, generator=0)
        groups = bootstrap_difference(item + noise, item, paired=False, generator=0)
        assert 0.9 < paired.low < 1 < paired.high < 1.1
        assert groups.low < 0 < groups.high
        assert paired.value == pytest.approx(groups.value)

    def test_the_ratio_of_proportional_pairs_is_exact(self):
        below = np.random.default_rng(0).uniform(1, 9, 12)
        measured = bootstrap_ratio(2.5 * below, below, paired=True, generator=0)
        assert (measured.low, measured.value, measured.high) == pytest.approx((2.5, 2.5, 2.5))

    def test_the_ratio_is_of_means_not_a_mean_of_ratios(self):
        assert bootstrap_ratio([1.0, 1.0], [1.0, 3.0], paired=True, generator=0).value == pytest.approx(0.5)

    def test_a_denominator_around_zero_has_an_unknown_interval(self):
        below = np.random.default_rng(0).normal(0.05, 1, 20)
        measured = bootstrap_ratio(np.ones(20), below, paired=True, generator=0)
        assert (measured.low, measured.high) == (-math.inf, math.inf)

    def test_a_denominator_of_zero_raises(self):
        with pytest.raises(ArgumentError, match="statistic of 0"):
            bootstrap_ratio([1.0, 2.0], [-1.0, 1.0], paired=True, generator=0)

    def test_unequal_pairs_raise_and_groups_do_not(self):
        with pytest.raises(ArgumentError, match="got 2 and 3 values, expected pairs"):
            bootstrap_ratio([1.0, 2.0], [1.0, 2.0, 3.0], paired=True, generator=0)
        assert bootstrap_ratio([1.0, 2.0], [1.0, 2.0, 3.0], paired=False, generator=0).n == 2

    def test_one_pair_has_an_unknown_interval(self):
        assert bootstrap_ratio([3.0], [2.0], paired=True, generator=0).high == math.inf


class TestProportion:
    def test_all_successes_still_leave_doubt(self):
        measured = proportion(20, 20)
        assert (measured.value, measured.n) == (1.0, 20)
        assert 0.8 < measured.low < 0.9
        assert measured.high == pytest.approx(1)

    @pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (0, 0)])
    def test_impossible_counts_raise(self, successes, trials):
        with pytest.raises(ArgumentError, match="expected 0 ≤ successes ≤ trials"):
            proportion(successes, trials)


class TestRankCorrelation:
    @pytest.mark.parametrize("method", ["spearman", "kendall"])
    def test_any_increasing_law_gives_one(self, method):
        x = np.arange(1.0, 9.0)
        measured = rank_correlation(x, np.exp(x), method=method, generator=0, resamples=300)
        assert (measured.value, measured.low, measured.high, measured.n) == (1, 1, 1, 8)

    @pytest.mark.parametrize("method", ["spearman", "kendall"])
    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_ties_are_handled_as_scipy_does(self, method, data):
        size = data.draw(st.integers(4, 12))
        few = st.lists(st.integers(0, 3), min_size=size, max_size=size).filter(lambda side: len(set(side)) > 1)
        x, y = data.draw(few), data.draw(few)
        oracle = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}[method](x, y).statistic
        measured = rank_correlation(x, y, method=method, generator=0, resamples=50)
        assert measured.value == pytest.approx(oracle)
        assert -1 <= measured.low <= measured.high <= 1

    def test_unrelated_sides_give_an_interval_around_zero(self):
        random = np.random.default_rng(0)
        measured = rank_correlation(random.normal(size=60), random.normal(size=60), generator=0)
        assert measured.low < 0 < measured.high

    def test_the_interval_covers_the_rank_correlation_of_a_bivariate_normal(self):
        random, truth, covered = np.random.default_rng(0), 6 / math.pi * math.asin(0.6 / 2), 0
        for _ in range(150):
            x = random.normal(size=20)
            measured = rank_correlation(x, 0.6 * x + 0.8 * random.normal(size=20), generator=random, resamples=300)
            covered += measured.low <= truth <= measured.high
        assert covered >= 0.91 * 150

    def test_a_constant_side_has_no_order(self):
        measured = rank_correlation([1.0, 1, 1, 1, 1], [1.0, 2, 3, 4, 5], generator=0)
        assert math.isnan(measured.value)
        assert at_least(-1.0).judge({"measured": measured}).verdict is Verdict.INCONCLUSIVE

    def test_a_nearly_constant_side_has_an_unknown_interval(self):
        measured = rank_correlation([0.0] * 7 + [1.0], np.arange(8.0), generator=0)
        assert (measured.low, measured.high) == (-1, 1)

    def test_two_pairs_raise(self):
        with pytest.raises(ArgumentError, match="got 2 pairs"):
            rank_correlation([1.0, 2.0], [1.0, 2.0], generator=0)

    def test_an_unknown_method_is_named(self):
        with pytest.raises(ArgumentError, match="Did you mean 'spearman'"):
            rank_correlation([1.0, 2, 3], [1.0, 2, 3], method="spearmann", generator=0)


class TestNull:
    def test_the_best_of_nineteen_draws_has_p_of_one_in_twenty(self):
        null = against_null(20.0, np.arange(19.0))
        assert (null.p_value, null.quantile, null.draws) == (pytest.approx(1 / 20), 1.0, 19)
        assert null.excess == pytest.approx(11.0)

    def test_a_tie_counts_as_extreme_and_half_below(self):
        null = against_null(1.0, [0.0, 1.0, 1.0, 2.0])
        assert null.p_value == pytest.approx(4 / 5)
        assert null.quantile == pytest.approx(0.5)

    def test_less_is_greater_of_the_negatives(self):
        draws = np.random.default_rng(0).normal(size=50)
        assert against_null(0.3, draws, alternative="less").p_value == against_null(-0.3, -draws).p_value

    @pytest.mark.parametrize("observed", [-9.0, 0.0, 9.0])
    def test_two_sided_is_a_probability(self, observed):
        p = against_null(observed, np.arange(-4.0, 5.0), alternative="two-sided").p_value
        assert p == pytest.approx({-9.0: 0.2, 0.0: 1.0, 9.0: 0.2}[observed])

    def test_nan_raises(self):
        with pytest.raises(NumericError, match="observed"):
            against_null(math.nan, [1.0])
        with pytest.raises(NumericError, match="draws"):
            against_null(1.0, [math.nan])

    def test_separated_groups_have_the_smallest_exact_p(self):
        null = permutation_null([10.0, 11, 12, 13], [0.0, 1, 2, 3], generator=0)
        assert null.p_value == pytest.approx(2 / math.comb(8, 4))

    def test_paired_signs_are_exchanged_within_pairs(self):
        base = np.array([0.0, 100, 200, 300, 400, 500])
        null = permutation_null(base + 1, base, design="paired", generator=0)
        assert null.observed == pytest.approx(1)
        assert null.p_value == pytest.approx(2 / 2**6)

    def test_pairing_tests_a_correlation(self):
        null = permutation_null(
            np.arange(5.0), np.arange(5.0) ** 3, design="pairing", alternative="greater", generator=0
        )
        assert null.p_value == pytest.approx(1 / math.factorial(5))

    def test_p_values_under_the_null_are_about_uniform(self):
        random = np.random.default_rng(0)
        small = 0
        for _ in range(200):
            p = permutation_null(random.normal(size=9), random.normal(size=9), generator=random, resamples=199).p_value
            small += p <= 0.1
        assert 6 <= small <= 36

    def test_a_constant_side_of_a_correlation_raises(self):
        with pytest.raises(NumericError, match="constant side"):
            permutation_null([1.0, 1, 1], [1.0, 2, 3], design="pairing", generator=0)

    def test_an_unknown_design_is_named(self):
        with pytest.raises(ArgumentError, match="Did you mean 'paired'"):
            permutation_null([1.0], [1.0], design="paird", generator=0)


def head_sets(layers: int, heads: int, *, most: int) -> st.SearchStrategy:
    everything = list(itertools.product(range(layers), range(heads)))
    return st.lists(st.sampled_from(everything), min_size=1, max_size=most, unique=True)


class TestMatchedControls:
    @settings(max_examples=60, deadline=None)
    @given(chosen=head_sets(4, 6, most=24), seed=st.integers(0, 99))
    def test_controls_match_counts_per_layer_and_avoid_the_chosen_where_they_can(self, chosen, seed):
        wanted = Counter(layer for layer, _ in chosen)
        if all(count == 6 for count in wanted.values()):
            with pytest.raises(ArgumentError, match="every head of its layers"):
                matched_controls(chosen, (4, 6), seed)
            return
        controls = matched_controls(chosen, (4, 6), seed, draws=5)
        assert len(controls) == 5
        for control in controls:
            assert len(set(control)) == len(control)
            assert Counter(layer for layer, _ in control) == wanted
            for layer, count in wanted.items():
                shared = sum(head in chosen for head in control if head[0] == layer)
                assert shared == max(0, count - (6 - count))

    @settings(max_examples=30, deadline=None)
    @given(chosen=head_sets(3, 4, most=6), seed=st.integers(0, 99))
    def test_without_layers_only_the_total_is_matched(self, chosen, seed):
        for control in matched_controls(chosen, (3, 4), seed, same_layer=False, draws=4):
            assert len(set(control)) == len(chosen)
            assert not set(control) & set(chosen)

    def test_every_free_head_is_drawn_about_equally_often(self):
        draws = matched_controls([(0, 0)], (1, 5), 0, draws=1000)
        counts = Counter(head for control in draws for head in control)
        assert set(counts) == {(0, h) for h in range(1, 5)}
        assert all(180 < count < 320 for count in counts.values())

    def test_the_same_seed_gives_the_same_controls(self):
        assert matched_controls([(0, 1), (2, 2)], (3, 4), 5) == matched_controls([(2, 2), (0, 1)], (3, 4), 5)

    @pytest.mark.parametrize("chosen", [[], [(0, 0), (0, 0)], [(4, 0)], [(0, 6)], [(-1, 0)]])
    def test_bad_heads_raise(self, chosen):
        with pytest.raises(ArgumentError, match="chosen"):
            matched_controls(chosen, (4, 6), 0)

    def test_overlap_is_said(self, caplog):
        matched_controls([(0, 0), (0, 1), (0, 2)], (2, 4), 0)
        assert "overlap with the chosen heads in layers [0]" in caplog.text
