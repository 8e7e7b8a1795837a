"""The loop over a text: one pass per chunk, from which whole sentences are kept and carried into the next.

    kept ← ∅ ;  for each chunk X_t:   A ← rows of attention on  before + kept + X_t + after
                                      kept ← sentences of (kept + X_t) that hold one of the best tokens

What attends is a function, so the loop needs no model: `attend(ids, first, last)` gives the attention of tokens
first … last − 1 of a prompt to all of its tokens. What is carried is text, never keys or values; positions restart with
every pass. A scan holds the kept sentences and one chunk, and its whole state can be stored between passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.methods.long_context.infiniretri.scoring import fill, question_weights, rank_sentences, token_scores
from headway.methods.long_context.infiniretri.sentences import Sentence, pack
from headway.methods.long_context.infiniretri.settings import Settings

Attend = Callable[[Sequence[int], int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The tokens around the context, and which of those behind it are the question: [first, last) within `after`."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= len(self.after):
            raise ArgumentError(
                f"question: got tokens {self.first} to {self.last} of the {len(self.after)} behind the context, "
                "expected at least one. Put the question, or an answer cue, behind the context."
            )

    @property
    def tokens(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A kept sentence and why: the pass in which it was read first, the passes it survived, its score in the last one
    (that of its best token), the best share of a pass's score it ever had, and that token's place in the source."""

    sentence: Sentence
    chunk: int
    passes: int
    score: float
    share: float
    token: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass: prompt tokens, new and kept ones among its context, the best score in the new and in the kept text, and
    how many sentences came in and went out. `share` is the part of all scores that fell on the new text."""

    chunk: int
    tokens: int
    new_tokens: int
    kept_tokens: int
    best_new: float
    best_kept: float
    share: float
    entered: int
    left: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What was kept of a source, in its order. `tokens` counts the source's, `read` those that went through passes;
    `prompt_ids` is the prompt that is answered, with the kept text in the place of the source."""

    kept: tuple[Kept, ...]
    passes: tuple[Pass, ...]
    prompt_ids: tuple[int, ...]
    tokens: int
    read: int

    @property
    def text(self) -> str:
        return "".join(item.sentence.text for item in self.kept)

    @property
    def kept_tokens(self) -> int:
        return sum(item.sentence.tokens for item in self.kept)

    @property
    def density(self) -> float:
        """Kept over source tokens."""
        return self.kept_tokens / max(self.tokens, 1)


