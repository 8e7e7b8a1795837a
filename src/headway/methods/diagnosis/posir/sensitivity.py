"""How much a score depends on where the answer stands: the position sensitivity index, with what chance gives it.

Scores s of queries in bins b of the relative position (20 equal ones, closed on the right, the first also on the left):

    m_b = mean of s in bin b ,    nDCG = mean_b m_b ,    PSI = 1 − min_b m_b / max_b m_b

PSI compares the extremes of noisy means, so it is above zero where nothing depends on the position. It is therefore
given with the number per bin, with a null (positions shuffled among the queries, over all lengths only among those of
one length bucket: p-value, and PSI − mean of the null), with a bootstrap interval, and with two smooth forms: 1 −
min/max of a line fitted to the m_b (weighted by their counts) and of five wider bins. The interval resamples queries,
or their documents, and inherits the upward bias: whether there is an effect is what the null says.

Direction: slope, r², Pearson, Spearman and Kendall between bin centre and m_b. A negative slope is primacy, a positive
one recency. Paper: PosIR, arXiv 2601.08363; the null, the interval and the smooth forms are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats

from headway.errors import ArgumentError, NumericError
from headway.statistics import Measurement, against_null, bootstrap
from headway.statistics.measurement import as_number

BINS, WIDE_BINS, RESAMPLES = 20, 5, 1000
#: Fewest bins with queries for an index: below, minimum and maximum say little about the position.
LEAST_BINS = 5
#: Upper edges of the length buckets in tokens, closed on the right; a last bucket is open.
EDGES = (512, 1024, 1536)
#: Numbers that a block of resamples may hold at once.
BLOCK = 4_000_000

Pairs = tuple[Float[np.ndarray, "draws bins"], Float[np.ndarray, "draws bins"]]


@dataclass(frozen=True, kw_only=True)
class AgainstChance:
    """A number beside what shuffled positions give: mean, middle 95 % and p-value of `draws` shuffles."""

    value: float
    null_mean: float
    null_low: float
    null_high: float
    p_value: float
    draws: int

    @property
    def excess(self) -> float:
        """What is left when chance is taken off."""
        return self.value - self.null_mean

    @property
    def beyond(self) -> bool:
        """Whether fewer than 5 % of shuffles reach it."""
        return self.p_value < 0.05


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Position sensitivity of one group of queries.

    `psi`, `linear` and `wide` are the index and its smooth forms, `slope` the change of the score from the start of a
    document to its end, each beside chance; they are None where `undefined` says why. `interval` is that of PSI,
    `slope_interval` that of the slope. `means` and `counts` are by bin (NaN for an empty one). `trend` has r², Pearson,
    Spearman and Kendall of bin centre and mean."""

    queries: int
    ndcg: float
    mean: float
    means: list[float]
    counts: list[int]
    psi: AgainstChance | None = None
    linear: AgainstChance | None = None
    wide: AgainstChance | None = None
    slope: AgainstChance | None = None
    interval: tuple[float, float] | None = None
    slope_interval: tuple[float, float] | None = None
    trend: dict[str, float] = field(default_factory=dict)
    undefined: str = ""

    @property
    def direction(self) -> str:
        """ "primacy", "recency", or "none" where shuffles reach the slope in 5 % or more."""
        if self.slope is None or not self.slope.beyond:
            return "none"
        return "primacy" if self.slope.value < 0 else "recency"

    @property
    def least(self) -> int:
        """Queries in the emptiest bin that has any."""
        return min((count for count in self.counts if count), default=0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bin_of(position: ArrayLike, bins: int = BINS) -> Int[np.ndarray, " queries"]:
    """The bin of each relative position: b for (b/n, (b+1)/n], and 0 for 0."""
    x = np.asarray(position, dtype=float)
    if x.size and not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise ArgumentError(f"position: got values from {x.min()} to {x.max()}, expected relative positions in [0, 1].")
    return np.maximum(np.searchsorted(np.arange(bins + 1) / bins, x, side="left") - 1, 0)


def bucket_of(tokens: ArrayLike, edges: Sequence[int] = EDGES) -> Int[np.ndarray, " queries"]:
    """The length bucket of each document: 0 for (0, edges[0]], …, len(edges) beyond the last edge."""
    sizes = np.asarray(tokens)
    check_edges(edges)
    if sizes.size and sizes.min() < 1:
        raise ArgumentError(f"tokens: got a document of {sizes.min()} tokens, expected 1 or more.")
    return np.searchsorted(np.asarray(edges), sizes, side="left")


def bucket_names(edges: Sequence[int] = EDGES) -> list[str]:
    """ "Q1 (0, 512]", …, "Q4 (1536, ∞)"."""
    check_edges(edges)
    bounds = [0, *edges]
    names = [f"Q{i + 1} ({bounds[i]}, {bounds[i + 1]}]" for i in range(len(edges))]
    return [*names, f"Q{len(edges) + 1} ({bounds[-1]}, ∞)"]


def check_edges(edges: Sequence[int]) -> None:
    if list(edges) != sorted(set(edges)) or any(edge < 1 for edge in edges):
        raise ArgumentError(f"edges: got {list(edges)}, expected growing token counts, such as 512,1024,1536.")


def psi(means: Float[np.ndarray, "... bins"]) -> Float[np.ndarray, ...]:
    """1 − min/max over the bins that have a mean; NaN where the maximum is 0 or no bin has one."""
    high = np.max(np.where(np.isnan(means), -np.inf, means), -1)
    low = np.min(np.where(np.isnan(means), np.inf, means), -1)
    defined = np.isfinite(high) & (high > 0)
    return np.where(defined, 1 - np.where(defined, low, 0) / np.where(defined, high, 1), np.nan)


def sensitivity(
    scores: ArrayLike,
    positions: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    within: ArrayLike | None = None,
    bins: int = BINS,
    resamples: int = RESAMPLES,
    generator: np.random.Generator | int = 0,
) -> Sensitivity:
    """Position sensitivity of scores (0 or more) at relative positions in [0, 1].

    `groups` are the documents of the queries: those of one document are resampled together. `within` are labels of
    queries, such as length buckets: positions are shuffled among queries of one label only, so that what goes with the
    label is no effect of the position. Where fewer than `LEAST_BINS` bins have queries, or every score is 0, the index
    is undefined and the result says so."""
    s, x = np.asarray(scores, dtype=float), np.asarray(positions, dtype=float)
    _check(s, x, bins, resamples)
    random = np.random.default_rng(generator)
    where = bin_of(x, bins)
    counts = np.bincount(where, minlength=bins).astype(float)
    sums = np.bincount(where, weights=s, minlength=bins)
    means = _means(counts, sums)
    found: dict[str, Any] = {
        "queries": int(s.size),
        "ndcg": float(np.nanmean(means)),
        "mean": float(s.mean()),
        "means": means.tolist(),
        "counts": counts.astype(int).tolist(),
    }
    filled = int((counts > 0).sum())
    if filled < LEAST_BINS:
        found["undefined"] = f"{filled} of {bins} position bins have queries, at least {LEAST_BINS} are needed"
    elif sums.max() <= 0:
        found["undefined"] = "no query found its document: every score is 0"
    if found.get("undefined"):
        return Sensitivity(**found)
    forms = _forms(bins)
    strata = np.zeros(s.size, dtype=int) if within is None else _owners("within", np.asarray(within).tolist(), s.size)
    draws = _shuffled(s, where, strata, counts, forms, resamples, random)
    for name, form in forms.items():
        side = "two-sided" if name == "slope" else "greater"
        found[name] = _beside(float(form((counts[None], sums[None]))[0]), draws[name], side)
    owners = np.arange(s.size) if groups is None else _owners("groups", groups, s.size)
    for name, key in (("psi", "interval"), ("slope", "slope_interval")):
        found[key] = _interval(forms[name], s, where, owners, bins, resamples, random)
    return Sensitivity(**found, trend=_trend(means))


def by_bucket(
    scores: ArrayLike, positions: ArrayLike, tokens: ArrayLike, *, edges: Sequence[int] = EDGES, **options: Any
) -> dict[str, Sensitivity | None]:
    """`sensitivity` of each length bucket by name; None for an empty one. The positions of one bucket are shuffled
    among its own queries."""
    s, x, where = np.asarray(scores, dtype=float), np.asarray(positions, dtype=float), bucket_of(tokens, edges)
    groups = options.pop("groups", None)
    found: dict[str, Sensitivity | None] = {}
    for number, name in enumerate(bucket_names(edges)):
        inside = np.flatnonzero(where == number)
        own = None if groups is None else [groups[i] for i in inside]
        found[name] = sensitivity(s[inside], x[inside], groups=own, **options) if inside.size else None
    return found


def _forms(bins: int) -> Mapping[str, Callable[[Pairs], np.ndarray]]:
    """The indices, each a function of (counts, sums) by bin over draws."""
    centres = (np.arange(bins) + 0.5) / bins
    wide = np.minimum(np.arange(bins) * WIDE_BINS // bins, WIDE_BINS - 1)
    join = np.eye(WIDE_BINS)[wide]

    def line(pair: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """(slope, height at the middle) of the line through the bin means, weighted by counts."""
        counts, sums = pair
        total = counts.sum(-1)
        middle, level = counts @ centres / total, sums.sum(-1) / total
        spread = counts @ centres**2 - total * middle**2
        slope = (sums @ centres - total * middle * level) / np.where(spread > 0, spread, np.nan)
        return slope, level - slope * middle

    def linear(pair: Pairs) -> np.ndarray:
        slope, start = line(pair)
        return psi(np.maximum(start[:, None] + slope[:, None] * centres, 0.0))

    return {
        "psi": lambda pair: psi(_means(*pair)),
        "linear": linear,
        "wide": lambda pair: psi(_means(pair[0] @ join, pair[1] @ join)),
        "slope": lambda pair: line(pair)[0],
    }


def _means(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    return np.where(counts > 0, sums / np.where(counts > 0, counts, 1), np.nan)


def _shuffled(
    s: np.ndarray,
    where: np.ndarray,
    strata: np.ndarray,
    counts: np.ndarray,
    forms: Mapping[str, Callable[[Pairs], np.ndarray]],
    draws: int,
    random: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Each form under shuffled positions. A shuffle leaves the counts; the scores are cut into bins anew."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in forms}
    order = np.argsort(where, kind="stable")
    members = [np.flatnonzero(strata[order] == label) for label in range(int(strata.max()) + 1)]
    block = max(1, BLOCK // s.size)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
    filled = counts > 0
    for first in range(0, draws, block):
        rows = min(block, draws - first)
        moved = np.empty((rows, s.size))
        for own in members:
            moved[:, own] = random.permuted(np.broadcast_to(s[order][own], (rows, own.size)), axis=1)
        sums = np.zeros((rows, counts.size))
        sums[:, filled] = np.add.reduceat(moved, starts[filled], axis=1)
        pair = (np.broadcast_to(counts, sums.shape), sums)
        for name, form in forms.items():
            found[name].append(form(pair))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _beside(value: float, draws: np.ndarray, alternative: Any) -> AgainstChance | None:
    defined = draws[np.isfinite(draws)]
    if not math.isfinite(value) or not defined.size:
        return None
    null = against_null(value, defined, alternative=alternative)
    return AgainstChance(
        value=value,
        null_mean=null.mean,
        null_low=null.low,
        null_high=null.high,
        p_value=null.p_value,
        draws=null.draws,
    )


def _interval(
    form: Callable[[Pairs], np.ndarray],
    s: np.ndarray,
    where: np.ndarray,
    owners: np.ndarray,
    bins: int,
    resamples: int,
    random: np.random.Generator,
) -> tuple[float, float]:
    """The bootstrap interval over groups: a draw is how often each group was taken."""
    size = int(owners.max()) + 1
    table = np.zeros((2, size * bins))
    np.add.at(table[0], owners * bins + where, 1.0)
    np.add.at(table[1], owners * bins + where, s)
    counts, sums = table.reshape(2, size, bins)

    def statistic(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        flat = np.moveaxis(np.atleast_2d(drawn), axis, -1).astype(np.int64)
        shape = np.shape(drawn)[:-1]
        rows = flat.reshape(-1, size)
        taken = np.bincount((rows + size * np.arange(len(rows))[:, None]).ravel(), minlength=len(rows) * size)
        taken = taken.reshape(len(rows), size).astype(float)
        return form((taken @ counts, taken @ sums)).reshape(shape)

    found: Measurement = bootstrap(np.arange(size), generator=random, statistic=statistic, resamples=resamples)
    return as_number("low", found.low), as_number("high", found.high)


def _trend(means: np.ndarray) -> dict[str, float]:
    """Direction over the bins that have queries, as the paper's code takes it; NaN where all means are equal."""
    filled = ~np.isnan(means)
    centres, values = ((np.arange(means.size) + 0.5) / means.size)[filled], means[filled]
    if np.ptp(values) == 0:
        return dict.fromkeys(("slope_of_bins", "r2", "pearson", "spearman", "kendall"), math.nan) | {
            "slope_of_bins": 0.0
        }
    fit = stats.linregress(centres, values)
    return {
        "slope_of_bins": float(fit.slope),
        "r2": float(fit.rvalue**2),
        "pearson": float(fit.rvalue),
        "spearman": float(stats.spearmanr(centres, values).statistic),
        "kendall": float(stats.kendalltau(centres, values).statistic),
    }


def _owners(name: str, groups: Sequence[object], size: int) -> np.ndarray:
    if len(groups) != size:
        raise ArgumentError(f"{name}: got {len(groups)} for {size} queries, expected one of each.")
    number: dict[object, int] = {}
    return np.array([number.setdefault(group, len(number)) for group in groups])


def _check(s: np.ndarray, x: np.ndarray, bins: int, resamples: int) -> None:
    if s.ndim != 1 or s.shape != x.shape or not s.size:
        raise ArgumentError(f"scores, positions: got shapes {s.shape} and {x.shape}, expected one score per position.")
    if not np.isfinite(s).all():
        raise NumericError("scores: got NaN or infinity, expected a finite score for every query (0 for not found).")
    if s.min() < 0:
        raise ArgumentError(f"scores: got {s.min()}, expected 0 or more; the index is a ratio of means.")
    if bins < LEAST_BINS or resamples < 20:
        raise ArgumentError(f"bins, resamples: got {bins} and {resamples}, expected {LEAST_BINS} and 20 or more.")
