"""Loss terms that train a model without attention sinks or the outliers that come with them; add them to the loss.

    decorrelation   mean_{t ≠ first} cos(h_first, h_t)           the first token's state must not look like all others
    tail penalty    mean( relu(|x|/τ − 1)^p )                    nothing may stand out beyond τ
    head balance    H · Σ_h f_h P_h                              non-sink mass is spread over heads, 1 when evenly

P_h is head h's mean share of the mass that does not go to sinks, f_h the share of queries at which h has most of it (no
gradient flows through f_h). Named by the survey of arXiv 2604.10098; the tail penalty is inferred from the aim of TWEO
and the head balance from the load balance of mixtures of experts (arXiv 2101.03961), for the survey gives neither form.
Hidden states come from `model(..., output_hidden_states=True)`, weights from an observer at the door that turns
gradients on (`torch.enable_grad()`, as the laboratory's `HeadMass` does): observers are run without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from headway.errors import ArgumentError

#: Size beyond which an activation counts as an outlier: that of massive activations is 100 (arXiv 2402.17762).
TAIL, POWER = 10.0, 2.0


def decorrelation_loss(
    hidden: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, ""]:
    """Mean cosine between the state of the first real token and those of the others, over the batch; −1 to 1.

    A sequence of one token counts nothing; 0 where no sequence has two."""
    batch, tokens, _ = hidden.shape
    real = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device) if mask is None else mask
    if real.shape != (batch, tokens):
        raise ArgumentError(f"mask: got shape {tuple(real.shape)}, expected {(batch, tokens)}.")
    states = torch.where(real[..., None], hidden, 0.0).float()
    first = real.long().argmax(1)
    opening = states.gather(1, first[:, None, None].expand(-1, 1, states.shape[2]))
    others = real & (torch.arange(tokens, device=hidden.device) != first[:, None])
    cosines = torch.where(others, cosine_similarity(states, opening, dim=-1), 0.0)
    return cosines.sum() / others.sum().clamp(min=1)


def tail_penalty(
    x: Float[Tensor, "*batch channels"],
    *,
    threshold: float = TAIL,
    power: float = POWER,
    mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """mean relu(|x|/τ − 1)^p over real tokens and channels: exactly zero where nothing exceeds τ."""
    if not threshold > 0 or power < 1:
        raise ArgumentError(
            f"threshold, power: got {threshold} and {power}, expected a positive threshold and a power of at least 1."
        )
    beyond = (x.float().abs() / threshold - 1).relu().pow(power)
    if mask is None:
        return beyond.mean()
    return torch.where(mask[..., None], beyond, 0.0).sum() / (mask.sum() * x.shape[-1]).clamp(min=1)


def non_sink_mass(
    weights: Float[Tensor, "batch heads queries keys"], sinks: Sequence[int] = (0,)
) -> Float[Tensor, "batch heads queries"]:
    """What each head gives to keys that are no sinks. Signed weights count by their size."""
    keys = weights.shape[-1]
    outside = [s for s in sinks if not 0 <= s < keys]
    if outside:
        raise ArgumentError(f"sinks: got key {outside[0]}, expected 0..{keys - 1}.")
    others = torch.ones(keys, dtype=torch.bool, device=weights.device)
    others[list(sinks)] = False
    return torch.where(others, weights.float().abs(), 0.0).sum(-1)


def head_balance_loss(
    mass: Float[Tensor, "batch heads queries"], mask: Bool[Tensor, "batch queries"] | None = None
) -> Float[Tensor, ""]:
    """H · Σ_h f_h P_h of the non-sink mass of each head: 1 when heads work evenly, H when one does all the work.

    Queries at which no head has any count nothing."""
    heads = mass.shape[1]
    total = mass.sum(1, keepdim=True)
    counted = total > 0
    if mask is not None:
        counted = counted & mask[:, None]
    share = torch.where(counted, mass / torch.where(total > 0, total, 1.0), 0.0)
    count = counted.sum().clamp(min=1)
    busiest = torch.nn.functional.one_hot(share.argmax(1), heads).movedim(-1, 1) * counted
    often = busiest.sum((0, 2)).float() / count
    return heads * (often.detach() * (share.sum((0, 2)) / count)).sum()
