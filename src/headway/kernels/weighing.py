"""How attention logits become weights where that is not the softmax: the one form in which observers meet other rules.

A weighing gets the scaled logits of some query rows and says which weight each visible key has. Weights may be signed
and rows need not sum to one; what is not visible has weight zero, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
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


@dataclass(frozen=True, eq=False)
class PartWeighing:
    """A weighing for some heads, and one batch entry, of the calls that it was made for.

    It may hold numbers of every head and entry (a decay, a ridge). So what is given of the part is put in the places of
    all of them, and the part's own places are read."""

    weighing: Weighing
    heads: tuple[int, ...]
    of_heads: int
    entry: int | None = None
    batch: int = 1

    @property
    def name(self) -> str:
        return self.weighing.name

    @property
    def whole(self) -> bool:
        return self.weighing.whole

    def __call__(
        self,
        logits: Float[Tensor, "part picked rows keys"],
        visible: Bool[Tensor, "#part #picked rows keys"],
        *,
        positions: Int[Tensor, " rows"],
        query: Float[Tensor, "part picked rows dim"],
        key: Float[Tensor, "part kv_heads keys dim"],
    ) -> Float[Tensor, "part picked rows keys"]:
        source = torch.zeros(self.of_heads, dtype=torch.long, device=logits.device)
        source[list(self.heads)] = torch.arange(len(self.heads), device=logits.device)

        def everywhere(x: Tensor) -> Tensor:
            x = x if x.shape[1] in (1, len(self.heads)) else x.repeat_interleave(len(self.heads) // x.shape[1], 1)
            x = x if x.shape[1] == 1 else x[:, source]
            return x if self.entry is None else x.expand(self.batch, -1, -1, -1)

        shape = (-1, self.of_heads, -1, -1)
        weights = self.weighing(
            everywhere(logits).expand(shape),
            everywhere(visible),
            positions=positions,
            query=everywhere(query).expand(shape),
            key=everywhere(key).expand(shape),
        )
        weights = weights if self.entry is None else weights[self.entry : self.entry + 1]
        return weights[:, list(self.heads)]


def part_of(
    weighing: Weighing | None, heads: Sequence[int] | None, of_heads: int, *, entry: int = 0, batch: int = 1
) -> Weighing | None:
    """The weighing of some heads (all for None) and one entry of a batch; itself where that is everything."""
    picked = tuple(range(of_heads)) if heads is None else tuple(heads)
    if weighing is None or (batch == 1 and picked == tuple(range(of_heads))):
        return weighing
    return PartWeighing(weighing, picked, of_heads, entry if batch > 1 else None, batch)


def weighed_entropy(weights: Float[Tensor, "... keys"]) -> Float[Tensor, ...]:
    """Entropy in nats of the shares |w| / Σ|w|: of the weights themselves where they are a distribution."""
    size = weights.abs()
    total = size.sum(-1, keepdim=True)
    return torch.special.entr(size / total.clamp(min=1e-30)).sum(-1)
