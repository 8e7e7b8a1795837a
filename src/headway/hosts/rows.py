"""Texts by the line: JSON objects, of which one that cannot be used is refused or listed, never dropped silently."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from headway.errors import ArgumentError, unknown
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


class Account:
    """What becomes of rows that cannot be used: "refuse" raises ArgumentError at the first, "skip" lists them in
    `skipped` and logs them."""

    def __init__(self, bad_rows: str) -> None:
        check_policy(bad_rows)
        self.bad_rows = bad_rows
        self.skipped: list[str] = []

    def bad(self, where: str, why: str) -> None:
        """One row that cannot be used: its place and the reason, as a sentence."""
        if self.bad_rows == "refuse":
            raise ArgumentError(
                f'{where}: {why} Mend it, or leave such rows out with --bad-rows skip (bad_rows="skip").'
            )
        log.warning("%s: %s", where, why)
        self.skipped.append(f"{where}: {why}")


def json_objects(
    lines: Iterable[str | bytes], bad: Callable[[int, str], None], *, wanted: str = "an object"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line from 1, its JSON object), one line at a time. Blank lines are passed over; `bad(number, why)`
    is told of every other line: no UTF-8, no JSON, or JSON that is no object. `wanted` says what was expected."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8") if isinstance(line, bytes) else line
            row = json.loads(text.removeprefix("\ufeff") if number == 1 else text)
        except UnicodeDecodeError as error:
            bad(number, f"byte {error.start} of the line is not UTF-8.")
        except (json.JSONDecodeError, RecursionError) as error:
            bad(number, f"got {text.strip()[:40]!r}, which is no JSON ({error}).")
        else:
            if isinstance(row, dict):
                yield number, row
            else:
                bad(number, f"got {text.strip()[:40]!r}, a JSON {type(row).__name__}, expected {wanted}.")


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
    raises ArgumentError with the line of the first row that cannot be used, "skip" lists them and logs them. Raises
    ArgumentError where no row can be used."""
    account = Account(bad_rows)

    def bad(number: int, why: str) -> None:
        account.bad(f"{path}, line {number}", why)

    found = []
    for number, row in json_objects(given.text.split("\n"), bad, wanted="an object with a 'text'"):
        try:
            found.append(read(_checked(row, fields), f"line {number}"))
        except ArgumentError as error:
            bad(number, str(error))
    if not found:
        raise ArgumentError(f"{what}: got {path} without a usable row, expected one JSON object with a text a line.")
    return found, [line.removeprefix(f"{path}, ") for line in account.skipped]


def _checked(row: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ArgumentError(f"got {str(row)[:40]!r}, expected an object with a 'text'.")
    strange = sorted(set(row) - set(fields))
    if strange:
        raise unknown("field", strange[0], fields)
    return row
