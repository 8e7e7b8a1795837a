"""The report of `headway look`: what its page holds. The shell, with its policy and scripts, is `headway.pages`.

Received mass spans many decades, so it is packed as 16-bit codes on a log scale (see `pack_log`)."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError
from headway.look.result import FAMILIES, HeadMap, HeadMetric, Look
from headway.pages.plain import Exact, rounded
from headway.pages.shell import flat, model_parts, provenance, render_page

SCRIPTS = (
    "chosen.js",
    "facts.js",
    "heads.js",
    "layers.js",
    "tokens.js",
    "secondary.js",
    "patterns.js",
    "inspector.js",
    "main.js",
)
STYLES = ("look.css",)
FAMILY_TITLES = {"sinks": "Sinks", "secondary": "Secondary sinks", "patterns": "Patterns", "roles": "Roles"}
LOG_CODES = 65533
LOG_FLOOR = 1e-12


def render(look: Look) -> str:
    """The report as one self-contained HTML page, without any network access.

    Raises ArgumentError when parts of the Look contradict each other (a metric with another number of heads, a map
    whose bytes do not fill its side)."""
    _check(look)
    name = look.model.get("name", "model")
    return render_page(
        "headway.look",
        "report.html.j2",
        styles=STYLES,
        scripts=SCRIPTS,
        data=payload(look),
        verb="look",
        heading=name,
        title=f"{name}: what its attention heads do",
        subtitle=_subtitle(look),
        provenance=provenance(look.run),
        findings=look.findings,
        warnings=look.warnings,
        facts=[("Model", list(flat(look.model))), ("Run", list(flat(look.run)))],
        sections=_sections(look),
    )


def payload(look: Look) -> dict[str, Any]:
    """What the page's scripts read: the Look with numbers cut to four significant digits and received mass packed."""
    data = asdict(look)
    received = data.pop("received")
    for name in ("findings", "warnings", "format"):
        data.pop(name)
    layers, heads = _grid(look)
    data |= {
        "grid": {"layers": layers, "heads": heads},
        "families": [[name, FAMILY_TITLES[name]] for name in FAMILIES],
        "received": pack_log(np.asarray(received, dtype=float)) if received and look.tokens else None,
    }
    return rounded(data)


def pack_log(values: Float[np.ndarray, "rows columns"]) -> dict[str, Any]:
    """Numbers ≥ 0 as 16-bit codes on a log scale, base64, row-major, little-endian.

        code 0: not a number;  code 1: zero;  code c ≥ 2:  low · (high / low)^((c − 2) / 65533)

    What is below 1e-12 of the largest number counts as zero. The relative error of the rest is at most half a step,
    (high / low)^(1 / 131066) − 1: below 2.2e-4."""
    values = np.asarray(values, dtype=float)
    positive = np.isfinite(values) & (values > LOG_FLOOR * values.max(initial=0, where=np.isfinite(values)))
    low, high = (float(values[positive].min()), float(values[positive].max())) if positive.any() else (1.0, 1.0)
    codes = np.zeros(values.shape, dtype="<u2")
    codes[np.isfinite(values)] = 1
    span = math.log(high / low)
    if span > 0:
        codes[positive] = 2 + np.rint(np.log(values[positive] / low) / span * LOG_CODES)
    else:
        codes[positive] = 2
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "low": Exact(low),
        "high": Exact(high),
        "codes": base64.b64encode(codes.tobytes()).decode("ascii"),
    }


def _grid(look: Look) -> tuple[int, int]:
    """(layers, heads) of the head grids: the shape of the values, else what the model says, else none."""
    grids: list[Sequence[Sequence[object]]] = [metric.values for metric in look.heads]
    grids += [item.values for item in look.labels]
    for values in filter(None, grids):
        return len(values), len(values[0])
    return int(look.model.get("layers") or 0), int(look.model.get("heads") or 0)


def _check(look: Look) -> None:
    layers, heads = _grid(look)
    grids: list[tuple[str, Sequence[Sequence[object]]]] = [(m.name, grid) for m in look.heads for grid in _grids(m)]
    grids += [(item.name, item.values) for item in look.labels]
    for name, grid in grids:
        if len(grid) != layers or any(len(row) != heads for row in grid):
            got = f"{len(grid)} layers × {sorted({len(row) for row in grid})} heads"
            raise ArgumentError(f"{name}: got {got}, expected {layers} × {heads} as in the other metrics.")
    for series in look.layers:
        if len(series.layers) != len(series.values):
            raise ArgumentError(
                f"{series.name}: got {len(series.values)} values, expected one for each of {len(series.layers)} layers."
            )
    for row in look.received:
        if len(row) != len(look.tokens):
            raise ArgumentError(f"received: got a row of {len(row)} tokens, expected {len(look.tokens)}.")
    for item in look.maps:
        _check_map(item)


def _grids(metric: HeadMetric) -> list[list[list[float]]]:
    return [grid for grid in (metric.values, metric.low, metric.high) if grid is not None]


def _check_map(item: HeadMap) -> None:
    squares = [("map", item.side, item.pixels), *(("detail window", w.size, w.pixels) for w in item.windows)]
    for what, side, pixels in squares:
        size = len(base64.b64decode(pixels))
        if size != side * side:
            raise ArgumentError(
                f"{what} of layer {item.layer}, head {item.head}: got {size} bytes, expected {side} × {side}."
            )


def _sections(look: Look) -> list[tuple[str, str]]:
    candidates = (
        ("heads", "Heads", bool(look.heads or look.labels)),
        ("layers", "Layers", bool(look.layers)),
        ("tokens", "Tokens", bool(look.tokens)),
        ("secondary", "Secondary sinks", bool(look.secondary)),
        ("patterns", "Patterns", bool(look.patterns)),
        ("inspector", "Head inspector", bool(look.maps)),
        ("more", "More numbers", bool(look.sinks or look.roles)),
    )
    return [(name, title) for name, title, present in candidates if present]


def _subtitle(look: Look) -> str:
    tokens = look.run.get("tokens", len(look.tokens))
    return " · ".join(
        [*model_parts(look.model), f"{tokens:,} tokens" if isinstance(tokens, int) else f"{tokens} tokens"]
    )
