"""Several questions on one shared context: what is left when the context was prefilled before any question was known.

    prefill(context) once ;  for each question:  feed(question), decode,  then …

    copy          … go back to the context: each question gets its own copy of the prefilled cache
    crop          … go back to the context: question and answer are cropped off the one cache
    rerun         … prefill the context again; always possible, and what the others must agree with
    conversation  … go on: later questions follow earlier questions and answers in the same cache

`aware` is `rerun` with context and question prefilled together: the upper bound that a question-aware method reaches.
The first three are the multi-request, the fourth the multi-turn mode of SCBench (Li et al., arXiv 2412.10319), which
shows methods that work only while the question is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from headway.errors import ArgumentError, HostError, unknown
from headway.tasks.answering import Answer, Running, answer, decode, ending_ids, feed, fork, prefill
from headway.tasks.samples import Sample, largest_fit, make_sample
from headway.tasks.words import FILLER, NOUNS, draw, essay, pick, prose, spread

MODES = ("copy", "crop", "rerun", "conversation", "aware")
NEW_TOKENS = 16
DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class SharedContext:
    """Questions with one and the same context. Each is a sample of its own."""

    questions: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.questions:
            raise ArgumentError("questions: got none, expected at least one sample.")
        first = self.questions[0].context_ids
        if not all(torch.equal(first, sample.context_ids) for sample in self.questions):
            raise ArgumentError("questions: got samples with different contexts, expected one context for all of them.")


def shared_context(
    tokenizer: Any,
    tokens: int,
    random: np.random.Generator,
    *,
    questions: int = 4,
    text: str | None = None,
    chat: bool = False,
) -> SharedContext:
    """A text that fills `tokens` with `questions` facts at even depths, and one question about each in random order.

    The haystack is repeated filler, or the sentences of `text` from a random one on."""
    if not 1 <= questions <= len(NOUNS):
        raise ArgumentError(f"questions: got {questions}, expected 1..{len(NOUNS)}.")
    keys = pick(random, NOUNS, questions)
    values = draw("number", random, questions, digits=DIGITS)
    found = list(FILLER) if text is None else prose(text)
    start = 0 if text is None else int(random.integers(len(found)))
    facts = [f"The secret code of the {key} is {value}." for key, value in zip(keys, values, strict=True)]
    depths = [100 * (i + 0.5) / questions for i in range(questions)]
    order = random.permutation(questions).tolist()

    def build(units: int, number: int) -> Sample:
        hay = " ".join(spread(essay(found, units, start), facts, depths))
        return make_sample(
            tokenizer,
            task="turns",
            context=f"Secret codes are hidden in the following text. Remember them.\n\n{hay}",
            question=f"\n\nWhat is the secret code of the {keys[number]}?",
            prefix=f"{'' if chat else chr(10)}The secret code of the {keys[number]} is",
            references=(values[number],),
            max_new_tokens=NEW_TOKENS,
            match="exact",
            stop=("\n",),
            chat=chat,
            meta={"tokens": tokens, "units": units, "depth": depths[number], "key": keys[number]},
        )

    longest = max(range(questions), key=lambda number: build(1, number).prompt_tokens)
    units = largest_fit(lambda count: build(count, longest), tokens).meta["units"]
    return SharedContext(questions=tuple(build(units, number) for number in order))


def shared_contexts(
    tokenizer: Any,
    tokens: int,
    *,
    count: int = 5,
    questions: int = 4,
    text: str | None = None,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[SharedContext]:
    """`count` shared contexts, each with a seed of its own made from `seed` and its number."""
    if count < 1:
        raise ArgumentError(f"count: got {count}, expected at least 1.")
    for number in range(count):
        random = np.random.default_rng([seed, tokens, number])
        yield shared_context(tokenizer, tokens, random, questions=questions, text=text, chat=chat)


@torch.no_grad()
def answer_turns(
    model: nn.Module,
    tokenizer: Any,
    shared: SharedContext,
    *,
    mode: str = "copy",
    prefill_chunk: int | None = None,
) -> list[Answer]:
    """An answer to each question, in order.

    Where the context is prefilled once, its time stands in every answer's `prefill_seconds`. Raises HostError when a
    cache cannot be cropped or copied; `mode="rerun"` needs neither."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if mode in ("rerun", "aware"):
        return [
            answer(model, tokenizer, sample, question_aware=mode == "aware", prefill_chunk=prefill_chunk)
            for sample in shared.questions
        ]
    running = prefill(model, shared.questions[0].context_ids, chunk=prefill_chunk)
    context, seconds = running.tokens, running.seconds
    answers = []
    for number, sample in enumerate(shared.questions):
        if mode == "crop" and number:
            _crop(running, context)
        turn = _copy(running, model) if mode == "copy" else running
        turn.seconds = 0.0
        feed(model, turn, sample.question_ids, chunk=prefill_chunk)
        answers.append(decode(model, tokenizer, sample, turn, False, seconds, question_seconds=turn.seconds))
        if mode == "conversation":
            _finish_turn(model, tokenizer, turn, answers[-1])
    return answers


def _finish_turn(model: nn.Module, tokenizer: Any, running: Running, said: Answer) -> None:
    """Puts the last token of an answer into the cache, which decoding leaves out for it has nothing to predict; not
    that of a stop string, which is no part of the answer."""
    ended = int(running.logits[-1].argmax()) in ending_ids(model, tokenizer)
    if said.new_tokens and not ended and tokenizer.decode(said.ids, skip_special_tokens=True) == said.text:
        feed(model, running, said.ids[None, -1:])


def _copy(running: Running, model: nn.Module) -> Running:
    try:
        return fork(running, model)
    except (TypeError, RuntimeError) as error:
        raise HostError(
            f"cache: {type(running.cache).__name__} cannot be copied ({error}); answer with mode='rerun'."
        ) from error


def _crop(running: Running, tokens: int) -> None:
    """Takes everything behind the first `tokens` off the cache."""
    cache = running.cache
    refusal = HostError(
        f"cache: {type(cache).__name__} cannot be cropped: it does not keep what it would have to go back to. Answer "
        "with mode='copy' or mode='rerun'."
    )
    if not getattr(cache, "is_croppable", False):
        raise refusal
    try:
        cache.crop(tokens - running.tokens)
    except RuntimeError as error:
        # A sliding layer says that it can be cropped until its window is full.
        raise refusal from error
    running.tokens = tokens
