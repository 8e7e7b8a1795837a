"""Redistribution: takes attention off sinks and gives it to chosen keys.

    explicit   w'_s = α w_s ,   w'_t = w_t + β · (Σ_s w_s) / |T|         s ∈ S, t ∈ T, the visible targets
    visual     w'_s = (1 − p) w_s ,   w'_t ∝ w_t  gets p Σ_s w_s         in heads that look at what is not a sink

With α + β = 1 rows keep their sum; β = 0 only takes away. Survey: arXiv 2604.10098. The second form is that of See
What You Are Told: Visual Attention Sink in Large Multimodal Models, arXiv 2503.03321 (VAR): it acts in a row of a head
when at least ρ of the row's attention to the image is on tokens that are no sinks. Both act row by row, so nothing
looks ahead.
The proportional form for text is ACT, a method of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.stages import Editor
from headway.errors import ArgumentError
from headway.methods.sinks.sink_survey.places import (
    Head,
    Places,
    check_heads_of,
    heads_in,
    marked_keys,
    require_softmax,
)

#: Share of the attention to the image that must miss the sinks, and share of the sinks' mass that moves. Ours.
LEAST_RATIO, MOVED = 0.5, 0.6


def redistribute_to(
    weights: Float[Tensor, "*batch keys"],
    sinks: Bool[Tensor, "*#batch keys"],
    targets: Bool[Tensor, "*#batch keys"],
    *,
    alpha: float = 0.0,
    beta: float | None = None,
) -> Float[Tensor, "*batch keys"]:
    """The explicit form; `beta=None` is 1 − α. A row without a target stays as it is, unless nothing is given (β = 0).

    `targets` are those that a row can see; a sink among them is none."""
    beta = 1 - alpha if beta is None else beta
    targets = targets & ~sinks
    mass = (weights * sinks).sum(-1, keepdim=True)
    count = targets.sum(-1, keepdim=True)
    moved = torch.where(sinks, alpha * weights, weights) + targets * (beta * mass / count.clamp(min=1))
    return moved if beta == 0 else torch.where(count > 0, moved, weights)


def redistribute_to_image(
    weights: Float[Tensor, "*batch keys"],
    sinks: Bool[Tensor, "*#batch keys"],
    image: Bool[Tensor, "*#batch keys"],
    *,
    least_ratio: float = LEAST_RATIO,
    moved: float = MOVED,
) -> Float[Tensor, "*batch keys"]:
    """The visual form. Sinks are taken from wherever they stand, image tokens that are no sinks get their share in
    proportion to their weights. Rows with less than `least_ratio`, or without image attention, stay as they are."""
    visual = (weights * (image & ~sinks)).sum(-1, keepdim=True)
    whole = (weights * image).sum(-1, keepdim=True)
    acts = (visual > 0) & (visual >= least_ratio * whole)
    mass = (weights * sinks).sum(-1, keepdim=True)
    gain = 1 + moved * mass / torch.where(visual > 0, visual, 1.0)
    changed = torch.where(sinks, (1 - moved) * weights, torch.where(image & ~sinks, gain * weights, weights))
    return torch.where(acts, changed, weights)


class _OnSomeHeads(Editor):
    """An editor of all heads, or of (layer, head) pairs."""

    heads: Sequence[Head] | None

    def acts_at(self, site: Site) -> bool:
        return site.kind != "cross" and self.heads_at(site) != []

    def heads_at(self, site: Site) -> list[int] | None:
        return None if self.heads is None else [head for layer, head in self.heads if layer == site.layer]

    def prepare(self, sites: Sequence[Site]) -> None:
        check_heads_of(self.heads or (), sites)

    def move(self, call: AttentionCall, weights: Tensor, rows: Tensor, at: list[int]) -> Tensor:
        raise NotImplementedError

    def edit_weights(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        require_softmax(call, self.title)
        named = self.heads_at(call.site)
        at = list(range(call.heads)) if named is None else heads_in(call, named)[0]
        if not at:
            return weights
        changed = self.move(call, weights[:, at], rows, at)
        return weights.index_copy(1, torch.tensor(at, device=weights.device), changed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Redistribution(_OnSomeHeads):
    """Explicit redistribution: `headway.use(model, Redistribution(alpha=0.5))`.

    alpha: factor on the sinks, in [0, 1]; 1 changes nothing. beta: share of their mass that the targets get, None for
    1 − alpha, 0 for reduction (rows then sum to less than one). sinks, targets: positions from the first real token, or
    masks (batch, tokens); targets=None are all keys that are no sinks. heads: (layer, head) pairs, None for all."""

    alpha: float = 0.0
    beta: float | None = None
    sinks: Places = (0,)
    targets: Places | None = None
    heads: Sequence[Head] | None = None

    def __post_init__(self) -> None:
        beta = 1 - self.alpha if self.beta is None else self.beta
        if not 0 <= self.alpha <= 1 or not 0 <= beta <= 1 or self.alpha + beta > 1 + 1e-6:
            raise ArgumentError(
                f"alpha, beta: got {self.alpha}, {self.beta}; expected both in [0, 1] with a sum of at most 1 (1 keeps "
                "row sums)."
            )

    def acts_at(self, site: Site) -> bool:
        return self.alpha < 1 and super().acts_at(site)

    def move(self, call: AttentionCall, weights: Tensor, rows: Tensor, at: list[int]) -> Tensor:
        sinks = marked_keys(call, self.sinks, "sinks")
        seen = call.visible(rows)
        seen = seen[:, at] if seen.shape[1] > 1 else seen
        targets = seen if self.targets is None else seen & marked_keys(call, self.targets, "targets")
        return redistribute_to(weights, sinks, targets, alpha=self.alpha, beta=self.beta)


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualRedistribution(_OnSomeHeads):
    """Visual redistribution: `headway.use(model, VisualRedistribution(image=range(1, 577), sinks=[1, 40]))`.

    image: places of the image's tokens. sinks: places of sinks, in the image or before it (`dimension_sinks` finds
    them). least_ratio: ρ, moved: p; ours, as the survey gives none. heads: (layer, head) pairs, None for all."""

    image: Places
    sinks: Places = (0,)
    least_ratio: float = LEAST_RATIO
    moved: float = MOVED
    heads: Sequence[Head] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.least_ratio <= 1 or not 0 <= self.moved <= 1:
            raise ArgumentError(f"least_ratio, moved: got {self.least_ratio}, {self.moved}; expected shares in [0, 1].")

    def acts_at(self, site: Site) -> bool:
        return self.moved > 0 and super().acts_at(site)

    def move(self, call: AttentionCall, weights: Tensor, rows: Tensor, at: list[int]) -> Tensor:
        sinks, image = marked_keys(call, self.sinks, "sinks"), marked_keys(call, self.image, "image")
        return redistribute_to_image(weights, sinks, image, least_ratio=self.least_ratio, moved=self.moved)


def dimension_sinks(
    hidden: Float[Tensor, "*batch tokens width"], dimensions: Sequence[int], *, threshold: float = 20.0
) -> Bool[Tensor, "*batch tokens"]:
    """Tokens whose hidden state is massive in the sink's own dimensions: max_d |h_td| / rms(h_t) ≥ threshold.

    The dimensions are those in which the first token of the same model is massive (`massive_activations`)."""
    if not len(dimensions) or not 0 <= min(dimensions) <= max(dimensions) < hidden.shape[-1]:
        raise ArgumentError(f"dimensions: got {list(dimensions)}, expected at least one in 0..{hidden.shape[-1] - 1}.")
    h = hidden.float()
    rms = h.square().mean(-1).sqrt().clamp(min=1e-12)
    return h[..., list(dimensions)].abs().amax(-1) / rms >= threshold
