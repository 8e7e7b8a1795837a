"""What `headway diagnose roles` found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headway.files import write_atomically
from headway.pages.plain import read_json, to_json

FORMAT = 1


@dataclass(kw_only=True)
class Roles:
    """A finished diagnosis. Measurements stand as dictionaries (`Measurement.from_dict`).

    `log` are the marks of the conversations that were given, `replies` those of the model's own replies to prompts in
    agreement and in conflict (see `marking.marked`). `localisation` has drift by layer and head, focal heads and
    layers, and the controls. `alignment` has a row for each set of layers that was trained. What was not asked for is
    None."""

    model: dict[str, Any]
    run: dict[str, Any]
    log: dict[str, Any] | None = None
    replies: dict[str, Any] | None = None
    localisation: dict[str, Any] | None = None
    alignment: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    format: int = FORMAT

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Roles:
        """The result that `to_json` wrote."""
        return cls(**read_json(text, wanted=FORMAT, writer="Roles.to_json", command="headway diagnose roles"))

    def to_html(self) -> str:
        """The page, self-contained."""
        from headway.diagnose.roles.report import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Writes the page (.html) or the numbers (.json)."""
        path = Path(path)
        return write_atomically(path, self.to_json() if path.suffix == ".json" else self.to_html())
