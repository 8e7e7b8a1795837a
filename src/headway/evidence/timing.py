"""Times of calls, and what they need beside a clock."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

from headway.evidence.recipe import Context

#: Numbers of two settings of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets glibc's allocator keep what is freed, for the rest of the process: the steady state of a long run.

    By default it takes tensors above 32 MB from the system at every call, and zeroing their pages can cost more than a
    kernel that is linear in the length. Does nothing where there is no glibc."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def milliseconds(context: Context, calls: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of every call, `repeats` times, in turn so that drift of the machine hits all alike, in the
    steady state of the allocator."""
    keep_freed_memory()
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in context.track(range(repeats), "repeats"):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(1000 * (time.perf_counter() - start))
    return times
