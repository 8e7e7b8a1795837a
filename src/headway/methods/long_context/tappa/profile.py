"""What one attention operation says about its heads' patterns over time, in O(block × keys) memory.

Queries and keys give the similarities, the share of every rotary pair and the bounds; block after block of attention
rows gives predictability and autocorrelation. Long inputs are read in contiguous windows of rows spread over the
sequence, since every row measure compares neighbours. After TAPPA, arXiv 2601.21709.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.errors import ArgumentError, unknown
from headway.kernels.dense import normalise
from headway.kernels.rope import Layout, channel_energies, check_frequencies, periods, unrotate
from headway.methods.long_context.tappa.bounds import diagonal_bound, vertical_bound
from headway.methods.long_context.tappa.calls import narrow, positions_of, up_to
from headway.methods.long_context.tappa.predictability import RowSimilarity, row_autocorrelation
from headway.methods.long_context.tappa.similarity import (
    PAIRS,
    STAGES,
    key_similarity,
    query_similarity,
    time_autocorrelation,
)

#: Rows in one window of a sampled sequence, and in one block of weights.
WINDOW_ROWS = 256
#: Rows whose logits are autocorrelated, per head: neighbouring rows say the same.
AUTOCORRELATION_ROWS = 64
#: Steps per window on which the bounds are compared with what happened.
BOUND_STEPS = 32


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Self-similarity of each head's queries or keys: over all pairs or adjacent ones, before or after RoPE."""

    all_pre_rope: np.ndarray
    all_post_rope: np.ndarray
    adjacent_pre_rope: np.ndarray
    adjacent_post_rope: np.ndarray

    def pick(self, pairs: str = "all", stage: str = "pre_rope") -> np.ndarray:
        if pairs not in PAIRS:
            raise unknown("pairs", pairs, PAIRS)
        if stage not in STAGES:
            raise unknown("stage", stage, STAGES)
        return getattr(self, f"{pairs}_{stage}")


@dataclass(frozen=True, kw_only=True)
class BoundCheck:
    """Mean change of a head's scaled logits in one step beside the mean of its bound."""

    bound: np.ndarray
    change: np.ndarray

    @property
    def tightness(self) -> np.ndarray:
        """Change over bound, in [0, 1]."""
        return self.change / np.where(self.bound > 0, self.bound, np.nan)


@dataclass(frozen=True, kw_only=True)
class PatternProfile:
    """The patterns of all heads of one site; arrays run over query heads, curves over lags 0, 1, 2, …

    `vertical` is r_0, `diagonal` r_1, `overlap` the mass that adjacent rows share, `returns` r(L), `autocorrelation`
    c(s) of the logits, `query_autocorrelation` mean_t cos(q_t, q_{t+L}) before RoPE. `channel_shares` are e_m per
    rotary pair and `periods` 2π/θ_m. `tokens` counts real tokens, `rows` the attention rows that were read. Without
    RoPE the similarities before and after it agree, shares, periods and bounds are NaN or empty. NaN marks what cannot
    be said."""

    site: str
    layer: int
    tokens: int
    rows: int
    sequences: int
    query_similarity: Similarity
    key_similarity: Similarity
    channel_shares: np.ndarray
    periods: np.ndarray
    vertical: np.ndarray
    diagonal: np.ndarray
    overlap: np.ndarray
    returns: np.ndarray
    autocorrelation: np.ndarray
    query_autocorrelation: np.ndarray
    vertical_bound: BoundCheck
    diagonal_bound: BoundCheck

    @property
    def heads(self) -> int:
        return len(self.vertical)


def profile_call(
    call: AttentionCall,
    *,
    frequencies: Float[Tensor, " pairs"] | None = None,
    layout: Layout = "half",
    max_rows: int | None = 512,
    max_lag: int = 128,
) -> list[PatternProfile]:
    """The profile of every sequence of a call, padding left out.

    `frequencies` and `layout` are those of the host's rotary embedding (`host_frequencies`); None means that there is
    no rotation to undo. `max_rows` limits the attention rows read per sequence (None: all). Raises NumericError when
    query or key is not finite."""
    if max_rows is not None and max_rows < 2:
        raise ArgumentError(f"max_rows: got {max_rows}, expected at least 2 rows, or None for all.")
    if max_lag < 1:
        raise ArgumentError(f"max_lag: got {max_lag}, expected at least 1.")
    if frequencies is not None:
        check_frequencies(frequencies)
    call.check_finite()
    rotary = frequencies if call.site.kind == "self" else None
    padded = call.padded_rows()
    profiles = []
    for index in range(call.query.shape[0]):
        one = narrow(call, index)
        sequence = _Sequence(one, None if padded is None else padded[index], rotary, layout)
        profiles.append(_profile(sequence, max_rows, max_lag))
    return profiles


