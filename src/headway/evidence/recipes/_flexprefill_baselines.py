"""What FlexPrefill is held against, at a density that is asked for: a window, random blocks, a fixed budget.

window    the first block and the narrowest window that read at least so much
random    sink and diagonal blocks, and in every head as many random blocks as reach it
fixed     the same number of columns and of diagonals in every head, placed by FlexPrefill's own probe
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from headway.door.call import AttentionCall
from headway.door.execute import selection_density
from headway.door.selection import BlockMask, Blocks, Dense, Selection, Window
from headway.door.stages import Selector
from headway.errors import unknown
from headway.methods.long_context.flexprefill import FlexPrefill

BASELINES = ("window", "random", "fixed")


def around(density_of: Callable[[int], float], density: float, most: int) -> list[int]:
    """The largest count that reads less than a density and the smallest that reads as much (one of them at an end)."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if density_of(middle) >= density else (middle + 1, high)
    return sorted({max(low - 1, 1), low})


def fixed_blocks(method: FlexPrefill, count: int) -> FlexPrefill:
    """`method` with `count` columns and `count` diagonals in every head, whatever they hold."""
    tokens = count * method.block
    return replace(method, min_budget=tokens, max_budget=tokens, tau=0.0)


def window_of_density(call: AttentionCall, density: float, sinks: int) -> Window:
    """The narrowest window, beside `sinks` first keys, that reads at least so much of the triangle."""
    low, high = 1, call.keys
    while low < high:
        middle = (low + high) // 2
        enough = selection_density(Window(sinks, middle), call) >= density
        low, high = (low, middle) if enough else (middle + 1, high)
    return Window(sinks, low)


def random_blocks(call: AttentionCall, density: float, block: int, generator: torch.Generator) -> BlockMask:
    """The sink block, the diagonal, and in every head as many random blocks as reach a density."""
    mask = BlockMask.full(call.keys, call.keys, block, block, heads=call.heads)
    pairs = mask.pairs()
    count = pairs.shape[0]
    always = torch.eye(count, dtype=torch.bool) | (torch.arange(count) == 0)
    always &= torch.ones(count, count, dtype=torch.bool).tril()
    free = (pairs > 0) & ~always
    order = torch.rand(call.heads, count * count, generator=generator).masked_fill(~free.flatten(), 2.0).argsort(-1)
    missing = density * pairs.sum() - pairs[always].sum()
    running = pairs.flatten()[order].cumsum(-1)
    needed = ((running < missing).sum(-1) + 1).clamp(max=int(free.sum())) * (missing > 0)
    taken = torch.arange(count * count) < needed[:, None]
    blocks = torch.zeros(call.heads, count * count, dtype=torch.bool).scatter_(-1, order, taken)
    blocks = blocks.view(1, call.heads, count, count) | always
    return BlockMask(blocks.to(call.query.device), call.keys, call.keys, block, block)


@dataclass(frozen=True, kw_only=True)
class Prefill(Selector):
    """A baseline that reads at least a given share of the triangle in prefill, of each call, and is dense in decoding,
    as FlexPrefill is."""

    density: float
    kind: str
    block: int
    seed: int = 0

    phases = frozenset({"prefill"})

    def __post_init__(self) -> None:
        if self.kind not in BASELINES:
            raise unknown("kind", self.kind, BASELINES)

    def select(self, call: AttentionCall) -> Selection:
        if call.queries == 1:
            return Dense()
        if self.kind == "window":
            return window_of_density(call, self.density, self.block)
        if self.kind == "random":
            generator = torch.Generator().manual_seed(self.seed * 1000 + call.site.layer)
            return Blocks(random_blocks(call, self.density, self.block, generator))
        method = FlexPrefill(block=self.block)
        masks: dict[int, BlockMask] = {}

        def density_of(count: int) -> float:
            masks[count] = fixed_blocks(method, count).blocks_of(call).mask
            return masks[count].density()

        least = around(density_of, self.density, -(-call.keys // self.block))[-1]
        return Blocks(masks.get(least) or fixed_blocks(method, least).blocks_of(call).mask)
