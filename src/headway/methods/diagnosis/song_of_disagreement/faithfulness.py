"""Whether an explanation is right: what its tokens do to the output, and whether they are the ones that decide.

    comprehensiveness_q   f(x) − f(x without the top q)      high is good        (ERASER, arXiv 1911.03429)
    sufficiency_q         f(x) − f(only the top q)           low is good
    aopc                  either, averaged over the shares q
    ap                    average precision of the scores against the tokens of a planted rationale; for the area
                          under the curve see `headway.statistics.auroc`
    excess                comprehensiveness minus that of random scores, in the same example

A removed token is at the baseline, so a baseline is part of every number. None of these compares methods with each
other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from headway.errors import ArgumentError
from headway.methods.diagnosis.song_of_disagreement.attributions import Problem

SHARES = (0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Of one explanation of one example. `comprehensiveness` and `sufficiency` by share, `aopc_*` their means;
    `random_*` the same of random orders."""

    shares: tuple[float, ...]
    comprehensiveness: tuple[float, ...]
    sufficiency: tuple[float, ...]
    random_comprehensiveness: float
    random_sufficiency: float

    @property
    def aopc_comprehensiveness(self) -> float:
        return float(np.mean(self.comprehensiveness))

    @property
    def aopc_sufficiency(self) -> float:
        return float(np.mean(self.sufficiency))

    @property
    def excess(self) -> float:
        """Comprehensiveness beyond that of random orders."""
        return self.aopc_comprehensiveness - self.random_comprehensiveness


def faithfulness(
    problem: Problem,
    scores: Float[np.ndarray, " tokens"],
    *,
    shares: Sequence[float] = SHARES,
    random_orders: int = 5,
    seed: int = 0,
) -> Faithfulness:
    """Removes, and keeps alone, the best tokens. Special tokens stay where they are in both: they are not evidence.

    Raises ArgumentError for shares outside (0, 1], scores of another length, and an example without ordinary tokens."""
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ArgumentError(f"shares: got {tuple(shares)}, expected shares in (0, 1].")
    example = problem.example
    if len(scores) != len(example.tokens):
        raise ArgumentError(f"scores: got {len(scores)}, expected one for each of {len(example.tokens)} tokens.")
    ordinary = np.flatnonzero(example.real & ~example.special)
    if not len(ordinary):
        raise ArgumentError("example: got no ordinary tokens, expected at least one. Leave it out.")
    random = np.random.default_rng(seed)
    orders = [ordinary[np.argsort(-np.asarray(scores)[ordinary], kind="stable")]]
    orders += [random.permutation(ordinary) for _ in range(random_orders)]
    counts = [max(1, math.ceil(share * len(ordinary))) for share in shares]
    chosen = np.zeros((len(orders), len(counts), len(example.tokens)), bool)
    for i, order in enumerate(orders):
        for j, count in enumerate(counts):
            chosen[i, j, order[:count]] = True
    fixed = ~np.isin(np.arange(len(example.tokens)), ordinary)
    without = problem.value - masked_values(problem, ~chosen.reshape(-1, len(fixed)))
    alone = problem.value - masked_values(problem, chosen.reshape(-1, len(fixed)) | fixed)
    without, alone = without.reshape(chosen.shape[:2]), alone.reshape(chosen.shape[:2])
    return Faithfulness(
        shares=tuple(shares),
        comprehensiveness=tuple(without[0].tolist()),
        sufficiency=tuple(alone[0].tolist()),
        random_comprehensiveness=float(without[1:].mean()) if random_orders else math.nan,
        random_sufficiency=float(alone[1:].mean()) if random_orders else math.nan,
    )


def masked_values(problem: Problem, kept: Bool[np.ndarray, "inputs tokens"]) -> Float[np.ndarray, " inputs"]:
    """f with the tokens that are not kept at the baseline."""
    keep = torch.from_numpy(np.ascontiguousarray(kept)).to(problem.mask.device)

    def inputs(part: slice) -> torch.Tensor:
        return torch.where(keep[part][..., None], problem.embeddings, problem.baseline)

    return problem.values(inputs, len(keep)).numpy()


def average_precision(scores: Float[np.ndarray, " items"], relevant: Bool[np.ndarray, " items"]) -> float:
    """Σ (recall step) · precision from the best score down, tied items taken together; NaN where none is relevant."""
    scores, relevant = np.asarray(scores, float), np.asarray(relevant, bool)
    if not relevant.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(relevant[order])
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    precision = hits[ends] / (ends + 1)
    steps = np.diff(np.concatenate([[0], hits[ends]])) / hits[-1]
    return float((precision * steps).sum())
