"""Names for patterns: one label per head, from the profiles of all sites of a model.

The first rule that fits gives the label.

    seasonal     rows return after L steps, and the queries before RoPE return after the same L
    retrieval    the queries are less alike than the threshold: the head looks for something new at every step
    re-access    r_0 > r_1: the same keys stay attended (sinks, vertical stripes)
    periodic     logits repeat along the keys with the period 2π/θ of the dominant rotary pair
    sequential   r_1 > r_0: attention moves on with the tokens (diagonals)
    mixed        none of these

TAPPA (arXiv 2601.21709) names the classes and the theory; these rules are Headway's. Seasonal comes before retrieval
since queries that go round in a long cycle are unlike each other and yet predictable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headway.errors import ArgumentError
from headway.methods.long_context.tappa.profile import PatternProfile

MEANING = {
    "seasonal": "Attention returns after a fixed number of steps, as the queries do: it follows a cycle of the text.",
    "retrieval": "Queries change from step to step, so the pattern cannot be foretold: the head looks things up.",
    "re-access": "The same tokens are read at every step: vertical stripes, such as an attention sink.",
    "periodic": "Diagonals repeat at the period of the rotary pair that dominates the head.",
    "sequential": "Attention moves on with the tokens: diagonals at a fixed distance.",
    "mixed": "Predictable by its queries, but none of the simple shapes stands out.",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When a rule fits.

    percentile: heads below this percentile of query similarity over all heads of the model are unpredictable, unless a
    threshold is given. pairs, stage: which query similarity is meant. strength: least r_0 or r_1 of re-access and
    sequential. margin: how far r_0 and r_1 must lie apart. tolerance: relative error of a lag against a period (one
    token is always allowed). prominence: how far a peak of a curve must stand out. dominant_share, dominant_ratio: a
    pair dominates with at least this share of the energy, or this many times the median share."""

    threshold: float | None = None
    percentile: float = 25.0
    pairs: str = "all"
    stage: str = "pre_rope"
    strength: float = 0.5
    margin: float = 0.02
    tolerance: float = 0.1
    prominence: float = 0.1
    dominant_share: float = 0.5
    dominant_ratio: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ArgumentError(f"percentile: got {self.percentile}, expected 0 to 100.")
        for name in ("strength", "tolerance", "prominence", "dominant_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ArgumentError(f"{name}: got {value}, expected a number from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class HeadPatterns:
    """Labels of the heads of one site and what they rest on. `dominant_pair` is −1 and a lag 0 where there is none."""

    site: str
    layer: int
    labels: list[str]
    predictable: np.ndarray
    similarity: np.ndarray
    threshold: float
    dominant_pair: np.ndarray
    dominant_period: np.ndarray
    repeat_lag: np.ndarray
    return_lag: np.ndarray
    query_lag: np.ndarray


def classify(profiles: Sequence[PatternProfile], rules: Rules | None = None) -> list[HeadPatterns]:
    """Labels for all heads of all profiles. The threshold is one for the whole model, so pass all of its sites."""
    rules = rules or Rules()
    if not profiles:
        raise ArgumentError("profiles: got none, expected the profiles of a model's sites. Observe a forward first.")
    similarities = [profile.query_similarity.pick(rules.pairs, rules.stage) for profile in profiles]
    threshold = rules.threshold
    if threshold is None:
        threshold = float(np.percentile(np.concatenate(similarities), rules.percentile))
    return [_site(p, s, threshold, rules) for p, s in zip(profiles, similarities, strict=True)]


def dominant_pairs(shares: np.ndarray, *, share: float = 0.5, ratio: float = 3.0) -> np.ndarray:
    """The pair with the largest energy of each head (heads, pairs), −1 where it does not dominate."""
    if not shares.shape[1]:
        return np.full(shares.shape[0], -1)
    largest = shares.max(1)
    dominates = (largest >= share) | (largest >= ratio * np.median(shares, axis=1))
    return np.where(dominates & ~np.isnan(largest), shares.argmax(1), -1)


def peak_lag(curve: np.ndarray, prominence: float = 0.1) -> int:
    """The first lag ≥ 2 at which a curve over lags 0, 1, 2, … peaks about as high as it ever does again; 0 for none.

    Later peaks of a repeating curve are multiples of the first, so the first within `prominence` of the highest
    counts."""
    from scipy.signal import find_peaks

    known = curve[: int(np.isnan(curve).argmax())] if np.isnan(curve).any() else curve
    peaks = find_peaks(known[1:], prominence=prominence)[0] + 1
    if not len(peaks):
        return 0
    return int(peaks[known[peaks] >= known[peaks].max() - prominence][0])


def _site(profile: PatternProfile, similarity: np.ndarray, threshold: float, rules: Rules) -> HeadPatterns:
    pair = dominant_pairs(profile.channel_shares, share=rules.dominant_share, ratio=rules.dominant_ratio)
    period = np.array([profile.periods[m] if m >= 0 else np.nan for m in pair], dtype=float)
    repeat, returned, of_query = (
        np.array([peak_lag(curve, rules.prominence) for curve in curves])
        for curves in (profile.autocorrelation, profile.returns, profile.query_autocorrelation)
    )
    predictable = similarity >= threshold
    labels = []
    for head in range(profile.heads):
        if _matches(returned[head], of_query[head], rules):
            labels.append("seasonal")
        elif not predictable[head]:
            labels.append("retrieval")
        else:
            matched = _matches(repeat[head], period[head], rules)
            labels.append(_shape(profile.vertical[head], profile.diagonal[head], matched, rules))
    return HeadPatterns(
        site=profile.site,
        layer=profile.layer,
        labels=labels,
        predictable=predictable,
        similarity=similarity,
        threshold=threshold,
        dominant_pair=pair,
        dominant_period=period,
        repeat_lag=repeat,
        return_lag=returned,
        query_lag=of_query,
    )


def _shape(vertical: float, diagonal: float, repeats: bool, rules: Rules) -> str:
    if vertical >= rules.strength and vertical > diagonal + rules.margin:
        return "re-access"
    if repeats:
        return "periodic"
    if diagonal >= rules.strength and diagonal > vertical + rules.margin:
        return "sequential"
    return "mixed"


def _matches(lag: float, period: float, rules: Rules) -> bool:
    """Whether a lag that was found is a period that is expected."""
    return bool(lag > 0 and period > 0 and abs(lag - period) <= max(rules.tolerance * period, 1.0))
