"""Exact retrieval by cosine in chunks, with ties broken by document id.

    score(q, d) = ⟨q, d⟩ / (‖q‖ ‖d‖)

Products are taken in float64 and rounded to `DECIMALS`, so that equal texts get equal scores whatever the chunks were.
Equal scores are ordered as TREC's evaluation orders them: the larger document id (as a string) first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headway.errors import ArgumentError, NumericError

TOP, CHUNK, DECIMALS = 1000, 512, 9
#: (number of the first document, their embeddings)
Blocks = Iterable[tuple[int, Float[np.ndarray, "documents width"]]]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The best documents of each query: their numbers (−1 for none), and their scores, best first."""

    documents: Int[np.ndarray, "queries top"]
    scores: Float[np.ndarray, "queries top"]
    ids: Sequence[str]

    def names(self, query: int) -> list[str]:
        return [self.ids[i] for i in self.documents[query] if i >= 0]

    def run(self, queries: Sequence[str]) -> dict[str, dict[str, float]]:
        """{query: {document: score}}, the form of TREC tools."""
        return {
            name: {self.ids[d]: float(s) for d, s in zip(self.documents[i], self.scores[i], strict=True) if d >= 0}
            for i, name in enumerate(queries)
        }


def cosine_top(
    queries: Float[np.ndarray, "queries width"],
    documents: Float[np.ndarray, "documents width"] | Blocks,
    ids: Sequence[str],
    *,
    top: int = TOP,
    chunk: int = CHUNK,
) -> Ranking:
    """The `top` documents of each query. `documents` is an array, or blocks of one as they come from disk."""
    if top < 1 or chunk < 1:
        raise ArgumentError(f"top, chunk: got {top} and {chunk}, expected 1 or more.")
    asked = unit_rows(queries, "queries")
    best = _Best(len(asked), ids, top, _priority(ids))
    seen = 0
    for start, block in _blocks(documents, chunk):
        if block.shape[-1] != asked.shape[-1]:
            raise ArgumentError(
                f"documents: got embeddings of width {block.shape[-1]}, queries have {asked.shape[-1]}. Encode both "
                "with one model."
            )
        found = unit_rows(block, "documents")
        numbers = np.arange(start, start + len(found))
        seen += len(found)
        for first in range(0, len(asked), chunk):
            best.add(slice(first, first + chunk), asked[first : first + chunk] @ found.T, numbers)
    if seen != len(ids):
        raise ArgumentError(f"ids: got {len(ids)} for {seen} documents, expected one each.")
    return best.ranking()


def rank_scores(rows: Iterable[Float[np.ndarray, " documents"]], ids: Sequence[str], *, top: int = TOP) -> Ranking:
    """The `top` documents by scores that come query by query (BM25, late interaction, a reranker)."""
    priority = _priority(ids)
    numbers, scores = [], []
    for row in rows:
        found = np.asarray(row, dtype=float)
        if found.shape != (len(ids),):
            raise ArgumentError(f"rows: got scores of shape {found.shape}, expected {len(ids)}, one per document.")
        best = _Best(1, ids, top, priority)
        best.add(slice(0, 1), found[None], np.arange(len(ids)))
        numbers.append(best.numbers[0])
        scores.append(best.scores[0])
    return Ranking(documents=np.array(numbers), scores=np.array(scores), ids=ids)


def unit_rows(x: Float[np.ndarray, "rows width"], name: str = "embeddings") -> Float[np.ndarray, "rows width"]:
    """Rows of length one in float64; a row of zeros stays (its cosine is 0)."""
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim != 2:
        raise ArgumentError(f"{name}: got shape {rows.shape}, expected one row per text.")
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if bad.size:
        raise NumericError(f"{name}: row {bad[0]} of {len(rows)} has NaN or infinity; look at that text or the model.")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


class _Best:
    """The best of what was added so far, by (score, id)."""

    def __init__(self, queries: int, ids: Sequence[str], top: int, priority: Int[np.ndarray, " documents+1"]) -> None:
        self.ids, self.top, self.priority = ids, min(top, len(ids)), priority
        self.scores = np.full((queries, self.top), -np.inf)
        self.numbers = np.full((queries, self.top), -1)

    def add(self, rows: slice, scores: Float[np.ndarray, "queries new"], numbers: Int[np.ndarray, " new"]) -> None:
        if numbers.size and numbers[-1] >= len(self.ids):
            raise ArgumentError(
                f"ids: got {len(self.ids)} for at least {numbers[-1] + 1} documents, expected one each."
            )
        if not np.isfinite(scores).all():
            raise NumericError("scores: got NaN or infinity, expected finite numbers for every document.")
        every = np.concatenate([self.scores[rows], np.round(scores, DECIMALS)], 1)
        which = np.concatenate([self.numbers[rows], np.broadcast_to(numbers, scores.shape)], 1)
        order = np.lexsort((self.priority[which], -every), axis=1)[:, : self.top]
        self.scores[rows] = np.take_along_axis(every, order, 1)
        self.numbers[rows] = np.take_along_axis(which, order, 1)

    def ranking(self) -> Ranking:
        return Ranking(documents=self.numbers, scores=self.scores, ids=self.ids)


def _priority(ids: Sequence[str]) -> Int[np.ndarray, " documents+1"]:
    """The place of each document among equal scores; the last entry, for no document, comes behind all."""
    found = np.empty(len(ids) + 1, dtype=np.int64)
    found[sorted(range(len(ids)), key=lambda i: ids[i], reverse=True)] = np.arange(len(ids))
    found[-1] = len(ids)
    return found


def _blocks(documents: np.ndarray | Blocks, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
    if isinstance(documents, np.ndarray):
        for start in range(0, len(documents), chunk):
            yield start, documents[start : start + chunk]
        return
    for start, block in documents:
        for inner in range(0, len(block), chunk):
            yield start + inner, block[inner : inner + chunk]
