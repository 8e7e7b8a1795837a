"""The table of mutual agreement: every pair of methods over many examples, and what it may be compared with.

    ceiling        agreement of a method with itself under another seed, or on a model trained anew
    chance         agreement of random scores: mean 0, sd √( 2(2n + 5) / (9 n (n − 1)) ) for τ of n items without ties
    position       agreement of a method with "earlier is more important", frequency with "rarer is more important"
    disattenuated  τ_ab / √(τ_aa τ_bb): what the agreement would be if both methods were free of their own noise

A pair whose agreement is as low as its methods agree with themselves has only shown noise; one far below its ceiling
disagrees. Either way a rank correlation says nothing of which method is right: for that see `faithfulness`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError, unknown
from headway.methods.diagnosis.song_of_disagreement.agreement import Measure, measure_named
from headway.methods.diagnosis.song_of_disagreement.classifier import Example
from headway.statistics import Measurement, bootstrap, bootstrap_over_seeds

Scores = Mapping[str, Sequence[Float[np.ndarray, " tokens"]]]
Special = Literal["exclude", "include"]
#: Fewer items than this have an order of a few coarse values (two items: ±1).
MINIMUM = 3


@dataclass(frozen=True, kw_only=True)
class PairAgreement:
    """Agreement of two methods: the mean over examples with its interval, the standard deviation, how many examples
    gave a value, how many gave none because a side was constant (`undefined`) and how many were too short (`short`)."""

    first: str
    second: str
    mean: Measurement
    sd: float
    n: int
    undefined: int
    short: int
    values: tuple[float, ...]


def items_of(
    scores: Float[np.ndarray, " tokens"],
    example: Example,
    *,
    special: Special = "exclude",
    words: Literal["tokens", "sum", "max"] = "tokens",
) -> Float[np.ndarray, " items"]:
    """The scores that are ranked: padding left out, special tokens in or out for all methods alike, and sub-words
    joined by their sum or largest where words are compared (models with other tokenisers)."""
    if special not in ("exclude", "include"):
        raise unknown("special", special, ("exclude", "include"))
    if words not in ("tokens", "sum", "max"):
        raise unknown("words", words, ("tokens", "sum", "max"))
    if len(scores) != len(example.tokens):
        raise ArgumentError(f"scores: got {len(scores)}, expected one for each of {len(example.tokens)} tokens.")
    keep = example.real & ~example.special if special == "exclude" else example.real
    if words == "tokens":
        return np.asarray(scores, float)[keep]
    join = np.sum if words == "sum" else np.max
    numbers = np.where(example.words >= 0, example.words, -1 - np.arange(len(scores)))[keep]
    chosen = np.asarray(scores, float)[keep]
    return np.array([join(chosen[numbers == number]) for number in dict.fromkeys(numbers.tolist())])


def pair_values(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], measure: Measure, *, minimum: int = MINIMUM
) -> tuple[list[float], int, int]:
    """(values, undefined, short) of two methods over examples. `values` has a NaN where there is none."""
    if len(first) != len(second):
        raise ArgumentError(f"first, second: got {len(first)} and {len(second)} examples, expected the same examples.")
    values, undefined, short = [], 0, 0
    for x, y in zip(first, second, strict=True):
        if len(x) < max(minimum, 2):
            short += 1
            values.append(math.nan)
            continue
        value = measure(x, y)
        undefined += math.isnan(value)
        values.append(value)
    return values, undefined, short


def pair_agreement(
    names: tuple[str, str],
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    measure: str | Measure = "kendall",
    minimum: int = MINIMUM,
    model_seeds: Sequence[int] | None = None,
    seed: int = 0,
) -> PairAgreement:
    """One cell of the table. With `model_seeds` (the model of each example) those are the independent units of the
    interval; without, examples are."""
    measure = measure_named(measure) if isinstance(measure, str) else measure
    values, undefined, short = pair_values(first, second, measure, minimum=minimum)
    there = [i for i, value in enumerate(values) if not math.isnan(value)]
    defined = [values[i] for i in there]
    if not defined:
        mean = Measurement(math.nan, n=0)
    elif model_seeds is None:
        mean = bootstrap(defined, generator=seed, resamples=1000)
    else:
        groups: dict[int, list[float]] = {}
        for i in there:
            groups.setdefault(model_seeds[i], []).append(values[i])
        mean = bootstrap_over_seeds(groups, generator=seed, resamples=1000)
    sd = float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan
    return PairAgreement(
        first=names[0], second=names[1], mean=mean, sd=sd, n=len(defined), undefined=undefined, short=short,
        values=tuple(values),
    )  # fmt: skip


def agreement_table(
    scores: Scores,
    *,
    measure: str | Measure = "kendall",
    minimum: int = MINIMUM,
    model_seeds: Sequence[int] | None = None,
    seed: int = 0,
) -> list[PairAgreement]:
    """Every pair of methods. `scores` gives each method one list of items per example (see `items_of`)."""
    if len(scores) < 2:
        raise ArgumentError(f"scores: got {len(scores)} methods, expected at least two to compare.")
    return [
        pair_agreement(
            (a, b), scores[a], scores[b], measure=measure, minimum=minimum, model_seeds=model_seeds, seed=seed
        )
        for a, b in itertools.combinations(scores, 2)
    ]


def chance_interval(count: int, level: float = 0.95) -> tuple[float, float]:
    """Where τ of two unrelated orders of `count` items lies: ± z √(2(2n + 5) / (9n(n − 1)))."""
    from scipy import stats

    if count < 2:
        raise ArgumentError(f"count: got {count}, expected at least 2 items.")
    reach = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(2 * (2 * count + 5) / (9 * count * (count - 1)))
    return max(-1.0, -reach), min(1.0, reach)


def random_scores(like: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Scores that know nothing, one list per example."""
    random = np.random.default_rng(seed)
    return [random.random(len(x)) for x in like]


