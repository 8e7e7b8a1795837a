"""Which keys each query may read: `Dense`, `Window`, `Blocks` over a `BlockMask`, or `Keys`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError
from headway.kernels.gathered import row_block, unique_keys


@dataclass(frozen=True)
class Dense:
    """Every visible key."""

    def to_bool(self, queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, "1 1 queries keys"]:
        return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class Window:
    """The first `sinks` keys and the last `window` keys up to the query itself."""

    sinks: int
    window: int

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ArgumentError(
                f"sinks, window: got {self.sinks}, {self.window}; expected sinks ≥ 0 and window ≥ 1 (the query itself)."
            )

    def to_bool(self, queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, "1 1 queries keys"]:
        row = torch.arange(queries, device=device)[:, None] + keys - queries
        column = torch.arange(keys, device=device)[None]
        near = (column <= row) & (column > row - self.window)
        return (near | ((column < self.sinks) & (column <= row)))[None, None]


@dataclass(frozen=True)
class BlockMask:
    """Selected (query block, key block) pairs: `blocks` is True where a block is read.

    The last block of either side may be ragged. Query row i stands at key position i + keys - queries."""

    blocks: Bool[Tensor, "batch heads query_blocks key_blocks"]
    queries: int
    keys: int
    query_block: int
    key_block: int

    def __post_init__(self) -> None:
        wanted = (-(-self.queries // self.query_block), -(-self.keys // self.key_block))
        if self.blocks.ndim != 4 or self.blocks.dtype != torch.bool or tuple(self.blocks.shape[2:]) != wanted:
            raise ArgumentError(
                f"blocks: got {self.blocks.dtype} of shape {tuple(self.blocks.shape)}, expected bool "
                f"(batch, heads, {wanted[0]}, {wanted[1]}) for {self.queries} queries in blocks of {self.query_block} "
                f"and {self.keys} keys in blocks of {self.key_block}."
            )

    @classmethod
    def full(
        cls, queries: int, keys: int, query_block: int, key_block: int, *, batch: int = 1, heads: int = 1
    ) -> BlockMask:
        """Every block."""
        shape = (batch, heads, -(-queries // query_block), -(-keys // key_block))
        return cls(torch.ones(shape, dtype=torch.bool), queries, keys, query_block, key_block)

    @property
    def offset(self) -> int:
        return self.keys - self.queries

    def _like(self, blocks: Tensor) -> BlockMask:
        return BlockMask(blocks, self.queries, self.keys, self.query_block, self.key_block)

    def _check(self, other: BlockMask) -> None:
        mine = (self.queries, self.keys, self.query_block, self.key_block)
        theirs = (other.queries, other.keys, other.query_block, other.key_block)
        if mine != theirs:
            raise ArgumentError(
                f"block masks: got (queries, keys, query block, key block) {mine} and {theirs}, expected equal ones. "
                "Build both on one grid."
            )

    def union(self, other: BlockMask) -> BlockMask:
        self._check(other)
        return self._like(self.blocks | other.blocks)

    def intersection(self, other: BlockMask) -> BlockMask:
        self._check(other)
        return self._like(self.blocks & other.blocks)

    def _spans(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and last key position of each query block, first and last of each key block."""
        device = self.blocks.device
        first_query = torch.arange(self.blocks.shape[2], device=device) * self.query_block
        last_query = (first_query + self.query_block).clamp(max=self.queries) - 1
        first_key = torch.arange(self.blocks.shape[3], device=device) * self.key_block
        last_key = (first_key + self.key_block).clamp(max=self.keys) - 1
        return first_query + self.offset, last_query + self.offset, first_key, last_key

    def reachable(self) -> Bool[Tensor, "query_blocks key_blocks"]:
        """Blocks that hold at least one pair a causal host can see."""
        _, last_query, first_key, _ = self._spans()
        return first_key[None] <= last_query[:, None]

    def causal(self) -> BlockMask:
        """Without the blocks that lie wholly in the future."""
        return self._like(self.blocks & self.reachable())

    def is_causal(self) -> bool:
        return not bool((self.blocks & ~self.reachable()).any())

    def with_sinks(self, tokens: int) -> BlockMask:
        """Forces the key blocks that hold the first `tokens` keys, where they are not in the future."""
        _, _, first_key, _ = self._spans()
        return self._like(self.blocks | ((first_key < tokens)[None] & self.reachable()))

    def with_local(self, tokens: int) -> BlockMask:
        """Forces the key blocks that hold any of the last `tokens` keys up to each query (1: the diagonal)."""
        first_query, last_query, first_key, last_key = self._spans()
        near = (last_key[None] > first_query[:, None] - tokens) & (first_key[None] <= last_query[:, None])
        return self._like(self.blocks | near)

    def with_diagonal(self) -> BlockMask:
        return self.with_local(1)

    def to_bool(self) -> Bool[Tensor, "batch heads queries keys"]:
        """The mask pair by pair."""
        rows = self.blocks.repeat_interleave(self.query_block, 2)[:, :, : self.queries]
        return rows.repeat_interleave(self.key_block, 3)[..., : self.keys]

    def density(self, *, causal: bool = True) -> float:
        """Selected over visible pairs, counted pair by pair."""
        pairs = self.pairs(causal=causal)
        chosen = (self.blocks.double().mean((0, 1)).cpu() * pairs).sum()
        return float(chosen / pairs.sum())

    def pairs(self, *, causal: bool = True) -> Float[Tensor, "query_blocks key_blocks"]:
        """Visible pairs in each block.

        With row i at position p, min(max(p - first key + 1, 0), width) of a block's keys are visible. Summed up to the
        row that sees m of them this is m(m + 1)/2 until the block is full, and `width` for every row after it."""
        first_query, last_query, first_key, last_key = (x.double().cpu() for x in self._spans())
        width = last_key - first_key + 1
        if not causal:
            return (last_query - first_query + 1)[:, None] * width

        def up_to(seen: Tensor) -> Tensor:
            inside = torch.minimum(seen.clamp(min=0), width)
            return inside * (inside + 1) / 2 + (seen - width).clamp(min=0) * width

        return up_to(last_query[:, None] - first_key + 1) - up_to(first_query[:, None] - first_key)

    def plot(self, *, batch: int = 0, head: int = 0) -> str:
        """The mask of one head as text: █ read, · skipped, blank in the future."""
        reachable = self.reachable()
        return "\n".join(
            "".join("█" if on else ("·" if seen else " ") for on, seen in zip(row, reach, strict=True))
            for row, reach in zip(self.blocks[batch, head].tolist(), reachable.tolist(), strict=True)
        )


