"""The one cache of these models: the state of every layer's mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

from headway.door.mixer import Mixer, State
from headway.errors import ArgumentError


class HeadwayCache(Cache):
    """States by layer, moved along by beam search and batch selection. `bytes` is what they take."""

    def __init__(self, mixers: list[Mixer], batch: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.mixers = mixers
        self.states = [mixer.init_state(batch, device=device, dtype=dtype) for mixer in mixers]
        self._start = (batch, device, dtype)
        self.length = 0

    @property
    def bytes(self) -> int:
        return sum(state.bytes for state in self.states)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return all(mixer.can_crop for mixer in self.mixers)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.states)

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def batch_size(self) -> int:
        return self.states[0].batch

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"HeadwayCache({len(self.states)} layers, {self.length} tokens, {self.bytes} bytes)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise ArgumentError("past_key_values: got keys and values for a cache of mixer states. Use a DynamicCache.")

    def reset(self) -> None:
        batch, device, dtype = self._start
        self.states = [mixer.init_state(batch, device=device, dtype=dtype) for mixer in self.mixers]
        self.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each(lambda state: state.reorder(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda state: state.reorder(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda state: state.repeat(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back. Raises ArgumentError naming the mixer that cannot."""
        count = abs(tokens_to_remove)
        self.states = [mixer.crop(state, count) for mixer, state in zip(self.mixers, self.states, strict=True)]
        self.length -= count

    def _each(self, change: Callable[[State], State]) -> None:
        self.states = [change(state) for state in self.states]
