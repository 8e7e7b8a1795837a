"""The block form of the causal scan: everything in blocks is matrix products, one product over states joins the blocks.

With blocks of B tokens, r = 0..B−1 within a block, and S the state before the block:

    O  = scale · { [(Q Kᵀ) ⊙ M] V + diag(λ^(r+1)) Q S }
    S' = λ^B S + (diag(λ^(B−1−r)) K)ᵀ V

The products K ᵀV of all blocks come first; then the states before all of them are one lower triangular product

    S_i = Σ_{j≤i} λ^(T_i − T_j) X_j ,     X_0 the carried state, X_j what block j−1 writes, T_i tokens before block i

and then all outputs. The backward pass goes over the same products from right to left, and recomputes what it needs:
beside inputs and outputs only the state before every tile is kept, which is far less than they take.

Tiles: a run of blocks of one head (of several where sequences are short) is worked off at a time, so that scores and
states stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Tokens per block. With d = 64 the work within and between blocks is then equal.
BLOCK = 64
#: Numbers that a tile on a CPU may work with: 4 MB in float32, or 2,048 tokens with d = e = 64.
WORK = 2**20
#: Plans kept for calls of the same sizes: one for each layer of a deep model, at about a quarter of a megabyte.
KEPT = 64


def scan_blocks(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    slopes: Float[Tensor, " heads"],
    state: Float[Tensor, "batch heads dim value_dim"],
    *,
    scale: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    resets: Bool[Tensor, "batch tokens"] | None = None,
    block: int = BLOCK,
    tile: int | None = None,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """Output and final state; see `headway.kernels.scan.causal_scan`, which checks the arguments.

    `mask=None` and `resets=None` are the fastest. Values at masked tokens must be finite. `tile` tokens, all heads
    counted, are worked off together; None chooses."""
    if tile is None:
        dim, value_dim = state.shape[2:]
        tile = max(WORK // (2 * (dim + value_dim) + 2 * block + 2 * dim * value_dim // block), block)
    shape = tuple(query.shape[:3])
    if query.device.type == "cpu" and mask is None and resets is None and not torch.compiler.is_compiling():
        plan = _kept_plan(shape, tuple(slopes.tolist()), state.dtype, scale, block, tile)
    else:
        plan = _Plan.of(shape, slopes, state.dtype, scale, mask, resets, block, tile)
    return _Scan.apply(query, key, value, state, plan)


Rows = tuple[slice, slice]
#: Running counts of real tokens and of resets, and which tokens are real.
Clock = tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]


@dataclass(frozen=True)
class _Tile:
    """Blocks [start, start + blocks · length) of the tokens; `index` counts the tiles."""

    index: int
    start: int
    blocks: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.blocks * self.length)


@dataclass(frozen=True)
class _Factors:
    """The powers of λ of a tile, all broadcastable: M (with the scale), λ^(r+1) (with the scale), λ^(B−1−r), and those
    between states. `counts` are the numbers of batch rows, heads and blocks that lie flat in the tile's tensors."""

    counts: tuple[int, int, int]
    across: Float[Tensor, "#batch heads #blocks length length"]
    lead: Float[Tensor, "#groups_blocks length 1"]
    rest: Float[Tensor, "#groups_blocks length 1"]
    chain: Float[Tensor, "groups states states"]


def _factors(counts: tuple[int, int, int], across: Tensor, lead: Tensor, rest: Tensor, chain: Tensor) -> _Factors:
    """Row factors lie flat as the tile does; where all its blocks share one, it is kept once."""

    def flat(factor: Tensor) -> Tensor:
        return factor.flatten(0, 2) if factor.shape[:3].numel() == 1 else factor.expand(*counts, -1, -1).flatten(0, 2)

    return _Factors(counts, across, flat(lead), flat(rest), chain.expand(counts[0], -1, -1, -1).flatten(0, 1))


