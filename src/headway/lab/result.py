"""What a laboratory found, as plain data: one entry per arm and seed, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headway.files import write_atomically
from headway.pages.plain import read_json, to_json, with_nan

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One trained model. `numbers` by column (see `table.COLUMNS`); `course` the training loss, thinned; `failure` why
    there are no numbers."""

    arm: str
    seed: int
    group: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    course: list[float] = field(default_factory=list)
    failure: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ArmResult:
        numbers = {name: with_nan(value) for name, value in data["numbers"].items()}
        return cls(**{**data, "numbers": numbers, "course": with_nan(data["course"])})


@dataclass(kw_only=True)
class SinkLab:
    """A finished experiment. `arms` are the settings by name that differ from the defaults, in order, the baseline
    first; `results` one entry per arm and seed; `run` says what was read, when and with what."""

    name: str
    about: str
    arms: dict[str, dict[str, Any]]
    groups: dict[str, str]
    seeds: list[int]
    results: list[ArmResult]
    run: dict[str, Any]
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def of(self, arm: str) -> list[ArmResult]:
        """The runs of an arm that have numbers, in the order of seeds."""
        return [r for r in self.results if r.arm == arm and not r.failure]

    def values(self, arm: str, column: str) -> list[float]:
        """A column's numbers by seed."""
        return [r.numbers[column] for r in self.of(arm) if column in r.numbers]

    def pairs(self, arm: str, column: str) -> list[tuple[float, float]]:
        """(baseline, arm) by seed, where both have the number."""
        base = {r.seed: r.numbers.get(column) for r in self.of(self.baseline)}
        return [
            (base[r.seed], r.numbers[column])  # type: ignore[misc]
            for r in self.of(arm)
            if base.get(r.seed) is not None and column in r.numbers
        ]

    def failures(self) -> Sequence[ArmResult]:
        return [r for r in self.results if r.failure]

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SinkLab:
        """The result that `to_json` wrote."""
        data = read_json(text, wanted=FORMAT, writer="SinkLab.to_json", command="headway lab sinks")
        return cls(**{**data, "results": [ArmResult.from_dict(r) for r in data["results"]]})

    def to_html(self) -> str:
        """The page, self-contained."""
        from headway.lab.report import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html) or the numbers (.json)."""
        path = Path(path)
        return write_atomically(path, self.to_json() if path.suffix == ".json" else self.to_html())
