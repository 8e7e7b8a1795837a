"""A2SF: accumulated attention that forgets, so that old keys do not live on what they once received.

    score_j ← γ · score_j + A_tj      at every query t ,   γ ≤ 1

Early keys are seen by more queries, and sinks by all: plain sums (γ = 1, which is H2O's score) favour both. Paper:
A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder, arXiv 2407.20485.
With γ < 1 sinks lose their lead and could go; the first tokens are kept by name (`sinks=0`: the paper's rule).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.card import Card
from headway.door.call import AttentionCall
from headway.door.stages import Stage
from headway.errors import ArgumentError
from headway.methods.sinks.sink_survey.ranked import (
    RankedEviction,
    RankedLayer,
    accumulated,
    ranked_at_budget,
    real_rows,
)

CARD = Card(
    slug="a2sf",
    title="A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
    year=2024,
    arxiv="2407.20485",
    family="sinks",
    stages=("CachePolicy",),
    knobs={
        "budget": "keys per KV head",
        "forgetting": "factor on old scores at every query",
        "recent": "last tokens that stay",
        "sinks": "first tokens that stay",
    },
    summary="Keeps the keys that received most attention lately: old attention fades at every step.",
)

#: Half of a score is forgotten after about 14 queries. The paper tunes the factor by model; this one is ours.
FORGETTING = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class A2SF(RankedEviction):
    """Accumulated scores with a forgetting factor: `headway.use(model, A2SF(budget=512, forgetting=0.95))`.

    budget: keys that stay per KV head. forgetting: γ in (0, 1]; 1 gives H2O's scores. recent: last tokens that stay.
    sinks: first tokens that stay (0 in the paper)."""

    forgetting: float = FORGETTING

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.forgetting <= 1:
            raise ArgumentError(f"forgetting: got {self.forgetting}, expected a factor in (0, 1]; 1 forgets nothing.")

    def rank(
        self, call: AttentionCall, layer: RankedLayer, given: AttentionCall, real: Bool[Tensor, "batch kv_heads slots"]
    ) -> Float[Tensor, "batch kv_heads slots"]:
        rows = real_rows(call)
        count = torch.full((call.query.shape[0],), call.queries) if rows is None else rows.sum(1)
        faded = self.forgetting ** count.to(layer.score)
        fresh = accumulated(given, layer.score.shape[1], forgetting=self.forgetting)
        return layer.score * faded[:, None, None] + fresh


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """A budget of about `share` of `tokens` tokens, a quarter of it recent ones. At 1 nothing is evicted."""
    return ranked_at_budget(A2SF, share, tokens=tokens, model=model, recent=0.25)
