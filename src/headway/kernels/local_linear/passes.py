"""The forward and backward pass of local linear attention over tiles.

Forward, per row: p, k̄, x = C⁻¹(q − k̄), o = Σ p (1 + u) v with u_j = (k_j − k̄)·x. Kept: k̄ and x.

Backward, for g = ∂L/∂o: with G_j = g·v_j, ḡ = Σ p G, t = Σ p_j G_j (k_j − k̄), U = C⁻¹ t, û_j = (k_j − k̄)·U,

    A_j = (1 + u_j)(G_j − û_j) − ḡ u_j ,   ∂l_j = p_j (A_j − Σ p A)                     l_j = s q·k_j
    ∂q = s Σ ∂l_j k_j + U ,   ∂s = q·Σ ∂l_j k_j ,   ∂k_j = s ∂l_j q + p_j (G_j − ḡ − û_j) x − p_j (1 + u_j) U
    ∂v_j = p_j (1 + u_j) g ,   ∂λ = −U·x

which is the whole gradient. The released code holds ω fixed inside the ridge λ ω; that adds λ (U·x) p_j to ∂l_j, and
is what `detach_ridge_weight` does. A given x (`sloped_attention`) has ∂x = t, and U = 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.conjugate_gradient import report_unconverged
from headway.kernels.local_linear.tiles import BACKWARD_TILE, FORWARD_TILE, Covariance, Folded, Settings
from headway.kernels.products import inner, outer

FIX = "Raise ridge or max_iterations, normalise queries and keys, or use solver='direct'."


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would take the products in half precision."""

    @wraps(function)
    def call(first: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest, **options)

    return call


class LocalLinearFunction(torch.autograd.Function):
    """Output, centre, slope, residual and steps of folded tensors; the output is differentiable."""

    @staticmethod
    def forward(
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: Tensor,
        ridge: Tensor | None,
        slope: Tensor | None,
        visible: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        found = forward_pass(query, key, value, scale, ridge, slope, visible, settings)
        context.save_for_backward(query, key, value, scale, ridge, visible, found[1], found[2])
        context.settings = settings
        context.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, scale, ridge, visible, centre, slope = context.saved_tensors
        found = backward_pass(gradient, query, key, value, scale, ridge, visible, centre, slope, context.settings)
        return (*found, None, None)


@in_full_precision
def forward_pass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    ridge: Tensor | None,
    given: Tensor | None,
    visible: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, centre, slope, residual and steps of folded tensors."""
    folded = Folded(query, key, scale, visible, settings)
    output = query.new_zeros(*query.shape[:3], value.shape[2])
    centre = torch.zeros_like(query)
    slope = torch.zeros_like(query) if given is None else given.clone()
    residual = query.new_zeros(query.shape[:3])
    steps = torch.zeros(query.shape[:3], dtype=torch.long, device=query.device)
    for part in folded.parts(FORWARD_TILE):
        weights = folded.weights(part)
        middle = outer(weights, key[part.systems, part.keys])
        level = folded.rows(residual if ridge is None else ridge, part)
        covariance = Covariance(folded, part, weights, middle, level)
        if given is None:
            solution = covariance.solve(folded.rows(query, part) - middle)
            found = solution.value
            folded.put(slope, part, found)
            folded.put(residual, part, solution.residual)
            folded.put(steps, part, solution.steps)
        else:
            found = folded.rows(given, part)
        folded.put(output, part, covariance.values(found, value[part.systems, part.keys]))
        folded.put(centre, part, middle)
    return output, centre, slope, residual, steps


@in_full_precision
def backward_pass(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    ridge: Tensor | None,
    visible: Tensor | None,
    centre: Tensor,
    slope: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, scale, ridge and slope; the last two where there are any."""
    folded = Folded(query, key, scale, visible, settings)
    to_query, to_key, to_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    to_scale, to_ridge = torch.zeros_like(scale), torch.zeros_like(scale)
    to_slope = torch.zeros_like(slope) if ridge is None else None
    residual = query.new_zeros(query.shape[:3])
    for part in folded.parts(BACKWARD_TILE):
        q, x, middle, g = (folded.rows(t, part) for t in (query, slope, centre, gradient))
        weights = folded.weights(part)
        covariance = Covariance(folded, part, weights, middle, folded.rows(residual if ridge is None else ridge, part))
        heard = inner(g, value[part.systems, part.keys]).mul_(weights)
        mean = heard.sum(-1, keepdim=True)
        pull = torch.addcmul(outer(heard, covariance.key), mean, middle, value=-1)
        bent = covariance.slopes(x)
        made = weights + bent
        ratio = inner(x, key[part.systems, part.keys]).sub_(torch.linalg.vecdot(x, middle)[..., None])
        if ridge is None:
            adjoint = torch.zeros_like(x)
        else:
            solution = covariance.solve(pull)
            adjoint = solution.value
            folded.put(residual, part, solution.residual)
            heard = heard.sub_(covariance.slopes(adjoint))
        # p (G − û) + u p (G − û − ḡ), then its mean taken off in proportion to p
        centred = torch.addcmul(heard, weights, mean, value=-1)
        logits = torch.addcmul(heard, ratio, centred)
        total = logits.sum(-1, keepdim=True)
        if ridge is not None:
            tilt = torch.linalg.vecdot(adjoint, x)
            folded.put(to_ridge, part, -tilt)
            if settings.detach_ridge_weight:
                total = total - (tilt * folded.rows(ridge, part))[..., None]
        logits.addcmul_(weights, total, value=-1)
        steep, turned = folded.rows(scale, part)[..., None], outer(logits, covariance.key)
        folded.put(to_query, part, torch.addcmul(adjoint, steep, turned))
        folded.put(to_scale, part, torch.linalg.vecdot(q, turned))
        if to_slope is not None:
            folded.put(to_slope, part, pull)
        to_key[part.systems, part.keys].baddbmm_(logits.transpose(1, 2), steep * q)
        to_key[part.systems, part.keys].baddbmm_(centred.transpose(1, 2), x)
        both = torch.bmm(made.transpose(1, 2), torch.cat([g, -adjoint], -1))
        to_value[part.systems, part.keys] += both[..., : g.shape[2]]
        to_key[part.systems, part.keys] += both[..., g.shape[2] :]
    if ridge is not None:
        rows = residual.unflatten(0, (-1, settings.kv_heads)).flatten(1, 2)
        report_unconverged("local linear attention, backward", rows, settings.tolerance, FIX, strict=settings.strict)
    return to_query, to_key, to_value, to_scale, None if ridge is None else to_ridge, to_slope
