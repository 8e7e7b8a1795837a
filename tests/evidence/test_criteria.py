"""Criteria: three-valued verdicts from intervals, gates and combinations."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.evidence import (
    Criterion,
    Measurement,
    Verdict,
    all_of,
    any_of,
    at_least,
    at_most,
    between,
    equals,
    interval_excludes,
    rank_correlation_at_least,
    ratio_at_least,
    ratio_at_most,
)
from headway.statistics import number

HOLDS, FAILS, INCONCLUSIVE = Verdict.HOLDS, Verdict.FAILS, Verdict.INCONCLUSIVE
quick = settings(max_examples=60, deadline=None)
numbers = st.floats(-100, 100)


def judge(criterion: Criterion, measured: Measurement, **others: Measurement) -> Verdict:
    return criterion.judge({"measured": measured, **others}).verdict


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    low, value, high = sorted(draw(st.tuples(numbers, numbers, numbers)))
    return draw(st.sampled_from([Measurement(value), Measurement(value, low, high, n=draw(st.integers(1, 9)))]))


@st.composite
def criteria(draw: st.DrawFn, depth: int = 2) -> Criterion:
    low, high = sorted(draw(st.tuples(numbers, numbers)))
    options = {"minimum_n": draw(st.integers(0, 9)), "by": draw(st.sampled_from(["interval", "value"]))}
    leaves = [at_least(low, **options), at_most(high, **options), between(low, high), interval_excludes(low)]
    if depth and draw(st.booleans()):
        parts = draw(st.lists(criteria(depth=depth - 1), min_size=1, max_size=3))
        return draw(st.sampled_from([all_of, any_of]))(*parts)
    return draw(st.sampled_from(leaves))


class TestWithin:
    def test_an_interval_above_the_threshold_holds(self):
        assert judge(at_least(1.0), Measurement(1.2, 1.0, 1.4)) is HOLDS

    def test_an_interval_below_the_threshold_fails(self):
        assert judge(at_least(1.0), Measurement(0.5, 0.2, 0.9)) is FAILS

    def test_an_interval_that_straddles_the_threshold_is_inconclusive(self):
        outcome = at_least(1.0).judge({"measured": Measurement(1.2, 0.9, 1.5)})
        assert outcome.verdict is INCONCLUSIVE
        assert "straddles 1" in outcome.reason

    def test_by_value_ignores_the_interval(self):
        assert judge(at_least(1.0, by="value"), Measurement(1.2, 0.9, 1.5)) is HOLDS
        assert judge(at_least(1.0, by="value"), Measurement(0.8, 0.5, 1.5)) is FAILS

    def test_an_exact_quantity_is_decided_by_its_value(self):
        assert judge(at_most(0.0), Measurement(0)) is HOLDS
        assert judge(at_most(0.0), Measurement(1)) is FAILS

    def test_a_value_outside_its_own_interval_widens_it(self):
        assert judge(at_least(0.9), Measurement(1.0, 0.7, 0.95)) is INCONCLUSIVE
        assert judge(at_least(0.98), Measurement(1.0, 0.7, 0.95)) is INCONCLUSIVE

    def test_equals_accepts_the_tolerance_on_both_sides(self):
        criterion = equals(10, 0.5)
        verdicts = [judge(criterion, Measurement(v)) for v in (9.4, 9.5, 10, 10.5, 10.6)]
        assert verdicts == [FAILS, HOLDS, HOLDS, HOLDS, FAILS]

    def test_an_unknown_interval_is_inconclusive(self):
        assert judge(at_least(0.5), Measurement(9.0, -math.inf, math.inf)) is INCONCLUSIVE

    def test_nan_is_inconclusive(self):
        assert judge(at_least(0.5), Measurement(math.nan)) is INCONCLUSIVE
        assert judge(interval_excludes(0.5), Measurement(math.nan, math.nan, math.nan)) is INCONCLUSIVE

    def test_an_infinite_value_can_be_judged(self):
        assert judge(at_least(1000), Measurement(math.inf)) is HOLDS

    def test_too_few_units_are_inconclusive(self):
        good = Measurement(2.0, 1.9, 2.1, n=4)
        assert judge(at_least(1.0, minimum_n=4), good) is HOLDS
        assert judge(at_least(1.0, minimum_n=5), good) is INCONCLUSIVE

    def test_a_rank_correlation_needs_five_pairs(self):
        assert judge(rank_correlation_at_least(0.9), Measurement(1.0, 1.0, 1.0, n=4)) is INCONCLUSIVE
        assert judge(rank_correlation_at_least(0.9), Measurement(1.0, 1.0, 1.0, n=5)) is HOLDS

    @quick
    @given(measurements(), numbers)
    def test_at_least_and_at_most_never_both_fail_or_hold_off_the_edge(self, measured, threshold):
        pair = judge(at_least(threshold), measured), judge(at_most(threshold), measured)
        assert pair in {(HOLDS, FAILS), (FAILS, HOLDS), (INCONCLUSIVE, INCONCLUSIVE)} or threshold in (
            measured.low,
            measured.high,
            measured.value,
        )

    @quick
    @given(measurements(), numbers, numbers)
    def test_a_stricter_threshold_never_gives_a_better_verdict(self, measured, first, second):
        order = [FAILS, INCONCLUSIVE, HOLDS]
        lax, strict = sorted((first, second))
        assert order.index(judge(at_least(strict), measured)) <= order.index(judge(at_least(lax), measured))

    @quick
    @given(measurements(), numbers, numbers)
    def test_between_is_at_least_and_at_most_together(self, measured, first, second):
        low, high = sorted((first, second))
        both = judge(all_of(at_least(low), at_most(high)), measured)
        assert judge(between(low, high), measured) is both

    @quick
    @given(measurements(), criteria())
    def test_a_narrower_interval_never_turns_holds_into_fails(self, measured, criterion):
        whole = judge(criterion, measured)
        point = judge(criterion, Measurement(measured.value, measured.value, measured.value, n=measured.n))
        assert {whole, point} != {HOLDS, FAILS}


class TestRatio:
    def test_the_ratio_of_exact_values_is_their_quotient(self):
        assert judge(ratio_at_least(1.5), Measurement(3.0), baseline=Measurement(2.0)) is HOLDS
        assert judge(ratio_at_most(0.2), Measurement(1.0), baseline=Measurement(4.0)) is FAILS

    def test_the_interval_of_a_ratio_takes_the_worst_pairing(self):
        measured, baseline = Measurement(3.0, 2.8, 3.2, n=9), Measurement(2.0, 1.6, 2.4, n=9)
        assert judge(ratio_at_least(2.8 / 2.4), measured, baseline=baseline) is HOLDS
        assert judge(ratio_at_least(1.2), measured, baseline=baseline) is INCONCLUSIVE
        assert judge(ratio_at_least(2.1), measured, baseline=baseline) is FAILS

    def test_a_baseline_that_may_be_zero_is_inconclusive(self):
        assert judge(ratio_at_least(1), Measurement(3.0, 2, 4), baseline=Measurement(1.0, -1, 3)) is INCONCLUSIVE

    def test_a_baseline_of_exactly_zero_is_inconclusive(self):
        assert judge(ratio_at_least(1), Measurement(3.0), baseline=Measurement(0.0)) is INCONCLUSIVE

    def test_two_negative_sides_give_a_positive_ratio(self):
        assert judge(ratio_at_least(1.4), Measurement(-3, -3.1, -2.9), baseline=Measurement(-2.0)) is HOLDS

    def test_a_missing_baseline_is_named(self):
        with pytest.raises(ArgumentError, match="'baseline'"):
            ratio_at_least(1).judge({"measured": Measurement(1.0)})

    def test_the_smaller_n_of_both_sides_counts(self):
        few = Measurement(1.0, 0.9, 1.1, n=2)
        assert judge(ratio_at_least(1, minimum_n=3), Measurement(3, 2.9, 3.1, n=9), baseline=few) is INCONCLUSIVE


class TestIntervalExcludes:
    def test_an_interval_without_the_value_holds(self):
        assert judge(interval_excludes(1), Measurement(1.4, 1.2, 1.6)) is HOLDS
        assert judge(interval_excludes(1), Measurement(0.4, 0.2, 0.6)) is HOLDS

    def test_an_interval_with_the_value_is_inconclusive_not_failed(self):
        assert judge(interval_excludes(1), Measurement(1.4, 0.9, 1.6)) is INCONCLUSIVE

    def test_the_wrong_side_fails(self):
        assert judge(interval_excludes(1, side="above"), Measurement(0.4, 0.2, 0.6)) is FAILS
        assert judge(interval_excludes(1, side="below"), Measurement(0.4, 0.2, 0.6)) is HOLDS

    def test_no_interval_is_inconclusive(self):
        assert judge(interval_excludes(1), Measurement(1.4)) is INCONCLUSIVE


TABLE = {HOLDS: Measurement(2.0), FAILS: Measurement(0.0), INCONCLUSIVE: Measurement(2.0, 0.0, 3.0)}


class TestCombined:
    @pytest.mark.parametrize("first", list(Verdict))
    @pytest.mark.parametrize("second", list(Verdict))
    def test_all_of_is_the_minimum_and_any_of_the_maximum(self, first, second):
        quantities = {"measured": TABLE[first], "other": TABLE[second]}
        parts = at_least(1.0), at_least(1.0, of="other")
        order = [FAILS, INCONCLUSIVE, HOLDS]
        assert all_of(*parts).judge(quantities).verdict is min(first, second, key=order.index)
        assert any_of(*parts).judge(quantities).verdict is max(first, second, key=order.index)

    @quick
    @given(measurements(), st.lists(criteria(depth=1), min_size=1, max_size=4))
    def test_nesting_and_order_do_not_matter(self, measured, parts):
        for combine in (all_of, any_of):
            flat = judge(combine(*parts), measured)
            assert flat is judge(combine(*reversed(parts)), measured)
            assert flat is judge(combine(parts[0], combine(*parts)), measured)

    @quick
    @given(measurements(), criteria(), criteria())
    def test_a_gate_that_is_not_met_makes_any_outcome_inconclusive(self, measured, main, gate):
        gated = all_of(main, requires=gate)
        expected = judge(main, measured) if judge(gate, measured) is HOLDS else INCONCLUSIVE
        assert judge(gated, measured) is expected

    def test_the_reason_names_the_gate(self):
        criterion = at_least(1.0, requires=at_least(0.9, of="held_out_accuracy"))
        outcome = criterion.judge({"measured": Measurement(0.0), "held_out_accuracy": Measurement(0.5)})
        assert outcome.verdict is INCONCLUSIVE
        assert outcome.reason == "requirement not met: held out accuracy is 0.5, not ≥ 0.9"

    def test_the_design_example_reads_and_decides_as_written(self):
        criterion = all_of(at_least(1.3, by="value"), interval_excludes(1))
        assert criterion.text == "measured ≥ 1.3 (point value) and interval of measured excludes 1"
        assert judge(criterion, Measurement(1.4, 1.1, 1.7)) is HOLDS
        assert judge(criterion, Measurement(1.4, 0.9, 1.7)) is INCONCLUSIVE
        assert judge(criterion, Measurement(1.2, 1.1, 1.7)) is FAILS


class TestData:
    @quick
    @given(criteria())
    def test_a_criterion_survives_json(self, criterion):
        assert Criterion.from_dict(json.loads(json.dumps(criterion.to_dict(), allow_nan=False))) == criterion

    def test_a_gate_survives_json(self):
        criterion = ratio_at_most(0.2, label="slot share", requires=at_least(5, of="sink", minimum_n=3))
        assert Criterion.from_dict(criterion.to_dict()) == criterion

    def test_an_unknown_field_is_named_with_the_nearest(self):
        with pytest.raises(ArgumentError, match="Did you mean 'low'"):
            Criterion.from_dict({"kind": "within", "lo": 1.0})

    def test_numbers_that_json_lacks_survive(self):
        stored = json.dumps(Measurement(math.inf, -math.inf, math.inf, n=1).to_dict(), allow_nan=False)
        assert Measurement.from_dict(json.loads(stored)) == Measurement(math.inf, -math.inf, math.inf, n=1)
        assert math.isnan(Measurement.from_dict(Measurement(math.nan).to_dict()).value)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: at_least(math.nan),
            lambda: at_least("high"),
            lambda: between(2, 1),
            lambda: equals(1, -0.1),
            lambda: all_of(),
            lambda: interval_excludes(1, side="left"),
            lambda: at_least(1, by="luck"),
            lambda: Criterion(kind="within"),
            lambda: Criterion(kind="guess", low=1),
            lambda: Measurement(1.0, low=0.5),
            lambda: Measurement(1.0, 2.0, 0.5),
            lambda: Measurement(1.0, math.nan, 2.0),
            lambda: Measurement(None),
            lambda: Measurement(1.0, n=-1),
        ],
    )
    def test_bad_arguments_raise(self, make):
        with pytest.raises(ArgumentError, match=r"expected|only all_of"):
            make()

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0"),
            (1.3, "1.3"),
            (-0.25, "−0.25"),
            (12345.678, "12,346"),
            (0.00012345, "0.0001234"),
            (1e-9, "1.000e-09"),
            (1500000, "1,500,000"),
            (9.99999, "10"),
            (math.inf, "∞"),
            (math.nan, "not a number"),
        ],
    )
    def test_numbers_read_well(self, value, text):
        assert number(value) == text
