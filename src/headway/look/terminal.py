"""The headline of a Look in the terminal: the findings, the strongest heads of each measure, and one head grid.

Colours run from the usual dark background towards light, as in the report's dark theme; without colours the grid falls
back to five shades of block characters."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from headway.look.result import HeadMetric, Look
from headway.pages.shell import visible

PLACES = ("First", "Second", "Third")
CELL = 2
LABEL_WIDTH = 5
SHADES = " ░▒▓█"
RAMP = ("#1f2030", "#29396c", "#215791", "#0076a1", "#0a93a7", "#1fb0a9", "#5ecdaa", "#a3e6a0", "#ecf999")
DIVERGING = ("#7dcffe", "#4790d8", "#325384", "#22242b", "#7f4726", "#d67b34", "#fec675")


def summarise(look: Look, console: Console, *, metric: str | None = None) -> None:
    """Prints the findings, the warnings, the strongest heads of each metric of the family "roles" (of every metric when
    there is none), and the head grid of `metric` (default: the first metric) where the console is wide enough.

    Raises ArgumentError when `metric` names none of the Look's metrics."""
    grid = look.metric(metric) if metric is not None else next(iter(look.heads), None)
    console.print(Text(visible(look.model.get("name", "model")), style="bold"))
    for sentence in look.findings:
        console.print(Padding(Text(f"• {visible(sentence)}"), (0, 0, 0, 2)))
    for sentence in look.warnings:
        console.print(Padding(Text(f"! {visible(sentence)}", style="yellow"), (0, 0, 0, 2)))
    if look.heads:
        console.print()
        console.print(top_heads(look))
    if grid is not None and fits(grid, console.width):
        console.print()
        console.print(head_grid(grid, colours=console.color_system is not None))


def top_heads(look: Look) -> Table:
    """A table with the three strongest heads of each role metric, strongest first; the largest in size where a metric
    is diverging."""
    roles = [metric for metric in look.heads if metric.family == "roles"] or look.heads
    table = Table(box=None, padding=(0, 2), header_style="bold", title_justify="left", title_style="")
    table.title = "  Strongest heads, each as layer.head and value"
    for heading in ("Measure", *PLACES):
        table.add_column(heading, no_wrap=heading in PLACES)
    for metric in roles:
        cells = [f"{layer}.{head} {value:.3g}" for layer, head, value in strongest(metric)]
        table.add_row(Text(visible(metric.label)), *(cells or ["not measured"]))
    return table


def strongest(metric: HeadMetric, count: int = len(PLACES)) -> list[tuple[int, int, float]]:
    """The `count` highest (layer, head, value) of a metric, by size where it is diverging; NaN never counts."""
    values = metric.array()
    size = np.abs(values) if metric.scale == "diverging" else values
    order = np.argsort(np.where(np.isfinite(size), -size, np.inf), axis=None, kind="stable")
    order = order[: min(count, int(np.isfinite(size).sum()))]
    places = (np.unravel_index(int(index), values.shape) for index in order)
    return [(int(layer), int(head), float(values[layer, head])) for layer, head in places]


def fits(metric: HeadMetric, width: int) -> bool:
    """Whether the head grid of `metric` fits into `width` columns."""
    return len(metric.values) * CELL + LABEL_WIDTH <= width


def head_grid(metric: HeadMetric, *, colours: bool) -> Text:
    """The values of a metric as coloured (or shaded) cells: layers from left to right, heads from top to bottom."""
    values = metric.array()
    layers, heads = values.shape
    finite = values[np.isfinite(values)]
    low = min(0.0, float(finite.min())) if finite.size else 0.0
    high = float(finite.max()) if finite.size else 0.0
    if metric.scale == "diverging":
        high = max(abs(low), abs(high))
        low = -high
    text = Text(no_wrap=True)
    text.append(f"{visible(metric.label)}", style="bold")
    text.append(f"  {low:.3g} to {high:.3g}{' ' + metric.unit if metric.unit else ''}\n", style="dim")
    for head in range(heads):
        text.append(f"{head:>{LABEL_WIDTH - 1}} ", style="dim")
        for layer in range(layers):
            _cell(text, values[layer, head], low, high, metric.scale, colours)
        text.append("\n")
    text.append(" " * LABEL_WIDTH + _layer_axis(layers), style="dim")
    return text


def _cell(text: Text, value: float, low: float, high: float, scale: str, colours: bool) -> None:
    if not np.isfinite(value):
        text.append("·".ljust(CELL), style="dim")
        return
    share = (value - low) / (high - low) if high > low else 0.0
    if not colours:
        text.append(SHADES[round(share * (len(SHADES) - 1))] * CELL)
        return
    ramp = DIVERGING if scale == "diverging" else RAMP
    text.append(" " * CELL, style=Style(bgcolor=ramp[round(share * (len(ramp) - 1))]))


def _layer_axis(layers: int) -> str:
    """Layer numbers under every fifth cell."""
    return "".join(f"{layer:<{5 * CELL}}" for layer in range(0, layers, 5))[: layers * CELL].rstrip()
