"""Needle in a haystack: one planted value, asked for at the end, over a grid of lengths × depths.

    haystack … "The secret code of the <key> is <value>." … haystack,  question: the secret code of the <key>?

The primary score is exact match: the first word of the greedy answer is the planted value. Beside it stands a graded
score for models too small to answer well: the value is given to the model (teacher-forced) after the answer prefix, and

    value nll = −(1/m) Σ_i ln p(v_i | …, v_<i)        rank-1 rate = (1/m) Σ_i 1[v_i is the most likely token]

Depth 0 puts the needle first, 100 last. Pass-key retrieval is the haystack `"filler"` (Mohtashami & Jaggi, arXiv
2305.16300); sentences of a real text make the haystack harder. Released benchmarks score ROUGE against the needle
sentence, which rewards its wording; here nothing but the value counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.tasks.answering import Running, feed, forward, prefill
from headway.tasks.perplexity import negative_log_likelihood
from headway.tasks.samples import Sample, largest_fit, make_sample, plain_ids
from headway.tasks.words import FILLER, NOUNS, draw, essay, pick, prose, spread

NEW_TOKENS = 16
#: Depths of the grid, per cent: both ends and nine in between.
DEPTHS = tuple(range(0, 101, 10))
DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class PlantedScore:
    """How surely a model gives the planted value: nll in nats and rank 1 of each of its tokens."""

    nll: Float[Tensor, " value"]
    rank_one: Bool[Tensor, " value"]
    sample: Sample

    @property
    def mean_nll(self) -> float:
        return float(self.nll.mean())

    @property
    def rank_one_rate(self) -> float:
        return float(self.rank_one.double().mean())


def needle_sample(
    tokenizer: Any,
    tokens: int,
    depth: float,
    random: np.random.Generator,
    *,
    text: str | None = None,
    digits: int = DIGITS,
    chat: bool = False,
) -> Sample:
    """One needle at `depth` per cent of a haystack that fills `tokens` (prompt and answer budget together).

    The haystack is repeated filler, or the sentences of `text` from a random one on."""
    key = pick(random, NOUNS, 1)[0]
    value = draw("number", random, 1, digits=digits)[0]
    found = list(FILLER) if text is None else prose(text)
    start = 0 if text is None else int(random.integers(len(found)))
    needle = f"The secret code of the {key} is {value}."

    def build(units: int) -> Sample:
        hay = " ".join(spread(essay(found, units, start), [needle], [depth]))
        return make_sample(
            tokenizer,
            task="needle",
            context=f"A secret code is hidden in the following text. Remember it.\n\n{hay}",
            question=f"\n\nWhat is the secret code of the {key}?",
            prefix=f"{'' if chat else chr(10)}The secret code of the {key} is",
            references=(value,),
            max_new_tokens=NEW_TOKENS,
            match="exact",
            stop=("\n",),
            chat=chat,
            meta={"tokens": tokens, "depth": depth, "key": key, "needle": needle, "haystack": _kind(text)},
        )

    return largest_fit(build, tokens)


def needle_grid(
    tokenizer: Any,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    text: str | None = None,
    repeats: int = 1,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[Sample]:
    """Samples of every length at every depth, `repeats` of each. Each has a seed of its own, so that a grid with more
    lengths, depths or repeats holds the samples of the smaller one."""
    if not lengths or not depths or repeats < 1:
        raise ArgumentError(
            f"lengths, depths, repeats: got {list(lengths)}, {list(depths)}, {repeats}; expected at least one of each."
        )
    for length in lengths:
        for depth in depths:
            for repeat in range(repeats):
                random = np.random.default_rng([seed, length, round(depth * 1000), repeat])
                yield needle_sample(tokenizer, length, depth, random, text=text, chat=chat)


@torch.no_grad()
def planted_score(
    model: nn.Module,
    tokenizer: Any,
    sample: Sample,
    *,
    question_aware: bool,
    prefill_chunk: int | None = None,
) -> PlantedScore:
    """Teacher-forced score of the first reference of any sample, token by token after its prompt.

    The value is fed one token at a time, so that methods act as they do in decoding."""
    running: Running = prefill(model, sample.prompt_ids if question_aware else sample.context_ids, chunk=prefill_chunk)
    if not question_aware:
        feed(model, running, sample.question_ids, chunk=prefill_chunk)
    return score_planted(model, tokenizer, sample, running)


@torch.no_grad()
def score_planted(model: nn.Module, tokenizer: Any, sample: Sample, running: Running) -> PlantedScore:
    """The score from a request whose last fed token is that before the answer; its cache goes on with the value."""
    value = torch.tensor(value_ids(tokenizer, sample))
    rows, cache = [running.logits[-1:]], running.cache
    for token in value[:-1]:
        logits, cache = forward(model, token.view(1, 1), cache, keep=1)
        rows.append(logits)
    logits = torch.cat(rows)
    return PlantedScore(
        nll=negative_log_likelihood(logits, value), rank_one=(logits.argmax(-1).cpu() == value), sample=sample
    )


def value_ids(tokenizer: Any, sample: Sample) -> list[int]:
    """The tokens of the first reference as they stand behind the sample's prompt (with a space where one belongs)."""
    prompt = sample.prefix
    glue = "" if prompt[-1:] in ('"', " ", "\n", "") else " "
    return plain_ids(tokenizer, glue + sample.references[0])


def _kind(text: str | None) -> str:
    return "filler" if text is None else "text"
