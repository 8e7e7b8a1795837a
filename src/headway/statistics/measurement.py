"""A number with its interval, and how it is written."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headway.errors import ArgumentError


@dataclass(frozen=True)
class Measurement:
    """A number with its 95 % interval. `low` and `high` are None for exact quantities (a count, a deterministic
    reference); -inf and inf say that the interval is unknown. `n` counts independent units, `seeds` are those used."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    seeds: tuple[int, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ArgumentError(f"low, high: got {self.low} and {self.high}, expected both bounds or neither.")
        for name in ("value", "low", "high"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None and name != "value" else as_number(name, given))
        if self.low is not None and self.high is not None and not self.low <= self.high and not math.isnan(self.value):
            raise ArgumentError(
                f"low, high: got {self.low} and {self.high}, expected low ≤ high. Swap them, or give -inf and inf "
                "for an interval that is unknown."
            )
        object.__setattr__(self, "n", _count("n", self.n))
        object.__setattr__(self, "seeds", tuple(_count("seeds", seed) for seed in self.seeds))

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{number(self.low)}, {number(self.high)}]"
        return f"{number(self.value)}{interval}{' ' + self.unit if self.unit else ''}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "value": _stored(self.value),
            "low": _stored(self.low),
            "high": _stored(self.high),
            "n": self.n,
            "seeds": list(self.seeds),
            "unit": self.unit,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` wrote. Numbers that JSON lacks are stored as "nan", "inf" and "-inf"."""
        return cls(**{**data, "seeds": tuple(data.get("seeds", ()))})


def number(value: float) -> str:
    """A number for readers: four significant digits, no exponent for the usual sizes."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif 1e-4 <= abs(value) < 1e6:
        text = f"{value:,.{max(3 - math.floor(math.log10(abs(value))), 0)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:.3e}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def as_number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{name}: got {value!r}, expected a number.") from None


def _count(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if count < 0 or isinstance(value, bool):
        raise ArgumentError(f"{name}: got {value!r}, expected a whole number, 0 or more.")
    return count


def _stored(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
