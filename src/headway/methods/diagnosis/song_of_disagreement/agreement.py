"""How alike two rankings of tokens are.

    kendall      τ_b: concordant minus discordant pairs, ties by the b correction (scipy)
    spearman, pearson, weighted (weight 1/(rank + 1)^α, scipy)
    ap           τ_AP,b: agreement above each item, so that the top counts most; symmetrised, ties as in Urbano and
                 Marrero (CIKM 2017)
    top-k τ      1 − 2 · penalty / pairs over what is in either list's top k (Fagin, Kumar and Sivakumar, 2003)
    overlap      |top_k ∩ top_k| / |top_k ∪ top_k|
    rbo          Σ_d (1 − p) p^(d−1) A_d: overlap at each depth, weights falling by p (Webber et al. 2010), ties by the
                 share of tied orders in which an item is in (the normalised form of Corsi and Urbano, 2024)

A vector without any order (all values tied) has no rank correlation: NaN, which is counted and never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

from headway.errors import ArgumentError, NumericError, unknown

Vector = Float[np.ndarray, " tokens"]
#: Penalty of a pair that is tied in one list only: neither right nor wrong.
TIE_PENALTY = 0.5
PERSISTENCE = 0.9


def kendall(first: ArrayLike, second: ArrayLike) -> float:
    """Kendall's τ_b, in [−1, 1]; NaN where a side is constant."""
    x, y = _pair(first, second)
    return math.nan if _constant(x, y) else float(stats.kendalltau(x, y).statistic)


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's ρ with average ranks."""
    x, y = _pair(first, second)
    return math.nan if _constant(x, y) else float(stats.spearmanr(x, y).statistic)


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson's correlation of the scores themselves: one large score can decide it."""
    x, y = _pair(first, second)
    return math.nan if _constant(x, y) else float(stats.pearsonr(x, y).statistic)


def weighted_kendall(first: ArrayLike, second: ArrayLike, *, alpha: float = 1.0) -> float:
    """τ with weight 1/(rank + 1)^α on exchanges, rank 0 the largest; the mean of ranking by either side (scipy)."""
    x, y = _pair(first, second)
    if _constant(x, y):
        return math.nan
    return float(stats.weightedtau(x, y, weigher=lambda rank: 1 / (rank + 1) ** alpha).statistic)


def ap_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """τ_AP,b: how much of what stands above each item in one list stands above it in the other, in [−1, 1]."""
    x, y = _pair(first, second)
    return math.nan if _constant(x, y) else (_ap(x, y) + _ap(y, x)) / 2


def _ap(x: Vector, y: Vector) -> float:
    above = x[None, :] > x[:, None]
    count = above.sum(1)
    agreement = (above * np.sign(y[None, :] - y[:, None])).sum(1)
    below_top = count > 0
    return float((agreement[below_top] / count[below_top]).mean())


def top_k_kendall(first: ArrayLike, second: ArrayLike, k: int, *, penalty: float = TIE_PENALTY) -> float:
    """τ over the union of the two top-k lists: 1 − 2 · penalty / pairs.

    The top k are the items of the k best *distinct* values; the rest of a list is one bucket below. A pair costs 1 when
    the lists order it oppositely, `penalty` when exactly one list ties it. Pairs that stand below the top of a list
    together are not counted: that list says nothing of them. Identical lists give 1, reversed ones −1, for every k."""
    x, y = _pair(first, second)
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise ArgumentError(f"k: got {k!r}, expected a whole number of at least 1.")
    if not 0 <= penalty <= 1:
        raise ArgumentError(f"penalty: got {penalty}, expected a number in [0, 1].")
    in_x, in_y = top_items(x, k), top_items(y, k)
    either = in_x | in_y
    x, y = np.where(in_x, x, -np.inf)[either], np.where(in_y, y, -np.inf)[either]
    left, right = np.triu_indices(len(x), 1)
    known = ~((np.isneginf(x[left]) & np.isneginf(x[right])) | (np.isneginf(y[left]) & np.isneginf(y[right])))
    left, right = left[known], right[known]
    if not len(left):
        return 1.0
    by_x, by_y = _order(x, left, right), _order(y, left, right)
    cost = np.where(by_x * by_y < 0, 1.0, np.where((by_x == 0) != (by_y == 0), penalty, 0.0))
    return float(1 - 2 * cost.sum() / len(left))


