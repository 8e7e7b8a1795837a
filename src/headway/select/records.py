"""Records of a corpus: JSON lines (plain or gzipped), Parquet rows, and texts, each with an id and the line it stands
on.

A record is read twice: once by `scan`, which walks a file from its start, and again by `fetch`, which goes to one
record by its line and offset. Both read in pieces, so a file may be larger than memory. What cannot be used is never
dropped in silence: it comes out as a `BadRow` with its line and the reason.
"""

from __future__ import annotations

import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from headway.errors import ArgumentError, HostError, unknown

#: Kinds of file by the end of their names.
KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonl.gz": "lines",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
SPLITS = ("file", "paragraph", "line")
#: Domains that are read off the path in place of a field.
BY_FILE, BY_FOLDER = "@file", "@folder"
#: The domain of records when none is asked for.
ONE_DOMAIN = "all"
#: The tables that a run writes into its folder.
WRITTEN = tuple(f"{name}.{end}" for name in ("scores", "selected") for end in ("jsonl", "parquet"))
#: What reading a damaged or vanished file raises.
BROKEN = (OSError, EOFError, zlib.error)
MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a row becomes a record.

    text_field, id_field: fields of JSON and Parquet rows; without an id field the id is "<file>:<line>".
    domain_field: a field, "@file" or "@folder" (the record's place), or None for one domain. split: what is one record
    of a .txt or .md file: the "file", a "paragraph" (between empty lines) or a "line"."""

    text_field: str = "text"
    domain_field: str | None = None
    id_field: str | None = None
    split: str = "file"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)

    @property
    def fields(self) -> list[str]:
        """The fields that are looked at."""
        by_path = (BY_FILE, BY_FOLDER, None)
        wanted = [self.text_field, self.id_field, None if self.domain_field in by_path else self.domain_field]
        return list(dict.fromkeys(name for name in wanted if name is not None))


@dataclass(frozen=True)
class Source:
    """A file of the corpus: where it is, its name inside the corpus, and its kind."""

    path: str
    name: str
    kind: str


@dataclass(frozen=True)
class Record:
    """A text with its place. `line` is the line of a text file or the row of a Parquet file, from 1; `row` is the whole
    object it came in, None for texts."""

    id: str
    text: str
    domain: str
    line: int
    offset: int
    row: dict[str, Any] | None


@dataclass(frozen=True)
class BadRow:
    """A row that is no record, and why."""

    line: int
    reason: str


def find_sources(corpus: Sequence[str | Path], *, out: Path | None = None) -> tuple[list[Source], list[str]]:
    """The files of a corpus in the order of their names, and the names of files that are of no kind that is read.

    Each part is a file or a folder, which is searched through but for `out`, the folder of the run: what an earlier
    call wrote there is no part of the corpus. Raises HostError for a part that is not there, ArgumentError for a corpus
    without any readable file, for files named twice, and for a corpus that the run would overwrite."""
    found: list[Source] = []
    ignored: list[str] = []
    for part in corpus:
        path = Path(part).expanduser()
        if str(part) == "-":
            raise ArgumentError(
                "corpus: got -, expected files. A run reads its corpus twice: save standard input first."
            )
        if not path.exists():
            raise HostError(f"corpus: there is no file or folder {part}; check the path.")
        if out is not None:
            _check_apart(path, out)
        inside = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and not _hidden(p, path)]
        if out is not None and path.resolve() in out.resolve().parents:
            inside = [p for p in inside if not p.resolve().is_relative_to(out.resolve())]
        named = sorted((p.name if path.is_file() else p.relative_to(path).as_posix(), p) for p in inside)
        for name, file in named:
            kind = kind_of(name)
            if kind is None:
                ignored.append(name)
            else:
                found.append(Source(str(file.resolve()), name, kind))
    if not found:
        seen = f" ({', '.join(ignored[:5])})" if ignored else ""
        raise ArgumentError(
            f"corpus: got {', '.join(map(str, corpus))} without a file to read{seen}; expected some that end in "
            f'{", ".join(KINDS)}. Save each text as a line of JSON: {{"text": "…"}}.'
        )
    twice = {s.path for s in found if sum(o.path == s.path for o in found) > 1} if len(corpus) > 1 else set()
    if twice:
        raise ArgumentError(f"corpus: got {sorted(twice)[0]} twice, expected each file once. Leave one out.")
    return found, ignored


def kind_of(name: str) -> str | None:
    """The kind of a file by its name; None for any other."""
    return next((kind for end, kind in KINDS.items() if name.lower().endswith(end)), None)


def _check_apart(part: Path, out: Path) -> None:
    """Raises ArgumentError for a part of the corpus that is the folder of the run or a table that it writes."""
    if part.resolve() == out.resolve() or (part.parent.resolve() == out.resolve() and part.name in WRITTEN):
        raise ArgumentError(
            f"corpus: got {part}, where this run writes its own files; they would take the place of the corpus. Name "
            "another folder with --out."
        )


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


class Rows(ABC):
    """The rows of one file as they stand there."""

    def __init__(self, source: Source, reading: Reading) -> None:
        self.source, self.reading = source, reading

    @abstractmethod
    def scan(self) -> Iterator[Record | BadRow]:
        """All of them, in order."""

    @abstractmethod
    def fetch(self, line: int, offset: int) -> Record | BadRow:
        """One of them; calls with growing lines are cheap."""

    def close(self) -> None:  # noqa: B027
        """Closes what is open."""

    def record(self, row: dict[str, Any], line: int, offset: int) -> Record | BadRow:
        """The record in a row of fields."""
        text = row.get(self.reading.text_field)
        if not isinstance(text, str):
            got = f"{type(text).__name__} under" if self.reading.text_field in row else "no field"
            return BadRow(line, f"{got} {self.reading.text_field!r} (fields: {', '.join(map(str, list(row)[:8]))})")
        return self.made(text, row, line, offset)

    def made(self, text: str, row: dict[str, Any] | None, line: int, offset: int) -> Record | BadRow:
        if not text.strip():
            return BadRow(line, "the text is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return BadRow(line, f"the text holds half of a character pair (U+{ord(text[error.start]):04X})")
        name = self.source.name if line == 0 else f"{self.source.name}:{line}"
        facts = {"id": name, "domain": self._place()}
        for what, field in (("id", self.reading.id_field), ("domain", self.reading.domain_field)):
            if field is None or field in (BY_FILE, BY_FOLDER) or row is None:
                continue
            value = row.get(field)
            if not isinstance(value, str | int) or isinstance(value, bool) or str(value) == "":
                return BadRow(line, f"no {what} under {field!r}, got {value!r}")
            facts[what] = str(value)
        return Record(facts["id"], text, facts["domain"], line, offset, row)

    def _place(self) -> str:
        if self.reading.domain_field == BY_FILE:
            return self.source.name
        if self.reading.domain_field == BY_FOLDER:
            return Path(self.source.path).parent.name
        return ONE_DOMAIN


class LineRows(Rows):
    """Rows that begin and end with lines: JSON lines, or the lines or paragraphs of a text."""

    def __init__(self, source: Source, reading: Reading) -> None:
        super().__init__(source, reading)
        self.packed = source.path.lower().endswith(".gz")
        self._file: IO[bytes] | None = None
        self._next = 1

    def scan(self) -> Iterator[Record | BadRow]:
        line, offset = 1, 0
        try:
            with self._open() as file:
                while True:
                    raw, count, size = self._take(file)
                    if count == 0:
                        return
                    if raw.strip():
                        yield self.parse(raw, line, offset)
                    line, offset = line + count, offset + size
        except BROKEN as error:
            yield BadRow(line, f"the file cannot be read from here on ({error})")

    def fetch(self, line: int, offset: int) -> Record | BadRow:
        try:
            if self._file is None or (self.packed and line < self._next):
                self.close()
                self._file, self._next = self._open(), 1
            if not self.packed:
                self._file.seek(offset)
                self._next = line
            while self._next < line:
                self._next += self._take(self._file)[1] or line
            raw, count, _ = self._take(self._file)
            self._next += count
        except BROKEN as error:
            return BadRow(line, f"the file cannot be read ({error})")
        return self.parse(raw, line, offset)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def parse(self, raw: bytes, line: int, offset: int) -> Record | BadRow:
        if line == 1:
            raw = raw.removeprefix(MARK)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return BadRow(line, f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start:,})")
        if self.source.kind == "text":
            return self.made(text.rstrip("\r\n"), None, line, offset)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            return BadRow(line, f"not JSON ({error})")
        if not isinstance(row, dict):
            return BadRow(line, f"a JSON {type(row).__name__}, expected an object")
        return self.record(row, line, offset)

    def _take(self, file: IO[bytes]) -> tuple[bytes, int, int]:
        """The next row, how many lines it spans, and how many bytes."""
        raw = file.readline()
        if self.source.kind != "text" or self.reading.split == "line" or not raw.strip():
            return raw, int(bool(raw)), len(raw)
        parts = [raw]
        while True:
            raw = file.readline()
            parts.append(raw)
            if not raw.strip():
                break
        return b"".join(parts), len(parts) - (not parts[-1]), sum(map(len, parts))

    def _open(self) -> IO[bytes]:
        opener: Any = gzip.open if self.packed else open
        return opener(self.source.path, "rb")


class WholeFile(Rows):
    """A text file that is one record."""

    def scan(self) -> Iterator[Record | BadRow]:
        yield self.fetch(0, 0)

    def fetch(self, line: int, offset: int) -> Record | BadRow:
        try:
            data = Path(self.source.path).read_bytes().removeprefix(MARK)
            return self.made(data.decode("utf-8"), None, 0, 0)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].count(b"\n") + 1
            return BadRow(before, f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start:,})")
        except OSError as error:
            return BadRow(0, f"the file cannot be read ({error})")


def rows_of(source: Source, reading: Reading, *, whole: bool = False) -> Rows:
    """The reader of a file. `whole` brings all fields of Parquet rows, not only those that are looked at."""
    if source.kind == "parquet":
        from headway.select.parquet import ParquetRows

        return ParquetRows(source, reading, whole=whole)
    if source.kind == "text" and reading.split == "file":
        return WholeFile(source, reading)
    return LineRows(source, reading)


class Cursor:
    """Fetches records of many files; keeps the file of the last one open."""

    def __init__(self, reading: Reading, *, whole: bool = False) -> None:
        self.reading, self.whole = reading, whole
        self._rows: Rows | None = None

    def fetch(self, source: Source, line: int, offset: int) -> Record | BadRow:
        if self._rows is None or self._rows.source != source:
            self.close()
            self._rows = rows_of(source, self.reading, whole=self.whole)
        return self._rows.fetch(line, offset)

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None
