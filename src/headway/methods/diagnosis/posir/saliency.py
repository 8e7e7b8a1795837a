"""Which tokens of a document a score listens to: input-gradient norms on an axis of relative position.

    g_t = ‖ ∂ cos(q, pool(model(x))) / ∂ x_t ‖₂ ,    curve = interpolation of min(g / P₉₉(g), 1) to 100 points

x_t are the input embeddings, taken where the model's embedding module gives them, so no model code changes. Evidence in
the middle of long documents is what to choose (`middle_evidence`): any slope is then the model's own. Documents go
through in batches of at most `batch` documents of about one length; parameters get no gradient, so memory is that of
one batch of activations.

axis="document" places tokens in the whole document, with 0 behind the cut; axis="read" in what was read, as the paper's
code does. Paper: PosIR, arXiv 2601.08363.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, HostError, NumericError, unknown
from headway.methods.diagnosis.posir.data import Query
from headway.methods.diagnosis.posir.encoders import PooledEncoder
from headway.progress import Tell

POINTS, PERCENTILE = 100, 99
QUERY_TOKENS, DOCUMENT_TOKENS = 512, 2048
BATCH = 8
AXES = ("document", "read")
#: Numbers fine enough for gradients of long documents.
FINE = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One curve per document on POINTS relative positions from 0 to 1. `read` is the share of each document that was
    read, `silent` counts documents with no gradient at all."""

    curves: Float[np.ndarray, "documents points"]
    read: Float[np.ndarray, " documents"]
    silent: int = 0

    @property
    def mean(self) -> Float[np.ndarray, " points"]:
        return self.curves.mean(0)

    @property
    def spread(self) -> Float[np.ndarray, " points"]:
        """The standard deviation over documents."""
        return self.curves.std(0)

    def mass(self, low: float, high: float) -> Float[np.ndarray, " documents"]:
        """The share of each curve between two relative positions; NaN for a silent one."""
        x = np.linspace(0, 1, self.curves.shape[1])
        inside = (x >= low) & ((x < high) | (high >= 1))
        total = self.curves.sum(1)
        return np.where(total > 0, self.curves[:, inside].sum(1) / np.where(total > 0, total, 1), np.nan)


def middle_evidence(
    queries: Sequence[Query], *, least_tokens: int = 1024, low: float = 0.4, high: float = 0.6
) -> list[Query]:
    """The queries whose document is long and whose answer stands in its middle, so that a slope is the model's own."""
    return [q for q in queries if (q.tokens or 0) >= least_tokens and low <= q.position <= high]


def saliency(
    encoder: PooledEncoder,
    pairs: Sequence[tuple[str, str]],
    *,
    batch: int = BATCH,
    max_tokens: int = DOCUMENT_TOKENS,
    axis: str = "document",
    points: int = POINTS,
    progress: Tell | None = None,
) -> Curves:
    """Saliency curves of (query, document) texts; `batch` documents at once bound the memory."""
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    if not pairs:
        raise ArgumentError("pairs: got none, expected (query, document) texts. Loosen the choice of queries.")
    found: list[np.ndarray] = [np.zeros(points)] * len(pairs)
    read = np.ones(len(pairs))
    silent = 0
    for number, norms, keep, share in token_gradients(
        encoder, pairs, batch=batch, max_tokens=max_tokens, progress=progress
    ):
        read[number] = share
        silent += not norms[keep].any()
        found[number] = curve(norms[keep], share=share if axis == "document" else 1.0, points=points)
    return Curves(curves=np.stack(found), read=read, silent=silent)


