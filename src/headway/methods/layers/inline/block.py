"""A vision-transformer block around a mixer, over the whole map or in windows.

x ← x + mixer( norm(x) ) ,   x ← x + mlp( norm(x) )
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.door.mixer import Mixer
from headway.errors import ArgumentError
from headway.methods.layers.inline.mixer import InlineMixer


class InlineBlock(nn.Module):
    """One pre-norm block.

    mixer: the class that mixes tokens, InlineMixer by default; further options go to it. window: side of the square
    windows in which tokens are mixed; None is the whole map, at which shifted windows have nothing to do. mlp_ratio:
    hidden width of the MLP per width. drop_path: share of samples for which a branch is left out in training."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        mixer: type[Mixer] = InlineMixer,
        window: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ArgumentError(f"drop_path: got {drop_path}, expected a share in [0, 1).")
        if window is not None and (window < 1 or options.get("prefix", 0)):
            raise ArgumentError(
                f"window: got {window} with prefix={options.get('prefix', 0)}, expected a side of 1 or more and no "
                "prefix tokens, which belong to no window."
            )
        self.window, self.drop_path = window, drop_path
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.mixer = mixer(width, heads=heads, **{"causal": False, **options})
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        *,
        grid: tuple[int, int] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """`grid` is (height, width) of the patches, `mask` True at real tokens."""
        y = self.norm1(x)
        if self.window is None:
            mixed, _ = self.mixer(y, grid=grid, mask=mask)
        else:
            mixed = in_windows(self.mixer, y, grid, self.window, mask)
        x = x + self._dropped(mixed)
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return torch.where(kept, branch / (1 - self.drop_path), 0)


def in_windows(
    mixer: Mixer,
    x: Float[Tensor, "batch tokens width"],
    grid: tuple[int, int] | None,
    window: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens width"]:
    """The mixer on each window × window square of the grid by itself."""
    if grid is None or grid[0] * grid[1] != x.shape[1] or grid[0] % window or grid[1] % window:
        raise ArgumentError(
            f"grid: got {grid} for {x.shape[1]} tokens in windows of side {window}, expected (height, width) with "
            "height · width tokens, both multiples of the side. Pad the image."
        )
    rows, columns = grid[0] // window, grid[1] // window

    def cut(y: Tensor) -> Tensor:
        squares = y.unflatten(1, (rows, window, columns, window)).transpose(2, 3)
        return squares.flatten(3, 4).flatten(0, 2)

    mixed, _ = mixer(cut(x), grid=(window, window), mask=None if mask is None else cut(mask))
    squares = mixed.view(x.shape[0], rows, columns, window, window, x.shape[2])
    return squares.transpose(2, 3).reshape(x.shape)
