"""KeyDiff: keeps keys that differ from the others, without looking at attention.

    score_j = 1 − cos(k_j, k̄) ,   k̄ the mean of the keys that are held

Sinks stand apart from the mean key, so that the score repurposes their geometry: what is unlike the mean is what
queries single out. Paper: KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments, arXiv 2504.15364. `anchor="direction"` takes k̄ over keys of length one, as a
released reimplementation does. The paper has no window of recent tokens (`recent=0`); 32 stay here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.card import Card
from headway.door.call import AttentionCall
from headway.door.stages import Stage
from headway.errors import unknown
from headway.methods.sinks.sink_survey.metrics import cosine_to_mean
from headway.methods.sinks.sink_survey.ranked import RankedEviction, RankedLayer, ranked_at_budget

CARD = Card(
    slug="keydiff",
    title="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
    "Environments",
    year=2025,
    arxiv="2504.15364",
    family="sinks",
    stages=("CachePolicy",),
    knobs={
        "budget": "keys per KV head",
        "anchor": "the mean key, or the mean direction",
        "recent": "last tokens that stay",
        "sinks": "first tokens that stay",
    },
    summary="Keeps the keys that are least like the mean key; needs no attention weights.",
)

ANCHORS = ("mean", "direction")


def key_difference(
    key: Float[Tensor, "*batch keys dim"],
    *,
    anchor: str = "mean",
    valid: Bool[Tensor, "*#batch keys"] | None = None,
) -> Float[Tensor, "*batch keys"]:
    """1 − cos(k_j, k̄): 0 for a key along the mean, 2 for one against it."""
    if anchor not in ANCHORS:
        raise unknown("anchor", anchor, ANCHORS)
    key = key.float()
    return 1 - cosine_to_mean(torch.nn.functional.normalize(key, dim=-1) if anchor == "direction" else key, valid=valid)


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyDiff(RankedEviction):
    """Keys unlike the mean key: `headway.use(model, KeyDiff(budget=512))`.

    budget: keys that stay per KV head. anchor: "mean" of the keys or of their "direction". recent: last tokens that
    stay (0 in the paper). sinks: first tokens that stay. Keys are compared as the cache holds them, after rotation."""

    anchor: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor not in ANCHORS:
            raise unknown("anchor", self.anchor, ANCHORS)

    def rank(
        self, call: AttentionCall, layer: RankedLayer, given: AttentionCall, real: Bool[Tensor, "batch kv_heads slots"]
    ) -> Float[Tensor, "batch kv_heads slots"]:
        if bool((real.sum(-1) <= self.budget).all()):
            return layer.score
        return key_difference(layer.store.key, anchor=self.anchor, valid=real)


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """A budget of about `share` of `tokens` tokens, a quarter of it recent ones. At 1 nothing is evicted."""
    return ranked_at_budget(KeyDiff, share, tokens=tokens, model=model, recent=0.25)
