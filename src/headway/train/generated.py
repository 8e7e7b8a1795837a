"""Generated tasks with a known answer: endless streams for training and held-out rows for measuring.

    recall       k₁ v₁ k₂ v₂ … noise … k₂ → v₂          multi-query associative recall
    key-value    keys of several tokens, one question at the end
    copy         x₁ … x_n | → x₁ … x_n
    state        g₁ g₂ … → g₁, g₁g₂, g₁g₂g₃, …           running product in a group: parity, S3, S5, …

Every task is a description and a stream at once: batch number i depends on its seed and i alone, so a resumed run
goes on exactly. A batch has `input_ids` and `labels` as transformers count them: the label at i is predicted from the
tokens before i, and only answers are scored (−100 elsewhere). `chance` is the accuracy of the best guess that does not
use what the task asks to remember.

Recall after Zoology (Arora et al., arXiv 2312.04927), state tracking after Merrill et al. (arXiv 2404.08819).
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import permutations
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.train.losses import IGNORE, logits_of, scored, token_loss
from headway.train.run import looking
from headway.train.streams import Batch, Stream

#: Share of questions at short distances in Zoology's power law; small: most questions come soon.
POWER = 0.01
#: From so many numbers on, distinct ones are drawn by trial and not from a shuffled list.
MANY = 100_000
Ids = np.ndarray


@dataclass(kw_only=True)
class Task(Stream):
    """A generated task of `rows` rows per batch. Ids are 0 … vocabulary − 1; every row has `length` tokens."""

    name: ClassVar[str] = ""

    rows: int = 32
    seed: int = 0
    position: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        _at_least(self.name, 1, rows=self.rows)
        self._check()

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of different tokens."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a row."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of the best guess without what the task asks for."""

    @abstractmethod
    def draw(self, random: np.random.Generator) -> tuple[Ids, Ids]:
        """`input_ids` and `labels` (rows, length) of one batch."""

    def _check(self) -> None:
        """Raises ArgumentError for numbers that make no task."""

    def batch(self, index: int) -> dict[str, Tensor]:
        # Held-out batches have negative numbers, which seeds cannot have: they get a stream of their own.
        key = [self.seed, zlib.crc32(self.name.encode()), int(index < 0), abs(index)]
        ids, labels = self.draw(np.random.default_rng(key))
        return {"input_ids": torch.from_numpy(ids).long(), "labels": torch.from_numpy(labels).long()}

    def made_of(self) -> dict[str, Any]:
        return {"task": self.name} | {part.name: getattr(self, part.name) for part in fields(self) if part.compare}

    def scorer(self, batches: int = 4) -> Callable[[nn.Module], dict[str, float]]:
        """A function model -> loss and accuracy on held-out batches, for `train(validation=…)`."""
        rows = self.held_out(batches)
        return lambda model: {f"validation_{name}": value for name, value in score(model, rows).items()}


