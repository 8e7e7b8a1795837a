"""LRPE: learned rotating positions for linear attention, which has no softmax to hide a rotation in.

    x_t → [ x_t cos θt , x_t sin θt ]        so that      q̃_t·k̃_s = Σ_j q_tj k_sj cos( θ_j (t − s) )

θ is learned per head and channel. It starts at 10000^(−2j/D) where j counts all D channels of all heads. The width of
query and key doubles, and with it the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

BASE = 10000.0


class LRPE(nn.Module):
    """Turns queries or keys by their positions. θ stays in at least float32: its error grows with the position."""

    no_decay = ("theta",)

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        order = torch.arange(heads * dim, dtype=torch.float64)
        angles = BASE ** (-2 * order / (heads * dim))
        self.theta = nn.Parameter(angles.view(heads, dim).to(torch.float32))

    def forward(
        self, x: Float[Tensor, "batch heads tokens dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens twice_dim"]:
        angle = positions[:, None, :, None].to(self.theta.dtype) * self.theta[:, None, :]
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            short = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if short else moved

        return super()._apply(move, recurse)
