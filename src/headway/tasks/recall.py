"""Key-value recall: a JSON object of random keys and values, and the value of one key asked for.

Nothing in the keys or values can be guessed, and every pair looks like every other: a method that drops the pair before
the question is known cannot answer. After the key-value retrieval of Liu et al., arXiv 2307.03172, which uses UUIDs.
The default, nouns with numbers of five digits, is what a small model can copy. Answered questions about other keys
stand behind the object, in the context, and show the form of the answer. The score is exact match.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headway.errors import ArgumentError, unknown
from headway.tasks.samples import Sample, largest_fit, make_sample
from headway.tasks.words import KINDS, NOUNS, draw, pick

NEW_TOKENS = {"word": 12, "number": 16, "uuid": 48}
#: Digits of a value of kind "number".
DIGITS = 5
DEMONSTRATIONS = 2


def recall_sample(
    tokenizer: Any,
    pairs: int,
    random: np.random.Generator,
    *,
    kind: str = "number",
    position: int | None = None,
    demonstrations: int = DEMONSTRATIONS,
    chat: bool = False,
) -> Sample:
    """An object of `pairs` pairs; `position` is the index of the pair that is asked for (drawn for None).

    Keys are nouns as long as they last, else adjective-noun pairs (UUIDs for kind "uuid"); values of the kind named."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if pairs < 1:
        raise ArgumentError(f"pairs: got {pairs}, expected at least 1.")
    if position is not None and not 0 <= position < pairs:
        raise ArgumentError(f"position: got {position}, expected 0..{pairs - 1} for {pairs} pairs.")
    asked = int(random.integers(pairs)) if position is None else position
    if not 0 <= demonstrations < pairs:
        raise ArgumentError(f"demonstrations: got {demonstrations}, expected 0..{pairs - 1} for {pairs} pairs.")
    keys, values = _draw(kind, pairs, random)
    shown = [i for i in random.permutation(pairs).tolist() if i != asked][:demonstrations]
    answered = [f'\n{_ask(keys[i])} The value of "{keys[i]}" is "{values[i]}".' for i in shown]
    lines = [f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True)]
    return make_sample(
        tokenizer,
        task="recall",
        context="Find the value of a key in this JSON object.\n\n{" + ",\n ".join(lines) + "}\n" + "".join(answered),
        question=f"\n{_ask(keys[asked])}",
        prefix=f'{"" if chat else " "}The value of "{keys[asked]}" is "',
        references=(values[asked],),
        max_new_tokens=NEW_TOKENS[kind],
        match="exact",
        stop=('"', "\n"),
        chat=chat,
        meta={"pairs": pairs, "position": asked, "kind": kind},
    )


def recall_of_length(
    tokenizer: Any,
    tokens: int,
    seed: int,
    *,
    number: int = 0,
    kind: str = "number",
    depth: float | None = None,
    chat: bool = False,
) -> Sample:
    """The object with the most pairs that fits into `tokens`, asked for the pair at `depth` per cent (drawn for None).
    Each `number` of a `seed` is an object of its own."""
    if depth is not None and not 0 <= depth <= 100:
        raise ArgumentError(f"depth: got {depth}, expected a percentage between 0 and 100.")

    def build(pairs: int) -> Sample:
        share = np.random.default_rng([seed, number, 1]).random() if depth is None else depth / 100
        position = min(int(share * pairs), pairs - 1)
        random = np.random.default_rng([seed, number, 0])
        return recall_sample(tokenizer, pairs, random, kind=kind, position=position, chat=chat)

    return largest_fit(build, tokens, least=DEMONSTRATIONS + 1)


def recall_samples(
    tokenizer: Any, tokens: int, *, count: int = 20, kind: str = "number", seed: int = 0, chat: bool = False
) -> Iterator[Sample]:
    """`count` objects that fill `tokens`, the numbers 0, 1, … of `seed`, at depths spread evenly from end to end."""
    if count < 1:
        raise ArgumentError(f"count: got {count}, expected at least 1.")
    for number in range(count):
        depth = 100 * (number + 0.5) / count
        yield recall_of_length(tokenizer, tokens, seed, number=number, kind=kind, depth=depth, chat=chat)


def _ask(key: str) -> str:
    return f'What is the value of "{key}"?'


def _draw(kind: str, pairs: int, random: np.random.Generator) -> tuple[list[str], list[str]]:
    if kind == "number":
        keys = pick(random, NOUNS, pairs) if pairs <= len(NOUNS) else draw("word", random, pairs)
        return keys, draw("number", random, pairs, digits=DIGITS)
    both = draw(kind, random, 2 * pairs)
    return both[:pairs], both[pairs:]
