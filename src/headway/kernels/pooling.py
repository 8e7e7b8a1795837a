"""Pooled estimates that block selectors share: block means and sums, how far a mean may stand for its block, the mass
of larger entries, and a divergence."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from headway.errors import ArgumentError


def block_sums(x: Float[Tensor, "... tokens"], block: int) -> Float[Tensor, "... blocks"]:
    """Sums over blocks of the last axis; the last block may be ragged."""
    _check(block)
    return pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def block_means(
    x: Float[Tensor, "batch heads tokens dim"], block: int, real: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch heads blocks dim"]:
    """Means over the real tokens of each block (float32); zero for a block of padding."""
    _check(block)
    extra = -x.shape[2] % block
    weight = x.new_ones(x.shape[0], x.shape[2], dtype=torch.float32) if real is None else real.float()
    weight = pad(weight, (0, extra)).unflatten(-1, (-1, block))[:, None, :, :, None]
    tiles = pad(x.float(), (0, 0, 0, extra)).unflatten(2, (-1, block))
    return (tiles * weight).sum(3) / weight.sum(3).clamp(min=1)


def self_similarity(
    x: Float[Tensor, "batch heads tokens dim"], block: int, real: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch heads blocks"]:
    """Mean cosine of all pairs of different tokens of a block, in [−1 / (n − 1), 1]: whether a mean can stand for it.

        s = (‖Σ_i x̂_i‖² − n) / (n (n − 1)) ,   x̂ = x / ‖x‖ ,   n real tokens

    1 where a block has one token or none, for there is nothing that a mean could hide. A token of length zero is like
    no other. SpargeAttn (arXiv 2502.18137) reads blocks whole whose similarity is low."""
    _check(block)
    extra = -x.shape[2] % block
    weight = x.new_ones(x.shape[0], x.shape[2], dtype=torch.float32) if real is None else real.float()
    count = block_sums(weight, block)[:, None]
    units = torch.nn.functional.normalize(x.float(), dim=-1) * weight[:, None, :, None]
    tiles = pad(units, (0, 0, 0, extra)).unflatten(2, (-1, block))
    # The squared lengths are those of the tokens: one, or zero for a token of length zero.
    pairs = tiles.sum(3).square().sum(-1) - tiles.square().sum((-1, -2))
    return torch.where(count > 1, pairs / (count * (count - 1)).clamp(min=1), torch.ones_like(pairs))


def offset_blocks(x: Float[Tensor, "... offsets"], block: int) -> Float[Tensor, "... distances"]:
    """Mass by offset i − j as mass by distance in blocks, for rows that stand anywhere in their block alike.

    Of the b rows of a block, t = o mod b have offset o in the block at distance ⌊o/b⌋ + 1, the others at ⌊o/b⌋. What
    would lie beyond the last distance counts as the last."""
    _check(block)
    count = -(-x.shape[-1] // block)
    offset = torch.arange(x.shape[-1], device=x.device)
    later = (offset % block) / block
    near, far = block_sums(x * (1 - later), block), block_sums(x * later, block)
    moved = pad(far, (1, 0))
    moved[..., count - 1] += moved[..., count]
    return near + moved[..., :count]


def mass_before(x: Float[Tensor, "... entries"]) -> Float[Tensor, "... entries"]:
    """The mass of all entries that are larger than each one (of equal ones, of those that stand before it).

    An entry belongs to the fewest entries that cover γ exactly when this is below γ."""
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(x).scatter_(-1, order, _before(ordered))


def mass_before_rank(x: Float[Tensor, "... entries"]) -> Float[Tensor, "... entries"]:
    """The same by rank: the mass of the r largest entries, for r = 0, 1, …"""
    return _before(x.sort(-1, descending=True).values)


def ranks(x: Float[Tensor, "... entries"]) -> Int[Tensor, "... entries"]:
    """0 for the largest entry, 1 for the next, …; equal ones in their order."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def root_jensen_shannon(p: Float[Tensor, "... entries"], q: Float[Tensor, "... entries"]) -> Float[Tensor, ...]:
    """√JSD(p‖q) with the natural logarithm, in [0, √ln 2 ≈ 0.8326]. 0 · ln 0 counts as 0."""
    middle = (p + q) / 2

    def divergence(x: Tensor) -> Tensor:
        return (torch.special.xlogy(x, x) - torch.special.xlogy(x, middle)).sum(-1)

    return ((divergence(p) + divergence(q)) / 2).clamp(min=0).sqrt()


def _before(ordered: Tensor) -> Tensor:
    return pad(ordered.cumsum(-1)[..., :-1], (1, 0))


def _check(block: int) -> None:
    if block < 1:
        raise ArgumentError(f"block: got {block}, expected at least 1 token.")
