"""OrthoRank: a token matters as far as its hidden state has not yet turned towards the sink's.

    importance_t = 1 − |cos(h_t, h_sink)|

Normalised hidden states drift towards the sink's direction layer by layer; those that are orthogonal to it still carry
their own. Paper: OrthoRank: Token Selection via Sink Token Orthogonality for Efficient LLM inference, arXiv 2507.03865.
The paper uses the order to let a layer update only the most important tokens. That skips the MLP, which no attention
stage can; here the order decides which keys a layer keeps, which is the survey's repurposing of it (arXiv 2604.10098).
h is the input of the attention module, behind the host's norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.card import Card
from headway.door.call import AttentionCall
from headway.door.stages import Stage
from headway.errors import ArgumentError, HostError
from headway.methods.sinks.sink_survey.places import first_of
from headway.methods.sinks.sink_survey.ranked import RankedEviction, RankedLayer, ranked_at_budget

CARD = Card(
    slug="orthorank",
    title="OrthoRank: Token Selection via Sink Token Orthogonality for Efficient LLM inference",
    year=2025,
    arxiv="2507.03865",
    family="sinks",
    stages=("CachePolicy",),
    needs=("hidden states",),
    knobs={"budget": "keys per KV head", "recent": "last tokens that stay", "sinks": "first tokens that stay"},
    summary="Keeps the keys of tokens whose hidden state is most orthogonal to the sink's.",
)


def orthogonality(
    hidden: Float[Tensor, "*batch tokens width"], sink: Float[Tensor, "*batch width"]
) -> Float[Tensor, "*batch tokens"]:
    """1 − |cos(h_t, h_sink)|: 1 for an orthogonal token, 0 for the sink itself."""
    cosine = torch.nn.functional.cosine_similarity(hidden.float(), sink.float()[..., None, :], dim=-1)
    return 1 - cosine.abs()


@dataclass(frozen=True, kw_only=True, eq=False)
class OrthoRank(RankedEviction):
    """Keys of tokens that are most orthogonal to the first one: `headway.use(model, OrthoRank(budget=512))`.

    budget: keys that stay per KV head. recent: last tokens that stay. sinks: first tokens that stay, at least 1, as the
    sink's own importance is 0. A token keeps the importance that it had when it was read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 1 and self.budget > 3:
            raise ArgumentError(f"sinks: got {self.sinks}, expected at least 1: the rule gives the sink itself 0.")

    def rank(
        self, call: AttentionCall, layer: RankedLayer, given: AttentionCall, real: Bool[Tensor, "batch kv_heads slots"]
    ) -> Float[Tensor, "batch kv_heads slots"]:
        if call.hidden is None or call.hidden.ndim != 3 or call.hidden.shape[1] != call.queries:
            raise HostError(
                f"{call.site.name}: got no hidden state of {call.queries} tokens for the attention module, expected "
                "its input. Use a method that needs none, such as KeyDiff."
            )
        hidden = call.hidden.detach()
        start, first = layer.seen - call.queries, first_of(call).to(hidden.device)
        if layer.anchor is None:
            layer.anchor = hidden.new_zeros(hidden.shape[0], hidden.shape[2])
        arrives = (first >= start) & (first < layer.seen)
        at = (first - start).clamp(0, call.queries - 1)
        found = hidden[torch.arange(hidden.shape[0], device=hidden.device), at]
        layer.anchor = torch.where(arrives[:, None], found, layer.anchor)
        score = layer.score.clone()
        score[..., -call.queries :] = orthogonality(hidden, layer.anchor)[:, None].to(score.dtype)
        return score


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """A budget of about `share` of `tokens` tokens, a quarter of it recent ones. At 1 nothing is evicted."""
    return ranked_at_budget(OrthoRank, share, tokens=tokens, model=model, recent=0.25)
