"""Independent pieces of work in processes of one thread each.

Small models gain nothing from a second thread: their products are too short, and threads that wait for each other cost
more than they save, most of all on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from headway.errors import ArgumentError


def side_by_side(function: Callable[..., Any], calls: Sequence[Sequence[Any]], *, workers: int) -> list[Any]:
    """`function(*call)` for every call, in their order, with so many processes; in this one where `workers` is 1.

    Function and arguments must be importable and picklable by value; the first error is raised, and an interrupt ends
    the processes."""
    if workers < 1:
        raise ArgumentError(f"workers: got {workers}, expected at least 1.")
    if workers == 1 or len(calls) < 2:
        return [function(*call) for call in calls]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(function, *call) for call in calls]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
