"""A shard: some consecutive records that are scored together, wherever that happens.

What a shard holds follows from the corpus and its reading alone. Floating-point sums depend a little on what else is in
a batch, so records keep their company on every engine and after every restart: equal numbers, not nearly equal ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from headway.errors import HostError
from headway.methods.diagnosis.attention_influence.ranking import repetition_share
from headway.select.duplicates import text_hash
from headway.select.records import BadRow, Cursor, Reading, Record, Source
from headway.select.shards.ledger import ScoredRecord

#: Significant digits of stored numbers: float32 forwards on two machines agree to about as many.
DIGITS = 6


class Scored(Protocol):
    """What a scorer says about one text."""

    @property
    def base_loss(self) -> float: ...
    @property
    def masked_loss(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def influence(self) -> float: ...
    @property
    def flags(self) -> tuple[str, ...]: ...


class Scorer(Protocol):
    """Scores texts, in order."""

    def score(self, texts: Sequence[str]) -> Sequence[Scored]: ...


class Recipe(Protocol):
    """Makes a scorer, on whatever machine it is called; must survive pickling. `settings` is all that its scores depend
    on."""

    def build(self) -> Scorer: ...
    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Place:
    """Where a record stands, and the hash of its text when the plan was made."""

    source: Source
    line: int
    offset: int
    hash: int


@dataclass(frozen=True)
class Shard:
    """The records of one unit of work, by place."""

    number: int
    reading: Reading
    places: tuple[Place, ...]

    def records(self, cursor: Cursor) -> list[Record]:
        """The records, read anew. Raises HostError when one is no longer what it was."""
        found = []
        for place in self.places:
            record = cursor.fetch(place.source, place.line, place.offset)
            if isinstance(record, BadRow) or text_hash(record.text) != place.hash:
                reason = record.reason if isinstance(record, BadRow) else "another text"
                raise HostError(
                    f"corpus: line {place.line} of {place.source.path} is not what it was when this run began "
                    f"({reason}). "
                    "Leave the corpus as it is while a run goes on; every machine of a cluster must see the same "
                    "files. Run the same command again."
                )
            found.append(record)
        return found

    def to_json(self) -> str:
        sources = list(dict.fromkeys(place.source for place in self.places))
        at = {source: number for number, source in enumerate(sources)}
        return json.dumps(
            {
                "number": self.number,
                "reading": asdict(self.reading),
                "sources": [[s.path, s.name, s.kind] for s in sources],
                "places": [[at[p.source], p.line, p.offset, p.hash] for p in self.places],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Shard:
        data = json.loads(text)
        sources = [Source(*each) for each in data["sources"]]
        places = tuple(Place(sources[at], line, offset, digest) for at, line, offset, digest in data["places"])
        return cls(data["number"], Reading(**data["reading"]), places)


def score_shard(shard: Shard, records: Sequence[Record], scorer: Scorer) -> list[ScoredRecord]:
    """The scores of a shard's records, in their order."""
    found = scorer.score([record.text for record in records])
    if len(found) != len(records):
        raise HostError(f"scorer: got {len(found)} scores for {len(records)} texts, expected one for each.")
    return [
        ScoredRecord(
            id=record.id,
            file=place.source.name,
            line=record.line,
            domain=record.domain,
            tokens=each.tokens,
            base_loss=short(each.base_loss),
            masked_loss=short(each.masked_loss),
            influence=short(each.influence),
            repetition=short(repetition_share(record.text)),
            flags=tuple(each.flags),
        )
        for place, record, each in zip(shard.places, records, found, strict=True)
    ]


def short(value: float) -> float:
    """A number with `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else math.nan
