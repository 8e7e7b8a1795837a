"""Embeddings of a whole corpus, part by part: an interrupted run goes on behind its last finished part.

Parts are written whole, in a folder named by everything they depend on (the encoder, and every text in order), so no
part of another model or corpus is ever read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from headway.errors import NumericError
from headway.files import write_atomically
from headway.methods.diagnosis.posir.encoders import Encoder

PART = 256
#: Called with (what, done, total).
Progress = Callable[[str, int, int], None]


def encoded_blocks(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    is_query: bool = False,
    folder: str | Path | None = None,
    part: int = PART,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Float[np.ndarray, "texts width"]]]:
    """(number of the first text, embeddings) for `part` texts at a time. With a folder, parts are kept and found again;
    without one nothing is. Raises NumericError for an embedding that is not finite, with the number of its text."""
    home = None if folder is None else Path(folder) / fingerprint_of(encoder, texts, is_query=is_query, part=part)
    what = f"{encoder.name}: {'queries' if is_query else 'documents'}"
    for start in range(0, len(texts), part):
        own = texts[start : start + part]
        path = None if home is None else home / f"part-{start // part:06d}.npy"
        block = _kept(path, len(own))
        if block is None:
            block = np.asarray(encoder.encode(own, is_query=is_query), dtype=np.float32)
            bad = np.flatnonzero(~np.isfinite(block).all(1))
            if bad.size:
                raise NumericError(
                    f"encoder {encoder.name!r}: the embedding of text {start + bad[0]} ({own[bad[0]][:40]!r}…) has NaN "
                    "or infinity. Load the model in float32."
                )
            if path is not None:
                _keep(path, block)
        if progress is not None:
            progress(what, min(start + part, len(texts)), len(texts))
        yield start, block


def encoded(encoder: Encoder, texts: Sequence[str], **options: object) -> Float[np.ndarray, "texts width"]:
    """All embeddings at once."""
    return np.concatenate([block for _, block in encoded_blocks(encoder, texts, **options)])  # type: ignore[arg-type]


def fingerprint_of(encoder: Encoder, texts: Sequence[str], *, is_query: bool, part: int) -> str:
    """The name of the folder: encoder, side, size of parts, and every text with its place."""
    whole = hashlib.sha256(f"{encoder.identity}\0{is_query}\0{part}\0{len(texts)}".encode())
    for text in texts:
        whole.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return whole.hexdigest()[:24]


def _keep(path: Path, block: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, block, allow_pickle=False)
    write_atomically(path, data.getvalue())


def _kept(path: Path | None, count: int) -> np.ndarray | None:
    """The stored part, or None where there is none that can be used."""
    if path is None or not path.exists():
        return None
    try:
        block = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return None
    return block if block.ndim == 2 and len(block) == count else None
