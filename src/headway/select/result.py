"""What a selection found, as plain data: numbers by domain, a sample of records, and what they say."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headway.files import write_atomically
from headway.pages.plain import read_json, to_json, with_nan

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class DomainResult:
    """One domain. `threshold` is the least score taken; means are over ranked records, of the taken ones under
    `selected_…`; lengths in predicted tokens, losses in nats per token."""

    name: str
    records: int
    ranked: int
    selected: int
    threshold: float
    tokens: int
    selected_tokens: int
    influence: float
    selected_influence: float
    length: float
    selected_length: float
    base_loss: float
    selected_base_loss: float
    repetition: float
    selected_repetition: float
    flags: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A record to look at: the start of its text, its scores, and whether it is high or low in its domain."""

    domain: str
    id: str
    place: str
    end: str
    influence: float
    base_loss: float
    masked_loss: float
    tokens: int
    repetition: float
    text: str


@dataclass(kw_only=True)
class CorpusSelection:
    """A finished selection. `sample` has a row for each of some records (influence, tokens, repetition, base loss,
    number of the domain, whether it is taken); `heads` are the masked (layer, head) pairs, `head_scores` the retrieval
    scores by layer where they were measured; `correlations` Spearman's ρ of influence with length, repetition and base
    loss over the sample (value, low, high); `files` what was written."""

    model: dict[str, Any]
    corpus: dict[str, Any]
    heads: list[list[int]]
    head_scores: list[list[float]]
    domains: list[DomainResult]
    sample: list[list[float]]
    correlations: dict[str, list[float]]
    examples: list[Example]
    controls: list[dict[str, Any]]
    left_out: dict[str, Any]
    files: dict[str, str]
    run: dict[str, Any]
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def records(self) -> int:
        return sum(domain.records for domain in self.domains)

    @property
    def ranked(self) -> int:
        return sum(domain.ranked for domain in self.domains)

    @property
    def selected(self) -> int:
        return sum(domain.selected for domain in self.domains)

    def total(self, name: str, weight: str) -> float:
        """The mean of a column over all domains, each with its count `weight` ("ranked" or "selected")."""
        counts = [getattr(d, weight) for d in self.domains]
        if not sum(counts):
            return float("nan")
        pairs = zip(self.domains, counts, strict=True)
        return sum(getattr(d, name) * n for d, n in pairs if n) / sum(counts)

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CorpusSelection:
        """The result that `to_json` wrote."""
        data = read_json(text, wanted=FORMAT, writer="CorpusSelection.to_json", command="headway select")
        numbers = {
            "domains": [DomainResult(**_floats(each, DomainResult)) for each in data["domains"]],
            "examples": [Example(**_floats(each, Example)) for each in data["examples"]],
            "sample": with_nan(data["sample"]),
            "head_scores": with_nan(data["head_scores"]),
            "correlations": {name: with_nan(value) for name, value in data["correlations"].items()},
        }
        return cls(**{**data, **numbers})

    def to_html(self) -> str:
        """The page, self-contained."""
        from headway.select.report import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html) or the numbers (.json)."""
        path = Path(path)
        return write_atomically(path, self.to_json() if path.suffix == ".json" else self.to_html())


def _floats(data: dict[str, Any], of: Any) -> dict[str, Any]:
    """Fields of type float with None read as NaN."""
    return {name: with_nan(v) if of.__annotations__[name] == "float" else v for name, v in data.items()}
