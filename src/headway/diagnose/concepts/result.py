"""What `headway diagnose concepts` found, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headway.files import write_atomically
from headway.pages.plain import read_json, to_json, with_nan

FORMAT = 1


def mean_drops(equal: dict[str, Any] | None) -> tuple[float, float]:
    """The mean drops of both sets of an equal-count comparison over questions and draws; NaN without any."""
    rows = [] if equal is None else [pair for draws in equal["drops"].values() for pair in draws]
    if not rows:
        return math.nan, math.nan
    return sum(first for first, _ in rows) / len(rows), sum(second for _, second in rows) / len(rows)


@dataclass(kw_only=True)
class Effect:
    """One set of silenced heads. `questions` holds by question the accuracy left and the drop with its interval;
    `equal` the drops of as many heads of the set and of others of the same layers, by draw; `skew` the mean MaxSkew
    over neutral prompts."""

    label: str
    heads: list[list[int]]
    questions: dict[str, dict[str, Any]]
    equal: dict[str, Any] | None = None
    skew: dict[str, Any] | None = None

    def drop(self) -> float:
        """The mean drop over questions."""
        return float(sum(row["drop"][0] for row in self.questions.values()) / len(self.questions))


@dataclass(kw_only=True)
class Concepts:
    """A finished audit. `heads` has one row per described head, `shares` is CCS@K, `classes` counts heads by class,
    `concentrated` is the CCR (NaN without a high head). `base` holds the accuracies and skew with all heads, `effects`
    one entry per silenced set, `against` equally many high and low heads, `errors` those of the reconstructions."""

    model: dict[str, Any]
    run: dict[str, Any]
    heads: list[dict[str, Any]]
    shares: list[float]
    classes: dict[str, int]
    concentrated: float
    base: dict[str, Any]
    effects: list[Effect]
    errors: dict[str, float]
    against: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    def effect(self, label: str) -> Effect | None:
        return next((e for e in self.effects if e.label == label), None)

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Concepts:
        """The result that `to_json` wrote."""
        data = read_json(text, wanted=FORMAT, writer="Concepts.to_json", command="headway diagnose concepts")
        data["effects"] = [Effect(**effect) for effect in data["effects"]]
        data["concentrated"] = with_nan(data["concentrated"])
        return cls(**data)

    def to_html(self) -> str:
        """The page, self-contained."""
        from headway.diagnose.concepts.report import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html) or the numbers (.json)."""
        path = Path(path)
        return write_atomically(path, self.to_json() if path.suffix == ".json" else self.to_html())
