"""Local linear attention, forward and backward, tile by tile with Θ(n d) memory.

Arguments are checked and folded in `arguments`; the two passes over tiles, with their derivation, are in `passes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError
from headway.kernels.conjugate_gradient import report_unconverged
from headway.kernels.dense import check_heads, grouped_values
from headway.kernels.local_linear.arguments import (
    MAX_ITERATIONS,
    RIDGE,
    Scale,
    all_visible,
    fold_rows,
    fold_visible,
    folded,
    prepare,
    unfold,
    without_unseen,
)
from headway.kernels.local_linear.passes import FIX, LocalLinearFunction, forward_pass, in_full_precision
from headway.kernels.local_linear.reference import reference_weights
from headway.kernels.local_linear.tiles import BLOCK
from headway.kernels.local_linear.weights import sloped_weights


@dataclass(frozen=True)
class LocalFit:
    """The output with what was solved for it: `centre` k̄, `slope` x, the relative `residual` of each row's solve and
    the iterations it took (`steps`; 1 for the direct solve, 0 where nothing is seen)."""

    output: Float[Tensor, "batch heads queries value_dim"]
    centre: Float[Tensor, "batch heads queries dim"]
    slope: Float[Tensor, "batch heads queries dim"]
    residual: Float[Tensor, "batch heads queries"]
    steps: Int[Tensor, "batch heads queries"]


def local_linear_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    ridge: float | Float[Tensor, "#batch #heads #queries"] = RIDGE,
    scale: Scale = None,
    causal: bool = True,
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    dropout: float = 0.0,
    mode: str = "block",
    solver: str = "auto",
    tolerance: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    jacobi: bool = False,
    detach_ridge_weight: bool = False,
    strict: bool = False,
    block: int = BLOCK,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """o_i of the module's docstring; rows that see nothing are zero.

    `ridge` is λ > 0, in units of squared key length, `scale` the inverse bandwidth s (dim ** -0.5 for None); tensors
    are broadcast to (batch, heads, queries) and may be learned. `causal` aligns the last query with the last key;
    `visible` hides further keys, before any weight is taken. `solver` is "direct" (C formed and factored), "cg"
    (conjugate gradients, to `tolerance` relative to the right side), or "auto": direct up to dim 8. `jacobi`
    preconditions with the diagonal of C; it rarely pays. Rows that did not converge give a ConvergenceWarning, or raise
    ConvergenceError if `strict`. Half precision is computed in float32. `dropout` is refused, as weights may be
    negative. Raises ArgumentError for what cannot be used."""
    settings, query_, key_, value_, ridge_, scale_ = prepare(
        query,
        key,
        value,
        ridge,
        visible,
        scale=scale,
        causal=causal,
        dropout=dropout,
        mode=mode,
        solver=solver,
        tolerance=tolerance,
        max_iterations=max_iterations,
        jacobi=jacobi,
        detach_ridge_weight=detach_ridge_weight,
        strict=strict,
        block=block,
    )
    query_, key_, value_ = without_unseen(query_, key_, value_, visible)
    if mode == "reference":
        seen = all_visible(query, key, causal, visible)
        weights = in_full_precision(reference_weights)(
            query_, key_, ridge=ridge_, scale=scale_, visible=seen, detach_ridge_weight=detach_ridge_weight
        )
        return grouped_values(weights, value_).to(value.dtype)
    output, _, _, residual, _ = LocalLinearFunction.apply(
        *folded(query_, key_, value_),
        fold_rows(scale_.expand(query.shape[:3]), key.shape[1]),
        fold_rows(ridge_.expand(query.shape[:3]), key.shape[1]),
        None,
        fold_visible(visible, query.shape[1] // key.shape[1]),
        settings,
    )
    report_unconverged("local linear attention", unfold(residual, query), settings.tolerance, FIX, strict=strict)
    return unfold(output, query).to(value.dtype)


def fit_local_linear(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    ridge: float | Float[Tensor, "#batch #heads #queries"] = RIDGE,
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    **options: Any,
) -> LocalFit:
    """The fits themselves, without gradients and without warnings. Options of `local_linear_attention`."""
    settings, query_, key_, value_, ridge_, scale_ = prepare(query, key, value, ridge, visible, **options)
    with torch.no_grad():
        query_, key_, value_ = without_unseen(query_, key_, value_, visible)
        found = forward_pass(
            *folded(query_, key_, value_),
            fold_rows(scale_.expand(query.shape[:3]), key.shape[1]),
            fold_rows(ridge_.expand(query.shape[:3]), key.shape[1]),
            None,
            fold_visible(visible, query.shape[1] // key.shape[1]),
            settings,
        )
    return LocalFit(*(unfold(x, query) for x in found))


def sloped_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    slope: Float[Tensor, "batch heads queries dim"],
    *,
    scale: Scale = None,
    causal: bool = True,
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    mode: str = "block",
    block: int = BLOCK,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Σ_j p_ij (1 + (k_j − k̄_i)·x_i) v_j for given slopes x: local linear attention whose solve is replaced by a
    learned probe (Parallax, arXiv 2605.29157, there with ρ = −x). Rows that see nothing are zero."""
    settings, query_, key_, value_, _, scale_ = prepare(
        query, key, value, RIDGE, visible, scale=scale, causal=causal, mode=mode, block=block
    )
    if slope.shape != query.shape:
        raise ArgumentError(f"slope: got shape {tuple(slope.shape)}, expected that of query, {tuple(query.shape)}.")
    query_, key_, value_ = without_unseen(query_, key_, value_, visible)
    slope_ = slope.to(query_.dtype)
    if mode == "reference":
        seen = all_visible(query, key, causal, visible)
        logits = scale_[..., None] * query_ @ key_.repeat_interleave(check_heads(query, key), 1).transpose(-1, -2)
        softmax = torch.where(seen.any(-1, keepdim=True), logits.masked_fill(~seen, -torch.inf), 0.0).softmax(-1)
        softmax = torch.where(seen, softmax, 0.0)
        return grouped_values(sloped_weights(softmax, None, key_, slope_), value_).to(value.dtype)
    output, *_ = LocalLinearFunction.apply(
        *folded(query_, key_, value_),
        fold_rows(scale_.expand(query.shape[:3]), key.shape[1]),
        None,
        fold_rows(slope_, key.shape[1]),
        fold_visible(visible, query.shape[1] // key.shape[1]),
        settings,
    )
    return unfold(output, query).to(value.dtype)
