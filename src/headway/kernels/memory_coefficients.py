"""Momentum and forgetting inside a chunk whose gradients are all taken at the chunk's start, without a division.

    S_t = η_t S_{t−1} − θ_t u_t ,   M_t = (1 − α_t) M_{t−1} + S_t

With the gradients u_i given, both are linear in what the chunk starts from:

    M_t = decay_t · M_0 + carry_t · S_0 − Σ_{i≤t} gradient_ti · u_i
    S_t = momentum_t · S_0 − Σ_{i≤t} pushed_ti · u_i

The published form divides running products, decay_t / decay_i, which is 0 / 0 once α comes close to 1. Here every
product runs over the steps between i and t only: A_ti = Π_{i<r≤t}(1 − α_r) and E_ti = Π_{i<r≤t} η_r are lower
triangular, and pushed = E·diag(θ), gradient = A·pushed, carry = A·momentum.

A step that is not real is no step: M_t = M_{t−1} and S_t = S_{t−1}. θ = 0 alone would not do, since M moves on with the
momentum. Equations: Titans, arXiv 2501.00663, section 3; the recursion of the reference form is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError, unknown


@dataclass(frozen=True)
class Running:
    """The coefficients behind one step: scalars for M_0 and S_0, one number per source for the gradients."""

    decay: Float[Tensor, " *lead"]
    carry: Float[Tensor, " *lead"]
    momentum: Float[Tensor, " *lead"]
    gradient: Float[Tensor, "*lead sources"]
    pushed: Float[Tensor, "*lead sources"]

    @classmethod
    def start(cls, shape: tuple[int, ...], sources: int, like: Tensor) -> Running:
        """Those at the start of a chunk: M = M_0, S = S_0."""
        decay, momentum = (like.new_ones(shape) for _ in range(2))
        gradient, pushed = (like.new_zeros(*shape, sources) for _ in range(2))
        return cls(decay, like.new_zeros(shape), momentum, gradient, pushed)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.decay, self.carry, self.momentum, self.gradient, self.pushed

    def where(self, chosen: Bool[Tensor, " batch"], other: Running) -> Running:
        """These for the chosen rows of the batch, the other ones for the rest."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Running(*(torch.where(chosen.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


@dataclass(frozen=True)
class Coefficients:
    """The coefficients behind every step of a chunk; the rows of `Running` side by side."""

    decay: Float[Tensor, "*lead steps"]
    carry: Float[Tensor, "*lead steps"]
    momentum: Float[Tensor, "*lead steps"]
    gradient: Float[Tensor, "*lead steps sources"]
    pushed: Float[Tensor, "*lead steps sources"]

    def at(self, step: int) -> Running:
        return Running(
            self.decay[..., step],
            self.carry[..., step],
            self.momentum[..., step],
            self.gradient[..., step, :],
            self.pushed[..., step, :],
        )

    def chunk(self, index: int) -> Coefficients:
        """Those of one chunk, where a dimension of chunks stands before the steps."""
        return Coefficients(
            self.decay[..., index, :],
            self.carry[..., index, :],
            self.momentum[..., index, :],
            self.gradient[..., index, :, :],
            self.pushed[..., index, :, :],
        )

    def after(self, before: Running) -> Coefficients:
        """These steps behind earlier ones of the same chunk, whose sources stand in the same slots."""
        decay, carry, momentum = (x[..., None] for x in (before.decay, before.carry, before.momentum))
        gradient, pushed = before.gradient[..., None, :], before.pushed[..., None, :]
        return Coefficients(
            self.decay * decay,
            self.decay * carry + self.carry * momentum,
            self.momentum * momentum,
            self.gradient + self.decay[..., None] * gradient + self.carry[..., None] * pushed,
            self.pushed + self.momentum[..., None] * pushed,
        )

    def shifted(self) -> Coefficients:
        """Behind the step before each one: what a read before the update sees of steps 1, 2, …; step 0 sees M_0."""

        def shift(x: Tensor, axis: int, first: float) -> Tensor:
            start = torch.full_like(x.narrow(axis, 0, 1), first)
            return torch.cat([start, x.narrow(axis, 0, x.shape[axis] - 1)], axis)

        return Coefficients(
            shift(self.decay, -1, 1.0),
            shift(self.carry, -1, 0.0),
            shift(self.momentum, -1, 1.0),
            shift(self.gradient, -2, 0.0),
            shift(self.pushed, -2, 0.0),
        )


