"""ACT, attention calibration: takes attention off later sinks in heads that profit, and gives it to the other keys.

    w'_s = β w_s  (s ∈ S) ,   w'_j = w_j (1 + (1−β) σ / (1−σ))  (j ∉ S) ,   S = { k ≠ 0 : mean weight received > τ }

Paper: Unveiling and Harnessing Hidden Attention Sinks, arXiv 2406.15765. `detection` finds S, `calibration` moves the
weights, `editor` does both in a running host, `search` and `scoring` find the heads and `heads` stores them.

The released code spares the first flagged key whatever it is (`initial="first_flagged"`); here it is token 0. It has an
absolute threshold; `threshold="relative"` is α/N. It edits only the first sequence of a batch, and its cached decoding
takes the statistic from a single row; here sums run on through decoding. It does not say how heads are selected: the
rule is in `search`. `scope="causal"` and the least number of rows are ours.
"""

from __future__ import annotations

from torch import nn

from headway.card import Card
from headway.door.stages import Stage
from headway.errors import ArgumentError
from headway.methods.sinks.act.calibration import BETA, interpolate, redistribute
from headway.methods.sinks.act.detection import find_sinks, received_mass, without_first_flagged
from headway.methods.sinks.act.editor import ACT
from headway.methods.sinks.act.heads import HeadSet, candidate_heads
from headway.methods.sinks.act.scoring import ChoiceScore, HiddenSinks
from headway.methods.sinks.act.search import (
    HeadSearch,
    join_searches,
    judge_heads,
    profits,
    search_heads,
    split_items,
    warn_if_same,
)

CARD = Card(
    slug="act",
    title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing LLMs without Training through Attention "
    "Calibration",
    year=2024,
    arxiv="2406.15765",
    family="sinks",
    stages=("Editor",),
    knobs={
        "heads": "the (layer, head) pairs to calibrate",
        "beta": "factor on the attention that sinks receive",
        "threshold": "absolute (tau) or relative to the length (alpha / N)",
        "scope": "prompt (the paper) or causal",
        "initial": "the sink that is spared: first token, first flagged (released code), none",
        "protect": "keys that are never scaled down",
        "candidates": "the only keys that may be",
        "least_rows": "rows that must have seen a key",
    },
    summary="Takes attention off sinks behind the first token, in heads that a search has shown to profit.",
)


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """ACT reads every key at any share: all candidate heads calibrated, or nothing at a share of 1.

    In the causal scope, so that texts can be scored and continued without looking ahead."""
    if not 0 < share <= 1:
        raise ArgumentError(f"share: got {share}, expected a share in (0, 1]; 1 is dense, and below it ACT is on.")
    if share == 1:
        return (ACT(heads=()),)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)  # type: ignore[operator,union-attr]
    first, last = (2, 1) if layers > 4 else (0, 0)
    return (ACT(heads=candidate_heads(model, skip_first=first, skip_last=last), scope="causal"),)


__all__ = [
    "ACT",
    "BETA",
    "CARD",
    "ChoiceScore",
    "HeadSearch",
    "HeadSet",
    "HiddenSinks",
    "at_budget",
    "candidate_heads",
    "find_sinks",
    "interpolate",
    "join_searches",
    "judge_heads",
    "profits",
    "received_mass",
    "redistribute",
    "search_heads",
    "split_items",
    "warn_if_same",
    "without_first_flagged",
]
