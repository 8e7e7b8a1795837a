"""What one layer of a TAPPA cache holds: ragged keys of its KV heads, and what the next allocation needs to know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.caches import PolicyLayer, TokenStore

#: Budget of a sequence that has not been cut yet.
UNCUT = 2**40
#: Position of a slot that holds nothing: another sequence of the batch kept more.
EMPTY = -1


class TappaLayer(PolicyLayer):
    """One store for all KV heads of the layer, or one for each (`split`); tokens differ by head in both.

    Slots are in the order of positions, empty ones first. `budget` (batch, stores) are past keys to keep, `recent` the
    last queries while some sequence is uncut, `measures` what preferences are made of, each (batch, stores). `past` are
    the keys before the window when a sequence was measured, `held` those since. `scores` live from the layer's own read
    to the end of the forward."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split = split
        self._clear()

    def _clear(self) -> None:
        self.parts: list[TokenStore] = []
        self.budget = self.past = self.held = torch.empty(0, 0, dtype=torch.long)
        self.recent: Tensor | None = None
        self.measures: dict[str, Float[Tensor, "batch stores"]] = {}
        self.scores: list[Float[Tensor, "batch heads slots"]] = []

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        return tuple(self.parts)

    @property
    def width(self) -> int:
        """Dimensions of a stored key."""
        return self.parts[0].key.shape[3]

    def heads_of(self, store: int) -> list[int]:
        """The KV heads of a store."""
        return [store] if self.split else list(range(self.parts[0].key.shape[1]))

    def file(self, key: Tensor, value: Tensor, positions: Int[Tensor, " new"]) -> None:
        if not self.parts:
            count = key.shape[1] if self.split else 1
            self.parts = [TokenStore(per_head=True) for _ in range(count)]
            self.budget = torch.full((key.shape[0], count), UNCUT, device=key.device)
            self.past = self.held = torch.zeros_like(self.budget)
        for number, store in enumerate(self.parts):
            heads = slice(number, number + 1) if self.split else slice(None)
            store.append(key[:, heads], value[:, heads], positions)

    def remember(self, query: Float[Tensor, "batch heads new dim"], window: int) -> Float[Tensor, "batch heads w dim"]:
        """The last `window` queries of the request, this forward's included."""
        whole = query if self.recent is None else torch.cat([self.recent, query], 2)
        return whole[:, :, -window:]

    def keep(self, store: int, chosen: Bool[Tensor, "batch heads slots"]) -> None:
        """Keeps the slots that are chosen; sequences and heads with fewer of them get empty slots in front."""
        part = self.parts[store]
        most = int(chosen.sum(-1).max())
        slots = torch.arange(part.length, device=chosen.device).expand_as(chosen)
        index = torch.where(chosen, slots, EMPTY).sort(-1).values[..., part.length - most :]
        empty = index < 0
        part.keep(index.clamp(min=0))
        part.positions[empty] = EMPTY
        if self.scores:
            self.scores[store] = self.scores[store].gather(-1, index.clamp(min=0)).masked_fill(empty, -torch.inf)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the recent queries."""
        return 0 if self.recent is None else self.recent.numel() * self.recent.element_size()

    def reset(self) -> None:
        self.seen = 0
        self._clear()

    def select(self, index: Tensor) -> None:
        super().select(index)
        self._rows(lambda x: x.index_select(0, index.to(x.device, torch.long)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.parts:
            self.select(torch.arange(self.budget.shape[0]).repeat_interleave(repeats))

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.parts:
            return
        self.budget, self.past, self.held = change(self.budget), change(self.past), change(self.held)
        self.recent = None if self.recent is None else change(self.recent)
        self.measures = {name: change(values) for name, values in self.measures.items()}
        self.scores = [change(values) for values in self.scores]
