"""Norms of mixers and models: root mean square with a weight per channel, one weight or none, and a gated norm.

    rms_norm(x) = x · rsqrt( mean(x²) + ε ) · weight          (mean over the last axis)

Statistics are taken in at least float32, and the result has the dtype of x.

- `SimpleRMSNorm`  no weight (TransNormerLLM, arXiv 2307.14995)
- `RMSNorm`        a weight per channel, 1 at the start
- `SingleScaleRMSNorm`  one weight for all channels (OSP, arXiv 2506.19697, which writes it as γ·x/‖x‖ with γ = √d)
- `GatedNorm`      norm(x) ⊙ σ(gate)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from headway.errors import ArgumentError, unknown

EPS = 1e-6


def rms_norm(
    x: Float[Tensor, "*batch channels"], weight: Float[Tensor, " #channels"] | None = None, *, eps: float = EPS
) -> Float[Tensor, "*batch channels"]:
    """x over the root of its mean square, times `weight` (one entry per channel, a single one, or None)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.to(wide.dtype)
    return normed.to(x.dtype)


class SimpleRMSNorm(nn.Module):
    """`rms_norm` without a weight."""

    def __init__(self, width: int | None = None, *, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        return rms_norm(x, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class RMSNorm(nn.Module):
    """`rms_norm` with a weight per channel."""

    def __init__(self, width: int, *, eps: float = EPS) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SingleScaleRMSNorm(RMSNorm):
    """`rms_norm` with one weight, so that no channel can be made to stand out."""

    def __init__(self, width: int | None = None, *, eps: float = EPS) -> None:
        super().__init__(1, eps=eps)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": RMSNorm,
    "srms": SimpleRMSNorm,
    "single_scale": SingleScaleRMSNorm,
    "layer": nn.LayerNorm,
    "none": nn.Identity,
}


def make_norm(name: str, width: int, *, eps: float = EPS) -> nn.Module:
    """The norm of that name over `width` channels: one of `NORMS`."""
    if name not in NORMS:
        raise unknown("norm", name, NORMS)
    return NORMS[name](width) if name == "none" else NORMS[name](width, eps=eps)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda gate: gate,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
}


class GatedNorm(nn.Module):
    """norm(x) ⊙ activation(gate). `norm` is a name of `NORMS`, `gate` one of `GATES`.

    `groups` normalises that many equal runs of channels apart (one per head), with one weight for all of them."""

    def __init__(self, width: int, *, norm: str = "rms", gate: str = "silu", groups: int = 1, eps: float = EPS) -> None:
        super().__init__()
        if gate not in GATES:
            raise unknown("gate", gate, GATES)
        if groups < 1 or width % groups:
            raise ArgumentError(f"groups: got {groups}, expected a number that divides the width {width}.")
        self.groups, self.gate = groups, gate
        self.norm = make_norm(norm, width // groups, eps=eps)

    def forward(
        self, x: Float[Tensor, "*batch channels"], gate: Float[Tensor, "*batch channels"]
    ) -> Float[Tensor, "*batch channels"]:
        apart = x.unflatten(-1, (self.groups, -1)) if self.groups > 1 else x
        normed = self.norm(apart)
        return (normed.flatten(-2) if self.groups > 1 else normed) * GATES[self.gate](gate)

    def extra_repr(self) -> str:
        return f"gate={self.gate}, groups={self.groups}"
