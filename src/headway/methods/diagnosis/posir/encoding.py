"""Embeddings of a whole corpus, part by part: an interrupted run goes on behind its last finished part.

A part is kept under everything it depends on: the encoder and its texts in order. See `headway.parts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from headway.errors import NumericError
from headway.methods.diagnosis.posir.encoders import Encoder
from headway.parts import Parts
from headway.progress import Tell

PART = 256


def encoded_blocks(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    is_query: bool = False,
    folder: str | Path | None = None,
    part: int = PART,
    progress: Tell | None = None,
) -> Iterator[tuple[int, Float[np.ndarray, "texts width"]]]:
    """(number of the first text, embeddings) for `part` texts at a time. With a folder, parts are kept and found again;
    without one nothing is. Raises NumericError for an embedding that is not finite, with the number of its text."""
    kept = Parts(folder, prefix="embeddings-")
    what = f"{encoder.name}: {'queries' if is_query else 'documents'}"
    for start in range(0, len(texts), part):
        own = list(texts[start : start + part])
        made = kept.arrays(
            [encoder.identity, is_query, own], partial(_block, encoder, own, is_query=is_query, start=start)
        )
        if progress is not None:
            progress(what, min(start + part, len(texts)), len(texts))
        yield start, made["embeddings"]


def encoded(encoder: Encoder, texts: Sequence[str], **options: object) -> Float[np.ndarray, "texts width"]:
    """All embeddings at once."""
    return np.concatenate([block for _, block in encoded_blocks(encoder, texts, **options)])  # type: ignore[arg-type]


def _block(encoder: Encoder, texts: list[str], *, is_query: bool, start: int) -> dict[str, np.ndarray]:
    block = np.asarray(encoder.encode(texts, is_query=is_query), dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(block).all(1))
    if bad.size:
        raise NumericError(
            f"encoder {encoder.name!r}: the embedding of text {start + bad[0]} ({texts[bad[0]][:40]!r}…) has NaN or "
            "infinity. Load the model in float32."
        )
    return {"embeddings": block}
