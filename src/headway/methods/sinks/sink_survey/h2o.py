"""H2O: keeps the keys that received most attention so far (heavy hitters), and the most recent ones.

    score_j = Σ_t A_tj      over every query t so far

Paper: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv 2306.14048. Half of
its budget is recent tokens, which is the default at a budget here. It protects no sink by name, as early keys gather
most (`sinks=0`); here the first tokens stay, so that they do under any weights. Query heads that share keys are
averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.card import Card
from headway.door.call import AttentionCall
from headway.door.stages import Stage
from headway.methods.sinks.sink_survey.ranked import RankedEviction, RankedLayer, accumulated, ranked_at_budget

CARD = Card(
    slug="h2o",
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    year=2023,
    arxiv="2306.14048",
    family="sinks",
    stages=("CachePolicy",),
    knobs={"budget": "keys per KV head", "recent": "last tokens that stay", "sinks": "first tokens that stay"},
    summary="Keeps the keys that received most attention so far, and the most recent ones.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class H2O(RankedEviction):
    """Heavy hitters and recent tokens: `headway.use(model, H2O(budget=512, recent=256))`.

    budget: keys that stay per KV head. recent: last tokens that stay. sinks: first tokens that stay (0 in the
    paper)."""

    def rank(
        self, call: AttentionCall, layer: RankedLayer, given: AttentionCall, real: Bool[Tensor, "batch kv_heads slots"]
    ) -> Float[Tensor, "batch kv_heads slots"]:
        return layer.score + accumulated(given, layer.score.shape[1])


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """A budget of about `share` of `tokens` tokens, half of it recent ones. At 1 nothing is evicted."""
    return ranked_at_budget(H2O, share, tokens=tokens, model=model, recent=0.5)
