"""Rotary position embedding: pairs of dimensions turned by an angle that grows with the position.

    x'_m = R(p·θ_m) x_m ,   θ_m = base^(−2m/dim) ,   q'_t · k'_i = Σ_m q_t,mᵀ R((i − t)·θ_m) k_i,m

x_m is the m-th pair of dimensions and R the 2-D rotation. Two layouts are in use: "half" pairs dimension m with m + M
(M pairs; Llama, NeoX), "interleaved" pairs 2m with 2m + 1 (GPT-J, Cohere, GLM). With fewer frequencies than dim / 2
only the first 2M dimensions turn (partial rotary). Frequencies may come from `rope_frequencies` or from a host, whose
scaled variants are only other numbers. Paper: RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.kernels.dense import check_heads

Layout = Literal["half", "interleaved"]
LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")


def rope_frequencies(dim: int, base: float = 10_000.0) -> Float[Tensor, " pairs"]:
    """θ_m = base^(−2m/dim) in radians per token, for m = 0 … dim/2 − 1, in float64. Raises for an odd `dim`."""
    if dim < 2 or dim % 2:
        raise ArgumentError(f"dim: got {dim}, expected an even number ≥ 2. Pass the number of rotated dimensions.")
    if not base > 0:
        raise ArgumentError(f"base: got {base}, expected a positive number such as 10000.")
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def periods(frequencies: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """2π / |θ_m| in tokens: after how many positions each pair has turned once; infinite where θ_m is 0."""
    return 2 * math.pi / check_frequencies(frequencies).abs()


def rotate(
    x: Float[Tensor, "*batch heads tokens dim"],
    positions: Int[Tensor, "... tokens"],
    frequencies: Float[Tensor, " pairs"],
    layout: Layout = "half",
) -> Float[Tensor, "*batch heads tokens dim"]:
    """x with pair m of the token at position p turned by p·θ_m. `positions` is (tokens) or (batch, tokens).

    Angles are float32 as in hosts (float64 for a float64 x); the result has the dtype of x."""
    pairs = as_pairs(x, check_frequencies(frequencies).numel(), layout)
    if positions.shape[-1] != x.shape[-2]:
        raise ArgumentError(
            f"positions: got {positions.shape[-1]} positions for {x.shape[-2]} tokens, expected one per token. Pass a "
            "tensor (tokens) or (batch, tokens)."
        )
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = positions.to(x.device, work)[..., None] * frequencies.to(x.device, work)
    if angle.ndim == 3:
        angle = angle[:, None]
    cosine, sine = angle.cos(), angle.sin()
    first, second = pairs[..., 0].to(work), pairs[..., 1].to(work)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], -1).to(x.dtype)
    return _from_pairs(turned, x, layout)


def unrotate(
    x: Float[Tensor, "*batch heads tokens dim"],
    positions: Int[Tensor, "... tokens"],
    frequencies: Float[Tensor, " pairs"],
    layout: Layout = "half",
) -> Float[Tensor, "*batch heads tokens dim"]:
    """What `rotate` was given: x as it left its projection."""
    return rotate(x, positions, -check_frequencies(frequencies), layout)


def as_pairs(
    x: Float[Tensor, "... dim"], pairs: int | None = None, layout: Layout = "half"
) -> Float[Tensor, "... pairs 2"]:
    """The rotated dimensions of x as 2-D parts; `pairs` is dim / 2 unless fewer are rotated."""
    pairs = x.shape[-1] // 2 if pairs is None else pairs
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if not 0 < pairs <= x.shape[-1] // 2:
        raise ArgumentError(
            f"pairs: got {pairs} rotated pairs for {x.shape[-1]} dimensions, expected 1 to {x.shape[-1] // 2}. Use the "
            "frequencies of this model."
        )
    turned = x[..., : 2 * pairs]
    if layout == "half":
        return turned.unflatten(-1, (2, pairs)).transpose(-1, -2)
    return turned.unflatten(-1, (pairs, 2))


def pair_norms(
    x: Float[Tensor, "... dim"], pairs: int | None = None, layout: Layout = "half"
) -> Float[Tensor, "... pairs"]:
    """‖x_m‖ of each rotated pair; rotation does not change it."""
    turned = as_pairs(x, pairs, layout)
    return torch.hypot(turned[..., 0], turned[..., 1])


def channel_energies(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    pairs: int | None = None,
    layout: Layout = "half",
) -> Float[Tensor, "batch heads pairs"]:
    """e_m = mean ‖q_m‖‖k_m‖ / Σ: the share that each pair can have of a logit, averaged over all query–key pairs.

    Dimensions that are not rotated count in Σ as one block, so the shares of a partly rotated head sum to less than 1.
    Tokens must be real ones: leave padding out before the call."""
    groups = check_heads(query, key)
    turned = query.shape[-1] // 2 if pairs is None else pairs
    mean_query = pair_norms(query, pairs, layout).mean(-2)
    mean_key = pair_norms(key, pairs, layout).mean(-2).repeat_interleave(groups, 1)
    energy = mean_query * mean_key
    rest_query = query[..., 2 * turned :].norm(dim=-1).mean(-1)
    rest_key = key[..., 2 * turned :].norm(dim=-1).mean(-1).repeat_interleave(groups, 1)
    total = energy.sum(-1) + rest_query * rest_key
    return energy / total.clamp(min=torch.finfo(energy.dtype).tiny)[..., None]


def check_frequencies(frequencies: Float[Tensor, " pairs"] | None) -> Float[Tensor, " pairs"]:
    """The frequencies themselves; raises ArgumentError when there are none: periods need rotary positions."""
    if frequencies is None:
        raise ArgumentError(
            "frequencies: got None, expected one number per rotated pair. A model without rotary positions (learned, "
            "ALiBi, none) has no periods; use the measures that need no frequencies."
        )
    if frequencies.ndim != 1 or not frequencies.numel() or not bool(torch.isfinite(frequencies).all()):
        raise ArgumentError(
            f"frequencies: got shape {tuple(frequencies.shape)}, expected a vector of finite numbers, one per pair. "
            "Pass the model's inv_freq or rope_frequencies(dim, base)."
        )
    return frequencies


def _from_pairs(turned: Tensor, x: Tensor, layout: Layout) -> Tensor:
    flat = (turned.transpose(-1, -2) if layout == "half" else turned).flatten(-2)
    return torch.cat([flat, x[..., flat.shape[-1] :]], -1)
