"""What `headway diagnose anchors` found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headway.files import write_atomically
from headway.pages.plain import read_json, to_json, with_nan

FORMAT = 1


@dataclass(kw_only=True)
class TraceAnchors:
    """One trace. `matrix[i][j]` is the effect of hiding sentence j on sentence i beyond the average on i (nats of the
    logarithm), `effect[j]` the mean over later sentences, `edges` (source, target, weight). `receiver` are receiver
    scores with `receiver_null`, the middle 95 % of what other sentences draw at that place. `importance` has one entry
    per sentence that rollouts were drawn for. NaN where there is no value."""

    name: str
    prompt: str
    sentences: list[str]
    ranges: list[list[int]]
    categories: list[str]
    tokens: list[int]
    matrix: list[list[float]]
    effect: list[float]
    edges: list[list[float]]
    forwards: float
    receiver: list[float] = field(default_factory=list)
    receiver_null: list[list[float]] = field(default_factory=list)
    importance: list[dict[str, Any]] = field(default_factory=list)
    answer: str | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TraceAnchors:
        numbers = ("matrix", "effect", "receiver", "receiver_null")
        return cls(**{**data, **{name: with_nan(data[name]) for name in numbers}})


@dataclass(kw_only=True)
class Anchors:
    """A finished diagnosis. `kurtosis[row][head]` over traces (NaN where undefined), `layers` the layer number of each
    row, `receivers` (layer, head, kurtosis); `reliability`, `agreement` and `categories` are measurements as
    dictionaries."""

    model: dict[str, Any]
    run: dict[str, Any]
    traces: list[TraceAnchors]
    kurtosis: list[list[float]] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    receivers: list[list[float]] = field(default_factory=list)
    reliability: dict[str, Any] | None = None
    ablation: dict[str, Any] | None = None
    agreement: list[dict[str, Any]] = field(default_factory=list)
    concordance: float = float("nan")
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Anchors:
        """The result that `to_json` wrote."""
        data = read_json(text, wanted=FORMAT, writer="Anchors.to_json", command="headway diagnose anchors")
        data["traces"] = [TraceAnchors.from_dict(t) for t in data["traces"]]
        return cls(**{**data, **{name: with_nan(data[name]) for name in ("kurtosis", "receivers", "concordance")}})

    def to_html(self) -> str:
        """The page, self-contained."""
        from headway.diagnose.anchors.report import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html) or the numbers (.json)."""
        path = Path(path)
        return write_atomically(path, self.to_json() if path.suffix == ".json" else self.to_html())
