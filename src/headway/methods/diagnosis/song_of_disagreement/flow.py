"""Attention flow: how much can reach the readout from each input token, if weights are pipes.

Layers are columns of nodes, token i of layer l has a pipe of capacity Ã_l,ij to token j of layer l−1. The score of an
input token is the largest flow from the readout to it. Paper: Quantifying Attention Flow in Transformers, arXiv
2005.00928. Flows are found by scipy's maximum_flow on whole numbers: capacities are cut to 2⁻²⁰.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from headway.errors import ArgumentError

#: Longest text by default: at 128 tokens and six layers, 128 flows through 100,000 pipes.
FLOW_TOKENS = 128
UNITS = 2**20


def attention_flow(
    layers: Sequence[Float[np.ndarray, "tokens tokens"]], row: Float[np.ndarray, " tokens"] | None = None
) -> Float[np.ndarray, " tokens"]:
    """Largest flow from the readout to each input token, divided by the sum of all of them.

    layers: row-normalised maps with the residual (Ã), first layer first. row: weights of the last layer's query rows in
    the output (default: the first token alone); each is the capacity of its pipe from the source.

    Raises ArgumentError for maps that are not square, negative, or of different sizes."""
    if not layers:
        raise ArgumentError("layers: got none, expected at least one map.")
    count = layers[0].shape[0]
    for number, weights in enumerate(layers):
        if weights.shape != (count, count) or (weights < 0).any() or not np.isfinite(weights).all():
            raise ArgumentError(
                f"layers: got {weights.shape} at {number}, expected square maps of {count} tokens with weights ≥ 0."
            )
    row = np.eye(count)[0] if row is None else np.asarray(row, float)
    graph = _graph(layers, row)
    source = (len(layers) + 1) * count
    flows = np.array([maximum_flow(graph, source, token).flow_value for token in range(count)], float) / UNITS
    total = flows.sum()
    return flows / total if total > 0 else flows


def _graph(layers: Sequence[np.ndarray], row: np.ndarray) -> csr_matrix:
    """Node l · tokens + i is token i below layer l; the last node is the source."""
    count, depth = layers[0].shape[0], len(layers)
    starts, ends, capacities = [], [], []
    for level, weights in enumerate(layers):
        queries, keys = np.nonzero(weights > 0)
        starts.append((level + 1) * count + queries)
        ends.append(level * count + keys)
        capacities.append(weights[queries, keys])
    read = np.nonzero(row > 0)[0]
    starts.append(np.full(len(read), (depth + 1) * count))
    ends.append(depth * count + read)
    capacities.append(row[read])
    size = (depth + 1) * count + 1
    whole = np.floor(np.concatenate(capacities) * UNITS + 0.5).astype(np.int32)
    return csr_matrix((whole, (np.concatenate(starts), np.concatenate(ends))), shape=(size, size))
