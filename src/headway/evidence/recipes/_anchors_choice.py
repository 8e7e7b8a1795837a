"""A real model's free choice: a short problem in which one sentence picks a number and the rest follows from it.

    "I pick the number 6. One more than 6 is 7. So the answer is 7."

A model that has seen a few such lines picks a number of its own and works the rest out, so what decides the answer is
known: drawing the first sentence anew changes it, drawing the others anew does not. The gate is that the model does
both, pick freely and follow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import at_least, interval_excludes
from headway.evidence.recipe import Context
from headway.evidence.recipes._anchors_scripted import words_trace
from headway.methods.diagnosis import thought_anchors as method
from headway.statistics import Measurement, bootstrap, bootstrap_difference

#: Lines that show the form, and those that are measured; none is shown.
SHOWN, MEASURED = (3, 8, 5, 2), (6, 4, 7)
PROMPT = "Every line picks a number and adds one to it.\n"
ANSWER, PICK = r"answer is (\d+)", r"number (\d+)"

CRITERIA = {
    "choice-decides-in-smollm2": interval_excludes(
        0.0,
        side="above",
        minimum_n=3,
        label="resampling importance of the choice above the largest of the sentences that follow, nats",
        requires=(
            at_least(0.8, of="follows", by="value", label="share of rollouts whose answer follows from their choice"),
            at_least(0.3, of="free", by="value", label="share of rollouts that choose another number"),
        ),
    )
}


def sentences(number: int) -> list[str]:
    return [
        f"I pick the number {number}. ",
        f"One more than {number} is {number + 1}. ",
        f"So the answer is {number + 1}.",
    ]


def prompt() -> str:
    """Lines that show the form, and the start of another."""
    shown = "".join(f"Line: {''.join(sentences(number))}\n" for number in SHOWN)
    return f"{PROMPT}{shown}Line: "


def choices(
    tokenizer: Any, sampler: method.Sampler, rollouts: int, numbers: Sequence[int] = MEASURED
) -> dict[str, Any]:
    """By trace the resampling importance of its three sentences; by rollout of the whole line whether its answer
    follows from its choice and whether it chooses another number. Without a tokenizer words are tokens."""
    extract = method.pattern_answer(ANSWER, which="first")
    found: dict[str, Any] = {"importance": [], "follows": [], "free": [], "lines": []}
    for place, number in enumerate(numbers):
        own = sentences(number)
        if tokenizer is None:
            trace = words_trace(prompt(), own, str(number + 1))
        else:
            trace = method.read_trace(
                "".join(own), tokenizer, prompt=prompt(), sentences=[s.strip() for s in own], answer=str(number + 1)
            )
        drawn = method.collect(trace, sampler, rollouts=rollouts, batch=rollouts, seed=1000 * place)
        told = method.sentence_importance(trace, drawn, extract=extract, encoder=method.exact_encoder, generator=place)
        found["importance"].append([one.resampling.divergence.value for one in told])
        for line in (rollout.text for rollout in drawn[0]):
            pick, said = re.search(PICK, line), re.search(ANSWER, line)
            found["follows"].append(bool(pick and said) and int(said[1]) == int(pick[1]) + 1)  # type: ignore[index]
            found["free"].append(pick is None or int(pick[1]) != number)
        found["lines"].append(drawn[0][0].text)
    return found


def choice_claim(context: Context, found: dict[str, Any]) -> Claim:
    first = [row[0] for row in found["importance"]]
    rest = [max(row[1:]) for row in found["importance"]]
    return Claim(
        id="choice-decides-in-smollm2",
        statement="In a real model's lines, drawing the sentence that chooses anew changes the answer, drawing those "
        "that follow from it anew does not.",
        paper=PaperValue("planning and uncertainty sentences matter most", "100 rollouts each", "abstract"),
        measured=bootstrap_difference(first, rest, paired=True, generator=context.generator("choice")),
        baseline=bootstrap(rest, generator=context.generator("following")),
        criterion=CRITERIA["choice-decides-in-smollm2"],
        others={
            "follows": Measurement(float(np.mean(found["follows"])), n=len(found["follows"])),
            "free": Measurement(float(np.mean(found["free"])), n=len(found["free"])),
        },
        details={"importance": found["importance"], "lines": found["lines"]},
        notes="SmolLM2 samples at temperature 0.6 behind four lines of the same form. Half a count for each answer "
        "keeps the importance finite; a sentence without any effect has a little of it by chance. "
        "The first two lines were tried once, with 12 rollouts, after the criterion was written: 3.0 and 2.3 nats "
        "against 0.0 and 0.2; then lines and rollouts were cut to save time.",
    )
