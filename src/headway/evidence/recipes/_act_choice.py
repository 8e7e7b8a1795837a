"""ACT on multiple choice: later sinks counted, heads searched on some questions, and judged on the others.

Every function takes a `Part` and plain values and gives plain values, so that parts of the work can run in processes of
their own; what they share (the model, the questions, the baseline) is made once in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from headway.door import observe, use
from headway.methods.sinks.act import (
    ACT,
    ChoiceScore,
    HiddenSinks,
    candidate_heads,
    search_heads,
    split_items,
    warn_if_same,
)
from headway.tasks.choice import TASKS, Question, make_questions

Head = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Which model, and which questions: so many per task, a share of them for the search."""

    size: str
    seed: int
    per_task: int
    share: float


@lru_cache(maxsize=1)
def host(size: str) -> tuple[Any, Any]:
    """Model and tokenizer of a size."""
    if size == "smoke":
        from headway.hosts.tiny import tiny_host

        return tiny_host("llama", max_position_embeddings=512)[0], _Characters()
    from headway.hosts import load

    if size == "full":
        return load("meta-llama/Llama-2-7b-chat-hf", device="cuda", dtype="bfloat16")
    return load("smollm2")


def questions(part: Part) -> tuple[list[Question], list[Question]]:
    """Those for the search and those held out, in the same shares of every task."""
    from headway.hosts import default_text

    tasks = ("place",) if part.size == "smoke" else TASKS
    text = default_text().text
    search: list[Question] = []
    held: list[Question] = []
    for task in tasks:
        items = make_questions(task, part.per_task, seed=part.seed, text=text)
        first, second = split_items(len(items), share=part.share)
        search += [items[i] for i in first]
        held += [items[i] for i in second]
    warn_if_same(search, held)
    return search, held


def later_sinks(part: Part) -> dict[str, Any]:
    """Heads that may be tried, those with most attention on later sinks first, and how common these sinks are: by
    prompt whether some head has one, by head the share of prompts where it has."""
    model, tokenizer = host(part.size)
    score = ChoiceScore(model, tokenizer, questions(part)[0])
    few = len(score.forms) <= 4
    heads = candidate_heads(model, skip_first=0 if few else 2, skip_last=0 if few else 1)
    sinks = HiddenSinks()
    with observe(model, sinks):
        score(None)
    reached = sinks.result()
    table = np.array([[count > 0 for count, _ in values] for values in reached.values()])
    masses = {head: float(np.mean([share for _, share in reached[head]])) for head in heads}
    return {
        "model": type(model).__name__,
        "heads": sorted(heads, key=lambda head: -masses[head]),
        "with_sinks": sum(mass > 0 for mass in masses.values()),
        "prompts": table.any(0),
        "by_head": table.mean(1),
        "share": float(table.mean()),
    }


def gains_of(part: Part, heads: Sequence[Head]) -> dict[str, Any]:
    """What each of some heads gains on the questions of the search, by task."""
    score, baseline = _searched(part)
    found = search_heads(lambda stage: baseline if stage is None else score(stage), heads)
    return {"baseline": found.baseline, "gains": [[head, found.gains[head]] for head in heads]}


def judged(part: Part, heads: Sequence[Head] | None) -> dict[str, Any]:
    """Held-out questions with some heads calibrated, or without ACT: right or wrong, and the right option's
    probability."""
    choices = _held(part).choices(None if heads is None else ACT(heads=heads))
    return {"correct": choices.correct, "probability": choices.probability}


def first_token_losses(size: str, tokens: int, block: int, seed: int) -> dict[str, Any]:
    """The loss of a text with the attention to the first token scaled by β in all candidate heads, and without, as
    means over blocks of tokens."""
    from headway.hosts import default_text, tokenize
    from headway.tasks.perplexity import perplexity

    model, tokenizer = host(size)
    if size == "smoke":
        ids = torch.randint(8, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))
        heads = candidate_heads(model, skip_first=0, skip_last=0)
    else:
        ids, heads = tokenize(tokenizer, default_text(), tokens).to(model.device), candidate_heads(model)
    act = ACT(heads=heads, candidates=(0,), initial="none", scope="causal")
    found = {}
    for name, stages in (("dense", ()), ("calibrated", (act,))):
        with use(model, *stages):
            found[name] = perplexity(model, ids, chunk=tokens).block_means(block).numpy()
    return found


@lru_cache(maxsize=1)
def _searched(part: Part) -> tuple[ChoiceScore, dict[str, np.ndarray]]:
    """The score on the questions of the search, with what its trials share, and its baseline."""
    model, tokenizer = host(part.size)
    score = ChoiceScore(model, tokenizer, questions(part)[0])
    return score, score(None)


@lru_cache(maxsize=1)
def _held(part: Part) -> ChoiceScore:
    model, tokenizer = host(part.size)
    return ChoiceScore(model, tokenizer, questions(part)[1])


class _Characters:
    """A tokenizer of letters, for a host without one."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [8 + ord(letter) % 90 for letter in text]}
