"""How attention logits become weights where that is not the softmax: the one form in which observers meet other rules.

A weighing gets the scaled logits of some query rows and says which weight each visible key has. Weights may be signed
and rows need not sum to one; what is not visible has weight zero, exactly.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Weighing(Protocol):
    """`name` for tables and errors; `whole` tells whether the weights of a row that sees something sum to one."""

    @property
    def name(self) -> str: ...

    @property
    def whole(self) -> bool: ...

    def __call__(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        positions: Int[Tensor, " rows"],
        query: Float[Tensor, "batch heads rows dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        """The weights. `logits` are scaled and biased, of any value where not visible; `positions` are the key indices
        at which the rows stand; `query` and `key` are there for rules that need more than their product."""
        ...


def weighed_entropy(weights: Float[Tensor, "... keys"]) -> Float[Tensor, ...]:
    """Entropy in nats of the shares |w| / Σ|w|: of the weights themselves where they are a distribution."""
    import torch

    size = weights.abs()
    total = size.sum(-1, keepdim=True)
    return torch.special.entr(size / total.clamp(min=1e-30)).sum(-1)
