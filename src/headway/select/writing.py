"""What `select` writes: files that appear whole, rows as JSON lines or Parquet."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from pathlib import Path
from typing import IO, Any, Protocol

from headway.select.records import Cursor, Record, Source
from headway.select.replacing import replaced
from headway.select.shards.ledger import ScoredRecord

#: The field that holds a selected record's scores in JSON lines.
SCORES = "attention_influence"
#: Columns of scores in Parquet, with their Arrow types.
NUMBERS = [
    ("tokens", "int64"), ("base_loss", "float64"), ("masked_loss", "float64"), ("influence", "float64"),
    ("repetition", "float64"),
]  # fmt: skip
TABLE = [
    ("id", "string"),
    ("file", "string"),
    ("line", "int64"),
    ("domain", "string"),
    *NUMBERS,
    ("flags", "string"),
    ("selected", "bool_"),
]
#: Rows of a Parquet row group.
GROUP = 1024


class RowWriter(Protocol):
    """Takes rows one by one."""

    def write(self, row: dict[str, Any]) -> None: ...


class JsonLines:
    """Rows as JSON lines; NaN and infinity become null."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def write(self, row: dict[str, Any]) -> None:
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
        except ValueError:
            text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=_as_text)
        try:
            self.file.write((text + "\n").encode())
        except UnicodeEncodeError:
            # Halves of character pairs in fields that are not looked at stay the escapes they came as.
            self.file.write((json.dumps(json.loads(text)) + "\n").encode())


class ParquetRowsOut:
    """Rows as Parquet of a schema, a group at a time."""

    def __init__(self, file: IO[bytes], schema: Any) -> None:
        from headway.select.parquet import arrow

        self.arrow, parquet = arrow()
        self.schema, self.waiting = schema, list[dict[str, Any]]()
        self.writer = parquet.ParquetWriter(file, schema)

    def write(self, row: dict[str, Any]) -> None:
        self.waiting.append(row)
        if len(self.waiting) >= GROUP:
            self.flush()

    def flush(self) -> None:
        self.writer.write_table(self.arrow.Table.from_pylist(self.waiting, schema=self.schema))
        self.waiting = []

    def close(self) -> None:
        if self.waiting:
            self.flush()
        self.writer.close()


@contextmanager
def rows_to(path: Path, schema: Any | None) -> Iterator[RowWriter]:
    """A writer of rows to a file that appears whole: Parquet with a schema, JSON lines without."""
    with replaced(path) as file:
        if schema is None:
            yield JsonLines(file)
            return
        writer = ParquetRowsOut(file, schema)
        with contextlib.closing(writer):
            yield writer


def table_schema() -> Any:
    """The schema of the scores file."""
    from headway.select.parquet import common_schema

    return common_schema([], TABLE)


def selected_schema(sources: Sequence[Source], cursor: Cursor) -> Any:
    """The schema of the selected records: the columns of Parquet inputs and the scores; of other inputs id, text,
    domain, the scores, and the row they came in as JSON."""
    from headway.select.parquet import ParquetRows, common_schema

    if not all(source.kind == "parquet" for source in sources):
        return common_schema(
            [], [("id", "string"), ("text", "string"), ("domain", "string"), ("row", "string"), *NUMBERS]
        )
    schemas = []
    for source in sources:
        rows = ParquetRows(source, cursor.reading)
        schemas.append(rows.schema())
        rows.close()
    return common_schema(schemas, NUMBERS)


def score_row(score: ScoredRecord, selected: bool) -> dict[str, Any]:
    """A row of the scores file."""
    numbers = {name: getattr(score, name) for name, _ in NUMBERS}
    place = {"id": score.id, "file": score.file, "line": score.line, "domain": score.domain}
    return {**place, **numbers, "flags": ",".join(score.flags), "selected": selected}


def selected_row(record: Record, score: ScoredRecord, *, parquet_in: bool, parquet_out: bool) -> dict[str, Any]:
    """A selected record as it is written: its own fields, and its scores."""
    numbers = {name: getattr(score, name) for name, _ in NUMBERS}
    if not parquet_out:
        row = {"id": record.id, "text": record.text} if record.row is None else record.row
        return {**row, SCORES: numbers}
    if parquet_in:
        return {**(record.row or {}), **numbers}
    row_text = None if record.row is None else json.dumps(record.row, ensure_ascii=False)
    return {"id": record.id, "text": record.text, "domain": record.domain, "row": row_text, **numbers}


def _as_text(value: Any) -> str:
    """What JSON has no form for: bytes in base64, dates in ISO form."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if isinstance(value, date | datetime | time) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value
