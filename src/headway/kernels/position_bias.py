"""What tells positions to attention besides rotation: biases on its logits by distance, and vectors added to its input.

    alibi     b_h(δ) = −slope_h · δ                              δ = i − j, or |i − j| where both ways are read
    relative  b_h(δ) = table[bucket(δ), h]                       buckets exact up to a half, then logarithmic
    sinusoid  p_t = (sin(t·θ_m), cos(t·θ_m)) ,  θ_m = base^(−2m/width)

ALiBi: arXiv 2108.12409. Bucketed relative bias: T5, arXiv 1910.10683. Sinusoids: arXiv 1706.03762.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.errors import ArgumentError
from headway.kernels.slopes import alibi_slopes

#: Buckets of T5's bias, and the distance from which on all share the last one.
BUCKETS, FARTHEST = 32, 128


def alibi_bias(
    distance: Int[Tensor, "batch queries keys"], heads: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch heads queries keys"]:
    """−slope_h·|δ| for every head, steepest first."""
    slopes = alibi_slopes(heads).to(distance.device, dtype)
    return -distance.abs().to(dtype)[:, None] * slopes.view(1, -1, 1, 1)


def relative_buckets(
    distance: Int[Tensor, "*shape"], *, buckets: int = BUCKETS, farthest: int = FARTHEST, causal: bool = True
) -> Int[Tensor, "*shape"]:
    """The bucket of each distance δ = i − j: one per distance for half of them, then ever wider ones up to `farthest`.

    Read both ways, keys behind a query have the upper half of the buckets for themselves."""
    if buckets < 4 or farthest <= buckets // 2:
        raise ArgumentError(
            f"buckets, farthest: got {buckets} and {farthest}, expected at least 4 buckets and farthest > buckets / 2."
        )
    offset = torch.zeros_like(distance)
    if not causal:
        buckets //= 2
        offset = torch.where(distance < 0, buckets, 0)
    size = distance.clamp(min=0) if causal else distance.abs()
    exact = buckets // 2
    ratio = (size.clamp(min=1).double() / exact).log() / math.log(farthest / exact)
    wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(size < exact, size, wide)


def sinusoids(
    positions: Int[Tensor, "batch tokens"], width: int, *, base: float = 10_000.0
) -> Float[Tensor, "batch tokens width"]:
    """Sines in the first half of the channels, cosines in the second, in float32."""
    if width % 2:
        raise ArgumentError(f"width: got {width}, expected an even number for sines and cosines.")
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    angle = positions[..., None].double() * frequencies
    return torch.cat([angle.sin(), angle.cos()], -1).float()
