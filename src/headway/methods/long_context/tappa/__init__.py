"""TAPPA: attention patterns seen as the course of queries and keys over time.

    a_{t,i} = (1/√d) Σ_m ‖q_t^m‖ ‖k_i^m‖ cos(φ^m_{t,i} + (i − t) θ_m)

A head whose queries change little from step to step has a pattern that can be foretold, and the rotary frequencies
decide its shape: vertical stripes, diagonals, repeated diagonals, seasonal return. A head whose queries jump has none.

Paper: Why Attention Patterns Exist: A Unifying Temporal Perspective Analysis, arXiv 2601.21709. `similarity` holds its
number, `bounds` what stands in for its theorems, `predictability` and `profile` the measures on attention rows,
`classify` the labels, `observer` what plugs into the door.
"""

from __future__ import annotations

from headway.card import Card
from headway.door.rotary import host_frequencies, site_frequencies
from headway.methods.long_context.tappa.bounds import diagonal_bound, lag_bound, vertical_bound
from headway.methods.long_context.tappa.classify import (
    MEANING,
    HeadPatterns,
    Rules,
    classify,
    dominant_pairs,
    peak_lag,
)
from headway.methods.long_context.tappa.observer import PatternObserver
from headway.methods.long_context.tappa.predictability import (
    RowSimilarity,
    adjacent_overlap,
    predictability,
    row_autocorrelation,
)
from headway.methods.long_context.tappa.profile import (
    BoundCheck,
    PatternProfile,
    Similarity,
    average_profiles,
    profile_call,
    row_windows,
)
from headway.methods.long_context.tappa.similarity import key_similarity, query_similarity, time_autocorrelation

CARD = Card(
    slug="tappa",
    title="Why Attention Patterns Exist: A Unifying Temporal Perspective Analysis",
    year=2026,
    arxiv="2601.21709",
    family="long_context",
    stages=("observe",),
    needs=("rotary positions, for periods, channel shares and bounds",),
    knobs={
        "pairs": "query similarity over all pairs of steps or adjacent ones",
        "stage": "queries before or after rotary positions",
        "percentile": "heads below it in query similarity count as unpredictable",
        "max_rows": "attention rows read per sequence",
        "max_lag": "longest repeat that is looked for, in tokens",
    },
    summary="Tells which heads have a pattern that can be foretold, its shape, and the period with which it repeats.",
)

__all__ = [
    "CARD",
    "MEANING",
    "BoundCheck",
    "HeadPatterns",
    "PatternObserver",
    "PatternProfile",
    "RowSimilarity",
    "Rules",
    "Similarity",
    "adjacent_overlap",
    "average_profiles",
    "classify",
    "diagonal_bound",
    "dominant_pairs",
    "host_frequencies",
    "key_similarity",
    "lag_bound",
    "peak_lag",
    "predictability",
    "profile_call",
    "query_similarity",
    "row_autocorrelation",
    "row_windows",
    "site_frequencies",
    "time_autocorrelation",
    "vertical_bound",
]
