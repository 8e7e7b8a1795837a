"""CRAS, the role-adherence score of conversations, and how far judges agree.

    CRAS(q) = mean over turns of Σ_d w_d s_d ,   w_d = 1/4 ;   CRAS = mean over queries ;   unit form (CRAS − 1) / 4

Marks are kept as they come, under a fingerprint of turn, rubric and judge: a run that was interrupted goes on behind
the last of them, and no turn is marked twice.

    agreement of two judges    Cohen's κ of the rounded marks, plain and with quadratic weights; Spearman's ρ

Paper: Diagnose, Localize, Align, arXiv 2509.23188; it does not say how marks are put together, which is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from headway.errors import ArgumentError, unknown
from headway.methods.diagnosis.diagnose_localize_align.conversations import Turn
from headway.methods.diagnosis.diagnose_localize_align.judges import Judge, Judgement, fingerprint
from headway.methods.diagnosis.diagnose_localize_align.rubric import DIMENSIONS, HIGHEST, LOWEST, Rubric, rubric_for
from headway.parts import Parts
from headway.statistics import Measurement, bootstrap, bootstrap_difference, rank_correlation


@dataclass(frozen=True)
class Scored:
    """One marked turn."""

    conversation: str
    index: int
    role: str
    condition: str
    judge: str
    scores: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    invalid: str = ""
    general: bool = False
    key: str = ""

    @property
    def place(self) -> tuple[str, str, int]:
        """Which turn it is."""
        return self.conversation, self.condition, self.index

    def value(self, weights: Mapping[str, float] | None = None) -> float:
        """Σ w_d s_d, weights normalised to 1."""
        return turn_score(self.scores, weights)


@dataclass(frozen=True)
class Cras:
    """The score with its interval over queries, the same in [0, 1], the mean mark by dimension, and the counts."""

    score: Measurement
    unit: float
    dimensions: Mapping[str, float]
    queries: int
    turns: int
    invalid: int
    general: int


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same turns: by dimension and for the whole score ("all"). `kappa` is plain,
    `weighted_kappa` quadratic, both NaN where neither judge ever changes its mark."""

    kappa: Mapping[str, float]
    weighted_kappa: Mapping[str, float]
    spearman: Mapping[str, Measurement]
    difference: Mapping[str, float]
    turns: int


