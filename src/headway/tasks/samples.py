"""What a text task hands to a model: a long context, a question about it, and the strings a right answer holds.

A sample's tokens are made once, in two pieces, so that two modes read the same tokens:

    question-aware   [context question]              prefilled together: a method may see what will be asked
    question-blind   [context] then [question]       the method has to decide on the context alone

Scores are of strings. `all` and `any` are those of RULER (Hsieh et al., arXiv 2404.06654), case-insensitive inclusion:
the share of the references found, or 1 when one of them is found. `exact` wants the first word of the answer (the first
with a digit where the reference has one), without marks around it, to be the reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.errors import ArgumentError, unknown

MATCHES = ("all", "any", "exact")
#: Stands for the user's message while a chat template is cut in two; no text holds it.
PLACE = "\ue000"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One question on one context.

    `question_ids` follow `context_ids` and end with the answer prefix, so that the next token begins the answer.
    `match` says how `references` are looked for; decoding may end at any of the `stop` strings. `context`, `question`
    and `prefix` are the texts before a chat template, `meta` what the task planted (length, depth, seed, …)."""

    task: str
    context_ids: Int[Tensor, "1 context"]
    question_ids: Int[Tensor, "1 question"]
    references: tuple[str, ...]
    max_new_tokens: int
    match: str = "all"
    stop: tuple[str, ...] = ()
    context: str = ""
    question: str = ""
    prefix: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.match not in MATCHES:
            raise unknown("match", self.match, MATCHES)
        if not self.references or not all(self.references):
            raise ArgumentError(
                f"references: got {self.references!r}, expected at least one string, none of them empty."
            )
        for name in ("context_ids", "question_ids"):
            ids = getattr(self, name)
            if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
                raise ArgumentError(
                    f"{name}: got shape {tuple(ids.shape)}, expected (1, tokens) with at least one token."
                )
        if self.max_new_tokens < 1:
            raise ArgumentError(f"max_new_tokens: got {self.max_new_tokens}, expected at least 1.")

    @property
    def prompt_ids(self) -> Int[Tensor, "1 prompt"]:
        return torch.cat([self.context_ids, self.question_ids], 1)

    @property
    def prompt_tokens(self) -> int:
        return self.context_ids.shape[1] + self.question_ids.shape[1]

    def score(self, text: str) -> float:
        """Between 0 and 1, for an answer's text."""
        if self.match == "exact":
            wanted = self.references[0]
            return float(first_word(text, digit=any(map(str.isdigit, wanted))).lower() == wanted.lower())
        found = [reference.lower() in text.lower() for reference in self.references]
        return float(any(found)) if self.match == "any" else sum(found) / len(found)

    def settled(self, text: str) -> bool:
        """Whether no further token can change the score: what is found stays found."""
        return self.match != "exact" and self.score(text) == 1.0


def first_word(text: str, *, digit: bool = False) -> str:
    """The first run of letters, digits, hyphens and underscores; with `digit`, the first that holds a digit."""
    words = (word.strip("-") for word in re.findall(r"[\w-]+", text))
    return next((word for word in words if word and (not digit or any(map(str.isdigit, word)))), "")


def make_sample(
    tokenizer: Any,
    *,
    task: str,
    context: str,
    question: str,
    prefix: str = "",
    references: tuple[str, ...],
    max_new_tokens: int,
    match: str = "all",
    stop: tuple[str, ...] = (),
    chat: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> Sample:
    """Tokens of context + question + prefix, as running text or (`chat=True`) in the tokenizer's chat template.

    In the template context and question are the user's message, and the answer prefix begins the assistant's. Context
    and the rest are tokenized apart. Raises ArgumentError for chat without a template."""
    before, after = chat_frame(tokenizer) if chat else ("", "")
    opening = [] if chat else opening_ids(tokenizer)
    return Sample(
        task=task,
        context_ids=torch.tensor([opening + plain_ids(tokenizer, before + context)]),
        question_ids=torch.tensor([plain_ids(tokenizer, question + after + prefix)]),
        references=references,
        max_new_tokens=max_new_tokens,
        match=match,
        stop=stop,
        context=context,
        question=question,
        prefix=prefix,
        meta={**(meta or {}), "chat": chat},
    )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without those a tokenizer would put around it. Template marks in the text still count."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def opening_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text (none, or BOS)."""
    plain, full = plain_ids(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    return full[: full.index(plain[0])] if plain and plain[0] in full else []


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before a user's message and between it and the assistant's answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            f"chat: got True for a {type(tokenizer).__name__} without a chat template; pass chat=False, or use an "
            "instruction-tuned model."
        )
    message = [{"role": "user", "content": PLACE}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(PLACE)
    if not found:
        raise ArgumentError("chat: the chat template leaves the user's message out, expected it in the text.")
    return before, after


def largest_fit(build: Callable[[int], Sample], tokens: int, *, least: int = 1) -> Sample:
    """The sample with the most filler whose prompt and answer budget fit into `tokens`.

    `build(n)` makes a sample with n units of filler; more units are never fewer tokens. Raises ArgumentError with the
    number of tokens that `least` units need when even those do not fit."""

    def fits(sample: Sample) -> bool:
        return sample.prompt_tokens + sample.max_new_tokens <= tokens

    best = build(least)
    if not fits(best):
        raise ArgumentError(
            f"tokens: got {tokens:,} for {best.task}, expected at least "
            f"{best.prompt_tokens + best.max_new_tokens:,} ({best.prompt_tokens:,} of the shortest prompt and "
            f"{best.max_new_tokens} for the answer). Ask for more tokens."
        )
    low, high = least, max(2 * least, least + 1)
    while fits(trial := build(high)):
        if trial.prompt_tokens == best.prompt_tokens:
            return trial
        low, best, high = high, trial, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(trial := build(middle)):
            low, best = middle, trial
        else:
            high = middle
    return best
