"""`diagnose_position`: from sets and a retriever to a `Position`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from headway.diagnose.position.findings import findings, warnings
from headway.diagnose.position.looking import reads_whole, seen
from headway.diagnose.position.result import Position, Retriever
from headway.errors import ArgumentError, unknown
from headway.hosts.facts import model_facts, versions
from headway.methods.diagnosis import posir as method
from headway.methods.diagnosis.posir import Encoder, Evaluation, Query, RetrievalSet, Scorer
from headway.methods.diagnosis.posir.data import SEVERAL
from headway.methods.diagnosis.posir.sensitivity import BINS, EDGES, RESAMPLES, bucket_names, bucket_of, check_edges
from headway.progress import Tell
from headway.tasks.positioned_evidence import Fact
from headway.tasks.sentences import split_sentences

PLACES = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured and how. `edges` are those of the length buckets (None: by what the model reads), `moved` and
    `saliency` counts of documents, `batch` how many gradients are taken at once, `least_tokens` the shortest document
    for saliency (None: the second edge)."""

    edges: tuple[int, ...] | None = None
    bins: int = BINS
    several: str = "error"
    k: int = 10
    resamples: int = RESAMPLES
    moved: int = 12
    saliency: int = 16
    batch: int = 4
    least_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("bins", 5), ("resamples", 20), ("moved", 0), ("saliency", 0), ("batch", 1), ("k", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: got {getattr(self, name)}, expected at least {least}.")
        if self.several not in SEVERAL:
            raise unknown("several", self.several, SEVERAL)
        if self.edges is not None:
            check_edges(self.edges)
            if len(self.edges) < 2:
                raise ArgumentError(f"edges: got {list(self.edges)}, expected two or more.")


def edges_for(max_tokens: int | None) -> tuple[int, ...]:
    """The paper's edges where the model reads beyond them; else a quarter, a half and the whole of what it reads, so
    that the last bucket holds the documents that are cut."""
    if max_tokens is None or max_tokens > EDGES[-1]:
        return EDGES
    return tuple(sorted({max(max_tokens // 4, 1), max(max_tokens // 2, 2), max(max_tokens, 3)}))


def diagnose_position(
    sets: Sequence[RetrievalSet],
    retriever: Encoder | Scorer,
    *,
    baselines: Sequence[Encoder | Scorer] | None = None,
    options: Options | None = None,
    out: Path | None = None,
    name: str | None = None,
    progress: Tell | None = None,
) -> Position:
    """Position sensitivity of a retriever on one or more sets, whose queries are pooled.

    baselines: other retrievers on the same queries, BM25 by default. Evidence is moved in the documents of the sets,
    and saliency read where gradients go through the retriever. out: a folder for finished parts; a run that was
    interrupted goes on from there. Raises ArgumentError for no sets."""
    start = time.perf_counter()
    wanted = options if options is not None else Options()
    tell = progress if progress is not None else lambda *_: None
    if not sets:
        raise ArgumentError("sets: got none, expected at least one. Use `read_sets`, or `default_set`.")
    edges = wanted.edges or edges_for(getattr(retriever, "max_tokens", None))
    parts = None if out is None else Path(out) / "parts"
    others = [method.Bm25()] if baselines is None else baselines
    settled = [method.settle_positives(data, several=wanted.several) for data in sets]
    pairs = _movable(settled, wanted, getattr(retriever, "max_tokens", None))
    evaluations, retrievers = [], []
    for one in (retriever, *others):
        evaluation = method.pool_domains(
            [
                method.evaluate(data, one, several=wanted.several, k=wanted.k, folder=parts, progress=tell)
                for data in sets
            ]
        )
        tell(f"{one.name}: chance", 0, 1)
        evaluations.append(evaluation)
        retrievers.append(_retriever(evaluation, edges, wanted, _moved(one, pairs, wanted, parts, tell)))
    found = Position(
        model=_model_facts(retriever, name),
        run=_run_facts(wanted, edges, sets),
        retrievers=retrievers,
        saliency=seen(settled, retriever, edges, wanted, parts, tell),
        queries=_rows(evaluations, edges),
    )
    found.findings = findings(found)
    found.warnings = warnings(found, [line for data in sets for line in data.skipped])
    found.run["seconds"] = round(time.perf_counter() - start, 1)
    return found


def _retriever(
    evaluation: Evaluation, edges: Sequence[int], options: Options, moved: dict[str, Any] | None
) -> Retriever:
    settings: dict[str, Any] = {
        "edges": edges, "bins": options.bins, "resamples": options.resamples, "generator": options.seed
    }  # fmt: skip
    buckets = evaluation.buckets(**settings)
    return Retriever(
        name=evaluation.retriever,
        max_tokens=evaluation.max_tokens,
        overall=evaluation.overall(**settings).to_dict(),
        buckets={key: None if one is None else one.to_dict() for key, one in buckets.items()},
        reading={key: list(pair) for key, pair in evaluation.reading(edges=edges).items()},
        measures={key: float(values.mean()) for key, values in evaluation.measures.items() if key != "rank"},
        absent=evaluation.absent,
        not_found=evaluation.not_found,
        moved=moved,
    )


def _movable(sets: Sequence[RetrievalSet], options: Options, max_tokens: int | None) -> list[tuple[list[str], Fact]]:
    """Documents that are read whole and have sentences enough around an answer, the longest first, one query each."""
    chosen: dict[str, tuple[int, list[str], Fact]] = {}
    for data in sets:
        for query in data.queries:
            name = next((d for d in data.positives(query.id) if d in data.documents), None)
            if name is None or f"{data.name}/{name}" in chosen:
                continue
            if not reads_whole(query, max_tokens):
                continue
            around = _around(data.documents[name], query)
            if around is not None and len(around[0]) >= PLACES - 1:
                chosen[f"{data.name}/{name}"] = (query.tokens or 0, *around)
    ranked = sorted(chosen.values(), key=lambda one: -one[0])[: options.moved]
    return [(sentences, fact) for _, sentences, fact in ranked]


def _around(text: str, query: Query) -> tuple[list[str], Fact] | None:
    """The sentences of a document without the answer, and the answer; None where the span is not of this text."""
    start, stop = query.span
    evidence = text[start:stop].strip()
    if len(text) != query.characters or not evidence:
        return None
    sides = (text[:start], text[stop:])
    sentences = [side[a:b].strip() for side in sides for a, b in split_sentences(side)]
    return [one for one in sentences if one], Fact(statement=evidence, question=query.text)


def _moved(
    retriever: Encoder | Scorer,
    pairs: list[tuple[list[str], Fact]],
    options: Options,
    parts: Path | None,
    tell: Tell,
) -> dict[str, Any] | None:
    if not pairs:
        return None
    fillers, facts = [sentences for sentences, _ in pairs], [fact for _, fact in pairs]
    found = method.paired_intervention(
        retriever, fillers, facts, positions=PLACES, generator=options.seed, folder=parts, progress=tell
    )
    return {
        "positions": found.positions.mean(0).tolist(),
        "curve": found.curve.tolist(),
        "slope": found.slope.to_dict(),
        "share": found.share,
        "without": found.without,
        "documents": len(facts),
    }


def _rows(evaluations: Sequence[Evaluation], edges: Sequence[int]) -> list[dict[str, Any]]:
    first = evaluations[0]
    names = bucket_names(edges)
    where = bucket_of(first.tokens, edges)
    rows = []
    for i, query in enumerate(first.queries):
        row = {
            "query": query,
            "document": first.documents[i],
            "domain": first.domains[i],
            "position": float(first.positions[i]),
            "tokens": int(first.tokens[i]),
            "bucket": names[where[i]].split(" ")[0],
        }
        for one in evaluations:
            row |= {
                f"ndcg {one.retriever}": float(one.scores[i]),
                f"rank {one.retriever}": int(one.measures["rank"][i]),
            }
        rows.append(row)
    return rows


def _model_facts(retriever: Encoder | Scorer, name: str | None) -> dict[str, Any]:
    model = getattr(retriever, "model", None)
    if isinstance(model, nn.Module):
        facts = model_facts(model, name or retriever.name)
    else:
        facts = {"name": name or retriever.name, "class": type(retriever).__name__}
    return facts | {"pooling": getattr(retriever, "pooling", None), "reads": getattr(retriever, "max_tokens", None)}


def _run_facts(options: Options, edges: Sequence[int], sets: Sequence[RetrievalSet]) -> dict[str, Any]:
    dropped: dict[str, int] = {}
    for data in sets:
        for why, count in data.dropped.items():
            dropped[why] = dropped.get(why, 0) + count
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **versions(),
        "sets": [data.name for data in sets],
        "queries": sum(len(data.queries) for data in sets),
        "documents": sum(len(data.documents) for data in sets),
        "tokens counted by": ", ".join(dict.fromkeys(data.counted_by for data in sets)),
        "dropped": dropped,
        "skipped": sum(len(data.skipped) for data in sets),
        "settings": asdict(options) | {"edges": list(edges)},
    }
