"""TAPPA: attention patterns seen as the course of queries and keys over time.

    a_{t,i} = (1/√d) Σ_m ‖q_t^m‖ ‖k_i^m‖ cos(φ^m_{t,i} + (i − t) θ_m)

A head whose queries change little from step to step has a pattern that can be foretold, and the rotary frequencies
decide its shape: vertical stripes, diagonals, repeated diagonals, seasonal return. A head whose queries jump has none.

Paper: Why Attention Patterns Exist: A Unifying Temporal Perspective Analysis, arXiv 2601.21709. `similarity` holds its
number, `bounds` what stands in for its theorems, `predictability` and `profile` the measures on attention rows,
`classify` the labels, `observer` what plugs into the door. The number has two uses: `budget` and `eviction` keep more
keys where it is low, `pruning` leaves out layers where it is high. `expected` is a policy to compare the first with.
"""

from __future__ import annotations

from torch import nn

from headway.card import Card
from headway.door import stages as door_stages
from headway.door.blocks import without_attention, without_blocks
from headway.door.rotary import host_frequencies, site_frequencies
from headway.errors import ArgumentError
from headway.methods.long_context.tappa.bounds import diagonal_bound, lag_bound, vertical_bound
from headway.methods.long_context.tappa.budget import allocate, preferences, token_scores
from headway.methods.long_context.tappa.classify import (
    MEANING,
    HeadPatterns,
    Rules,
    classify,
    dominant_pairs,
    peak_lag,
)
from headway.methods.long_context.tappa.eviction import WINDOW, TappaCache, TappaEviction
from headway.methods.long_context.tappa.expected import ExpectedAttention, expected_scores, mean_rotation
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
from headway.methods.long_context.tappa.pruning import (
    LayerMeasures,
    adjusted_influence,
    block_influence,
    measure_layers,
    prune_order,
    text_chunks,
)
from headway.methods.long_context.tappa.similarity import key_similarity, query_similarity, time_autocorrelation

CARD = Card(
    slug="tappa",
    title="Why Attention Patterns Exist: A Unifying Temporal Perspective Analysis",
    year=2026,
    arxiv="2601.21709",
    family="long_context",
    stages=("Observer", "CachePolicy"),
    needs=("rotary positions, for periods, channel shares and bounds",),
    knobs={
        "pairs": "query similarity over all pairs of steps or adjacent ones",
        "stage": "queries before or after rotary positions",
        "percentile": "heads below it in query similarity count as unpredictable",
        "max_rows": "attention rows read per sequence",
        "max_lag": "longest repeat that is looked for, in tokens",
        "budget": "mean keys per layer that the cache policy keeps",
        "level": "a budget per layer (the paper) or per KV head",
        "preference": "what budgets follow: 1 − similarity, mixed with CAKE's, or an ablation",
        "beta": "weight of similarity in the order of pruning",
    },
    summary="Tells which heads have a pattern that can be foretold, its shape and its period; "
    "gives more cache to layers that have none, and prunes those that have.",
)


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[door_stages.Stage, ...]:
    """The cache policy that keeps a mean of `share` of a context's keys per layer, its window among them."""
    if not 0 < share <= 1:
        raise ArgumentError(f"share: got {share}, expected a share of the keys in (0, 1]; 1 is dense.")
    budget = max(round(share * tokens), 2) if share < 1 else tokens + 1
    return (TappaEviction(budget=budget, window=min(WINDOW, max(budget // 2, 1))),)


__all__ = [
    "CARD",
    "MEANING",
    "BoundCheck",
    "ExpectedAttention",
    "HeadPatterns",
    "LayerMeasures",
    "PatternObserver",
    "PatternProfile",
    "RowSimilarity",
    "Rules",
    "Similarity",
    "TappaCache",
    "TappaEviction",
    "adjacent_overlap",
    "adjusted_influence",
    "allocate",
    "at_budget",
    "average_profiles",
    "block_influence",
    "classify",
    "diagonal_bound",
    "dominant_pairs",
    "expected_scores",
    "host_frequencies",
    "key_similarity",
    "lag_bound",
    "mean_rotation",
    "measure_layers",
    "peak_lag",
    "predictability",
    "preferences",
    "profile_call",
    "prune_order",
    "query_similarity",
    "row_autocorrelation",
    "row_windows",
    "site_frequencies",
    "text_chunks",
    "time_autocorrelation",
    "token_scores",
    "vertical_bound",
    "without_attention",
    "without_blocks",
]
