"""Choosing texts by influence: the same share of every domain.

    kept of domain d = the ceil(p · n_d) texts with the highest score ,   score = AI − λ · repetition

n_d counts the texts of the domain that have a usable score and are not too short; the others are listed apart. Scores
are compared within a domain only, since losses of code and of prose differ in scale. Ties go by key. Influence goes
with length, and with repetition, since a text that repeats itself can be copied; both correlations are reported for
every domain. Copies of whole texts are to be left out before.

Paper: AttentionInfluence, arXiv 2505.07293 (p = 0.2 per domain). λ is ours, 0 by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from headway.errors import ArgumentError
from headway.methods.diagnosis.attention_influence.influence import QUARANTINED, Influence
from headway.statistics import Measurement, rank_correlation

SHARE = 0.2
#: Words of a run that counts as said again.
REPEATED_WORDS = 4
#: A text with one of these flags is not ranked: it has no score, or is too short for one that means much.
UNRANKED = QUARANTINED | {"short"}


@dataclass(frozen=True, kw_only=True)
class DomainSummary:
    """One domain: its texts, those with a usable score, how many are kept, the score from which on, the mean score, and
    Spearman's ρ of the score with length (predicted tokens) and with repetition."""

    domain: str
    texts: int
    usable: int
    kept: int
    threshold: float
    mean: float
    with_length: Measurement
    with_repetition: Measurement


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """Which texts are kept. `rank` is 1 for the highest score of a domain, 0 for a text without a usable score (its
    number is in `quarantine`)."""

    kept: Bool[np.ndarray, " texts"]
    score: Float[np.ndarray, " texts"]
    rank: Int[np.ndarray, " texts"]
    quarantine: tuple[int, ...]
    domains: tuple[DomainSummary, ...]
    warnings: tuple[str, ...]


def rank_texts(
    influences: Sequence[Influence],
    domains: Sequence[str] | None = None,
    *,
    share: float = SHARE,
    keys: Sequence[str] | None = None,
    repetition: Sequence[float] | None = None,
    repetition_weight: float = 0.0,
    seed: int = 0,
) -> Ranking:
    """Keeps the top `share` of every domain.

    `keys` break ties and so make the result independent of the order of the texts (by number when not given).
    `repetition` holds a score per text (`repetition_share`), of which `repetition_weight` times is taken off. Without
    `domains` all texts are one domain, with a warning."""
    count = len(influences)
    _check(count, domains, keys, repetition, share, repetition_weight)
    names = ["all"] * count if domains is None else [str(domain) for domain in domains]
    repeated = np.full(count, np.nan) if repetition is None else np.asarray(repetition, dtype=float)
    score = np.array([each.influence for each in influences], dtype=float)
    if repetition is not None and repetition_weight:
        score = score - repetition_weight * repeated
    usable = np.array([not UNRANKED & set(each.flags) for each in influences], dtype=bool) & np.isfinite(score)
    tie = [f"{i:020d}" for i in range(count)] if keys is None else list(keys)
    kept, rank = np.zeros(count, dtype=bool), np.zeros(count, dtype=int)
    summaries = []
    length = np.array([each.tokens for each in influences], dtype=float)
    for domain in sorted(set(names)):
        members = [i for i in range(count) if names[i] == domain]
        order = sorted((i for i in members if usable[i]), key=lambda i: (-score[i], tie[i]))
        most = math.ceil(share * len(order) - 1e-9)
        kept[order[:most]] = True
        rank[order] = np.arange(1, len(order) + 1)
        summaries.append(
            DomainSummary(
                domain=domain,
                texts=len(members),
                usable=len(order),
                kept=most,
                threshold=float(score[order[most - 1]]) if most else math.nan,
                mean=float(score[order].mean()) if order else math.nan,
                with_length=_correlation(score[order], length[order], seed),
                with_repetition=_correlation(score[order], repeated[order], seed),
            )
        )
    return Ranking(
        kept=kept,
        score=score,
        rank=rank,
        quarantine=tuple(np.flatnonzero(~usable).tolist()),
        domains=tuple(summaries),
        warnings=tuple(_warnings(influences, domains, usable)),
    )


def repetition_share(text: str, *, words: int = REPEATED_WORDS) -> float:
    """The share of runs of `words` words that stood in the text before: 0 for a text that says everything once."""
    runs = _runs(text.split(), words)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _runs(words: Sequence[str], size: int) -> list[str]:
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]


def _correlation(score: np.ndarray, other: np.ndarray, seed: int) -> Measurement:
    if len(score) < 3 or not np.isfinite(other).all():
        return Measurement(math.nan, n=len(score))
    return rank_correlation(score, other, generator=np.random.default_rng(seed))


def _warnings(influences: Sequence[Influence], domains: Sequence[str] | None, usable: np.ndarray) -> list[str]:
    found = []
    if domains is None:
        found.append(
            "No domains were given: all texts are ranked together, and scores can be compared only within one kind of "
            "text. Name a field that holds the domain."
        )
    lost = int((~usable).sum())
    if lost:
        short = sum("short" in each.flags for each in influences)
        found.append(
            f"{lost} of {len(usable)} texts are left out of the ranking: {short} too short, the others without a "
            "usable score."
        )
    return found


def _check(
    count: int,
    domains: Sequence[str] | None,
    keys: Sequence[str] | None,
    repetition: Sequence[float] | None,
    share: float,
    weight: float,
) -> None:
    if not 0 < share <= 1:
        raise ArgumentError(f"share: got {share}, expected the part of each domain to keep, in (0, 1].")
    for name, given in (("domains", domains), ("keys", keys), ("repetition", repetition)):
        if given is not None and len(given) != count:
            raise ArgumentError(f"{name}: got {len(given)} for {count} texts, expected one for each.")
    if keys is not None and len(set(keys)) != count:
        raise ArgumentError("keys: got the same key twice, expected a different one for each text.")
    if weight < 0 or not math.isfinite(weight):
        raise ArgumentError(f"repetition_weight: got {weight}, expected a number of at least 0.")
    if weight and repetition is None:
        raise ArgumentError("repetition_weight: got a weight without repetition, expected a repetition score per text.")
