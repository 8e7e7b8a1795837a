"""Texts whose label depends on known tokens, and nothing else.

    additive      two strong and one weak polarity word among fillers; the label is the sign of their summed weights
    conjunction   1 where a word of group A and a word of group B both occur, 0 where only one of them does
    negation      one polarity word; a negator directly before it turns it over, negators elsewhere do nothing
    pair          two texts; 1 where the key word of the first is that of the second

The rationale of a text marks the tokens that decide its label: all polarity words; the A and the B word; the
polarity word, and the negator before it where there is one; the two key words. Where a label comes from what is
missing (a conjunction that is not complete) no token decides it, and the rationale is None.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.errors import ArgumentError, unknown

RULES = ("additive", "conjunction", "negation", "pair")
PAD, CLS, SEP, MASK = range(4)
FILLERS, GROUP = 40, 6
FIRST_FILLER = 4
POSITIVE = FIRST_FILLER + FILLERS
NEGATIVE = POSITIVE + GROUP
WEAK_POSITIVE = NEGATIVE + GROUP
WEAK_NEGATIVE = WEAK_POSITIVE + GROUP
NEGATOR = WEAK_NEGATIVE + GROUP
VOCABULARY = NEGATOR + 2
LENGTHS = (12, 24)
#: Words of each text of a pair; all pairs have one length.
PAIR_WORDS = 8
#: Where the second text of a pair begins: [CLS] and eight words, [SEP].
PAIR_SPLIT = PAIR_WORDS + 2
STRONG, WEAK = 2, 1


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedText:
    """Token ids with special tokens, the label, and the tokens that decide it (None where none does)."""

    ids: Int[Tensor, " tokens"]
    label: int
    rationale: Bool[np.ndarray, " tokens"] | None
    rule: str

    @property
    def special(self) -> Bool[np.ndarray, " tokens"]:
        return np.isin(self.ids.numpy(), (PAD, CLS, SEP, MASK))

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(token_name(int(token)) for token in self.ids)


def token_name(token: int) -> str:
    """A readable name of a token id."""
    if token < FIRST_FILLER:
        return ("[PAD]", "[CLS]", "[SEP]", "[MASK]")[token]
    for start, stem in (
        (NEGATOR, "not"), (WEAK_NEGATIVE, "poor"), (WEAK_POSITIVE, "fine"), (NEGATIVE, "bad"), (POSITIVE, "good"),
        (FIRST_FILLER, "word"),
    ):  # fmt: skip
        if token >= start:
            return f"{stem}{token - start}"
    raise ArgumentError(f"token: got {token}, expected an id in 0..{VOCABULARY - 1}.")


def make_texts(
    rule: str, count: int, random: np.random.Generator, *, lengths: tuple[int, int] = LENGTHS
) -> list[PlantedText]:
    """`count` texts of a rule, half of each label. `lengths` bounds the words of a single text, special tokens apart.

    Raises ArgumentError for an unknown rule and for lengths that leave no room for the words that decide."""
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    low, high = lengths
    if not 5 <= low <= high:
        raise ArgumentError(f"lengths: got {lengths}, expected 5 ≤ shortest ≤ longest.")
    if count < 1:
        raise ArgumentError(f"count: got {count}, expected at least 1.")
    labels = random.permutation(np.arange(count) % 2)
    return [_MAKERS[rule](int(label), random, int(random.integers(low, high + 1))) for label in labels]


def pad_batch(
    texts: list[PlantedText],
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
    """(ids, mask, labels), padding behind."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), longest), PAD)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text.ids)] = text.ids
    return ids, ids != PAD, torch.tensor([text.label for text in texts])


def _fillers(random: np.random.Generator, count: int) -> np.ndarray:
    return FIRST_FILLER + random.integers(FILLERS, size=count)


def _single(words: np.ndarray, deciding: list[int] | None, label: int, rule: str) -> PlantedText:
    ids = torch.tensor([CLS, *words.tolist(), SEP])
    rationale = None
    if deciding is not None:
        rationale = np.zeros(len(ids), bool)
        rationale[[1 + place for place in deciding]] = True
    return PlantedText(ids=ids, label=label, rationale=rationale, rule=rule)


def _additive(label: int, random: np.random.Generator, length: int) -> PlantedText:
    """Two strong words of one side, or one of each and a weak word that tips the balance."""
    words = _fillers(random, length)
    places = random.permutation(length)[:3].tolist()
    strong, against = (POSITIVE, NEGATIVE) if label else (NEGATIVE, POSITIVE)
    weak, weak_against = (WEAK_POSITIVE, WEAK_NEGATIVE) if label else (WEAK_NEGATIVE, WEAK_POSITIVE)
    groups = (strong, strong, weak_against) if random.random() < 0.5 else (strong, against, weak)
    for place, group in zip(places, groups, strict=True):
        words[place] = group + random.integers(GROUP)
    return _single(words, places, label, "additive")


def _conjunction(label: int, random: np.random.Generator, length: int) -> PlantedText:
    words = _fillers(random, length)
    places = random.permutation(length)[:2].tolist()
    groups = (POSITIVE, NEGATIVE) if label else ((POSITIVE, POSITIVE), (NEGATIVE, NEGATIVE))[random.integers(2)]
    for place, group in zip(places, groups, strict=True):
        words[place] = group + random.integers(GROUP)
    return _single(words, places if label else None, label, "conjunction")


def _negation(label: int, random: np.random.Generator, length: int) -> PlantedText:
    """Every text has one negator, so that its presence alone says nothing."""
    words = _fillers(random, length)
    place = int(random.integers(1, length))
    negated = bool(random.random() < 0.5)
    words[place] = (POSITIVE if bool(label) != negated else NEGATIVE) + random.integers(GROUP)
    free = [i for i in range(length) if i not in (place - 1, place)]
    words[place - 1 if negated else free[random.integers(len(free))]] = NEGATOR + random.integers(2)
    return _single(words, [place - 1, place] if negated else [place], label, "negation")


def _pair(label: int, random: np.random.Generator, length: int) -> PlantedText:
    first, second = _fillers(random, PAIR_WORDS), _fillers(random, PAIR_WORDS)
    places = random.integers(PAIR_WORDS, size=2).tolist()
    key = int(random.integers(GROUP))
    other = key if label else (key + 1 + int(random.integers(GROUP - 1))) % GROUP
    first[places[0]], second[places[1]] = POSITIVE + key, POSITIVE + other
    ids = torch.tensor([CLS, *first.tolist(), SEP, *second.tolist(), SEP])
    rationale = np.zeros(len(ids), bool)
    rationale[[1 + places[0], PAIR_SPLIT + places[1]]] = True
    return PlantedText(ids=ids, label=label, rationale=rationale, rule="pair")


_MAKERS = {"additive": _additive, "conjunction": _conjunction, "negation": _negation, "pair": _pair}
