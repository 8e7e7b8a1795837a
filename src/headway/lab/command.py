"""What `headway lab sinks` does: read the arms, train and measure what is not there yet, write the page, print the
table."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headway.errors import ArgumentError
from headway.files import write_atomically
from headway.hosts import default_text, read_text
from headway.lab.arms import Experiment, load_experiment, shipped_experiments
from headway.lab.report import number
from headway.lab.result import SinkLab
from headway.lab.sinks import run_sinks
from headway.lab.table import Column, columns, rows
from headway.lab.training import EVALUATION
from headway.pages.console import check_folder, going_on, progress_bar

#: Characters of a cell at least, and those of its border.
LEAST_WIDTH, BORDER = 7, 3


def sinks(
    arms: str | None,
    *,
    text: str | None = None,
    encoding: str = "utf-8",
    steps: int | None = None,
    seeds: str | None = None,
    evaluation: int = EVALUATION,
    out: Path = Path("lab-out"),
    as_json: bool = False,
) -> None:
    """The command. `arms` is a YAML file or the name of a shipped experiment; None lists those. `steps` and `seeds`
    (numbers with commas) replace those of the file. Finished arms are kept in `out` as they come; the page and its
    numbers are written last."""
    if arms is None:
        listing()
        return
    experiment = _with(load_experiment(arms), steps, seeds)
    given = default_text() if text is None else read_text(text, encoding=encoding)
    check_folder(out)
    console = Console(stderr=True)
    with going_on(out / "arms", "arms"), progress_bar(console) as tell:
        found = run_sinks(experiment, text=given, out=out, evaluation=evaluation, progress=tell)
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
        return
    page = write_atomically(out / "sinks.html", found.to_html())
    data = write_atomically(out / "sinks.json", found.to_json())
    printed = Console()
    printed.print(table_of(found, width=printed.width))
    for sentence in found.findings:
        printed.print(f"• {sentence}", soft_wrap=True)
    for sentence in found.warnings:
        printed.print(f"[yellow]! {sentence}[/]", soft_wrap=True)
    printed.print(f"\nPage: [bold]{page}[/] ({page.stat().st_size / 1e6:.1f} MB), numbers: {data}", soft_wrap=True)


def listing() -> None:
    """Prints the experiments that come with Headway."""
    table = Table("experiment", "what it asks", "arms")
    for name, about in shipped_experiments().items():
        table.add_row(name, about, str(len(load_experiment(name).arms)))
    Console().print(table)


def table_of(lab: SinkLab, *, width: int = 200) -> Table:
    """The comparison table for a terminal of `width` characters: as many columns as fit, in their order."""
    used = max(len(arm) for arm in lab.arms) + BORDER
    shown: list[Column] = []
    for column in columns(lab):
        used += max(len(column.words), LEAST_WIDTH) + BORDER
        if used <= width or len(shown) < 2:
            shown.append(column)
    table = Table("arm", title=f"{lab.name}: {len(lab.seeds)} seeds" if len(lab.seeds) > 1 else lab.name)
    for column in shown:
        table.add_column(column.words, justify="right", no_wrap=True)
    for arm, cells in rows(lab):
        table.add_row(arm, *(number(cells[c.name].value, c.unit) for c in shown))
    return table


def _with(experiment: Experiment, steps: int | None, seeds: str | None) -> Experiment:
    if steps is not None:
        experiment = replace(experiment, arms=tuple(replace(arm, steps=steps) for arm in experiment.arms))
    if seeds is not None:
        try:
            chosen = tuple(int(part) for part in seeds.split(","))
        except ValueError:
            raise ArgumentError(f"--seeds: got {seeds!r}, expected numbers with commas, such as 0,1,2.") from None
        experiment = replace(experiment, seeds=chosen)
    return experiment
