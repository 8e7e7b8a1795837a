"""What a sentence does in a chain of thought: labels from a model that is asked, or from words alone.

Paper: Thought Anchors, arXiv 2506.19143, section on sentence categories (after Venhoff et al.). A labelling model gets
the numbered sentences and returns for each its functions and the earlier sentences that it depends on. The rules below
need no model; they read cue words, and are only as good as those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from headway.errors import ArgumentError
from headway.statistics import Measurement, bootstrap

#: Category -> what it is.
CATEGORIES: dict[str, str] = {
    "problem_setup": "states or rephrases what is given and asked",
    "plan_generation": "says what will be done next, or chooses an approach",
    "fact_retrieval": "recalls a formula, definition or fact without computing",
    "active_computation": "calculates, derives or substitutes",
    "result_consolidation": "gathers or summarises what was found",
    "uncertainty_management": "voices doubt, notices an error, goes back",
    "final_answer_emission": "states the final answer",
    "self_checking": "verifies an earlier step",
    "unknown": "none of these",
}

#: Cue words by category, in the order in which they are tried.
_CUES: tuple[tuple[str, str], ...] = (
    ("final_answer_emission", r"\\boxed|\b(final answer|the answer is|answer:)"),
    ("uncertainty_management", r"\b(wait|hmm|actually|not sure|mistake|wrong|maybe|perhaps|confus\w+)\b"),
    ("self_checking", r"\b(check|verify|verif\w+|double-check|confirm|make sure|sanity)\b"),
    ("plan_generation", r"\b(let me|let's|let us|i will|i'll|we can|we will|first,|next,|(i|we) need to|approach)"),
    ("result_consolidation", r"\b(so|therefore|thus|hence|in total|altogether|in summary|this means|which gives)\b"),
    ("active_computation", r"[=×÷]|\d\s*[-+*/^]\s*\d|\b(plus|minus|times|divided by|multiply|add|subtract|equals)\b"),
    ("fact_retrieval", r"\b(recall|remember|formula|definition|theorem|known|is called|by the)\b"),
    ("problem_setup", r"\b(the problem|the question|given|we have|asked|there are|find the|how many|how much)\b"),
)  # fmt: skip


@dataclass(frozen=True)
class Label:
    """The functions of a sentence, the first one leading, and the earlier sentences it needs."""

    categories: tuple[str, ...]
    depends_on: tuple[int, ...] = ()

    @property
    def category(self) -> str:
        return self.categories[0]


def rule_labels(sentences: Sequence[str]) -> list[Label]:
    """Labels from cue words; "unknown" where none is found. Dependencies are not guessed."""
    labels = []
    for sentence in sentences:
        found = [name for name, cue in _CUES if re.search(cue, sentence, re.IGNORECASE)]
        labels.append(Label(tuple(found[:2]) or ("unknown",)))
    return labels


def label_prompt(sentences: Sequence[str], *, problem: str = "") -> str:
    """The question to a labelling model: categories, numbered sentences, and the form of the reply."""
    kinds = "\n".join(f"- {name}: {what}" for name, what in CATEGORIES.items())
    numbered = "\n".join(f"[{i}] {' '.join(s.split())}" for i, s in enumerate(sentences))
    return (
        "Below is a solution written step by step, one numbered sentence per line. Give every sentence one or more of "
        "these functions, the main one first, and list the numbers of earlier sentences whose content it uses.\n\n"
        f"Functions:\n{kinds}\n\n{f'Problem: {problem}' if problem else ''}\n\nSentences:\n{numbered}\n\n"
        'Reply with JSON only: {"0": {"categories": ["problem_setup"], "depends_on": []}, "1": …}'
    )


def parse_labels(reply: str, count: int) -> list[Label]:
    """The labels of `count` sentences from a model's reply.

    Raises ArgumentError for a reply without JSON, a sentence without a label, a category that does not exist, and a
    dependency on itself or a later sentence."""
    start, stop = reply.find("{"), reply.rfind("}")
    try:
        data = json.loads(reply[start : stop + 1]) if 0 <= start < stop else None
    except json.JSONDecodeError:
        data = None
    if not isinstance(data, dict):
        raise ArgumentError(f"reply: got {reply[:60]!r}, expected one JSON object with an entry for each sentence.")
    labels = []
    for number in range(count):
        entry = data.get(str(number))
        if not isinstance(entry, dict) or not entry.get("categories"):
            raise ArgumentError(f"reply: got no categories for sentence {number} of {count}. Ask the model again.")
        names = tuple(str(name) for name in entry["categories"])
        strange = [name for name in names if name not in CATEGORIES]
        if strange:
            raise ArgumentError(
                f"reply: got category {strange[0]!r} for sentence {number}, expected one of {', '.join(CATEGORIES)}."
            )
        needs = tuple(sorted({int(j) for j in entry.get("depends_on", ())}))
        if any(not 0 <= j < number for j in needs):
            raise ArgumentError(f"reply: got sentence {number} depending on {list(needs)}, expected earlier sentences.")
        labels.append(Label(names, needs))
    return labels


def model_labels(sentences: Sequence[str], ask: Callable[[str], str], *, problem: str = "") -> list[Label]:
    """Labels from a model; `ask` takes the question and returns its reply."""
    return parse_labels(ask(label_prompt(sentences, problem=problem)), len(sentences))


def by_category(
    labels: Sequence[Label], values: Sequence[float], *, generator: np.random.Generator | int = 0
) -> dict[str, Measurement]:
    """The mean of a sentence score over the sentences of each leading category, with its interval. Sentences without a
    score (NaN) are left out; categories without any are too."""
    if len(labels) != len(values):
        raise ArgumentError(f"values: got {len(values)} for {len(labels)} sentences, expected one for each.")
    groups: dict[str, list[float]] = {}
    for label, value in zip(labels, values, strict=True):
        if np.isfinite(value):
            groups.setdefault(label.category, []).append(float(value))
    return {name: bootstrap(groups[name], generator=generator) for name in CATEGORIES if name in groups}
