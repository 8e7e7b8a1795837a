"""PowerAttention: a static mask whose receptive field doubles with every layer.

    allow(i, j) = j ≤ i  and  ( Δ < w  or  Δ is a power of the base  or  block(j) < s ) ,   Δ = block(i) − block(j)

Each block of queries reads w local blocks, s sink blocks and the blocks at distances 1, 2, 4, 8, …: at most
w + s + log₂ n of n blocks. Writing a distance in binary takes one hop per 1-bit, so every earlier block is within
log₂ n layers of any later one, without holes; a window of w blocks gains w − 1 blocks per layer.

Paper: PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention, arXiv 2503.03588. The
mask is part of the model: it is meant for light continued training, in prefill and decoding alike, so it never gives
way to dense attention. As a query moves on, its distances sweep over all old blocks: no key may ever be dropped, so the
method saves reads and compute, not memory. No released code was available; base other than 2 is an extension of ours
(digits of the distance in that base, each multiple of a power allowed).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.card import Card
from headway.door.call import AttentionCall, Site
from headway.door.selection import BlockMask, Blocks, Dense, Keys, Selection
from headway.door.stages import Selector
from headway.errors import ArgumentError, unknown

log = logging.getLogger(__name__)

CARD = Card(
    slug="power-attention",
    title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    year=2025,
    arxiv="2503.03588",
    family="long_context",
    stages=("Selector",),
    needs=("a causal host", "light continued training with the mask on"),
    knobs={
        "block": "tokens per block",
        "window": "local blocks, its own included",
        "sink": "blocks at the start",
        "base": "distances are powers of it",
        "full_layers": "layers that stay dense",
    },
    summary="Reads blocks at power-of-two distances, so that stacked layers reach the whole context at the cost of a "
    "window.",
)

#: Patterns of equal kind that a mask is compared with.
PATTERNS = ("power", "window", "dilated", "stride")


def key_blocks(block: int, *, window: int = 5, sink: int = 1, base: int = 2) -> list[int]:
    """The key blocks that query block `block` reads, in order."""
    _check(window, sink, base)
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
    _check(window, sink, base)
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
    the last 2 · degree), "stride" (half of the degree as a window, the rest every r-th diagonal), "power"."""
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


@dataclass(frozen=True, kw_only=True)
class PowerAttention(Selector):
    """The mask in prefill and decoding, in every head: `headway.use(model, PowerAttention(block=256))`.

    window, sink: in blocks. full_layers: layers that stay dense (the paper's hybrid keeps 2 of every 7). Blocks are
    counted from the first real token of each sequence, so that left padding changes nothing."""

    block: int = 256
    window: int = 5
    sink: int = 1
    base: int = 2
    full_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self.window, self.sink, self.base)
        if self.block < 1:
            raise ArgumentError(f"block: got {self.block}, expected at least 1 token.")
        object.__setattr__(self, "full_layers", tuple(self.full_layers))

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self" and site.layer not in self.full_layers

    def prepare(self, sites: Sequence[Site]) -> None:
        layers = {site.layer for site in sites if site.kind == "self"}
        for layer in self.full_layers:
            if layers and layer not in layers:
                raise unknown("full_layers", layer, sorted(layers))
        log.warning("PowerAttention is a fixed mask: a model that was not trained with it loses quality.")
        sliding = sorted({site.layer for site in sites if site.window and self.acts_at(site)})
        if sliding:
            log.warning("PowerAttention: layers %s have a window of their own, which cuts its long edges.", sliding)

    def select(self, call: AttentionCall) -> Selection:
        if call.first_key % self.block:
            raise ArgumentError(
                f"{call.site.name}: got a cache whose first key stands at {call.first_key}, expected a multiple of the "
                f"block of {self.block}. Leave sliding layers dense with full_layers."
            )
        start = int(call.query_positions[0])
        pads = _pads(call)
        if any(pads):
            return self._lists(call, start, pads)
        skipped = call.first_key // self.block
        first, last = start // self.block, (start + call.queries - 1) // self.block
        if last < self.window:
            return Dense()
        if start % self.block == 0 and call.offset % self.block == 0:
            rows = power_mask(last + 1, window=self.window, sink=self.sink, base=self.base, offset=first)[:, skipped:]
            columns = -(-call.keys // self.block)
            rows = torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))
            blocks = rows[None, None].to(call.query.device)
            return Blocks(BlockMask(blocks, call.queries, call.keys, self.block, self.block))
        return self._lists(call, start, [0])

    def _lists(self, call: AttentionCall, start: int, pads: Sequence[int]) -> Keys:
        """Rows that do not begin at a block: each names its keys (decoding, chunks and padding cut anywhere)."""
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


def _pads(call: AttentionCall) -> list[int]:
    """Left padding of each sequence, in tokens; one zero where the host told none."""
    padding = call.forward.padding
    if padding is None or padding.shape[0] != call.query.shape[0]:
        return [0]
    return padding.long().argmax(1).tolist()


def _check(window: int, sink: int, base: int) -> None:
    if window < 1 or sink < 0 or base < 2:
        raise ArgumentError(
            f"window, sink, base: got {window}, {sink}, {base}; expected window ≥ 1 (its own block), sink ≥ 0 and "
            "base ≥ 2."
        )
