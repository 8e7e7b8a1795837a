"""Local linear attention, forward and backward, tile by tile with Θ(n d) memory.

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
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.errors import ArgumentError, NumericError, unknown
from headway.kernels.conjugate_gradient import check_stopping, report_unconverged
from headway.kernels.dense import check_heads, grouped_values, visible_keys
from headway.kernels.local_linear.reference import reference_weights
from headway.kernels.local_linear.tiles import BACKWARD_TILE, BLOCK, DIRECT, FORWARD_TILE, Covariance, Folded, Settings
from headway.kernels.local_linear.weights import sloped_weights
from headway.kernels.products import inner, outer

#: A number, one per head and row or a broadcast of that, or None for dim ** -0.5.
Scale = float | Float[Tensor, "#batch #heads #queries"] | None
SOLVERS = ("auto", "direct", "cg")
MODES = ("block", "reference")
#: Relative residuals at which a row's solve stops, where none is given. In float32 outputs then err by about 1e-4.
TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-12}
#: The released functions default to a ridge of 10, their examples to 0.1, for keys of about unit length.
RIDGE = 0.1
MAX_ITERATIONS = 64
FIX = "Raise ridge or max_iterations, normalise queries and keys, or use solver='direct'."


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
    settings, query_, key_, value_, ridge_, scale_ = _prepare(
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
    query_, key_, value_ = _without_unseen(query_, key_, value_, visible)
    if mode == "reference":
        seen = _all_visible(query, key, causal, visible)
        weights = _in_full_precision(reference_weights)(
            query_, key_, ridge=ridge_, scale=scale_, visible=seen, detach_ridge_weight=detach_ridge_weight
        )
        return grouped_values(weights, value_).to(value.dtype)
    output, _, _, residual, _ = _LocalLinear.apply(
        *_folded(query_, key_, value_),
        _fold_rows(scale_.expand(query.shape[:3]), key.shape[1]),
        _fold_rows(ridge_.expand(query.shape[:3]), key.shape[1]),
        None,
        _fold_visible(visible, query.shape[1] // key.shape[1]),
        settings,
    )
    report_unconverged("local linear attention", _unfold(residual, query), settings.tolerance, FIX, strict=strict)
    return _unfold(output, query).to(value.dtype)


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
    settings, query_, key_, value_, ridge_, scale_ = _prepare(query, key, value, ridge, visible, **options)
    with torch.no_grad():
        query_, key_, value_ = _without_unseen(query_, key_, value_, visible)
        found = _forward(
            *_folded(query_, key_, value_),
            _fold_rows(scale_.expand(query.shape[:3]), key.shape[1]),
            _fold_rows(ridge_.expand(query.shape[:3]), key.shape[1]),
            None,
            _fold_visible(visible, query.shape[1] // key.shape[1]),
            settings,
        )
    return LocalFit(*(_unfold(x, query) for x in found))


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
    settings, query_, key_, value_, _, scale_ = _prepare(
        query, key, value, RIDGE, visible, scale=scale, causal=causal, mode=mode, block=block
    )
    if slope.shape != query.shape:
        raise ArgumentError(f"slope: got shape {tuple(slope.shape)}, expected that of query, {tuple(query.shape)}.")
    query_, key_, value_ = _without_unseen(query_, key_, value_, visible)
    slope_ = slope.to(query_.dtype)
    if mode == "reference":
        seen = _all_visible(query, key, causal, visible)
        logits = scale_[..., None] * query_ @ key_.repeat_interleave(check_heads(query, key), 1).transpose(-1, -2)
        softmax = torch.where(seen.any(-1, keepdim=True), logits.masked_fill(~seen, -torch.inf), 0.0).softmax(-1)
        softmax = torch.where(seen, softmax, 0.0)
        return grouped_values(sloped_weights(softmax, None, key_, slope_), value_).to(value.dtype)
    output, *_ = _LocalLinear.apply(
        *_folded(query_, key_, value_),
        _fold_rows(scale_.expand(query.shape[:3]), key.shape[1]),
        None,
        _fold_rows(slope_, key.shape[1]),
        _fold_visible(visible, query.shape[1] // key.shape[1]),
        settings,
    )
    return _unfold(output, query).to(value.dtype)


def _in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would take the products in half precision."""

    @wraps(function)
    def call(first: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest, **options)

    return call


class _LocalLinear(torch.autograd.Function):
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
        found = _forward(query, key, value, scale, ridge, slope, visible, settings)
        context.save_for_backward(query, key, value, scale, ridge, visible, found[1], found[2])
        context.settings = settings
        context.learned = ridge is None
        context.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, scale, ridge, visible, centre, slope = context.saved_tensors
        found = _backward(gradient, query, key, value, scale, ridge, visible, centre, slope, context.settings)
        return (*found, None, None)


