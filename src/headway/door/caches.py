"""Caches of cache policies: what is stored (of each group of heads) against what the host believes was seen.

A host asks its cache for three numbers, and they differ once keys are dropped: the *logical* length (tokens seen; it
sets positions), the view that `update` returns (it sets the host's mask), and the *stored* length (memory). A
`PolicyLayer` keeps them apart in the simplest way: `update` files the new keys and hands back the new ones only, so the
host masks a square of new tokens; the policy's `read` then brings the past back in as it sees fit.

A `TokenStore` holds keys and values in buffers that grow by halves, so that appending a token costs a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from headway.errors import ArgumentError

#: Room that a fresh store makes, in tokens.
LEAST_ROOM = 64


class TokenStore:
    """Keys, values and positions of tokens for some KV heads: (batch, heads, tokens, dim) in buffers with room to grow.

    `key`, `value` and `positions` are views of what is filled. Positions are those of the sequence, (batch, tokens):
    all heads of a store keep the same tokens; with `per_head=True` they may differ, and positions are
    (batch, heads, tokens)."""

    def __init__(self, *, per_head: bool = False) -> None:
        self.per_head = per_head
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._positions: Tensor | None = None

    @property
    def empty(self) -> bool:
        return self._key is None

    @property
    def key(self) -> Float[Tensor, "batch heads tokens dim"]:
        return self._buffers()[0][:, :, : self.length]

    @property
    def value(self) -> Float[Tensor, "batch heads tokens value_dim"]:
        return self._buffers()[1][:, :, : self.length]

    @property
    def positions(self) -> Int[Tensor, "batch *heads tokens"]:
        return self._buffers()[2][..., : self.length]

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._key is None or self._value is None or self._positions is None:
            raise ArgumentError("store: got an empty one, expected tokens. Run a forward first.")
        return self._key, self._value, self._positions

    def reserve(self, tokens: int, like_key: Tensor, like_value: Tensor) -> None:
        """Makes room for `tokens` in all; what is stored stays."""
        if self._key is not None and self._key.shape[2] >= tokens:
            return
        batch, heads = like_key.shape[:2]
        room = max(tokens, LEAST_ROOM)
        key = like_key.new_empty(batch, heads, room, like_key.shape[3])
        value = like_value.new_empty(batch, heads, room, like_value.shape[3])
        shape = (batch, heads, room) if self.per_head else (batch, room)
        positions = torch.zeros(shape, dtype=torch.long, device=like_key.device)
        if not self.empty:
            key[:, :, : self.length] = self.key
            value[:, :, : self.length] = self.value
            positions[..., : self.length] = self.positions
        self._key, self._value, self._positions = key, value, positions

    def append(
        self,
        key: Float[Tensor, "batch heads new dim"],
        value: Float[Tensor, "batch heads new value_dim"],
        positions: Int[Tensor, "#batch *heads new"],
    ) -> None:
        """Files new tokens behind the stored ones."""
        end = self.length + key.shape[2]
        if self._key is None or self._key.shape[2] < end:
            self.reserve(end if self._key is None else max(end, self.length + self.length // 2), key, value)
        keys, values, places = self._buffers()
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        places[..., self.length : end] = positions
        self.length = end

    def keep(self, index: Int[Tensor, "batch *heads kept"]) -> None:
        """Keeps the slots named, in the order given, and gives back the memory of the rest.

        `index` is (batch, kept), or (batch, heads, kept) for a `per_head` store."""
        key, value, positions = self.key, self.value, self.positions
        per_head = index if index.ndim == 3 else index[:, None].expand(-1, key.shape[1], -1)
        if index.ndim == 3 and not self.per_head:
            raise ArgumentError("index: got one list per head, expected one per sequence. Make a store with per_head.")
        self._key = key.gather(2, per_head[..., None].expand(-1, -1, -1, key.shape[3]))
        self._value = value.gather(2, per_head[..., None].expand(-1, -1, -1, value.shape[3]))
        self._positions = positions.gather(-1, per_head if self.per_head else index)
        self.length = index.shape[-1]

    def drop_middle(self, first: int, last: int) -> None:
        """Keeps the first `first` and the last `last` slots, moving tokens inside the buffer; the buffer stays."""
        gone = self.length - first - last
        if gone <= 0:
            return
        keys, values, places = self._buffers()
        for buffer in (keys, values):
            buffer[:, :, first : first + last] = buffer[:, :, self.length - last : self.length].clone()
        places[..., first : first + last] = places[..., self.length - last : self.length].clone()
        self.length = first + last

    def crop(self, tokens: int) -> None:
        """Takes the last `tokens` off."""
        self.length = max(self.length - tokens, 0)

    def select(self, index: Int[Tensor, " rows"]) -> None:
        """The sequences named, in the order given (beam search, batch selection, repetition)."""
        if self.empty:
            return
        at = index.to(self.key.device)
        self._key, self._value, self._positions = (buffer.index_select(0, at) for buffer in self._buffers())

    def clear(self) -> None:
        self.length, self._key, self._value, self._positions = 0, None, None, None

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that are stored (room to grow left out)."""
        return 0 if self.empty else sum(view.numel() * view.element_size() for view in (self.key, self.value))

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the buffers, room to grow included."""
        buffers = [b for b in (self._key, self._value, self._positions) if b is not None]
        return sum(b.numel() * b.element_size() for b in buffers)


class PolicyLayer(CacheLayerMixin):
    """One layer of a `PolicyCache`. A policy's layer overrides `file` and lists its `stores`."""

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def file(self, key: Tensor, value: Tensor, positions: Int[Tensor, " new"]) -> None:
        """Stores the new tokens, whose positions in the sequence are given."""
        raise NotImplementedError

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        positions = torch.arange(self.seen, self.seen + new, device=key_states.device)
        self.file(key_states, value_states, positions)
        self.seen += new
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `update` will return, and the position of the first."""
        return int(query_length), self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def stored(self) -> int:
        """Tokens held, of the store that holds most."""
        return max((store.length for store in self.stores), default=0)

    def reset(self) -> None:
        self.seen = 0
        for store in self.stores:
            store.clear()

    def select(self, index: Int[Tensor, " rows"]) -> None:
        for store in self.stores:
            store.select(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for store in self.stores:
            if not store.empty:
                store.select(torch.arange(store.key.shape[0]).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if not tokens_to_remove:
            return
        raise ArgumentError(
            f"{type(self).__name__}: got a request to take back {abs(tokens_to_remove)} tokens, expected none: what "
            "was dropped cannot come back. Generate without assisted decoding, or keep every key."
        )


class PolicyCache(Cache):
    """The cache of one request under one policy."""

    def __init__(self, policy: Any, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.policy = policy

    def stored_bytes(self) -> int:
        """Bytes of keys and values that are held now."""
        return sum(store.bytes for layer in self.layers for store in getattr(layer, "stores", ()))

    def move_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        """Moves what the cache itself knows of each sequence, (batch, …), as its layers were moved."""

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.move_rows(lambda x: x.index_select(0, beam_idx.to(x.device, torch.long)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.move_rows(lambda x: x.index_select(0, indices.to(x.device, torch.long)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.move_rows(lambda x: x.repeat_interleave(repeats, 0))


def first_tokens(padding: Bool[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
    """The column of each sequence's first real token; behind the last one where all are padding."""
    real = padding.bool()
    return torch.where(real.any(1), real.long().argmax(1), real.shape[1])


def key_visible(
    call_rows: Int[Tensor, " queries"],
    key_positions: Int[Tensor, "batch *heads keys"],
    padding: Bool[Tensor, "batch tokens"] | None,
    *,
    causal: bool = True,
) -> Bool[
    Tensor,
    (
        batch  # heads queries keys
    ),
]:
    """Which stored keys the query rows (their positions) may see: not the future, and no padding."""
    at = key_positions if key_positions.ndim == 3 else key_positions[:, None]
    seen = torch.ones(*at.shape[:2], call_rows.numel(), at.shape[2], dtype=torch.bool, device=at.device)
    if causal:
        seen &= at[:, :, None, :] <= call_rows[:, None].to(at.device)
    if padding is not None:
        known = padding.to(at.device)[:, None].expand(-1, at.shape[1], -1)
        real = known.gather(2, at.clamp(max=padding.shape[1] - 1))
        seen &= real[:, :, None, :]
    return seen
