"""Keys smaller than queries: two ways to multiply a query of size d_q with a stored key of size d_k.

    absorbed   q' = q U_κ(i) ,  U ∈ ℝ^(d_q × d_k) ,   s = R(q')·R(k) / √d_k        nothing is expanded
    mlp        k' = W₂ SiLU(W₁ k) ∈ ℝ^d_q ,           s = R(q)·R(k') / √d_q        k is stored as it was, unrotated

Without rotation the absorbed form is the linear expansion k' = U k, since q·(U k) = (q U)·k. With rotation the two
differ: the absorbed form turns at size d_k after the projection, so its scores depend on relative positions alone and
the stored key is ready to use. "mlp" is the literal reading of the paper (a feed-forward layer behind the cache); the
paper does not say where the rotation goes. It expands all stored keys at every step, to n_k heads and never to more.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from headway.errors import ArgumentError
from headway.kernels.unequal import shared_head


class AbsorbedKey(nn.Module):
    """U of each key head, or one for all with `shared`."""

    def __init__(self, query_heads: int, key_heads: int, query_dim: int, key_dim: int, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.register_buffer("owner", shared_head(query_heads, key_heads), persistent=False)
        self.weight = nn.Parameter(torch.empty(1 if shared else key_heads, query_dim, key_dim))
        nn.init.normal_(self.weight, std=query_dim**-0.5)

    def forward(
        self, query: Float[Tensor, "batch query_heads tokens query_dim"]
    ) -> Float[Tensor, "batch query_heads tokens key_dim"]:
        return query @ (self.weight if self.shared else self.weight[self.owner])  # type: ignore[index]

    def expand(
        self, key: Float[Tensor, "batch key_heads tokens key_dim"]
    ) -> Float[Tensor, "batch key_heads tokens query_dim"]:
        """U k, the key that the absorbed query stands for where nothing is rotated."""
        return key @ self.weight.transpose(-1, -2)


class ExpandedKey(nn.Module):
    """The feed-forward layer from d_k to d_q, shared by all key heads; `hidden` is d_q unless given."""

    def __init__(self, key_dim: int, query_dim: int, *, hidden: int | None = None) -> None:
        super().__init__()
        hidden = query_dim if hidden is None else hidden
        if hidden < 1:
            raise ArgumentError(f"hidden: got {hidden}, expected at least 1.")
        self.inner = nn.Linear(key_dim, hidden, bias=False)
        self.outer = nn.Linear(hidden, query_dim, bias=False)

    def forward(
        self, key: Float[Tensor, "batch key_heads tokens key_dim"]
    ) -> Float[Tensor, "batch key_heads tokens query_dim"]:
        return self.outer(silu(self.inner(key)))
