"""Short film reviews in plain English whose label depends on known words, for models that read English.

A review is a few neutral sentences with one or two sentences of opinion among them, in random order. Both opinions of a
review have one polarity, which is the label (1 praises, 0 complains), and stand for the rationale: the opinion words
and nothing else. Neutral sentences, what is spoken of, and the frames of opinions are drawn without regard to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headway.errors import ArgumentError

LABELS = ("complains", "praises")
OPINIONS = (
    ("dreadful", "boring", "clumsy", "awful", "lifeless", "irritating", "feeble", "terrible", "tedious", "hollow"),
    ("splendid", "gripping", "graceful", "lovely", "lively", "delightful", "superb", "excellent", "moving", "clever"),
)  # fmt: skip
ASPECTS = ("acting", "music", "plot", "dialogue", "camera work", "ending", "opening scene", "editing")
FRAMES = (
    "I found the {aspect} {opinion}.",
    "To my mind the {aspect} was {opinion}.",
    "The {aspect} is {opinion} from start to finish.",
    "Everyone in our row called the {aspect} {opinion}.",
)
NEUTRAL = (
    "I saw it on a Tuesday evening with my brother.",
    "It runs for about two hours.",
    "The story is set in a harbour town in the north.",
    "Most of it was filmed in the autumn of last year.",
    "We sat near the back of the hall.",
    "The tickets were the same price as always.",
    "A short film about trains came before it.",
    "The director has made four other films.",
    "It will be on television in the spring.",
    "The main character repairs clocks for a living.",
)


@dataclass(frozen=True, kw_only=True)
class Review:
    """A text, its label (0 or 1), and the [start, end) characters of the words that decide it."""

    text: str
    label: int
    rationale: tuple[tuple[int, int], ...]


def make_reviews(count: int, random: np.random.Generator, *, neutral: tuple[int, int] = (1, 3)) -> list[Review]:
    """`count` reviews, half of each label, each with `neutral` = (fewest, most) neutral sentences.

    Raises ArgumentError for a count below 1 and for numbers of sentences that there are not."""
    low, high = neutral
    if count < 1:
        raise ArgumentError(f"count: got {count}, expected at least 1.")
    if not 0 <= low <= high <= len(NEUTRAL):
        raise ArgumentError(f"neutral: got {neutral}, expected 0 ≤ fewest ≤ most ≤ {len(NEUTRAL)} sentences.")
    labels = random.permutation(np.arange(count) % 2).tolist()
    return [_review(label, int(random.integers(low, high + 1)), random) for label in labels]


def _review(label: int, neutral: int, random: np.random.Generator) -> Review:
    sentences = [(NEUTRAL[i], "") for i in random.permutation(len(NEUTRAL))[:neutral]]
    opinions = random.permutation(len(OPINIONS[label]))
    aspects, frames = random.permutation(len(ASPECTS)), random.permutation(len(FRAMES))
    for k in range(1 + int(random.integers(2))):
        opinion = OPINIONS[label][opinions[k]]
        sentences.append((FRAMES[frames[k]].format(aspect=ASPECTS[aspects[k]], opinion=opinion), opinion))
    text, spans = "", []
    for i in random.permutation(len(sentences)):
        sentence, opinion = sentences[i]
        text += " " if text else ""
        if opinion:
            start = len(text) + sentence.rindex(opinion)
            spans.append((start, start + len(opinion)))
        text += sentence
    return Review(text=text, label=label, rationale=tuple(spans))
