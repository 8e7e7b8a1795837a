"""What every task of a comparison is given, and how its numbers get their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor, nn

from headway.compare.cells import Score
from headway.errors import HeadwayError
from headway.hosts import Text

MODES = ("blind", "aware")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every task is given. `ids` are the text's first tokens, `tokens` the length of a generated prompt, `count`
    how many samples a task has, `chunk` how much is prefilled at once (None: everything), `chat` whether prompts of
    generated questions stand in the tokenizer's chat template."""

    model: nn.Module
    tokenizer: Any
    text: Text
    ids: Int[Tensor, "1 tokens"]
    count: int
    seed: int
    modes: tuple[str, ...]
    chunk: int | None
    chat: bool = False

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


class UnshowableError(HeadwayError):
    """A task cannot show what a method does."""


def interval_of_share(parts: Sequence[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of scores in [0, 1]. Scores between 0 and 1 vary less than right and wrong
    with the same mean, so for them it is a little too wide."""
    n, mean, z = len(parts), float(np.mean(parts)), 1.959964
    middle = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap_mean(parts: Sequence[float]) -> tuple[float, float]:
    """A bootstrap percentile interval of a mean; NaN for fewer than two parts."""
    values = np.asarray(parts, dtype=float)
    if values.size < 2:
        return math.nan, math.nan
    means = values[np.random.default_rng(0).integers(values.size, size=(2000, values.size))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def share_score(task: str, name: str, mode: str, parts: list[float]) -> Score:
    low, high = interval_of_share(parts)
    return Score(
        task=task, name=name, mode=mode, value=float(np.mean(parts)), low=low, high=high, n=len(parts), parts=parts
    )


def refuse_driver(drives: bool, task: str) -> None:
    if drives:
        raise UnshowableError(f"{task}: a driver wraps generate and leaves forwards as they are; ask needle or recall.")
