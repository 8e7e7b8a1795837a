"""What every test of an explanation returns: a number, where its border is, and what follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

YES, NO, UNCLEAR = "yes", "no", "unclear"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`value` is the number, `verdict` "yes", "no" or "unclear", `sentence` both in words. `details` hold the numbers
    behind it, by layer or head where there are such."""

    name: str
    value: float
    verdict: str
    sentence: str
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict} ({self.sentence})"


def judged(
    name: str,
    value: float,
    *,
    sentence: str,
    at_least: float | None = None,
    at_most: float | None = None,
    requires: tuple[bool, str] = (True, ""),
    details: dict[str, Any] | None = None,
) -> Finding:
    """A finding whose verdict follows from a border. What `requires` says must be true first: without it, and for a
    number that is none, the verdict is unclear and the sentence gives the reason."""
    met, why = requires
    if not met or math.isnan(value):
        reason = why if not met else "nothing to measure"
        return Finding(name=name, value=value, verdict=UNCLEAR, sentence=reason, details=details or {})
    inside = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return Finding(name=name, value=value, verdict=YES if inside else NO, sentence=sentence, details=details or {})
