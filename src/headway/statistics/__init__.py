"""Statistics that every room shares: measurements with intervals, nulls, rank correlation, matched controls, seeds."""

from __future__ import annotations

from headway.statistics.categorical import answer_divergence, same_answers
from headway.statistics.detection import auroc
from headway.statistics.measurement import Measurement, number
from headway.statistics.randomness import generator_of, mixed_seed
from headway.statistics.sampling import (
    Null,
    against_null,
    bootstrap,
    bootstrap_difference,
    bootstrap_over_seeds,
    bootstrap_ratio,
    matched_controls,
    permutation_null,
    proportion,
    rank_correlation,
)

__all__ = [
    "Measurement",
    "Null",
    "against_null",
    "answer_divergence",
    "auroc",
    "bootstrap",
    "bootstrap_difference",
    "bootstrap_over_seeds",
    "bootstrap_ratio",
    "generator_of",
    "matched_controls",
    "mixed_seed",
    "number",
    "permutation_null",
    "proportion",
    "rank_correlation",
    "same_answers",
]
