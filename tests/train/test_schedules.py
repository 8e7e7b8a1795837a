"""Schedules against their formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.train import SCHEDULES, constant, cosine, linear, wsd

sizes = st.tuples(st.integers(1, 400), st.integers(0, 400)).map(lambda pair: (pair[0], min(pair[1], pair[0])))


@given(sizes, st.sampled_from(sorted(SCHEDULES)))
def test_every_schedule_rises_in_equal_parts_and_stays_within_the_peak(size, name):
    steps, warmup = size
    share = SCHEDULES[name](steps, warmup=warmup) if name != "wsd" else wsd(steps, warmup=warmup, decay=0)
    assert [share(i) for i in range(warmup)] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    values = [share(i) for i in range(warmup, steps)]
    assert all(0 <= value <= 1 for value in values)
    assert values == sorted(values, reverse=True)


@given(st.integers(1, 300), st.floats(0, 1))
def test_cosine_is_half_a_wave_from_the_peak_to_the_floor(steps, floor):
    share = cosine(steps + 10, warmup=10, floor=floor)
    for i in range(steps):
        expected = floor + (1 - floor) * (1 + math.cos(math.pi * i / steps)) / 2
        assert share(10 + i) == pytest.approx(expected)
    assert share(10 + steps) == pytest.approx(floor)


def test_linear_is_a_straight_line():
    share = linear(12, warmup=2, floor=0.5)
    assert [share(i) for i in (2, 7, 12)] == pytest.approx([1.0, 0.75, 0.5])


def test_constant_stays():
    share = constant(5, warmup=1)
    assert [share(i) for i in (0, 1, 99)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("fall", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_wsd_is_stable_and_then_falls(fall, half):
    share = wsd(100, warmup=10, decay=20, fall=fall)
    assert {share(i) for i in range(10, 81)} == {1.0}
    assert share(90) == pytest.approx(half)
    assert share(100) == pytest.approx(0.0)


def test_wsd_decays_over_a_fifth_unless_told():
    share = wsd(100)
    assert share(80) == 1.0
    assert share(81) == pytest.approx(1 - 1 / 20)


def test_wsd_stable_part_does_not_know_how_long_the_run_is():
    assert [wsd(50, warmup=5, decay=10)(i) for i in range(40)] == [wsd(90, warmup=5, decay=10)(i) for i in range(40)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cosine(0), "steps: got 0"),
        (lambda: cosine(5, warmup=6), "warmup: got 6 steps, expected 0..5"),
        (lambda: cosine(5, floor=2.0), "floor: got 2.0"),
        (lambda: wsd(10, warmup=5, decay=6), "decay: got 6 steps, expected 0..5"),
        (lambda: wsd(10, fall="steep"), "fall: got 'steep'"),
    ],
)
def test_bad_numbers_are_named(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()
