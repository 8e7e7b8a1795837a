"""What `headway diagnose agreement` found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headway.files import write_atomically
from headway.pages.plain import read_json, to_json

FORMAT = 1


@dataclass(kw_only=True)
class Agreement:
    """A finished diagnosis. Measurements are dictionaries, None where there is no value.

    methods: one entry each with `name`, `family`, `words`, `with_others` (mean agreement with the rest), `ceiling`
    (with itself under another seed; None where nothing is drawn), `position`, `frequency`, `near_ties`,
    `comprehensiveness`, `sufficiency`, `excess`, `auroc`, `precision`, `completeness` (median relative error), `note`.
    pairs: `first`, `second`, `tau` (by the chosen measure), `sd`, `undefined`, `short`, `top` (top-k τ of the quarter
    on top), `corrected` (for the methods' own noise). texts: `name`, `tokens`, `special`, `words`, `predicted`,
    `output`, `label`, `rationale` and `scores` by method. controls: `items` (median), `chance`, `random`, `pairs` (mean
    over pairs), `pairs_other_special`, `baselines`. refused: method -> why it was left out. people: what the answers on
    the comparison sheet say, or None."""

    model: dict[str, Any]
    run: dict[str, Any]
    methods: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    texts: list[dict[str, Any]]
    controls: dict[str, Any]
    refused: dict[str, str] = field(default_factory=dict)
    people: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    def method(self, name: str) -> dict[str, Any]:
        """The entry of one method."""
        return next(m for m in self.methods if m["name"] == name)

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        """The result that `to_json` wrote."""
        return cls(**read_json(text, wanted=FORMAT, writer="Agreement.to_json", command="headway diagnose agreement"))

    def to_html(self) -> str:
        """The page, self-contained."""
        from headway.diagnose.agreement.report import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html) or the numbers (.json)."""
        path = Path(path)
        return write_atomically(path, self.to_json() if path.suffix == ".json" else self.to_html())
