"""Affine-scaled attention: softmax weights times a scale per token and head, plus a shift tied to a running mean of it.

    α_t = φ(x_t W_α)                     φ(z) = clip(0.1·z + 0.5, 0, 1)  or the sigmoid
    w_tj = α_t P_tj + β_t                at visible keys j alone,  P the softmax
    β_t = (ᾱ − α_t) / N_t                ᾱ ← ρ ᾱ + (1 − ρ) mean(α) in training, frozen after it

    out_t = α_t · softmax attention_t + (ᾱ − α_t) · (n_t / N_t) · m_t       m_t: mean of the n_t visible values

The last line is the same thing for any fused kernel. The text leaves N open. `count="visible"`: N_t = n_t, every row
sums to ᾱ, and reading a text at once or in pieces agrees. `count="length"`: N is one number for all rows, and a row
sums to α_t + (ᾱ − α_t)·n_t/N. Weights may be negative: they are no distribution. Paper: arXiv 2602.23057.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.kernels.normalizers.operation import Operation, fused_softmax, visible_count, visible_mean
from headway.kernels.normalizers.softmax_family import softmax_weights, wide

#: Slope and value at zero of the linear clipping φ: linear for |z| < 5.
SLOPE, MIDDLE = 0.1, 0.5
ACTIVATIONS = ("clip", "sigmoid")
COUNTS = ("visible", "length")
#: Decay of the running mean.
DECAY = 0.9


def scale_of(z: Float[Tensor, "*shape"], activation: str = "clip") -> Float[Tensor, "*shape"]:
    """φ(z) in [0, 1]: linear clipping, whose gradient is 0.1 for |z| ≤ 5 and 0 outside, or the sigmoid."""
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    return (SLOPE * z + MIDDLE).clamp(0.0, 1.0) if activation == "clip" else torch.sigmoid(z)


def updated_average(
    average: Float[Tensor, " #heads"],
    alpha: Float[Tensor, "batch heads tokens"],
    real: Bool[Tensor, "batch tokens"] | None = None,
    *,
    decay: float = DECAY,
) -> Float[Tensor, " #heads"]:
    """ρ·average + (1−ρ)·mean of α over real tokens and the batch: per head, or over heads too where `average` has one
    entry. Without a real token the average stays. Over all ranks where torch.distributed runs."""
    check_decay(decay)
    values = alpha.detach().float()
    real = values.new_ones(values.shape[0], values.shape[2]) if real is None else real.to(values.dtype)
    total = (torch.where(real[:, None] > 0, values, 0.0)).sum((0, 2))
    count = real.sum()
    if average.numel() == 1:
        total, count = total.sum(0, keepdim=True), count * alpha.shape[1]
    both = torch.cat([total, count[None]])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(both)
    mean = both[:-1] / both[-1].clamp(min=1)
    return torch.where(both[-1] > 0, decay * average.float() + (1 - decay) * mean, average.float())


def affine_weights(
    probabilities: Float[Tensor, "batch heads rows keys"],
    visible: Bool[Tensor, "#batch #heads rows keys"],
    alpha: Float[Tensor, "batch heads rows"],
    average: Float[Tensor, " #heads"] | None,
    *,
    length: float | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """α P + β at visible keys, zero elsewhere. `length=None` counts the visible keys of each row, else N = length.

    Without an average there is no shift: β = 0."""
    check_alpha(alpha, average, probabilities.shape[1], probabilities.shape[2])
    alpha = alpha[..., None].to(probabilities.dtype)
    if average is None:
        return torch.where(visible, alpha * probabilities, 0.0)
    count = visible.sum(-1, keepdim=True).clamp(min=1) if length is None else length
    shift = (average.view(1, -1, 1, 1).to(probabilities.dtype) - alpha) / count
    return torch.where(visible, alpha * probabilities + shift, 0.0)


def affine_attention(
    call: Operation,
    alpha: Float[Tensor, "batch heads queries"],
    average: Float[Tensor, " #heads"] | None,
    *,
    length: float | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """The output from a fused softmax and a mean of values, without explicit weights. Averages as in
    `affine_weights`."""
    check_alpha(alpha, average, call.query.shape[1], call.query.shape[2])
    return affine_output(call, fused_softmax(call), alpha, average, length=length)


def affine_output(
    call: Operation,
    attended: Float[Tensor, "batch heads queries value_dim"],
    alpha: Float[Tensor, "batch heads queries"],
    average: Float[Tensor, " #heads"] | None,
    *,
    length: float | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """The same where the softmax attention is there already."""
    heads = call.query.shape[1]
    check_alpha(alpha, average, heads, call.query.shape[2])
    attended = wide(attended)
    alpha = alpha[..., None].to(attended.dtype)
    if average is None:
        return (alpha * attended).to(call.value.dtype)
    mean = visible_mean(call).repeat_interleave(heads // call.value.shape[1], 1)
    if call.visible is not None:
        alive = call.visible.any(-1, keepdim=True)
        attended = torch.where(alive, attended, 0.0)
    if length is not None:
        mean = mean * (visible_count(call).to(mean.dtype) / length)
    output = alpha * attended + (average.view(1, -1, 1, 1).to(attended.dtype) - alpha) * mean
    return output.to(call.value.dtype)


class AffineWeighing:
    """The weighing of one call: it holds α of its rows, the first of which stands at key index `offset`."""

    name = "affine"
    whole = False

    def __init__(
        self,
        alpha: Float[Tensor, "batch heads queries"],
        average: Float[Tensor, " #heads"] | None,
        *,
        offset: int = 0,
        length: float | None = None,
    ) -> None:
        self.alpha, self.average, self.offset, self.length = alpha, average, offset, length

    def __call__(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        positions: Tensor,
        query: Tensor,
        key: Tensor,
    ) -> Float[Tensor, "batch heads rows keys"]:
        rows = (positions - self.offset).to(self.alpha.device)
        return affine_weights(
            softmax_weights(logits, visible), visible, self.alpha[:, :, rows], self.average, length=self.length
        )


def saturation(alpha: Float[Tensor, "*shape"]) -> float:
    """The share of scales at 0 or 1, where linear clipping passes no gradient on."""
    return float(((alpha <= 0) | (alpha >= 1)).float().mean())


def check_decay(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ArgumentError(f"decay: got {decay}, expected a number in [0, 1] such as {DECAY}.")


def check_alpha(alpha: Tensor, average: Tensor | None, heads: int, rows: int) -> None:
    """Raises ArgumentError when α or its mean do not fit the heads and rows."""
    if alpha.ndim != 3 or alpha.shape[1:] != (heads, rows):
        raise ArgumentError(
            f"alpha: got shape {tuple(alpha.shape)}, expected (batch, {heads}, {rows}): one scale per head and row. "
            "W_α must have as many outputs as there are query heads."
        )
    if average is not None and average.shape not in ((1,), (heads,)):
        raise ArgumentError(f"average: got shape {tuple(average.shape)}, expected ({heads},) or (1,).")
