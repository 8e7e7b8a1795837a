"""Where chunks begin, behind one interface: `starts(piece)` for every source of boundaries.

    Predicted    logits of a trained `BoundaryPredictor`        Oracle      the ratio ρ of dense attention
    Similarity   1 − cos(mean of w keys before, after)          Separators  behind tokens such as "." and line ends
    Fixed        every so many tokens                           Given       known places

The first three give every gap a score; `select_gaps` keeps the best: above a threshold, more than `apart` tokens from
any better one, no more than one per `chunk_tokens` tokens on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.door.call import AttentionCall
from headway.errors import ArgumentError, HostError, check_whole
from headway.methods.long_context.dhsa.labels import WINDOW, attention_ratio
from headway.methods.long_context.dhsa.predictor import BoundaryPredictor

#: Gaps this near to a better one are no boundary (window of the released non-maximum suppression).
APART = 8
#: Mean tokens per chunk at the most boundaries: blocks of 64 queries with 8 chunks each in the released code.
CHUNK_TOKENS = 8
#: Threshold on logits and on ratios in the released code.
THRESHOLD = 1.1


@dataclass(frozen=True)
class Piece:
    """New tokens of a request that are to be cut: their keys, which are real, the call they came with, and how many
    at the end (the question or instruction) form a chunk of their own."""

    key: Float[Tensor, "batch kv_heads tokens dim"]
    real: Bool[Tensor, "batch tokens"]
    call: AttentionCall
    suffix: int = 0

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    @property
    def joined(self) -> Float[Tensor, "batch tokens width"]:
        """Keys with heads side by side, zero where padded."""
        return (self.key.float() * self.real[:, None, :, None]).transpose(1, 2).flatten(2)

    @property
    def first_real(self) -> list[int]:
        return [int(row.long().argmax()) if bool(row.any()) else self.tokens - 1 for row in self.real]

    @property
    def end(self) -> list[int]:
        """Behind the last real token of each sequence."""
        return [self.tokens - int(row.flip(0).long().argmax()) for row in self.real]


class BoundarySource:
    """Says where chunks begin."""

    def starts(self, piece: Piece) -> Bool[Tensor, "batch tokens"]:
        """True where a chunk begins. The first real token of a sequence always begins one."""
        raise NotImplementedError

    def check_width(self, width: int, where: str) -> None:
        """Raises HostError where keys of `width` numbers per token do not fit."""


@dataclass(frozen=True, kw_only=True)
class Fixed(BoundarySource):
    """A boundary every `size` tokens: block-sparse attention."""

    size: int = 32

    def __post_init__(self) -> None:
        check_whole("size", self.size, 1)

    def starts(self, piece: Piece) -> Bool[Tensor, "batch tokens"]:
        at = torch.arange(piece.tokens, device=piece.key.device)
        found = torch.stack([(at >= first) & ((at - first) % self.size == 0) for first in piece.first_real])
        return _with_suffix(found, piece)


@dataclass(frozen=True, kw_only=True)
class Given(BoundarySource):
    """Known boundaries: positions, counted from the first real token, at which chunks begin."""

    at: tuple[int, ...]

    def starts(self, piece: Piece) -> Bool[Tensor, "batch tokens"]:
        found = torch.zeros_like(piece.real)
        for row, first in enumerate(piece.first_real):
            for place in (0, *self.at):
                if first <= first + place < piece.tokens:
                    found[row, first + place] = True
        return _with_suffix(found, piece)


@dataclass(frozen=True, kw_only=True)
class Separators(BoundarySource):
    """A chunk ends with every run of separator tokens; `separator_ids` finds those of a tokenizer."""

    ids: tuple[int, ...]

    def starts(self, piece: Piece) -> Bool[Tensor, "batch tokens"]:
        tokens = piece.call.forward.inputs.get("input_ids")
        if not isinstance(tokens, Tensor):
            raise HostError(
                f"{piece.call.site.name}: got a forward without input_ids by keyword, expected them: separators are "
                "found by their tokens. Call model(input_ids=…), or use another source of boundaries."
            )
        if tokens.shape != piece.real.shape:
            raise HostError(
                f"{piece.call.site.name}: got input_ids of shape {tuple(tokens.shape)} where {piece.tokens} tokens are "
                "to be cut, expected all of these. Read the request from its beginning inside the scope, or use "
                "another source of boundaries."
            )
        marks = torch.isin(tokens, torch.tensor(self.ids, device=tokens.device))
        found = torch.zeros_like(piece.real)
        found[:, 1:] = (marks[:, :-1] & ~marks[:, 1:]).to(found.device)
        for row, first in enumerate(piece.first_real):
            found[row, first] = True
        return _with_suffix(found & piece.real, piece)


@dataclass(frozen=True, kw_only=True)
class Scored(BoundarySource):
    """Boundaries at the gaps of highest score. A source overrides `scores`."""

    apart: int = APART
    chunk_tokens: int = CHUNK_TOKENS
    threshold: float = THRESHOLD
    window: int = WINDOW

    def __post_init__(self) -> None:
        check_whole("apart", self.apart, 0)
        check_whole("chunk_tokens", self.chunk_tokens, 1)
        check_whole("window", self.window, 1)

    def scores(self, piece: Piece) -> Float[Tensor, "batch tokens"]:
        """The score of the gap behind each token."""
        raise NotImplementedError

    def starts(self, piece: Piece) -> Bool[Tensor, "batch tokens"]:
        scores = self.scores(piece).detach().float().cpu().numpy()
        found = np.zeros(scores.shape, dtype=bool)
        for row, (first, end) in enumerate(zip(piece.first_real, piece.end, strict=True)):
            tokens = end - first
            gaps = select_gaps(
                scores[row, first:end],
                threshold=self.threshold,
                apart=self.apart,
                most=max(tokens // self.chunk_tokens, 1),
                edge=self.window,
                forced=tokens - piece.suffix if 0 < piece.suffix < tokens else None,
            )
            found[row, [first, *(first + gap for gap in gaps)]] = True
        return torch.from_numpy(found).to(piece.key.device)


@dataclass(frozen=True, kw_only=True)
class Similarity(Scored):
    """No training: gaps where the mean keys of both sides differ most. The best are taken, whatever their score."""

    threshold: float = -2.0

    def scores(self, piece: Piece) -> Float[Tensor, "batch tokens"]:
        return 1 - window_similarity(piece.joined, self.window)


@dataclass(frozen=True, kw_only=True)
class Oracle(Scored):
    """The boundaries of dense attention at the layer itself: what a predictor is trained to find. It costs as much as
    dense attention."""

    def scores(self, piece: Piece) -> Float[Tensor, "batch tokens"]:
        return attention_ratio(piece.call, window=self.window)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted(Scored):
    """The boundaries of a trained predictor, from keys alone: the paper's method."""

    predictor: BoundaryPredictor

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "window", self.predictor.window)

    def scores(self, piece: Piece) -> Float[Tensor, "batch tokens"]:
        device = next(self.predictor.parameters()).device
        with torch.no_grad():
            return self.predictor(piece.joined.to(device))

    def check_width(self, width: int, where: str) -> None:
        if width != self.predictor.width:
            raise HostError(
                f"{where}: got keys of {width} numbers per token (KV heads × dimension) and a boundary predictor made "
                f"for {self.predictor.width}, expected equal ones. Train a predictor on this model."
            )