@dataclass(kw_only=True)
class Recall(Task):
    """Pairs of a key and a value, then keys whose values are asked for.

    pairs: how many pairs; questions: how many of them are asked (all for None), each once.
    keys, values, noise: how many different tokens there are of each kind; keys and values of a row are distinct.
    gap: noise tokens between pairs and questions. None spreads the questions over a row of `tokens` tokens by a power
        law as Zoology does: most come soon."""

    name: ClassVar[str] = "recall"

    pairs: int = 8
    questions: int | None = None
    keys: int = 32
    values: int = 32
    noise: int = 16
    gap: int | None = None
    tokens: int | None = None

    def _check(self) -> None:
        _at_least(self.name, 1, pairs=self.pairs, questions=self.asked, noise=self.noise)
        if self.pairs > min(self.keys, self.values) or self.asked > self.pairs:
            raise ArgumentError(
                f"pairs: got {self.pairs} with {self.keys} keys, {self.values} values and {self.asked} questions; "
                "expected at most as many pairs as keys and as values, and at most as many questions as pairs."
            )
        if (self.gap is None) == (self.tokens is None):
            raise ArgumentError(
                f"gap, tokens: got {self.gap} and {self.tokens}, expected exactly one: a gap, or the length of a row."
            )
        if self.gap is not None:
            _at_least(self.name, 0, gap=self.gap)
        if self.tokens is not None and self.tokens < 2 * (self.pairs + self.asked):
            raise ArgumentError(
                f"tokens: got {self.tokens}, expected at least {2 * (self.pairs + self.asked)} for {self.pairs} pairs "
                f"and {self.asked} questions."
            )

    @property
    def asked(self) -> int:
        return self.pairs if self.questions is None else self.questions

    @property
    def vocabulary(self) -> int:
        return self.noise + self.keys + self.values

    @property
    def length(self) -> int:
        return 2 * (self.pairs + self.asked) + self.gap if self.gap is not None else int(self.tokens or 0)

    @property
    def chance(self) -> float:
        """A guess among the values of the row that were not yet answered."""
        return sum(1 / (self.pairs - i) for i in range(self.asked)) / self.asked

    def draw(self, random: np.random.Generator) -> tuple[Ids, Ids]:
        keys = self.noise + _distinct(random, self.rows, self.keys, self.pairs)
        values = self.noise + self.keys + _distinct(random, self.rows, self.values, self.pairs)
        ids = random.integers(0, self.noise, (self.rows, self.length))
        ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2] = keys, values
        order = _distinct(random, self.rows, self.pairs, self.asked)
        places = self._places(random)
        labels = np.full_like(ids, IGNORE)
        np.put_along_axis(ids, places, np.take_along_axis(keys, order, 1), 1)
        answers = np.take_along_axis(values, order, 1)
        np.put_along_axis(ids, places + 1, answers, 1)
        np.put_along_axis(labels, places + 1, answers, 1)
        return ids, labels

    def _places(self, random: np.random.Generator) -> Ids:
        """Where the questions stand in each row, in order."""
        start = 2 * self.pairs
        if self.gap is not None:
            return np.tile(start + self.gap + 2 * np.arange(self.asked), (self.rows, 1))
        slots = (self.length - start) // 2
        weights = np.arange(1, slots + 1) ** (POWER - 1.0)
        # The largest of weight-scaled exponential keys are a weighted draw without replacement.
        race = random.exponential(size=(self.rows, slots)) / weights
        return start + 2 * np.sort(np.argpartition(race, self.asked - 1, 1)[:, : self.asked], 1)


@dataclass(kw_only=True)
class KeyValue(Task):
    """Pairs whose keys are `key_length` tokens of a small alphabet; the value of one is asked for at the end.

    Single tokens of a key are shared between keys: only the whole key tells which value is meant."""

    name: ClassVar[str] = "key-value"

    pairs: int = 8
    key_length: int = 2
    symbols: int = 8
    values: int = 32

    def _check(self) -> None:
        _at_least(self.name, 1, pairs=self.pairs, key_length=self.key_length, symbols=self.symbols)
        if self.pairs > min(self.symbols**self.key_length, self.values):
            raise ArgumentError(
                f"pairs: got {self.pairs}, expected at most {self.symbols**self.key_length} different keys and "
                f"{self.values} values. Take more symbols, longer keys, or more values."
            )

    @property
    def vocabulary(self) -> int:
        return self.symbols + self.values + 1

    @property
    def length(self) -> int:
        return self.pairs * (self.key_length + 1) + 1 + self.key_length + 1

    @property
    def chance(self) -> float:
        """A guess among the values of the row."""
        return 1 / self.pairs

    def draw(self, random: np.random.Generator) -> tuple[Ids, Ids]:
        every = self.symbols**self.key_length
        numbers = _distinct(random, self.rows, every, self.pairs)
        digits = self.symbols ** np.arange(self.key_length)
        keys = numbers[..., None] // digits % self.symbols
        values = self.symbols + _distinct(random, self.rows, self.values, self.pairs)
        pairs = np.concatenate([keys, values[..., None]], 2).reshape(self.rows, -1)
        row, chosen = np.arange(self.rows), random.integers(0, self.pairs, self.rows)
        ask = np.full((self.rows, 1), self.symbols + self.values)
        ids = np.concatenate([pairs, ask, keys[row, chosen], values[row, chosen][:, None]], 1)
        labels = np.full_like(ids, IGNORE)
        labels[:, -1] = ids[:, -1]
        return ids, labels


