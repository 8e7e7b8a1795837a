"""Tiles of local linear attention: some rows of some heads against the keys they see, small enough to stay in cache.

A tile holds its softmax weights p and reuses them in every product with C = Cov_p(k) + λI,

    C y = Σ_j p_j ((k_j − k̄)·y) k_j + λ y ,

two matrix products per iteration of the solve and never a dim × dim matrix per row; `direct` forms C and factors it,
which costs less when dim is small. The centring is part of the first product: keys carry a column of ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.kernels.conjugate_gradient import Solution, conjugate_gradient
from headway.kernels.products import inner, outer, pieces, sandwich

#: Rows of a tile: 256 rows of 2,048 float32 keys are 2 MB.
BLOCK = 256
#: Weights per tile up to which heads are put together, so that what is done per row is done for many rows at once: in
#: the forward pass, where only the weights of all heads are kept at a time, and in the backward pass, which keeps more.
FORWARD_TILE, BACKWARD_TILE = 2**20, 2**15
#: Largest base-2 logit for which weights are taken without subtracting the row's maximum; 2^60 squared fits in float32.
UNSHIFTED = 60.0
LOG2E = math.log2(math.e)
#: Largest head dimension for which `solver="auto"` forms C.
DIRECT = 8
#: Keys whose products with themselves are held at once by the direct solve.
CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a call is computed. `direct` forms C and factors it; the rest is for conjugate gradients."""

    kv_heads: int
    causal: bool
    direct: bool
    tolerance: float
    max_iterations: int
    jacobi: bool
    detach_ridge_weight: bool
    block: int
    strict: bool


@dataclass(frozen=True)
class Part:
    """Some systems (key heads of a batch), query rows and keys."""

    systems: slice
    rows: slice
    keys: slice


