"""What `headway prove` and `headway evidence` print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headway.evidence.render import write_evidence
from headway.evidence.run import Run, project_root
from headway.evidence.run import prove as run_recipe

COLOURS = {"holds": "green", "fails": "red", "inconclusive": "yellow"}


def prove(slug: str, *, size: str, seed: int, record: bool, resume: Path | None, out: Path, as_json: bool) -> None:
    """Runs a recipe and prints a row per claim, or the whole result as JSON."""
    given: dict[str, Any] = {} if resume else {"size": size, "seed": seed}
    run = run_recipe(slug, record=record, resume=resume, out=out, show_progress=not as_json, **given)
    console = Console()
    if as_json:
        console.file.write(run.to_json())
        return
    console.print(as_table(run))
    console.print(f"{run.folder}/result.json" + (f", recorded as evidence/{slug}.json" if record else ""))


def as_table(run: Run) -> Table:
    """A run as a table: what the paper says, what was measured, the criterion, the verdict."""
    table = Table(
        "statement", "measured", "criterion", "verdict", title=f"{run.title} ({run.size}, {run.seconds:.0f} s)"
    )
    for claim in run.claims:
        verdict = str(claim.verdict)
        table.add_row(
            escape(claim.statement),
            str(claim.measured),
            escape(claim.criterion.text),
            f"[{COLOURS[verdict]}]{verdict}[/]",
        )
    return table


def write() -> None:
    """Renders the recorded runs and says where."""
    for path in write_evidence(project_root()):
        Console().print(f"wrote {path.name}")
