"""How many heads of which size Q, K and V have, and what that costs.

    cache elements per token and layer = n_k·d_k + n_v·d_v
    multiplications of one decoding step at context t = n_q·t·(d_k + d_v) + projections + 3·n_q·d_q·A

A is the width of the query's augmentation, 0 without it. Its cost does not grow with t, the saving of the cache does:
`break_even_tokens` is the context from which a decoding step moves fewer numbers than one of the layer compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from headway.errors import ArgumentError
from headway.kernels.unequal import check_head_counts, shared_head


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Head counts and sizes of one layer. `key_dim` is what is stored and multiplied, `query_dim` the size of a query
    head as it leaves its projection."""

    query_heads: int
    key_heads: int
    value_heads: int
    query_dim: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        check_head_counts(self.query_heads, self.key_heads, self.value_heads)
        if min(self.query_dim, self.key_dim, self.value_dim) < 1:
            raise ArgumentError(
                f"query_dim, key_dim, value_dim: got {self.query_dim}, {self.key_dim} and {self.value_dim}, expected "
                "sizes of at least 1."
            )

    @classmethod
    def grouped(cls, query_heads: int, stored_heads: int, dim: int) -> HeadLayout:
        """Grouped-query attention: as many key as value heads, all of one size."""
        return cls(
            query_heads=query_heads,
            key_heads=stored_heads,
            value_heads=stored_heads,
            query_dim=dim,
            key_dim=dim,
            value_dim=dim,
        )

    @property
    def key_of(self) -> Int[Tensor, " query_heads"]:
        """The key head of each query head, ⌊i·n_k / n_q⌋."""
        return shared_head(self.query_heads, self.key_heads)

    @property
    def value_of(self) -> Int[Tensor, " query_heads"]:
        """The value head of each query head, ⌊i·n_v / n_q⌋."""
        return shared_head(self.query_heads, self.value_heads)

    @property
    def cache_elements(self) -> int:
        """Numbers stored per token and layer."""
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def cache_bytes(self, tokens: int, dtype: torch.dtype = torch.float32, *, layers: int = 1) -> int:
        """Bytes of keys and values after `tokens` tokens."""
        return tokens * layers * self.cache_elements * dtype.itemsize

    def cache_ratio(self, other: HeadLayout) -> float:
        """Cache of this layout over that of another."""
        return self.cache_elements / other.cache_elements

    def decode_products(self, tokens: int, width: int, *, aug_dim: int = 0) -> int:
        """Multiplications of one decoding step of one layer at a context of `tokens`: projections, augmentation,
        scores and values."""
        queries = self.query_heads * self.query_dim
        projections = width * (queries + self.cache_elements + self.query_heads * self.value_dim)
        return projections + 3 * queries * aug_dim + self.query_heads * tokens * (self.key_dim + self.value_dim)


def break_even_tokens(layout: HeadLayout, other: HeadLayout, width: int, *, aug_dim: int = 0, batch: int = 1) -> float:
    """The context from which a decoding step of `layout` reads fewer numbers (cache and weights) than one of `other`;
    infinite where its cache is no smaller.

    Weights are read once for the whole batch and the cache once for each sequence, so the point falls with the batch.
    `other` has no augmentation. This counts numbers, not time."""
    if batch < 1:
        raise ArgumentError(f"batch: got {batch}, expected at least 1.")
    saved = other.cache_elements - layout.cache_elements
    if saved <= 0:
        return math.inf
    queries = layout.query_heads * layout.query_dim
    more = 3 * queries * aug_dim + width * (layout.cache_elements - other.cache_elements)
    return max(more, 0) / (saved * batch)