@dataclass(kw_only=True)
class Copy(Task):
    """`count` random symbols, `gap` blanks, a mark, and the symbols again."""

    name: ClassVar[str] = "copy"

    count: int = 16
    symbols: int = 16
    gap: int = 0

    def _check(self) -> None:
        _at_least(self.name, 1, count=self.count)
        _at_least(self.name, 2, symbols=self.symbols)
        _at_least(self.name, 0, gap=self.gap)

    @property
    def vocabulary(self) -> int:
        return self.symbols + 2

    @property
    def length(self) -> int:
        return 2 * self.count + self.gap + 1

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, random: np.random.Generator) -> tuple[Ids, Ids]:
        symbols = random.integers(0, self.symbols, (self.rows, self.count))
        blanks = np.full((self.rows, self.gap), self.symbols)
        mark = np.full((self.rows, 1), self.symbols + 1)
        ids = np.concatenate([symbols, blanks, mark, symbols], 1)
        labels = np.full_like(ids, IGNORE)
        labels[:, -self.count :] = symbols
        return ids, labels


#: Groups of state tracking: parity, cyclic addition, and permutations of 3 to 5 things (A5: the even ones).
GROUPS = ("parity", "Z60", "S3", "S4", "A5", "S5")


@dataclass(kw_only=True)
class StateTracking(Task):
    """`count` random elements of a group; at each, the product of all so far.

    A5 and S5 are not solvable: to follow them at any length is believed to be beyond a fixed number of layers without
    recurrence (they are complete for NC¹), while parity and Z60 are sums. Answers have ids of their own."""

    name: ClassVar[str] = "state"

    group: str = "parity"
    count: int = 32

    def _check(self) -> None:
        if self.group not in GROUPS:
            raise unknown("group", self.group, GROUPS)
        _at_least(self.name, 1, count=self.count)

    @property
    def size(self) -> int:
        """Elements of the group."""
        return len(group_table(self.group))

    @property
    def vocabulary(self) -> int:
        return 2 * self.size + 1

    @property
    def length(self) -> int:
        return self.count + 1

    @property
    def chance(self) -> float:
        return 1 / self.size

    def draw(self, random: np.random.Generator) -> tuple[Ids, Ids]:
        table = group_table(self.group)
        elements = random.integers(0, self.size, (self.rows, self.count))
        ids = np.concatenate([elements, np.full((self.rows, 1), 2 * self.size)], 1)
        labels = np.full_like(ids, IGNORE)
        state = elements[:, 0]
        for i in range(self.count):
            state = state if i == 0 else table[state, elements[:, i]]
            labels[:, i + 1] = self.size + state
        return ids, labels


@cache
def group_table(group: str) -> Int[np.ndarray, "size size"]:
    """The multiplication table: entry (a, b) is "first a, then b". Element 0 is the identity."""
    if group in ("parity", "Z60"):
        size = 2 if group == "parity" else 60
        return (np.arange(size)[:, None] + np.arange(size)) % size
    things = int(group[1:])
    elements = [p for p in permutations(range(things)) if group[0] == "S" or _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


#: The generated tasks by name.
TASKS: dict[str, type[Task]] = {task.name: task for task in (Recall, KeyValue, Copy, StateTracking)}


def score(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss in nats and accuracy over the scored tokens of the batches."""
    loss = right = count = 0.0
    device = next(model.parameters()).device
    with looking(model):
        for batch in batches:
            if isinstance(batch, Tensor):
                batch = {"input_ids": batch, "labels": batch}
            labels = batch["labels"].to(device)
            value, accuracy = token_loss(logits_of(model(batch["input_ids"].to(device))), labels)
            scored_here = scored(labels)
            loss, right = loss + float(value) * scored_here, right + accuracy * scored_here
            count += scored_here
    return {"loss": loss / max(count, 1), "accuracy": right / max(count, 1)}


def _distinct(random: np.random.Generator, rows: int, population: int, count: int) -> Ids:
    """`count` different numbers below `population` in each row, in random order."""
    if population > MANY:
        drawn = random.integers(0, population, (rows, count))
        while (again := (np.diff(np.sort(drawn, 1), axis=1) == 0).any(1)).any():
            drawn[again] = random.integers(0, population, (int(again.sum()), count))
        return drawn
    return random.permuted(np.tile(np.arange(population), (rows, 1)), axis=1)[:, :count]


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :]) % 2 == 0


def _at_least(task: str, least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(f"{name}: got {value!r} for {task}, expected a whole number of at least {least}.")