def _order(values: Vector, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (values[left] > values[right]).astype(int) - (values[left] < values[right]).astype(int)


def top_items(values: ArrayLike, k: int) -> np.ndarray:
    """Which items have one of the k best distinct values."""
    values = np.asarray(values, float)
    distinct = np.unique(values)
    return values >= distinct[-min(k, len(distinct))]


def overlap(first: ArrayLike, second: ArrayLike, k: int) -> float:
    """|A ∩ B| / |A ∪ B| of the k largest; of a tie across the border each item counts by its chance to be in."""
    x, y = _pair(first, second)
    share_x, share_y = _chances(x, min(k, len(x))), _chances(y, min(k, len(y)))
    return float(np.minimum(share_x, share_y).sum() / np.maximum(share_x, share_y).sum())


def rank_biased_overlap(first: ArrayLike, second: ArrayLike, *, persistence: float = PERSISTENCE) -> float:
    """RBO of two full rankings, in (0, 1]; 1 for the same order. Of two random orders it is not 0: compare with a
    null."""
    if not 0 < persistence < 1:
        raise ArgumentError(f"persistence: got {persistence}, expected a number between 0 and 1.")
    x, y = _pair(first, second)
    if _constant(x, y):
        return math.nan
    total = 0.0
    for depth in range(1, len(x) + 1):
        a, b = _chances(x, depth), _chances(y, depth)
        total += persistence ** (depth - 1) * float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return (1 - persistence) * total + persistence ** len(x)


def _chances(values: Vector, depth: int) -> Vector:
    """Chance that each item is among the first `depth` when ties are broken at random."""
    above = (values[None, :] > values[:, None]).sum(1)
    tied = (values[None, :] == values[:, None]).sum(1)
    return np.clip((depth - above) / tied, 0.0, 1.0)


Measure = Callable[[ArrayLike, ArrayLike], float]
MEASURES: dict[str, Measure] = {
    "kendall": kendall,
    "spearman": spearman,
    "pearson": pearson,
    "weighted": weighted_kendall,
    "ap": ap_correlation,
    "rbo": rank_biased_overlap,
}


def measure_named(name: str) -> Measure:
    """A measure by name: those of MEASURES, "top-5" (τ over the five best), "top-25%", or "overlap-5"."""
    if name in MEASURES:
        return MEASURES[name]
    kind, _, size = name.partition("-")
    try:
        k: int | float = float(size[:-1]) / 100 if size.endswith("%") else int(size)
        resolve_k(k, 100)
    except (ValueError, ArgumentError):
        kind = ""
    if kind == "top":
        return lambda first, second: top_k_kendall(first, second, resolve_k(k, np.size(first)))
    if kind == "overlap":
        return lambda first, second: overlap(first, second, resolve_k(k, np.size(first)))
    raise unknown("measure", name, (*MEASURES, "top-5", "top-25%", "overlap-5"))


def resolve_k(k: int | float, count: int) -> int:
    """k items, or a share of `count` for a fraction in (0, 1]; never fewer than one."""
    if isinstance(k, float) and 0 < k <= 1:
        return max(1, round(k * count))
    if isinstance(k, int | np.integer) and not isinstance(k, bool) and k >= 1:
        return min(int(k), count)
    raise ArgumentError(f"k: got {k!r}, expected a whole number of at least 1 or a share in (0, 1].")


def non_zero_k(attention: list[Vector]) -> int:
    """One k for every pair of an example: the mean number of non-zero attention scores.

    The number of non-zeros of each pair on its own would compare pairs at different k: a sparse attention at a small
    one, two attributions (which have no zeros) at all tokens."""
    counts = [int(np.count_nonzero(scores)) for scores in attention]
    if not counts or min(counts) == 0:
        raise ArgumentError(
            "attention: got no scores, or one without a non-zero, expected at least one non-zero in each."
        )
    return max(1, round(float(np.mean(counts))))


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Vector, Vector]:
    x, y = np.asarray(first, float), np.asarray(second, float)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0:
        raise ArgumentError(f"first, second: got shapes {x.shape} and {y.shape}, expected two lists of one length.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NumericError("first, second: got NaN or infinity among the scores, expected finite numbers.")
    return x, y


def _constant(x: Vector, y: Vector) -> bool:
    return len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0
