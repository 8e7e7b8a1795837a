"""TextSpan: the few texts whose directions explain most of what one head writes.

    R ← R V Vᵀ  (V: leading right singular vectors of X);   X ← X − mean;   Y ← mean
    repeat m times:  j = argmax_k std(X r_k);   Y += X r_j r_jᵀ / ‖r_j‖²;   X and R lose their parts along r_j

X holds the head's contributions over images, R unit text embeddings. The r_k are not made unit again, so a text that
lies further inside the head's span wins. Choosing works on the span alone, so the mean of X does not matter after it.

Paper: arXiv 2310.05916, algorithm 1 (r = 80, m = 10 in its code; arXiv 2503.11103 uses m = 5 and the last four layers).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError, NumericError

log = logging.getLogger(__name__)
RANK, TEXTS = 80, 5
#: A text whose part inside the span is shorter than this has no direction left.
LEAST_LENGTH = 1e-5
#: Directions of X below this share of its largest are rounding.
LEAST_SHARE = 1e-6
#: Texts end where none of them varies over the images any more, relative to the first.
LEAST_SPREAD = 1e-7


@dataclass(frozen=True)
class TextSpan:
    """`chosen` are indices into the bank, best first; `explained` the share of the head's variance after each of them;
    `reconstruction` is Y; `rank` the rank that was used and `note` why it is not the one asked for. Where the span ran
    out of directions, `chosen` is shorter than asked for."""

    chosen: tuple[int, ...]
    explained: tuple[float, ...]
    reconstruction: Float[Tensor, "images joint"]
    residual: Float[Tensor, "images joint"]
    directions: Float[Tensor, "texts joint"]
    rank: int
    note: str = ""


def text_span(
    contributions: Float[Tensor, "images joint"],
    bank: Float[Tensor, "texts joint"],
    *,
    texts: int = TEXTS,
    rank: int = RANK,
    head_dim: int | None = None,
) -> TextSpan:
    """The `texts` directions of the bank that explain most of one head.

    `rank` is cut to the number of images and to `head_dim`, the most that a head can write, with a note. Raises
    ArgumentError for a bank of another width (it was embedded by another model), of fewer texts than asked for, or
    with empty (zero) or repeated rows."""
    residual, remaining = _checked(contributions, bank, texts, rank)
    allowed = min(rank, residual.shape[0], residual.shape[1], head_dim or residual.shape[1])
    note = (
        ""
        if allowed == rank
        else f"rank {rank} cut to {allowed}: {residual.shape[0]} images, head dimension {head_dim}"
    )
    span = torch.linalg.svd(residual, full_matrices=False)
    kept = max(1, int((span.S[:allowed] > LEAST_SHARE * span.S[0]).sum()))
    basis = span.Vh[:kept]
    remaining = remaining @ basis.T @ basis
    mean = residual.mean(0, keepdim=True)
    residual = residual - mean
    total = float(residual.square().sum())
    fitted = mean.expand_as(residual).clone()
    chosen: list[int] = []
    explained, directions, largest = [], [], 0.0
    for _ in range(texts):
        spread = (residual @ remaining.T).std(0, unbiased=False)
        spread[remaining.norm(dim=-1) < LEAST_LENGTH] = -1.0
        spread[chosen] = -1.0
        best = int(spread.argmax())
        largest = float(spread[best]) if not chosen else largest
        if float(spread[best]) <= LEAST_SPREAD * max(largest, total**0.5):
            break
        direction = remaining[best] / remaining[best].norm()
        along = residual @ direction
        fitted += along[:, None] * direction
        residual = residual - along[:, None] * direction
        remaining = remaining - (remaining @ direction)[:, None] * direction
        chosen.append(best)
        directions.append(direction)
        explained.append(1.0 - float(residual.square().sum()) / total if total > 0 else 1.0)
    kind = contributions.dtype
    stack = torch.stack(directions) if directions else fitted.new_zeros(0, fitted.shape[1])
    return TextSpan(tuple(chosen), tuple(explained), fitted.to(kind), residual.to(kind), stack.to(kind), kept, note)


def completeness(
    heads: Float[Tensor, "images layers heads joint"],
    stages: Float[Tensor, "images stages joint"],
    fitted: dict[tuple[int, int], Tensor],
) -> Float[Tensor, "images joint"]:
    """Embeddings with the fitted heads replaced by what their texts explain and all other heads by their mean; MLPs
    stay. What a classifier keeps on these says how much the texts tell."""
    total = stages.sum(1) + heads.mean(0, keepdim=True).sum((1, 2))
    for (layer, head), y in fitted.items():
        total = total + y - heads[:, layer, head].mean(0, keepdim=True)
    return total


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts, stripped. Raises ArgumentError for an empty one or one given twice, with its line."""
    seen: dict[str, int] = {}
    for line, text in enumerate(texts, start=1):
        bare = " ".join(str(text).split())
        if not bare:
            raise ArgumentError(f"texts: got an empty text at line {line}, expected words. Remove the line.")
        if bare in seen:
            raise ArgumentError(
                f"texts: got {bare!r} at lines {seen[bare]} and {line}, expected each text once. Remove one of them."
            )
        seen[bare] = line
    return list(seen)


def _checked(contributions: Tensor, bank: Tensor, texts: int, rank: int) -> tuple[Tensor, Tensor]:
    if contributions.ndim != 2 or contributions.shape[0] < 2:
        raise ArgumentError(
            f"contributions: got shape {tuple(contributions.shape)}, expected (images, joint) of two or more images."
        )
    if bank.ndim != 2 or bank.shape[1] != contributions.shape[1]:
        raise ArgumentError(
            f"bank: got shape {tuple(bank.shape)}, expected (texts, {contributions.shape[1]}): the bank must be "
            "embedded by the text tower of the model whose heads are described."
        )
    if not 1 <= texts <= bank.shape[0] or rank < 1:
        raise ArgumentError(
            f"texts, rank: got {texts} and {rank}, expected 1 ≤ texts ≤ {bank.shape[0]} (the bank) and rank ≥ 1."
        )
    x, r = contributions.double(), bank.double()
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(r).all()):
        raise NumericError("contributions, bank: got NaN or infinity, expected finite numbers.")
    length = r.norm(dim=-1, keepdim=True)
    if bool((length == 0).any()):
        raise ArgumentError(f"bank: got a zero vector at row {int(length.argmin())}, expected the embedding of a text.")
    return x, r / length
