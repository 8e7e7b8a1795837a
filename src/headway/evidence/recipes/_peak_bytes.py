"""How much memory tensors hold at most, counted as they are made and go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time, in `highest`. Views of tensors in `beside`, such as a
    model's weights, do not count."""

    def __init__(self, beside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.beside = {tensor.untyped_storage().data_ptr() for tensor in beside}
        self.held: dict[int, int] = {}
        self.highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_iter(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                place = storage.data_ptr()
                if place and place not in self.held and place not in self.beside:
                    self.held[place] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, place, None)
        self.highest = max(self.highest, sum(self.held.values()))
        return result
