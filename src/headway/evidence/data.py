"""Plain data: what JSON can hold, made from what recipes compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headway.errors import ArgumentError


def plain(value: Any, *, name: str, finite: bool = False) -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None; arrays and tensors become lists.

    Keys become strings. `finite=True` turns NaN and infinity into None, which strict JSON needs. Anything else
    raises ArgumentError with the place where it stands, counted from `name`."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) or not finite else None
    if isinstance(value, Mapping):
        return {str(k): plain(v, name=f"{name}[{k!r}]", finite=finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, name=f"{name}[{i}]", finite=finite) for i, v in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), name=name, finite=finite)
    raise ArgumentError(
        f"{name}: got {type(value).__name__}, expected numbers, text, lists, dictionaries, arrays or tensors. "
        "Return the fields that are needed instead of the object."
    )
