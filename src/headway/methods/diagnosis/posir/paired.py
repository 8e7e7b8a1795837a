"""The paired intervention: one sentence moved through the same document, so that nothing but its place differs.

    s_i(x) = score of the question for document i with the evidence at relative position x
    slope_i = least-squares slope of s_i on x ,   paired slope = mean_i slope_i

Documents are their own controls: topic, length and wording are the same at every place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError
from headway.methods.diagnosis.posir.encoders import Encoder, Scorer
from headway.methods.diagnosis.posir.encoding import encoded
from headway.methods.diagnosis.posir.retrieval import unit_rows
from headway.progress import Tell
from headway.statistics import Measurement, bootstrap
from headway.tasks.positioned_evidence import Fact, moved

POSITIONS = 10
#: Texts that are embedded at once and kept together.
PART = 32


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Scores by document and place, at their relative positions. `slope` is the mean slope within a document, per whole
    document; `share` that slope over the mean score; `without` the mean score of the documents without the evidence."""

    retriever: str
    positions: Float[np.ndarray, "documents places"]
    scores: Float[np.ndarray, "documents places"]
    slope: Measurement
    without: float

    @property
    def curve(self) -> Float[np.ndarray, " places"]:
        """The mean score by place."""
        return self.scores.mean(0)

    @property
    def share(self) -> float:
        """The slope as a share of what the evidence adds to the score on average; NaN where it adds nothing."""
        gain = float(self.scores.mean()) - self.without
        return self.slope.value / gain if gain > 0 else float("nan")


def paired_intervention(
    retriever: Encoder | Scorer,
    fillers: Sequence[Sequence[str]],
    facts: Sequence[Fact],
    *,
    positions: int = POSITIONS,
    generator: np.random.Generator | int = 0,
    folder: str | Path | None = None,
    progress: Tell | None = None,
) -> Paired:
    """Moves each fact's statement through the sentences of its filler and scores its question at every place. A
    `folder` keeps embeddings, so that an interrupted run goes on."""
    if not fillers or len(fillers) != len(facts):
        raise ArgumentError(f"fillers, facts: got {len(fillers)} and {len(facts)}, expected one fact for each filler.")
    places, texts = [], []
    for sentences, fact in zip(fillers, facts, strict=True):
        variants = moved(sentences, fact.statement, positions)
        places.append([(start + stop) / 2 / len(text) for text, (start, stop) in variants])
        texts.append([text for text, _ in variants] + [" ".join(sentences)])
    questions = [fact.question for fact in facts]
    if isinstance(retriever, Encoder):
        scores = _cosines(retriever, questions, texts, folder, progress)
    else:
        scores = np.array([_scored(retriever, *pair) for pair in zip(questions, texts, strict=True)])
    x, y, without = np.array(places), scores[:, :-1], scores[:, -1]
    return Paired(
        retriever=retriever.name,
        positions=x,
        scores=y,
        slope=bootstrap(within_slopes(x, y), generator=generator),
        without=float(without.mean()),
    )


def within_slopes(
    x: Float[np.ndarray, "documents places"], y: Float[np.ndarray, "documents places"]
) -> Float[np.ndarray, " documents"]:
    """The least-squares slope of each row."""
    centred = x - x.mean(1, keepdims=True)
    return (centred * y).sum(1) / (centred**2).sum(1)


def _cosines(
    encoder: Encoder,
    questions: list[str],
    texts: list[list[str]],
    folder: str | Path | None,
    progress: Tell | None,
) -> Float[np.ndarray, "documents texts"]:
    """The cosine of each question with its own texts."""
    asked = unit_rows(encoded(encoder, questions, is_query=True, folder=folder))
    every = [text for own in texts for text in own]
    found = unit_rows(encoded(encoder, every, folder=folder, part=PART, progress=progress))
    return np.einsum("dw,dtw->dt", asked, found.reshape(len(texts), -1, found.shape[1]))


def _scored(scorer: Scorer, question: str, texts: list[str]) -> Float[np.ndarray, " texts"]:
    scorer.prepare(texts)
    return np.asarray(scorer.scores(question), dtype=float)