def average_profiles(profiles: Sequence[PatternProfile]) -> PatternProfile:
    """One profile for several sequences of a site: means weighted by their steps, NaN left out; counts add up."""
    if not profiles:
        raise ArgumentError("profiles: got none, expected at least one profile of the site.")
    if len(profiles) == 1:
        return profiles[0]
    weights = np.array([max(p.tokens - 1, 0) for p in profiles], dtype=float)
    merged = _average(profiles, weights if weights.any() else np.ones(len(profiles)))
    return PatternProfile(
        **merged
        | {"site": profiles[0].site, "layer": profiles[0].layer, "periods": profiles[0].periods}
        | {name: sum(getattr(p, name) for p in profiles) for name in ("tokens", "rows", "sequences")}
    )


def row_windows(total: int, max_rows: int | None, window: int = WINDOW_ROWS) -> list[range]:
    """Contiguous windows of rows, evenly spread from the first row to the last; all rows when they are few enough."""
    if max_rows is None or total <= max_rows:
        return [range(total)] if total else []
    width = min(window, max_rows)
    count = max_rows // width
    if count == 1:
        return [range(total - width, total)]
    starts = np.linspace(0, total - width, count).round().astype(int)
    return [range(int(start), int(start) + width) for start in starts]


class _Sequence:
    """One sequence of a call: which of its rows are real, and its queries and keys before RoPE."""

    def __init__(
        self, call: AttentionCall, padded: Bool[Tensor, " queries"] | None, frequencies: Tensor | None, layout: Layout
    ) -> None:
        self.call, self.frequencies, self.layout = call, frequencies, layout
        self.rows = torch.arange(call.queries, device=call.query.device)
        self.key_rows = torch.arange(call.keys, device=call.key.device)
        if padded is not None and call.forward.padding is not None:
            self.rows = self.rows[~padded]
            self.key_rows = self.key_rows[call.forward.padding[0, : call.keys].bool()]
        self.query, self.key = call.query.float(), call.key.float()
        if frequencies is not None:
            of_queries, of_keys = positions_of(call)
            self.query = unrotate(self.query, of_queries, frequencies, layout)
            self.key = unrotate(self.key, of_keys, frequencies, layout)


def _profile(sequence: _Sequence, max_rows: int | None, max_lag: int) -> PatternProfile:
    call = sequence.call
    windows = row_windows(sequence.rows.numel(), max_rows)
    heads = [_head_rows(sequence, head, windows, max_lag) for head in range(call.heads)]
    query = sequence.query[:, :, sequence.rows]
    key = sequence.key[:, :, sequence.key_rows]
    shares, turns = np.full((call.heads, 0), np.nan), np.empty(0)
    if sequence.frequencies is not None:
        turns = _array(periods(sequence.frequencies))
        shares = np.full((call.heads, len(turns)), np.nan)
        if query.shape[2]:
            shares = _array(channel_energies(query, key, len(turns), sequence.layout)[0])
    after = call.query[:, :, sequence.rows], call.key[:, :, sequence.key_rows]
    return PatternProfile(
        site=call.site.name,
        layer=call.site.layer,
        tokens=sequence.rows.numel(),
        rows=sum(len(window) for window in windows),
        sequences=1,
        query_similarity=_similarities(query_similarity, query, after[0], 1),
        key_similarity=_similarities(key_similarity, key, after[1], call.groups),
        channel_shares=shares,
        periods=turns,
        vertical=np.array([head.similarity.vertical for head in heads]),
        diagonal=np.array([head.similarity.diagonal for head in heads]),
        overlap=np.array([head.similarity.overlap for head in heads]),
        returns=np.stack([_array(head.similarity.returns) for head in heads]),
        autocorrelation=np.stack([head.autocorrelation for head in heads]),
        query_autocorrelation=_array(time_autocorrelation(query[0], max_lag)),
        vertical_bound=_bound_check([head.vertical_steps for head in heads]),
        diagonal_bound=_bound_check([head.diagonal_steps for head in heads]),
    )


@dataclass(frozen=True)
class _HeadRows:
    similarity: RowSimilarity
    autocorrelation: np.ndarray
    vertical_steps: _Sums
    diagonal_steps: _Sums


