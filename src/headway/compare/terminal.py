"""A comparison in the terminal: the recommendation, one table, the warnings."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from headway.compare.report import headings, row
from headway.compare.result import Comparison
from headway.pages.shell import visible


def summarise(comparison: Comparison, console: Console) -> None:
    """Prints the findings, the table of points (dense first) and the warnings."""
    console.print(Text(visible(comparison.model.get("name", "model")), style="bold"))
    for sentence in comparison.findings:
        console.print(Padding(Text(f"• {visible(sentence)}"), (0, 0, 0, 2)))
    console.print()
    console.print(points_table(comparison))
    if comparison.warnings:
        console.print()
    for sentence in comparison.warnings:
        console.print(Padding(Text(f"! {visible(sentence)}", style="yellow"), (0, 0, 0, 2)))


def points_table(comparison: Comparison) -> Table:
    """One row per point; the recommended one is marked with an arrow."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("", no_wrap=True)
    for place, (words, note) in enumerate(headings(comparison)):
        head = Text(words.replace(", ", "\n") if place >= 2 else words)
        head.append(f"\n{note}" if place >= 2 and ("×" in note or "," in note) else "", style="dim")
        table.add_column(head, justify="left" if place < 2 else "right", no_wrap=place < 2, vertical="top")
    for point in comparison.points:
        shown = row(comparison, point)
        start = ("→" if shown["recommended"] else "", Text(visible(shown["method"])), shown["budget"])
        if shown["reason"]:
            table.add_row(*start, Text(shown["status"], style="yellow"))
            continue
        cells = [f"{value} ({note})" if "×" in note else value for value, note in shown["cells"]]
        table.add_row(*start, *cells, style="bold" if shown["recommended"] else None)
    return table
