"""The logit lever: one bias on the first token's logit steers how much attention is left for all others.

    s_i1 ← s_i1 + b      ⇔      w'_1 = w_1 e^b / Z ,   w'_j = w_j / Z ,   Z = 1 − w_1 + w_1 e^b

b = 0 changes nothing, b → −∞ masks the token, b < 0 sharpens what the other keys get. Paper: ZeroTuning: Unlocking the
Initial Token's Power to Enhance Large Language Models Without Training, arXiv 2505.11739, which tunes b on data, by
head. A row that sees the first token alone stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.card import Card
from headway.door.call import AttentionCall, Site
from headway.door.stages import Editor
from headway.errors import ArgumentError
from headway.methods.sinks.sink_survey.places import (
    Head,
    check_heads_of,
    check_layers_of,
    marked_keys,
    require_softmax,
)

CARD = Card(
    slug="zerotuning",
    title="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
    year=2025,
    arxiv="2505.11739",
    family="sinks",
    stages=("Editor",),
    knobs={"bias": "what is added to the logit of the first token: for all heads, by layer or by (layer, head)"},
    summary="Adds a bias to the first token's logit, which gives its attention to the other keys or takes theirs.",
)

CANDIDATES = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0)


def lever(
    weights: Float[Tensor, "batch heads rows keys"],
    column: Bool[Tensor, "#batch #heads #rows keys"],
    bias: Float[Tensor, " heads"],
) -> Float[Tensor, "batch heads rows keys"]:
    """The weights after `bias` is added to the logits of the keys that `column` marks; rows keep their sum.

    Rows whose whole mass would go stay as they are."""
    up = bias.to(weights).clamp(min=0).view(1, -1, 1, 1)
    down = bias.to(weights).clamp(max=0).view(1, -1, 1, 1)
    # One of the two factors is 1, so that nothing overflows.
    token, other = torch.exp(down), torch.exp(-up)
    moved = torch.where(column, weights * token, weights * other)
    total = moved.sum(-1, keepdim=True)
    moved = moved * weights.sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, moved, weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitLever(Editor):
    """ZeroTuning: `headway.use(model, LogitLever(bias=-1.0))`.

    bias: b for every head, or by layer, or by (layer, head); heads that are not named keep 0. token: the position,
    counted from the first real token of each sequence, that is levered."""

    bias: float | Mapping[int | Head, float]
    token: int = 0

    def __post_init__(self) -> None:
        values = self.bias.values() if isinstance(self.bias, Mapping) else [self.bias]
        if any(math.isnan(value) or value == math.inf for value in values) or self.token < 0:
            raise ArgumentError(
                f"bias, token: got {self.bias}, {self.token}; expected biases below infinity (−inf masks the token) "
                "and a token of at least 0."
            )

    def acts_at(self, site: Site) -> bool:
        return site.kind != "cross" and self.heads_at(site) != []

    def prepare(self, sites: Sequence[Site]) -> None:
        if isinstance(self.bias, Mapping):
            check_heads_of([key for key in self.bias if isinstance(key, tuple)], sites)
            check_layers_of([key for key in self.bias if not isinstance(key, tuple)], sites)

    def bias_of(self, site: Site, head: int) -> float:
        if not isinstance(self.bias, Mapping):
            return self.bias
        return self.bias.get((site.layer, head), self.bias.get(site.layer, 0.0))

    def heads_at(self, site: Site) -> list[int] | None:
        heads = [head for head in range(site.heads) if self.bias_of(site, head) != 0]
        return None if heads and len(heads) == site.heads else heads

    def edit_weights(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        require_softmax(call, self.title)
        heads = range(call.heads) if call.of_heads is None else call.of_heads.tolist()
        bias = torch.tensor([self.bias_of(call.site, head) for head in heads], device=weights.device)
        column = marked_keys(call, (self.token,), "token")
        if call.sinks is None:
            return lever(weights, column, bias)
        # A learned sink is one more key of the softmax, whose share is not among the weights.
        share = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
        whole = torch.cat([weights, share], -1)
        return lever(whole, torch.nn.functional.pad(column, (0, 1)), bias)[..., :-1]


def tune_lever(
    loss: Callable[[LogitLever], float],
    *,
    groups: Sequence[Sequence[int | Head]] | None = None,
    candidates: Sequence[float] = CANDIDATES,
) -> tuple[LogitLever, dict[float, float] | dict[int, dict[float, float]]]:
    """The bias that makes `loss(stage)` least, among `candidates` and 0, and the losses that were seen.

    With `groups` (of layers or heads) each group gets its own bias, one group after another, each with those before it
    in place. Ties keep the smaller change."""
    ordered = sorted({0.0, *candidates}, key=abs)
    if groups is None:
        seen = {b: float(loss(LogitLever(bias=b))) for b in ordered}
        return LogitLever(bias=min(ordered, key=seen.__getitem__)), seen
    chosen: dict[int | Head, float] = {}
    table: dict[int, dict[float, float]] = {}
    for number, group in enumerate(groups):
        tried = {b: float(loss(LogitLever(bias=chosen | dict.fromkeys(group, b)))) for b in ordered}
        best = min(ordered, key=tried.__getitem__)
        chosen |= dict.fromkeys(group, best)
        table[number] = tried
    return LogitLever(bias=chosen), table
