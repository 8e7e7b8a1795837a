"""How alike a head's queries (or keys) are over time: the number that TAPPA reads off a head.

    all pairs   (Σ_{a,b} cos(x_a, x_b) − T) / (T (T − 1)) = (‖Σ_a u_a‖² − Σ_a ‖u_a‖²) / (T (T − 1))
    adjacent    mean_t cos(x_t, x_{t+1}) ,   u_a = x_a / ‖x_a‖

The right-hand form needs O(T·d) memory where a Gram matrix needs O(T²). Paper and released code differ: the theory
speaks of adjacent steps, the code averages all pairs; the KV module reads queries after RoPE (the last 32), the
pruning module before RoPE (all). `pairs=`, `stage=` and `window=` select. The code also knows other measures; its
distances have the wrong sense for 1 − x and its Pearson correlation a wrong scale, so the cosine alone is here. arXiv
2601.21709.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.kernels.rope import Layout, check_frequencies, unrotate

Pairs = Literal["all", "adjacent"]
Stage = Literal["pre_rope", "post_rope"]
PAIRS: tuple[Pairs, ...] = ("all", "adjacent")
STAGES: tuple[Stage, ...] = ("pre_rope", "post_rope")
#: Tokens at a time of an autocorrelation: its work is tokens × (block + lags), whatever the length.
TIME_BLOCK = 256


def query_similarity(
    query: Float[Tensor, "batch heads tokens dim"],
    *,
    pairs: Pairs = "all",
    stage: Stage = "post_rope",
    window: int | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    positions: Int[Tensor, "... tokens"] | None = None,
    frequencies: Float[Tensor, " pairs"] | None = None,
    layout: Layout = "half",
) -> Float[Tensor, "batch heads"]:
    """Mean cosine between a head's queries at different times, in [−1/(T−1), 1] over all pairs; 0 when T ≤ 1.

    `query` is what the door gives, after RoPE. `stage="pre_rope"` turns it back first, which needs `frequencies` (and
    `positions`, by default 0, 1, 2, …). `window` keeps the last so many tokens of each row, counted without padding;
    `valid` is False at padding. A zero vector has cosine 0 with everything."""
    return _similarity("query", query, pairs, stage, window, valid, positions, frequencies, layout)


def key_similarity(
    key: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    pairs: Pairs = "all",
    stage: Stage = "post_rope",
    window: int | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    positions: Int[Tensor, "... tokens"] | None = None,
    frequencies: Float[Tensor, " pairs"] | None = None,
    layout: Layout = "half",
) -> Float[Tensor, "batch kv_heads"]:
    """`query_similarity` of a head's keys."""
    return _similarity("key", key, pairs, stage, window, valid, positions, frequencies, layout)


def time_autocorrelation(x: Float[Tensor, "heads tokens dim"], lags: int) -> Float[Tensor, "heads lags"]:
    """mean_t cos(x_t, x_{t+L}) for L = 0 … lags; NaN where L ≥ T. A peak at L says that x comes back every L tokens."""
    tokens = x.shape[1]
    unit = _unit(x if x.dtype == torch.float64 else x.float())
    curve = torch.full((x.shape[0], lags + 1), torch.nan, dtype=torch.float64, device=x.device)
    reach = min(lags + 1, tokens)
    sums = torch.zeros(x.shape[0], reach, dtype=torch.float64, device=x.device)
    for start in range(0, tokens, TIME_BLOCK):
        later = unit[:, start : start + TIME_BLOCK]
        first = max(start - reach + 1, 0)
        cosines = later @ unit[:, first : start + later.shape[1]].transpose(1, 2)
        step = torch.arange(start, start + later.shape[1], device=x.device)[:, None]
        column = step - torch.arange(reach, device=x.device) - first
        found = cosines.gather(2, column.clamp(min=0).expand(x.shape[0], -1, -1)) * (column >= 0)
        sums += found.sum(1, dtype=torch.float64)
    curve[:, :reach] = sums / (tokens - torch.arange(reach, device=x.device))
    return curve


def _similarity(
    name: str,
    x: Tensor,
    pairs: str,
    stage: str,
    window: int | None,
    valid: Tensor | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
    layout: Layout,
) -> Tensor:
    if pairs not in PAIRS:
        raise unknown("pairs", pairs, PAIRS)
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    if x.ndim != 4:
        raise ArgumentError(f"{name}: got shape {tuple(x.shape)}, expected (batch, heads, tokens, dim).")
    if window is not None and window < 1:
        raise ArgumentError(f"window: got {window}, expected at least 1 token, or None for all.")
    if stage == "pre_rope":
        positions = torch.arange(x.shape[2], device=x.device) if positions is None else positions
        x = unrotate(x, positions, check_frequencies(frequencies), layout)
    kept = _kept(x, valid, window)
    unit = _unit(x if x.dtype == torch.float64 else x.float())
    unit = unit if bool(kept.all()) else unit * kept[:, None, :, None]
    if pairs == "adjacent":
        both = (kept[:, 1:] & kept[:, :-1]).sum(-1)[:, None]
        cosines = torch.linalg.vecdot(unit[:, :, 1:], unit[:, :, :-1])
        return cosines.sum(-1, dtype=torch.float64) / both.clamp(min=1)
    count = kept.sum(-1)[:, None]
    lengths = torch.linalg.vecdot(unit, unit).sum(-1, dtype=torch.float64)
    total = unit.sum(2, dtype=torch.float64).square().sum(-1) - lengths
    return total / (count * (count - 1)).clamp(min=1) * (count > 1)


def _kept(x: Tensor, valid: Tensor | None, window: int | None) -> Bool[Tensor, "batch tokens"]:
    shape = (x.shape[0], x.shape[2])
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=x.device)
    elif tuple(valid.shape) != shape:
        raise ArgumentError(f"valid: got shape {tuple(valid.shape)}, expected (batch, tokens) = {shape}.")
    valid = valid.to(x.device, torch.bool)
    if window is None:
        return valid
    from_end = valid.flip(-1).cumsum(-1).flip(-1)
    return valid & (from_end <= window)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)
