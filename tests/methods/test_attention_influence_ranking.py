"""Choosing by influence: the same share of every domain, ties that do not depend on order, and what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headway.errors import ArgumentError
from headway.methods.diagnosis.attention_influence.influence import Influence
from headway.methods.diagnosis.attention_influence.ranking import rank_texts, repetition_share


def text(score: float, *flags: str, tokens: int = 100) -> Influence:
    return Influence(base_loss=2.0, masked_loss=2.0 * (1 + score), tokens=tokens, influence=score, flags=flags)


def some(count: int, seed: int = 0) -> list[Influence]:
    random = np.random.default_rng(seed)
    return [
        text(float(s), tokens=int(n))
        for s, n in zip(random.normal(size=count), 64 + random.integers(900, size=count), strict=True)
    ]


@pytest.mark.parametrize("count", [1, 4, 5, 6, 30])
@pytest.mark.parametrize("share", [0.1, 0.2, 1.0])
def test_every_domain_keeps_its_share_rounded_up(count, share):
    domains = ["code"] * count + ["prose"] * (2 * count)
    found = rank_texts(some(3 * count), domains, share=share)
    for summary, total in zip(found.domains, (count, 2 * count), strict=True):
        members = np.array(domains) == summary.domain
        assert summary.kept == int(found.kept[members].sum()) == math.ceil(round(share * total, 9))


def test_the_highest_of_a_domain_are_kept():
    found = rank_texts([text(0.1), text(0.9), text(0.5), text(-1.0), text(5.0)], ["a", "a", "a", "a", "b"], share=0.5)
    assert found.kept.tolist() == [False, True, True, False, True]
    assert found.rank.tolist() == [3, 1, 2, 4, 1]
    assert found.domains[0].threshold == 0.5


def test_a_constant_on_one_domain_changes_nothing():
    texts, domains = some(40), ["a", "b"] * 20
    shifted = [text(t.influence + 3 * (d == "b"), tokens=t.tokens) for t, d in zip(texts, domains, strict=True)]
    assert np.array_equal(rank_texts(texts, domains).kept, rank_texts(shifted, domains).kept)


def test_ties_go_by_key_in_any_order():
    texts, keys = [text(0.5)] * 6, list("fbdace")
    kept = {k for k, kept in zip(keys, rank_texts(texts, ["d"] * 6, share=0.5, keys=keys).kept, strict=True) if kept}
    assert kept == {"a", "b", "c"}
    turned = rank_texts(texts, ["d"] * 6, share=0.5, keys=keys[::-1]).kept
    assert {k for k, kept in zip(keys[::-1], turned, strict=True) if kept} == kept


def test_texts_without_a_score_are_put_apart_and_do_not_count():
    texts = [text(0.3), text(math.nan, "empty"), text(9.0, "not-text"), text(0.1), text(8.0, "short")]
    found = rank_texts(texts, ["a"] * 5, share=0.5)
    assert found.quarantine == (1, 2, 4)
    assert found.kept.tolist() == [True, False, False, False, False]
    assert found.rank.tolist() == [1, 0, 0, 2, 0]
    assert "3 of 5 texts are left out" in found.warnings[0]
    assert "1 too short" in found.warnings[0]


def test_one_mixed_domain_is_warned_of():
    assert "compared only within one kind" in rank_texts(some(5)).warnings[0]
    assert not rank_texts(some(5), ["a"] * 5).warnings


def test_a_repetition_score_can_be_taken_off():
    texts = [text(0.9), text(0.8)]
    assert rank_texts(texts, ["a", "a"], share=0.5, repetition=[0.5, 0.0]).kept.tolist() == [True, False]
    found = rank_texts(texts, ["a", "a"], share=0.5, repetition=[0.5, 0.0], repetition_weight=1.0)
    assert found.kept.tolist() == [False, True]
    assert found.score.tolist() == pytest.approx([0.4, 0.8])


def test_correlations_with_length_and_repetition_are_reported():
    texts = [text(n / 10, tokens=100 + n) for n in range(10)]
    summary = rank_texts(texts, ["a"] * 10, repetition=[-n for n in range(10)]).domains[0]
    assert summary.with_length.value == pytest.approx(1)
    assert summary.with_repetition.value == pytest.approx(-1)


def test_repetition_is_the_share_of_runs_said_before():
    assert repetition_share("one two three four five six seven") == 0
    assert repetition_share("a b c d " * 10) > 0.8
    assert repetition_share("a few words") == 0
    assert repetition_share("") == 0


def test_no_texts_give_an_empty_ranking():
    found = rank_texts([], [])
    assert found.kept.size == 0
    assert found.domains == ()


def test_arguments_are_checked():
    with pytest.raises(ArgumentError, match="share: got 0"):
        rank_texts(some(3), ["a"] * 3, share=0)
    with pytest.raises(ArgumentError, match="domains: got 2 for 3 texts"):
        rank_texts(some(3), ["a"] * 2)
    with pytest.raises(ArgumentError, match="same key twice"):
        rank_texts(some(3), ["a"] * 3, keys=["x", "x", "y"])
    with pytest.raises(ArgumentError, match="weight without repetition"):
        rank_texts(some(3), ["a"] * 3, repetition_weight=0.5)
    with pytest.raises(ArgumentError, match="repetition_weight: got -1"):
        rank_texts(some(3), ["a"] * 3, repetition=[0, 0, 0], repetition_weight=-1)
