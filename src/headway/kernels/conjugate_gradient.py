"""Many small symmetric positive systems at once by conjugate gradients, each row stopped on its own.

    A_i x_i = b_i ,   x₀ = 0, r₀ = p₀ = b ;
    α = rᵀz / pᵀA p ,  x ← x + α p ,  r ← r − α A p ,  z = r ∘ m ,  β = rᵀz / (rᵀz)_old ,  p ← z + β p

m is the diagonal of an optional preconditioner (1 / diag A for Jacobi's). A_i is never formed: `apply(p)` gives A_i p_i
for all rows. A row stops when ‖r‖ ≤ tolerance · ‖b‖, or for good when it meets a number that is not finite or a
direction without curvature; it is then frozen by a mask. Where the caller can restrict `apply` to fewer rows
(`narrow`), stopped rows are dropped once they are half of all, so that a few slow rows do not cost as much as a whole
tile.

Hestenes and Stiefel, 1952. The residual is the one of the recursion, which in exact arithmetic is b − A x.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError, NumericError

Apply = Callable[[Tensor], Tensor]
#: Stopped rows are dropped when at most this share of the rows still runs.
NARROW_AT = 0.5
#: Slack between the stop test, on squares, and the test of what it left.
ROUNDING = 1 + 1e-3


class ConvergenceWarning(UserWarning):
    """An iterative solve stopped before its tolerance."""


class ConvergenceError(NumericError):
    """The same, where the caller asked for `strict`."""


@dataclass(frozen=True)
class Solution:
    """`value` solves the systems up to `residual` = ‖b − A x‖ / ‖b‖ (0 for b = 0), after `steps` iterations per row.

    `converged` is False where the residual is above the tolerance or not finite."""

    value: Float[Tensor, "batch rows dim"]
    residual: Float[Tensor, "batch rows"]
    steps: Int[Tensor, "batch rows"]
    converged: Bool[Tensor, "batch rows"]


def conjugate_gradient(
    apply: Apply,
    right: Float[Tensor, "batch rows dim"],
    *,
    tolerance: float,
    max_iterations: int,
    diagonal: Float[Tensor, "batch rows dim"] | None = None,
    narrow: Callable[[Int[Tensor, " kept"]], Apply] | None = None,
) -> Solution:
    """Solves A_i x_i = b_i for every row of `right`.

    `tolerance` is relative to ‖b‖. `diagonal` is the diagonal of A, for Jacobi's preconditioner; plain without.
    `narrow(rows)` gives `apply` for some of the rows of `right` alone."""
    check_stopping(tolerance, max_iterations)
    scale = None if diagonal is None else 1 / diagonal
    whole = _Running(right, scale, tolerance)
    running = whole
    rows = torch.arange(right.shape[1], device=right.device)
    for _ in range(max_iterations):
        share = running.share()
        if not share:
            break
        if narrow is not None and share <= NARROW_AT and running.rows > 1:
            kept = running.active.any(0).nonzero()[:, 0]
            if kept.numel() <= NARROW_AT * running.rows:
                whole.put(rows, running)
                running, rows = running.keep(kept), rows[kept]
                apply = narrow(rows)
        running.step(apply(running.direction))
    whole.put(rows, running)
    norm = torch.linalg.vector_norm(right, dim=-1)
    residual = torch.linalg.vector_norm(whole.rest, dim=-1) / torch.where(norm > 0, norm, 1.0)
    return Solution(whole.value, residual, whole.steps, residual <= tolerance * ROUNDING)


def check_stopping(tolerance: float, max_iterations: int) -> None:
    """Raises ArgumentError for a tolerance or a number of iterations that cannot be used."""
    if not tolerance > 0:
        raise ArgumentError(f"tolerance: got {tolerance}, expected a positive number, relative to the right side.")
    if max_iterations < 1:
        raise ArgumentError(f"max_iterations: got {max_iterations}, expected at least 1.")


def report_unconverged(what: str, residual: Tensor, tolerance: float, fix: str, *, strict: bool) -> None:
    """Warns (ConvergenceWarning), or raises ConvergenceError if `strict`, when a residual is above the tolerance; names
    how many rows and the worst of them by its index in `residual`."""
    bad = ~(residual <= tolerance * ROUNDING)
    count = int(bad.sum())
    if not count:
        return
    flat = int(torch.where(residual.isfinite(), residual, torch.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), residual.shape))
    message = (
        f"{what}: {count} of {residual.numel()} rows did not reach a relative residual of {tolerance:g}; the worst "
        f"is row {index} with {float(residual.flatten()[flat]):.2g}. {fix}"
    )
    if strict:
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)


class _Running:
    """The state of the iteration for a set of rows; changed in place."""

    def __init__(self, right: Tensor, scale: Tensor | None, tolerance: float) -> None:
        self.value, self.rest, self.scale = torch.zeros_like(right), right.clone(), scale
        self.direction = self._conditioned().clone()
        self.length = torch.linalg.vecdot(self.rest, self.direction)
        norm = torch.linalg.vecdot(right, right)
        self.limit = tolerance**2 * norm
        self.active = (norm > self.limit) & norm.isfinite()
        self.steps = torch.zeros(norm.shape, dtype=torch.long, device=right.device)
        self.none = torch.zeros_like(norm)
        #: Whether a row had to be given up; 0 times what it meets may not be 0.
        self.broken = False

    @property
    def rows(self) -> int:
        return self.active.shape[1]

    def share(self) -> float:
        return int(self.active.sum()) / max(self.active.numel(), 1)

    def step(self, applied: Tensor) -> None:
        curvature = torch.linalg.vecdot(self.direction, applied)
        alive = self.active & (curvature > 0) & (curvature < torch.inf)
        self.broken = self.broken or not torch.equal(alive, self.active)
        if self.broken:
            applied = torch.where(alive[..., None], applied, 0.0)
        ahead = torch.where(alive, self.length / curvature, self.none)[..., None]
        self.value.addcmul_(ahead, self.direction)
        self.rest.addcmul_(ahead, applied, value=-1)
        self.steps += alive
        conditioned = self._conditioned()
        length = torch.linalg.vecdot(self.rest, conditioned)
        norm = length if self.scale is None else torch.linalg.vecdot(self.rest, self.rest)
        self.active = alive & (norm > self.limit)
        turn = torch.where(self.active, length / self.length, self.none)[..., None]
        self.direction = torch.addcmul(conditioned, turn, self.direction)
        self.length = length

    def keep(self, kept: Tensor) -> _Running:
        part = object.__new__(_Running)
        for name, tensor in vars(self).items():
            setattr(part, name, tensor[:, kept] if isinstance(tensor, Tensor) else tensor)
        return part

    def put(self, rows: Tensor, part: _Running) -> None:
        """Writes what came of a part back to its rows."""
        if part is not self:
            for name in ("value", "rest", "steps"):
                getattr(self, name)[:, rows] = getattr(part, name)

    def _conditioned(self) -> Tensor:
        return self.rest if self.scale is None else self.rest * self.scale
