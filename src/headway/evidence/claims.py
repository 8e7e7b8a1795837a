"""Claims: what a paper says, what was measured here, and the verdict that the criterion gives.

The verdict is computed when a claim is made and again when it is loaded; nothing accepts one from outside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from headway.errors import ArgumentError, HeadwayError
from headway.evidence.criteria import Criterion, Verdict
from headway.evidence.data import plain
from headway.statistics import Measurement

RESERVED = ("measured", "baseline")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


class EditedRecordError(HeadwayError):
    """A stored record does not say what its own numbers give."""


@dataclass(frozen=True)
class PaperValue:
    """What the paper reports: the value as text, under which conditions, and where it stands ("Table 2, row 3")."""

    value: str
    conditions: str = ""
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper, tested.

    `id` is unique within a recipe, `statement` one sentence. `measured` is the main quantity and `baseline` what it is
    compared with; `others` are further named quantities that the criterion or its gates read. `details` hold anything
    else that JSON can carry. `verdict` and `reason` are computed from `criterion` and cannot be given."""

    id: str
    statement: str
    paper: PaperValue
    measured: Measurement
    criterion: Criterion
    baseline: Measurement | None = None
    others: Mapping[str, Measurement] = field(default_factory=dict)
    notes: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    verdict: Verdict = field(init=False)
    reason: str = field(init=False)

    def __post_init__(self) -> None:
        check_name("id", self.id)
        if not self.statement.strip():
            raise ArgumentError(f"statement of claim {self.id!r}: got nothing, expected the sentence that is tested.")
        for name in self.others:
            if name in RESERVED:
                raise ArgumentError(f"others of claim {self.id!r}: got {name!r}, a name that is reserved. Rename it.")
        object.__setattr__(self, "details", plain(self.details, name=f"details of {self.id}", finite=True))
        outcome = self.criterion.judge(self.quantities())
        object.__setattr__(self, "verdict", outcome.verdict)
        object.__setattr__(self, "reason", outcome.reason)

    def quantities(self) -> dict[str, Measurement]:
        """Every named quantity of the claim."""
        baseline = {} if self.baseline is None else {"baseline": self.baseline}
        return {"measured": self.measured, **baseline, **self.others}

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "statement": self.statement,
            "paper": asdict(self.paper),
            "measured": self.measured.to_dict(),
            "baseline": None if self.baseline is None else self.baseline.to_dict(),
            "others": {name: quantity.to_dict() for name, quantity in self.others.items()},
            "criterion": self.criterion.to_dict(),
            "verdict": str(self.verdict),
            "notes": self.notes,
            "details": self.details,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Claim:
        """The claim that `to_dict` wrote, judged again. Raises EditedRecordError when the stored verdict differs."""
        try:
            claim = cls(
                id=data["id"],
                statement=data["statement"],
                paper=PaperValue(**data["paper"]),
                measured=Measurement.from_dict(data["measured"]),
                baseline=None if data["baseline"] is None else Measurement.from_dict(data["baseline"]),
                others={name: Measurement.from_dict(quantity) for name, quantity in data["others"].items()},
                criterion=Criterion.from_dict(data["criterion"]),
                notes=data["notes"],
                details=data["details"],
            )
            stored = data["verdict"]
        except HeadwayError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArgumentError(
                f"claim: got data without its fields ({error!r}), expected what Claim.to_dict writes. "
                "Run `headway prove` again with this version."
            ) from None
        if stored != claim.verdict:
            raise EditedRecordError(
                f"claim {claim.id!r}: the file says {stored!r}, its numbers and criterion give {str(claim.verdict)!r} "
                f"({claim.reason}). It was edited by hand; run `headway prove` again."
            )
        return claim

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Claim:
        """The claim that `to_json` wrote; see `from_dict`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArgumentError(f"text: got invalid JSON ({error}), expected what Claim.to_json writes.") from None
        if not isinstance(data, dict):
            raise ArgumentError(f"text: got {type(data).__name__}, expected what Claim.to_json writes.")
        return cls.from_dict(data)


def check_name(argument: str, name: str) -> str:
    """`name` if it is safe as a file name and as an anchor, else ArgumentError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(
            f"{argument}: got {name!r}, expected lower-case letters, digits, '.', '-' and '_', with a letter or "
            "digit first."
        )
    return name
