"""What commands that write a page have in common: a progress bar, and a check of the folder before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from headway.errors import ArgumentError, HeadwayError
from headway.files import write_atomically

#: Called with (what, done, total).
Tell = Callable[[str, int, int], None]


def check_folder(out: Path) -> None:
    """Refuses an output folder that cannot be made or written, before any work is done."""
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out: got {out}, which is a file; expected a folder. Name another with --out.")
    try:
        write_atomically(out / ".headway", "").unlink()
    except OSError as error:
        raise HeadwayError(
            f"--out: {out} cannot be written ({error.strerror}). Name another folder with --out."
        ) from None


@contextmanager
def progress_bar(console: Console) -> Iterator[Tell]:
    """A bar on standard error whose label is what is being done; silent where standard error is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=1)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield tell
