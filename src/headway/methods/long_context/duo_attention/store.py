"""What one layer keeps: every token for its retrieval heads, sinks and recent tokens for its streaming heads.

A `SinkRing` has S + R + 1 slots. The token at place p of its sequence (padding in front not counted) goes to

    slot(p) = p                            p < S
            = S + (p − S) mod (R + 1)      otherwise

so a step overwrites the one token that nobody may see any more, and nothing is ever moved. After a forward S + R tokens
count as held; the last slot is the room for the coming one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.door.caches import PolicyLayer, TokenStore
from headway.errors import ArgumentError


class SinkRing(TokenStore):
    """Keys and values of the first `sinks` and the last `recent` tokens of each sequence, for some KV heads.

    `first` is the position of each sequence's first token. `positions` holds −1 where a slot is empty; tokens stand in
    no particular order."""

    def __init__(self, sinks: int, recent: int) -> None:
        super().__init__()
        self.sinks, self.recent = sinks, recent
        self.first = torch.zeros(1, dtype=torch.long)
        self.seen = 0

    @property
    def slots(self) -> int:
        return self.sinks + self.recent + 1

    @property
    def held(self) -> int:
        """Tokens that count as held, of the longest sequence."""
        return min(self.length, self.sinks + self.recent)

    @property
    def evicted(self) -> bool:
        """Whether some token of some sequence is held no more."""
        return self.seen - int(self.first.min()) > self.sinks + self.recent

    def append(self, key: Tensor, value: Tensor, positions: Int[Tensor, "#batch *heads new"]) -> None:
        """Files tokens at consecutive positions, (new); those that come before a sequence's first are dropped."""
        if self.empty:
            self._allocate(key, value)
        start, new = int(positions.reshape(-1)[0]), key.shape[2]
        self.seen = start + new
        firsts = self.first.tolist()
        if len(set(firsts)) == 1:
            self._put(slice(None), key, value, start, firsts[0])
        else:
            for row, first in enumerate(firsts):
                self._put(slice(row, row + 1), key[row : row + 1], value[row : row + 1], start, first)
        self.length = max(min(self.seen - min(firsts), self.slots), 0)

    def _allocate(self, key: Tensor, value: Tensor) -> None:
        batch, heads = key.shape[:2]
        self._key = key.new_zeros(batch, heads, self.slots, key.shape[3])
        self._value = value.new_zeros(batch, heads, self.slots, value.shape[3])
        self._positions = torch.full((batch, self.slots), -1, device=key.device)

    def _put(self, rows: slice, key: Tensor, value: Tensor, start: int, first: int) -> None:
        """Of the tokens that start at `start`: those that are sinks, and the last R + 1."""
        keys, values, places = self._buffers()
        end = start + key.shape[2]
        recent = range(max(start, first + self.sinks, end - self.recent - 1), end)
        sinks = range(max(start, first), min(end, first + self.sinks))
        for span in (sinks, recent):
            if not span:
                continue
            source = slice(span[0] - start, span[-1] + 1 - start)
            if len(span) == 1:
                slot = self._slot(span[0] - first)
                target: Any = slice(slot, slot + 1)
            else:
                target = torch.tensor([self._slot(column - first) for column in span], device=keys.device)
            keys[rows, :, target] = key[:, :, source]
            values[rows, :, target] = value[:, :, source]
            places[rows, target] = torch.arange(span[0], span[-1] + 1, device=places.device)

    def _slot(self, place: int) -> int:
        return place if place < self.sinks else self.sinks + (place - self.sinks) % (self.recent + 1)

    def crop(self, tokens: int) -> None:
        """Takes the last `tokens` off. The layer has seen to it that nothing was evicted."""
        self.seen -= tokens
        if not self.empty:
            places = self._buffers()[2]
            places[places >= self.seen] = -1
        self.length = max(self.seen - int(self.first.min()), 0)

    def clear(self) -> None:
        super().clear()
        self.seen = 0
        self.first = torch.zeros(1, dtype=torch.long)

    @property
    def bytes(self) -> int:
        if self.empty:
            return 0
        per_slot = sum(x[:, :, 0].numel() * x.element_size() for x in self._buffers()[:2])
        return per_slot * self.held


