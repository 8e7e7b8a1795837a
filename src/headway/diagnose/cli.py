"""The commands under `headway diagnose`. Each is declared beside its verb with light imports; the work is imported when
a command runs."""

from __future__ import annotations

import typer

from headway.diagnose.anchors.cli import anchors

app = typer.Typer(
    help="Ask a model one question about its attention, and get numbers with controls.", no_args_is_help=True
)

app.command("anchors")(anchors)
