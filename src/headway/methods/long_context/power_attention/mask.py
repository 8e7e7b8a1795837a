"""The mask between blocks, and how far stacked layers of a mask reach.

    edges  i → j  with  i − j = 2^k ;   R_k(i) = { nodes that i reaches in at most k hops }

k layers let position i use R_k(i) and nothing else. With power-of-two edges alone the hops from i to j are the number
of 1-bits of i − j.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from headway.door.selection import BlockMask
from headway.errors import ArgumentError, check_whole, unknown

#: Patterns that can be compared at equal out-degree.
PATTERNS = ("power", "window", "dilated", "stride", "segments")


def key_blocks(block: int, *, window: int = 5, sink: int = 1, base: int = 2) -> list[int]:
    """The key blocks that query block `block` reads, in order."""
    check_mask(window, sink, base)
    chosen = {*range(max(0, block - window + 1), block + 1), *range(min(sink, block + 1))}
    power = 1
    while power <= block:
        chosen |= {block - digit * power for digit in range(1, base) if digit * power <= block}
        power *= base
    return sorted(chosen)


def power_mask(
    blocks: int, *, window: int = 5, sink: int = 1, base: int = 2, offset: int = 0
) -> Bool[Tensor, "query_blocks key_blocks"]:
    """allow(Δ) between blocks; with `offset`, the query blocks from that one on."""
    check_mask(window, sink, base)
    row = torch.arange(offset, blocks)[:, None]
    column = torch.arange(blocks)[None]
    distance = row - column
    allowed = (distance < window) | (column < sink)
    power = 1
    while power < max(blocks, 2):
        for digit in range(1, base):
            allowed |= distance == digit * power
        power *= base
    return allowed & (distance >= 0)


def pattern_mask(pattern: str, blocks: int, *, degree: int, sink: int = 1) -> Bool[Tensor, "query_blocks key_blocks"]:
    """Masks of about equal out-degree to compare with: "window" (the last `degree` blocks), "dilated" (every second of
    the last 2 · degree), "stride" (half of the degree as a window, the rest every r-th diagonal), "segments" (LongNet,
    arXiv 2307.02486: segments of d, 2d and 4d blocks with dilations 1, 2 and 4, d a third of the degree), "power"."""
    if degree < 1:
        raise ArgumentError(f"degree: got {degree}, expected at least 1 block.")
    distance = torch.arange(blocks)[:, None] - torch.arange(blocks)
    if pattern == "window":
        allowed = distance < degree
    elif pattern == "dilated":
        allowed = (distance % 2 == 0) & (distance < 2 * degree)
    elif pattern == "stride":
        local = max(degree // 2, 1)
        every = max(blocks // max(degree - local, 1), 1)
        allowed = (distance < local) | (distance % every == 0)
    elif pattern == "segments":
        row = torch.arange(blocks)
        allowed = distance == 0
        for dilation in (1, 2, 4):
            segment = row // (max(degree // 3, 1) * dilation)
            allowed = allowed | ((segment[:, None] == segment) & (distance % dilation == 0))
    elif pattern == "power":
        powers = max(blocks - 1, 1).bit_length()
        return power_mask(blocks, window=max(degree - powers, 1), sink=sink)
    else:
        raise unknown("pattern", pattern, PATTERNS)
    return (allowed | (torch.arange(blocks)[None] < sink)) & (distance >= 0)


def reach(mask: Bool[Tensor, "blocks blocks"], hops: int, start: int | None = None) -> list[int]:
    """How many blocks the last block (or `start`) can be informed by after 1, 2, … `hops` layers, itself included."""
    return [int(row.sum()) for row in reached(mask, hops, start)]


def reached(mask: Bool[Tensor, "blocks blocks"], hops: int, start: int | None = None) -> list[Bool[Tensor, " blocks"]]:
    """The sets behind `reach`, one per layer."""
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        raise ArgumentError(f"mask: got shape {tuple(mask.shape)}, expected (blocks, blocks).")
    now = torch.zeros(mask.shape[0], dtype=torch.bool)
    now[mask.shape[0] - 1 if start is None else start] = True
    found = []
    for _ in range(hops):
        now = now | mask[now].any(0)
        found.append(now)
    return found


def hops_to_all(mask: Bool[Tensor, "blocks blocks"]) -> int | None:
    """Layers after which the last block reaches every block; None when it never does."""
    blocks = mask.shape[0]
    before = -1
    for hop, count in enumerate(reach(mask, blocks), 1):
        if count == blocks:
            return hop
        if count == before:
            return None
        before = count
    return None


def mask_density(mask: Bool[Tensor, "blocks blocks"], tokens: int, block: int) -> float:
    """Selected over visible pairs of a `tokens`-long text, the last block ragged."""
    return BlockMask(mask[None, None], tokens, tokens, block, block).density()


def hybrid_layers(layers: int, *, full: int = 2, group: int = 7) -> tuple[int, ...]:
    """The layers that stay dense in the paper's hybrid: the first `full` of every `group` (8 of 28)."""
    if not 0 <= full <= group or group < 1:
        raise ArgumentError(f"full, group: got {full} of {group}, expected 0 ≤ full ≤ group and group ≥ 1.")
    return tuple(layer for layer in range(layers) if layer % group < full)


def check_mask(window: int, sink: int, base: int) -> None:
    """Raises ArgumentError for numbers that make no mask."""
    check_whole("window", window, 1)
    check_whole("sink", sink, 0)
    check_whole("base", base, 2)
