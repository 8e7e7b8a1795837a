"""Where in a document the score listens, and where the pooled rows look. Answers stand in the middle, so that a slope
is the model's own; finished groups of documents are kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.methods.diagnosis import posir as method
from headway.methods.diagnosis.posir import Encoder, PooledEncoder, Query, RetrievalSet, Scorer, TransformersEncoder
from headway.methods.diagnosis.posir.saliency import DOCUMENT_TOKENS, FINE
from headway.parts import Parts
from headway.progress import Tell
from headway.statistics import bootstrap

if TYPE_CHECKING:
    from headway.diagnose.position.analysing import Options

FIFTH = 0.2
#: Special tokens that an encoder puts around a text.
SPECIAL = 2
#: Batches that are kept together.
GROUP = 2


def seen(
    sets: Sequence[RetrievalSet],
    retriever: Encoder | Scorer,
    edges: Sequence[int],
    options: Options,
    parts: Path | None,
    tell: Tell,
) -> dict[str, Any] | None:
    """Saliency, and the attention of the pooled rows where the door reaches it; None where there is no gradient, where
    the model's numbers are too coarse for one, or no document to look at."""
    least = options.least_tokens or edges[1]
    pairs = _pairs(sets, least, getattr(retriever, "max_tokens", None), options)
    if not pairs or not isinstance(retriever, PooledEncoder) or retriever.dtype not in FINE:
        return None
    curves, read = _curves(retriever, pairs, options, parts, tell)
    mass = method.Curves(curves=curves, read=read)
    first, last = mass.mass(0, FIFTH), mass.mass(1 - FIFTH, 1)
    known = np.isfinite(first)
    found: dict[str, Any] = {
        "documents": len(pairs),
        "least_tokens": least,
        "mean": mass.mean.tolist(),
        "spread": mass.spread.tolist(),
        "read": float(read.mean()),
        "silent": int((~known).sum()),
        "attention": None,
    }
    for name, values in (("first", first), ("last", last)):
        sample = values[known]
        found[name] = bootstrap(sample, generator=options.seed).to_dict() if sample.size else None
    if isinstance(retriever, TransformersEncoder):
        texts = [document for _, document in pairs]
        attention = method.pooling_attention(retriever, texts, progress=tell)
        found["attention"] = attention.mean.tolist()
        found["special"] = float(attention.special.mean())
    return found


def reads_whole(query: Query, max_tokens: int | None) -> bool:
    """Whether the query's document fits into what is read, special tokens included."""
    return max_tokens is None or (query.tokens or 0) + SPECIAL <= max_tokens


def _pairs(sets: Sequence[RetrievalSet], least: int, max_tokens: int | None, options: Options) -> list[tuple[str, str]]:
    """(question, document) with the answer in the middle of a long document that is read whole, each document once,
    drawn at random."""
    limit = min(max_tokens or DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    found: dict[str, tuple[str, str]] = {}
    for data in sets:
        for query in method.middle_evidence(data.queries, least_tokens=least):
            name = next((d for d in data.positives(query.id) if d in data.documents), None)
            if name is not None and reads_whole(query, limit):
                found.setdefault(f"{data.name}/{name}", (query.text, data.documents[name]))
    every = list(found.values())
    order = np.random.default_rng(options.seed).permutation(len(every))[: options.saliency]
    return [every[i] for i in sorted(order.tolist())]


def _curves(
    encoder: PooledEncoder,
    pairs: Sequence[tuple[str, str]],
    options: Options,
    parts: Path | None,
    tell: Tell,
) -> tuple[np.ndarray, np.ndarray]:
    """Curves and the shares read, group by group, from the folder where they are there already."""
    kept, group = Parts(parts, prefix="saliency-"), GROUP * options.batch
    curves, read = [], []
    for start in range(0, len(pairs), group):
        own = pairs[start : start + group]
        made = kept.arrays(
            ["saliency", encoder.identity, options.batch, own],
            partial(_saliency_arrays, encoder, own, options.batch),
        )
        curves.append(made["curves"])
        read.append(made["read"])
        tell(f"{encoder.name}: gradients", start + len(own), len(pairs))
    return np.concatenate(curves), np.concatenate(read)


def _saliency_arrays(encoder: PooledEncoder, pairs: Sequence[tuple[str, str]], batch: int) -> dict[str, np.ndarray]:
    found = method.saliency(encoder, pairs, batch=batch)
    return {"curves": found.curves, "read": found.read}
