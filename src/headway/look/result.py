"""What `look` found, as plain data: every number of the report, in one dataclass that survives a round trip to JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.errors import missing_extra, unknown
from headway.files import write_atomically
from headway.pages.plain import read_json, to_json, with_nan

if TYPE_CHECKING:
    import pandas

FORMAT = 1
FAMILIES = ("sinks", "secondary", "patterns", "roles")


@dataclass
class HeadMetric:
    """One number per layer and head. `values[layer][head]` is NaN where the metric has no meaning at that site.

    `low` and `high` are the 95 % interval where the numbers are estimates from sampled rows, else None. `scale` is
    "sequential" (0 upward) or "diverging" (around zero)."""

    name: str
    label: str
    family: str
    unit: str
    description: str
    values: list[list[float]]
    low: list[list[float]] | None = None
    high: list[list[float]] | None = None
    scale: str = "sequential"

    def array(self) -> np.ndarray:
        return np.asarray(self.values, dtype=float)


@dataclass
class LayerSeries:
    """One number per layer for a line plot. `layers` are the layer indices that `values` belong to; series that share a
    `chart` are drawn in one plot."""

    name: str
    label: str
    chart: str
    unit: str
    layers: list[int]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass
class Labels:
    """One word per layer and head (a pattern class), with what each word means."""

    name: str
    label: str
    values: list[list[str]]
    meaning: dict[str, str]


@dataclass
class DetailWindow:
    """A square of a head's map at full resolution: `size` rows and columns from (`row`, `column`), 8-bit weights."""

    row: int
    column: int
    size: int
    pixels: str


@dataclass
class HeadMap:
    """One head's attention map, down-sampled to `side` × `side` by the maximum over each cell, as base64 of unsigned
    bytes, row-major; byte = round(255 · sqrt(weight)). `pairs` are (query position, key position, weight) of the
    strongest pairs off sink and diagonal, `keys` are (key position, received mass per visible query)."""

    layer: int
    head: int
    side: int
    rows: int
    columns: int
    pixels: str
    windows: list[DetailWindow] = field(default_factory=list)
    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    keys: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Look:
    """Everything that one look at one model found.

    `model` names the host (name, class, layers, heads, kv_heads, head_dim, positions, dtype, parameters); `run` says
    how it was measured (tokens, text, seed, seconds, versions, threads, sampled rows or "all").
    `received[layer][token]` is the mean over heads of the mass that a token receives per query that can see it.
    `secondary`, `patterns` and `sinks` hold what their analyses return as JSON-ready dictionaries. `findings` are the
    summary sentences, `warnings` what the reader must know before trusting a number."""

    model: dict[str, Any]
    run: dict[str, Any]
    tokens: list[str]
    heads: list[HeadMetric]
    layers: list[LayerSeries]
    labels: list[Labels]
    received: list[list[float]]
    sinks: dict[str, Any]
    secondary: dict[str, Any]
    patterns: dict[str, Any]
    roles: dict[str, Any]
    maps: list[HeadMap]
    findings: list[str]
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    def metric(self, name: str) -> HeadMetric:
        """The head metric called `name`; an unknown name raises and lists the valid ones."""
        for metric in self.heads:
            if metric.name == name:
                return metric
        raise unknown("metric", name, [m.name for m in self.heads])

    def to_json(self) -> str:
        """JSON text; NaN and infinity become null."""
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Look:
        """The Look that `to_json` wrote. Raises ArgumentError when the text is something else."""
        data = read_json(text, wanted=FORMAT, writer="Look.to_json", command="headway look")
        data["heads"] = [HeadMetric(**_with_nan(m, "values", "low", "high")) for m in data["heads"]]
        data["layers"] = [LayerSeries(**_with_nan(s, "values", "low", "high")) for s in data["layers"]]
        data["labels"] = [Labels(**item) for item in data["labels"]]
        data["received"] = with_nan(data["received"])
        data["maps"] = [
            HeadMap(
                **{
                    **item,
                    "windows": [DetailWindow(**w) for w in item["windows"]],
                    "pairs": [(int(q), int(k), float(w)) for q, k, w in item["pairs"]],
                    "keys": [(int(k), float(w)) for k, w in item["keys"]],
                }
            )
            for item in data["maps"]
        ]
        return cls(**data)

    def to_frame(self) -> pandas.DataFrame:
        """A row per layer and head, a column per metric and label (needs pandas)."""
        try:
            import pandas as pd
        except ImportError:
            raise missing_extra("pandas", "frames", "Look.to_frame") from None
        shape = np.asarray(self.heads[0].values).shape
        layer, head = np.indices(shape)
        columns: dict[str, Any] = {"layer": layer.ravel(), "head": head.ravel()}
        columns |= {m.name: m.array().ravel() for m in self.heads}
        columns |= {item.name: np.asarray(item.values, dtype=object).ravel() for item in self.labels}
        return pd.DataFrame(columns)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained HTML page; written to `path` as well when one is given (never half)."""
        from headway.look.report import render

        page = render(self)
        if path is not None:
            write_atomically(path, page)
        return page


def _with_nan(item: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: (with_nan(v) if k in names and v is not None else v) for k, v in item.items()}