def token_gradients(
    encoder: PooledEncoder,
    pairs: Sequence[tuple[str, str]],
    *,
    batch: int = BATCH,
    max_tokens: int = DOCUMENT_TOKENS,
    progress: Tell | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, float]]:
    """(number of the pair, g of its real tokens, which of them are inner ones, share of the document read).

    Special tokens at both ends are not inner. Pairs come in the order of their length."""
    if not isinstance(encoder, PooledEncoder):
        raise ArgumentError(
            f"encoder: got {type(encoder).__name__}, expected one that gradients go through: TransformersEncoder or "
            "SentenceTransformersEncoder."
        )
    if batch < 1:
        raise ArgumentError(f"batch: got {batch}, expected 1 or more documents.")
    if encoder.dtype not in FINE:
        raise NumericError(
            f"model: got {encoder.dtype}, in which gradients of long documents underflow; expected float32. Load it "
            'with dtype="float32".'
        )
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))
    with evaluating(encoder.model), _frozen(encoder.model):
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            with torch.no_grad():
                asked = encoder.pooled(
                    encoder.tokenized([pairs[i][0] for i in chosen], is_query=True, max_tokens=QUERY_TOKENS)
                )
            inputs = encoder.tokenized([pairs[i][1] for i in chosen], is_query=False, max_tokens=max_tokens)
            norms = _gradients(encoder, inputs, asked)
            for row, number in enumerate(chosen):
                real = inputs["attention_mask"][row].bool().cpu().numpy()
                keep = _inner(encoder.tokenizer, inputs["input_ids"][row].cpu().numpy()[real])
                share = _share_read(encoder, pairs[number][1], int(keep.sum()))
                yield number, norms[row][real], keep, share
            if progress is not None:
                progress(f"{encoder.name}: gradients", min(first + batch, len(order)), len(order))


def curve(
    norms: Float[np.ndarray, " tokens"], *, share: float = 1.0, points: int = POINTS
) -> Float[np.ndarray, " points"]:
    """Token values clipped at their 99th percentile, divided by it, on `points` relative positions of the document.

    `share` of the document was read; what lies behind it is 0. Where the percentile is 0 (a few tokens hold everything)
    the maximum takes its place."""
    if not norms.size or not norms.any():
        return np.zeros(points)
    top = float(np.percentile(norms, PERCENTILE)) or float(norms.max())
    grid = np.linspace(0, 1, points)
    places = np.linspace(0, share, norms.size) if norms.size > 1 else np.array([0.0])
    found = np.interp(grid, places, np.minimum(norms / top, 1.0))
    return np.where(grid <= share + 1e-12, found, 0.0)


def _gradients(encoder: PooledEncoder, inputs: dict[str, Tensor], asked: Tensor) -> np.ndarray:
    """‖∂ cosine / ∂ x_t‖ of a batch: rows do not touch each other, so the gradient of the sum is that of each."""
    with torch.enable_grad(), _leaf(encoder.model) as leaves:
        pooled = encoder.pooled(inputs)
        cosine = torch.nn.functional.cosine_similarity(pooled, asked, dim=-1)
        if len(leaves) != 1:
            raise HostError(
                f"model: its token embedding ran {len(leaves)} times in one forward, expected once; input gradients "
                "are not defined for it."
            )
        (gradient,) = torch.autograd.grad(cosine.sum(), leaves)
    if not bool(torch.isfinite(gradient).all()):
        raise NumericError("model: got NaN or infinity in the input gradients. Load it in float32.")
    return gradient.norm(dim=-1).cpu().numpy()


@contextlib.contextmanager
def _leaf(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, the output of the token embedding is a leaf that gradients reach; the list holds it."""
    owners: list[Any] = [m for m in model.modules() if callable(getattr(m, "get_input_embeddings", None))]
    module: Any = owners[0].get_input_embeddings() if owners else None
    if not isinstance(module, nn.Module):
        raise HostError("model: has no token embedding (get_input_embeddings); input gradients need one.")
    leaves: list[Tensor] = []

    def swap(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        leaves.append(leaf)
        return leaf

    hook = module.register_forward_hook(swap)
    try:
        yield leaves
    finally:
        hook.remove()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients for a while: no memory for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _inner(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """All but the special tokens at the two ends. A word that the tokenizer does not know is still a word."""
    ends = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "pad")}
    unknown_word = {getattr(tokenizer, "unk_token_id", None)} - ends
    special = np.isin(ids, [i for i in getattr(tokenizer, "all_special_ids", []) if i not in unknown_word])
    inner = np.flatnonzero(~special)
    keep = np.zeros(ids.size, dtype=bool)
    if inner.size:
        keep[inner[0] : inner[-1] + 1] = True
    return keep


def _share_read(encoder: PooledEncoder, text: str, read: int) -> float:
    prefix = getattr(encoder, "document_prefix", "")
    whole = len(encoder.tokenizer(prefix + text, add_special_tokens=False, verbose=False)["input_ids"])
    return min(read / whole, 1.0) if whole else 1.0