@dataclass(frozen=True)
class Blocks:
    """The keys of the selected blocks (causality of the host still applies inside them). `within` narrows them pair by
    pair, where rows of one block read different keys."""

    mask: BlockMask
    within: Bool[Tensor, "#batch #heads queries keys"] | None = None

    def to_bool(self, queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, ...]:
        if (queries, keys) != (self.mask.queries, self.mask.keys):
            raise ArgumentError(
                f"block mask: got one for {self.mask.queries} queries and {self.mask.keys} keys, expected "
                f"{queries} and "
                f"{keys}. Build it from the call it is used on."
            )
        chosen = self.mask.to_bool().to(device)
        return chosen if self.within is None else chosen & self.within.to(device)


@dataclass(frozen=True)
class Keys:
    """Lists of keys: one for all rows, one per row, or one per block of `query_block` rows.

    `index` has one entry for all heads, one per key head, or one per query head; `valid` is False where an entry is
    only fill. A key that is listed twice counts once."""

    index: Int[Tensor, "#batch #heads lists chosen"]
    valid: Bool[Tensor, "#batch #heads lists chosen"] | None = None
    query_block: int | None = None

    def to_bool(self, queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, ...]:
        """The mask pair by pair, with the heads of `index`."""
        size = row_block(self.index, queries, self.query_block)
        index, valid = unique_keys(self.index, self.valid, keys)
        chosen = torch.zeros(*index.shape[:3], keys, dtype=torch.int32, device=index.device)
        chosen.scatter_add_(3, index, valid.int())
        return (chosen > 0).repeat_interleave(size, 2)[:, :, :queries].to(device)


Selection = Dense | Window | Blocks | Keys
