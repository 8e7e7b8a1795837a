"""The cells of a comparison: one method at one budget on one task, what came out, and files that keep finished ones.

A finished cell is written whole, under a name made from everything its numbers depend on (model, text, settings, stages
with their code, versions). A second run with the same settings finds it; any other run does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from headway.files import write_atomically
from headway.pages.plain import plain, with_nan

log = logging.getLogger(__name__)

FORMAT = 1
MEASURED, REFUSED, FAILED, LEFT_OUT = "measured", "refused", "failed", "left out"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One quality on one task. `mode` is "blind" or "aware" of the question, or empty; `low` and `high` are the 95 %
    interval; `parts` are the samples (or blocks of text) behind the value, in the same order for every method."""

    task: str
    name: str
    value: float
    low: float
    high: float
    n: int
    mode: str = ""
    unit: str = ""
    higher_is_better: bool = True
    primary: bool = True
    parts: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return title(self.task, self.mode)


def title(task: str, mode: str) -> str:
    return f"{task}, {mode}" if mode else task


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Method / dense: the median over repeats of the paired ratios, and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 1: no difference from dense was shown."""
        return not math.isfinite(self.value) or self.low <= 1 <= self.high

    @property
    def is_faster(self) -> bool:
        return self.high < 1


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of every repeat, in pairs: method and dense ran one after the other, in turns of who went first.

    `prefill` is the time to read `tokens` tokens, `decode` the time per token of `new_tokens` more."""

    tokens: int
    new_tokens: int
    prefill: list[float]
    decode: list[float]
    dense_prefill: list[float]
    dense_decode: list[float]

    @property
    def prefill_seconds(self) -> float:
        return float(np.median(self.prefill))

    @property
    def decode_seconds(self) -> float:
        return float(np.median(self.decode))

    def ratio(self, what: str) -> Ratio:
        """Of "prefill", "decode", or "request" (both together)."""
        prefill, decode = np.array([self.prefill, self.dense_prefill]), np.array([self.decode, self.dense_decode])
        mine, dense = {"prefill": prefill, "decode": decode, "request": prefill + self.new_tokens * decode}[what]
        return paired_ratio(mine.tolist(), dense.tolist())


def paired_ratio(method: Sequence[float], dense: Sequence[float]) -> Ratio:
    """The median of method / dense over pairs, with Student's 95 % interval of the mean log ratio, which stays honest
    for a few repeats; it is widened to hold the median."""
    ratios = np.asarray(method, dtype=float) / np.asarray(dense, dtype=float)
    ratios = ratios[np.isfinite(ratios)]
    if ratios.size < 2:
        return Ratio(value=math.nan, low=math.nan, high=math.nan)
    logs, median = np.log(ratios), float(np.median(ratios))
    half = stats.t.ppf(0.975, ratios.size - 1) * logs.std(ddof=1) / math.sqrt(ratios.size)
    low, high = math.exp(logs.mean() - half), math.exp(logs.mean() + half)
    return Ratio(value=median, low=min(low, median), high=max(high, median))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one task found of one method at one budget. `status` is "measured", "refused" (the method said no),
    "failed" (it broke) or "left out" (the task cannot show this method); `reason` says why.

    `density` is selected over visible pairs by phase, `density_by_head` the same of a timed request by phase, site and
    query head, `paths` how often each path ran at a site, all from the report of the scope; `cache_bytes` the most that
    a cache held; `notes` what the method logged; `seconds` the whole cell."""

    method: str
    budget: float | None
    task: str
    status: str = MEASURED
    reason: str = ""
    scores: list[Score] = field(default_factory=list)
    timing: Timing | None = None
    density: dict[str, float] = field(default_factory=dict)
    density_by_head: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)
    cache_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        return cls(
            **{
                **data,
                "scores": [score_from(score) for score in data["scores"]],
                "timing": timing_from(data["timing"]),
                "density": _numbers(data["density"], *data["density"]),
            }
        )


def timing_from(data: Mapping[str, Any] | None) -> Timing | None:
    if data is None:
        return None
    return Timing(**_numbers(data, "prefill", "decode", "dense_prefill", "dense_decode"))


def score_from(data: Mapping[str, Any]) -> Score:
    return Score(**_numbers(data, "value", "low", "high", "parts"))


def _numbers(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: with_nan(value) if key in names else value for key, value in data.items()}


class CellStore:
    """Finished cells in a folder; in memory only for None. Equal settings are measured once."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.known: dict[str, Cell] = {}

    def get(self, key: str, *, method: str, budget: float | None) -> Cell | None:
        """The cell of that key under the name that is asked for; None when there is none, or none that can be read."""
        if key not in self.known and self.folder is not None and (path := self._path(key)).is_file():
            try:
                self.known[key] = Cell.from_dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                log.warning("%s is no cell of this version (%s); it is measured again.", path, error)
        found = self.known.get(key)
        return None if found is None else replace(found, method=method, budget=budget)

    def put(self, key: str, cell: Cell) -> None:
        """Keeps a cell; one that broke is tried again in the next run, so it is not written."""
        self.known[key] = cell
        if self.folder is not None and cell.status != FAILED:
            text = json.dumps(plain(asdict(cell)), ensure_ascii=False, allow_nan=False, indent=1)
            write_atomically(self._path(key), text + "\n")

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.json"


def cell_key(task: str, depends_on: Mapping[str, Any]) -> str:
    """A file name from all that a cell's numbers depend on."""
    text = json.dumps({"format": FORMAT, "task": task, **depends_on}, sort_keys=True, default=str)
    return f"{task}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:20]}"
