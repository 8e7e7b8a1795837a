"""How far a logit can move from one step to the next, from the queries, the keys and the frequencies alone.

With x_t the vectors before RoPE and s_{t,i} = q_tᵀ R((i − t)θ) k_i the unscaled logit after it,

    lag L      |s_{t+L,i} − s_{t,i}|   ≤ ‖q_{t+L} − q_t‖ ‖k_i‖ + Σ_m ‖q_t^m‖ ‖k_i^m‖ · 2 |sin(L θ_m / 2)|
    vertical   the same with L = 1
    diagonal   |s_{t+1,i+1} − s_{t,i}| ≤ ‖q_{t+1} − q_t‖ ‖k_{i+1}‖ + ‖q_t‖ ‖k_{i+1} − k_i‖

They follow from the triangle inequality and ‖R(φ) − 1‖ = 2 |sin(φ/2)|, so they hold exactly, and stand in for theorems
5.1 to 5.4 of TAPPA (arXiv 2601.21709), whose published proofs have gaps. Divide by √d, or multiply by the scale of the
call, for scaled logits; a soft cap never widens a difference. Dimensions that are not rotated have θ = 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError
from headway.kernels.dense import grouped_scores
from headway.kernels.rope import Layout, check_frequencies, pair_norms


def lag_bound(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    frequencies: Float[Tensor, " pairs"],
    *,
    lag: int,
    layout: Layout = "half",
) -> Float[Tensor, "batch heads changes keys"]:
    """Upper bound of |s_{t+L,i} − s_{t,i}| for consecutive query rows and any keys, both before RoPE; rows − L rows."""
    _check_lag(query, lag)
    frequencies = check_frequencies(frequencies).to(query)
    earlier, later = query[:, :, : query.shape[2] - lag], query[:, :, lag:]
    moved = grouped_scores(_length(later - earlier), _length(key))
    turn = 2 * torch.sin(lag * frequencies / 2).abs()
    count = frequencies.numel()
    turned = grouped_scores(pair_norms(earlier, count, layout) * turn, pair_norms(key, count, layout))
    return moved + turned


def vertical_bound(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    frequencies: Float[Tensor, " pairs"],
    *,
    layout: Layout = "half",
) -> Float[Tensor, "batch heads changes keys"]:
    """Upper bound of |s_{t+1,i} − s_{t,i}|: how much a column can change in one step."""
    return lag_bound(query, key, frequencies, lag=1, layout=layout)


def diagonal_bound(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    frequencies: Float[Tensor, " pairs"],
) -> Float[Tensor, "batch heads changes key_changes"]:
    """Upper bound of |s_{t+1,i+1} − s_{t,i}|: how much a diagonal can change in one step.

    The frequencies cancel along a diagonal; they are asked for because without RoPE logits have another form."""
    check_frequencies(frequencies)
    _check_lag(query, 1)
    earlier, later = query[:, :, :-1], query[:, :, 1:]
    before, after = key[:, :, :-1], key[:, :, 1:]
    return grouped_scores(_length(later - earlier), _length(after)) + grouped_scores(
        _length(earlier), _length(after - before)
    )


def _check_lag(query: Tensor, lag: int) -> None:
    if not 1 <= lag < query.shape[2]:
        raise ArgumentError(
            f"lag: got {lag} with {query.shape[2]} query rows, expected 1 ≤ lag < rows. Pass more rows or a "
            "shorter lag."
        )


def _length(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)
