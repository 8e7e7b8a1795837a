"""One layer of a stream: the sinks as they were first rotated, and a window in a buffer whose front is free."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from headway.door.caches import PolicyLayer, TokenStore
from headway.kernels.rope import Layout, rotate

#: Room behind a full window, as a share of it: the window moves to the front of its buffer once per so many steps.
SLACK = 0.5
LEAST_SLACK = 64


class StreamingLayer(PolicyLayer):
    """Buffer slots: [free | place for the sinks | window | room]. `first` is the column of each row's first token;
    `reach` the largest distance of a window key, shortened at the first read where the host's own window is shorter;
    `turned` counts the keys of one sequence and head that were rotated so far."""

    def __init__(self, sinks: int, reach: int, frequencies: Tensor | None, layout: Layout) -> None:
        super().__init__()
        self.sinks, self.reach = sinks, reach
        self.frequencies, self.layout = frequencies, layout
        self.first = torch.zeros(1, dtype=torch.long)
        self.sink_store = TokenStore()
        self._clear()

    def _clear(self) -> None:
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self.start = self.end = self.sinks
        self.oldest = 0
        self.turned = 0

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        return (self.sink_store,)

    @property
    def window_length(self) -> int:
        return self.end - self.start

    @property
    def stored(self) -> int:
        """Tokens held: sinks, and window tokens that are no sinks."""
        tokens = self.seen - int(self.first.min())
        return min(self.sinks, tokens) + min(self.window_length, max(tokens - self.sinks, 0))

    @property
    def contiguous(self) -> bool:
        """Whether the buffer holds window tokens alone, so that a step may read it with the sinks in front."""
        return self.oldest >= int(self.first.max()) + self.sinks

    def file(self, key: Tensor, value: Tensor, positions: Int[Tensor, " new"]) -> None:
        new = key.shape[2]
        self._make_room(key, value)
        assert self._key is not None
        assert self._value is not None
        if self.end == self.start:
            self.oldest = int(positions[0])
        self._key[:, :, self.end : self.end + new] = key
        self._value[:, :, self.end : self.end + new] = value
        self.end += new
        self._take_sinks(key, value, int(positions[0]))

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        new, held = key.shape[2], self.window_length
        if self._key is not None and self._value is not None and self.end + new <= self._key.shape[2]:
            return
        least = self.sinks + held + new
        usual = self.sinks + self.reach + 1 + max(int(self.reach * SLACK), LEAST_SLACK)
        size = max(least, min(usual, least + max(least // 2, LEAST_SLACK)))
        buffers = []
        for old, like in ((self._key, key), (self._value, value)):
            fits = old is not None and old.shape[2] >= size
            target = old if fits and old is not None else like.new_empty(*like.shape[:2], size, like.shape[3])
            if old is not None and held:
                target[:, :, self.sinks : self.sinks + held] = old[:, :, self.start : self.end].clone()
            buffers.append(target)
        self._key, self._value = buffers
        self.start, self.end = self.sinks, self.sinks + held

    def _take_sinks(self, key: Tensor, value: Tensor, start: int) -> None:
        """Copies the first real tokens of each row as they pass."""
        have = self.sink_store.length
        if not self.sinks or (have == self.sinks and start >= int(self.first.max()) + self.sinks):
            return
        batch, heads = key.shape[:2]
        if have == 0:
            blank_key = key.new_zeros(batch, heads, self.sinks, key.shape[3])
            blank_value = value.new_zeros(batch, heads, self.sinks, value.shape[3])
            self.sink_store.append(blank_key, blank_value, torch.full((batch, self.sinks), -1, device=key.device))
        for row, first in enumerate(self.first.expand(batch).tolist()):
            low = max(start, first)
            high = min(start + key.shape[2], first + self.sinks)
            if low < high:
                into, source = slice(low - first, high - first), slice(low - start, high - start)
                self.sink_store.key[row, :, into] = key[row, :, source]
                self.sink_store.value[row, :, into] = value[row, :, source]
                self.sink_store.positions[row, into] = torch.arange(low - first, high - first, device=key.device)

    def sink_keys(self) -> tuple[Tensor, Tensor, Int[Tensor, "batch sinks"]]:
        """Keys, values and places of the sinks; place −1 where a sink has not come yet."""
        if self.sink_store.empty:
            key, value, _ = self.window_keys()
            none = torch.empty(key.shape[0], 0, dtype=torch.long, device=key.device)
            return key[:, :, :0], value[:, :, :0], none
        return self.sink_store.key, self.sink_store.value, self.sink_store.positions

    def window_keys(self) -> tuple[Tensor, Tensor, Int[Tensor, "batch window"]]:
        """Keys, values and places (in the text without padding, negative for padding) of the buffer."""
        assert self._key is not None
        assert self._value is not None
        columns = torch.arange(self.oldest, self.oldest + self.window_length)
        places = columns[None] - self.first.expand(self._key.shape[0])[:, None]
        return self._key[:, :, self.start : self.end], self._value[:, :, self.start : self.end], places

    def with_sinks(self, shift: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The window with the sinks, moved on by `shift` positions, in front of it."""
        assert self._key is not None
        assert self._value is not None
        front = self.start - self.sinks
        if self.sinks:
            key = self.sink_store.key
            if self.frequencies is not None and bool(shift.any()):
                by = shift.to(key.device).expand(key.shape[0])[:, None].expand(-1, self.sinks)
                key = rotate(key, by, self.frequencies, self.layout)
                self.turned += self.sinks
            self._key[:, :, front : self.start] = key
            self._value[:, :, front : self.start] = self.sink_store.value
        return self._key[:, :, front : self.end], self._value[:, :, front : self.end]

    def evict(self, keep: int | None = None) -> None:
        """Leaves the last `keep` tokens in the window (by default what the next step may see), no sinks among them."""
        keep = self.reach if keep is None else keep
        gone = max(self.window_length - keep, 0)
        past_sinks = int(self.first.max()) + self.sinks - self.oldest
        gone = (
            min(max(gone, past_sinks), self.window_length) if int(self.first.max()) == int(self.first.min()) else gone
        )
        self.start += gone
        self.oldest += gone
        usual = self.sinks + self.reach + 1 + max(int(self.reach * SLACK), LEAST_SLACK)
        if self._key is not None and self._value is not None and self._key.shape[2] > usual + LEAST_SLACK:
            held = self.window_length
            for name in ("_key", "_value"):
                old = getattr(self, name)
                fresh = old.new_empty(*old.shape[:2], max(usual, self.sinks + held), old.shape[3])
                fresh[:, :, self.sinks : self.sinks + held] = old[:, :, self.start : self.end]
                setattr(self, name, fresh)
            self.start, self.end = self.sinks, self.sinks + held

    def turn_back(self, positions: int) -> None:
        """Rotates the window's keys to stand `positions` earlier."""
        if self._key is None or self.frequencies is None:
            return
        window = self._key[:, :, self.start : self.end]
        by = torch.full((self.window_length,), -positions, device=window.device)
        self.turned += self.window_length
        self._key[:, :, self.start : self.end] = rotate(window, by, self.frequencies, self.layout)

    def held(self) -> Int[Tensor, "batch tokens"]:
        """Places in the text of what is held, padding as negative numbers."""
        places = self.window_keys()[2]
        return torch.cat([self.sink_keys()[2].to(places.device), places], 1)

    @property
    def window_bytes(self) -> int:
        if self._key is None or self._value is None:
            return 0
        per_token = sum(x[:, :, 0].numel() * x.element_size() for x in (self._key, self._value))
        return per_token * self.window_length

    def reset(self) -> None:
        super().reset()
        self._clear()

    def select(self, index: Tensor) -> None:
        super().select(index)
        if self._key is not None and self._value is not None:
            at = index.to(self._key.device)
            self._key, self._value = self._key.index_select(0, at), self._value.index_select(0, at)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._key is not None:
            self.select(torch.arange(self._key.shape[0]).repeat_interleave(repeats))
