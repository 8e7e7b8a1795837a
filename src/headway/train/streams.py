"""Streams of batches that know where they are: what a resumed run reads next is what it would have read.

A `Stream` makes batch number `index` from the index alone, so its whole state is one number. Any other iterable works
too: its used batches are read again and dropped on resume, which is exact when it yields the same batches each time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from headway.errors import ArgumentError

#: Token ids (batch, tokens), or named tensors with the batch first: keywords of the model, with `labels`.
Batch = Tensor | Mapping[str, Tensor]


@runtime_checkable
class Placed(Protocol):
    """An iterator of batches whose place can be stored (plain values and tensors) and found again."""

    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Stream(ABC):
    """Batches by number, without end unless `batch` raises StopIteration."""

    position: int = 0

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """Batch number `index`; a function of the index alone."""

    def made_of(self) -> dict[str, Any]:
        """What a batch depends on beside its number, in plain values: a run is resumed on the same alone."""
        return {}

    def held_out(self, count: int) -> list[Batch]:
        """`count` batches that training never meets, for validation: those with negative numbers."""
        return [self.batch(-1 - i) for i in range(count)]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])


class Drawn(Stream):
    """Batches made by a function of the index."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make

    def batch(self, index: int) -> Batch:
        return self.make(index)


class Counted:
    """Any iterable; its place is how many batches were taken."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.taken = batches, 0
        self._iterator: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self.batches)
        batch = next(self._iterator)
        self.taken += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        while self.taken < int(state["taken"]):
            try:
                next(self)
            except StopIteration:
                raise ArgumentError(
                    f"batches: got {self.taken}, expected at least {state['taken']} (so many were read before the run "
                    "was interrupted). Give the same batches from their start, or a Stream."
                ) from None


def placed(batches: Iterable[Batch] | Callable[[int], Batch]) -> Placed:
    """The batches as a stream with a place: as they are when they have one, by number for a function, else counted."""
    if isinstance(batches, Placed):
        return batches
    if callable(batches):
        return Drawn(batches)
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping):
        raise ArgumentError(
            f"batches: got {type(batches).__name__}, expected an iterable of batches, a Stream, or a function of the "
            "batch's number. One batch for all steps: [batch] * steps."
        )
    return Counted(batches)
