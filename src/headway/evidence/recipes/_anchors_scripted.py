"""A reasoner that is a program: what decides its answer is known, and what only looks as if it did.

It sets up, states a first guess that it never uses, flips a coin, and computes its answer from the coin. Made to answer
early it says the guess, so forced answers take the guess for what matters and miss the coin.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from headway.methods.diagnosis.thought_anchors import Prefix, Trace
from headway.methods.diagnosis.thought_anchors.sentences import token_ranges

PROMPT = "How many steps does it take? "
SETUP = "There are three steps on the way. "
GUESSES = ("two", "twelve", "twenty")
COIN = ("heads", "tails")
#: The answer that each side of the coin leads to.
ANSWERS = {"heads": "seven", "tails": "nine"}
WORKING = ("Now we add the steps one by one. ", "Then we take the coin into account. ")
NOW = "Answer now: "


def script(*, coin: str, guess: str) -> Trace:
    """The trace for a side of the coin and a guess; words are its tokens."""
    sentences = [SETUP, _guess(guess), _flip(coin), *WORKING, _result(ANSWERS[coin])]
    return words_trace(PROMPT, sentences, ANSWERS[coin])


def words_trace(prompt: str, sentences: Sequence[str], answer: str) -> Trace:
    """A trace whose tokens are words."""
    text = prompt + "".join(sentences)
    stops = np.cumsum([len(prompt), *map(len, sentences)]).tolist()
    spans = tuple(pairwise(stops))
    words = [i for i, letter in enumerate(text) if letter == " "]
    starts = [0, *(w + 1 for w in words if w + 1 < len(text))]
    offsets = list(zip(starts, [*starts[1:], len(text)], strict=True))
    return Trace(
        text=text,
        ids=tuple(range(len(offsets))),
        starts=tuple(a for a, _ in offsets),
        characters=spans,
        tokens=tuple(token_ranges(spans, offsets)),
        answer=answer,
    )


def scripted(prefix: Prefix, seeds: Sequence[int]) -> list[str]:
    """The sampler: goes on where the prefix ends."""
    return [_continue(prefix.text, np.random.default_rng(seed)) for seed in seeds]


def _continue(text: str, random: np.random.Generator) -> str:
    said = text.removeprefix(PROMPT)
    guess = next((g for g in GUESSES if _guess(g) in said), None)
    coin = next((c for c in COIN if _flip(c) in said), None)
    if said.endswith(NOW):
        return _result(guess or str(random.choice(GUESSES)))
    guess, coin = guess or str(random.choice(GUESSES)), coin or str(random.choice(COIN))
    whole = [SETUP, _guess(guess), _flip(coin), *WORKING, _result(ANSWERS[coin])]
    return "".join(part for part in whole if part not in said)


def _guess(guess: str) -> str:
    return f"My first guess would be {guess} of them. "


def _flip(coin: str) -> str:
    return f"The coin that I flip shows {coin}. "


def _result(answer: str) -> str:
    return f"So the answer is {answer}. "
