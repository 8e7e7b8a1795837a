"""RULER-like tasks: thirteen generated questions on a context of any length, scored by the strings an answer holds.

After Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, arXiv 2404.06654. Tasks,
parameters, answer budgets and scoring are the paper's; the material is not, so that everything is made offline, and
scores are comparable with dense attention in the same run, not with published RULER numbers:

- essays are the running sentences of the text that is passed in;
- questions with distractor documents (SQuAD, HotpotQA there) are made of function descriptions in Python's
  documentation: `qa_1` asks for the name that belongs to a description, `qa_2` needs a second document that says on
  which (invented) shelf that name is kept;
- prompts are worded anew, and the length grows until prompt and answer budget fill the given number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from headway.errors import ArgumentError, unknown
from headway.tasks.ruler import needles, questions, tracing
from headway.tasks.ruler.setting import DEPTHS, Setting
from headway.tasks.samples import Sample

__all__ = ["DEPTHS", "RULER", "RulerTask", "Setting", "ruler_sample", "ruler_samples"]


@dataclass(frozen=True)
class RulerTask:
    """A task by name: what it plants and asks, and its answer budget in tokens."""

    name: str
    summary: str
    max_new_tokens: int
    match: str
    build: Callable[[Setting], Sample]


def _needles(name: str, summary: str, **parameters: Any) -> RulerTask:
    return RulerTask(name, summary, 128, "all", partial(needles.needle_task, **parameters))


RULER: Mapping[str, RulerTask] = {
    task.name: task
    for task in (
        _needles("niah_single_1", "one number in repeated filler", haystack="filler"),
        _needles("niah_single_2", "one number in an essay", haystack="essay"),
        _needles("niah_single_3", "one UUID in an essay", haystack="essay", value="uuid"),
        _needles("niah_multikey_1", "one of four numbers in an essay", haystack="essay", keys=4),
        _needles("niah_multikey_2", "one number among numbers only", haystack="needles"),
        _needles(
            "niah_multikey_3", "one UUID of a UUID among UUIDs only", haystack="needles", key="uuid", value="uuid"
        ),
        _needles("niah_multivalue", "four numbers of one key in an essay", haystack="essay", values=4),
        _needles("niah_multiquery", "the numbers of four keys in an essay", haystack="essay", keys=4, asked=4),
        RulerTask("vt", "the variables of a chain of four assignments", 30, "all", tracing.variable_tracking),
        RulerTask("cwe", "the ten most common words of a list", 120, "all", tracing.common_words),
        RulerTask("fwe", "the three most frequent coded words", 50, "all", tracing.frequent_words),
        RulerTask("qa_1", "the name that belongs to a description, among documents", 32, "any", questions.one_hop),
        RulerTask("qa_2", "a fact about the name that belongs to a description", 32, "any", questions.two_hops),
    )
}


def ruler_sample(
    task: str,
    tokenizer: Any,
    tokens: int,
    random: np.random.Generator,
    *,
    text: str,
    documentation: str | None = None,
    depth: float | None = None,
    chat: bool = False,
) -> Sample:
    """One sample of a task whose prompt and answer budget fill `tokens`.

    `text` is the essay; `documentation` the text that functions are described in (`text` for None), as
    `headway.hosts.default_text()` has it. `depth` places a single needle (drawn from DEPTHS for None). Raises
    ArgumentError with the least number of tokens where `tokens` are too few."""
    if task not in RULER:
        raise unknown("task", task, RULER)
    chosen = RULER[task]
    if depth is not None and not 0 <= depth <= 100:
        raise ArgumentError(f"depth: got {depth}, expected a percentage between 0 and 100.")
    setting = Setting(
        task=task,
        tokenizer=tokenizer,
        tokens=tokens,
        random=random,
        text=text,
        documentation=text if documentation is None else documentation,
        depth=depth,
        chat=chat,
        max_new_tokens=chosen.max_new_tokens,
        match=chosen.match,
    )
    return chosen.build(setting)


def ruler_samples(
    tokenizer: Any,
    tokens: int,
    *,
    text: str,
    documentation: str | None = None,
    tasks: Sequence[str] | None = None,
    count: int = 1,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[Sample]:
    """`count` samples of each task (all thirteen for None), each with a seed of its own."""
    names = list(RULER) if tasks is None else list(tasks)
    for name in names:
        if name not in RULER:
            raise unknown("tasks", name, RULER)
    if count < 1:
        raise ArgumentError(f"count: got {count}, expected at least 1.")
    for name in names:
        for number in range(count):
            random = np.random.default_rng([seed, list(RULER).index(name), tokens, number])
            yield ruler_sample(name, tokenizer, tokens, random, text=text, documentation=documentation, chat=chat)
