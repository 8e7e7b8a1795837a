"""The weights P of local linear attention for given softmax rows, for whoever looks at weights. Explicit matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headway.kernels.dense import grouped_scores, grouped_values


def local_linear_weights(
    softmax: Float[Tensor, "batch heads rows keys"],
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    ridge: Float[Tensor, "#batch #heads #rows"],
) -> Float[Tensor, "batch heads rows keys"]:
    """P of rows whose softmax weights are given. Rows of zeros stay zero. Takes O(rows · dim²) memory.

    Queries and keys are moved so that the keys have a mean of zero. P does not depend on such a move, and the keys of
    hosts, whose mean may be far longer than their spread, keep their digits in float32."""
    batch, heads, rows, keys = softmax.shape
    dim, kv_heads = key.shape[3], key.shape[1]
    origin = key.mean(2, keepdim=True)
    query, key = query - origin.repeat_interleave(heads // kv_heads, 1), key - origin
    centre = grouped_values(softmax, key)
    products = (key[..., :, None] * key[..., None, :]).flatten(-2)
    folded = softmax.reshape(batch, kv_heads, -1, keys)
    moments = (folded @ products).reshape(batch, heads, rows, dim, dim)
    moments = moments - centre[..., :, None] * centre[..., None, :]
    moments = moments + ridge[..., None, None] * torch.eye(dim, dtype=key.dtype, device=key.device)
    slope = torch.linalg.solve(moments, query - centre)
    return sloped_weights(softmax, centre, key, slope)


def sloped_weights(
    softmax: Float[Tensor, "batch heads rows keys"],
    centre: Float[Tensor, "batch heads rows dim"] | None,
    key: Float[Tensor, "batch kv_heads keys dim"],
    slope: Float[Tensor, "batch heads rows dim"],
) -> Float[Tensor, "batch heads rows keys"]:
    """p_ij (1 + (k_j − k̄_i)·x_i) for given slopes x. `centre` is k̄ where it is known already."""
    centre = grouped_values(softmax, key) if centre is None else centre
    return softmax * (1 + grouped_scores(slope, key) - (centre * slope).sum(-1, keepdim=True))
