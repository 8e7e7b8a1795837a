"""Which sentences decide the answer, from rollouts.

    resampling      KL( P(a | D_i) ‖ P(a | D_i+1) )                       the sentence drawn anew against kept
    counterfactual  KL( P(a | D_i, t_i differs from s_i) ‖ P(a | D_i+1 ∪ D_i, t_i like s_i) )
    forced          KL( P(a | answer now, without s_i) ‖ P(a | answer now, with s_i) )
    accuracy        P(right | with s_i) − P(right | without): positive where the sentence helps

Paper: Thought Anchors, arXiv 2506.19143. D_i are rollouts from the prefix before s_i, t_i their first sentences. The
released code adds 1e-9 to frequencies, so an answer that one side lacks makes the KL explode; here every answer gets
half a count, and every value its interval and the null that nothing changed. Its counterfactual accuracy has the other
sign (negative where the sentence helps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from headway.errors import ArgumentError
from headway.methods.diagnosis.thought_anchors.answers import Extractor, normalised
from headway.methods.diagnosis.thought_anchors.rollouts import Rollout, answers_of
from headway.methods.diagnosis.thought_anchors.sentences import Trace
from headway.methods.diagnosis.thought_anchors.similarity import CONTAINED_FROM, DIFFERENT_BELOW, Encoder, cosines
from headway.statistics import Measurement, bootstrap_difference
from headway.statistics.categorical import answer_divergence, same_answers

#: Whether an answer is right.
Checker = Callable[[str], bool]
#: Differing rollouts below which counterfactual importance is undefined.
LEAST_DIFFERENT = 5
UNDEFINED = Measurement(math.nan, n=0, unit="nats")


@dataclass(frozen=True)
class Effect:
    """A change of the answers: KL in nats with its interval, the p-value that there is none, and the change of accuracy
    where answers can be checked."""

    divergence: Measurement
    p_value: float
    accuracy: Measurement | None = None


@dataclass(frozen=True)
class Importance:
    """What rollouts say of a sentence. `different` is the share of D_i that says something else there;
    `overdetermined` is 1 − distinct first sentences / |D_i|, high where the model hardly has a choice. `forced` is None
    where no answers were forced."""

    sentence: int
    resampling: Effect
    counterfactual: Effect
    different: float
    overdetermined: float
    forced: Effect | None = None


def sentence_importance(
    trace: Trace,
    rollouts: Mapping[int, Sequence[Rollout]],
    *,
    extract: Extractor,
    encoder: Encoder,
    forced: Mapping[int, Sequence[Rollout]] | None = None,
    different_below: float | str = DIFFERENT_BELOW,
    least_different: int = LEAST_DIFFERENT,
    check: Checker | None = None,
    generator: np.random.Generator | int = 0,
) -> list[Importance]:
    """The importance of every sentence i for which D_i and D_i+1 were drawn.

    different_below: the cosine under which t_i differs from s_i, or "median" of all cosines of D_i. least_different:
    rollouts that must differ for a counterfactual value; half a count for each answer would outweigh fewer. check:
    whether an answer is right; by default it is compared with `trace.answer` where there is one."""
    random = np.random.default_rng(generator)
    right = check if check is not None else answer_checker(trace.answer)
    found = []
    for i in range(len(trace)):
        if not rollouts.get(i) or not rollouts.get(i + 1):
            continue
        without, kept = rollouts[i], rollouts[i + 1]
        differs = differing(trace.sentences[i], without, encoder, below=different_below)
        a, b = answers_of(without, extract, trace), answers_of(kept, extract, trace)
        changed = [x for x, d in zip(a, differs, strict=True) if d]
        alike = [x for x, d in zip(a, differs, strict=True) if not d]
        pair = None
        if forced is not None and forced.get(i) and forced.get(i + 1):
            pair = effect(answers_of(forced[i], extract), answers_of(forced[i + 1], extract), random, right)
        found.append(
            Importance(
                sentence=i,
                resampling=effect(a, b, random, right),
                counterfactual=effect(changed, b + alike, random, right)
                if len(changed) >= least_different and b
                else _undefined(right),
                different=float(np.mean(differs)),
                overdetermined=1 - len({" ".join(r.first.split()) for r in without}) / len(without),
                forced=pair,
            )
        )
    return found


def effect(
    without: Sequence[str], kept: Sequence[str], generator: np.random.Generator | int, right: Checker | None = None
) -> Effect:
    """The change of answers from those `without` a sentence to those with it `kept`; undefined where a side is empty.

    The same answers in the same numbers give exactly 0."""
    if not without or not kept:
        return _undefined(right)
    divergence = answer_divergence(without, kept, generator=generator)
    p_value = same_answers(without, kept, generator=generator).p_value
    if right is None:
        return Effect(divergence, p_value)
    good = [[float(right(a)) for a in side] for side in (kept, without)]
    return Effect(divergence, p_value, bootstrap_difference(*good, paired=False, generator=generator, resamples=1000))


def differing(
    sentence: str, rollouts: Sequence[Rollout], encoder: Encoder, *, below: float | str = DIFFERENT_BELOW
) -> Bool[np.ndarray, " rollouts"]:
    """Which rollouts say something else in place of `sentence`. One that says nothing at all does."""
    firsts = [r.first for r in rollouts]
    close = cosines(encoder, sentence.strip(), [f or "∅" for f in firsts])
    if isinstance(below, str):
        if below != "median":
            raise ArgumentError(f"different_below: got {below!r}, expected a cosine or 'median'.")
        below = float(np.median(close))
    if not -1 <= below <= 1:
        raise ArgumentError(f"different_below: got {below}, expected a cosine between −1 and 1; the paper uses 0.8.")
    return (close < below) | np.array([not f for f in firsts])


def sentence_to_sentence(
    trace: Trace,
    rollouts: Mapping[int, Sequence[Rollout]],
    encoder: Encoder,
    *,
    contained_from: float = CONTAINED_FROM,
) -> Float[np.ndarray, "n n"]:
    """Entry (j, i): how much more often rollouts with s_i kept come to say s_j (j > i) than rollouts without it.

    A rollout says s_j when one of its sentences has a cosine of at least `contained_from` with it. NaN where D_i or
    D_i+1 was not drawn."""
    count = len(trace)
    found = np.full((count, count), np.nan)
    for j in range(1, count):
        said = {
            i: _says(trace.sentences[j].strip(), rollouts[i], encoder, contained_from)
            for i in range(j + 1)
            if rollouts.get(i)
        }
        for i in range(j):
            if i in said and i + 1 in said:
                found[j, i] = said[i + 1] - said[i]
    return found


def settled_starts(
    trace: Trace, *, extract: Extractor, width: float, generator: int = 0
) -> Callable[[dict[int, list[Rollout]]], set[int]]:
    """For `collect`: a start needs no more rollouts once the resampling importances on both of its sides have intervals
    of at most `width` nats."""
    if not width > 0:
        raise ArgumentError(f"width: got {width}, expected a width in nats above 0.")

    def settled(found: dict[int, list[Rollout]]) -> set[int]:
        narrow = {}
        for i in found:
            if i + 1 in found and found[i] and found[i + 1]:
                sides = answers_of(found[i], extract, trace), answers_of(found[i + 1], extract, trace)
                interval = answer_divergence(*sides, generator=generator, resamples=300)
                narrow[i] = interval.high is not None and interval.high - (interval.low or 0.0) <= width
        return {i for i in found if all(narrow[k] for k in (i - 1, i) if k in narrow)}

    return settled


def answer_checker(answer: str | None) -> Checker | None:
    """Whether an answer is the right one; None where that is not known."""
    if answer is None:
        return None
    wanted = normalised(answer)
    return lambda given: given == wanted


def _says(sentence: str, rollouts: Sequence[Rollout], encoder: Encoder, least: float) -> float:
    parts = [r.sentences() for r in rollouts]
    flat: list[Any] = [s for sentences in parts for s in sentences]
    if not flat:
        return 0.0
    close = cosines(encoder, sentence, flat) >= least
    ends = np.cumsum([len(p) for p in parts])
    return float(np.mean([bool(close[end - len(p) : end].any()) for p, end in zip(parts, ends, strict=True)]))


def _undefined(right: Checker | None) -> Effect:
    return Effect(UNDEFINED, math.nan, None if right is None else Measurement(math.nan, n=0))
