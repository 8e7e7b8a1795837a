"""The plan of a run: one walk through the corpus before any scoring.

It finds every row that cannot be used and every copy, says so in `left_out.jsonl`, and cuts the rest into shards. What
it keeps per record, its place and the hash of its text, stands in arrays on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError, HeadwayError, unknown
from headway.files import write_atomically
from headway.progress import Tell, silent
from headway.select.duplicates import MODES, exact_copies, near_copies, signature, text_hash
from headway.select.records import BadRow, Reading, Source, rows_of
from headway.select.replacing import replaced
from headway.select.shards.work import Place, Shard

FORMAT = 1
POLICIES = ("refuse", "skip")
#: A shard is closed with so many records, or with the one that brings it to so many bytes of text: about 30,000 tokens
#: of English, enough to put texts of one length together, little enough to score again after a crash.
RECORDS, BYTES = 64, 2**17
#: Bad rows that an error or a page names.
NAMED = 5
ROW = np.dtype([("file", "<u4"), ("line", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("hash", "<u8")])


@dataclass(frozen=True)
class Plan:
    """A corpus, walked through. `rows` counts all rows that hold anything; `left_out` those that are not scored by
    reason ("bad", "copy"), `named` the first of them in words; `sha256` stands for every text, id and domain, in
    order."""

    folder: Path
    sources: tuple[Source, ...]
    reading: Reading
    rows: int
    kept: int
    shards: int
    bytes: int
    left_out: dict[str, int]
    named: tuple[str, ...]
    sha256: str

    @property
    def left_out_file(self) -> Path:
        return self.folder / "left_out.jsonl"

    def shard(self, number: int) -> Shard:
        """One of the shards."""
        rows, kept, starts = (
            np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("rows", "kept", "starts")
        )
        stop = int(starts[number + 1]) if number + 1 < self.shards else self.kept
        chosen = rows[kept[int(starts[number]) : stop]]
        places = (
            Place(self.sources[row["file"]], int(row["line"]), int(row["offset"]), int(row["hash"])) for row in chosen
        )
        return Shard(number, self.reading, tuple(places))

    def sizes(self) -> list[int]:
        """How many records each shard has."""
        starts = np.load(self.folder / "starts.npy")
        return np.diff(np.r_[starts, self.kept]).tolist()

    def describe(self) -> dict[str, Any]:
        """What the scores of this plan depend on."""
        return {"sha256": self.sha256, "records": self.kept, "shards": self.shards}


def make_plan(
    sources: Sequence[Source],
    reading: Reading,
    folder: Path,
    *,
    bad_rows: str = "refuse",
    dedup: str = "exact",
    tell: Tell = silent,
) -> Plan:
    """Walks through the corpus and writes the plan into a folder inside `folder`; finds it there when nothing changed
    (names, sizes and times of the files, and the reading).

    Raises ArgumentError when `bad_rows` is "refuse" and there are some, naming the first and the file that lists all,
    and for a corpus without a usable record."""
    if bad_rows not in POLICIES:
        raise unknown("bad_rows", bad_rows, POLICIES)
    if dedup not in MODES:
        raise unknown("dedup", dedup, MODES)
    listed = [[s.path, s.name, *_state(s)] for s in sources]
    key = hashlib.sha256(json.dumps([FORMAT, listed, asdict(reading), dedup, RECORDS, BYTES]).encode()).hexdigest()[:16]
    place = folder / key
    if not (place / "plan.json").is_file():
        _walk(sources, reading, place, dedup, tell)
    facts = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    plan = Plan(folder=place, sources=tuple(sources), reading=reading, **{**facts, "named": tuple(facts["named"])})
    bad = plan.left_out.get("bad", 0)
    if bad and bad_rows == "refuse":
        raise ArgumentError(
            f"corpus: {bad:,} of {plan.rows:,} rows cannot be used: "
            f"{'; '.join(plan.named)}{'; …' if bad > NAMED else ''}. "
            f"All are listed in {plan.left_out_file}. Mend them, or leave them out with --bad-rows skip."
        )
    if not plan.kept:
        raise ArgumentError(f"corpus: got no usable record in {len(sources):,} files; {plan.left_out_file} says why.")
    return plan


def _state(source: Source) -> tuple[int, int]:
    found = Path(source.path).stat()
    return found.st_size, found.st_mtime_ns


def _walk(sources: Sequence[Source], reading: Reading, place: Path, dedup: str, tell: Tell) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        walk = _Walk(sources, reading, place, dedup == "near")
        walk.read(tell)
        tell("looking for copies", 0, 1)
        walk.cut(dedup)
    except OSError as error:
        raise HeadwayError(
            f"--out: {place} cannot be written ({error.strerror or error}). Make room, or name another."
        ) from error


class _Walk:
    """The plan while it is made. Files are replaced whole, plan.json last: without it there is no plan."""

    def __init__(self, sources: Sequence[Source], reading: Reading, place: Path, signs: bool) -> None:
        self.sources, self.reading, self.place, self.signs = sources, reading, place, signs
        self.digest = hashlib.sha256()
        self.count = self.bytes = 0
        self.bad = Counter[str]()
        self.named: list[str] = []

    def read(self, tell: Tell) -> None:
        """One pass over all rows: places and hashes to `rows.npy`, bad rows to `left_out.jsonl`."""
        with (
            open(self.place / "rows.raw", "wb") as rows,
            open(self.place / "signatures.raw", "wb") as signatures,
            replaced(self.place / "left_out.jsonl") as left_out,
        ):
            for number, source in enumerate(self.sources):
                tell(f"reading {source.name}", number, len(self.sources))
                for row in rows_of(source, self.reading).scan():
                    if isinstance(row, BadRow):
                        left_out.write(self._bad(source, row))
                        continue
                    size, digest = len(row.text.encode()), text_hash(row.text)
                    self.digest.update(json.dumps([digest, row.id, row.domain]).encode())
                    rows.write(np.array((number, row.line, row.offset, size, digest), ROW).tobytes())
                    self.count, self.bytes = self.count + 1, self.bytes + size
                    if self.signs:
                        signatures.write(signature(row.text).tobytes())

    def _bad(self, source: Source, row: BadRow) -> bytes:
        self.bad["bad"] += 1
        if len(self.named) < NAMED:
            self.named.append(
                f"line {row.line} of {source.name}: {row.reason}" if row.line else f"{source.name}: {row.reason}"
            )
        facts = {"file": source.name, "line": row.line, "why": "bad", "detail": row.reason}
        return (json.dumps(facts, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

    def cut(self, dedup: str) -> None:
        """Marks copies, cuts the rest into shards, writes the plan."""
        rows = np.fromfile(self.place / "rows.raw", ROW)
        keep = np.ones(len(rows), bool)
        self.bad["copy"] = 0
        with open(self.place / "left_out.jsonl", "ab") as left_out:
            for copy, original in self._copies(rows, dedup):
                keep[copy] = False
                self.bad["copy"] += 1
                facts = {**self._where(rows[copy]), "why": "copy", "detail": self._where(rows[original])}
                left_out.write((json.dumps(facts, ensure_ascii=False) + "\n").encode())
        kept = np.flatnonzero(keep)
        starts = list(_starts(rows["size"][kept]))
        for name, array in (("rows", rows), ("kept", kept), ("starts", np.asarray(starts, np.int64))):
            with replaced(self.place / f"{name}.npy") as file:
                np.save(file, array)
        for name in ("rows.raw", "signatures.raw"):
            (self.place / name).unlink()
        facts = {
            "rows": self.count + self.bad["bad"],
            "kept": len(kept),
            "shards": len(starts),
            "bytes": int(rows["size"][kept].sum()),
            "left_out": {why: number for why, number in self.bad.items() if number},
            "named": self.named,
            "sha256": self.digest.hexdigest(),
        }
        write_atomically(self.place / "plan.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    def _copies(self, rows: np.ndarray, dedup: str) -> Iterator[tuple[int, int]]:
        if dedup == "near" and len(rows):
            return near_copies(self.place / "signatures.raw", len(rows))
        return exact_copies(rows["hash"]) if dedup == "exact" else iter(())

    def _where(self, row: Any) -> dict[str, Any]:
        return {"file": self.sources[int(row["file"])].name, "line": int(row["line"])}


def _starts(sizes: np.ndarray) -> Iterator[int]:
    """Where shards start among records of `sizes` bytes."""
    records = total = 0
    for number, size in enumerate(sizes.tolist()):
        if records == 0:
            yield number
        records, total = records + 1, total + size
        if records >= RECORDS or total >= BYTES:
            records = total = 0
