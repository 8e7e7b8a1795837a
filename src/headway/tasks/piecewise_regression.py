"""Test-time regression on piecewise linear data, and the estimators that attention layers amount to.

A sequence holds pairs (k, v) from S segments. Segment s has a centre c_s on the unit sphere and a linear map A_s:

    k = normalise(c_s + spread · g) ,   v = A_s k + noise · ε ,   g ~ N(0, I/d), A_s ~ N(0, 1/d), ε ~ N(0, I)

A query is drawn like a key of a random segment, and A_s q without noise is its target. Softmax attention answers with
the local mean of v (Nadaraya–Watson), linear attention and ridge regression with one map for everything, local linear
attention with the map around the query. One segment is the stationary case, in which ridge regression is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import elu, normalize

from headway.errors import ArgumentError
from headway.kernels.local_linear import local_linear_attention

SEGMENTS, PER_SEGMENT, QUERIES = 4, 64, 16
SPREAD, NOISE = 0.5, 0.05

Estimator = Callable[["Regression"], Float[Tensor, "batch queries value_dim"]]


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Pairs of keys and noisy values, queries, and what is right at them."""

    key: Float[Tensor, "batch pairs dim"]
    value: Float[Tensor, "batch pairs value_dim"]
    query: Float[Tensor, "batch queries dim"]
    target: Float[Tensor, "batch queries value_dim"]


def piecewise_regression(
    batch: int,
    dim: int,
    generator: torch.Generator,
    *,
    segments: int = SEGMENTS,
    per_segment: int = PER_SEGMENT,
    queries: int = QUERIES,
    value_dim: int | None = None,
    spread: float = SPREAD,
    noise: float = NOISE,
    dtype: torch.dtype = torch.float64,
) -> Regression:
    """`batch` sequences of `segments` × `per_segment` pairs in random order."""
    for name, got in (("batch", batch), ("dim", dim), ("segments", segments), ("per_segment", per_segment)):
        if got < 1:
            raise ArgumentError(f"{name}: got {got}, expected at least 1.")
    value_dim = dim if value_dim is None else value_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    centres = normalize(draw(batch, segments, dim), dim=-1)
    maps = draw(batch, segments, value_dim, dim) / dim**0.5
    each = torch.arange(batch)[:, None]

    def pairs(segment: Tensor) -> tuple[Tensor, Tensor]:
        key = normalize(centres[each, segment] + spread * draw(*segment.shape, dim) / dim**0.5, dim=-1)
        return key, (maps[each, segment] @ key[..., None]).squeeze(-1)

    count = segments * per_segment
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)])
    key, clean = pairs(order % segments)
    query, target = pairs(torch.randint(segments, (batch, queries), generator=generator))
    return Regression(key=key, value=clean + noise * draw(*clean.shape), query=query, target=target)


def softmax_estimate(data: Regression, *, scale: float) -> Float[Tensor, "batch queries value_dim"]:
    """Σ p v: the local constant fit."""
    return (scale * data.query @ data.key.transpose(1, 2)).softmax(-1) @ data.value


def local_linear_estimate(
    data: Regression, *, scale: float, ridge: float, solver: str = "direct"
) -> Float[Tensor, "batch queries value_dim"]:
    """The local affine fit."""
    query, key, value = (x[:, None] for x in (data.query, data.key, data.value))
    return local_linear_attention(query, key, value, ridge=ridge, scale=scale, causal=False, solver=solver)[:, 0]


def ridge_estimate(data: Regression, *, ridge: float) -> Float[Tensor, "batch queries value_dim"]:
    """argmin_W Σ ‖v − W k‖² + ridge · n ‖W‖², at the query: what Mesa layers solve."""
    pairs, dim = data.key.shape[1:]
    gram = data.key.transpose(1, 2) @ data.key / pairs + ridge * torch.eye(dim, dtype=data.key.dtype)
    return data.query @ torch.linalg.solve(gram, data.key.transpose(1, 2) @ data.value / pairs)


def linear_attention_estimate(data: Regression) -> Float[Tensor, "batch queries value_dim"]:
    """Σ φ(q)·φ(k) v / Σ φ(q)·φ(k) with φ = elu + 1 (arXiv 2006.16236) on keys of length √d."""
    grow = data.key.shape[2] ** 0.5
    weights = (elu(grow * data.query) + 1) @ (elu(grow * data.key) + 1).transpose(1, 2)
    return weights / weights.sum(-1, keepdim=True) @ data.value


def squared_errors(estimate: Tensor, data: Regression) -> Float[Tensor, " batch"]:
    """Mean squared error of each sequence against the targets."""
    return (estimate - data.target).square().mean((1, 2))
