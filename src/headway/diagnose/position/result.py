"""What `headway diagnose position` found, as plain data."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headway.files import write_atomically
from headway.pages.plain import read_json, to_json, with_nan

FORMAT = 1


@dataclass(kw_only=True)
class Retriever:
    """One retriever. `overall` and each of `buckets` are a `Sensitivity` as a dictionary (None for a bucket without
    queries); `reading` says for each bucket how its documents are read, and which share of answers is not; `moved` is
    the paired intervention: mean `positions`, `curve` of mean scores, `slope`, `without`, `share`, and `documents`."""

    name: str
    max_tokens: int | None
    overall: dict[str, Any]
    buckets: dict[str, dict[str, Any] | None]
    reading: dict[str, list[Any]]
    measures: dict[str, float]
    absent: int = 0
    not_found: int = 0
    moved: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Position:
    """A finished diagnosis: the model first among `retrievers`. `saliency` has mean and spread of the curves,
    first-fifth and last-fifth mass, and the attention of the pooled rows where it was read. `queries` has one row for
    each query, with the score of every retriever."""

    model: dict[str, Any]
    run: dict[str, Any]
    retrievers: list[Retriever]
    saliency: dict[str, Any] | None = None
    queries: list[dict[str, Any]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Position:
        """The result that `to_json` wrote."""
        data = read_json(text, wanted=FORMAT, writer="Position.to_json", command="headway diagnose position")
        for one in data["retrievers"]:
            for found in (one["overall"], *one["buckets"].values()):
                if found:
                    found["means"] = with_nan(found["means"])
        data["retrievers"] = [Retriever(**one) for one in data["retrievers"]]
        return cls(**data)

    def to_csv(self) -> str:
        """One line for each query."""
        text = io.StringIO()
        names = list(self.queries[0]) if self.queries else []
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.queries)
        return text.getvalue()

    def to_html(self) -> str:
        """The page, self-contained."""
        from headway.diagnose.position.report import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html), the numbers (.json), or the queries (.csv)."""
        path = Path(path)
        write = {".json": self.to_json, ".csv": self.to_csv}.get(path.suffix, self.to_html)
        return write_atomically(path, write())