def position_scores(like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Earlier items are more important."""
    return [np.arange(len(x), 0.0, -1.0) for x in like]


def frequency_scores(
    examples: Sequence[Example], *, special: Special = "exclude", words: Literal["tokens", "sum", "max"] = "tokens"
) -> list[np.ndarray]:
    """Items that are rarer in these examples are more important: −log of the count of their token."""
    counts: dict[int, int] = {}
    for example in examples:
        for token in example.ids[torch_mask(example)].tolist():
            counts[token] = counts.get(token, 0) + 1
    return [
        items_of(
            np.array([-math.log(counts.get(token, 1)) for token in example.ids.tolist()]), example, special=special,
            words="max" if words == "sum" else words,
        )
        for example in examples
    ]  # fmt: skip


def torch_mask(example: Example) -> np.ndarray:
    """Real, ordinary tokens of an example."""
    return example.real & ~example.special


def disattenuated(agreement: float, first_ceiling: float, second_ceiling: float) -> float:
    """τ_ab / √(τ_aa τ_bb), cut at ±1; NaN where a ceiling is not above 0. Spearman's correction, which is exact for
    correlations of noisy measurements and a guide for τ."""
    if not (first_ceiling > 0 and second_ceiling > 0):
        return math.nan
    return max(-1.0, min(1.0, agreement / math.sqrt(first_ceiling * second_ceiling)))


def near_tie_share(scores: Sequence[np.ndarray], *, tolerance: float = 0.01) -> float:
    """Share of pairs of items whose scores differ by less than `tolerance` of the example's range: τ counts each of
    them as much as the pair of the most and least important item."""
    near = total = 0
    for values in scores:
        left, right = np.triu_indices(len(values), 1)
        span = np.ptp(values) if len(values) else 0.0
        near += int((np.abs(values[left] - values[right]) <= tolerance * span).sum())
        total += len(left)
    return near / total if total else math.nan


def mean_off_diagonal(table: Sequence[PairAgreement]) -> float:
    """Mean over pairs of methods."""
    return float(np.nanmean([pair.mean.value for pair in table]))