class Folded:
    """Tensors of a call with the query heads of one key head put together: query is (systems, groups, rows, dim).

    Keys are also kept with a column of ones."""

    def __init__(self, query: Tensor, key: Tensor, scale: Tensor, visible: Tensor | None, settings: Settings) -> None:
        self.query, self.key, self.scale, self.visible, self.settings = query, key, scale, visible, settings
        self.kv_heads = settings.kv_heads
        self.systems, self.groups, self.queries, self.dim = query.shape
        self.keys = key.shape[1]
        #: Whether rows may see nothing.
        self.gaps = visible is not None or (settings.causal and self.keys < self.queries)
        self.widened = torch.cat([key, key.new_ones(*key.shape[:2], 1)], -1)
        self._room = query.new_empty(0)
        self.shifted = not self._largest() <= UNSHIFTED

    def _largest(self) -> float:
        """No base-2 logit is larger in size."""
        if not self.query.numel() or not self.key.numel():
            return 0.0
        lengths = torch.linalg.vector_norm(self.query, dim=-1) * self.scale.abs()
        return float(lengths.amax() * torch.linalg.vector_norm(self.key, dim=-1).amax()) * LOG2E

    def parts(self, tile: int) -> Iterator[Part]:
        """Tiles of about `tile` weights at most. Rows that see nothing are in none."""
        step = max(self.settings.block // self.groups, 1)
        for start in range(0, self.queries, step):
            stop = min(start + step, self.queries)
            first, last = self._seen(start, stop)
            if first >= last:
                continue
            together = max(tile // (self.groups * (stop - start) * (last - first)), 1)
            for system in range(0, self.systems, together):
                systems = slice(system, min(system + together, self.systems))
                yield Part(systems, slice(start, stop), slice(first, last))

    def _seen(self, start: int, stop: int) -> tuple[int, int]:
        last = min(stop + self.keys - self.queries, self.keys) if self.settings.causal else self.keys
        if self.visible is None or last <= 0:
            return 0, last
        columns = self.visible[..., start:stop, :last].flatten(0, -2).any(0).nonzero()[:, 0]
        return (int(columns[0]), int(columns[-1]) + 1) if columns.numel() else (0, 0)

    def rows(self, tensor: Float[Tensor, "systems groups rows *rest"], part: Part) -> Float[Tensor, "part rows *rest"]:
        """The rows of a tile, groups behind each other."""
        return tensor[part.systems, :, part.rows].flatten(1, 2)

    def put(self, tensor: Tensor, part: Part, rows: Tensor) -> None:
        """Writes the rows of a tile."""
        target = tensor[part.systems, :, part.rows]
        target.copy_(rows.unflatten(1, (self.groups, -1)))

    def weights(self, part: Part) -> Float[Tensor, "part rows keys"]:
        """Softmax weights of a tile, until the next one is asked for; zero rows where nothing is seen."""
        query = self.rows(self.query, part) * (LOG2E * self.rows(self.scale, part))[..., None]
        key = self.key[part.systems, part.keys]
        seen = self._visible(part)
        weights = self._place(*query.shape[:2], key.shape[1])
        for some in pieces(query, key):
            self._weigh(inner(query[some], key[some]), part, None if seen is None else seen[some], weights[some])
        return weights

    def _place(self, *shape: int) -> Tensor:
        """Memory for the weights of a tile, the same for each: fresh pages cost as much as the exponentials."""
        size = math.prod(shape)
        if self._room.numel() < size:
            self._room = self.query.new_empty(size)
        return self._room[:size].view(shape)

    def _weigh(self, logits: Tensor, part: Part, seen: Tensor | None, weights: Tensor) -> None:
        """Writes the weights of base-2 logits, which it uses up."""
        if self.shifted:
            self._hide_later(logits, part, -torch.inf)
            if seen is not None:
                logits.masked_fill_(~seen, -torch.inf)
            top = logits.amax(-1, keepdim=True)
            logits.sub_(torch.where(top.isfinite(), top, 0.0))
        torch.exp2(logits, out=weights)
        if not self.shifted:
            self._hide_later(weights, part, 0.0)
            if seen is not None:
                weights.mul_(seen)
        total = weights.sum(-1, keepdim=True)
        weights.div_(torch.where(total > 0, total, 1.0) if self.gaps else total)

    def _hide_later(self, tile: Tensor, part: Part, value: float) -> None:
        """Fills what lies behind the diagonal of a causal tile."""
        if not self.settings.causal:
            return
        start = part.rows.start + self.keys - self.queries + 1 - part.keys.start
        if start >= tile.shape[2]:
            return
        later = tile.unflatten(1, (self.groups, -1))
        if start < 0:
            rows, columns = later.shape[2:]
            order = torch.arange(columns, device=tile.device) >= start + torch.arange(rows, device=tile.device)[:, None]
            later.masked_fill_(order, value)
        elif value == 0.0:
            later[..., start:].tril_(-1)
        else:
            corner = later[..., start:]
            corner.masked_fill_(torch.ones_like(corner[0, 0], dtype=torch.bool).triu(), value)

    def _visible(self, part: Part) -> Bool[Tensor, "part rows keys"] | None:
        """The mask of a tile out of (batch, key heads or 1, groups or 1, rows, keys)."""
        if self.visible is None:
            return None
        batch, heads = self.visible.shape[:2]
        system = torch.arange(part.systems.start, part.systems.stop, device=self.visible.device)
        row = system // self.kv_heads if batch > 1 else torch.zeros_like(system)
        head = system % self.kv_heads if heads > 1 else torch.zeros_like(system)
        picked = self.visible[:, :, :, part.rows, part.keys][row, head]
        return picked.expand(-1, self.groups, -1, -1).flatten(1, 2)


class Covariance:
    """C of the rows of a tile, as something to solve with."""

    def __init__(self, folded: Folded, part: Part, weights: Tensor, centre: Tensor, ridge: Tensor) -> None:
        self.folded, self.part, self.weights, self.centre, self.ridge = folded, part, weights, centre, ridge[..., None]
        self.widened = folded.widened[part.systems, part.keys]
        self.key = folded.key[part.systems, part.keys]
        self._factor: tuple[Tensor, Tensor] | None = None

    def solve(self, right: Float[Tensor, "part rows dim"]) -> Solution:
        """C⁻¹ right."""
        settings = self.folded.settings
        if settings.direct:
            return self._solve_directly(right)
        return conjugate_gradient(
            self._applier(self.weights, self.centre, self.ridge),
            right,
            tolerance=settings.tolerance,
            max_iterations=settings.max_iterations,
            diagonal=self._diagonal() if settings.jacobi else None,
            narrow=self._narrowed,
        )

    def slopes(self, x: Float[Tensor, "part rows dim"]) -> Float[Tensor, "part rows keys"]:
        """p_j ((k_j − k̄)·x) for every key."""
        return inner(_with_offset(x, self.centre), self.widened).mul_(self.weights)

    def values(
        self, x: Float[Tensor, "part rows dim"], value: Float[Tensor, "part keys value_dim"]
    ) -> Float[Tensor, "part rows value_dim"]:
        """Σ_j p_j (1 + (k_j − k̄)·x) v_j."""
        return sandwich(_with_offset(x, self.centre, 1.0), self.widened, self.weights, value)

    def _applier(self, weights: Tensor, centre: Tensor, ridge: Tensor) -> Callable[[Tensor], Tensor]:
        def apply(direction: Tensor) -> Tensor:
            bent = sandwich(_with_offset(direction, centre), self.widened, weights, self.key)
            return bent.addcmul_(ridge, direction)

        return apply

    def _narrowed(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        return self._applier(self.weights[:, rows], self.centre[:, rows], self.ridge[:, rows])

    def _diagonal(self) -> Tensor:
        squares = outer(self.weights, self.key.square())
        return (squares - self.centre.square()).clamp(min=0) + self.ridge

    def _solve_directly(self, right: Tensor) -> Solution:
        if self._factor is None:
            matrix = self._matrix()
            factor, failed = torch.linalg.cholesky_ex(matrix)
            self._factor = matrix, torch.where((failed == 0)[..., None, None], factor, torch.nan)
        matrix, factor = self._factor
        value = torch.cholesky_solve(right[..., None], factor)
        rest = torch.linalg.vector_norm(right - (matrix @ value).squeeze(-1), dim=-1)
        norm = torch.linalg.vector_norm(right, dim=-1)
        residual = rest / torch.where(norm > 0, norm, 1.0)
        good = residual <= self.folded.settings.tolerance
        return Solution(value.squeeze(-1), residual, torch.ones_like(residual, dtype=torch.long), good)

    def _matrix(self) -> Float[Tensor, "part rows dim dim"]:
        """C itself. Keys are taken relative to the tile's mean centre, so that little is lost when a mean is large."""
        origin = self.centre.mean(1, keepdim=True)
        keys = self.key - origin
        dim = keys.shape[2]
        moments = keys.new_zeros(*self.weights.shape[:2], dim * dim)
        for start in range(0, keys.shape[1], CHUNK):
            some = keys[:, start : start + CHUNK]
            products = (some[..., :, None] * some[..., None, :]).flatten(2)
            moments = torch.baddbmm(moments, self.weights[:, :, start : start + CHUNK], products)
        # Rows without keys have a centre of zero and no weights: their C is λI.
        some_weight = self.weights.sum(-1, keepdim=True) > 0.5
        centre = torch.where(some_weight, self.centre - origin, 0.0)
        matrix = moments.unflatten(2, (dim, dim)) - centre[..., :, None] * centre[..., None, :]
        return matrix + torch.diag_embed(self.ridge.expand(-1, -1, dim))


def _with_offset(direction: Tensor, centre: Tensor, more: float = 0.0) -> Tensor:
    """[y, more − k̄·y], which times [k, 1] is more + (k − k̄)·y."""
    return torch.cat([direction, more - torch.linalg.vecdot(centre, direction)[..., None]], -1)
