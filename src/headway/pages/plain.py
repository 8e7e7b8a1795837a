"""Results as plain data: JSON that survives a round trip, and short numbers for a page."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from headway.errors import ArgumentError

SIGNIFICANT_DIGITS = 4


class Exact(float):
    """A float that rounding leaves alone."""


def plain(value: Any) -> Any:
    """JSON-ready copy: numpy scalars and arrays to Python, NaN and infinity to None, keys to strings."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def with_nan(value: Any) -> Any:
    """Numbers, or lists of them, with None read as NaN."""
    if isinstance(value, list):
        return [with_nan(v) for v in value]
    return float("nan") if value is None else value


def rounded(value: Any) -> Any:
    """JSON-ready copy with short numbers: whole floats as integers, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Exact):
        return float(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def to_json(value: Any) -> str:
    """JSON text of plain data; NaN and infinity become null."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False)


def read_json(text: str, *, wanted: int, writer: str, command: str) -> dict[str, Any]:
    """The dictionary that `writer` wrote in format `wanted`. Raises ArgumentError when the text is something else."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"text: got invalid JSON ({error}), expected a report written by {writer}.") from None
    if not isinstance(data, dict) or data.get("format") != wanted:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ArgumentError(f"format: got {got!r}, expected {wanted}. Run `{command}` again with this version.")
    return data
