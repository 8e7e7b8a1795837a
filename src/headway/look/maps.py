"""The head inspector's data: a head's attention map small enough to draw, at full resolution where it matters.

    pixel(r, c) = round( 255 · sqrt( max w_ij over the queries i of cell row r and keys j of cell column c ) )

Query i of n lies in cell row ⌊i · side / n⌋, keys likewise; an axis shorter than `side` is stretched, and cell row r
then shows query ⌊r · n / side⌋. The maximum keeps single strong pairs visible at any scale
and the square root keeps weak weights apart from none. A map no larger than `side` is exact: one pixel per pair. All
of it streams over query rows: memory is O(block × keys) for one head.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.stages import Observer
from headway.errors import ArgumentError, unknown
from headway.kernels.weighing import part_of
from headway.look.result import DetailWindow, HeadMap, HeadMetric

SIDE = 256
WINDOW_SIZE = 64
#: Pairs closer than this are the diagonal, which every head reads and which would fill every list of strong pairs.
DIAGONAL_BAND = 8
#: Rows per block: 256 rows over 4,096 float32 keys of one head are 4 MB.
BLOCK = 256
#: A key counts as strong only when this many queries (or a quarter of them, in short texts) can see it.
LEAST_VISIBLE = 16

#: Mass per row beyond uniform attention from which a window is worth showing: above what rounding leaves.
LEAST_EXCESS = 1e-4

#: What a reader wants to see first: metric name, and whether its highest or lowest heads show it.
INTERESTING = (
    ("retrieval", "highest"),
    ("induction", "highest"),
    ("previous_token", "highest"),
    ("sink_mass", "highest"),
    ("normalised_entropy", "highest"),
    ("receiver", "highest"),
    ("duplicate_token", "highest"),
    ("streaming", "lowest"),
)


def to_bytes(weights: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """round(255 · sqrt(weight)), weights outside [0, 1] clipped."""
    return np.rint(255.0 * np.sqrt(np.clip(weights, 0.0, 1.0))).astype(np.uint8)


def cells(count: int, side: int) -> Int[np.ndarray, " count"]:
    """The cell of each of `count` positions on an axis of `side` cells; no cell is empty when count ≥ side."""
    return np.arange(count) * side // max(count, 1)


def pool_columns(weights: Float[np.ndarray, "rows keys"], side: int) -> Float[np.ndarray, "rows side"]:
    """The largest weight of each cell; axes shorter than `side` are stretched by repeating."""
    keys = weights.shape[1]
    if keys < side:
        return weights[:, np.arange(side) * keys // side]
    return np.maximum.reduceat(weights, np.searchsorted(cells(keys, side), np.arange(side)), axis=1)


def head_map(
    call: AttentionCall,
    head: int,
    *,
    side: int = SIDE,
    windows: int = 3,
    size: int = WINDOW_SIZE,
    pairs: int = 20,
    keys: int = 10,
    sinks: Sequence[int] | None = None,
    band: int = DIAGONAL_BAND,
    block: int = BLOCK,
    batch: int = 0,
) -> HeadMap:
    """One query head's map with its details.

    `windows` detail windows of `size` × `size` pairs lie where the most mass is off sinks and diagonal, beyond what
    uniform attention puts there (early rows have all their mass in any window); they do not overlap. A head without
    such a place gets one window at the middle of its diagonal, an exact map none.
    `pairs` are the strongest pairs (query position, key position, weight) off sinks and diagonal, strongest first, ties
    in reading order. `keys` are the keys of largest received mass per query that can see them, sinks included.
    `sinks` are key positions, by default the first token. Pairs with |i − j| < `band` are the diagonal (cross-attention
    has none). Padding rows count nowhere.
    Raises ArgumentError for a head or batch entry that is not there and for sizes that cannot be, NumericError for
    tensors that are not finite."""
    _check(
        call,
        head,
        batch,
        {"side": side, "size": size, "block": block},
        {"windows": windows, "pairs": pairs, "keys": keys},
    )
    one = _single(call, head, batch)
    one.check_finite()
    side = min(side, max(call.queries, call.keys))
    exact = side == max(call.queries, call.keys)
    size = min(size, call.queries, call.keys)
    shift = call.offset if call.site.kind == "self" else 0
    off = _Off(one, sinks, band)
    pixels = np.zeros((side, side), dtype=np.float32)
    strongest = _Strongest(pairs)
    received = np.zeros(call.keys)
    visible = np.zeros(call.keys)
    tiles = _Tiles(call.queries, call.keys, size)
    for rows, weights, seen in _blocks(one, block):
        _pool_into(pixels, pool_columns(weights, side), rows, call.queries)
        received += weights.sum(0, dtype=np.float64)
        visible += seen.sum(0)
        left = off.keep(rows, weights)
        strongest.add(rows, left)
        if not exact:
            uniform = seen / np.maximum(seen.sum(1, keepdims=True), 1)
            tiles.add(rows, left - off.keep(rows, uniform))
    corners = [] if exact else tiles.best(windows)
    if windows and not corners and not exact and call.site.kind == "self":
        middle = (call.queries - size) // 2
        corners = [(middle, min(max(middle + call.offset, 0), call.keys - size))]
    return HeadMap(
        layer=call.site.layer,
        head=head,
        side=side,
        rows=call.queries,
        columns=call.keys,
        pixels=_base64(pixels),
        windows=[DetailWindow(r, c, size, _base64(_square(one, r, c, size))) for r, c in corners],
        pairs=[(row + shift, key, weight) for row, key, weight in strongest.pairs()],
        keys=_strong_keys(received, visible, keys, call.queries),
    )


@dataclass(kw_only=True, eq=False)
class MapObserver(Observer):
    """Makes the maps of chosen (layer, head) pairs during one forward. `options` go to `head_map`.

    Only self-attention is mapped. Where encoder and decoder share a layer number, narrow the scope with `sites`."""

    heads: Sequence[tuple[int, int]]
    options: dict[str, Any] = field(default_factory=dict)
    reads_weights = True
    on_text = True
    _maps: dict[tuple[int, int], HeadMap] = field(default_factory=dict, init=False, repr=False)
    _sites: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.heads:
            raise ArgumentError("heads: got none, expected (layer, head) pairs. Pass heads=[(0, 0)].")

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self" and any(layer == site.layer for layer, _ in self.heads)

    def start(self) -> None:
        self._maps.clear()
        self._sites.clear()

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        layer = call.site.layer
        if layer in self._sites:
            raise ArgumentError(
                f"layer {layer}: got a second attention at {call.site.name} after {self._sites[layer]}, expected one "
                "forward and one site per layer. Narrow the scope with sites=[…], and do not generate while attached."
            )
        self._sites[layer] = call.site.name
        for _, head in dict.fromkeys(pair for pair in self.heads if pair[0] == layer):
            self._maps[layer, head] = head_map(call, head, **self.options)

    def result(self) -> list[HeadMap]:
        """The maps in the order of `heads`, each once. Raises ArgumentError for a layer in which no attention ran."""
        for layer, _ in self.heads:
            if layer not in self._sites:
                raise unknown("layer", layer, sorted(self._sites), fix="No attention of that layer ran while attached.")
        return [self._maps[pair] for pair in dict.fromkeys(self.heads)]


def choose_heads(metrics: Sequence[HeadMetric], per_role: int = 1, limit: int = 8) -> dict[tuple[int, int], str]:
    """The most telling heads: (grid row, head) -> the metric that chose it, at most `limit`.

    For each metric of INTERESTING that is given, in that order, its `per_role` best heads that no earlier metric took.
    Ties go to the lowest layer and head. NaN is never chosen, and a metric that is the same for all heads chooses none.
    Grid rows are layers when the grid has one row per layer."""
    if per_role < 1 or limit < 1:
        raise ArgumentError(f"per_role, limit: got {per_role}, {limit}; expected at least 1 each.")
    given = {metric.name: metric for metric in metrics}
    chosen: dict[tuple[int, int], str] = {}
    for name, end in INTERESTING:
        if name not in given:
            continue
        grid = given[name].array()
        if np.unique(grid[~np.isnan(grid)]).size < 2:
            continue
        order = np.argsort(-grid if end == "highest" else grid, axis=None, kind="stable")
        places = [(int(i) // grid.shape[1], int(i) % grid.shape[1]) for i in order]
        free = [p for p in places if p not in chosen and not np.isnan(grid[p])]
        chosen |= dict.fromkeys(free[:per_role], name)
    return dict(list(chosen.items())[:limit])


class _Off:
    """Removes what every head does: the sinks and the diagonal."""

    def __init__(self, call: AttentionCall, sinks: Sequence[int] | None, band: int) -> None:
        padded = call.padded_rows()
        first = 0 if padded is None else int((~padded[0]).int().argmax())
        self.sinks = [first] if sinks is None else [s for s in sinks if 0 <= s < call.keys]
        self.band = band if call.site.kind == "self" else 0
        self.offset = call.offset
        self.columns = np.arange(call.keys)

    def keep(self, rows: Int[np.ndarray, " rows"], weights: Float[np.ndarray, "rows keys"]) -> np.ndarray:
        near = np.abs(rows[:, None] + self.offset - self.columns) < self.band
        left = np.where(near, weights.dtype.type(0.0), weights)
        left[:, self.sinks] = 0.0
        return left


class _Strongest:
    """The largest weights seen so far; equal ones in reading order, whatever the blocks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows, self.keys = np.zeros(0, dtype=int), np.zeros(0, dtype=int)
        self.weights = np.zeros(0, dtype=np.float32)

    def add(self, rows: Int[np.ndarray, " rows"], weights: Float[np.ndarray, "rows keys"]) -> None:
        flat = weights.ravel()
        least = np.float32(0.0)
        if 0 < self.count < flat.size:
            least = np.partition(flat, flat.size - self.count)[flat.size - self.count]
        if self.weights.size >= self.count > 0:
            least = max(least, self.weights[-1])
        found = np.flatnonzero((flat >= least) & (flat > 0))
        self.rows = np.concatenate([self.rows, rows[found // weights.shape[1]]])
        self.keys = np.concatenate([self.keys, found % weights.shape[1]])
        self.weights = np.concatenate([self.weights, flat[found]])
        order = np.argsort(-self.weights, kind="stable")[: self.count]
        self.rows, self.keys, self.weights = self.rows[order], self.keys[order], self.weights[order]

    def pairs(self) -> list[tuple[int, int, float]]:
        return list(zip(self.rows.tolist(), self.keys.tolist(), self.weights.tolist(), strict=True))


class _Tiles:
    """Mass beyond uniform attention per tile of a quarter window's side, from which the best windows are picked."""

    def __init__(self, queries: int, keys: int, size: int) -> None:
        self.queries, self.keys, self.size = queries, keys, size
        self.tile = max(size // 4, 1)
        self.starts = np.arange(0, keys, self.tile)
        self.mass = np.zeros((-(-queries // self.tile), self.starts.size))

    def add(self, rows: Int[np.ndarray, " rows"], weights: Float[np.ndarray, "rows keys"]) -> None:
        by_column = np.add.reduceat(weights, self.starts, axis=1, dtype=np.float64)
        np.add.at(self.mass, rows // self.tile, by_column)

    def best(self, count: int) -> list[tuple[int, int]]:
        """Top left corners of windows that do not overlap, best first; ones without more than uniform are left out."""
        span = -(-self.size // self.tile)
        total = np.zeros((self.mass.shape[0] + 1, self.mass.shape[1] + 1))
        total[1:, 1:] = self.mass.cumsum(0).cumsum(1)
        top, left = np.arange(self.mass.shape[0]), np.arange(self.mass.shape[1])
        low, right = np.minimum(top + span, top.size), np.minimum(left + span, left.size)
        held = total[low][:, right] - total[low][:, left] - total[top][:, right] + total[top][:, left]
        row = np.minimum(top * self.tile, self.queries - self.size)
        column = np.minimum(left * self.tile, self.keys - self.size)
        free = np.ones_like(held, dtype=bool)
        corners: list[tuple[int, int]] = []
        while len(corners) < count:
            open_mass = np.where(free, held, -np.inf)
            r, c = np.unravel_index(int(open_mass.argmax()), held.shape)
            if open_mass[r, c] <= LEAST_EXCESS * self.size:
                break
            corners.append((int(row[r]), int(column[c])))
            clear = (np.abs(row - row[r]) >= self.size)[:, None] | (np.abs(column - column[c]) >= self.size)
            free &= clear
        return corners


def _blocks(
    call: AttentionCall, block: int
) -> Iterator[tuple[Int[np.ndarray, " rows"], Float[np.ndarray, "rows keys"], Bool[np.ndarray, "rows keys"]]]:
    """Rows, weights and visibility of one head, block by block; padding rows are zero and see nothing."""
    padded = call.padded_rows()
    for start in range(0, call.queries, block):
        rows = torch.arange(start, min(start + block, call.queries), device=call.query.device)
        weights = call.weights(rows)[0, 0]
        seen = call.visible(rows)[0, 0]
        if padded is not None:
            real = ~padded[0, rows, None]
            weights, seen = weights * real, seen & real
        yield rows.cpu().numpy(), weights.cpu().numpy(), seen.cpu().numpy()


def _pool_into(pixels: np.ndarray, pooled: np.ndarray, rows: np.ndarray, queries: int) -> None:
    """The maximum over the rows of a block, taken into the cell rows they belong to."""
    side = pixels.shape[0]
    if queries < side:
        stretched = np.arange(side) * queries // side
        inside = np.flatnonzero((stretched >= rows[0]) & (stretched <= rows[-1]))
        pixels[inside] = pooled[stretched[inside] - rows[0]]
        return
    np.maximum.at(pixels, rows * side // queries, pooled)


def _square(call: AttentionCall, row: int, column: int, size: int) -> Float[np.ndarray, "size size"]:
    """The weights of one window."""
    rows = torch.arange(row, row + size, device=call.query.device)
    weights = call.weights(rows)[0, 0, :, column : column + size]
    padded = call.padded_rows()
    if padded is not None:
        weights = weights * ~padded[0, rows, None]
    return weights.cpu().numpy()


def _single(call: AttentionCall, head: int, batch: int) -> AttentionCall:
    """The call of one batch entry and one query head."""

    def pick(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        entry = x[batch : batch + 1] if x.shape[0] > 1 else x
        return entry[:, head : head + 1] if entry.shape[1] > 1 else entry

    kv_head = head // call.groups
    forward = call.forward
    if forward.padding is not None and forward.padding.shape[0] == call.query.shape[0]:
        forward = replace(forward, padding=forward.padding[batch : batch + 1])
    return call.replace(
        query=call.query[batch : batch + 1, head : head + 1],
        key=call.key[batch : batch + 1, kv_head : kv_head + 1],
        value=call.value[batch : batch + 1, kv_head : kv_head + 1],
        mask=pick(call.mask),
        bias=pick(call.bias),
        sinks=None if call.sinks is None else call.sinks[head : head + 1],
        weighing=part_of(call.weighing, [head], call.heads, entry=batch, batch=call.query.shape[0]),
        forward=forward,
    )


def _strong_keys(
    received: Float[np.ndarray, " keys"], visible: Float[np.ndarray, " keys"], count: int, queries: int
) -> list[tuple[int, float]]:
    """(key, received mass per visible query), largest first, ties by position."""
    enough = visible >= min(LEAST_VISIBLE, -(-queries // 4))
    share = np.where(enough, received / np.maximum(visible, 1), 0.0)
    order = np.argsort(-share, kind="stable")[:count]
    return [(int(k), float(share[k])) for k in order if share[k] > 0]


def _base64(weights: Float[np.ndarray, "side side"]) -> str:
    return base64.b64encode(to_bytes(weights).tobytes()).decode("ascii")


def _check(call: AttentionCall, head: int, batch: int, sizes: dict[str, int], counts: dict[str, int]) -> None:
    if not 0 <= head < call.heads:
        raise ArgumentError(
            f"head: got {head} at {call.site.name}, expected 0..{call.heads - 1} (query heads; key heads have no maps)."
        )
    if not 0 <= batch < call.query.shape[0]:
        raise ArgumentError(f"batch: got {batch}, expected 0..{call.query.shape[0] - 1}.")
    for name, value in sizes.items():
        if value < 1:
            raise ArgumentError(f"{name}: got {value}, expected at least 1.")
    for name, value in counts.items():
        if value < 0:
            raise ArgumentError(f"{name}: got {value}, expected at least 0 (none).")