def memory_coefficients(
    theta: Float[Tensor, "*lead steps"],
    eta: Float[Tensor, "*lead steps"],
    alpha: Float[Tensor, "*lead steps"],
    *,
    real: Bool[Tensor, "*lead steps"] | None = None,
    mode: str = "block",
) -> Coefficients:
    """The coefficients of one chunk of as many slots as there are steps; leading dimensions broadcast.

    theta: step sizes, eta: momentum in [0, 1], alpha: forgetting in [0, 1]. `mode="block"` is two products of
    triangular matrices, "reference" the recursion over steps. Raises ArgumentError for steps that do not fit."""
    if theta.shape[-1] != eta.shape[-1] or theta.shape[-1] != alpha.shape[-1]:
        got = [x.shape[-1] for x in (theta, eta, alpha)]
        raise ArgumentError(f"theta, eta, alpha: got {got} steps, expected as many of each.")
    if mode not in ("block", "reference"):
        raise unknown("mode", mode, ("block", "reference"))
    taken = torch.ones_like(theta, dtype=torch.bool) if real is None else real
    theta, eta, alpha, taken = torch.broadcast_tensors(theta, eta, alpha, taken)
    return (_triangular if mode == "block" else _recursion)(theta, eta, alpha, taken)


def _triangular(theta: Tensor, eta: Tensor, alpha: Tensor, real: Tensor) -> Coefficients:
    theta = torch.where(real, theta, 0.0)
    eta = torch.where(real, eta, 1.0)
    keep = torch.where(real, 1 - alpha, 1.0)
    moves = real.to(theta.dtype)
    momentum = eta.cumprod(-1)
    pushed = _between(eta) * theta[..., None, :]
    kept = _between(keep)
    joined = kept @ (moves[..., None] * torch.cat([pushed, momentum[..., None]], -1))
    return Coefficients(keep.cumprod(-1), joined[..., -1], momentum, joined[..., :-1], pushed)


def _between(factor: Float[Tensor, "*lead steps"]) -> Float[Tensor, "*lead steps steps"]:
    """Entry (t, i): the product of the factors of steps i + 1 … t, one at t = i, zero above."""
    steps = factor.shape[-1]
    later = torch.ones(steps, steps, dtype=torch.bool, device=factor.device).tril(-1)
    return torch.where(later, factor[..., None], 1.0).cumprod(-2).tril()


def _recursion(theta: Tensor, eta: Tensor, alpha: Tensor, real: Tensor) -> Coefficients:
    steps = theta.shape[-1]
    now = Running.start(tuple(theta.shape[:-1]), steps, theta)
    rows = []
    for t in range(steps):
        now = advance(now, theta[..., t], eta[..., t], alpha[..., t], torch.tensor(t), real[..., t])
        rows.append(now)
    if not rows:
        empty = theta.new_zeros(*theta.shape, 0)
        return Coefficients(theta, theta, theta, empty, empty)
    columns = zip(*(row.tensors() for row in rows), strict=True)
    scalars, vectors = 3, 2
    axes = [-1] * scalars + [-2] * vectors
    return Coefficients(*(torch.stack(list(column), axis) for column, axis in zip(columns, axes, strict=True)))


def advance(
    before: Running,
    theta: Float[Tensor, " *lead"],
    eta: Float[Tensor, " *lead"],
    alpha: Float[Tensor, " *lead"],
    slot: Tensor,
    real: Bool[Tensor, " *lead"],
) -> Running:
    """One step: the gradient in `slot` (one number, or one per leading entry) comes in with θ. Not real: no step."""
    keep = 1 - alpha
    own = torch.arange(before.gradient.shape[-1], device=theta.device) == slot[..., None]
    momentum = eta * before.momentum
    pushed = eta[..., None] * before.pushed + torch.where(own, theta[..., None], 0.0)
    after = Running(
        keep * before.decay,
        keep * before.carry + momentum,
        momentum,
        keep[..., None] * before.gradient + pushed,
        pushed,
    )
    chosen = zip(after.tensors(), before.tensors(), strict=True)
    return Running(*(torch.where(real if a.ndim == real.ndim else real[..., None], a, b) for a, b in chosen))
