"""Receiver heads: heads in which many later sentences look back at the same few sentences.

    B_ij = mean attention from tokens of s_i to the tokens of s_j that they see
    v_j  = mean over i ≥ j + p of B_ij                         how much later sentences look back at s_j
    κ    = kurtosis of v over j (Fisher, biased)               high: a few sentences draw it all

Paper: Thought Anchors, arXiv 2506.19143. Receiver heads are those with the highest κ averaged over traces, the first
layer aside; the receiver score of a sentence is its mean v over them. Only B leaves the model, block by block; no map
of all tokens is made. Pairs outside a sliding window are NaN, which is no sign of neglect.

A vertical stripe may be a place and not a content: `position_null` reads the same sentences in other orders and gives
what any sentence draws at that place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn

from headway.door import CaptureSpec, capture
from headway.door.evaluating import evaluating
from headway.errors import ArgumentError
from headway.statistics import Measurement, Null, against_null

Span = tuple[int, int]
Head = tuple[int, int]
#: Sentences this near are not looked back at (the released code; replications use 16).
PROXIMITY = 4
#: How many receiver heads (the paper; replications use 32), and the layers that are never among them.
TOP_HEADS, SKIPPED_LAYERS = 20, (0,)


def sentence_maps(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], spans: Sequence[Span]
) -> Float[np.ndarray, "layers heads n n"]:
    """B of every layer and head, in the order of layers; upper triangle NaN. One forward, by reductions at the door.
    Layers without self-attention have no row: `layered_maps` tells the numbers of those that have."""
    return layered_maps(model, ids, spans)[0]


def layered_maps(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], spans: Sequence[Span]
) -> tuple[Float[np.ndarray, "layers heads n n"], tuple[int, ...]]:
    """`sentence_maps`, and the number of the layer behind each of its rows."""
    spec = CaptureSpec(what=("block_mean",), spans=tuple(spans))
    # Logits of all tokens are a fifth of a small model's forward, and nobody reads them here.
    short = {"logits_to_keep": 1} if "logits_to_keep" in signature(type(model).forward).parameters else {}
    with torch.no_grad(), evaluating(model), capture(model, spec) as handle:
        model(input_ids=ids, use_cache=False, **short)
    found = handle.result()
    names = sorted(found.sites, key=lambda name: found.sites[name].layer)
    names = [name for name in names if found.sites[name].kind == "self"]
    maps = [found[name]["block_mean"] for name in names]
    if len({m.shape for m in maps}) != 1:
        raise ArgumentError("model: got layers with different numbers of heads, expected the same in every layer.")
    return torch.stack(maps)[:, 0].numpy(force=True), tuple(found.sites[name].layer for name in names)


def vertical_scores(
    maps: Float[np.ndarray, "*heads n n"], *, proximity: int = PROXIMITY, depth_control: bool = False
) -> Float[np.ndarray, "*heads n"]:
    """v of each head: NaN for the last `proximity` sentences, which no far sentence follows.

    depth_control: rows become ranks over their count first, so that rows with few sentences before them, whose
    attention is spread less thin, weigh no more. Raises ArgumentError for maps that are missing or not square, and
    for fewer than 2 · `proximity` sentences."""
    shape: tuple[int, ...] = tuple(getattr(maps, "shape", ()))
    if len(shape) < 2 or shape[-1] != shape[-2]:
        got = f"shape {shape}" if shape else type(maps).__name__
        raise ArgumentError(f"maps: got {got}, expected (…, sentences, sentences). Use `sentence_maps`.")
    count = shape[-1]
    if proximity < 1 or count < 2 * proximity:
        raise ArgumentError(
            f"proximity: got {proximity} for {count} sentences, expected at least 1 and at most half the sentences "
            f"({count // 2}): the trace is too short for receiver scores. Lower it, or read a longer trace."
        )
    far = np.subtract.outer(np.arange(count), np.arange(count)) >= proximity
    kept = np.where(far, np.asarray(maps, dtype=float), np.nan)
    if depth_control:
        ranks = stats.rankdata(kept, axis=-1, nan_policy="omit")
        known = np.isfinite(kept).sum(-1, keepdims=True)
        kept = np.where(np.isfinite(kept), ranks / np.maximum(known, 1), np.nan)
    known = np.isfinite(kept).sum(-2)
    return np.where(known > 0, np.nansum(kept, -2) / np.maximum(known, 1), np.nan)


def kurtosis(vertical: Float[np.ndarray, "*heads n"]) -> Float[np.ndarray, "*heads"]:
    """Fisher's kurtosis m4 / m2² − 3 of the known entries (biased moments); −∞ where they are all alike, or none is
    known (a window that no far sentence is in)."""
    known = np.isfinite(vertical)
    count = np.maximum(known.sum(-1, keepdims=True), 1)

    def moment(values: np.ndarray) -> np.ndarray:
        return np.where(known, values, 0.0).sum(-1, keepdims=True) / count

    mean = moment(vertical)
    off = vertical - mean
    second, fourth = moment(off**2)[..., 0], moment(off**4)[..., 0]
    # Differences at the size of rounding are none: a head of constant attention has no peaks.
    alike = second <= (1e-12 * np.abs(mean[..., 0])) ** 2 + 1e-300
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(alike, -np.inf, fourth / second**2 - 3)


def mean_kurtosis(by_trace: Sequence[Float[np.ndarray, "layers heads"]]) -> Float[np.ndarray, "layers heads"]:
    """The mean over traces of each head's kurtosis; traces in which it is undefined are left out, −∞ if all are."""
    stacked = np.stack([np.asarray(k, dtype=float) for k in by_trace])
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), -np.inf)


