"""The ledger of a run: scores on the disk, one line per shard, written once and never changed.

    <crc32 of the rest, 8 hex digits> <JSON of a shard's scores>\\n

A line is written whole, flushed and synced before its shard counts as done. Whatever ends a run, at most the last line
is torn: it fails its checksum, is cut off when the ledger is opened again, and its shard is scored again. So a record
is there once or not yet, never half and never twice. One process writes at a time; a lock, which the system drops with
the process, holds that.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from headway.errors import HeadwayError, HostError

FORMAT = 1
#: No line of a shard is there yet.
ABSENT = -1


@dataclass(frozen=True)
class ScoredRecord:
    """The score of one record. Losses in nats per predicted token; NaN where there is none, and `flags` say why."""

    id: str
    file: str
    line: int
    domain: str
    tokens: int
    base_loss: float
    masked_loss: float
    influence: float
    repetition: float
    flags: tuple[str, ...]

    def to_list(self) -> list[Any]:
        values = (getattr(self, field.name) for field in fields(self))
        return [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> ScoredRecord:
        plain: list[Any] = [math.nan if v is None else v for v in values[:-1]]
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, [*plain, tuple(values[-1])], strict=True)))


def line_of(number: int, scores: Sequence[ScoredRecord]) -> bytes:
    """A shard's scores as a line of the ledger."""
    body = json.dumps(
        {"shard": number, "scores": [s.to_list() for s in scores]}, ensure_ascii=True, separators=(",", ":")
    ).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def shard_of(line: bytes) -> int:
    """The number of the shard that a good line is of."""
    return json.loads(line[9:])["shard"]


def read_line(raw: bytes) -> dict[str, Any] | None:
    """What stands in a line; None for one that is torn or damaged."""
    if len(raw) < 11 or not raw.endswith(b"\n") or raw[8:9] != b" ":
        return None
    body = raw[9:-1]
    try:
        return json.loads(body) if int(raw[:8], 16) == zlib.crc32(body) else None
    except ValueError:
        return None


class Ledger:
    """The scores of a run of `shards` shards at `path`; opening it goes on where it was ended.

    `settings` is what the scores depend on; it stands in the first line, and a ledger with another one is refused.
    Memory is eight bytes per shard. Use it as a context manager: it holds the lock. `damaged` counts lines inside the
    file that failed their checksum (their shards are scored again), `torn` bytes that were cut off its end."""

    def __init__(self, path: Path, settings: dict[str, Any], shards: int) -> None:
        self.path, self.settings, self.shards = path, settings, shards
        self.offsets = array("q", [ABSENT]) * shards
        self.done = self.damaged = self.torn = 0
        self._file: Any = None
        self._lock: Any = None

    def __enter__(self) -> Ledger:
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise HeadwayError(
                f"--out: another run is writing {self.path}. Wait for it, or name another folder with --out."
            ) from None
        try:
            self._file = open(self.path, "r+b" if self.path.exists() else "x+b")
            self._recover()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.release()

    def __contains__(self, number: int) -> bool:
        return self.offsets[number] != ABSENT

    def append(self, line: bytes) -> bool:
        """Stores a line of `line_of`; False for a shard that is there already. On return it is on the disk."""
        found = read_line(line)
        if found is None or not 0 <= found["shard"] < self.shards:
            raise HostError("ledger: got a line that is damaged, expected one of line_of.")
        if found["shard"] in self:
            return False
        at = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise HeadwayError(
                f"--out: {self.path} cannot be written ({error.strerror or error}). What is in it stays; make room and "
                "run the same command again."
            ) from error
        self.offsets[found["shard"]] = at
        self.done += 1
        return True

    def missing(self) -> Iterator[int]:
        """Shards that have no scores yet, in order."""
        return (number for number in range(self.shards) if number not in self)

    def scores(self, number: int) -> list[ScoredRecord]:
        """The scores of a shard."""
        self._file.seek(self.offsets[number])
        found = read_line(self._file.readline())
        if found is None or found["shard"] != number:
            raise HostError(f"ledger: {self.path} was changed while it was read. Run the same command again.")
        return [ScoredRecord.from_list(each) for each in found["scores"]]

    def _recover(self) -> None:
        """Finds what is done, cuts off a torn end, writes the first line of a new ledger."""
        self._file.seek(0)
        header = read_line(self._file.readline())
        good = self._file.tell()
        if header is None:
            if self._file.readline():
                raise HostError(
                    f"ledger: {self.path} has a damaged first line, so nothing tells what its scores are of. Move it "
                    "away."
                )
            self._start()
            return
        if header.get("format") != FORMAT or header.get("settings") != json.loads(json.dumps(self.settings)):
            raise HostError(f"ledger: {self.path} holds scores of another run. Name another folder with --out.")
        at, waiting = good, 0
        for raw in self._file:
            found = read_line(raw)
            if found is None:
                waiting += 1
            else:
                if 0 <= found["shard"] < self.shards and found["shard"] not in self:
                    self.offsets[found["shard"]] = at
                    self.done += 1
                self.damaged, waiting, good = self.damaged + waiting, 0, at + len(raw)
            at += len(raw)
        self.torn = at - good
        if self.torn:
            self._file.truncate(good)
            os.fsync(self._file.fileno())

    def _start(self) -> None:
        body = json.dumps({"format": FORMAT, "settings": self.settings}, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.truncate(0)
        self._file.write(b"%08x %s\n" % (zlib.crc32(body), body))
        self._file.flush()
        os.fsync(self._file.fileno())
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
