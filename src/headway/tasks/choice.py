"""Multiple choice, scored by the log-likelihood of each option behind its context.

    score(o) = Σ_t ln p(o_t | context, o_<t) ,   chosen = argmax_o score(o)   (normalised: score(o) / bytes of o)

which is how the lm-evaluation-harness scores multiple choice (`acc` and `acc_norm`). Three tasks are generated, none
needs a download:

    ending   the second half of a sentence of a real text, among those of other sentences
    word     the last word of a sentence of a real text, among the last words of other sentences
    place    who is where: four people, four places, one is asked for

Whatever is attached to the model while it scores is measured; nothing attached is the dense baseline. Options of one
token each cost a single row, since one distribution holds them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.tasks.answering import takes_logits_to_keep
from headway.tasks.samples import opening_ids, plain_ids
from headway.tasks.words import pick, prose

TASKS = ("ending", "word", "place")
OPTIONS = 4
#: Words of the sentences that questions are made of.
SENTENCE_WORDS = (10, 26)
#: Rows of one forward.
ROWS = 16

PEOPLE = (
    "Mary", "John", "Peter", "Anna", "David", "Sarah", "Thomas", "Emma", "Paul", "Alice", "Robert", "Julia", "Daniel",
    "Laura", "Mark", "Helen",
)  # fmt: skip
PLACES = (
    "kitchen", "garden", "office", "school", "library", "hospital", "station", "museum", "market", "church", "park",
    "theater", "bakery", "harbor", "forest", "castle",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Question:
    """A context, the options that may follow it as they stand (with their leading space), and the right one."""

    task: str
    context: str
    options: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.options) < 2 or len(set(self.options)) != len(self.options) or not all(self.options):
            raise ArgumentError(
                f"options: got {self.options!r}, expected at least two different ones, none of them empty."
            )
        if not 0 <= self.answer < len(self.options):
            raise ArgumentError(f"answer: got {self.answer}, expected 0..{len(self.options) - 1}.")
        if not self.context.strip():
            raise ArgumentError("context: got nothing, expected some words before the options.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """Log-likelihoods (nats) of the options of each question, and what follows from them."""

    questions: tuple[Question, ...]
    scores: tuple[Float[np.ndarray, " options"], ...]

    @property
    def correct(self) -> Float[np.ndarray, " questions"]:
        """1 where the likeliest option is the right one, else 0."""
        return self._correct(self.scores)

    @property
    def correct_normalised(self) -> Float[np.ndarray, " questions"]:
        """The same with each score over the UTF-8 bytes of its option."""
        lengths = [[len(option.encode()) for option in q.options] for q in self.questions]
        return self._correct([score / np.array(n) for score, n in zip(self.scores, lengths, strict=True)])

    @property
    def probability(self) -> Float[np.ndarray, " questions"]:
        """The share of the right option in Σ_o exp(score(o)): accuracy without its steps."""
        shares = [np.exp(score - np.logaddexp.reduce(score)) for score in self.scores]
        return np.array([share[q.answer] for share, q in zip(shares, self.questions, strict=True)])

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing."""
        return float(np.mean([1 / len(q.options) for q in self.questions]))

    def by_task(self, values: Float[np.ndarray, " questions"]) -> dict[str, Float[np.ndarray, " items"]]:
        """Values of the questions, sorted by task."""
        tasks = [q.task for q in self.questions]
        return {task: values[[t == task for t in tasks]] for task in dict.fromkeys(tasks)}

    def _correct(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([float(np.argmax(s) == q.answer) for s, q in zip(scores, self.questions, strict=True)])


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoiceBatch:
    """Rows padded on the right, and what to read of them: `reads` are (question, option, row, position, token)."""

    ids: Int[Tensor, "rows tokens"]
    mask: Int[Tensor, "rows tokens"]
    reads: tuple[tuple[int, int, int, int, int], ...]

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        device = next(model.parameters()).device
        inputs: dict[str, Any] = {
            "input_ids": self.ids.to(device), "attention_mask": self.mask.to(device), "use_cache": False,
        }  # fmt: skip
        if takes_logits_to_keep(model):
            inputs["logits_to_keep"] = torch.tensor(self.positions, device=device)
        return inputs

    @property
    def positions(self) -> list[int]:
        """The positions whose logits are needed, in order."""
        return sorted({position for _, _, _, position, _ in self.reads})


def choice_batches(tokenizer: Any, questions: Sequence[Question], *, rows: int = ROWS) -> list[ChoiceBatch]:
    """The questions as rows of tokens, rows of like length together; made once, scored as often as wanted."""
    if rows < 1 or not questions:
        raise ArgumentError(f"rows, questions: got {rows}, {len(questions)}; expected at least one of each.")
    made = [row for number, question in enumerate(questions) for row in _rows(tokenizer, number, question)]
    made.sort(key=lambda row: len(row[0]))
    return [_batch(made[start : start + rows]) for start in range(0, len(made), rows)]


@torch.no_grad()
def score_batch(model: nn.Module, batch: ChoiceBatch) -> Iterator[tuple[int, int, float]]:
    """(question, option, ln p) of every token read in one forward."""
    logits = model(**batch.inputs(model)).logits
    places = batch.positions if takes_logits_to_keep(model) else list(range(batch.ids.shape[1]))
    column = {position: i for i, position in enumerate(places)}
    rows = torch.tensor([row for _, _, row, _, _ in batch.reads], device=logits.device)
    at = torch.tensor([column[position] for _, _, _, position, _ in batch.reads], device=logits.device)
    tokens = torch.tensor([token for *_, token in batch.reads], device=logits.device)
    chosen = logits[rows, at].float()
    found = chosen.gather(1, tokens[:, None])[:, 0] - chosen.logsumexp(-1)
    for (question, option, *_), value in zip(batch.reads, found.tolist(), strict=True):
        yield question, option, value


def score_choices(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batches: Sequence[ChoiceBatch] | None = None,
    rows: int = ROWS,
) -> Choices:
    """Scores every option of every question. `batches` are those of `choice_batches`, for a caller who comes often."""
    sums = [np.zeros(len(question.options)) for question in questions]
    for batch in choice_batches(tokenizer, questions, rows=rows) if batches is None else batches:
        for question, option, value in score_batch(model, batch):
            sums[question][option] += value
    return Choices(questions=tuple(questions), scores=tuple(sums))


def make_questions(task: str, count: int, *, seed: int = 0, text: str | None = None) -> list[Question]:
    """`count` questions of a task. `ending` and `word` need a text with `count` + 3 sentences of a usual length."""
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if count < 1:
        raise ArgumentError(f"count: got {count}, expected at least 1.")
    random = np.random.default_rng([seed, TASKS.index(task)])
    if task == "place":
        return [_place(random) for _ in range(count)]
    if text is None:
        raise ArgumentError(f"text: got none for the task {task!r}, expected a text such as default_text().text.")
    return _from_sentences(task, count, random, text)


def _place(random: np.random.Generator) -> Question:
    people, places = pick(random, PEOPLE, OPTIONS), pick(random, PLACES, OPTIONS)
    story = " ".join(f"{who} is in the {where}." for who, where in zip(people, places, strict=True))
    asked = int(random.integers(OPTIONS))
    order = random.permutation(OPTIONS).tolist()
    return Question(
        task="place",
        context=f"{story}\nQuestion: Where is {people[asked]}?\nAnswer: {people[asked]} is in the",
        options=tuple(f" {places[i]}" for i in order),
        answer=order.index(asked),
    )


def _from_sentences(task: str, count: int, random: np.random.Generator, text: str) -> list[Question]:
    """A sentence cut in two, and the ends of others to choose from."""
    low, high = SENTENCE_WORDS
    sentences = [s.split() for s in dict.fromkeys(prose(text)) if low <= len(s.split()) <= high]
    cut = [_cut(task, words) for words in sentences]
    pairs = [pair for pair in cut if pair is not None]
    if len(pairs) < count + OPTIONS - 1:
        raise ArgumentError(
            f"count: got {count}, expected at most {max(len(pairs) - OPTIONS + 1, 0)} for this text, which has "
            f"{len(pairs)} sentences of {low} to {high} words. Ask for fewer, or give a longer text."
        )
    order = random.permutation(len(pairs)).tolist()
    found = []
    for number in order[:count]:
        context, right = pairs[number]
        others: list[str] = []
        while len(others) < OPTIONS - 1:
            other = pairs[order[random.integers(len(order))]][1]
            if other != right and other not in others:
                others.append(other)
        place = int(random.integers(OPTIONS))
        options = [*others[:place], right, *others[place:]]
        found.append(Question(task=task, context=context, options=tuple(options), answer=place))
    return found


def _cut(task: str, words: Sequence[str]) -> tuple[str, str] | None:
    """Context and right option of a sentence; None where its last word is no plain word."""
    if task == "ending":
        half = (len(words) + 1) // 2
        return " ".join(words[:half]), " " + " ".join(words[half:])
    last = words[-1].rstrip(".!?")
    return (" ".join(words[:-1]), f" {last}") if last.isalpha() and len(last) > 2 else None


def _rows(tokenizer: Any, number: int, question: Question) -> list[tuple[list[int], list[tuple[int, int, int, int]]]]:
    """Token rows of a question, each with its reads (question, option, position, token)."""
    opening = opening_ids(tokenizer)
    pairs = [_encode(tokenizer, question.context, option) for option in question.options]
    if all(len(option) == 1 and context == pairs[0][0] for context, option in pairs):
        context = opening + pairs[0][0]
        return [(context, [(number, i, len(context) - 1, pair[1][0]) for i, pair in enumerate(pairs)])]
    rows = []
    for i, (context, option) in enumerate(pairs):
        context = opening + context
        reads = [(number, i, len(context) - 1 + step, token) for step, token in enumerate(option)]
        rows.append((context + option[:-1], reads))
    return rows


def _encode(tokenizer: Any, context: str, option: str) -> tuple[list[int], list[int]]:
    """Tokens of the context and of the option behind it, the option's as they come out in the joined text."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, option = context[:-spaces], context[-spaces:] + option
    before = plain_ids(tokenizer, context)
    behind = plain_ids(tokenizer, context + option)[len(before) :]
    if not before or not behind:
        raise ArgumentError(
            f"options: got {option!r} behind {context[-40:]!r}, which the tokenizer gives no token of its own, "
            "expected an option of at least one token. Begin it with a space."
        )
    return before, behind


def _batch(rows: Sequence[tuple[list[int], list[tuple[int, int, int, int]]]]) -> ChoiceBatch:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    reads = []
    for row, (tokens, wanted) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        reads += [(question, option, row, position, token) for question, option, position, token in wanted]
    return ChoiceBatch(ids=ids, mask=mask, reads=tuple(reads))
