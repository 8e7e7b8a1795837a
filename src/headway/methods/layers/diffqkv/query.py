"""The augmented query: a gated MLP behind the query projection, whose width costs no cache.

    q₀ = x W_Q ,   q = W_down( SiLU(W_gate q₀) ⊙ (W_up q₀) )        q = q₀ + … with `residual`

The released forward has no residual and no norm. With a residual and W_down = 0 the layer starts as it was without
augmentation, which is how a converted checkpoint begins.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from headway.errors import ArgumentError


class AugmentedQuery(nn.Module):
    """`size` numbers in and out, `hidden` between. Paper: hidden = 1.5 × the model's width did best."""

    def __init__(self, size: int, hidden: int, *, residual: bool = False) -> None:
        super().__init__()
        if hidden < 1:
            raise ArgumentError(f"aug_dim: got {hidden}, expected at least 1; 0 leaves the augmentation out.")
        self.residual = residual
        self.gate = nn.Linear(size, hidden, bias=False)
        self.up = nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)

    def forward(self, query: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        augmented = self.down(silu(self.gate(query)) * self.up(query))
        return query + augmented if self.residual else augmented

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """W_down = 0. Raises ArgumentError without a residual, where that would be no query at all."""
        if not self.residual:
            raise ArgumentError(
                "aug_residual: got False, expected True: without the residual no start leaves q as it is."
            )
        self.down.weight.zero_()
