"""Independent pieces of work in processes of one thread each.

Small models gain nothing from a second thread: their products are too short, and threads that wait for each other cost
more than they save, most of all on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

import torch

from headway.errors import ArgumentError


class Together(Protocol):
    """`function(*call)` for every call, in their order."""

    def __call__(self, function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> list[Any]: ...


def side_by_side(function: Callable[..., Any], calls: Sequence[Sequence[Any]], *, workers: int) -> list[Any]:
    """`function(*call)` for every call, in their order, with so many processes; in this one where `workers` is 1.

    Function and arguments must be importable and picklable by value; the first error is raised, and an interrupt ends
    the processes."""
    with processes(workers if len(calls) > 1 else min(workers, 1)) as together:
        return together(function, calls)


@contextmanager
def processes(workers: int) -> Iterator[Together]:
    """`side_by_side` for several stages: its processes start with the first call and end with the block, so that a
    stage of a few seconds does not pay for new ones."""
    if workers < 1:
        raise ArgumentError(f"workers: got {workers}, expected at least 1.")
    if workers == 1:
        yield lambda function, calls: [function(*call) for call in calls]
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def together(function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> list[Any]:
            jobs = [pool.submit(function, *call) for call in calls]
            return [job.result() for job in jobs]

        try:
            yield together
        except BaseException:
            children = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in children:
                process.terminate()
            raise
