"""How logits become the weights P, for observers: the door's form of local linear attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.kernels.local_linear import local_linear_weights, sloped_weights


@dataclass(frozen=True, eq=False)
class LocalLinearWeighing:
    """P of the rows. `ridge` and `gain` broadcast to (batch, heads, rows); the queries of the call are those of the fit
    times `gain`, so that one scale of the call stands for one per head."""

    ridge: Float[Tensor, "#batch #heads 1"]
    gain: Float[Tensor, "#batch #heads 1"]
    name: str = "local linear"
    whole: bool = True

    def __call__(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        positions: Int[Tensor, " rows"],
        query: Float[Tensor, "batch heads rows dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        softmax = _softmax(logits, visible)
        kind = softmax.dtype
        query = query.to(kind) / self.gain.to(kind)[..., None]
        return local_linear_weights(softmax, query, _cleaned(key, visible).to(kind), self.ridge.to(kind))


@dataclass(frozen=True, eq=False)
class SlopedWeighing:
    """P for given slopes of all rows of a call, the first of which stands at key `first`."""

    slope: Float[Tensor, "batch heads queries dim"]
    first: int = 0
    name: str = "parallax"
    whole: bool = True

    def __call__(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        positions: Int[Tensor, " rows"],
        query: Float[Tensor, "batch heads rows dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        softmax = _softmax(logits, visible)
        slope = self.slope[:, :, positions - self.first].to(softmax.dtype)
        return sloped_weights(softmax, None, _cleaned(key, visible).to(softmax.dtype), slope)


def _softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Rows of softmax weights, zeros where nothing is seen."""
    some = visible.any(-1, keepdim=True)
    logits = torch.where(visible, logits, -torch.inf)
    return torch.where(visible, torch.where(some, logits, 0.0).softmax(-1), 0.0)


def _cleaned(key: Tensor, visible: Tensor) -> Tensor:
    """Keys with zeros where no row sees them; 0 · NaN would not be zero."""
    seen = visible.any(-2)
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (key.shape[1], -1)).any(2)
    return torch.where(seen[..., None], key, 0.0)
