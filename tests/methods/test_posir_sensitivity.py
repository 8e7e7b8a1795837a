"""The position sensitivity index: boundaries, invariants, what chance gives, and planted biases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headway.errors import ArgumentError, NumericError
from headway.methods.diagnosis.posir import bin_of, bucket_of, by_bucket, psi, sensitivity
from headway.methods.diagnosis.posir.sensitivity import BINS, bucket_names


def drawn(seed, per_bin=30, rate=lambda x: 0.6 + 0 * x):
    """Successes at `rate` of the position, `per_bin` of them in each bin, none on an edge."""
    random = np.random.default_rng(seed)
    x = np.repeat(np.arange(BINS), per_bin) / BINS + random.uniform(1e-3, 0.049, BINS * per_bin)
    return (random.random(x.size) < rate(x)).astype(float), x


@pytest.mark.parametrize(
    ("position", "expected"),
    [(0.0, 0), (0.05, 0), (0.0500001, 1), (0.1, 1), (0.15, 2), (0.3, 5), (0.95, 18), (0.95001, 19), (1.0, 19)],
)
def test_bins_are_closed_on_the_right_and_the_first_on_both_sides(position, expected):
    assert bin_of(position) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 0), (512, 0), (513, 1), (1024, 1), (1025, 2), (1536, 2), (1537, 3), (10**6, 3)]
)
def test_length_buckets_are_closed_on_the_right(tokens, expected):
    assert bucket_of(tokens) == expected


def test_buckets_are_named_by_their_bounds():
    assert bucket_names((512, 1024)) == ["Q1 (0, 512]", "Q2 (512, 1024]", "Q3 (1024, ∞)"]


def test_psi_is_one_minus_least_over_most():
    assert psi(np.array([0.2, 0.8, np.nan, 0.4])) == pytest.approx(0.75)
    assert psi(np.full(20, 0.3)) == 0
    assert psi(np.array([0.0, 0.5])) == 1
    assert math.isnan(psi(np.zeros(3)))
    assert math.isnan(psi(np.full(3, np.nan)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=20), st.floats(0.01, 100))
def test_psi_stays_in_its_range_and_ignores_the_scale(means, factor):
    found = psi(np.array(means))
    if math.isfinite(found):
        assert 0 <= found <= 1
        assert psi(np.array(means) * factor) == pytest.approx(float(found), abs=1e-9)


def test_constant_scores_have_no_sensitivity():
    _, x = drawn(0)
    found = sensitivity(np.full(x.size, 0.4), x, resamples=50)
    assert found.psi.value == pytest.approx(0, abs=1e-12)
    assert found.slope.value == pytest.approx(0, abs=1e-12)
    assert found.psi.p_value == 1
    assert found.direction == "none"
    assert math.isnan(found.trend["spearman"])


def test_scores_may_be_scaled_and_queries_reordered():
    s, x = drawn(1)
    order = np.random.default_rng(2).permutation(x.size)
    plain, scaled, mixed = (sensitivity(a, b, resamples=50) for a, b in ((s, x), (s * 0.31, x), (s[order], x[order])))
    assert scaled.psi.value == pytest.approx(plain.psi.value)
    assert scaled.linear.value == pytest.approx(plain.linear.value)
    assert mixed.psi.value == pytest.approx(plain.psi.value)
    assert mixed.means == pytest.approx(plain.means)


def test_mirrored_positions_keep_the_index_and_turn_the_direction():
    s, x = drawn(3, rate=lambda x: 0.9 - 0.6 * x)
    plain, mirrored = sensitivity(s, x, resamples=50), sensitivity(s, 1 - x, resamples=50)
    assert mirrored.psi.value == pytest.approx(plain.psi.value)
    assert mirrored.wide.value == pytest.approx(plain.wide.value)
    assert mirrored.slope.value == pytest.approx(-plain.slope.value)
    assert (plain.direction, mirrored.direction) == ("primacy", "recency")
    for name in ("pearson", "spearman", "kendall", "slope_of_bins"):
        assert mirrored.trend[name] == pytest.approx(-plain.trend[name])


def test_ndcg_is_the_mean_over_bins_and_mean_that_over_queries():
    found = sensitivity([1.0, 0.0, 0.0, 0.5, 0.5, 0.5], [0.01, 0.02, 0.03, 0.3, 0.5, 0.7], resamples=20, bins=5)
    assert found.means[:4] == pytest.approx([1 / 3, 0.5, 0.5, 0.5])
    assert math.isnan(found.means[4])
    assert found.ndcg == pytest.approx((1 / 3 + 1.5) / 4)
    assert found.mean == pytest.approx(2.5 / 6)
    assert found.counts == [3, 1, 1, 1, 0]
    assert found.least == 1
    assert "4 of 5" in found.undefined


def test_trend_is_that_of_scipy_over_bins():
    s, x = drawn(4, rate=lambda x: 0.3 + 0.5 * x)
    found = sensitivity(s, x, resamples=20)
    centres = (np.arange(BINS) + 0.5) / BINS
    assert found.trend["kendall"] == pytest.approx(stats.kendalltau(centres, found.means).statistic)
    assert found.trend["r2"] == pytest.approx(stats.linregress(centres, found.means).rvalue ** 2)


def test_an_index_that_is_not_defined_says_why():
    few = sensitivity(np.ones(10), np.full(10, 0.52), resamples=20)
    assert few.psi is None
    assert "1 of 20 position bins" in few.undefined
    assert few.direction == "none"
    lost = sensitivity(np.zeros(100), np.linspace(0, 1, 100), resamples=20)
    assert lost.psi is None
    assert "every score is 0" in lost.undefined


def test_the_raw_index_is_biased_and_the_corrected_one_is_not():
    """Flat truth 0.7, 50 queries a bin: a raw PSI of about 0.30."""
    found = [sensitivity(*drawn(seed, 50, lambda x: 0.7 + 0 * x), resamples=100).psi for seed in range(40)]
    assert np.mean([f.value for f in found]) == pytest.approx(0.30, abs=0.02)
    assert abs(np.mean([f.excess for f in found])) < 0.03
    assert np.mean([f.p_value < 0.05 for f in found]) < 0.2


def test_smooth_forms_find_a_bias_that_twenty_bins_cannot():
    """Few queries in each bin: extremes are noise, the line is not."""
    s, x = drawn(5, per_bin=12, rate=lambda x: 0.75 - 0.4 * x)
    found = sensitivity(s, x, resamples=400)
    assert found.linear.p_value < 0.01
    assert found.direction == "primacy"
    assert found.linear.excess > found.psi.excess


def test_what_goes_with_the_length_is_not_taken_for_position():
    """Short documents are easy and have early answers, long ones hard and late: within each there is no bias."""
    random = np.random.default_rng(6)
    long = np.repeat([False, True], 1000)
    x = np.where(long, random.uniform(0.4, 1, 2000), random.uniform(0, 0.6, 2000))
    s = (random.random(2000) < np.where(long, 0.3, 0.8)).astype(float)
    apart = sensitivity(s, x, within=np.where(long, "long", "short"), resamples=300)
    together = sensitivity(s, x, resamples=300)
    assert together.direction == "primacy"
    assert together.psi.p_value < 0.01
    assert apart.direction == "none"
    assert apart.psi.p_value > 0.05
    assert apart.psi.value == together.psi.value


def test_shuffles_within_labels_keep_each_label_whole():
    """Where a label holds one score only, shuffling within labels changes nothing at all."""
    _, x = drawn(7)
    label = bin_of(x)
    found = sensitivity((label + 1) / BINS, x, within=label, resamples=30)
    assert found.psi.value == pytest.approx(found.psi.null_low) == pytest.approx(found.psi.null_high)
    assert found.psi.p_value == 1


def test_queries_of_one_document_are_resampled_together():
    """Ten copies of each document say no more than one."""
    s, x = drawn(8, per_bin=8, rate=lambda x: 0.3 + 0.6 * x)
    many_s, many_x, owner = np.tile(s, 10), np.tile(x, 10), np.tile(np.arange(x.size), 10)
    apart = sensitivity(many_s, many_x, resamples=300)
    owned = sensitivity(many_s, many_x, groups=owner.tolist(), resamples=300)
    once = sensitivity(s, x, resamples=300)
    width = [f.slope_interval[1] - f.slope_interval[0] for f in (once, owned, apart)]
    assert width[1] == pytest.approx(width[0], rel=0.25)
    assert width[2] < 0.5 * width[1]


def test_the_interval_of_the_index_is_that_of_queries_drawn_again():
    s, x = drawn(12, rate=lambda x: 0.9 - 0.6 * x)
    found = sensitivity(s, x, resamples=2000)
    random, where, drawn_again = np.random.default_rng(0), bin_of(x), []
    for _ in range(2000):
        taken = random.integers(s.size, size=s.size)
        counts = np.bincount(where[taken], minlength=BINS)
        sums = np.bincount(where[taken], weights=s[taken], minlength=BINS)
        drawn_again.append(float(psi(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))))
    low, high = np.quantile(drawn_again, [0.025, 0.975])
    assert 0 <= found.interval[0] < found.psi.value < found.interval[1] <= 1
    assert found.interval == pytest.approx((low, high), abs=0.03)


def test_the_interval_of_the_index_narrows_with_queries_and_not_with_copies():
    s, x = drawn(13, per_bin=20, rate=lambda x: 0.9 - 0.6 * x)
    owner = np.tile(np.arange(x.size), 10)
    once = sensitivity(s, x, resamples=400)
    owned = sensitivity(np.tile(s, 10), np.tile(x, 10), groups=owner.tolist(), resamples=400)
    apart = sensitivity(np.tile(s, 10), np.tile(x, 10), resamples=400)
    width = [f.interval[1] - f.interval[0] for f in (once, owned, apart)]
    assert width[1] == pytest.approx(width[0], rel=0.25)
    assert width[2] < 0.6 * width[1]
    assert sensitivity(np.full(x.size, 0.4), x, resamples=50).interval == pytest.approx((0, 0), abs=1e-12)


def test_buckets_are_judged_apart():
    s, x = drawn(9, rate=lambda x: 0.9 - 0.8 * x)
    flat, _ = drawn(10)
    found = by_bucket(
        [*s, *flat], [*x, *x], [2000] * s.size + [100] * flat.size, groups=list(range(2 * s.size)), resamples=200
    )
    assert list(found) == bucket_names()
    assert found["Q2 (512, 1024]"] is None
    assert found["Q4 (1536, ∞)"].direction == "primacy"
    assert found["Q1 (0, 512]"].direction == "none"


def test_the_same_seed_gives_the_same_numbers():
    s, x = drawn(11)
    assert sensitivity(s, x, resamples=40).to_dict() == sensitivity(s, x, resamples=40).to_dict()


@pytest.mark.parametrize(
    ("scores", "positions", "options", "words"),
    [
        ([1.0, 0.0], [0.5], {}, "one score per position"),
        ([], [], {}, "one score per position"),
        ([-0.1, 0.5], [0.1, 0.2], {}, "0 or more"),
        ([0.1, 0.5], [0.1, 1.2], {}, "[0, 1]"),
        ([0.1, 0.5], [0.1, float("nan")], {}, "[0, 1]"),
        ([0.1, 0.5], [0.1, 0.2], {"bins": 2}, "bins"),
        ([0.1, 0.5], [0.1, 0.2], {"resamples": 5}, "resamples"),
        ([0.5] * 20, list(np.linspace(0, 1, 20)), {"groups": ["a"]}, "groups"),
        ([0.5] * 20, list(np.linspace(0, 1, 20)), {"within": ["a"]}, "within"),
    ],
)
def test_what_cannot_be_measured_is_refused(scores, positions, options, words):
    with pytest.raises(ArgumentError, match=r".") as error:
        sensitivity(scores, positions, **options)
    assert words in str(error.value)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(NumericError, match="0 for not found"):
        sensitivity([float("nan"), 1.0], [0.1, 0.2])


@pytest.mark.parametrize("edges", [(10, 5), (5, 5), (0, 5)])
def test_edges_must_grow(edges):
    with pytest.raises(ArgumentError, match="growing"):
        bucket_of([3], edges)


def test_an_empty_document_has_no_bucket():
    with pytest.raises(ArgumentError, match="1 or more"):
        bucket_of([0])
