"""Losses, costs, the frontier, and the sentence that recommends, on numbers that are known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.compare import pareto
from headway.compare.cells import FAILED, LEFT_OUT, REFUSED, Cell, paired_ratio
from headway.compare.recommend import loss_words, recommend
from headway.compare.result import Loss
from headway.errors import ArgumentError
from tests.compare.made import made, made_cells, made_timing

FAST = made_timing(0.5, 0.005)
SLOW = made_timing(3.0, 0.03)
SAME = made_timing(1.0, 0.01, spread=0.2)


def test_losses_are_the_rise_of_perplexity_and_the_drop_of_scores():
    found = made(made_cells("a", 0.5, nll=2.1, right=[1.0] * 6 + [0.0] * 2)).point("a", 0.5)
    by_name = {loss.label: loss for loss in found.losses}
    assert by_name["perplexity"].value == pytest.approx(math.exp(0.1) - 1)
    assert by_name["needle, blind"].value == pytest.approx(0.25)
    assert found.worst.label == "needle, blind"


def test_the_interval_of_a_loss_is_paired_so_equal_blocks_give_none():
    loss = made(made_cells("a", 0.5, nll=2.1)).point("a", 0.5).losses[0]
    assert (loss.low, loss.high) == (pytest.approx(loss.value), pytest.approx(loss.value))


def test_costs_are_multiples_of_dense_and_dense_costs_one():
    found = made(made_cells("a", 0.5, timing=FAST, cache_bytes=250, density=0.5))
    assert found.point("a", 0.5).costs == pytest.approx(
        {"request": 0.5, "prefill": 0.5, "decode": 0.5, "memory": 0.25, "density": 0.5}, rel=0.02
    )
    assert set(found.dense.costs.values()) == {1.0}


def test_the_cheapest_point_within_the_tolerance_is_recommended():
    found = made(
        made_cells("good", 0.5, timing=made_timing(0.8, 0.008)),
        made_cells("better", 0.25, timing=FAST),
        made_cells("poor", 0.125, nll=3.0, timing=made_timing(0.1, 0.001)),
    ).recommendation
    assert (found.label, found.saves) == ("better at 25 %", "request")
    assert "0.50 × dense's time" in found.sentence
    assert "nothing" in found.sentence


def test_a_larger_tolerance_allows_a_cheaper_point_and_the_sentence_says_what_it_costs():
    points = (made_cells("a", 0.5, timing=FAST), made_cells("b", 0.25, nll=2.15, timing=made_timing(0.2, 0.002)))
    assert made(*points).recommendation.label == "a at 50 %"
    found = made(*points, tolerance=0.2).recommendation
    assert found.label == "b at 25 %"
    assert "raises perplexity by 16 %" in found.sentence
    assert "20 % allowed" in found.sentence


def test_a_difference_in_time_within_noise_recommends_nothing_and_says_so():
    found = made(made_cells("a", 0.5, timing=SAME)).recommendation
    assert found.label == "dense"
    assert found.sentence.startswith("Stay dense")
    assert "within noise" in found.sentence


def test_fewer_bytes_are_recommended_when_time_is_noise_and_the_sentence_says_that_time_is():
    found = made(made_cells("a", 0.25, timing=SAME, cache_bytes=250)).recommendation
    assert (found.label, found.saves) == ("a at 25 %", "memory")
    assert "0.25 × the KV bytes" in found.sentence
    assert "beyond noise: request time" in found.sentence


def test_fewer_bytes_at_three_times_the_time_are_taken_only_when_asked_for():
    point = made_cells("a", 0.25, timing=SLOW, cache_bytes=250)
    stay = made(point).recommendation
    assert stay.label == "dense"
    assert "--save memory" in stay.sentence
    assert made(point, save="memory").recommendation.label == "a at 25 %"
    assert made(point, save="time").recommendation.label == "dense"


def test_a_lead_over_another_point_within_noise_is_named():
    sentence = made(
        made_cells("a", 0.5, timing=made_timing(0.5, 0.005, spread=0.3)),
        made_cells("b", 0.5, timing=made_timing(0.52, 0.0052, spread=0.3)),
    ).recommendation.sentence
    assert "Its lead in time over b at 50 % is within noise." in sentence


def test_when_every_point_loses_too_much_the_nearest_is_named():
    found = made(made_cells("a", 0.5, nll=2.5, timing=FAST), made_cells("b", 0.5, nll=2.3, timing=FAST)).recommendation
    assert found.label == "dense"
    assert "every point loses more than the 5 % allowed" in found.sentence
    assert "b at 50 %" in found.sentence


def test_a_task_that_dense_cannot_do_does_not_count_and_is_named():
    cells = made_cells("dense", None, right=[0.0] * 8)
    from headway.compare.judge import conclude
    from headway.compare.methods import Candidate
    from tests.compare.made import RUN

    chosen = [Candidate(method="dense", summary="", budget=None)]
    found = conclude(chosen, [cells], {}, dict(RUN))
    assert found.judged == [("perplexity", "")]
    assert any("needle, blind (0)" in sentence for sentence in found.warnings)


@pytest.mark.parametrize(
    ("status", "word"), [(REFUSED, "refused"), (FAILED, "broke on"), (LEFT_OUT, "cannot be shown")]
)
def test_what_was_not_measured_is_named_with_its_reason_and_takes_the_point_out(status, word):
    cells = made_cells("a", 0.5, timing=FAST)
    cells[1] = Cell(method="a", budget=0.5, task="needle, blind", status=status, reason="because of that")
    found = made(cells)
    assert found.point("a", 0.5).states == {"needle, blind": status}
    assert any(word in s and "because of that" in s and "needle, blind" in s for s in found.warnings)
    assert found.recommendation.label == "dense"


def test_a_budget_without_effect_is_named():
    assert any("no effect" in s for s in made(made_cells("a", 0.5, density=1.0)).warnings)
    assert not any("no effect" in s for s in made(made_cells("a", 0.5, density=0.5)).warnings)


def test_few_samples_and_a_busy_machine_are_named():
    sentences = made(made_cells("a", 0.5, density=0.5), load_average=3.0).warnings
    assert any("8 samples" in s for s in sentences)
    assert any("load average was 3" in s for s in sentences)


def test_an_unknown_thing_to_save_is_refused():
    with pytest.raises(ArgumentError, match="memory"):
        recommend([], [], tolerance=0.1, save="money")


def test_loss_words_name_the_unit_and_the_direction():
    assert loss_words(Loss(task="perplexity", mode="", value=0.012, low=0.003, high=0.02)) == (
        "raises perplexity by 1.2 % (0.3 to 2 %)"
    )
    assert loss_words(Loss(task="needle", mode="blind", value=0.25, low=0.0, high=0.5)) == (
        "loses 25 points of 100 on needle, blind (0 to 50)"
    )
    assert "5 % allowed" in loss_words(Loss(task="perplexity", mode="", value=0.01, low=0.0, high=0.02), 0.05)
    assert "nothing" in loss_words(Loss(task="perplexity", mode="", value=-0.01, low=-0.02, high=0.0))


def test_the_ratio_is_that_of_pairs_so_common_drift_cancels():
    drift = [1.0, 2.0, 4.0, 8.0]
    found = paired_ratio([0.5 * d for d in drift], drift)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.is_faster
    assert paired_ratio([1.1, 0.9, 1.2, 0.8], [1.0] * 4).is_noise
    assert math.isnan(paired_ratio([1.0], [1.0]).value)


def test_the_frontier_of_known_points():
    assert pareto([1.0, 0.9, 0.5, 0.95], [1.0, 0.5, 0.6, 0.5]) == [3, 0]
    assert pareto([5.0, 6.0, 9.0], [1.0, 0.5, 0.7], higher_is_better=False) == [1, 0]
    assert pareto([math.nan, 1.0], [0.1, math.inf]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_nothing_on_the_frontier_is_beaten_and_everything_else_is(pairs):
    qualities, costs = [float(q) for q, _ in pairs], [float(c) for _, c in pairs]
    front = pareto(qualities, costs)

    def beaten(i: int) -> bool:
        return any(
            qualities[j] >= qualities[i]
            and costs[j] <= costs[i]
            and (qualities[j], costs[j]) != (qualities[i], costs[i])
            for j in range(len(pairs))
        )

    assert not any(beaten(i) for i in front)
    kept = {(qualities[i], costs[i]) for i in front}
    assert all(beaten(i) or (qualities[i], costs[i]) in kept for i in range(len(pairs)))
