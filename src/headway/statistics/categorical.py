"""Answers as categories: smoothed distributions, their divergence with an interval, and the null that groups are one.

    P(a) = (n_a + c) / (n + c K)                 K answers seen in either group
    KL(P ‖ Q) = Σ_a P(a) ln( P(a) / Q(a) )

The interval is the reflected (basic) bootstrap interval [2θ − q_97.5, 2θ − q_2.5], cut at 0, from multinomial resamples
of both groups. A divergence of samples is too large on average, and resampling repeats that error once more; reflecting
takes it off, so that two groups of one distribution give an interval that starts at 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError
from headway.statistics.measurement import Measurement
from headway.statistics.sampling import Null, against_null

#: Pseudo-count of an answer (Jeffreys' prior). With none, an answer that one group lacks makes the divergence infinite.
PSEUDO = 0.5
RESAMPLES = 1000


def smoothed(counts: Float[np.ndarray, "*draws k"], *, pseudo: float = PSEUDO) -> Float[np.ndarray, "*draws k"]:
    """Shares of the answers with `pseudo` added to every count."""
    if not pseudo > 0:
        raise ArgumentError(f"pseudo: got {pseudo}, expected a number above 0: unseen answers would cost infinitely.")
    raised = np.asarray(counts, dtype=float) + pseudo
    return raised / raised.sum(-1, keepdims=True)


def kl_divergence(p: Float[np.ndarray, "*draws k"], q: Float[np.ndarray, "*draws k"]) -> Float[np.ndarray, "*draws"]:
    """KL(p ‖ q) in nats of distributions without zeros in q; never below 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return np.maximum(terms.sum(-1), 0.0)


def counted(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """How often each answer of either group occurs in the first and in the second."""
    a, b = Counter(first), Counter(second)
    names = list(dict.fromkeys([*a, *b]))
    return np.array([a[n] for n in names], dtype=float), np.array([b[n] for n in names], dtype=float)


def answer_divergence(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    generator: np.random.Generator | int,
    pseudo: float = PSEUDO,
    resamples: int = RESAMPLES,
) -> Measurement:
    """KL of the answers of `first` from those of `second`, in nats, with its interval; NaN where a group is empty. A
    group of one says nothing about spread: the interval is [0, ∞]."""
    n, m = len(first), len(second)
    if not n or not m:
        return Measurement(math.nan, n=0, unit="nats")
    a, b = counted(first, second)
    value = float(kl_divergence(smoothed(a, pseudo=pseudo), smoothed(b, pseudo=pseudo)))
    if min(n, m) < 2:
        return Measurement(value, 0.0, math.inf, min(n, m), unit="nats")
    random = np.random.default_rng(generator)
    p = smoothed(random.multinomial(n, a / n, size=resamples), pseudo=pseudo)
    q = smoothed(random.multinomial(m, b / m, size=resamples), pseudo=pseudo)
    low, high = np.quantile(kl_divergence(p, q), [0.025, 0.975])
    return Measurement(value, max(2 * value - high, 0.0), max(2 * value - low, 0.0), min(n, m), unit="nats")


def same_answers(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    generator: np.random.Generator | int,
    pseudo: float = PSEUDO,
    resamples: int = RESAMPLES,
) -> Null:
    """The divergence among those of random splits of both groups together: the null that they are one. Splits are drawn
    as counts (multivariate hypergeometric)."""
    if not len(first) or not len(second):
        raise ArgumentError(f"first, second: got {len(first)} and {len(second)} answers, expected some in both.")
    a, b = counted(first, second)
    random = np.random.default_rng(generator)
    total = (a + b).astype(int)
    split = random.multivariate_hypergeometric(total, len(first), size=resamples)
    draws = kl_divergence(smoothed(split, pseudo=pseudo), smoothed(total - split, pseudo=pseudo))
    return against_null(float(kl_divergence(smoothed(a, pseudo=pseudo), smoothed(b, pseudo=pseudo))), draws)
