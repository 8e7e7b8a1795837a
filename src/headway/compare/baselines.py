"""Baselines that any method has to beat: a window, sinks and a window, and random blocks of the same number.

    window          S(i) = { j : 0 ≤ i − j < w } ,                 w = share · tokens
    sinks-window    S(i) = { j < s }  ∪  { j : 0 ≤ i − j < w − s }
    random-blocks   as many blocks for each block of queries as a window of w keys has, drawn at random; its own is kept

All three read about `share` of a context of `tokens` keys at its end, the same number in every row. They choose what is
read, and keep every key: KV bytes do not fall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from headway.door import AttentionCall, BlockMask, Blocks, Dense, Keys, Selection, Selector, Site, Stage, Window
from headway.errors import ArgumentError

#: First tokens that stay readable; four are enough for most models (StreamingLLM, arXiv 2309.17453).
SINKS = 4


@dataclass(frozen=True, kw_only=True)
class PlainWindow(Selector):
    """Reads the first `sinks` keys and the last `window` keys, in prefill and decoding."""

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        Window(self.sinks, self.window)

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def select(self, call: AttentionCall) -> Selection:
        return Dense() if call.keys <= self.window + self.sinks else Window(self.sinks, self.window)


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(Selector):
    """Reads `keep` random blocks of `block` keys for each block of queries, and always the block it stands in.

    A place is drawn anew for every layer, head, query block and key block, from `seed` alone: a row reads the same
    blocks whether it is prefilled, fed in chunks or decoded."""

    keep: int
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1 or self.block < 1:
            raise ArgumentError(f"keep, block: got {self.keep}, {self.block}; expected at least 1 of each.")

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def select(self, call: AttentionCall) -> Selection:
        start = int(call.query_positions[0])
        first, last = start // self.block, (start + call.queries - 1) // self.block
        if last < self.keep or call.first_key:
            return Dense()
        chosen = self.chosen(call.site.layer, call.heads, first, last).to(call.query.device)
        columns = -(-call.keys // self.block)
        if start % self.block == 0 and call.offset == call.keys - call.queries:
            chosen = torch.nn.functional.pad(chosen, (0, columns - chosen.shape[2]))
            return Blocks(BlockMask(chosen[None], call.queries, call.keys, self.block, self.block))
        rows = torch.arange(start, start + call.queries, device=chosen.device) // self.block - first
        table = chosen[:, rows].int().sort(dim=-1, descending=True, stable=True)
        most = int(table.values.sum(-1).max())
        index = table.indices[..., :most, None] * self.block + torch.arange(self.block, device=chosen.device)
        valid = table.values[..., :most, None].bool().expand_as(index)
        index, valid = index.flatten(2)[None], valid.flatten(2)[None]
        at = call.offset + torch.arange(call.queries, device=chosen.device)
        valid = valid & (index <= at[:, None]) & (index < call.keys)
        return Keys(index.clamp(max=call.keys - 1), valid, query_block=1)

    def chosen(self, layer: int, heads: int, first: int, last: int) -> Bool[Tensor, "heads rows columns"]:
        """The blocks read by query blocks `first` to `last`."""
        chosen = torch.zeros(heads, last + 1 - first, last + 1, dtype=torch.bool)
        for row in range(first, last + 1):
            drawn = np.random.default_rng([self.seed, layer, row]).random((heads, row))
            order = torch.from_numpy(drawn.argsort(-1)[:, : self.keep - 1])
            chosen[:, row - first].scatter_(1, order, True)
            chosen[:, row - first, row] = True
        return chosen


def window_of(share: float, tokens: int) -> int:
    return max(round(share * tokens), 1)


def _window(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    return () if share == 1 else (PlainWindow(window=window_of(share, tokens)),)


def _sinks_window(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    wide = window_of(share, tokens)
    if wide <= SINKS:
        raise ArgumentError(
            f"budget: got {share:g} of {tokens:,} tokens, which is {wide} keys, expected more than the {SINKS} sinks. "
            "Give a larger budget or a longer text."
        )
    return () if share == 1 else (PlainWindow(window=wide - SINKS, sinks=SINKS),)


def _random_blocks(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    if share == 1:
        return ()
    wide = window_of(share, tokens)
    block = next((size for size in (64, 32, 16, 8) if wide >= 8 * size), 8)
    # Half of the block that a row stands in is in its future, on average.
    return (RandomBlocks(keep=max(int(wide / block + 0.5), 1), block=block),)


#: Name -> (what it is, its stages at a budget).
BASELINES: Mapping[str, tuple[str, Callable[..., tuple[Stage, ...]]]] = {
    "window": ("baseline: the last keys only", _window),
    "sinks-window": ("baseline: the first four keys and the last ones", _sinks_window),
    "random-blocks": ("baseline: random blocks, as many as a window has", _random_blocks),
}
