"""The commands under `headway diagnose`. Each is declared beside its verb with light imports; the work is imported when
a command runs."""

from __future__ import annotations

import typer

from headway.diagnose.agreement.cli import agreement
from headway.diagnose.anchors.cli import anchors
from headway.diagnose.concepts.cli import concepts
from headway.diagnose.position.cli import position
from headway.diagnose.roles.cli import roles

app = typer.Typer(
    help="Ask a model one question about its attention, and get numbers with controls.", no_args_is_help=True
)

app.command("agreement")(agreement)
app.command("anchors")(anchors)
app.command("concepts")(concepts)
app.command("position")(position)
app.command("roles")(roles)
