"""How well a score tells positives from negatives, whatever its scale."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from headway.errors import ArgumentError


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Area under the receiver operating curve: the chance that a positive scores above a negative, ties counted half.

    NaN where either kind is missing. Entries whose score is NaN are left out."""
    values, marks = np.asarray(scores, dtype=float).ravel(), np.asarray(positive, dtype=bool).ravel()
    if values.shape != marks.shape:
        raise ArgumentError(f"positive: got {marks.size} marks for {values.size} scores, expected one for each.")
    known = ~np.isnan(values)
    values, marks = values[known], marks[known]
    yes, no = int(marks.sum()), int((~marks).sum())
    if not yes or not no:
        return math.nan
    return float((stats.rankdata(values)[marks].sum() - yes * (yes + 1) / 2) / (yes * no))