def window_similarity(x: Float[Tensor, "batch tokens width"], window: int) -> Float[Tensor, "batch tokens"]:
    """cos(mean of the `window` rows up to t, mean of those behind t); 1 where they do not fit."""
    tokens = x.shape[1]
    found = torch.ones(x.shape[:2], device=x.device)
    if tokens < 2 * window:
        return found
    means = x.unfold(1, window, 1).mean(-1)
    found[:, window - 1 : tokens - window] = torch.cosine_similarity(
        means[:, : tokens - 2 * window + 1], means[:, window:], dim=-1
    )
    return found


def select_gaps(
    scores: Float[np.ndarray, " tokens"],
    *,
    threshold: float,
    apart: int = APART,
    most: int | None = None,
    edge: int = WINDOW,
    forced: int | None = None,
) -> list[int]:
    """Positions at which chunks begin, beside 0: gap t, between tokens t and t + 1, begins one at t + 1.

    Best first: a gap counts when its score is above `threshold` and no accepted one is within `apart` tokens, until
    `most` are found. The first `edge` − 1 gaps and the last `edge` do not count. `forced` is a position that begins a
    chunk whatever its score; behind it there is no other."""
    if np.isnan(scores).any():
        raise ArgumentError("scores: got NaN, expected numbers. Check keys and predictor for overflow.")
    tokens = len(scores)
    # Each place stands for the gap in front of it, so that the end of a sequence keeps its distance too.
    taken = np.zeros(tokens + 1, dtype=bool)
    free = np.ones(tokens + 1, dtype=bool)

    def accept(place: int) -> None:
        taken[place] = True
        free[max(place - apart, 0) : place + apart + 1] = False

    free[: apart + 1] = False
    free[max(tokens - apart, 0) :] = False
    if forced is not None and 0 < forced < tokens:
        accept(forced)
        free[forced:] = False
    last = tokens - edge
    candidates = np.flatnonzero(scores > threshold)
    candidates = candidates[(candidates >= edge - 1) & (candidates < last)]
    limit = tokens if most is None else most
    count = int(taken.sum())
    for gap in candidates[np.argsort(-scores[candidates], kind="stable")]:
        if count >= limit:
            break
        if free[gap + 1]:
            accept(int(gap) + 1)
            count += 1
    return np.flatnonzero(taken).tolist()


def separator_ids(tokenizer: Any, marks: Sequence[str] = (".", "!", "?", ";", "\n")) -> tuple[int, ...]:
    """The tokens whose text ends with one of the marks (spaces behind it left out)."""
    ends = tuple(marks)
    found = []
    for index in range(len(tokenizer)):
        text = tokenizer.decode([index])
        if text.rstrip(" ").endswith(ends):
            found.append(index)
    if not found:
        raise ArgumentError(f"marks: got {list(marks)}, none of which ends a token of this tokenizer.")
    return tuple(found)


def _with_suffix(found: Tensor, piece: Piece) -> Tensor:
    for row, (first, end) in enumerate(zip(piece.first_real, piece.end, strict=True)):
        if 0 < piece.suffix < end - first:
            found[row, end - piece.suffix :] = False
            found[row, end - piece.suffix] = True
    return found
