"""Retrieval measures of a ranking, as TREC's evaluation defines them.

    DCG@k = Σ_{r ≤ k} rel(r) / log₂(r + 1) ,   nDCG@k = DCG@k / DCG@k of the best possible order

With one positive at rank r: nDCG@k = 1 / log₂(r + 1) for r ≤ k, else 0. MAP@k, precision and recall are TREC's
`map_cut`, `P` and `recall`; a positive that is not in the ranking counts as never found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from headway.errors import ArgumentError
from headway.methods.diagnosis.posir.retrieval import Ranking

MEASURES = ("ndcg", "map", "precision", "recall", "reciprocal_rank")


def single_ndcg(rank: Int[np.ndarray, ...], *, k: int = 10) -> Float[np.ndarray, ...]:
    """nDCG@k for one positive at each (1-based) rank; 0 stands for "not found"."""
    ranks = np.asarray(rank)
    inside = (ranks >= 1) & (ranks <= k)
    return np.where(inside, 1 / np.log2(np.where(inside, ranks, 1) + 1), 0.0)


def retrieval_measures(
    ranking: Ranking, queries: Sequence[str], judgements: Mapping[str, Mapping[str, int]], *, k: int = 10
) -> dict[str, Float[np.ndarray, " queries"]]:
    """Per query: the MEASURES at k, and "rank" of the best-ranked positive (0 where none is in the ranking).

    Queries without a positive have zeros, as in TREC."""
    if k < 1:
        raise ArgumentError(f"k: got {k}, expected 1 or more.")
    if len(queries) != len(ranking.documents):
        raise ArgumentError(f"queries: got {len(queries)} for {len(ranking.documents)} rankings, expected one each.")
    number = {name: i for i, name in enumerate(ranking.ids)}
    found = {name: np.zeros(len(queries)) for name in (*MEASURES, "rank")}
    for i, query in enumerate(queries):
        gains = {document: value for document, value in judgements.get(query, {}).items() if value > 0}
        if not gains:
            continue
        places = _ranks(ranking.documents[i], {number[d]: v for d, v in gains.items() if d in number})
        for name, value in _measures(places, sorted(gains.values(), reverse=True), k).items():
            found[name][i] = value
    return found


def best_ranked(
    ranking: Ranking, queries: Sequence[str], judgements: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """The judgements with the best-ranked positive of each query alone (its first where none is in the ranking)."""
    number = {name: i for i, name in enumerate(ranking.ids)}
    found = {}
    for i, query in enumerate(queries):
        gains = {document: value for document, value in judgements.get(query, {}).items() if value > 0}
        row = ranking.documents[i].tolist()
        places = {document: row.index(number[document]) for document in gains if number.get(document, -2) in row}
        best = min(places, key=lambda name: places[name]) if places else next(iter(gains), None)
        found[query] = {} if best is None else {best: gains[best]}
    return found


def _ranks(row: Int[np.ndarray, " top"], gains: Mapping[int, int]) -> list[tuple[int, int]]:
    """(rank, relevance) of the relevant documents that are in the ranking, best first."""
    places = np.flatnonzero(np.isin(row, list(gains)))
    return [(int(place) + 1, gains[int(row[place])]) for place in places]


def _measures(places: Sequence[tuple[int, int]], ideal: Sequence[int], k: int) -> dict[str, float]:
    inside = [(rank, value) for rank, value in places if rank <= k]
    best = sum(value / np.log2(rank + 2) for rank, value in enumerate(ideal[:k]))
    return {
        "ndcg": sum(value / np.log2(rank + 1) for rank, value in inside) / best,
        "map": sum((i + 1) / rank for i, (rank, _) in enumerate(inside)) / len(ideal),
        "precision": len(inside) / k,
        "recall": len(inside) / len(ideal),
        "reciprocal_rank": 1 / places[0][0] if places else 0.0,
        "rank": places[0][0] if places else 0,
    }
