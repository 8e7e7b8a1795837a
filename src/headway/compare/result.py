"""What `compare` found, as plain data: a point for every method at every budget, dense first, and what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.compare.cells import Score, Timing, score_from, timing_from, title
from headway.compare.methods import DENSE, label
from headway.errors import missing_extra, unknown
from headway.files import write_atomically
from headway.pages.plain import read_json, to_json, with_nan

if TYPE_CHECKING:
    import pandas

FORMAT = 1
#: What a point can cost, as a multiple of dense (density: the share of pairs that is read).
COSTS: Mapping[str, str] = {
    "request": "time of a request",
    "prefill": "prefill time",
    "decode": "decode time per token",
    "memory": "KV bytes",
    "density": "density",
}


@dataclass(kw_only=True)
class Loss:
    """What a point loses against dense on one task and mode, with its 95 % interval (paired by sample): the relative
    rise of a perplexity, or the drop of a score between 0 and 1. Negative: better than dense."""

    task: str
    mode: str
    value: float
    low: float
    high: float

    @property
    def label(self) -> str:
        return title(self.task, self.mode)


@dataclass(kw_only=True)
class Point:
    """A method at a budget. `states` and `reasons` say, by task and mode, what was not measured and why: "refused",
    "failed" or "left out"; `notes` are what the method logged while it ran. `density_by_head` has the mean density of
    every query head by phase and site, in the timed request, where a stage acts. `costs` are multiples of dense (see
    COSTS), `worst` the largest of its `losses`."""

    method: str
    budget: float | None
    summary: str = ""
    stages: list[str] = field(default_factory=list)
    status: str = "measured"
    reasons: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    timing: Timing | None = None
    cache_bytes: int | None = None
    density: dict[str, float] = field(default_factory=dict)
    density_by_task: dict[str, dict[str, float]] = field(default_factory=dict)
    density_by_head: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return label(self.method, self.budget)

    @property
    def is_dense(self) -> bool:
        return self.method == DENSE

    @property
    def worst(self) -> Loss | None:
        known = [loss for loss in self.losses if math.isfinite(loss.value)]
        return max(known, key=lambda loss: loss.value, default=None)

    @property
    def worst_value(self) -> float:
        """The worst loss as a number; infinite where none is known."""
        return math.inf if self.worst is None else self.worst.value

    def score(self, task: str, mode: str = "") -> Score | None:
        """The first score of a task and mode."""
        return next((s for s in self.scores if (s.task, s.mode) == (task, mode) and s.primary), None)


@dataclass(kw_only=True)
class Recommendation:
    """`label` of the point to use ("dense" to stay with it), what it `saves` (a name of COSTS, or ""), and the sentence
    with its numbers. `tolerance` is the loss that was allowed."""

    label: str
    saves: str
    tolerance: float
    sentence: str


@dataclass(kw_only=True)
class Comparison:
    """Everything one comparison found. `points[0]` is dense. `model` and `run` say what was measured and how;
    `qualities` are the (task, mode) pairs of the first scores, in order; `judged` those that count in losses."""

    model: dict[str, Any]
    run: dict[str, Any]
    qualities: list[tuple[str, str]]
    judged: list[tuple[str, str]]
    points: list[Point]
    recommendation: Recommendation
    findings: list[str]
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def dense(self) -> Point:
        return self.points[0]

    def point(self, method: str, budget: float | None = None) -> Point:
        """The point of a method at a budget; an unknown one raises and lists those there are."""
        for point in self.points:
            if point.method == method and point.budget == budget:
                return point
        raise unknown("point", label(method, budget), [p.label for p in self.points])

    def to_json(self) -> str:
        """JSON text; NaN and infinity become null."""
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` wrote. Raises ArgumentError when the text is something else."""
        data = read_json(text, wanted=FORMAT, writer="Comparison.to_json", command="headway compare")
        data["qualities"] = [(task, mode) for task, mode in data["qualities"]]
        data["judged"] = [(task, mode) for task, mode in data["judged"]]
        data["points"] = [_point(point) for point in data["points"]]
        data["recommendation"] = Recommendation(**data["recommendation"])
        return cls(**data)

    def to_frame(self) -> pandas.DataFrame:
        """A row per point: costs, densities, each score with its interval, each loss (needs pandas)."""
        try:
            import pandas as pd
        except ImportError:
            raise missing_extra("pandas", "frames", "Comparison.to_frame") from None
        return pd.DataFrame([dict(_columns(point)) for point in self.points])

    def to_html(self, path: str | Path | None = None) -> str:
        """The page, self-contained; written to `path` as well when one is given (never half)."""
        from headway.compare.report import render

        page = render(self)
        if path is not None:
            write_atomically(path, page)
        return page


def _columns(point: Point) -> Iterator[tuple[str, Any]]:
    yield from (("method", point.method), ("budget", point.budget), ("status", point.status))
    yield "reason", "; ".join(dict.fromkeys(point.reasons.values()))
    yield "prefill_seconds", point.timing.prefill_seconds if point.timing else math.nan
    yield "decode_seconds", point.timing.decode_seconds if point.timing else math.nan
    yield "cache_bytes", point.cache_bytes
    yield from ((f"density_{phase}", value) for phase, value in point.density.items())
    yield from ((f"{name}_to_dense", value) for name, value in point.costs.items() if name != "density")
    for score in point.scores:
        name = f"{score.label}, {score.name}"
        yield from ((name, score.value), (f"{name}, low", score.low), (f"{name}, high", score.high))
    yield from ((f"loss of {loss.label}", loss.value) for loss in point.losses)


def _point(data: Mapping[str, Any]) -> Point:
    return Point(
        **{
            **data,
            "scores": [score_from(score) for score in data["scores"]],
            "losses": [Loss(**_nan(loss, "value", "low", "high")) for loss in data["losses"]],
            "timing": timing_from(data["timing"]),
            "density": _nan(data["density"], *data["density"]),
            "density_by_task": {task: _nan(found, *found) for task, found in data["density_by_task"].items()},
            "costs": _nan(data["costs"], *data["costs"]),
        }
    )


def _nan(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: with_nan(value) if key in names else value for key, value in data.items()}


def pareto(qualities: Sequence[float], costs: Sequence[float], *, higher_is_better: bool = True) -> list[int]:
    """The points that no other point beats: none is at least as good and as cheap, and better or cheaper. Cheapest
    first; of equal ones the first stays; points with a number missing are left out."""
    sign = -1 if higher_is_better else 1
    order = sorted(
        (i for i in range(len(costs)) if math.isfinite(costs[i]) and math.isfinite(qualities[i])),
        key=lambda i: (costs[i], sign * qualities[i], i),
    )
    kept: list[int] = []
    for i in order:
        if not kept or sign * qualities[i] < sign * qualities[kept[-1]]:
            kept.append(i)
    return kept