def receiver_heads(
    scores: Float[np.ndarray, "layers heads"], *, top: int = TOP_HEADS, skip_layers: Sequence[int] = SKIPPED_LAYERS
) -> list[Head]:
    """The `top` heads by kurtosis, highest first; heads without one and those of `skip_layers` never."""
    if top < 1:
        raise ArgumentError(f"top: got {top}, expected at least 1.")
    ranked = sorted(
        ((layer, head) for layer, head in np.ndindex(scores.shape) if layer not in set(skip_layers)),
        key=lambda place: (-scores[place], place),
    )
    return [place for place in ranked if np.isfinite(scores[place])][:top]


def receiver_scores(vertical: Float[np.ndarray, "layers heads n"], heads: Sequence[Head]) -> Float[np.ndarray, " n"]:
    """The receiver score of each sentence: the mean of v over the given heads. NaN for the last sentences."""
    if not heads:
        raise ArgumentError("heads: got none, expected (layer, head) pairs. Use `receiver_heads`.")
    chosen = np.stack([vertical[layer, head] for layer, head in heads])
    known = np.isfinite(chosen).sum(0)
    return np.where(known > 0, np.nansum(chosen, 0) / np.maximum(known, 1), np.nan)


def split_half_reliability(by_trace: Sequence[Float[np.ndarray, "layers heads"]]) -> Measurement:
    """Pearson's r over heads between mean kurtoses of odd and of even traces, with Fisher's interval. Heads that are
    undefined in a half are left out. Raises ArgumentError for a single trace."""
    if len(by_trace) < 2:
        raise ArgumentError(f"by_trace: got {len(by_trace)} trace, expected at least 2 to split them in halves.")
    even, odd = mean_kurtosis(by_trace[::2]).ravel(), mean_kurtosis(by_trace[1::2]).ravel()
    known = np.isfinite(even) & np.isfinite(odd)
    if known.sum() < 4 or np.ptp(even[known]) == 0 or np.ptp(odd[known]) == 0:
        return Measurement(float("nan"), n=int(known.sum()))
    found = stats.pearsonr(even[known], odd[known])
    interval = found.confidence_interval()
    return Measurement(float(found.statistic), float(interval.low), float(interval.high), int(known.sum()))


@dataclass(frozen=True)
class PlaceNull:
    """Receiver scores of other sentences at the same places. `draws` holds one row for each reading in another order;
    `by_sentence[k]` what sentence k drew wherever it stood."""

    draws: Float[np.ndarray, "orders n"]
    by_sentence: Float[np.ndarray, "orders n"]

    def at(self, place: int, observed: float) -> Null | None:
        """Where the observed score of a place stands among them; None where there is no score."""
        known = self.draws[:, place][np.isfinite(self.draws[:, place])]
        return against_null(observed, known) if known.size and np.isfinite(observed) else None


def position_null(
    model: nn.Module,
    ids: Int[Tensor, "1 tokens"],
    spans: Sequence[Span],
    heads: Sequence[Head],
    *,
    generator: np.random.Generator,
    orders: int = 12,
    proximity: int = PROXIMITY,
    depth_control: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PlaceNull:
    """Receiver scores of the trace with its sentences in `orders` random orders, by place: if a place draws as much
    whatever stands there, a high score says where a sentence is and not what it says. Tokens move with their
    sentences; what stands before, between and behind them stays."""
    if orders < 1:
        raise ArgumentError(f"orders: got {orders}, expected at least 1.")
    count = len(spans)
    draws, owners = np.full((orders, count), np.nan), np.full((orders, count), np.nan)
    for turn in range(orders):
        if progress is not None:
            progress(turn, orders)
        order = generator.permutation(count)
        moved, places = reordered(ids, spans, order)
        vertical = vertical_scores(
            sentence_maps(model, moved, places), proximity=proximity, depth_control=depth_control
        )
        draws[turn] = receiver_scores(vertical, heads)
        owners[turn, order] = draws[turn]
    return PlaceNull(draws, owners)


def reordered(
    ids: Int[Tensor, "1 tokens"], spans: Sequence[Span], order: Sequence[int] | Any
) -> tuple[Int[Tensor, "1 tokens"], list[Span]]:
    """The text with sentence `order[k]` at place k, and where the sentences now are, by place."""
    parts, places, at = [], [], 0
    before = 0
    for place, sentence in enumerate(order):
        gap = ids[:, before : spans[place][0]]
        body = ids[:, spans[sentence][0] : spans[sentence][1]]
        parts += [gap, body]
        at += gap.shape[1]
        places.append((at, at + body.shape[1]))
        at += body.shape[1]
        before = spans[place][1]
    return torch.cat([*parts, ids[:, before:]], 1), places
