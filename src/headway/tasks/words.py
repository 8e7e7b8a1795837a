"""The material of generated text tasks: words, numbers, identifiers, filler, and the sentences of a real text.

Everything is drawn from a `numpy.random.Generator`, so a seed names a sample. The word lists stand here, so that a
sample is the same under every version of Python; only text that is passed in varies.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from headway.errors import ArgumentError, unknown


def _words(block: str) -> tuple[str, ...]:
    return tuple(block.split())


NOUNS = _words("""
    acorn anchor apple arrow badge barn basin basket beach beard bench berry bird blanket boat bottle bread brick bridge
    bucket button cabin cactus camel candle canyon carpet castle cellar chair cherry circle cloud coat coffee comet
    copper corner cotton cradle crown curtain dagger desert diamond door dragon drum eagle engine falcon feather fence
    ferry field finger flute forest fountain fox garden gate glove goat grape guitar hammer harbor hat hill honey horse
    island jacket jewel kettle key kitchen kite ladder lake lamp lantern leaf lemon letter lion lizard lobster market
    meadow mirror monkey moon mountain needle nest ocean olive onion orange otter oven owl painter palace paper parrot
    pencil pepper piano pillow pirate planet plum pocket pond potato queen rabbit raven ribbon river rocket rose sailor
    salmon shadow shelf ship shovel silver snow spider spoon stone summer sword table temple thunder tiger tower train
    turtle valley violin wagon walnut water whale wheel willow window winter wolf wool zebra
""")
ADJECTIVES = _words("""
    ancient angry bitter blue brave bright broken brown calm careful clever cold crooked curious dark deep distant dry
    dusty eager early easy empty faint famous fast flat foggy fresh gentle giant golden grand gray green happy heavy
    hidden hollow honest hungry jolly kind large lazy light little lively lonely loud lucky mild modern narrow noble
    noisy old pale patient plain polite proud purple quick quiet rapid rare red rich rough round royal rusty sad salty
    shallow sharp shiny short shy silent simple sleepy slow small smooth soft solid sour square steep still strange
    strong sunny sweet swift tall tame tender thick thin tidy tiny warm weak white wide wild wise wooden yellow young
""")
#: Sentences that say nothing, over and over, in the manner of the pass-key task (arXiv 2305.16300).
FILLER = (
    "The road is long.",
    "The river runs slow.",
    "Clouds drift over the hill.",
    "Birds come and go.",
    "So it goes on.",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
#: Sentences shorter than this are headings and fragments of code; longer ones are tables and grammars.
SENTENCE_CHARACTERS = (25, 400)

KINDS = ("word", "number", "uuid")


def pick(random: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    """`count` different items in random order."""
    if count > len(items):
        raise ArgumentError(f"count: got {count} of {len(items)} items, expected at most {len(items)}. Ask for fewer.")
    return [items[i] for i in random.permutation(len(items))[:count]]


def draw(kind: str, random: np.random.Generator, count: int, *, digits: int = 7) -> list[str]:
    """`count` different values: adjective-noun words, numbers of `digits` digits, or UUIDs."""
    makers: dict[str, Callable[[], str]] = {
        "word": lambda: f"{ADJECTIVES[random.integers(len(ADJECTIVES))]}-{NOUNS[random.integers(len(NOUNS))]}",
        "number": lambda: str(random.integers(10 ** (digits - 1), 10**digits)),
        "uuid": lambda: str(uuid.UUID(bytes=random.bytes(16), version=4)),
    }
    if kind not in makers:
        raise unknown("kind", kind, KINDS)
    room = {"word": len(ADJECTIVES) * len(NOUNS), "number": 9 * 10 ** (digits - 1)}.get(kind, count)
    if count > room:
        raise ArgumentError(f"count: got {count} of kind {kind!r}, expected at most {room} different ones.")
    found: dict[str, None] = {}
    while len(found) < count:
        found[makers[kind]()] = None
    return list(found)


def word_pairs() -> list[str]:
    """Every adjective-noun pair, about 17,000."""
    return [f"{adjective}-{noun}" for noun in NOUNS for adjective in ADJECTIVES]


def coded_words(random: np.random.Generator, count: int, letters: int) -> list[str]:
    """`count` different strings of random lower-case letters, which mean nothing to a model."""
    if count > len(LETTERS) ** letters // 2:
        raise ArgumentError(f"count: got {count:,} words of {letters} letters, expected fewer, or longer words.")
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(LETTERS[i] for i in random.integers(len(LETTERS), size=letters))] = None
    return list(found)


def prose(text: str) -> list[str]:
    """The sentences of a text's running paragraphs, in order; code, lists and headings are left out."""
    shortest, longest = SENTENCE_CHARACTERS
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph[:1].strip() or "::=" in paragraph:
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“(])", " ".join(paragraph.split())):
            if shortest <= len(sentence) <= longest and sentence[-1] in ".!?":
                found.append(sentence)
    if not found:
        raise ArgumentError(
            f"text: got {len(text):,} characters without a sentence of {shortest} to {longest} characters, expected "
            "running text. Give another text."
        )
    return found


def essay(found: Sequence[str], count: int, start: int = 0) -> list[str]:
    """`count` sentences in their order from `start` on, from the beginning again when they run out."""
    return [found[(start + i) % len(found)] for i in range(count)]


def spread(items: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The items with each needle put in at its depth: 0 before the first item, 100 behind the last."""
    if len(needles) != len(depths):
        raise ArgumentError(f"depths: got {len(depths)} for {len(needles)} needles, expected one for each.")
    for depth in depths:
        if not 0 <= depth <= 100:
            raise ArgumentError(f"depth: got {depth}, expected a percentage between 0 and 100.")
    placed = sorted(zip((round(len(items) * depth / 100) for depth in depths), range(len(needles)), strict=True))
    out: list[str] = []
    done = 0
    for place, number in placed:
        out.extend(items[done:place])
        out.append(needles[number])
        done = place
    return [*out, *items[done:]]
