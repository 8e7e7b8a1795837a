"""What is done to a row of weights once its sinks S are known.

    w'_s = β w_s  (s ∈ S) ,   w'_j = w_j (1 + (1−β) σ / (r−σ))  (j ∉ S) ,   σ = Σ_S w_s ,  r = Σ w

Rows keep their sum r (one, or less beside a learned sink logit). For r = 1 the output is an interpolation,

    out' = β · Attention(q, K, V) + (1−β) · Attention(q, K∖S, V∖S) ,

so 1 − β is the strength: 0 leaves attention as it is, 1 masks the sinks out. A row with all its mass on sinks has
nowhere to put it and stays (the released code divides by zero).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError, is_number

#: β of the released scripts.
BETA = 0.4
#: Rows with less than this share of their mass off the sinks stay as they are.
LEAST_REST = 1e-6


def redistribute(
    weights: Float[Tensor, "*rest rows keys"], sinks: Bool[Tensor, "*#rest #rows keys"], *, beta: float = BETA
) -> Float[Tensor, "*rest rows keys"]:
    """The calibrated weights. `sinks` may be one set for all rows or one for each."""
    check_beta(beta)
    on_sinks = torch.where(sinks, weights, 0.0).sum(-1, keepdim=True)
    # Summed, not taken from the total: beside a sink that has nearly all, a difference would be rounding alone.
    rest = torch.where(sinks, 0.0, weights).sum(-1, keepdim=True)
    movable = rest > LEAST_REST * (on_sinks + rest)
    raised = 1 + (1 - beta) * on_sinks / rest.masked_fill(~movable, 1.0)
    changed = torch.where(sinks, beta * weights, weights * raised)
    return torch.where(movable & (on_sinks > 0), changed, weights)


def interpolate(
    output: Float[Tensor, "*rest rows dim"], without_sinks: Float[Tensor, "*rest rows dim"], *, strength: float
) -> Float[Tensor, "*rest rows dim"]:
    """(1 − strength) · ordinary output + strength · output with the sinks masked out; strength is 1 − β."""
    if not 0 <= strength <= 1:
        raise ArgumentError(f"strength: got {strength}, expected 0 (untouched) to 1 (sinks masked out).")
    return (1 - strength) * output + strength * without_sinks


def check_beta(beta: float) -> None:
    if not (is_number(beta) and 0 <= beta <= 1):
        raise ArgumentError(
            f"beta: got {beta!r}, expected 0 (sinks removed) to 1 (nothing changes); the paper uses 0.4."
        )
