"""Calls that run side by side, kept a few at a time: what an interrupt costs is the stage it falls into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from headway.evidence.parallel import Together
from headway.evidence.recipe import Context


def in_stages(
    context: Context, name: str, together: Together, function: Callable[..., Any], calls: Sequence[Any], *, size: int
) -> list[Any]:
    """`function(*call)` for every call, in order, `size` calls to a stage, with a bar over the stages."""
    found: list[Any] = []
    starts = range(0, len(calls), size)
    for start in context.track(starts, name, len(starts)):
        found += context.stage(f"{name}-{start // size}", partial(together, function, calls[start : start + size]))
    return found
