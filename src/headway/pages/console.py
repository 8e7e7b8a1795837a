"""What commands that write a page have in common: a check of the folder before any work, a progress bar, what an
interrupt says, and how a result is handed over."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from headway.errors import ArgumentError, HeadwayError
from headway.files import write_atomically
from headway.progress import Tell


class Result(Protocol):
    """What a verb hands over: sentences for the terminal, a page, and its numbers."""

    findings: list[str]
    warnings: list[str]

    def to_html(self) -> str: ...

    def to_json(self) -> str: ...


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


@contextmanager
def going_on(kept: Path, what: str = "parts") -> Iterator[None]:
    """Tells whoever interrupts the work inside that the same command goes on from what is `kept`."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"Finished {what} are kept in {kept}: the same command goes on from them.")
        raise


def deliver(found: Result, out: Path, name: str, *, as_json: bool, places: Sequence[str] = ()) -> None:
    """Writes `<name>.html` and `<name>.json` into `out` and prints the findings and warnings, `places` (lines on what
    else was written) and where the page is; or, `as_json`, the numbers and nothing else."""
    page = write_atomically(out / f"{name}.html", found.to_html())
    data = write_atomically(out / f"{name}.json", found.to_json())
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
        return
    printed = Console()
    for sentence in found.findings:
        printed.print(f"• {sentence}", soft_wrap=True, highlight=False, markup=False)
    for sentence in found.warnings:
        printed.print(f"! {sentence}", style="yellow", soft_wrap=True, highlight=False, markup=False)
    printed.print()
    for line in places:
        printed.print(line, soft_wrap=True, highlight=False, markup=False)
    printed.print(f"Page: [bold]{page}[/] ({page.stat().st_size / 1e6:.1f} MB), numbers: {data}", soft_wrap=True)
