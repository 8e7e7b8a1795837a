"""Texts by the line: JSON objects, of which one that cannot be used is refused or listed, never dropped silently."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from headway.errors import ArgumentError, HeadwayError, unknown
from headway.hosts.text import Text

log = logging.getLogger(__name__)
T = TypeVar("T")
POLICIES = ("refuse", "skip")


def holds_rows(path: str | Path) -> bool:
    """Whether a file is JSONL, by its name."""
    return Path(path).suffix in (".jsonl", ".ndjson")


def check_policy(bad_rows: str, name: str = "bad_rows") -> None:
    """Raises ArgumentError for anything but "refuse" and "skip"."""
    if bad_rows not in POLICIES:
        raise unknown(name, bad_rows, POLICIES)


def read_objects(
    given: Text,
    path: str | Path,
    read: Callable[[dict[str, Any], str], T],
    *,
    fields: Sequence[str],
    what: str,
    bad_rows: str,
) -> tuple[list[T], list[str]]:
    """`read(row, "line N")` for each line of `given`, and what was left out.

    A row is an object with a `text` and no fields but `fields`; `read` may raise ArgumentError too. bad_rows: "refuse"
    raises HeadwayError with the line of the first row that cannot be used, "skip" lists them and logs them. Raises
    ArgumentError where no row can be used."""
    check_policy(bad_rows)
    found, left_out = [], []
    for number, line in enumerate(given.text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(read(_object(line, fields), f"line {number}"))
        except ArgumentError as error:
            if bad_rows == "refuse":
                raise HeadwayError(
                    f"{path}, line {number}: {error} Mend it, or leave such rows out with --bad-rows skip."
                ) from None
            left_out.append(f"line {number}: {error}")
    for row in left_out:
        log.warning("%s, %s", path, row)
    if not found:
        raise ArgumentError(f"{what}: got {path} without a usable row, expected one JSON object with a text a line.")
    return found, left_out


def _object(line: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"got {line[:40]!r}, which is no JSON ({error}).") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ArgumentError(f"got {line[:40]!r}, expected an object with a 'text'.")
    strange = sorted(set(row) - set(fields))
    if strange:
        raise unknown("field", strange[0], fields)
    return row
