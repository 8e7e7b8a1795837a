"""Results kept as they come: one JSON line each, under a fingerprint of what was asked."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Kept:
    """A file of finished results. `kept(what, make)` gives the stored result of `what`, or makes and appends it; with
    `anew` it is made in any case.

    `what` and the result must be plain JSON data. A line that an interrupt cut off is told and made again. Without a
    path nothing is stored."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.reused = 0
        self._known = {} if self.path is None or not self.path.exists() else self._read(self.path)

    def __call__(self, what: Any, make: Callable[[], Any], *, anew: bool = False) -> Any:
        key = key_of(what)
        if key in self._known and not anew:
            self.reused += 1
            return self._known[key]
        result = json.loads(json.dumps(make()))
        self._known[key] = result
        if self.path is not None:
            append_line(self.path, {"key": key, "result": result})
        return result

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        known = {}
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                known[row["key"]] = row["result"]
            except (ValueError, TypeError, KeyError):
                log.warning("%s, line %d: cut off by an interrupt; it is made again.", path, number)
        return known


def key_of(what: Any) -> str:
    """The fingerprint of plain JSON data."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def append_line(path: Path, row: Any) -> None:
    """Appends one JSON line, on a line of its own even behind a line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with path.open("ab") as file:
        if file.tell() and not _ends_line(path):
            file.write(b"\n")
        file.write(line.encode("utf-8", "surrogatepass"))
        file.flush()


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
