"""Parquet, through pyarrow: rows one group at a time, and a writer that is seen whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headway.errors import ArgumentError, missing_extra
from headway.select.records import BadRow, Reading, Record, Rows, Source

#: Rows that are turned into Python objects at once.
BATCH = 256


def arrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "scale", "reading and writing Parquet") from error
    return pyarrow, pyarrow.parquet


class ParquetRows(Rows):
    """The rows of a Parquet file; `line` is the row, from 1."""

    def __init__(self, source: Source, reading: Reading, *, whole: bool = False) -> None:
        super().__init__(source, reading)
        self.whole = whole
        self._arrow, self._parquet = arrow()
        self._file: Any = None
        #: Rows of one slice of a group, those before it, and the group.
        self._slice: tuple[int, list[dict[str, Any]]] = (0, [])
        self._group: tuple[int, Any] = (-1, None)

    def scan(self) -> Iterator[Record | BadRow]:
        line = 0
        try:
            file = self._open()
            columns = self._columns(file)
            for batch in file.iter_batches(batch_size=BATCH, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    yield self.record(row, line, 0)
        except (OSError, self._arrow.ArrowException) as error:
            yield BadRow(line + 1, f"the file cannot be read from here on ({str(error).splitlines()[0]})")
        finally:
            self.close()

    def fetch(self, line: int, offset: int) -> Record | BadRow:
        try:
            first, rows = self._slice
            if not first <= line - 1 < first + len(rows):
                first, rows = self._slice = self._read(line - 1)
            return self.record(rows[line - 1 - first], line, 0)
        except (OSError, IndexError, self._arrow.ArrowException) as error:
            return BadRow(line, f"the file cannot be read ({error})")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._slice, self._group = (0, []), (-1, None)

    def schema(self) -> Any:
        """The file's own schema."""
        return self._open().schema_arrow

    def _read(self, index: int) -> tuple[int, list[dict[str, Any]]]:
        """The slice that holds row `index` (from 0), and where it starts."""
        file = self._open()
        before = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if index < before + count:
                if self._group[0] != group:
                    self._group = (group, file.read_row_group(group, columns=self._columns(file)))
                start = (index - before) // BATCH * BATCH
                return before + start, self._group[1].slice(start, BATCH).to_pylist()
            before += count
        raise IndexError(f"row {index + 1} of {before}")

    def _open(self) -> Any:
        if self._file is None:
            self._file = self._parquet.ParquetFile(self.source.path)
        return self._file

    def _columns(self, file: Any) -> list[str] | None:
        return None if self.whole else [name for name in self.reading.fields if name in file.schema_arrow.names]


def common_schema(schemas: list[Any], extra: list[tuple[str, str]]) -> Any:
    """One schema for all files of a corpus, with the columns `extra` (name, type) behind or in place of theirs."""
    pyarrow, _ = arrow()
    try:
        joined = (
            []
            if not schemas
            else pyarrow.unify_schemas([schema.remove_metadata() for schema in schemas], promote_options="permissive")
        )
    except pyarrow.ArrowException as error:
        raise ArgumentError(
            f"corpus: its Parquet files have columns that do not go together ({str(error).splitlines()[0]}). Write "
            "JSON lines instead: --write jsonl."
        ) from error
    names = dict(extra)
    fields = [field for field in joined if field.name not in names]
    return pyarrow.schema([*fields, *((name, getattr(pyarrow, kind)()) for name, kind in extra)])