def score_turns(
    turns: Sequence[Turn],
    judge: Judge,
    *,
    rubrics: Mapping[str, Rubric] | None = None,
    kept: Parts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """Marks of every turn, in the order of turns. Marks that are `kept` are used, and new ones are kept as they come.

    A mark that the judge could not give is stored as invalid and not asked for again."""
    store, found = Parts() if kept is None else kept, []
    for number, turn in enumerate(turns):
        rubric, general = rubric_for(turn.role, rubrics)
        key = fingerprint(turn, rubric, judge)
        row = store.data(["marks", key], partial(_marked, turn, judge, rubric, general, key))
        found.append(Scored(**row))
        if progress is not None:
            progress(number + 1, len(turns))
    return found


def turn_score(scores: Mapping[str, float], weights: Mapping[str, float] | None = None) -> float:
    """Σ_d w_d s_d of one turn; equal weights by default."""
    given = dict.fromkeys(DIMENSIONS, 1.0) if weights is None else dict(weights)
    for name in given:
        if name not in DIMENSIONS:
            raise unknown("weights", name, DIMENSIONS)
    total = sum(given.values())
    if total <= 0 or any(weight < 0 for weight in given.values()):
        raise ArgumentError(f"weights: got {given}, expected numbers of at least 0, not all 0.")
    return sum(weight * scores[name] for name, weight in given.items()) / total


def cras(scored: Sequence[Scored], *, weights: Mapping[str, float] | None = None, generator: Any = 0) -> Cras:
    """The score of a set of marked turns. Turns are averaged within a query, queries among each other; invalid turns
    stay out and are counted. Raises ArgumentError when no valid turn is left."""
    valid = [one for one in scored if not one.invalid]
    if not valid:
        raise ArgumentError(f"scored: got {len(scored)} turns, none with valid marks; expected at least one.")
    queries: dict[tuple[str, str], list[Scored]] = {}
    for one in valid:
        queries.setdefault((one.conversation, one.condition), []).append(one)
    values = [float(np.mean([one.value(weights) for one in group])) for group in queries.values()]
    table = {
        name: float(np.mean([np.mean([one.scores[name] for one in group]) for group in queries.values()]))
        for name in DIMENSIONS
    }
    score = _within_marks(bootstrap(values, generator=generator))
    return Cras(
        score=score,
        unit=(score.value - LOWEST) / (HIGHEST - LOWEST),
        dimensions=table,
        queries=len(queries),
        turns=len(valid),
        invalid=len(scored) - len(valid),
        general=sum(one.general for one in valid),
    )


def by_query(
    scored: Sequence[Scored], *, condition: str | None = None, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """CRAS of each conversation that has a valid turn, of one condition or of all."""
    groups: dict[str, list[float]] = {}
    for one in scored:
        if not one.invalid and condition in (None, one.condition):
            groups.setdefault(one.conversation, []).append(one.value(weights))
    return {name: float(np.mean(values)) for name, values in groups.items()}


def lost(
    scored: Sequence[Scored], before: str, after: str, *, weights: Mapping[str, float] | None = None, generator: Any = 0
) -> Measurement | None:
    """CRAS under the condition `before` minus that under `after`, over the conversations marked in both; None where
    none is."""
    first, second = (by_query(scored, condition=name, weights=weights) for name in (before, after))
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    return bootstrap_difference([first[n] for n in both], [second[n] for n in both], paired=True, generator=generator)


def agreement(first: Sequence[Scored], second: Sequence[Scored], *, generator: Any = 0) -> Agreement:
    """Two judges on the turns that both marked. Raises ArgumentError for fewer than three."""
    others = {one.place: one for one in second if not one.invalid}
    pairs = [(one, others[one.place]) for one in first if not one.invalid and one.place in others]
    if len(pairs) < 3:
        raise ArgumentError(f"first, second: got {len(pairs)} turns that both marked, expected 3 or more.")
    columns = {name: ([a.scores[name] for a, _ in pairs], [b.scores[name] for _, b in pairs]) for name in DIMENSIONS}
    columns["all"] = ([a.value() for a, _ in pairs], [b.value() for _, b in pairs])
    rounded = {name: (_whole(a), _whole(b)) for name, (a, b) in columns.items()}
    return Agreement(
        kappa={name: cohen_kappa(a, b) for name, (a, b) in rounded.items()},
        weighted_kappa={name: cohen_kappa(a, b, quadratic=True) for name, (a, b) in rounded.items()},
        spearman={name: rank_correlation(a, b, generator=generator) for name, (a, b) in columns.items()},
        difference={name: float(np.mean(np.abs(np.subtract(a, b)))) for name, (a, b) in columns.items()},
        turns=len(pairs),
    )


def cohen_kappa(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " n"], *, quadratic: bool = False) -> float:
    """κ = 1 − Σ w_ij o_ij / Σ w_ij e_ij over the marks 1 to 5: o observed, e expected from the margins, w 1 off the
    diagonal or (i − j)². NaN where both judges give one and the same mark to everything (J. Cohen 1960, 1968)."""
    levels = int(HIGHEST)
    table = np.zeros((levels, levels))
    for a, b in zip(np.asarray(first), np.asarray(second), strict=True):
        table[int(a) - 1, int(b) - 1] += 1
    expected = np.outer(table.sum(1), table.sum(0)) / max(table.sum(), 1)
    gap = np.subtract.outer(np.arange(levels), np.arange(levels))
    cost = gap**2.0 if quadratic else (gap != 0).astype(float)
    chance = float((cost * expected).sum())
    return float("nan") if chance == 0 else 1 - float((cost * table).sum()) / chance


def _within_marks(found: Measurement) -> Measurement:
    """The interval cut to the range that a mean of marks can have."""
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, LOWEST), high=min(found.high, HIGHEST))


def _whole(marks: Sequence[float]) -> Int[np.ndarray, " n"]:
    """Marks rounded to 1..5, halves upwards."""
    values: Float[np.ndarray, " n"] = np.floor(np.asarray(marks, dtype=float) + 0.5)
    return np.clip(values, LOWEST, HIGHEST).astype(int)


def _checked(marked: Judgement) -> Judgement:
    """The same range for every judge: marks that are missing or outside 1 to 5 are invalid."""
    if marked.invalid:
        return marked
    for name in DIMENSIONS:
        value = marked.scores.get(name)
        if value is None or not LOWEST <= value <= HIGHEST:
            return Judgement({}, invalid=f"{name}: the mark is {value!r}, expected a number from 1 to 5")
    return marked


def _marked(turn: Turn, judge: Judge, rubric: Rubric, general: bool, key: str) -> dict[str, Any]:
    marked = _checked(judge.judge(turn, rubric))
    return asdict(
        Scored(
            turn.conversation, turn.index, turn.role, turn.condition, judge.name, dict(marked.scores),
            dict(marked.reasons), marked.invalid, general, key,
        )
    )  # fmt: skip
