"""Where the pooling token looks, on the same axis as the saliency.

    a_l(t) = mean over heads of the weights on token t, from the rows that are pooled
             (the first token for "cls", the last for "last", all rows for "mean")
    curve  = a_l(t) / mean_t a_l over inner tokens, interpolated to 100 points: 1 is as much as a token gets on average

Read through the door, as received mass of those rows: no map is kept. Documents run one by one, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from headway.door import capture
from headway.door.evaluating import evaluating
from headway.errors import ArgumentError
from headway.methods.diagnosis.posir.encoders import TransformersEncoder
from headway.methods.diagnosis.posir.saliency import DOCUMENT_TOKENS, POINTS, _inner
from headway.progress import Tell


@dataclass(frozen=True, kw_only=True)
class AttentionByPosition:
    """`layers` are the curves of each layer, the mean over documents; `curves` those of each document, the mean over
    layers; `special` the share of the mass on special tokens by layer."""

    layers: Float[np.ndarray, "layers points"]
    curves: Float[np.ndarray, "documents points"]
    special: Float[np.ndarray, " layers"]

    @property
    def mean(self) -> Float[np.ndarray, " points"]:
        return self.curves.mean(0)


@torch.no_grad()
def pooling_attention(
    encoder: TransformersEncoder,
    documents: Sequence[str],
    *,
    max_tokens: int = DOCUMENT_TOKENS,
    points: int = POINTS,
    progress: Tell | None = None,
) -> AttentionByPosition:
    """Attention mass of the pooled rows by relative position in what was read."""
    if not documents:
        raise ArgumentError("documents: got none, expected some texts.")
    curves, shares = [], []
    with evaluating(encoder.model):
        for number, text in enumerate(documents):
            inputs = encoder.tokenized([text], is_query=False, max_tokens=max_tokens)
            size = inputs["input_ids"].shape[1]
            rows = {"cls": torch.tensor([0]), "last": torch.tensor([size - 1]), "mean": None}[encoder.pooling]
            with capture(encoder.model, what=("received",), rows=rows) as captured:
                encoder.model(**inputs)
            mass = captured.result().stack("received")[:, 0].mean(1).double().cpu().numpy()
            keep = _inner(encoder.tokenizer, inputs["input_ids"][0].cpu().numpy())
            if keep.sum() < 2:
                raise ArgumentError(f"documents: number {number} has {keep.sum()} tokens, expected 2 or more.")
            shares.append(1 - mass[:, keep].sum(1) / mass.sum(1))
            curves.append(_curves(mass[:, keep], points))
            if progress is not None:
                progress(f"{encoder.name}: attention", number + 1, len(documents))
    found = np.stack(curves)
    return AttentionByPosition(layers=found.mean(0), curves=found.mean(1), special=np.mean(shares, 0))


def _curves(mass: Float[np.ndarray, "layers tokens"], points: int) -> Float[np.ndarray, "layers points"]:
    relative = mass / mass.mean(1, keepdims=True)
    places, grid = np.linspace(0, 1, mass.shape[1]), np.linspace(0, 1, points)
    return np.stack([np.interp(grid, places, row) for row in relative])
