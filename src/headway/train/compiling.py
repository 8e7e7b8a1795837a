"""torch.compile during training, asked for and reported: what was compiled, where it broke, how long step one took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from headway.errors import HeadwayError


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What torch.compile made of a run. breaks: reasons for which a graph was cut, with how often. seconds: of the
    first step, compiling included."""

    graphs: int
    breaks: dict[str, int]
    seconds: float


class Compiler:
    """Wraps a model with torch.compile when active. A failure raises: nothing runs uncompiled in silence."""

    def __init__(self, *, active: bool) -> None:
        self.active = active
        self._seconds = 0.0
        self._before: tuple[int, dict[str, int]] = _counts() if active else (0, {})

    def wrap(self, model: nn.Module) -> nn.Module:
        return torch.compile(model) if self.active else model  # type: ignore[return-value]

    @contextmanager
    def reporting(self, *, first: bool) -> Iterator[None]:
        """Around a step: times the first one, and names what torch.compile could not do."""
        if not self.active:
            yield
            return
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch")):
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise HeadwayError(f"compile: torch.compile failed ({line}). Train without compile.") from error
            raise
        if first:
            self._seconds = time.perf_counter() - began

    def found(self) -> Compiled | None:
        if not self.active:
            return None
        graphs, breaks = _counts()
        new = {reason: count - self._before[1].get(reason, 0) for reason, count in breaks.items()}
        return Compiled(
            graphs=graphs - self._before[0],
            breaks={reason: count for reason, count in new.items() if count > 0},
            seconds=self._seconds,
        )


def _counts() -> tuple[int, dict[str, int]]:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), {str(k): int(v) for k, v in counters["graph_break"].items()}
