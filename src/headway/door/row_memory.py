"""What a stage remembers of one request from forward to forward, kept with the request's cache.

A host reorders, repeats and drops the rows of its cache (beam search, batch selection). What a stage learned about
those rows has to follow, so it lives on the cache object and is moved by the same calls. A forward without a cache
remembers nothing beyond itself.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.door.call import Forward
from headway.errors import ArgumentError

_ATTRIBUTE = "_headway_rows"
_FOLLOWED = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "reset", "crop")


class RowMemory:
    """Tensors (batch, …) by owner and name, beside one cache. Other values are kept as they are."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.owned: dict[Any, dict[str, Any]] = {}
        self._native = {name: getattr(cache, name) for name in _FOLLOWED if hasattr(cache, name)}
        for name in self._native:
            setattr(cache, name, getattr(self, name))

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        self._native["reorder_cache"](beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        self._native["batch_select_indices"](indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._native["batch_repeat_interleave"](repeats)
        for values in self.owned.values():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = value.repeat_interleave(repeats, 0)

    def reset(self) -> None:
        self._native["reset"]()
        self.owned.clear()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and any(self.owned.values()):
            raise ArgumentError(
                f"cache: got a request to take back {abs(tokens_to_remove)} tokens, expected none: what the attached "
                "method learned from them cannot be unlearned. Generate without assisted decoding."
            )
        self._native["crop"](tokens_to_remove)

    def _select(self, index: Int[Tensor, " rows"]) -> None:
        for values in self.owned.values():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = value.index_select(0, index.to(value.device, torch.long))


def remembered(forward: Forward, owner: Any) -> dict[str, Any]:
    """The values that `owner` keeps for the request of this forward, by name; empty at its beginning.

    Tensors whose first dimension is the batch follow the rows of the cache."""
    if forward.cache is None:
        return forward.scratch.setdefault(("remembered", owner), {})
    memory = getattr(forward.cache, _ATTRIBUTE, None)
    if memory is None:
        memory = RowMemory(forward.cache)
        setattr(forward.cache, _ATTRIBUTE, memory)
    return memory.owned.setdefault(owner, {})
