"""A bar on standard error while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headway.progress import Tell, silent


@contextmanager
def telling(progress: bool | Tell) -> Iterator[Tell]:
    """The function that is told after each step: the given one, a bar for True (none where standard error is no
    terminal), or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
