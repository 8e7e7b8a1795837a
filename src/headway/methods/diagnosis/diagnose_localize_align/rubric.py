"""Rubrics: what a good turn of a role looks like in four dimensions, on a scale from 1 to 5.

    GA   goal alignment                 works on the task that was given
    RC   role consistency               speaks and acts as its role
    KBA  knowledge-boundary adherence   stays within what the role may know and say
    CC   constraint compliance          obeys the rules it was given

5 is flawless, 3 adequate, 1 critically flawed. Rubrics of eight roles come with Headway; others are written once by a
judge (`generate_rubric`) and kept by the user.

Paper: Diagnose, Localize, Align, arXiv 2509.23188 (CRAS). The released code falls back to a general rubric for a role
that has none, or whose name is longer than 15 characters, which is kept here and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from headway.errors import ArgumentError

DIMENSIONS = {
    "GA": "goal alignment",
    "RC": "role consistency",
    "KBA": "knowledge-boundary adherence",
    "CC": "constraint compliance",
}
LOWEST, HIGHEST, ORDINARY = 1.0, 5.0, 3.0
GENERAL = "general"
#: Longer role names get the general rubric, as in the released code: they are prompts, not names.
LONGEST_NAME = 15
#: Further answers that are asked for when one cannot be read.
RETRIES = 2

Ask = Callable[[str], str]

#: By role, what a flawless turn does in each dimension.
_IDEALS = {
    GENERAL: (
        "moves the given task forward and answers what was asked",
        "speaks and acts as the role it was given, and leaves other roles their part",
        "claims only what the role can know, and says where its knowledge ends",
        "obeys every rule on form, content and order that it was given",
    ),
    "assistant": (
        "answers the question of the user completely and correctly",
        "is helpful and polite throughout, and does not take the part of the user",
        "tells apart what it knows from what it assumes, and invents no source",
        "keeps to the format, language and limits that were set",
    ),
    "user_proxy": (
        "passes on the wish of the user unchanged and checks results against it",
        "stands for the user: asks, runs and confirms, and does not solve the task itself",
        "adds no expert knowledge that the user did not give",
        "uses the agreed commands and ends the exchange when the agreed sign is given",
    ),
    "programmer": (
        "delivers code that solves the stated problem, edge cases included",
        "argues with code, tests and errors, as an engineer does",
        "uses only interfaces that exist and says what was not run",
        "keeps to the language, signature and format that were asked for",
    ),
    "aggregator": (
        "joins the contributions of the others into one answer to the question",
        "weighs what the others said, fairly, and adds no solution of its own",
        "states nothing that no contribution supports, and names disagreement",
        "gives the final answer once, in the form that was asked for",
    ),
    "physicist": (
        "brings the problem to a physical result with its unit",
        "reasons from laws, models and orders of magnitude",
        "names its approximations and stays within physics",
        "keeps to the asked form, units and precision",
    ),
    "mathematician": (
        "derives the asked result step by step",
        "argues by definitions, theorems and proof",
        "marks what is proved and what is conjectured, and stays within mathematics",
        "keeps to the asked notation and form of the answer",
    ),
    "logician": (
        "reaches the asked conclusion from the given premises",
        "argues by explicit rules of inference and names fallacies",
        "uses no premise that was not given",
        "keeps to the asked form of argument and answer",
    ),
}
_LEVELS = {
    "5": "Always {ideal}.",
    "4": "Nearly always {ideal}; one small lapse.",
    "3": "By and large {ideal}, with lapses that cost something.",
    "2": "Seldom {ideal}; the turn is of little use.",
    "1": "Does the opposite: a turn that a colleague would have to undo. Expected: {ideal}.",
}


@dataclass(frozen=True)
class Rubric:
    """`levels` maps a dimension to what each mark, "1" to "5", means; marks between may be left out."""

    role: str
    levels: Mapping[str, Mapping[str, str]]

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            given = self.levels.get(name)
            if not isinstance(given, Mapping) or not {"1", "5"} <= set(given):
                raise ArgumentError(
                    f"levels of role {self.role!r}: got {given!r} for {name}, expected texts for the marks 1 and 5."
                )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rubric:
        """From `{"role": …, "rubric": {"GA": {"1": …, "5": …}, …}}`, the form that judges write."""
        levels = data.get("rubric")
        if not isinstance(levels, Mapping):
            raise ArgumentError(f"rubric: got {type(levels).__name__}, expected a dictionary by dimension.")
        texts = {d: {str(k): str(v) for k, v in dict(m).items()} for d, m in levels.items() if isinstance(m, Mapping)}
        return cls(str(data.get("role", GENERAL)), texts)

    def to_dict(self) -> dict[str, Any]:
        return {"role": self.role, "rubric": {name: dict(marks) for name, marks in self.levels.items()}}

    def text(self, dimension: str | None = None) -> str:
        """The rubric, or one dimension of it, for a prompt."""
        names = DIMENSIONS if dimension is None else {dimension: DIMENSIONS[dimension]}
        lines = []
        for name, words in names.items():
            lines.append(f"{name} ({words})")
            lines += [f"  {mark}: {text}" for mark, text in sorted(self.levels[name].items(), reverse=True)]
        return "\n".join(lines)


def shipped_rubrics() -> dict[str, Rubric]:
    """The rubrics that come with Headway, by role."""
    return {
        role: Rubric(
            role,
            {
                dimension: {mark: words.format(ideal=ideal) for mark, words in _LEVELS.items()}
                for dimension, ideal in zip(DIMENSIONS, ideals, strict=True)
            },
        )
        for role, ideals in _IDEALS.items()
    }


def rubric_for(role: str, rubrics: Mapping[str, Rubric] | None = None) -> tuple[Rubric, bool]:
    """The rubric of a role, and whether it is the general one for want of its own."""
    known = shipped_rubrics() if rubrics is None else rubrics
    name = role.strip().lower().replace(" ", "_").replace("-", "_")
    if name in known and len(name) <= LONGEST_NAME:
        return known[name], False
    if GENERAL not in known:
        raise ArgumentError(f"rubrics: got none for {role!r} and no {GENERAL!r} one, expected either.")
    return known[GENERAL], name != GENERAL


def generate_rubric(role: str, ask: Ask, *, description: str = "", retries: int = RETRIES) -> Rubric:
    """A rubric for a role, written by a judge: `ask(prompt)` gives its answer. Temperature 0.3 and 3,054 new tokens are
    the released settings. Raises ArgumentError when no answer can be read after `retries` further tries."""
    prompt = rubric_prompt(role, description)
    trouble = ""
    for _ in range(retries + 1):
        try:
            return Rubric.from_dict({"role": role, **json_object(ask(prompt))})
        except (ValueError, TypeError) as error:
            trouble = str(error)
    raise ArgumentError(
        f"ask: got {retries + 1} answers without a rubric for {role!r} (the last: {trouble}), expected the JSON object "
        "that the prompt asks for. Try a stronger judge, or write the rubric by hand."
    )


def rubric_prompt(role: str, description: str = "") -> str:
    """What a judge is asked for to write a rubric."""
    dimensions = "\n".join(f"- {name}: {words}" for name, words in DIMENSIONS.items())
    shape = json.dumps({"role": role, "rubric": {name: {"1": "…", "3": "…", "5": "…"} for name in DIMENSIONS}})
    about = f"\nThe role is described so: {description}" if description else ""
    return (
        f"Write a marking rubric for turns of the role {role!r} in a team of language-model agents.{about}\n"
        f"Mark these dimensions from 1 to 5, where 5 is flawless, 3 adequate and 1 critically flawed:\n{dimensions}\n"
        "Say for each mark what is seen in the turn, so that two people would give the same mark.\n"
        f"Answer with one JSON object of this form and nothing else:\n{shape}"
    )


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in an answer: in a fenced block, else from the first brace to the last. Raises ValueError."""
    fenced = re.search(r"```(?:json)?\s*(\{.*?\})\s*```", text, flags=re.DOTALL)
    start, stop = text.find("{"), text.rfind("}")
    body = fenced[1] if fenced else text[start : stop + 1] if 0 <= start < stop else ""
    if not body:
        raise ValueError("no JSON object")
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError(f"JSON of type {type(found).__name__}")
    return found
