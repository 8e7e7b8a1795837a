"""Weights without an exponential over the row: each key is weighed by itself, and a row may sum to anything.

    sigmoid    w_ij = σ(s_ij)                   or σ(s)/Σσ ,  σ(s)/n_i ,  σ(s − ln n_i)    (n_i visible keys)
    elu        w_ij = elu(s_ij) + 1             or divided by its sum
    softpick   w_ij = relu(e^{s_ij} − 1) / ( Σ_k |e^{s_ik} − 1| + ε )

Sigmoid and elu are variants of arXiv 2410.10781, which gives them no bias; dividing by n_i or taking off ln n_i keeps
long rows from growing and is an addition here. Softpick is of arXiv 2504.20966 in the form of its code.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from headway.errors import unknown
from headway.kernels.normalizers.softmax_family import softmax_weights, wide

#: How a sigmoid row is brought to size.
SIGMOID_SCALES = ("none", "sum", "count", "log_count")
SOFTPICK_EPS = 1e-8


def sigmoid_weights(
    logits: Float[Tensor, "batch heads rows keys"],
    visible: Bool[Tensor, "#batch #heads rows keys"],
    *,
    scaling: str = "none",
) -> Float[Tensor, "batch heads rows keys"]:
    """σ(s) at visible keys; `scaling` divides by the sum or the number of visible keys, or takes ln of it off s."""
    if scaling not in SIGMOID_SCALES:
        raise unknown("scaling", scaling, SIGMOID_SCALES)
    scores = _shown(logits, visible)
    if scaling == "sum":
        return softmax_weights(logsigmoid(scores), visible).to(logits.dtype)
    count = visible.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    weights = torch.sigmoid(scores - count.log() if scaling == "log_count" else scores)
    if scaling == "count":
        weights = weights / count
    return torch.where(visible, weights, 0.0).to(logits.dtype)


def elu_weights(
    logits: Float[Tensor, "batch heads rows keys"],
    visible: Bool[Tensor, "#batch #heads rows keys"],
    *,
    normalise: bool = False,
) -> Float[Tensor, "batch heads rows keys"]:
    """elu(s) + 1, that is e^s below zero and s + 1 above. The sum is taken of logarithms, so that it never is zero."""
    scores = _shown(logits, visible)
    if normalise:
        logarithm = torch.where(scores > 0, torch.log1p(scores.clamp(min=0)), scores)
        return softmax_weights(logarithm, visible).to(logits.dtype)
    weights = torch.exp(scores.clamp(max=0)) + scores.clamp(min=0)
    return torch.where(visible, weights, 0.0).to(logits.dtype)


def softpick_weights(
    logits: Float[Tensor, "batch heads rows keys"],
    visible: Bool[Tensor, "#batch #heads rows keys"],
    *,
    eps: float = SOFTPICK_EPS,
) -> Float[Tensor, "batch heads rows keys"]:
    """relu(e^s − 1) / (Σ|e^s − 1| + ε), exactly zero where s ≤ 0.

    Numerator and denominator are multiplied by e^{−m} with m = max(s, 0), ε as well, so nothing overflows and the value
    is that of the formula. (The released code leaves ε as it is.)"""
    scores = _shown(logits, visible)
    top = scores.amax(-1, keepdim=True).clamp(min=0).detach()
    above, below = scores.clamp(min=0), scores.clamp(max=0)
    term = torch.exp(above - top) * -torch.expm1(-above) + torch.exp(-top) * torch.expm1(below)
    term = torch.where(visible, term, 0.0)
    total = term.abs().sum(-1, keepdim=True) + eps * torch.exp(-top)
    return (term.relu() / torch.where(total > 0, total, 1.0)).to(logits.dtype)


def _shown(logits: Tensor, visible: Tensor) -> Tensor:
    """Logits with zeros where nothing is seen, so that hidden numbers reach neither values nor gradients."""
    return torch.where(visible, wide(logits), 0.0)
