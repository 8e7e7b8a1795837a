"""Questions over documents, made of the function descriptions in a documentation: one hop, and two.

A definition is a line `name(arguments)`, a blank line, and an indented description, as Python's documentation topics
have them. Its first sentence is the description that a question quotes; it must not hold the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from headway.errors import ArgumentError
from headway.tasks.ruler.setting import Setting
from headway.tasks.samples import Sample
from headway.tasks.words import draw, prose

#: Characters of a description: long enough to be the only one of its kind, short enough to be quoted.
DESCRIPTION = (40, 200)
#: Names shorter than this are found in too many answers by chance.
NAME = 4
LEAST_DEFINITIONS = 10
#: Sentences of running text in a document that only fills.
NOTE = 3
#: Words of a document that only fills the last tokens, at most.
LONGEST = 200


@dataclass(frozen=True)
class Definition:
    """A function or method: its dotted name and the first sentence of its description."""

    name: str
    description: str

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]


def definitions(documentation: str) -> list[Definition]:
    """Every definition with a usable description, each name and each description once."""
    shortest, longest = DESCRIPTION
    found: dict[str, Definition] = {}
    pattern = r"(?m)^(?:class |classmethod |static |coroutine )?([A-Za-z_][\w.]*)\([^\n]*\)\n\n((?:   [^\n]*\n)+)"
    for match in re.finditer(pattern, documentation + "\n"):
        sentence = re.split(r"(?<=[.])\s+(?=[A-Z\"“])", " ".join(match[2].split()))[0]
        one = Definition(match[1], sentence)
        usable = shortest <= len(sentence) <= longest and sentence.endswith(".") and len(one.short.strip("_")) >= NAME
        if usable and one.short.strip("_").lower() not in sentence.lower():
            found.setdefault(one.short, one)
    unique = list({one.description: one for one in found.values()}.values())
    if len(unique) < LEAST_DEFINITIONS:
        raise ArgumentError(
            f"documentation: got a text with {len(unique)} function descriptions, expected at least "
            f"{LEAST_DEFINITIONS}. Pass Python's documentation topics: documentation=headway.hosts.default_text().text"
        )
    return unique


def one_hop(setting: Setting) -> Sample:
    """Among documents that describe functions: which one is described in these words?"""
    order = _shuffled(setting)
    documents = [_describe(one) for one in order]
    return _ask(
        setting,
        documents[:1],
        documents[1:],
        _question(order[0], "Which function is described like this?"),
        "The name of the function is",
        order[0].short,
        order[0],
    )


def two_hops(setting: Setting) -> Sample:
    """Every function is kept on an invented shelf, said in a document of its own: on which shelf is the one that is
    described in these words? An answered question about another function stands behind the documents."""
    order = _shuffled(setting)
    shelves = draw("word", setting.random, len(order))
    pairs = [(_describe(one), _shelve(one, shelf)) for one, shelf in zip(order, shelves, strict=True)]
    question, prefix = "On which shelf is the function that is described like this?", "The name of the function is"
    shown = f"{prefix} {order[1].name}. {order[1].name} is kept on the shelf {shelves[1]}."
    return _ask(
        setting,
        [*pairs[0], *pairs[1]],
        [document for pair in pairs[2:] for document in pair],
        _question(order[0], question),
        prefix,
        shelves[0],
        order[0],
        example=f"\n\n{_question(order[1], question)}\n{shown}",
    )


def _shuffled(setting: Setting) -> list[Definition]:
    known = definitions(setting.documentation)
    return [known[i] for i in setting.random.permutation(len(known))]


def _describe(one: Definition) -> str:
    """The name stands behind the description, as it does in the answer."""
    return f"{one.description} The name of the function is {one.name}."


def _shelve(one: Definition, shelf: str) -> str:
    return f"Where things are: {one.name} is kept on the shelf {shelf}."


def _question(one: Definition, question: str) -> str:
    return f"{question} {one.description}"


def _ask(
    setting: Setting,
    gold: list[str],
    documents: list[str],
    question: str,
    prefix: str,
    reference: str,
    wanted: Definition,
    *,
    example: str = "",
) -> Sample:
    """The gold documents at random places among others; running text of the setting where those are used up, and the
    beginning of some to fill the last tokens."""
    seed = int(setting.random.integers(2**31))
    found = [s for s in prose(setting.text) if wanted.description not in s and reference not in s]
    notes = [" ".join(found[i : i + NOTE]) for i in range(0, len(found), NOTE)]
    notes = [notes[i] for i in np.random.default_rng([seed, 0]).permutation(len(notes))]
    distractors = [*documents, *notes]
    places = np.random.default_rng([seed, 1]).random(len(gold))
    rest = " ".join(found).split()[:LONGEST]

    def build(units: int, *, words: int) -> Sample:
        listed = [distractors[i % len(distractors)] for i in range(units)]
        listed += [" ".join(rest[:words])] if words else []
        mixed = [listed[i] for i in np.random.default_rng([seed, 2]).permutation(len(listed))]
        for document, place in zip(gold, places, strict=True):
            mixed.insert(int(place * (len(mixed) + 1)), document)
        numbered = "\n\n".join(f"Document {number}: {document}" for number, document in enumerate(mixed, 1))
        return setting.sample(
            f"Answer the question about these documents.\n\n{numbered}{example}",
            question,
            prefix,
            [reference],
            documents=len(mixed),
            name=wanted.name,
            units=units,
        )

    return setting.fill(build)