@dataclass
class HeadGroup:
    """KV heads of one layer that keep the same tokens; `recent` is None where they keep all."""

    heads: list[int]
    sinks: int
    recent: int | None
    retrieval: bool
    store: TokenStore | None = None
    filed: bool = False

    def make_store(self, first: Tensor) -> TokenStore:
        if self.recent is None:
            self.store = TokenStore()
        else:
            self.store = SinkRing(self.sinks, self.recent)
            self.store.first = first
        return self.store


class DuoLayer(PolicyLayer):
    """One layer. What it keeps is settled at the end of a forward, when the site has told its window.

    `new` are the keys and values of the running forward, of all heads, and the position of the first of them."""

    def __init__(self, retrieval: list[bool], sinks: int, recent: int, reserve: int) -> None:
        super().__init__()
        self.kv_heads, self.sinks, self.recent, self.reserve = len(retrieval), sinks, recent, reserve
        by_kind = {kind: [h for h, r in enumerate(retrieval) if r == kind] for kind in (True, False)}
        self.groups = [
            HeadGroup(heads, 0 if kind else sinks, None if kind else recent, kind)
            for kind, heads in by_kind.items()
            if heads
        ]
        self.first = torch.zeros(1, dtype=torch.long)
        self.new: tuple[Tensor, Tensor, int] | None = None

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        return tuple(group.store for group in self.groups if group.store is not None)

    @property
    def stored(self) -> int:
        lengths = [store.held if isinstance(store, SinkRing) else store.length for store in self.stores]
        return max(lengths, default=0)

    def file(self, key: Tensor, value: Tensor, positions: Int[Tensor, " new"]) -> None:
        self.fold()
        if key.shape[1] != self.kv_heads:
            raise ArgumentError(
                f"gates: got {self.kv_heads} KV heads per layer, expected {key.shape[1]}, as many as the layer has "
                "here. Use gates that were made for this model."
            )
        self.new = key, value, int(positions[0])
        one = key.shape[2] == 1
        for group in self.groups:
            if group.store is not None and (one or group.recent is None):
                self._append(group)

    def learn_window(self, window: int | None) -> None:
        """Heads of a sliding layer see its window alone: none keeps more than that. Called when the site is read."""
        if window is None:
            return
        for group in self.groups:
            if group.store is None and (group.recent is None or group.recent >= window - 1):
                group.sinks, group.recent = 0, window - 1

    def fold(self) -> None:
        """Files what came in this forward and is not filed yet."""
        if self.new is None:
            return
        for group in self.groups:
            if not group.filed:
                self._append(group)
            group.filed = False
        self.new = None

    def _append(self, group: HeadGroup) -> None:
        assert self.new is not None
        key, value, start = self.new
        store = group.make_store(self.first) if group.store is None else group.store
        some_key, some_value = (over(x, group.heads) for x in (key, value))
        if self.reserve and store.empty and group.recent is None:
            store.reserve(self.reserve, some_key, some_value)
        store.append(some_key, some_value, torch.arange(start, start + key.shape[2], device=key.device))
        group.filed = True

    def learn_first(self, first: Int[Tensor, " batch"]) -> None:
        self.first = first
        for store in self.stores:
            if isinstance(store, SinkRing):
                store.first = first

    def reset(self) -> None:
        self.new = None
        for group in self.groups:
            group.store, group.filed = None, False
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        rings = [store for store in self.stores if isinstance(store, SinkRing)]
        if not tokens_to_remove:
            return
        if tokens_to_remove > 0 or any(ring.evicted for ring in rings):
            super().crop(tokens_to_remove)
        count = min(-tokens_to_remove, self.seen)
        for store in self.stores:
            store.crop(count)
        self.seen -= count


def over(x: Tensor, heads: list[int]) -> Tensor:
    """Some heads of (batch, heads, …): a view where they are consecutive, else a copy."""
    if heads[-1] - heads[0] + 1 == len(heads):
        return x[:, heads[0] : heads[-1] + 1]
    return x[:, torch.tensor(heads, device=x.device)]
