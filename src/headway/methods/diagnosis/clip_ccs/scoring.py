"""From pictures to scored heads: contributions of the analysed heads batch by batch, TextSpan, labels, verdicts.

A head's contribution is one vector per picture, so L layers of h heads cost pictures × L × h × joint numbers; they are
kept in half precision, on disk where a folder is given. A batch that is on disk already is not run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError
from headway.hosts.fingerprint import fingerprint
from headway.methods.diagnosis.clip_ccs.bank import TextBank
from headway.methods.diagnosis.clip_ccs.consistency import HeadConcept, score_head
from headway.methods.diagnosis.clip_ccs.decomposition import decompose
from headway.methods.diagnosis.clip_ccs.judges import Judge, Labeller, lexicon
from headway.methods.diagnosis.clip_ccs.textspan import RANK, TEXTS, TextSpan, text_span
from headway.methods.diagnosis.clip_ccs.towers import Tower
from headway.parts import Parts
from headway.progress import Tell

Head = tuple[int, int]
#: Layers whose heads are described, counted from the last: arXiv 2503.11103.
LAST_LAYERS = 4


@dataclass(frozen=True)
class Contributions:
    """What the heads of some layers wrote into the embeddings of pictures. `rest` is the sum of everything else (other
    heads, MLPs, the first stage), so heads and rest add up to `embedding`. `error` is that of the reconstruction."""

    layers: tuple[int, ...]
    heads: Float[Tensor, "images layers heads joint"]
    rest: Float[Tensor, "images joint"]
    embedding: Float[Tensor, "images joint"]
    error: float

    def of(self, place: Head) -> Float[Tensor, "images joint"]:
        layer, head = place
        return self.heads[:, self.layers.index(layer), head].float()


def last_layers(part: Tower, count: int = LAST_LAYERS) -> list[int]:
    """The last `count` layers of a tower, or all where it has fewer."""
    if count < 1:
        raise ArgumentError(f"layers: got {count}, expected at least one.")
    return list(range(max(part.layers - count, 0), part.layers))


def gather(
    part: Tower,
    batches: Iterable[Any],
    *,
    layers: Sequence[int] | None = None,
    folder: Path | None = None,
    progress: Tell | None = None,
    total: int = 0,
) -> Contributions:
    """The contributions of all heads of `layers` (the last four by default) over batches of pictures.

    Each batch is decomposed, checked and cut to half precision; with `folder` it is kept there, and taken from there
    when the same model has decomposed the same batch before."""
    chosen = part.check_layers(last_layers(part) if layers is None else layers)
    made_by = [fingerprint(part.model).to_dict(), part.kind, chosen]
    kept, parts = Parts(folder), []
    for done, batch in enumerate(batches, start=1):
        own = batch if isinstance(batch, Tensor) else dict(batch)
        parts.append(kept.arrays([made_by, own], partial(_decomposed, part, batch, chosen)))
        if progress is not None:
            progress("decomposing pictures", done, max(total, done))
    if not parts:
        raise ArgumentError("batches: got none, expected at least one batch of pictures.")
    names = ("heads", "rest", "embedding")
    joined = {name: torch.from_numpy(np.concatenate([p[name] for p in parts])) for name in names}
    return Contributions(tuple(chosen), **joined, error=max(float(p["error"].max()) for p in parts))


def describe(
    part: Tower, found: Contributions, bank: TextBank, *, texts: int = TEXTS, rank: int = RANK
) -> dict[Head, TextSpan]:
    """TextSpan of every gathered head. Raises HostError for a bank that another model embedded."""
    bank.check(part.model)
    return {
        (layer, head): text_span(found.of((layer, head)), bank.vectors, texts=texts, rank=rank, head_dim=part.head_dim)
        for layer in found.layers
        for head in range(part.heads)
    }


def score(
    spans: Mapping[Head, TextSpan],
    bank: TextBank,
    *,
    texts: int = TEXTS,
    labeller: Labeller | None = None,
    judges: Mapping[str, Judge] | None = None,
) -> list[HeadConcept]:
    """Concept and score of every described head. By default the bank's own concepts, or everyday words, label and
    judge."""
    words = lexicon(bank.concepts)
    return [
        score_head(
            place,
            [bank.texts[i] for i in span.chosen],
            labeller=words.label if labeller is None else labeller,
            judges={"lexicon": words} if judges is None else judges,
            asked=texts,
            explained=span.explained[-1] if span.explained else 0.0,
            notes=(span.note,) if span.note else (),
        )
        for place, span in spans.items()
    ]


def _decomposed(part: Tower, batch: Any, layers: Sequence[int]) -> dict[str, np.ndarray]:
    whole = decompose(part, batch)
    heads = whole.heads[:, list(layers)].float()
    return {
        "heads": heads.half().cpu().numpy(),
        "rest": (whole.embedding.float() - heads.sum((1, 2))).cpu().numpy(),
        "embedding": whole.embedding.float().cpu().numpy(),
        "error": np.array([whole.error]),
    }
