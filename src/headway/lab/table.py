"""The comparison table: columns, means over seeds with intervals, and the sentences that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from headway.lab.result import SinkLab
from headway.methods.sinks.sink_emergence import NO_SINK

LEVEL = 0.95
#: An arm has lost the sink when its Sink_1 is at most this share of the baseline's (the sheet's fifth).
GONE = 0.2
#: Losses within this share of the baseline's count as kept.
KEPT = 0.03


@dataclass(frozen=True)
class Column:
    """A number of the table: its words, the small print, and how it is written ("%", "×", "" or "n" for counts)."""

    name: str
    words: str
    note: str
    unit: str = ""


COLUMNS: tuple[Column, ...] = (
    Column("loss", "Loss", "nats per byte"),
    Column("sink_1", "Sink₁", "heads above 0.3", "%"),
    Column("first_share", "First share", "of attention", "%"),
    Column("mass", "Mass", "row sum"),
    Column("slot", "Slot", "share of rows", "%"),
    Column("kurtosis", "Kurtosis", "of states"),
    Column("inf_norm", "Inf norm", "of states"),
    Column("massive_ratio", "Massive ratio", "‖h₁‖ ÷ others", "×"),
    Column("int8_gap", "INT8 gap", "nats"),
    Column("streaming_gap", "Streaming gap", "loss ÷ full", "×"),
    Column("params", "Params", "", "n"),
    Column("ms_per_step", "Step", "ms"),
)


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with Student's 95 % interval; the interval is NaN for one seed."""

    value: float
    low: float
    high: float
    seeds: int


def cell(values: Sequence[float]) -> Cell:
    """The mean of independent runs and its interval."""
    known = np.asarray([v for v in values if math.isfinite(v)], dtype=float)
    if known.size == 0:
        return Cell(math.nan, math.nan, math.nan, 0)
    mean = float(known.mean())
    if known.size == 1:
        return Cell(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, known.size - 1) * known.std(ddof=1) / math.sqrt(known.size))
    return Cell(mean, mean - half, mean + half, int(known.size))


def rows(lab: SinkLab) -> list[tuple[str, dict[str, Cell]]]:
    """The table: arms in order, a cell for each column that any arm has."""
    return [(arm, {c.name: cell(lab.values(arm, c.name)) for c in columns(lab)}) for arm in lab.arms]


def columns(lab: SinkLab) -> list[Column]:
    """The columns that say something: a slot only where some arm has one."""
    known = {name for r in lab.results for name in r.numbers}
    slotted = any(r.numbers.get("slot", 0.0) for r in lab.results)
    return [c for c in COLUMNS if c.name in known and (c.name != "slot" or slotted)]


def paired_difference(lab: SinkLab, arm: str, column: str) -> Cell:
    """The mean over seeds of arm − baseline."""
    return cell([own - base for base, own in lab.pairs(arm, column)])


def conclude(lab: SinkLab) -> tuple[list[str], list[str]]:
    """What the numbers say, and what to know before trusting them."""
    base = cell(lab.values(lab.baseline, "sink_1")).value
    findings, warnings = [], []
    if math.isnan(base):
        return [], [f"The baseline {lab.baseline} has no numbers, so nothing can be compared with it."]
    findings.append(
        f"{100 * base:.1f}\u00a0% of heads sink into the first token in {lab.baseline}, the baseline, at a loss of "
        f"{cell(lab.values(lab.baseline, 'loss')).value:.3f} nats per byte."
    )
    others = [arm for arm in lab.arms if arm != lab.baseline and lab.values(arm, "sink_1")]
    if base < NO_SINK:
        warnings.append(
            f"The baseline has a Sink₁ of {100 * base:.1f}\u00a0%, below {100 * NO_SINK:.0f}\u00a0%: no sink grew, so "
            "what removes one cannot be told. Train longer, or on more text."
        )
    else:
        findings += _about_sinks(lab, others, base)
    if len(lab.seeds) < 3:
        warnings.append(
            f"{len(lab.seeds)} {'seed' if len(lab.seeds) == 1 else 'seeds'}: differences between arms may be chance. "
            "Use three or more for intervals that mean something."
        )
    for failed in lab.failures():
        warnings.append(f"{failed.arm}, seed {failed.seed}: {failed.failure}")
    return findings, warnings


def _about_sinks(lab: SinkLab, others: Sequence[str], base: float) -> list[str]:
    sink = {arm: cell(lab.values(arm, "sink_1")).value for arm in others}
    loss = cell(lab.values(lab.baseline, "loss")).value
    own = {arm: cell(lab.values(arm, "loss")).value for arm in others}
    gone = [arm for arm in others if sink[arm] <= GONE * base]
    kept = [arm for arm in gone if own[arm] <= (1 + KEPT) * loss]
    found = []
    if gone:
        found.append(f"{len(gone)} of {len(others)} arms have at most a fifth of its Sink₁: {', '.join(gone)}.")
    if kept:
        best = min(kept, key=own.__getitem__)
        found.append(
            f"{best} has the lowest loss of those, {own[best]:.3f} ({signed(own[best] / loss - 1)} of the baseline's"
            f"{_paired(lab, best)})."
        )
    elif gone:
        found.append(f"None of them keeps the loss within {100 * KEPT:.0f}\u00a0% of the baseline's.")
    more = [arm for arm in others if sink[arm] > base * 1.2]
    if more:
        most = max(more, key=sink.__getitem__)
        found.append(f"{100 * sink[most]:.1f}\u00a0% of heads sink in {most}, the arm with most.")
    return found


def signed(share: float) -> str:
    """A change in percent with its sign."""
    return f"{100 * share:+.1f}\u00a0%".replace("-", "−")


def _paired(lab: SinkLab, arm: str) -> str:
    """The paired difference of the loss in words, where there are seeds for an interval."""
    found = paired_difference(lab, arm, "loss")
    if not math.isfinite(found.low):
        return ""
    words = [f"{x:+.3f}".replace("-", "−") for x in (found.value, found.low, found.high)]
    return f"; {words[0]} nats over paired seeds, {words[1]} to {words[2]}"