def _head_rows(sequence: _Sequence, head: int, windows: list[range], max_lag: int) -> _HeadRows:
    """What the attention rows of one head say."""
    similarity = RowSimilarity(max_lag)
    one = narrow(sequence.call, 0, head)
    stride = max(sum(len(window) for window in windows) // AUTOCORRELATION_ROWS, 1)
    reach = _reach(one, sequence.rows, max_lag)
    curves = [np.full((0, max_lag + 1), np.nan)]
    vertical, diagonal = _Sums(), _Sums()
    for window in windows:
        similarity.gap()
        for start in range(window.start, window.stop, WINDOW_ROWS):
            rows = sequence.rows[start : min(start + WINDOW_ROWS, window.stop)]
            part = up_to(one, int(rows[-1]) + 1)
            logits = part.logits(rows)
            similarity.update((part.weights(rows) if part.weighing else normalise(logits, part.sinks)[0])[0, 0])
            curves.append(_curves(logits[0, 0, ::stride], reach, max_lag))
        if sequence.frequencies is not None and len(window) > 1:
            last = sequence.rows[window.start : window.stop][-BOUND_STEPS - 1 :]
            _add_steps(sequence, sequence.frequencies, one, head, last, vertical, diagonal)
    return _HeadRows(similarity, _nanmean(np.concatenate(curves)), vertical, diagonal)


def _reach(one: AttentionCall, rows: Int[Tensor, " rows"], max_lag: int) -> int:
    """The largest lag that rows of logits are long enough for: a quarter of the keys that the last row sees."""
    return min(max_lag, int(one.visible(rows[-1:]).sum()) // 4)


def _curves(logits: Float[Tensor, "rows keys"], reach: int, max_lag: int) -> np.ndarray:
    """Autocorrelation of rows of logits up to the lag `reach`, NaN beyond it."""
    curve = np.full((logits.shape[0], max_lag + 1), np.nan)
    if reach > 1:
        curve[:, : reach + 1] = _array(row_autocorrelation(logits, reach))
    return curve


def _add_steps(
    sequence: _Sequence,
    frequencies: Float[Tensor, " pairs"],
    one: AttentionCall,
    head: int,
    rows: Int[Tensor, " rows"],
    vertical: _Sums,
    diagonal: _Sums,
) -> None:
    """Adds the single steps of consecutive rows to the sums of bounds and changes, in scaled logits."""
    part = up_to(one, int(rows[-1]) + 1)
    query = sequence.query[:, head : head + 1, rows]
    kv_head = head // sequence.call.groups
    key = sequence.key[:, kv_head : kv_head + 1, : part.keys]
    scores = (part.query[:, :, rows].float() @ part.key.float().transpose(-1, -2))[0, 0] * part.scale
    seen = part.visible(rows)[0, 0]
    scale = abs(part.scale)
    bound = vertical_bound(query, key, frequencies, layout=sequence.layout)[0, 0] * scale
    vertical.add(bound, scores[1:] - scores[:-1], seen[1:] & seen[:-1])
    bound = diagonal_bound(query, key, frequencies)[0, 0] * scale
    diagonal.add(bound, scores[1:, 1:] - scores[:-1, :-1], seen[1:, 1:] & seen[:-1, :-1])


@dataclass
class _Sums:
    """Bounds and changes of logits over the pairs that were compared."""

    bound: float = 0.0
    change: float = 0.0
    pairs: int = 0

    def add(self, bound: Tensor, change: Tensor, counted: Tensor) -> None:
        self.bound += float((bound * counted).sum())
        self.change += float((change.abs() * counted).sum())
        self.pairs += int(counted.sum())


def _bound_check(heads: list[_Sums]) -> BoundCheck:
    pairs = np.array([head.pairs or np.nan for head in heads])
    return BoundCheck(
        bound=np.array([head.bound for head in heads]) / pairs,
        change=np.array([head.change for head in heads]) / pairs,
    )


def _similarities(measure: Any, before: Tensor, after: Tensor, groups: int) -> Similarity:
    values = {
        f"{pairs}_{stage}": _array(measure(x, pairs=pairs)[0].repeat_interleave(groups))
        for pairs in PAIRS
        for stage, x in zip(STAGES, (before, after), strict=True)
    }
    return Similarity(**values)


def _average(items: Sequence[Any], weights: np.ndarray) -> dict[str, Any]:
    """The weighted mean of every array of some dataclasses, NaN left out."""
    merged: dict[str, Any] = {}
    for field in fields(items[0]):
        values = [getattr(item, field.name) for item in items]
        if isinstance(values[0], Similarity | BoundCheck):
            merged[field.name] = type(values[0])(**_average(values, weights))
        elif isinstance(values[0], np.ndarray):
            merged[field.name] = _nanmean(np.stack(values), weights)
    return merged


def _nanmean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The mean over the first axis without NaN; NaN where nothing is left."""
    hidden = np.ma.array(values, mask=np.isnan(values))
    return np.ma.filled(np.ma.average(hidden, axis=0, weights=weights), np.nan)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()
