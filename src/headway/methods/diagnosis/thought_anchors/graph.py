"""The graph of a trace: which earlier sentences each sentence rests on, and how well that is known.

An edge j → i has the weight of E_ij, the effect of hiding s_j on s_i beyond the average effect on s_i. Controls that
need no intervention stand beside it: attention averaged over all heads, and nearness alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from headway.errors import ArgumentError
from headway.statistics import Measurement, bootstrap, rank_correlation
from headway.statistics.detection import auroc

#: Incoming edges that are kept for each sentence.
STRONGEST = 2
#: Later sentences that a sentence needs for a mean effect.
FOLLOWERS = 3


@dataclass(frozen=True)
class Edge:
    """Sentence `source` matters to the later sentence `target`."""

    source: int
    target: int
    weight: float


def strongest_edges(
    matrix: Float[np.ndarray, "n n"], *, per_sentence: int = STRONGEST, least: float = 0.0
) -> list[Edge]:
    """For each sentence its strongest incoming edges above `least` (0: the average effect on that sentence)."""
    _square(matrix)
    if per_sentence < 1:
        raise ArgumentError(f"per_sentence: got {per_sentence}, expected at least 1.")
    found = []
    for i in range(len(matrix)):
        row = [(float(matrix[i, j]), j) for j in range(i) if np.isfinite(matrix[i, j]) and matrix[i, j] > least]
        found += [Edge(j, i, weight) for weight, j in sorted(row, key=lambda x: (-x[0], x[1]))[:per_sentence]]
    return found


def outgoing(matrix: Float[np.ndarray, "n n"], *, least: int = FOLLOWERS) -> Float[np.ndarray, " n"]:
    """How much each sentence matters to all later ones: the mean of its column. NaN where fewer than `least` follow:
    what a sentence does to its direct neighbour is always much."""
    _square(matrix)
    known = np.isfinite(matrix)
    count = known.sum(0)
    total = np.where(known, matrix, 0.0).sum(0)
    return np.where(count >= max(least, 1), total / np.maximum(count, 1), np.nan)


def nearness(count: int) -> Float[np.ndarray, "n n"]:
    """The control that knows only the distance: −(i − j) below the diagonal."""
    distance = np.subtract.outer(np.arange(count), np.arange(count)).astype(float)
    return np.where(distance > 0, -distance, np.nan)


def mean_attention(maps: Float[np.ndarray, "layers heads n n"]) -> Float[np.ndarray, "n n"]:
    """The control without intervention: B averaged over all heads, NaN on and above the diagonal."""
    if maps.ndim != 4:
        raise ArgumentError(f"maps: got shape {maps.shape}, expected (layers, heads, sentences, sentences).")
    known = np.isfinite(maps)
    mean = np.where(known, maps, 0.0).sum((0, 1)) / np.maximum(known.sum((0, 1)), 1)
    return np.where(np.tri(maps.shape[-1], k=-1, dtype=bool) & known.any((0, 1)), mean, np.nan)


def edge_marks(count: int, edges: Iterable[tuple[int, int]]) -> Bool[np.ndarray, "n n"]:
    """True at (target, source) for known edges (source, target)."""
    marks = np.zeros((count, count), dtype=bool)
    for source, target in edges:
        if not 0 <= source < target < count:
            raise ArgumentError(f"edges: got ({source}, {target}), expected earlier to later among {count} sentences.")
        marks[target, source] = True
    return marks


def edge_auroc(
    matrix: Float[np.ndarray, "n n"],
    marks: Bool[np.ndarray, "n n"],
    *,
    targets: Sequence[int] | None = None,
    by_target: bool = False,
) -> float:
    """AUROC of known edges against the other earlier sentences of the same targets (those with an edge by default).

    by_target: the mean of each target's own AUROC, which compares no two targets."""
    _square(matrix)
    rows = [i for i in range(len(matrix)) if marks[i].any()] if targets is None else list(targets)
    pairs = [(matrix[i, :i], marks[i, :i]) for i in rows]
    if by_target:
        own = [auroc(s, m) for s, m in pairs]
        known = [a for a in own if np.isfinite(a)]
        return float(np.mean(known)) if known else float("nan")
    if not pairs:
        return float("nan")
    return auroc(np.concatenate([s for s, _ in pairs]), np.concatenate([m for _, m in pairs]))


def mean_auroc(by_trace: Sequence[float], *, generator: np.random.Generator | int) -> Measurement:
    """The mean AUROC over traces with its interval; traces without edges (NaN) are left out."""
    known = [a for a in by_trace if np.isfinite(a)]
    return bootstrap(known, generator=generator) if known else Measurement(float("nan"), n=0)


def agreement(first: Sequence[float], second: Sequence[float], *, generator: np.random.Generator | int) -> Measurement:
    """Spearman's ρ between two scores of the same sentences where both are known, with its interval; NaN for fewer than
    three."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3:
        return Measurement(float("nan"), n=int(known.sum()))
    return rank_correlation(a[known], b[known], generator=generator)


def concordance(scores: Sequence[Sequence[float]]) -> float:
    """Kendall's W of several scores of the same sentences, ties by average ranks: from 0 (none) to 1 (one order).

    W = ((m − 1) ρ + 1) / m for m scores with mean pairwise Spearman ρ. Sentences that a score lacks are left out; NaN
    for fewer than three sentences or a score without order."""
    table = np.asarray(scores, dtype=float)
    if table.ndim != 2 or len(table) < 2:
        raise ArgumentError(f"scores: got shape {table.shape}, expected at least 2 scores of the same sentences.")
    table = table[:, np.isfinite(table).all(0)]
    if table.shape[1] < 3 or (np.ptp(table, axis=1) == 0).any():
        return float("nan")
    ranks = np.corrcoef(stats.rankdata(table, axis=1))
    count = len(table)
    mean = (ranks.sum() - count) / (count * (count - 1))
    return float(((count - 1) * mean + 1) / count)


def _square(matrix: np.ndarray) -> None:
    if getattr(matrix, "ndim", 0) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ArgumentError(f"matrix: got shape {getattr(matrix, 'shape', ())}, expected (sentences, sentences).")
