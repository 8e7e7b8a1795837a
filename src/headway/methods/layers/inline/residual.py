"""The local residual: a 3 × 3 depthwise convolution of the values, with a kernel that each image chooses for itself.

    K = grouped( gelu( grouped( mean_i x_i ) ) ) ,   r_c(y, z) = Σ_{dy,dz ∈ {−1,0,1}} K_c(dy, dz) · v_c(y + dy, z + dz)

Outside the grid stands zero. The released code predicts nine coefficients per channel, which is the default; the paper
writes nine, r_1 … r_9, which all channels of a head share with `kernel_per="head"`. A head's kernels depend on the
channels of that head alone.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from headway.errors import ArgumentError, unknown


def local_residual(
    value: Float[Tensor, "batch channels height width"],
    kernel: Float[Tensor, "batch channels 3 3"],
    *,
    mode: str = "block",
) -> Float[Tensor, "batch channels height width"]:
    """Every channel of every sample convolved with its own kernel. `mode="reference"` adds nine shifted copies,
    `"block"` is one grouped convolution."""
    batch, channels, height, width = value.shape
    if kernel.shape != (batch, channels, 3, 3):
        raise ArgumentError(
            f"kernel: got shape {tuple(kernel.shape)}, expected {(batch, channels, 3, 3)} for values of shape "
            f"{tuple(value.shape)}."
        )
    if mode == "block":
        folded = value.reshape(1, batch * channels, height, width)
        weight = kernel.reshape(batch * channels, 1, 3, 3)
        return functional.conv2d(folded, weight, padding=1, groups=batch * channels).view_as(value)
    if mode != "reference":
        raise ArgumentError(f"mode: got {mode!r}, expected 'reference' or 'block'.")
    framed = functional.pad(value, (1, 1, 1, 1))
    total = torch.zeros_like(value)
    for down in range(3):
        for right in range(3):
            shifted = framed[:, :, down : down + height, right : right + width]
            total = total + kernel[:, :, down, right, None, None] * shifted
    return total


def check_grid(grid: tuple[int, int] | None, tokens: int, prefix: int) -> tuple[int, int]:
    """The grid, if its patches and the prefix tokens in front of them are all the tokens there are."""
    if grid is None:
        side = math.isqrt(max(tokens - prefix, 0))
        hint = f" {side} × {side} would fit." if side and side * side + prefix == tokens else ""
        raise ArgumentError(
            f"grid: got None for {tokens} tokens, expected (height, width) of the patches; the local residual needs "
            f"it.{hint} Or build the mixer with residual=False."
        )
    height, width = (int(side) for side in grid)
    if height < 1 or width < 1 or height * width + prefix != tokens:
        raise ArgumentError(
            f"grid: got {height} × {width} = {height * width} patches and {prefix} prefix tokens for {tokens} tokens, "
            "expected as many. Check the order (height, width) and the mixer's `prefix` (class, distillation and "
            "register tokens)."
        )
    return height, width


class LocalResidual(nn.Module):
    """The residual with its predictor: two grouped layers with as many groups as heads, initialised as torch does.

    `prefix` tokens in front of the grid help to predict the kernels and get no residual. `kernel_per` is "channel" or
    "head"."""

    def __init__(self, width: int, *, heads: int, prefix: int = 0, kernel_per: str = "channel") -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ArgumentError(f"width, heads: got {width} and {heads}, expected the first to be a multiple.")
        if prefix < 0:
            raise ArgumentError(f"prefix: got {prefix}, expected the number of tokens in front of the grid.")
        if kernel_per not in ("channel", "head"):
            raise unknown("kernel_per", kernel_per, ("channel", "head"))
        self.prefix, self.shared_by = prefix, 1 if kernel_per == "channel" else width // heads
        self.first = nn.Conv1d(width, width, 1, groups=heads)
        self.second = nn.Conv1d(width, 9 * width // self.shared_by, 1, groups=heads)

    def kernels(
        self, x: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch width 3 3"]:
        """The kernels that the images choose, from the mean over their real tokens."""
        if mask is None:
            mean = x.mean(1)
        else:
            mean = torch.where(mask[:, :, None], x, 0).sum(1) / mask.sum(1).clamp(min=1)[:, None]
        hidden = functional.gelu(self.first(mean.to(x.dtype)[:, :, None]))
        return self.second(hidden).view(x.shape[0], -1, 3, 3).repeat_interleave(self.shared_by, 1)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        value: Float[Tensor, "batch tokens width"],
        grid: tuple[int, int] | None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        mode: str = "block",
    ) -> Float[Tensor, "batch tokens width"]:
        """The residual of the tokens; zero for those of the prefix. `x` is the block's input, `value` what attention
        averages, heads side by side. A masked token is read as zero."""
        batch, tokens, channels = value.shape
        height, width = check_grid(grid, tokens, self.prefix)
        if mask is not None:
            value = torch.where(mask[:, :, None], value, 0)
        image = value[:, self.prefix :].transpose(1, 2).reshape(batch, channels, height, width)
        found = local_residual(image, self.kernels(x, mask).to(image.dtype), mode=mode)
        return functional.pad(found.flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))