@dataclass(kw_only=True)
class Scan:
    """A scan under way. `step(chunk)` makes one pass; `state()` and `restore(state)` carry it over an interruption."""

    settings: Settings
    frame: Frame
    attend: Attend
    budget: int
    limit: int | None = None
    kept: list[Kept] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    weights: Tensor | None = None
    tokens: int = 0

    def step(self, chunk: Sequence[Sentence]) -> Pass:
        """Reads a chunk. Raises ArgumentError when the prompt would exceed the limit, or the chosen sentences the
        budget while overflow is "raise"."""
        context = [item.sentence for item in self.kept] + list(chunk)
        lengths = [sentence.tokens for sentence in context]
        scores = self._scores([token for sentence in context for token in sentence.ids])
        ranked, best, places = rank_sentences(scores, lengths, self.settings.topk)
        total = max(float(scores.double().sum()), 1e-30)
        items = [self._item(i, context, lengths, best, places, total) for i in range(len(context))]
        stay = self._choose(ranked, lengths, items)
        old, split = len(self.kept), sum(lengths[: len(self.kept)])
        record = Pass(
            chunk=len(self.passes),
            tokens=self.frame.tokens + sum(lengths),
            new_tokens=sum(lengths[old:]),
            kept_tokens=split,
            best_new=max(best[old:], default=0.0),
            best_kept=max(best[:old], default=0.0),
            share=float(scores[split:].double().sum()) / total,
            entered=sum(number >= old for number in stay),
            left=old - sum(number < old for number in stay),
        )
        self.kept = [items[number] for number in stay]
        self.passes.append(record)
        self.tokens += record.new_tokens
        return record

    def run(self, sentences: Iterable[Sentence], progress: Callable[[Pass], None] | None = None) -> Retrieval:
        """Reads everything, chunk by chunk."""
        for chunk in pack(sentences, self.settings.window):
            record = self.step(chunk)
            if progress is not None:
                progress(record)
        return self.result()

    def result(self) -> Retrieval:
        context = [token for item in self.kept for token in item.sentence.ids]
        return Retrieval(
            kept=tuple(self.kept),
            passes=tuple(self.passes),
            prompt_ids=(*self.frame.before, *context, *self.frame.after),
            tokens=self.tokens,
            read=sum(record.tokens for record in self.passes),
        )

    def state(self) -> dict[str, Any]:
        """Everything that JSON has to carry to go on behind the last pass."""
        return {
            "kept": [asdict(item) for item in self.kept],
            "passes": [asdict(record) for record in self.passes],
            "weights": None if self.weights is None else self.weights.tolist(),
            "tokens": self.tokens,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.kept = [
            Kept(**{**item, "sentence": Sentence(**{**item["sentence"], "ids": tuple(item["sentence"]["ids"])})})
            for item in state["kept"]
        ]
        self.passes = [Pass(**record) for record in state["passes"]]
        self.weights = None if state["weights"] is None else torch.tensor(state["weights"])
        self.tokens = state["tokens"]

    def _scores(self, context: list[int]) -> Tensor:
        """z of the context's tokens."""
        frame, settings = self.frame, self.settings
        ids = [*frame.before, *context, *frame.after]
        if self.limit is not None and len(ids) > self.limit:
            raise ArgumentError(
                f"window: got a pass of {len(ids):,} tokens for {self.limit:,} positions; lower window or budget."
            )
        behind = len(frame.before) + len(context)
        first = behind + frame.first
        last = len(ids) if settings.cue else behind + frame.last
        rows = self.attend(ids, first, last)
        if rows.shape != (last - first, len(ids)):
            raise ArgumentError(
                f"attend: got {tuple(rows.shape)}, expected (rows, tokens) = {(last - first, len(ids))}."
            )
        if settings.power and (self.weights is None or settings.refresh):
            self.weights = question_weights(rows[:, first:last])
        return token_scores(
            rows[:, len(frame.before) : behind],
            self.weights,
            phrase=settings.phrase,
            power=settings.power,
            centred=settings.centred,
        )

    def _item(
        self,
        number: int,
        context: Sequence[Sentence],
        lengths: Sequence[int],
        best: Sequence[float],
        places: Sequence[int],
        total: float,
    ) -> Kept:
        sentence, share = context[number], best[number] / total
        token = sentence.first_token + places[number] - sum(lengths[:number])
        if number < len(self.kept):
            old = self.kept[number]
            return Kept(
                sentence=sentence,
                chunk=old.chunk,
                passes=old.passes + 1,
                score=best[number],
                share=max(old.share, share),
                token=token,
            )
        return Kept(sentence=sentence, chunk=len(self.passes), passes=1, score=best[number], share=share, token=token)

    def _choose(self, ranked: list[int], lengths: Sequence[int], items: Sequence[Kept]) -> list[int]:
        """The numbers of the sentences that stay, in order."""
        if self.settings.keep == "accumulate":
            # Passes differ in what they hold, so sentences of different passes are compared by their share of one.
            pool = sorted({*range(len(self.kept)), *ranked})
            ranked = sorted(pool, key=lambda number: (-items[number].share, number))
        chosen = sum(lengths[number] for number in ranked)
        if chosen > self.budget and self.settings.overflow == "raise" and self.settings.topk is not None:
            raise ArgumentError(
                f"topk: got sentences of {chosen:,} tokens for the best {self.settings.topk} tokens of pass "
                f"{len(self.passes)}, expected at most {self.budget:,}; lower topk, or use overflow='trim'."
            )
        return fill(ranked, lengths, self.budget)
