"""From estimates to blocks: the level of a block is the share γ above which it is read.

    level(i, j) = min( column level of j,  diagonal level of i − j,  map level of (i, j) in query-aware heads )

A column's level is the mass of all larger columns, so that the columns with a level below γ are the fewest that cover
γ; diagonals and pooled blocks alike. Levels hold every γ at once: what a larger γ reads contains what a smaller one
reads, and a γ for a wanted density is one sort away.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.kernels.pooling import block_sums, mass_before, mass_before_rank, ranks
from headway.methods.long_context.flexprefill.probe import Probe

ALWAYS, NEVER = -1.0, torch.inf


def marginal_levels(
    probe: Probe, *, least: int, most: int, stop: str, count: str
) -> tuple[Float[Tensor, "batch heads blocks"], Float[Tensor, "batch heads blocks"]]:
    """Levels of columns and of diagonals (by distance). The first real block and the diagonal are always read, as are
    the `least` largest of both kinds; beyond the `most` largest none is."""
    columns, diagonals = probe.columns, probe.diagonals
    if count == "tokens":
        diagonals = block_sums(probe.slash, probe.block)
    first_columns = columns.scatter(-1, probe.sink[:, None, None].expand(-1, columns.shape[1], 1), torch.inf)
    first_diagonals = diagonals.index_fill(-1, torch.zeros(1, dtype=torch.long, device=columns.device), torch.inf)
    if stop == "union":
        pair = _union_levels(columns, first_columns, first_diagonals)
    elif count == "tokens":
        pair = _token_levels(probe.vertical, columns, probe.block), _token_levels(probe.slash, diagonals, probe.block)
    else:
        pair = mass_before(columns), mass_before(diagonals)
    found = []
    for level, first in zip(pair, (first_columns, first_diagonals), strict=True):
        order = ranks(first)
        level = level.masked_fill(order >= most, NEVER).masked_fill(order < least, ALWAYS)
        found.append(level.masked_fill(first == torch.inf, ALWAYS))
    return found[0], found[1]


def map_levels(
    weights: Float[Tensor, "batch heads blocks blocks"], *, selection: str, most: int
) -> Float[Tensor, "batch heads blocks blocks"]:
    """Levels of the blocks of a pooled map, against γ of its mass as a whole ("global") or of each row ("row"). Beyond
    the `most` largest of a row none is read."""
    if selection == "row":
        level = mass_before(weights)
    else:
        flat = weights.flatten(2)
        level = (mass_before(flat) / flat.sum(-1, keepdim=True).clamp(min=1)).view_as(weights)
    return level.masked_fill(ranks(weights) >= most, NEVER)


def block_levels(
    columns: Float[Tensor, "batch heads blocks"],
    diagonals: Float[Tensor, "batch heads blocks"],
    pooled: Float[Tensor, "batch heads blocks blocks"] | None,
    aware: Bool[Tensor, "batch heads"],
    tokens: Int[Tensor, "batch blocks"],
) -> Float[Tensor, "batch heads blocks blocks"]:
    """Levels of all pairs of blocks; query-aware heads keep of columns and diagonals only what is always read. Blocks
    that hold no token are read by none but themselves."""
    columns, diagonals = (
        torch.where(aware[..., None] & (level > ALWAYS), NEVER, level) for level in (columns, diagonals)
    )
    at = torch.arange(columns.shape[-1], device=columns.device)
    distance = at[:, None] - at
    level = torch.minimum(columns[:, :, None, :], diagonals[..., distance.clamp(min=0)])
    if pooled is not None:
        level = torch.where(aware[:, :, None, None], torch.minimum(level, pooled), level)
    level = level.masked_fill((tokens == 0)[:, None, None, :] & (distance != 0), NEVER)
    return level.masked_fill(distance < 0, NEVER)


def gamma_for_density(
    levels: Float[Tensor, "batch heads blocks blocks"], pairs: Float[Tensor, "batch blocks blocks"], density: float
) -> Float[Tensor, " batch"]:
    """For each sequence the γ at which its heads together read at most `density` of the visible `pairs`."""
    flat = levels.flatten(1)
    ordered, order = flat.sort(dim=-1, stable=True)
    weight = pairs[:, None].expand(levels.shape).flatten(1)
    share = weight.gather(1, order).cumsum(-1) / weight.sum(-1, keepdim=True)
    taken = (share <= density).sum(-1, keepdim=True).clamp(max=flat.shape[1] - 1)
    # Nothing below 0: blocks that are always read are read at any density.
    return ordered.gather(-1, taken)[:, 0].clamp(min=0.0)


def filled(blocks: Bool[Tensor, "batch heads rows blocks"], least: int) -> Bool[Tensor, "batch heads rows blocks"]:
    """Rows that read fewer than `least` blocks get the nearest ones that they could read."""
    count = blocks.shape[-1]
    visible = torch.ones(count, count, dtype=torch.bool, device=blocks.device).tril()
    missing = (least - blocks.sum(-1, keepdim=True)).clamp(min=0)
    free = visible & ~blocks
    nearest = free.flip(-1).cumsum(-1).flip(-1)
    return blocks | (free & (nearest <= missing))


def _token_levels(by_token: Tensor, by_block: Tensor, block: int) -> Float[Tensor, "batch heads blocks"]:
    """The released code's count: ⌊tokens that cover γ / block⌋ + 1 blocks, the largest first."""
    needed = ranks(by_block) * block - 1
    return mass_before_rank(by_token).gather(-1, needed.clamp(min=0)).masked_fill(needed < 0, ALWAYS)


def _union_levels(columns: Tensor, first_columns: Tensor, first_diagonals: Tensor) -> tuple[Tensor, Tensor]:
    """Levels against the mass that columns and diagonals cover together in the last block row. There, column k and the
    diagonal of distance n − 1 − k are the same block, covered as soon as either is taken."""
    count = columns.shape[-1]
    order = ranks(torch.cat([first_columns, first_diagonals], -1))
    first = torch.minimum(order[..., :count], order[..., count:].flip(-1))
    gained = torch.zeros_like(torch.cat([columns, columns], -1)).scatter_add_(-1, first, columns)
    before = torch.nn.functional.pad(gained.cumsum(-1)[..., :-1], (1, 0))
    level = before.gather(-1, order)
    return level[..., :count], level[..., count:]
