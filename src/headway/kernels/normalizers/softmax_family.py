"""Weights made by an exponential: softmax, and the changes of it that let a row be silent.

    softmax               w_ij = e^{s_ij} / Σ_k e^{s_ik}
    extra logit b_i       w_ij = e^{s_ij} / ( e^{b_i} + Σ_k e^{s_ik} )
    clipped               w_ij = clip( (ζ − γ) softmax(s)_ij + γ , 0, 1 )
    elastic, temperature  w_ij = softmax(s / T)_ij ,  T > 1
    elastic, offset       w_ij = relu( softmax(s)_ij + τ_h / n_i ) ,  n_i visible keys

The extra logit is 0 for softmax+1, learned per head for the learned denominator (arXiv 2309.17453 and gpt-oss), and
q_i·k* for a key slot (arXiv 2410.10781). Clipped softmax is of arXiv 2306.12929. A row that sees nothing gives zeros,
and what a hidden logit holds, NaN included, has no effect. Sums are taken in float32 or better.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError

#: ζ, and α of γ = −α/T in the released OPT-125M recipe of clipped softmax.
STRETCH, CLIP_ALPHA = 1.0, 12.0


def softmax_weights(
    logits: Float[Tensor, "batch heads rows keys"],
    visible: Bool[Tensor, "#batch #heads rows keys"],
    extra: Float[Tensor, "#batch #heads #rows 1"] | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """Softmax over the visible keys and, where given, one more logit, whose own weight is left out of the result."""
    scores = wide(logits).masked_fill(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    if extra is not None:
        extra = extra.to(scores.dtype)
        top = torch.maximum(top, extra)
    top = torch.where(top == -torch.inf, 0.0, top).detach()
    size = torch.exp(scores - top)
    total = size.sum(-1, keepdim=True)
    if extra is not None:
        total = total + torch.exp(extra - top)
    return (size / torch.where(total > 0, total, 1.0)).to(logits.dtype)


def clipped_weights(
    logits: Float[Tensor, "batch heads rows keys"],
    visible: Bool[Tensor, "#batch #heads rows keys"],
    *,
    gamma: float,
    stretch: float = STRETCH,
) -> Float[Tensor, "batch heads rows keys"]:
    """clip((ζ − γ)·softmax + γ, 0, 1) at visible keys: γ < 0 makes small weights exactly 0, ζ > 1 large ones 1."""
    if not (gamma <= 0 and stretch >= 1):
        raise ArgumentError(
            f"gamma, stretch: got {gamma} and {stretch}, expected gamma ≤ 0 and stretch ≥ 1; 0 and 1 are softmax."
        )
    stretched = softmax_weights(wide(logits), visible) * (stretch - gamma) + gamma
    return torch.where(visible, stretched.clamp(0.0, 1.0), 0.0).to(logits.dtype)


def elastic_weights(
    logits: Float[Tensor, "batch heads rows keys"],
    visible: Bool[Tensor, "#batch #heads rows keys"],
    *,
    temperature: float = 1.0,
    offset: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """softmax(s / temperature), or with an offset τ per head relu(softmax(s / temperature) + τ / visible keys)."""
    if not temperature > 0:
        raise ArgumentError(f"temperature: got {temperature}, expected a positive number; 1 is softmax.")
    weights = softmax_weights(wide(logits) / temperature, visible)
    if offset is not None:
        count = visible.sum(-1, keepdim=True).clamp(min=1)
        moved = weights + offset.to(weights.dtype).view(1, -1, 1, 1) / count
        weights = torch.where(visible, moved.relu(), 0.0)
    return weights.to(logits.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()
