"""What local linear attention can be given: checks with their errors, and the folding of heads into systems."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError, NumericError, unknown
from headway.kernels.conjugate_gradient import check_stopping
from headway.kernels.dense import check_heads, visible_keys
from headway.kernels.local_linear.tiles import BLOCK, DIRECT, Settings

#: A number, one per head and row or a broadcast of that, or None for dim ** -0.5.
Scale = float | Float[Tensor, "#batch #heads #queries"] | None
SOLVERS = ("auto", "direct", "cg")
MODES = ("block", "reference")
#: Relative residuals at which a row's solve stops, where none is given. In float32 outputs then err by about 1e-4.
TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-12}
#: The released functions default to a ridge of 10, their examples to 0.1, for keys of about unit length.
RIDGE = 0.1
MAX_ITERATIONS = 64


def prepare(
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
    if bool(level.isnan().any()):
        raise NumericError(f"{name}: got NaN, expected finite numbers. Check what it was learned from.")
    if not bool(level.isfinite().all()):
        raise NumericError(f"{name}: got infinity, expected finite numbers. Softmax attention is the limit: use that.")
    return level.reshape(shape)


def _checked_ridge(level: Tensor) -> Tensor:
    if level.numel() and not bool((level > 0).all()):
        raise ArgumentError(
            f"ridge: got {float(level.min()):g}, expected positive numbers: without a ridge the fit of a row that sees "
            "fewer than dim + 1 keys is singular. Use a small one, such as 1e-6 in float64."
        )
    return level


def without_unseen(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
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


def all_visible(query: Tensor, key: Tensor, causal: bool, visible: Tensor | None) -> Tensor:
    rows = torch.arange(query.shape[2], device=query.device)
    offset = key.shape[2] - query.shape[2]
    seen = visible_keys(rows, key.shape[2], causal=causal, offset=offset, mask=visible)
    return torch.ones(1, 1, rows.numel(), key.shape[2], dtype=torch.bool, device=query.device) if seen is None else seen


def folded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fold_rows(query, key.shape[1]), key.flatten(0, 1).contiguous(), value.flatten(0, 1).contiguous()


def fold_rows(tensor: Tensor, kv_heads: int) -> Float[Tensor, "systems groups rows *rest"]:
    return tensor.unflatten(1, (kv_heads, -1)).flatten(0, 1)


def fold_visible(visible: Tensor | None, groups: int) -> Tensor | None:
    """(batch or 1, key heads or 1, groups or 1, rows, keys)."""
    if visible is None or visible.shape[1] == 1:
        return None if visible is None else visible[:, :, None]
    return visible.unflatten(1, (-1, groups))


def unfold(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor.unflatten(0, (query.shape[0], -1)).flatten(1, 2)
