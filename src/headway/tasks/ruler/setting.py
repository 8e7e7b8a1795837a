"""What a RULER-like task is given, and how it turns texts into a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from headway.tasks.samples import Sample, largest_fit, make_sample

#: Forty evenly spaced depths, per cent.
DEPTHS = tuple(round(float(depth), 2) for depth in np.linspace(0, 100, 40))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The order for one sample: its task, length, texts, randomness and answer budget."""

    task: str
    tokenizer: Any
    tokens: int
    random: np.random.Generator
    text: str
    documentation: str
    depth: float | None
    chat: bool
    max_new_tokens: int
    match: str

    def sample(self, context: str, question: str, prefix: str, references: Sequence[str], **meta: Any) -> Sample:
        """Texts as a sample: a blank line before the question, the answer prefix on a line of its own."""
        return make_sample(
            self.tokenizer,
            task=self.task,
            context=context,
            question=f"\n\n{question}",
            prefix=prefix if self.chat else f"\n{prefix}",
            references=tuple(references),
            max_new_tokens=self.max_new_tokens,
            match=self.match,
            chat=self.chat,
            meta={"tokens": self.tokens, **meta},
        )

    def fill(self, build: Callable[..., Sample]) -> Sample:
        """The longest sample that fits: whole units of filler first, then single words of the next one.

        `build(units, words=)` makes a sample and says its `units` in its meta."""
        units = largest_fit(partial(build, words=0), self.tokens).meta["units"]
        return largest_fit(lambda words: build(units, words=words), self.tokens, least=0)

    def depths(self, count: int) -> list[float]:
        """Different depths, the given one for a single needle."""
        if count == 1 and self.depth is not None:
            return [self.depth]
        if count > len(DEPTHS):
            return [float(depth) for depth in np.linspace(0, 100, count)]
        return [DEPTHS[i] for i in self.random.permutation(len(DEPTHS))[:count]]
