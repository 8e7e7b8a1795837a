"""The search for heads that profit: one head at a time on calibration items, judged on items that it never saw.

    H* = { (l, h) : mean gain over tasks > 0  and  gain ≥ 0 on at least half of the tasks } ,
    gain = score with that head alone calibrated − score without

The released code scores every head and ships lists of heads, but not the rule between the two; this one is ours. The
best of hundreds of heads on few items is partly luck, so `judge_heads` reports on other items, and warns where some are
the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError, check_whole
from headway.methods.sinks.act.editor import ACT

log = logging.getLogger(__name__)

Head = tuple[int, int]
Scores = Mapping[str, Float[np.ndarray, " items"]]
#: Scores of all calibration items by task, with a stage attached or (None) without.
Score = Callable[[ACT | None], Scores]
#: Seed of the released scripts, which search on 900 items per task.
SEED = 42
#: Difference of two baselines on the same items that rounding explains.
SAME = 1e-4


@dataclass(frozen=True, kw_only=True)
class HeadSearch:
    """What a search found: gains by head and task, the selected heads, best first, and the items it was made on where
    the score tells them."""

    baseline: Mapping[str, float]
    gains: Mapping[Head, Mapping[str, float]]
    selected: tuple[Head, ...]
    items: tuple[Any, ...] = ()

    def mean_gain(self, head: Head) -> float:
        return float(np.mean(list(self.gains[head].values())))

    def ranking(self) -> list[Head]:
        """Every tried head, the largest mean gain first; equal ones by layer and head."""
        return sorted(self.gains, key=lambda head: (-self.mean_gain(head), head))


def search_heads(
    score: Score,
    heads: Sequence[Head],
    *,
    top_k: int | None = None,
    track: Callable[[Iterable[Head]], Iterable[Head]] | None = None,
    **settings: Any,
) -> HeadSearch:
    """Scores every head alone and selects by the rule above, at most the best `top_k`.

    `score(stage)` returns the scores of the calibration items by task, each between 0 and 1 (right or wrong, or the
    probability of the right answer); its attribute `items`, where it has one, holds the items themselves. `settings`
    are those of `ACT`. `track` may show a bar. Raises ArgumentError for no heads, repeated ones, or a `top_k` below
    1."""
    tried = [(int(layer), int(head)) for layer, head in heads]
    if not tried or len(set(tried)) != len(tried):
        raise ArgumentError(f"heads: got {len(tried)} with {len(set(tried))} different ones, expected each once.")
    check_whole("top_k", top_k, 1, optional=True)
    baseline = score(None)
    if not baseline or not all(len(values) for values in baseline.values()):
        raise ArgumentError(f"score: got the tasks {list(baseline)}, expected at least one with items.")
    gains: dict[Head, dict[str, float]] = {}
    for head in tried if track is None else track(tried):
        scores = score(ACT(heads=[head], **settings))
        gains[head] = {task: float(np.mean(scores[task]) - np.mean(baseline[task])) for task in baseline}
    means = {task: float(np.mean(values)) for task, values in baseline.items()}
    return _selected(means, gains, top_k, tuple(getattr(score, "items", ())))


def join_searches(parts: Sequence[HeadSearch], *, top_k: int | None = None) -> HeadSearch:
    """One search out of several over different heads on the same items, such as those of several processes.

    Raises ArgumentError where a head was tried twice or the items or baselines differ."""
    heads = [head for part in parts for head in part.gains]
    if not heads or len(set(heads)) != len(heads):
        raise ArgumentError(f"parts: got {len(heads)} heads with {len(set(heads))} different ones, expected each once.")
    first = parts[0]
    if any(
        part.items != first.items
        or part.baseline.keys() != first.baseline.keys()
        or any(abs(part.baseline[task] - mean) > SAME for task, mean in first.baseline.items())
        for part in parts[1:]
    ):
        raise ArgumentError(
            f"parts: got searches with the baselines {[dict(part.baseline) for part in parts]}, expected the same "
            "items in each."
        )
    return _selected(first.baseline, {h: part.gains[h] for part in parts for h in part.gains}, top_k, first.items)


def _selected(
    baseline: Mapping[str, float], gains: Mapping[Head, Mapping[str, float]], top_k: int | None, items: tuple[Any, ...]
) -> HeadSearch:
    found = HeadSearch(baseline=baseline, gains=gains, selected=(), items=items)
    chosen = [head for head in found.ranking() if profits(gains[head])][:top_k]
    return replace(found, selected=tuple(chosen))


def judge_heads(found: HeadSearch, score: Score, **settings: Any) -> dict[str, float]:
    """The gain by task of the selected heads, calibrated together, on the items of another score.

    Warns where these were searched on. `settings` are those of `ACT`. Raises ArgumentError where the search selected
    nothing."""
    if not found.selected:
        raise ArgumentError("found: got a search that selected no head, expected at least one. Nothing profits here.")
    warn_if_same(found.items, getattr(score, "items", ()))
    without, calibrated = score(None), score(ACT(heads=found.selected, **settings))
    return {task: float(np.mean(calibrated[task]) - np.mean(values)) for task, values in without.items()}


def profits(gains: Mapping[str, float]) -> bool:
    """The rule: a gain on average, and no loss on at least half of the tasks."""
    values = list(gains.values())
    return float(np.mean(values)) > 0 and sum(value >= 0 for value in values) >= len(values) / 2


def split_items(count: int, *, share: float = 0.5, seed: int = SEED) -> tuple[list[int], list[int]]:
    """Item numbers for the search and for the report, disjoint, in random order; `share` goes to the search."""
    if count < 2 or not 0 < share < 1:
        raise ArgumentError(f"count, share: got {count}, {share}; expected at least 2 items and a share in (0, 1).")
    order = np.random.default_rng(seed).permutation(count).tolist()
    at = min(max(round(count * share), 1), count - 1)
    return order[:at], order[at:]


def warn_if_same(calibration: Iterable[Any], evaluation: Iterable[Any]) -> int:
    """How many evaluation items were calibrated on; a warning when there are any."""
    seen = set(calibration)
    shared = sum(item in seen for item in evaluation)
    if shared:
        log.warning(
            "ACT: %d evaluation items were used in the head search; the best of many heads fits the items it was "
            "chosen on. Report on a held-out part.",
            shared,
        )
    return shared
