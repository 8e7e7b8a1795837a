"""Generated data on which gates are learned: pass-keys hidden in a haystack, and questions about all of them behind it.

    haystack … "The third pass-key is: tango echo …" … haystack   Q: third pass-key?  A: tango echo …   Q: …

Only heads that carry the words from far back keep the answers as they were, so the loss sees them and little else. The
paper hides ten keys of 32 words from the radio alphabet in book summaries, contexts of 1,000 to 32,000 tokens; every
number can be set, for small models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.tasks.samples import opening_ids, plain_ids

#: The spelling alphabet of radio traffic.
WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima",
    "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray",
    "yankee", "zulu",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
SUPERVISE = ("suffix", "answers")
#: Depths are drawn from this many points of the range.
DEPTH_POINTS = 1000
#: The contexts of the paper: 50 lengths, evenly spaced.
LENGTHS = tuple(int(x) for x in np.linspace(1_000, 32_000, 50))


@dataclass(frozen=True)
class GateSample:
    """Tokens, and the rows whose last hidden state is compared with the teacher's."""

    ids: Int[Tensor, "1 tokens"]
    supervised: Bool[Tensor, " tokens"]

    def __post_init__(self) -> None:
        if self.supervised.shape != self.ids.shape[1:] or not bool(self.supervised.any()):
            raise ArgumentError(
                f"supervised: got shape {tuple(self.supervised.shape)} for {self.ids.shape[1]} tokens, expected one "
                "flag per token, at least one of them True."
            )


@dataclass(frozen=True, kw_only=True)
class PasskeyData:
    """Samples by number: `data(step)` is the same whenever it is asked for.

    lengths: tokens of haystack and keys, one drawn per sample. passkeys, words: how many, and how long each.
    depths: where they may stand, as shares of the haystack. supervise: "suffix" takes every row of the questions and
    answers (the released code), "answers" the rows that predict a word of an answer (the paper's text). multiple:
    samples are filled up with haystack to a multiple of so many tokens."""

    tokenizer: Any
    text: str
    lengths: tuple[int, ...] = LENGTHS
    passkeys: int = 10
    words: int = 32
    depths: tuple[float, float] = (0.05, 0.95)
    supervise: str = "suffix"
    multiple: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.supervise not in SUPERVISE:
            raise unknown("supervise", self.supervise, SUPERVISE)
        if not 1 <= self.passkeys <= len(ORDINALS) or self.words < 1 or self.multiple < 1 or not self.lengths:
            raise ArgumentError(
                f"passkeys, words, multiple, lengths: got {self.passkeys}, {self.words}, {self.multiple}, "
                f"{self.lengths[:3]}; expected 1 to {len(ORDINALS)} keys, at least one word, a multiple and a length."
            )
        if not 0 <= self.depths[0] < self.depths[1] <= 1:
            raise ArgumentError(f"depths: got {self.depths}, expected a range inside [0, 1].")
        key = [WORDS[i % len(WORDS)] for i in range(self.words)]
        least = sum(len(self._tokens(self._needle(number, key))) for number in range(self.passkeys))
        if min(self.lengths) < 2 * least:
            raise ArgumentError(
                f"lengths: got {min(self.lengths)} tokens for keys of about {least}, expected at least {2 * least}. "
                "Ask for longer contexts, fewer keys or fewer words."
            )

    @cached_property
    def haystack(self) -> list[int]:
        found = self._tokens(self.text)
        if not found:
            raise ArgumentError("text: got an empty text, expected some to hide pass-keys in.")
        return found

    @cached_property
    def opening(self) -> list[int]:
        return opening_ids(self.tokenizer)

    def __call__(self, step: int) -> GateSample:
        random = np.random.default_rng([self.seed, step])
        length = int(random.choice(self.lengths))
        keys = [[WORDS[i] for i in random.integers(len(WORDS), size=self.words)] for _ in range(self.passkeys)]
        needles = [self._tokens(self._needle(i, key)) for i, key in enumerate(keys)]
        suffix, answer_rows = self._suffix(keys)
        room = length - sum(map(len, needles))
        ids = self._hide(needles, room + self._filling(length + len(suffix)), random)
        start = len(ids)
        supervised = torch.zeros(start + len(suffix), dtype=torch.bool)
        if self.supervise == "suffix":
            supervised[start:] = True
        else:
            supervised[[start + row for row in answer_rows]] = True
        return GateSample(torch.tensor([ids + suffix]), supervised)

    def _hide(self, needles: list[list[int]], room: int, random: np.random.Generator) -> list[int]:
        """The needles at different depths, in order, in `room` tokens of haystack from a random place on."""
        grid = np.linspace(*self.depths, DEPTH_POINTS)
        depths = np.sort(random.choice(grid, size=len(needles), replace=False))
        start = int(random.integers(len(self.haystack)))
        hay = [self.haystack[(start + i) % len(self.haystack)] for i in range(room)]
        ids, done = list(self.opening), 0
        for needle, depth in zip(needles, depths, strict=True):
            place = round(room * depth)
            ids += hay[done:place] + needle
            done = place
        return ids + hay[done:]

    def _suffix(self, keys: list[list[str]]) -> tuple[list[int], list[int]]:
        """Questions and answers in order, and the rows that predict an answer's tokens."""
        ids: list[int] = []
        rows: list[int] = []
        for number, key in enumerate(keys):
            ids += self._tokens(f"\nWhat is the {ORDINALS[number]} pass-key? The {ORDINALS[number]} pass-key is:")
            answer = self._tokens(" " + " ".join(key))
            rows += range(len(ids) - 1, len(ids) + len(answer) - 1)
            ids += answer
        return ids, rows

    def _needle(self, number: int, key: list[str]) -> str:
        return f"\nRemember this. The {ORDINALS[number]} pass-key is: {' '.join(key)}.\n"

    def _filling(self, tokens: int) -> int:
        """Haystack tokens that bring a sample of `tokens` to a multiple."""
        return -(tokens + len(self.opening)) % self.multiple

    def _tokens(self, text: str) -> list[int]:
        return plain_ids(self.tokenizer, text)
