"""Concept Consistency Score: how many of the texts that describe a head fit the one concept they are said to share.

    CCS(h) = Σ_i 1[text i fits the concept of h]  ∈ 0..m          CCS@K = share of heads with CCS = K
    high: m of m;  moderate: 3 of 5;  low: at most 1 of 5         2 and 4 of 5 fall in no named class
    CCR = distinct concepts that more than one high head holds / number of high heads

Several judges vote; a text fits where most of those that answered say so. A tie is no fit and is counted.

Paper: Pruning the Paradox, arXiv 2503.11103. How its three judges combine is not stated; the majority is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headway.errors import ArgumentError
from headway.methods.diagnosis.clip_ccs.judges import Judge, Labeller, parse_answer

Head = tuple[int, int]
CLASSES = ("high", "moderate", "low", "between")


@dataclass(frozen=True, kw_only=True)
class HeadConcept:
    """One head: its texts (best first), the concept, what each judge said (True, False, None for an abstention), the
    votes per text, and the score. `asked` is the number of texts that were asked for; a head whose span ran out has
    fewer, and the missing ones count as no fit."""

    layer: int
    head: int
    texts: tuple[str, ...]
    concept: str
    verdicts: dict[str, tuple[bool | None, ...]]
    fits: tuple[bool, ...]
    asked: int
    ties: int = 0
    abstentions: int = 0
    explained: float = float("nan")
    notes: tuple[str, ...] = field(default=())

    @property
    def place(self) -> Head:
        return self.layer, self.head

    @property
    def score(self) -> int:
        return sum(self.fits)

    @property
    def kind(self) -> str:
        return consistency_class(self.score, self.asked)


def consistency_class(score: int, texts: int) -> str:
    """ "high", "moderate", "low" or "between". The paper's bounds for five texts, as shares for other numbers."""
    if not 0 <= score <= texts or texts < 1:
        raise ArgumentError(f"score, texts: got {score} of {texts}, expected 0 ≤ score ≤ texts, texts ≥ 1.")
    if score == texts:
        return "high"
    if 5 * score <= texts:
        return "low"
    return "moderate" if score == round(0.6 * texts) else "between"


def score_head(
    place: Head,
    texts: Sequence[str],
    *,
    labeller: Labeller,
    judges: Mapping[str, Judge],
    asked: int | None = None,
    explained: float = float("nan"),
    notes: Sequence[str] = (),
) -> HeadConcept:
    """Labels one head and lets every judge say which of its texts fit."""
    if not judges:
        raise ArgumentError("judges: got none, expected at least one, by name.")
    if not texts and asked is None:
        raise ArgumentError(f"texts: got none for head {place}, expected at least one.")
    concept = labeller(list(texts)) if texts else "none"
    if not isinstance(concept, str) or not concept.strip():
        raise ArgumentError(f"labeller: got {concept!r} for head {place}, expected the name of a concept.")
    verdicts = {name: tuple(parse_answer(judge(concept, text)) for text in texts) for name, judge in judges.items()}
    votes = [[v[i] for v in verdicts.values() if v[i] is not None] for i in range(len(texts))]
    return HeadConcept(
        layer=place[0],
        head=place[1],
        texts=tuple(texts),
        concept=concept,
        verdicts=verdicts,
        fits=tuple(2 * sum(map(bool, vote)) > len(vote) for vote in votes),
        asked=len(texts) if asked is None else asked,
        ties=sum(bool(vote) and 2 * sum(map(bool, vote)) == len(vote) for vote in votes),
        abstentions=sum(v is None for answers in verdicts.values() for v in answers),
        explained=explained,
        notes=tuple(notes),
    )


def histogram(heads: Sequence[HeadConcept]) -> tuple[float, ...]:
    """CCS@K for K = 0..m; sums to one."""
    _some(heads)
    most = max(h.asked for h in heads)
    counts = Counter(h.score for h in heads)
    return tuple(counts[k] / len(heads) for k in range(most + 1))


def by_class(heads: Sequence[HeadConcept]) -> dict[str, list[Head]]:
    """The places of heads by class."""
    return {kind: [h.place for h in heads if h.kind == kind] for kind in CLASSES}


def concentrated_ratio(heads: Sequence[HeadConcept]) -> float:
    """CCR in [0, 1]; NaN where no head is high."""
    high = [h for h in heads if h.kind == "high"]
    shared = sum(count > 1 for count in Counter(h.concept for h in high).values())
    return shared / len(high) if high else float("nan")


def of_concept(heads: Sequence[HeadConcept], concept: str, *, least: int | None = None) -> list[Head]:
    """Heads labelled with a concept whose score is at least `least` (by default 60 % of their texts)."""
    return [
        h.place for h in heads if h.concept == concept and h.score >= (round(0.6 * h.asked) if least is None else least)
    ]


def _some(heads: Sequence[HeadConcept]) -> None:
    if not heads:
        raise ArgumentError("heads: got none, expected at least one scored head.")
