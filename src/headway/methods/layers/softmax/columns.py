"""Columns of stored keys: their distances, who sees whom both ways, sums of values, and which are still needed."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.mixer import State, segment_ids
from headway.errors import ArgumentError


def orders(real: Tensor | None, keys: int, device: torch.device) -> Int[Tensor, "#batch keys"]:
    """The number of real tokens up to each column: distances between columns of one document."""
    return torch.arange(1, keys + 1, device=device)[None] if real is None else real.long().cumsum(1)


def both_ways(mask: Tensor | None, resets: Tensor | None, tokens: int) -> Bool[Tensor, "batch 1 tokens tokens"] | None:
    """Who sees whom where both ways are read: real tokens of one document; None where all see all."""
    if mask is None and resets is None:
        return None
    given = mask if mask is not None else resets
    visible = torch.ones(given.shape[0], tokens, tokens, dtype=torch.bool, device=given.device)  # type: ignore[union-attr]
    if mask is not None:
        visible = visible & mask[:, None, :] & mask[:, :, None]
    if resets is not None:
        document = segment_ids(resets, mask)
        visible = visible & (document[:, :, None] == document[:, None, :])
    return visible[:, None]


def running_mean(
    value: Float[Tensor, "batch heads tokens dim"],
    positions: Int[Tensor, "batch tokens"],
    mask: Tensor | None,
    resets: Tensor | None,
    before: Float[Tensor, "batch heads dim"] | None,
) -> tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads dim"]]:
    """The mean of the values of each token's document so far, and the sum behind the last token."""
    values = value.to(torch.promote_types(value.dtype, torch.float32))
    if mask is not None:
        values = torch.where(mask[:, None, :, None], values, 0.0)
    sums = values.cumsum(2)
    base = -before[:, :, None] if before is not None else torch.zeros_like(sums[:, :, :1])
    if resets is not None:
        opens = resets if mask is None else resets & mask
        places = torch.arange(value.shape[2], device=value.device)
        last = torch.where(opens, places, -1).cummax(1).values
        index = last.clamp(min=0)[:, None, :, None].expand_as(sums)
        base = torch.where((last >= 0)[:, None, :, None], (sums - values).gather(2, index), base)
    sums = sums - base
    return sums / (positions + 1)[:, None, :, None], sums[:, :, -1]


def trimmed(state: State, keep: int) -> State:
    """The state without the columns that no later token of a window can see."""
    length = state.tensors["key"].shape[2]
    cut = length - keep
    if "real" in state.tensors and length:
        orders = state.tensors["real"].long().cumsum(1)
        needed = orders > orders[:, -1:] - keep
        cut = int(torch.where(needed.any(1), needed.long().argmax(1), length).min())
    if cut <= 0:
        return state
    tensors = {n: t[:, :, cut:] if n in ("key", "value") else t[:, cut:] for n, t in state.tensors.items()}
    return State({name: t.contiguous() for name, t in tensors.items()}, state.seen)


def with_prefix(
    seen: Bool[Tensor, "#batch 1 tokens keys"],
    prefix: int,
    positions: Int[Tensor, "batch tokens"],
    mask: Tensor | None,
    resets: Tensor | None,
    state: State | None,
) -> Bool[Tensor, "#batch 1 tokens keys"]:
    """What is seen once the first `prefix` tokens of each document see each other. Raises ArgumentError for a call that
    goes on inside a prefix."""
    if state is not None and bool(((state.seen > 0) & (state.seen < prefix) & (positions[:, 0] > 0)).any()):
        raise ArgumentError(
            f"x: got a text cut inside its prefix of {prefix} tokens, expected these in one call: they see each other. "
            "Pass at least the prefix at once."
        )
    inside = positions < prefix
    if mask is not None:
        inside = inside & mask
    both = inside[:, :, None] & inside[:, None, :]
    if resets is not None:
        document = segment_ids(resets, mask)
        both = both & (document[:, :, None] == document[:, None, :])
    earlier = both.new_zeros(*both.shape[:2], seen.shape[-1] - both.shape[2])
    return seen | torch.cat([earlier, both], -1)[:, None]
