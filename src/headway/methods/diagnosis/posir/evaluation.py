"""One retriever on one or more sets: encode, rank, measure, and what each query's score and place were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError
from headway.methods.diagnosis.posir.data import RetrievalSet, settle_positives
from headway.methods.diagnosis.posir.encoders import Encoder, Scorer
from headway.methods.diagnosis.posir.encoding import encoded, encoded_blocks
from headway.methods.diagnosis.posir.metrics import MEASURES, best_ranked, retrieval_measures
from headway.methods.diagnosis.posir.retrieval import TOP, Ranking, cosine_top, rank_scores
from headway.methods.diagnosis.posir.sensitivity import (
    EDGES,
    Sensitivity,
    bucket_names,
    bucket_of,
    by_bucket,
    sensitivity,
)
from headway.progress import Tell

#: Of a bucket, by what the model reads of its documents.
WHOLE, PARTLY_CUT, CUT = "read whole", "partly truncated", "truncation test"


@dataclass(kw_only=True)
class Evaluation:
    """What a retriever made of the queries: per query the relative position, tokens of the positive, tokens up to the
    answer's end (−1: not counted), measures, and the rank of the positive (0: not among the top).

    `max_tokens` is what the retriever reads of a document, special tokens included (None: all). `absent` counts queries
    whose positive is not in the corpus, `not_found` those whose positive is not among the top; both score 0."""

    retriever: str
    domains: list[str]
    queries: list[str]
    documents: list[str]
    positions: np.ndarray
    tokens: np.ndarray
    stops: np.ndarray
    measures: dict[str, np.ndarray]
    counted_by: str = ""
    max_tokens: int | None = None
    absent: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    k: int = 10

    @property
    def scores(self) -> np.ndarray:
        """nDCG@k of each query."""
        return self.measures["ndcg"]

    @property
    def not_found(self) -> int:
        return int((self.measures["rank"] == 0).sum()) - self.absent

    def overall(self, *, edges: Sequence[int] = EDGES, **options: Any) -> Sensitivity:
        """Position sensitivity over all lengths; positions are shuffled within length buckets."""
        within = bucket_of(self.tokens, edges)
        return sensitivity(self.scores, self.positions, groups=self.documents, within=within, **options)

    def buckets(self, *, edges: Sequence[int] = EDGES, **options: Any) -> dict[str, Sensitivity | None]:
        """Position sensitivity of each length bucket."""
        return by_bucket(self.scores, self.positions, self.tokens, edges=edges, groups=self.documents, **options)

    def reading(self, *, edges: Sequence[int] = EDGES) -> dict[str, tuple[str, float]]:
        """By bucket: whether the retriever reads its documents whole, and the share of queries whose answer ends
        behind what it reads (NaN where that was not counted). A bucket that is cut tests truncation, not bias. Tokens
        are those of the text alone, so what special tokens push behind the end, one or two tokens, counts as read."""
        where = bucket_of(self.tokens, edges)
        found = {}
        for number, name in enumerate(bucket_names(edges)):
            inside = where == number
            found[name] = (self._read(self.tokens[inside]), self._unseen(self.stops[inside]))
        return found

    def _read(self, tokens: np.ndarray) -> str:
        if self.max_tokens is None or not tokens.size:
            return WHOLE
        cut = float((tokens > self.max_tokens).mean())
        return WHOLE if cut == 0 else CUT if cut == 1 else PARTLY_CUT

    def _unseen(self, stops: np.ndarray) -> float:
        if self.max_tokens is None:
            return 0.0
        known = stops[stops >= 0]
        return float((known > self.max_tokens).mean()) if known.size else float("nan")


def evaluate(
    data: RetrievalSet,
    retriever: Encoder | Scorer,
    *,
    several: str = "error",
    k: int = 10,
    top: int = TOP,
    folder: str | Path | None = None,
    progress: Tell | None = None,
) -> Evaluation:
    """Encodes (or scores), ranks and measures. `folder` keeps embeddings, so that an interrupted run goes on;
    `several` is the policy for queries with more than one positive (`settle_positives`)."""
    settled = settle_positives(data, several=several)
    ids = list(settled.documents)
    texts = [settled.documents[name] for name in ids]
    asked = [query.text for query in settled.queries]
    ranking = _ranked(retriever, asked, texts, ids, top, folder, progress)
    names = [query.id for query in settled.queries]
    judged = best_ranked(ranking, names, settled.judgements) if several == "best" else settled.judgements
    measures = retrieval_measures(ranking, names, judged, k=k)
    absent = sum(not any(d in settled.documents for d in settled.judgements[name]) for name in names)
    return Evaluation(
        retriever=retriever.name,
        domains=[query.domain for query in settled.queries],
        queries=[f"{data.name}/{name}" for name in names],
        documents=[f"{data.name}/{next(iter(settled.judgements[name]))}" for name in names],
        positions=settled.positions(),
        tokens=settled.lengths(),
        stops=np.array([-1 if q.stop_token is None else q.stop_token for q in settled.queries]),
        measures=measures,
        counted_by=settled.counted_by,
        max_tokens=getattr(retriever, "max_tokens", None),
        absent=absent,
        dropped=dict(settled.dropped),
        k=k,
    )


def pool_domains(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of one retriever on several sets as one: queries are pooled, domains are not averaged."""
    if not parts or len({part.retriever for part in parts}) > 1 or len({part.k for part in parts}) > 1:
        raise ArgumentError(
            f"parts: got {[part.retriever for part in parts]}, expected evaluations of one retriever with one k."
        )
    first = parts[0]
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Evaluation(
        retriever=first.retriever,
        domains=[d for part in parts for d in part.domains],
        queries=[q for part in parts for q in part.queries],
        documents=[d for part in parts for d in part.documents],
        positions=joined("positions"),
        tokens=joined("tokens"),
        stops=joined("stops"),
        measures={name: np.concatenate([part.measures[name] for part in parts]) for name in (*MEASURES, "rank")},
        counted_by=", ".join(dict.fromkeys(part.counted_by for part in parts)),
        max_tokens=first.max_tokens,
        absent=sum(part.absent for part in parts),
        dropped=dict(dropped),
        k=first.k,
    )


def _ranked(
    retriever: Encoder | Scorer,
    asked: list[str],
    texts: list[str],
    ids: list[str],
    top: int,
    folder: str | Path | None,
    progress: Tell | None,
) -> Ranking:
    if isinstance(retriever, Encoder):
        queries = encoded(retriever, asked, is_query=True, folder=folder, progress=progress)
        return cosine_top(queries, encoded_blocks(retriever, texts, folder=folder, progress=progress), ids, top=top)
    if not isinstance(retriever, Scorer):
        raise ArgumentError(
            f"retriever: got {type(retriever).__name__}, expected an encoder (CallableEncoder, TransformersEncoder, "
            "SentenceTransformersEncoder) or a scorer with prepare and scores."
        )
    retriever.prepare(texts)
    return rank_scores((np.asarray(retriever.scores(text)) for text in asked), ids, top=top)
