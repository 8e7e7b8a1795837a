"""Which records are kept: in every domain d the ceil(share · n_d) with the highest scores, exactly, at any size.

    key(x) = influence(x) − weight · repetition(x)

Keys stand in a file on the disk. The threshold of a domain is found byte by byte from the highest: eight passes count
how many keys share the bytes found so far, 256 counts per domain and pass, so memory does not grow with the corpus. Of
records with the key of the threshold the first ones in the order of the corpus are taken.

Records that cannot be ranked (`UNRANKED` says by which flags, or without a number) count neither as chosen nor in n_d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt64

from headway.errors import ArgumentError
from headway.methods.diagnosis.attention_influence import UNRANKED
from headway.select.replacing import replaced
from headway.select.shards.ledger import Ledger, ScoredRecord

#: Keys that are looked at together: 12 MiB.
CHUNK = 2**20
KEY = np.dtype([("key", "<u8"), ("domain", "<u4")])
#: The key of a record that is not ranked: below that of any number.
NONE = 0


@dataclass(frozen=True)
class DomainChoice:
    """What was taken from one domain. `threshold` is the least key among the taken, NaN when there are none."""

    name: str
    records: int
    ranked: int
    selected: int
    threshold: float


@dataclass(frozen=True)
class Choice:
    """The choice in all domains, in the order of their first records, and a flag per record on the disk."""

    domains: tuple[DomainChoice, ...]
    flags: Path
    records: int

    def selected(self, start: int, stop: int) -> list[bool]:
        """Whether records [start, stop), in the order of the corpus, are taken."""
        with open(self.flags, "rb") as file:
            file.seek(start)
            return [bool(flag) for flag in file.read(stop - start)]


def check_share(share: float, weight: float) -> None:
    """Raises ArgumentError for a share outside (0, 1] and a weight below 0 or without a value."""
    if not 0 < share <= 1:
        raise ArgumentError(f"share: got {share}, expected a number in (0, 1], such as 0.2 for a fifth of each domain.")
    if not 0 <= weight < math.inf:
        raise ArgumentError(f"repetition_weight: got {weight}, expected 0 or more.")


def ranking_key(score: ScoredRecord, weight: float) -> float:
    """What a record is ranked by; NaN when it is not."""
    if UNRANKED & set(score.flags):
        return math.nan
    return score.influence - weight * score.repetition


def choose(ledger: Ledger, folder: Path, *, share: float, repetition_weight: float = 0.0) -> Choice:
    """Chooses among all records of a full ledger; `folder` gets the keys and the flags."""
    check_share(share, repetition_weight)
    names: dict[str, int] = {}
    with replaced(folder / "keys.raw") as file:
        for number in range(ledger.shards):
            scores = ledger.scores(number)
            values = np.array([ranking_key(score, repetition_weight) for score in scores], np.float64)
            part = np.empty(len(scores), KEY)
            part["key"] = ordered_keys(values)
            part["domain"] = [names.setdefault(score.domain, len(names)) for score in scores]
            file.write(part.tobytes())
    return choose_keys(folder / "keys.raw", list(names), share=share, flags=folder / "selected.raw")


def choose_keys(path: Path, names: Sequence[str], *, share: float, flags: Path) -> Choice:
    """Chooses among the records of a file of keys."""
    count = len(names)
    records = np.zeros(count, np.int64)
    ranked = np.zeros(count, np.int64)
    for part in _parts(path):
        records += np.bincount(part["domain"], minlength=count)
        ranked += np.bincount(part["domain"][part["key"] != NONE], minlength=count)
    # Rounding keeps 0.1 · 30 at 3.
    wanted = np.ceil(np.round(share * ranked, 9)).astype(np.int64)
    threshold, ties = _thresholds(path, wanted)
    with replaced(flags) as file:
        for part in _parts(path):
            limit = threshold[part["domain"]]
            chosen = (part["key"] > limit) & (part["key"] != NONE)
            for at in np.flatnonzero((part["key"] == limit) & (part["key"] != NONE)):
                domain = part["domain"][at]
                if ties[domain] > 0:
                    ties[domain] -= 1
                    chosen[at] = True
            file.write(chosen.astype(np.uint8).tobytes())
    values = numbers_of(threshold)
    domains = tuple(
        DomainChoice(name, int(records[i]), int(ranked[i]), int(wanted[i]), float(values[i]) if wanted[i] else math.nan)
        for i, name in enumerate(names)
    )
    return Choice(domains, flags, int(records.sum()))


def _thresholds(path: Path, wanted: np.ndarray) -> tuple[UInt64[np.ndarray, " domains"], np.ndarray]:
    """The wanted-th highest key of every domain, and how many records with that key are needed."""
    count = len(wanted)
    found = np.zeros(count, np.uint64)
    needed = wanted.copy()
    for level in range(8):
        below = np.uint64(56 - 8 * level)
        tally = np.zeros(count * 256, np.int64)
        for part in _parts(path):
            key, domain = part["key"], part["domain"].astype(np.int64)
            open_ = key != NONE
            if level:
                above = below + np.uint64(8)
                open_ &= (key >> above) == (found[domain] >> above)
            byte = ((key[open_] >> below) & np.uint64(0xFF)).astype(np.int64)
            tally += np.bincount(domain[open_] * 256 + byte, minlength=count * 256)
        # at_least[d, b]: keys of domain d whose byte is b or higher.
        at_least = tally.reshape(count, 256)[:, ::-1].cumsum(1)[:, ::-1]
        byte = np.maximum((at_least >= needed[:, None]).sum(1) - 1, 0)
        higher = np.where(byte < 255, at_least[np.arange(count), np.minimum(byte + 1, 255)], 0)
        needed = needed - higher
        found |= byte.astype(np.uint64) << below
    return found, needed


def _parts(path: Path) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(part := np.frombuffer(file.read(CHUNK * KEY.itemsize), KEY)):
            yield part


def ordered_keys(values: np.ndarray) -> UInt64[np.ndarray, " values"]:
    """Unsigned integers in the order of the numbers; `NONE` for NaN."""
    bits = (values + 0.0).view(np.uint64)
    sign = np.uint64(1 << 63)
    keys = np.where(bits & sign, ~bits, bits | sign)
    return np.where(np.isnan(values), np.uint64(NONE), keys)


def numbers_of(keys: UInt64[np.ndarray, " values"]) -> np.ndarray:
    """The numbers that `ordered_keys` came from."""
    sign = np.uint64(1 << 63)
    return np.where(keys & sign, keys & ~sign, ~keys).view(np.float64)
