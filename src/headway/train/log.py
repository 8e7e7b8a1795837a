"""The log of a run: one JSON line per step while it runs, and the same as CSV at each checkpoint and at the end."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from headway.errors import HeadwayError
from headway.files import write_atomically
from headway.train.run import Row

LINES = "log.jsonl"
TABLE = "log.csv"


class Log:
    """Appends rows to `log.jsonl`. A resumed run drops the rows behind its checkpoint, so each step stands there once.

    JSON has no NaN or infinity: they are written as null."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.folder = folder
        write_atomically(folder / LINES, "".join(_line(row) for row in rows))
        self._file = (folder / LINES).open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise HeadwayError(
                f"log: {self.folder / LINES} cannot be written ({error.strerror}). Free some space."
            ) from error

    def write_table(self, rows: list[Row]) -> None:
        """`log.csv`: all rows; a column for every name that some row has, in the order of their first appearance."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.folder / TABLE, text.getvalue())

    def close(self) -> None:
        self._file.close()


def read_log(folder: str | Path, *, until: int | None = None) -> list[Row]:
    """The rows of a run's folder, up to step `until`. A last line that a kill tore is left out."""
    path = Path(folder) / LINES
    rows: list[Row] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if until is not None and row["step"] > until:
                break
            rows.append(row)
    return rows


def _line(row: Row) -> str:
    finite = {name: None if value != value or value in (float("inf"), float("-inf")) else value for name, value in
              row.items()}  # fmt: skip
    return json.dumps(finite, allow_nan=False) + "\n"
