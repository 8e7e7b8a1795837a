"""How well one attention row foretells the next, and with which lag a row repeats.

    r_s(shift)   mean_t cos(A_{t+1} shifted by s, A_t)      0: a column stays (vertical), 1: a diagonal goes on
    r(L)         mean_t cos(A_{t+L}, A_t)                   rows that return after L steps; r(1) = r_0
    overlap      mean_t Σ_i min(A_{t+1,i}, A_{t,i})         shared mass of adjacent rows, 1 − total variation
    c(s)         Σ_i x_i x_{i+s} / Σ_i x_i²                 autocorrelation of one row of logits along the keys

x is a row of logits about its mean, without its first keys, whose outlying logits (attention sinks) would hide the
rest. Cosines are over whole rows: mass that a shift pushes out counts against it. `RowSimilarity` takes rows block by
block in O(block × keys) memory; `predictability` and `adjacent_overlap` are the same by definition. After TAPPA, arXiv
2601.21709.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError

#: Keys left out at the start of a row of logits: the number of sink tokens of StreamingLLM (arXiv 2309.17453).
SINK_KEYS = 4


def predictability(weights: Float[Tensor, "*batch rows keys"], shift: int = 0) -> Float[Tensor, "*batch"]:
    """r_s = mean_t cos(A_{t+1} moved back by s keys, A_t); NaN with fewer than two rows that hold any mass."""
    _check_weights(weights)
    if not 0 <= shift < weights.shape[-1]:
        raise ArgumentError(f"shift: got {shift} for {weights.shape[-1]} keys, expected 0 to {weights.shape[-1] - 1}.")
    unit = _unit(weights)
    before, after = unit[..., :-1, : weights.shape[-1] - shift], unit[..., 1:, shift:]
    counted = _filled(weights[..., :-1, :]) & _filled(weights[..., 1:, :])
    return ((before * after).sum(-1) * counted).sum(-1) / counted.sum(-1)


def adjacent_overlap(weights: Float[Tensor, "*batch rows keys"]) -> Float[Tensor, "*batch"]:
    """mean_t Σ_i min(A_{t+1,i}, A_{t,i}), in [0, 1]; NaN with fewer than two rows that hold any mass."""
    _check_weights(weights)
    before, after = weights[..., :-1, :], weights[..., 1:, :]
    counted = _filled(before) & _filled(after)
    return (torch.minimum(before, after).sum(-1) * counted).sum(-1) / counted.sum(-1)


def row_autocorrelation(
    logits: Float[Tensor, "rows keys"], lags: int, *, skip: int = SINK_KEYS
) -> Float[Tensor, "rows lags"]:
    """c(s) for s = 0 … lags of each row of logits (−inf: not visible), without its first `skip` visible keys.

    Rows that see fewer than 2·lags keys after that, or are constant, are NaN."""
    seen = logits > -torch.inf
    seen = seen & (seen.cumsum(-1) > skip)
    count = seen.sum(-1, keepdim=True)
    visible = logits.masked_fill(~seen, 0.0)
    centred = (visible - visible.sum(-1, keepdim=True) / count.clamp(min=1)).masked_fill(~seen, 0.0)
    length = logits.shape[-1] + lags
    spectrum = torch.fft.rfft(centred, n=length)
    curve = torch.fft.irfft(spectrum.abs().square(), n=length)[:, : lags + 1]
    usable = (count >= max(2 * lags, 1)) & (curve[:, :1] > torch.finfo(curve.dtype).eps * count)
    return (curve / curve[:, :1]).masked_fill(~usable, torch.nan)


class RowSimilarity:
    """r_0, r_1, r(L) and overlap of one head, from consecutive blocks of rows.

    Later blocks may have more keys than earlier ones (a causal head). `gap` tells that the next block does not follow
    on the last one."""

    def __init__(self, lags: int) -> None:
        if lags < 1:
            raise ArgumentError(f"lags: got {lags}, expected at least 1.")
        self.lags = lags
        self.returned = torch.zeros(lags + 1, dtype=torch.float64)
        self.pairs = torch.zeros(lags + 1, dtype=torch.float64)
        self.shifted = 0.0
        self.shared = 0.0
        self.gap()

    def gap(self) -> None:
        self.recent: Tensor | None = None
        self.last: Tensor | None = None

    def update(self, weights: Float[Tensor, "rows keys"]) -> None:
        unit = _unit(weights)
        recent = unit[:0] if self.recent is None else _widen(self.recent, unit.shape[1])
        rows = torch.cat([recent, unit])
        filled = _filled(rows)
        self._returns(unit, rows, filled)
        begin = max(recent.shape[0], 1)
        both = filled[begin - 1 : -1] & filled[begin:]
        self.shifted += float(((rows[begin - 1 : -1, :-1] * rows[begin:, 1:]).sum(-1) * both).sum())
        raw = weights if self.last is None else torch.cat([_widen(self.last, weights.shape[1]), weights])
        self.shared += float((torch.minimum(raw[:-1], raw[1:]).sum(-1) * both).sum())
        self.recent, self.last = rows[-self.lags :], weights[-1:]

    def _returns(self, unit: Tensor, rows: Tensor, filled: Tensor) -> None:
        """Adds the diagonals of the Gram matrix between the new rows and themselves with what came before: `lags` new
        rows at a time, each of which needs the `lags` rows in front of it."""
        first = rows.shape[0] - unit.shape[0]
        for start in range(first, rows.shape[0], self.lags):
            stop, begin = min(start + self.lags, rows.shape[0]), max(start - self.lags, 0)
            step = torch.arange(start, stop, device=unit.device)[:, None]
            earlier = step - torch.arange(self.lags + 1, device=unit.device)
            paired = (earlier >= 0) & filled[step] & filled[earlier.clamp(min=0)]
            cosines = (rows[start:stop] @ rows[begin:stop].T).gather(1, (earlier - begin).clamp(min=0)) * paired
            self.returned += cosines.sum(0).double().cpu()
            self.pairs += paired.sum(0).double().cpu()

    @property
    def returns(self) -> Float[Tensor, " lags"]:
        """r(L) for L = 0 … lags; NaN where no two rows are L apart."""
        return self.returned / self.pairs

    @property
    def vertical(self) -> float:
        return float(self.returns[1])

    @property
    def diagonal(self) -> float:
        return self.shifted / float(self.pairs[1]) if self.pairs[1] else float("nan")

    @property
    def overlap(self) -> float:
        return self.shared / float(self.pairs[1]) if self.pairs[1] else float("nan")


def _check_weights(weights: Tensor) -> None:
    if weights.ndim < 2:
        raise ArgumentError(f"weights: got shape {tuple(weights.shape)}, expected (…, rows, keys).")


def _filled(weights: Tensor) -> Tensor:
    return (weights > 0).any(-1)


def _unit(weights: Tensor) -> Tensor:
    return torch.nn.functional.normalize(weights, dim=-1, eps=torch.finfo(weights.dtype).tiny)


def _widen(rows: Tensor, keys: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, keys - rows.shape[1]))
