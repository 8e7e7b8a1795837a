"""The stage: the mask of PowerAttention in a host, in prefill, chunks and decoding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.door.call import AttentionCall, Site
from headway.door.selection import BlockMask, Blocks, Dense, Keys, Selection
from headway.door.selector_calls import require_one_way
from headway.door.stages import Selector
from headway.errors import check_whole, unknown
from headway.methods.budget import check_share
from headway.methods.long_context.power_attention.mask import check_mask, key_blocks, mask_density, power_mask

log = logging.getLogger(__name__)

#: Up to so many rows the keys of each row are listed; more of them share the gathered blocks.
LIST_ROWS = 8
#: Most blocks along a side for which a budget is looked for: a mask of 1 MB.
MOST_BLOCKS = 1024


@dataclass(frozen=True, kw_only=True)
class PowerAttention(Selector):
    """The mask in prefill and decoding, in every head: `headway.use(model, PowerAttention(block=256))`.

    window, sink: in blocks. full_layers: layers that stay dense (the paper's hybrid keeps 2 of every 7). Blocks are
    counted from the first real token of each sequence, so that left padding changes nothing. trained: the model was
    trained with this mask, so attaching it warns of nothing.

    It never gives way to dense attention, though on short texts that is as fast: a model trained with the mask is right
    with the mask only, and on another one a text's logits would jump where its length passes the point from which
    blocks pay. Texts of up to `window` blocks are dense, because their mask is whole."""

    block: int = 256
    window: int = 5
    sink: int = 1
    base: int = 2
    full_layers: tuple[int, ...] = ()
    trained: bool = False

    def __post_init__(self) -> None:
        check_mask(self.window, self.sink, self.base)
        check_whole("block", self.block, 1)
        for layer in self.full_layers:
            check_whole("full_layers", layer, 0)
        object.__setattr__(self, "full_layers", tuple(self.full_layers))

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self" and site.layer not in self.full_layers

    def prepare(self, sites: Sequence[Site]) -> None:
        layers = {site.layer for site in sites if site.kind == "self"}
        for layer in self.full_layers:
            if layers and layer not in layers:
                raise unknown("full_layers", layer, sorted(layers))
        if not self.trained:
            log.warning("PowerAttention is a fixed mask: a model that was not trained with it loses quality.")
        sliding = sorted({site.layer for site in sites if site.window and self.acts_at(site)})
        if sliding:
            log.warning("PowerAttention: layers %s have a window of their own, which cuts its long edges.", sliding)

    def select(self, call: AttentionCall) -> Selection:
        require_one_way(call, self.title)
        start = int(call.query_positions[0])
        pads = _pads(call)
        skipped, first, last = (n // self.block for n in (call.first_key, start, start + call.queries - 1))
        if last < self.window:
            return Dense()
        if start % self.block == 0 and call.first_key % self.block == 0 and not any(pads):
            rows = power_mask(last + 1, window=self.window, sink=self.sink, base=self.base, offset=first)[:, skipped:]
            columns = -(-call.keys // self.block)
            rows = torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))
            blocks = rows[None, None].to(call.query.device)
            return Blocks(BlockMask(blocks, call.queries, call.keys, self.block, self.block))
        return self._lists(call, start, pads) if call.queries <= LIST_ROWS else self._tiles(call, last, pads)

    def _tiles(self, call: AttentionCall, last: int, pads: Sequence[int]) -> Blocks:
        """Many rows that do not begin at a block: the blocks that any row of a block reads, narrowed row by row. A
        padded row reads itself, which the host's mask hides or not as it does without this method."""
        device = call.query.device
        table = power_mask(last + 1, window=self.window, sink=self.sink, base=self.base).to(device)
        at, key_at = call.query_positions, torch.arange(call.keys, device=device) + call.first_key
        own = key_at == at[:, None]
        seen = []
        for pad in pads:
            row, column = (x.sub(pad).div(self.block, rounding_mode="floor") for x in (at, key_at))
            allowed = table[row.clamp(min=0)][:, column.clamp(0, last)]
            real = (row >= 0)[:, None] & (column >= 0)
            seen.append((allowed & real & (key_at <= at[:, None])) | own)
        within = torch.stack(seen)[:, None]
        rows, columns = (-n % self.block for n in (call.queries, call.keys))
        tiles = torch.nn.functional.pad(within, (0, columns, 0, rows))
        tiles = tiles.unflatten(3, (-1, self.block)).unflatten(2, (-1, self.block)).any(5).any(3)
        return Blocks(BlockMask(tiles, call.queries, call.keys, self.block, self.block), within)

    def _lists(self, call: AttentionCall, start: int, pads: Sequence[int]) -> Keys:
        """A few rows that do not begin at a block: each names its keys (decoding, under any padding)."""
        device = call.query.device
        rows = range(start, start + call.queries)
        tables = []
        for pad in pads:
            blocks = {max(row - pad, 0) // self.block for row in rows}
            read = {b: key_blocks(b, window=self.window, sink=self.sink, base=self.base) for b in blocks}
            most = max(len(chosen) for chosen in read.values())
            table = torch.full((call.queries, most), -1)
            for i, row in enumerate(rows):
                chosen = read[max(row - pad, 0) // self.block]
                table[i, : len(chosen)] = torch.tensor(chosen)
            keys = table[:, :, None] * self.block + torch.arange(self.block) + pad
            tables.append(keys.masked_fill((table < 0)[:, :, None], -1).flatten(1))
        most = max(table.shape[1] for table in tables)
        index = torch.stack([torch.nn.functional.pad(t, (0, most - t.shape[1]), value=-1) for t in tables])[:, None]
        index = index.to(device) - call.first_key
        at = call.offset + torch.arange(call.queries, device=device)
        valid = (index >= 0) & (index <= at[:, None]) & (index < call.keys)
        # A padded row reads itself, which the host's mask hides or not as it does without this method.
        fill = (valid.any(-1, keepdim=True) | (at >= call.keys)[:, None]).logical_not()
        index = torch.where(fill, at[:, None], index)
        return Keys(index.clamp(0, call.keys - 1), valid | fill, query_block=1)

    def degree(self, tokens: int) -> int:
        """Blocks that the last query block of so many tokens reads."""
        return len(key_blocks((tokens - 1) // self.block, window=self.window, sink=self.sink, base=self.base))

    def keys_read(self, position: int) -> Int[Tensor, " keys"]:
        """Positions that the query at `position` reads."""
        chosen = key_blocks(position // self.block, window=self.window, sink=self.sink, base=self.base)
        keys = (torch.tensor(chosen)[:, None] * self.block + torch.arange(self.block)).flatten()
        return keys[keys <= position]


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[PowerAttention]:
    """The mask that reads `share` of the causal triangle of a `tokens`-long text.

    The largest block that leaves room for two local blocks, then the widest window within the share; one sink block.
    Below about 8 / 1,024 of the triangle the smallest mask of the finest grid is what there is."""
    check_share(share, tokens)
    sizes = [256 >> shift for shift in range(9) if (256 >> shift) * MOST_BLOCKS >= tokens] or [
        -(-tokens // MOST_BLOCKS)
    ]
    for block in sizes:
        window = _widest(share, tokens, block)
        if window >= 2 or block == sizes[-1]:
            break
    return (PowerAttention(block=block, window=max(window, 1)),)


def _widest(share: float, tokens: int, block: int) -> int:
    """The widest window whose mask stays within a share of the triangle; 0 when none does."""
    blocks = -(-tokens // block)
    low, high = 0, blocks
    while low < high:
        middle = (low + high + 1) // 2
        fits = mask_density(power_mask(blocks, window=middle), tokens, block) <= share
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _pads(call: AttentionCall) -> list[int]:
    """Left padding of each sequence, in tokens; one zero where the host told none."""
    real = call.real_tokens(0, call.first_key + call.offset + call.queries)
    return [0] if real is None else real.long().argmax(1).tolist()
