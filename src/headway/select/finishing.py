"""The last pass: writes the scores of all records and the selected records, in the order of the corpus, and sums up.

Memory does not grow with the corpus: sums by domain, a fixed number of sampled records (those with the smallest hashes
of their places, the same ones on any engine), and the few highest and lowest of the largest domains.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headway.errors import HostError, unknown
from headway.progress import Tell
from headway.select.choosing import Choice, ranking_key
from headway.select.duplicates import text_hash
from headway.select.records import BadRow, Cursor, Record
from headway.select.result import DomainResult, Example
from headway.select.shards.ledger import Ledger, ScoredRecord
from headway.select.shards.plan import Plan
from headway.select.shards.work import Place
from headway.select.writing import rows_to, score_row, selected_row, selected_schema, table_schema

FORMATS = ("auto", "jsonl", "parquet")
#: Records in the plots and correlations.
SAMPLE = 2000
#: Domains with examples, examples at each end, and characters of one.
SHOWN, ENDS, CHARACTERS = 6, 4, 420


@dataclass
class Sums:
    """Sums over the ranked records of a domain, and over the selected among them; counts of flags over all."""

    total: np.ndarray = field(default_factory=lambda: np.zeros(5))
    selected: np.ndarray = field(default_factory=lambda: np.zeros(5))
    flags: Counter[str] = field(default_factory=Counter)

    def add(self, score: ScoredRecord, ranked: bool, selected: bool) -> None:
        self.flags.update(score.flags)
        if not ranked:
            return
        row = np.array([1.0, score.tokens, score.influence, score.base_loss, score.repetition])
        self.total += row
        if selected:
            self.selected += row


@dataclass
class Finished:
    """What the last pass found; examples are places to read."""

    domains: list[DomainResult]
    sample: list[list[float]]
    examples: list[Example]
    files: dict[str, str]


def output_format(write: str, plan: Plan) -> str:
    """ "jsonl" or "parquet": as asked for, or, for "auto", Parquet when all of the corpus is."""
    if write not in FORMATS:
        raise unknown("write", write, FORMATS)
    if write != "auto":
        return write
    return "parquet" if all(source.kind == "parquet" for source in plan.sources) else "jsonl"


def finish(
    plan: Plan,
    ledger: Ledger,
    choice: Choice,
    out: Path,
    *,
    write: str,
    repetition_weight: float,
    tell: Tell,
) -> Finished:
    """Writes `scores.<format>` and `selected.<format>` into `out`, each whole or not at all, and sums up."""
    kind = output_format(write, plan)
    parquet_in = all(source.kind == "parquet" for source in plan.sources)
    cursor = Cursor(plan.reading, whole=True)
    scores_schema, rows_schema = (
        (table_schema(), selected_schema(plan.sources, cursor)) if kind == "parquet" else (None, None)
    )
    scores_path, selected_path = out / f"scores.{kind}", out / f"selected.{kind}"
    largest = sorted(choice.domains, key=lambda d: -d.ranked)[:SHOWN]
    summary = _Summary([d.name for d in choice.domains], {d.name for d in largest}, repetition_weight)
    start = 0
    with rows_to(scores_path, scores_schema) as table, rows_to(selected_path, rows_schema) as rows:
        for number in range(plan.shards):
            tell("writing", number, plan.shards)
            shard, scores = plan.shard(number), ledger.scores(number)
            taken = choice.selected(start, start + len(scores))
            start += len(scores)
            for place, score, selected in zip(shard.places, scores, taken, strict=True):
                table.write(score_row(score, selected))
                summary.add(place, score, selected)
                if selected:
                    record = read(place, cursor)
                    rows.write(selected_row(record, score, parquet_in=parquet_in, parquet_out=kind == "parquet"))
    examples = summary.examples(cursor)
    cursor.close()
    return Finished(
        summary.domains(choice), summary.sampled(), examples,
        {"scores": str(scores_path), "selected": str(selected_path)},
    )  # fmt: skip


def read(place: Place, cursor: Cursor) -> Record:
    """The record at a place, as it was when the plan was made."""
    record = cursor.fetch(place.source, place.line, place.offset)
    if isinstance(record, BadRow) or text_hash(record.text) != place.hash:
        raise HostError(
            f"corpus: line {place.line} of {place.source.path} is not what it was when this run began. Run the same "
            "command again, and leave the corpus as it is meanwhile."
        )
    return record


class _Summary:
    """Sums by domain, the sample and the ends, while records go by."""

    def __init__(self, names: list[str], shown: set[str], weight: float) -> None:
        self.number = {name: i for i, name in enumerate(names)}
        self.sums = [Sums() for _ in names]
        self.shown, self.weight = shown, weight
        #: Heaps: (priority, number of the record, what is kept).
        self.sample: list[tuple[int, int, list[float]]] = []
        self.ends: dict[tuple[str, str], list[tuple[float, int, Place, ScoredRecord]]] = {}
        self.count = 0

    def add(self, place: Place, score: ScoredRecord, selected: bool) -> None:
        self.count += 1
        key = ranking_key(score, self.weight)
        domain = self.number[score.domain]
        self.sums[domain].add(score, not math.isnan(key), selected)
        if math.isnan(key):
            return
        digest = hashlib.blake2b(f"{score.file}:{score.line}".encode("utf-8", "replace"), digest_size=6).digest()
        row = [score.influence, score.tokens, score.repetition, score.base_loss, domain, float(selected)]
        _keep(self.sample, (-int.from_bytes(digest, "big"), -self.count, row), SAMPLE)
        if score.domain in self.shown:
            for end, sign in (("high", 1), ("low", -1)):
                heap = self.ends.setdefault((score.domain, end), [])
                _keep(heap, (sign * key, -self.count, place, score), ENDS)

    def domains(self, choice: Choice) -> list[DomainResult]:
        found = []
        for domain, sums in zip(choice.domains, self.sums, strict=True):
            with np.errstate(invalid="ignore", divide="ignore"):
                _, length, influence, loss, repetition = (sums.total / sums.total[0]).tolist()
                _, own_length, own_influence, own_loss, own_repetition = (sums.selected / sums.selected[0]).tolist()
            found.append(
                DomainResult(
                    name=domain.name,
                    records=domain.records,
                    ranked=domain.ranked,
                    selected=domain.selected,
                    threshold=domain.threshold,
                    tokens=int(sums.total[1]),
                    selected_tokens=int(sums.selected[1]),
                    influence=influence,
                    selected_influence=own_influence,
                    length=length,
                    selected_length=own_length,
                    base_loss=loss,
                    selected_base_loss=own_loss,
                    repetition=repetition,
                    selected_repetition=own_repetition,
                    flags=dict(sorted(sums.flags.items())),
                )
            )
        return found

    def sampled(self) -> list[list[float]]:
        """The sample, in the order of the corpus."""
        return [row for _, _, row in sorted(self.sample, key=lambda each: -each[1])]

    def examples(self, cursor: Cursor) -> list[Example]:
        found = []
        for (domain, end), heap in sorted(self.ends.items(), key=lambda e: (self.number[e[0][0]], e[0][1])):
            # A small domain has one row of examples, not the same ones from both ends.
            for _, _, place, score in sorted(heap, key=lambda each: (-each[0], -each[1])):
                if end == "low" and any(place == other[2] for other in self.ends[domain, "high"]):
                    continue
                text = read(place, cursor).text
                found.append(
                    Example(
                        domain=domain,
                        id=score.id,
                        place=f"{score.file}:{score.line}" if score.line else score.file,
                        end=end,
                        influence=score.influence,
                        base_loss=score.base_loss,
                        masked_loss=score.masked_loss,
                        tokens=score.tokens,
                        repetition=score.repetition,
                        text=text[:CHARACTERS] + ("…" if len(text) > CHARACTERS else ""),
                    )
                )
        return found


def _keep(heap: list, item: tuple, most: int) -> None:
    """Keeps the `most` greatest items."""
    if len(heap) < most:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)