@_in_full_precision
def _forward(
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


@_in_full_precision
def _backward(
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
        report_unconverged(
            "local linear attention, backward", residual, settings.tolerance, FIX, strict=settings.strict
        )
    return to_query, to_key, to_value, to_scale, None if ridge is None else to_ridge, to_slope


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ridge: float | Tensor,
    visible: Tensor | None,
    *,
    scale: Scale = None,
    causal: bool = True,
    dropout: float = 0.0,
    mode: str = "block",
    solver: str = "auto",
    tolerance: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    jacobi: bool = False,
    detach_ridge_weight: bool = False,
    strict: bool = False,
    block: int = BLOCK,
) -> tuple[Settings, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The checked settings, and the tensors in the precision of the computation; ridge and scale have three
    dimensions."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if dropout:
        raise ArgumentError(
            f"dropout: got {dropout}, expected 0: the weights of local linear attention may be negative and rows "
            "would no longer reproduce linear maps. Drop out elsewhere."
        )
    if block < 1:
        raise ArgumentError(f"block: got {block}, expected at least one row.")
    _check_shapes(query, key, value, visible)
    work = torch.promote_types(
        torch.promote_types(query.dtype, torch.float32), torch.promote_types(key.dtype, value.dtype)
    )
    tolerance = TOLERANCE.get(work, TOLERANCE[torch.float32]) if tolerance is None else tolerance
    check_stopping(tolerance, max_iterations)
    direct = solver == "direct" or (solver == "auto" and query.shape[3] <= DIRECT)
    if direct:
        # A factorisation cannot be told how exact to be; only a failed one is worth a warning.
        tolerance = max(tolerance, torch.finfo(work).eps ** 0.5)
    settings = Settings(
        kv_heads=key.shape[1],
        causal=causal,
        direct=direct,
        tolerance=tolerance,
        max_iterations=max_iterations,
        jacobi=jacobi,
        detach_ridge_weight=detach_ridge_weight,
        block=block,
        strict=strict,
    )
    level = _checked_ridge(_by_row("ridge", ridge, query, work))
    steep = _by_row("scale", query.shape[3] ** -0.5 if scale is None else scale, query, work)
    return settings, query.to(work), key.to(work), value.to(work), level, steep


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ArgumentError(
            f"query, key, value: got {query.ndim}, {key.ndim} and {value.ndim} dimensions, expected (batch, heads, "
            "tokens, dim) of each."
        )
    check_heads(query, key)
    if query.shape[3] != key.shape[3] or key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise ArgumentError(
            f"query, key, value: got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}, expected one "
            "batch, query and key of one dim, key and value with the same heads and tokens."
        )
    if visible is not None:
        wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        fits = visible.ndim == 4 and all(a in (1, b) for a, b in zip(visible.shape[:2], wanted[:2], strict=True))
        if visible.dtype != torch.bool or not fits or tuple(visible.shape[2:]) != wanted[2:]:
            raise ArgumentError(
                f"visible: got {str(visible.dtype).removeprefix('torch.')} of shape {tuple(visible.shape)}, expected "
                f"bool, broadcastable to {wanted} in its first two dimensions. An additive mask is `mask > -inf`."
            )


def _by_row(
    name: str, given: float | Tensor, query: Tensor, work: torch.dtype
) -> Float[Tensor, "#batch #heads #queries"]:
    """A number or a tensor that broadcasts to (batch, heads, queries), with three dimensions."""
    level = given if isinstance(given, Tensor) else torch.tensor(float(given), dtype=work)
    level = level.to(query.device, work)
    wanted = tuple(query.shape[:3])
    shape = (1,) * (3 - level.ndim) + tuple(level.shape)
    if len(shape) > 3 or any(a not in (1, b) for a, b in zip(shape, wanted, strict=True)):
        raise ArgumentError(
            f"{name}: got shape {tuple(level.shape)}, expected one that broadcasts to (batch, heads, queries) = "
            f"{wanted}. One number per head is (heads, 1)."
        )
    if not bool(level.isfinite().all()) and not bool(level.isnan().any()):
        raise NumericError(f"{name}: got infinity, expected finite numbers. Softmax attention is the limit: use that.")
    return level.reshape(shape)


def _checked_ridge(level: Tensor) -> Tensor:
    if level.numel() and not bool((level > 0).all()):
        raise ArgumentError(
            f"ridge: got {float(level.min()):g}, expected positive numbers: without a ridge the fit of a row that sees "
            "fewer than dim + 1 keys is singular. Use a small one, such as 1e-6 in float64."
        )
    return level


def _without_unseen(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for rows that see nothing and keys that nobody sees, so that whatever stands there does not leak."""
    if visible is None:
        return query, key, value
    groups = query.shape[1] // key.shape[1]
    queries = visible.any(-1)[..., None]
    keys = visible.any(-2)
    if keys.shape[1] > 1:
        keys = keys.unflatten(1, (-1, groups)).any(2)
    keys = keys[..., None]
    return torch.where(queries, query, 0.0), torch.where(keys, key, 0.0), torch.where(keys, value, 0.0)


def _all_visible(query: Tensor, key: Tensor, causal: bool, visible: Tensor | None) -> Tensor:
    rows = torch.arange(query.shape[2], device=query.device)
    offset = key.shape[2] - query.shape[2]
    seen = visible_keys(rows, key.shape[2], causal=causal, offset=offset, mask=visible)
    return torch.ones(1, 1, rows.numel(), key.shape[2], dtype=torch.bool, device=query.device) if seen is None else seen


def _folded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fold_rows(query, key.shape[1]), key.flatten(0, 1).contiguous(), value.flatten(0, 1).contiguous()


def _fold_rows(tensor: Tensor, kv_heads: int) -> Float[Tensor, "systems groups rows *rest"]:
    return tensor.unflatten(1, (kv_heads, -1)).flatten(0, 1)


def _fold_visible(visible: Tensor | None, groups: int) -> Tensor | None:
    """(batch or 1, key heads or 1, groups or 1, rows, keys)."""
    if visible is None or visible.shape[1] == 1:
        return None if visible is None else visible[:, :, None]
    return visible.unflatten(1, (-1, groups))


def _unfold(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor.unflatten(0, (query.shape[0], -1)).flatten(1, 2)