class _Plan:
    """How the work is cut, and the decays."""

    def __init__(
        self,
        rows: list[Rows],
        tiles: list[_Tile],
        powers: Float[Tensor, "heads distances"],
        scale: float,
        clock: Clock | None,
    ) -> None:
        self.rows, self.tiles, self.powers, self.scale, self.clock = rows, tiles, powers, scale, clock
        self._tables: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._even: dict[tuple[int, ...], _Factors] = {}
        self._uneven: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        slopes: Tensor,
        dtype: torch.dtype,
        scale: float,
        mask: Tensor | None,
        resets: Tensor | None,
        block: int,
        tile: int,
    ) -> _Plan:
        """`shape` is (batch, heads, tokens); powers are kept in `dtype`."""
        batch, heads, tokens = shape
        device = slopes.device
        block = min(block, max(tokens, 1))
        whole = tokens // block
        most = max(min(tile // block, whole), 1)
        tiles = [_Tile(a // most, a * block, min(most, whole - a), block) for a in range(0, whole, most)]
        if tokens % block:
            tiles.append(_Tile(len(tiles), tokens - tokens % block, 1, tokens % block))
        together = max(tile // max(tokens, 1), 1) if device.type == "cpu" else batch * heads
        distance = torch.arange(most * block + 2, device=device, dtype=torch.float64)
        powers = torch.exp(-slopes.double()[:, None] * distance)
        # λ^0 is 1 for an infinite slope too; the last entry is the zero of what is hidden.
        powers[:, 0], powers[:, -1] = 1, 0
        clock = None
        if mask is not None or resets is not None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=device) if mask is None else mask
            at = real.long().cumsum(1)
            clock = at, torch.zeros_like(at) if resets is None else resets.long().cumsum(1), real
        return cls(list(_groups(batch, heads, together)), tiles, powers.to(dtype), scale, clock)

    def factors(self, rows: Rows, tile: _Tile) -> _Factors:
        """The factors of a tile; without padding and documents, those of all tiles of a shape are the same."""
        counts = (rows[0].stop - rows[0].start, rows[1].stop - rows[1].start, tile.blocks)
        if self.clock is not None:
            found = self._look_up(self.powers[rows[1]], self._uneven_distances(self.clock, rows[0], tile))
            return _factors(counts, *found)
        shape = (tile.blocks, tile.length)
        if shape not in self._tables:
            self._tables[shape] = self._look_up(self.powers, self._even_distances(tile))
        name = (rows[1].start, *counts, tile.length)
        if name not in self._even:
            self._even[name] = _factors(counts, *(x[:, rows[1]] for x in self._tables[shape]))
        return self._even[name]

    def _look_up(self, powers: Tensor, distances: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Powers by their exponents; the last entry of the table is the zero of what is hidden."""
        across, lead, rest, chain = (
            powers.index_select(1, d.flatten()).view(-1, *d.shape).transpose(0, 1) for d in distances
        )
        return across * self.scale, lead[..., None] * self.scale, rest[..., None], chain

    def _even_distances(self, tile: _Tile) -> tuple[Tensor, ...]:
        """Exponents where every token is real and of one document: the same for every block."""
        hidden, device = self.powers.shape[1] - 1, self.powers.device
        r = torch.arange(tile.length, device=device)
        i = torch.arange(tile.blocks + 1, device=device) * tile.length
        across, chain = (torch.where(x[:, None] >= x, x[:, None] - x, hidden)[None] for x in (r, i))
        return across[:, None], r[None, None] + 1, tile.length - 1 - r[None, None], chain

    def _uneven_distances(self, clock: Clock, batch: slice, tile: _Tile) -> tuple[Tensor, ...]:
        """Exponents counted over real tokens, hidden where a document has ended; those of one batch row are kept, as
        its heads share them."""
        name = (batch.start, tile.index)
        if name not in self._uneven:
            if self._uneven and next(iter(self._uneven))[0] != batch.start:
                self._uneven.clear()
            self._uneven[name] = self._count(clock, batch, tile)
        return self._uneven[name]

    def _count(self, clock: Clock, batch: slice, tile: _Tile) -> tuple[Tensor, ...]:
        hidden = self.powers.shape[1] - 1
        at, document, real = (x[batch, tile.tokens].unflatten(1, (tile.blocks, tile.length)) for x in clock)
        edge_at, edge_document = (self._edges(x[batch], tile) for x in clock[:2])
        at0, at1 = edge_at[:, :-1, None], edge_at[:, 1:, None]
        document0, document1 = edge_document[:, :-1, None], edge_document[:, 1:, None]
        r = torch.arange(tile.length, device=at.device)
        i = torch.arange(tile.blocks + 1, device=at.device)
        same = document[..., :, None] == document[..., None, :]
        seen = same & real[..., :, None] & real[..., None, :] & (r[:, None] >= r)
        joined = (edge_document[:, :, None] == edge_document[:, None]) & (i[:, None] >= i)
        return (
            torch.where(seen, at[..., :, None] - at[..., None, :], hidden),
            torch.where(real & (document == document0), at - at0, hidden),
            torch.where(real & (document == document1), at1 - at, hidden),
            torch.where(joined, edge_at[:, :, None] - edge_at[:, None], hidden),
        )

    def _edges(self, count: Int[Tensor, "batch tokens"], tile: _Tile) -> Int[Tensor, "batch states"]:
        """A running count before the first block and behind each block."""
        before = count[:, tile.start - 1 : tile.start] if tile.start else torch.zeros_like(count[:, :1])
        return torch.cat([before, count[:, tile.tokens][:, tile.length - 1 :: tile.length]], 1)


@lru_cache(maxsize=KEPT)
def _kept_plan(
    shape: tuple[int, ...], slopes: tuple[float, ...], dtype: torch.dtype, scale: float, block: int, tile: int
) -> _Plan:
    """The plan without padding and documents, kept from call to call: it depends on sizes and slopes alone, and making
    it takes an eighth of a call of 1,024 tokens."""
    at = torch.tensor(slopes, dtype=torch.float64)
    return _Plan.of(shape, at, dtype, scale, None, None, block, tile)


def _groups(batch: int, heads: int, together: int) -> Iterator[Rows]:
    """Runs of about `together` heads: of one batch row, or all heads of several."""
    if together >= heads:
        size = together // heads
        yield from ((slice(b, min(b + size, batch)), slice(0, heads)) for b in range(0, batch, size))
    else:
        for b in range(batch):
            yield from ((slice(b, b + 1), slice(h, min(h + together, heads))) for h in range(0, heads, together))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, state: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        out = value.new_empty(value.shape)
        final = state.clone()
        carried = state.new_empty(len(plan.tiles), *state.shape)
        for rows in plan.rows:
            for tile in plan.tiles:
                f = plan.factors(rows, tile)
                q, k, v = (_cut(x, rows, tile, state.dtype) for x in (query, key, value))
                carried[tile.index][rows] = final[rows]
                states = _states(k, v, f, final[rows].flatten(0, 1))
                final[rows] = states[:, -1].view_as(final[rows])
                weights = _damp(q @ k.transpose(1, 2), f)
                into = _cut(out, rows, tile, state.dtype)
                torch.bmm(weights, v, out=into)
                into.baddbmm_(q * f.lead, states[:, :-1].flatten(0, 1))
                _paste(out, rows, tile, into)
        ctx.save_for_backward(query, key, value, carried)
        ctx.plan = plan
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, carried = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        d_state = d_final.clone()
        # The caller may run the backward pass under autocast, which would narrow the sums.
        with torch.autocast(query.device.type, enabled=False):
            for rows in ctx.plan.rows:
                for tile in reversed(ctx.plan.tiles):
                    f = ctx.plan.factors(rows, tile)
                    q, k, v, d_o = (_cut(x, rows, tile, carried.dtype) for x in (query, key, value, d_out))
                    before, d_behind = (x[rows].flatten(0, 1) for x in (carried[tile.index], d_state))
                    *found, d_before = _tile_gradients(q, k, v, d_o, before, d_behind, f)
                    d_state[rows] = d_before.view_as(d_state[rows])
                    for grad, part in zip(grads, found, strict=True):
                        _paste(grad, rows, tile, part)
        return *grads, d_state, None


def _tile_gradients(
    q: Float[Tensor, "groups_blocks length dim"],
    k: Float[Tensor, "groups_blocks length dim"],
    v: Float[Tensor, "groups_blocks length value_dim"],
    d_out: Float[Tensor, "groups_blocks length value_dim"],
    state: Float[Tensor, "groups dim value_dim"],
    d_state: Float[Tensor, "groups dim value_dim"],
    f: _Factors,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and of the state before the tile, given that of the state behind it."""
    before = _states(k, v, f, state)[:, :-1].flatten(0, 1)
    read = ((q * f.lead).transpose(1, 2) @ d_out).unflatten(0, (len(f.chain), -1))
    line = torch.cat([read, d_state[:, None]], 1)
    d_states = _join(f.chain.transpose(1, 2), line)
    d_written = d_states[:, 1:].flatten(0, 1)
    weights = _damp(q @ k.transpose(1, 2), f)
    d_weights = _damp(d_out @ v.transpose(1, 2), f)
    d_q = torch.baddbmm((d_out @ before.transpose(1, 2)) * f.lead, d_weights, k)
    d_k = torch.baddbmm((v @ d_written.transpose(1, 2)) * f.rest, d_weights.transpose(1, 2), q)
    d_v = torch.baddbmm((k * f.rest) @ d_written, weights.transpose(1, 2), d_out)
    return d_q, d_k, d_v, d_states[:, 0]


def _states(
    k: Float[Tensor, "groups_blocks length dim"],
    v: Float[Tensor, "groups_blocks length value_dim"],
    factors: _Factors,
    carried: Float[Tensor, "groups dim value_dim"],
) -> Float[Tensor, "groups states dim value_dim"]:
    """The state before every block of the tile, and behind the last."""
    groups, states, _ = factors.chain.shape
    line = carried.new_empty(groups, states, *carried.shape[1:])
    line[:, 0] = carried
    turned = (k * factors.rest).transpose(1, 2)
    if groups == 1:
        torch.bmm(turned, v, out=line[0, 1:])
    else:
        line[:, 1:] = (turned @ v).unflatten(0, (groups, -1))
    return _join(factors.chain, line)


def _join(
    chain: Float[Tensor, "groups states states"], line: Float[Tensor, "groups states dim value_dim"]
) -> Float[Tensor, "groups states dim value_dim"]:
    """The product over states. That of a single head is cut in two, or a library of two threads and more splits so few
    rows badly."""
    groups, states, dim, _ = line.shape
    if groups > 1 or dim % 2:
        return (chain @ line.flatten(2)).view_as(line)
    halves = line.view(states, 2, -1).transpose(0, 1)
    return torch.bmm(chain.expand(2, -1, -1), halves).transpose(0, 1).reshape(line.shape)


def _cut(x: Tensor, rows: Rows, tile: _Tile, dtype: torch.dtype) -> Float[Tensor, "groups_blocks length dim"]:
    """The blocks of a tile, one behind the other; a view of x where its layout allows."""
    return x[rows][:, :, tile.tokens].reshape(-1, tile.length, x.shape[3]).to(dtype)


def _paste(x: Tensor, rows: Rows, tile: _Tile, blocks: Tensor) -> None:
    """Writes blocks to where `_cut` takes them from, unless they are there already."""
    target = x[rows][:, :, tile.tokens]
    if blocks.data_ptr() != target.data_ptr():
        target.copy_(blocks.view_as(target))


def _damp(scores: Float[Tensor, "groups_blocks length length"], factors: _Factors) -> Tensor:
    """Scores ⊙ M, in place."""
    scores.view(*factors.counts, *scores.shape[1:]).mul_(factors.across)
    return scores
