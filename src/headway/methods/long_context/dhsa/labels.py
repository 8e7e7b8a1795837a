"""Where dense attention says that a chunk ends: labels for the boundary predictor, and the oracle.

    a_past(t) = Σ_{i ≥ t+w} Σ_{j=t−w+1..t} Ā_ij ,   a_next(t) = Σ_{i ≥ t+w} Σ_{j=t+1..t+w} Ā_ij
    ρ_t = (max + ε) / (min + ε)        gap t lies between tokens t and t+1 ;  y_t = 1[ρ_t ≥ β]

Ā is the mean over heads of causal attention. ρ is large where later rows treat both sides of a gap differently. The
released labels σ(α(ln ρ − ln β)) ≥ ½ are the same y for any α > 0. Window sums need no map of all pairs: column sums,
and the 2w − 1 diagonals next to the main one that must be taken off again, are read row block by row block, in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.door.call import AttentionCall
from headway.errors import ArgumentError, unknown

WINDOW = 4
EPSILON = 1e-6
#: Ratio from which a gap is a boundary in training (β of the released code).
RATIO = 2.0
ROWS = 128


@torch.no_grad()
def attention_ratio(
    call: AttentionCall, *, window: int = WINDOW, mode: str = "block", block: int = ROWS
) -> Float[Tensor, "batch tokens"]:
    """ρ_t ≥ 1 of every gap; 1 where the windows do not fit (the first w − 1 gaps and the last w).

    Needs a causal call with the whole prompt as queries. `mode="reference"` takes it from the full map."""
    if mode not in ("block", "reference"):
        raise unknown("mode", mode, ("block", "reference"))
    if window < 1:
        raise ArgumentError(f"window: got {window}, expected at least 1 token on each side.")
    if not call.causal or call.queries != call.keys:
        raise ArgumentError(
            f"{call.site.name}: got {call.queries} queries on {call.keys} keys, expected a causal prompt in one "
            "forward. Dense labels need every row."
        )
    if call.keys < 2 * window:
        return torch.ones(call.query.shape[0], call.keys, device=call.query.device)
    past, following = (_reference if mode == "reference" else _streamed)(call, window, block)
    ratio = (torch.maximum(past, following) + EPSILON) / (torch.minimum(past, following) + EPSILON)
    fits = torch.arange(call.keys, device=ratio.device)
    inside = (fits >= window - 1) & (fits < call.keys - window)
    return torch.where(inside, ratio, 1.0).float()


def boundary_targets(
    ratio: Float[Tensor, "batch tokens"], *, ratio_at: float = RATIO, window: int = WINDOW
) -> tuple[Bool[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Which gaps are boundaries, and which count in training: not the first 2w − 1 and the last 2w."""
    at = torch.arange(ratio.shape[1], device=ratio.device)
    counts = (at >= 2 * window - 1) & (at < ratio.shape[1] - 2 * window)
    return ratio >= ratio_at, counts.expand_as(ratio)


def _mean_rows(call: AttentionCall, rows: Tensor) -> Float[Tensor, "batch rows keys"]:
    mean = call.weights(rows).mean(1).double()
    pads = call.padded_rows()
    return mean if pads is None else mean.masked_fill(pads[:, rows, None], 0.0)


def _streamed(call: AttentionCall, window: int, block: int) -> tuple[Tensor, Tensor]:
    batch, keys, device = call.query.shape[0], call.keys, call.query.device
    total = torch.zeros(batch, keys, dtype=torch.float64, device=device)
    near = torch.zeros(batch, keys, 2 * window - 1, dtype=torch.float64, device=device)
    for rows in torch.arange(call.queries, device=device).split(block):
        weights = _mean_rows(call, rows)
        total += weights.sum(1)
        for distance in range(2 * window - 1):
            column = rows - distance
            there = column >= 0
            near[:, column[there], distance] = weights[:, there].gather(
                2, column[there][None, :, None].expand(batch, -1, 1)
            )[..., 0]
    # below[j, s] = Σ_{i ≥ j+s} Ā_ij
    below = total[..., None] - torch.nn.functional.pad(near.cumsum(-1), (1, 0))
    past = torch.zeros(batch, keys, dtype=torch.float64, device=device)
    following = past.clone()
    gaps = torch.arange(window - 1, keys - window, device=device)
    for step in range(window):
        past[:, gaps] += below[:, gaps - step, window + step]
        following[:, gaps] += below[:, gaps + 1 + step, window - 1 - step]
    return past, following


def _reference(call: AttentionCall, window: int, block: int) -> tuple[Tensor, Tensor]:
    mean = _mean_rows(call, torch.arange(call.queries, device=call.query.device))
    past = mean.new_zeros(mean.shape[0], call.keys)
    following = past.clone()
    for gap in range(window - 1, call.keys - window):
        later = mean[:, gap + window :]
        past[:, gap] = later[:, :, gap - window + 1 : gap + 1].sum((1, 2))
        following[:, gap] = later[:, :, gap + 1 : gap + window + 1].sum((1, 2))
    return past, following
