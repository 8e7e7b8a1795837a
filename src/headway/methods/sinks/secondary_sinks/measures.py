"""What sinks do to attention and to the stream: sink score, norm profiles and matrix entropy by layer.

    received    α_t^{l,h} = mean of A[i, t] over the queries i ≥ t ,  averaged over heads
    score       mean of α over the primary, the secondary and the remaining tokens, per layer
    entropy     p = eigenvalues of H Hᵀ / trace ,   S_1 = −Σ p ln p ,   S_a = ln(Σ pᵃ) / (1 − a)

Paper: arXiv 2512.22213. Its notebook for the sink score could not be read; the statistic here is the one of the sink
metric of arXiv 2410.10781 (inferred).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.methods.sinks.secondary_sinks.detection import SinkMap

GROUPS = ("primary", "bos_sink", "secondary", "rest")
#: Tokens per chunk of the matrix entropy, from the released code.
CHUNK = 100
CHUNK_MODES = ("chunks", "prefix")


def token_groups(sinks: SinkMap) -> dict[str, list[int]]:
    """Positions by group: the primary sink, tokens labelled bos_sink, tokens labelled secondary, and all others."""
    groups = {
        "primary": [] if sinks.primary is None else [sinks.primary.position],
        "bos_sink": sinks.positions("bos_sink"),
        "secondary": sinks.positions("secondary"),
    }
    special = {position for members in groups.values() for position in members}
    return {**groups, "rest": [t for t in range(sinks.tokens) if t not in special]}


def group_profile(values: Float[Tensor, "layers tokens"], sinks: SinkMap) -> dict[str, Float[Tensor, " layers"]]:
    """Mean of a per-layer, per-token quantity over each group of tokens; NaN for a group without tokens."""
    if values.shape[-1] != sinks.tokens:
        raise ArgumentError(
            f"values: got {values.shape[-1]} tokens, expected the {sinks.tokens} of the sink map. Leave padding out."
        )
    return {
        name: values[:, members].mean(1) if members else torch.full((values.shape[0],), torch.nan)
        for name, members in token_groups(sinks).items()
    }


def sink_score(received: Sequence[Any], sinks: SinkMap) -> dict[str, Float[Tensor, " layers"]]:
    """Received attention by layer for the groups of `token_groups`, and for `secondary_alive`: the tokens labelled
    secondary, at the layers that read a stream in which they are flagged (one after the layer that flags them).

    `received[layer]` is (heads, tokens) or (tokens,): the mass that each token receives per query that can see it. None
    stands for a layer without full attention (sliding window, linear, state space) and gives NaN there."""
    if len(received) != sinks.layers:
        raise ArgumentError(
            f"received: got {len(received)} layers, expected the {sinks.layers} of the model. Give None for layers "
            "without full attention."
        )
    table = torch.full((sinks.layers, sinks.tokens), torch.nan)
    for layer, values in enumerate(received):
        if values is not None:
            table[layer] = _over_heads(values, layer, sinks.tokens)
    scores = group_profile(table, sinks)
    alive = torch.full((sinks.layers,), torch.nan)
    for layer in range(1, sinks.layers):
        flagged = sinks.at(layer - 1, "secondary")
        if flagged:
            alive[layer] = table[layer, flagged].mean()
    return {**scores, "secondary_alive": alive}


def matrix_entropy(rows: Float[Tensor, "rows width"], alpha: float = 1.0) -> float:
    """Entropy (nats) of the eigenvalues of the Gram matrix of the rows, normalised to sum 1: Shannon's at alpha = 1,
    Rényi's of that order otherwise. Between 0 (all rows parallel) and ln(rank); NaN when every row is zero."""
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise ArgumentError(f"rows: got shape {tuple(rows.shape)}, expected (rows, width) with at least one row.")
    if not 0 < alpha < float("inf"):
        raise ArgumentError(f"alpha: got {alpha}, expected a positive order; 1 is Shannon's entropy.")
    exact = rows.double()
    return _spectral_entropy(exact @ exact.T if rows.shape[0] <= rows.shape[1] else exact.T @ exact, alpha)


def chunk_entropies(
    hidden: Float[Tensor, "tokens width"], *, chunk: int = CHUNK, alpha: float = 1.0, mode: str = "chunks"
) -> list[float]:
    """Matrix entropy of each full chunk of tokens ("chunks"), or of the growing prefix at the end of each ("prefix").

    A text shorter than one chunk counts as one; a shorter rest at the end is left out, since entropies of fewer rows do
    not compare."""
    if chunk < 1:
        raise ArgumentError(f"chunk: got {chunk}, expected at least one token; the paper uses {CHUNK}.")
    if mode not in CHUNK_MODES:
        raise unknown("mode", mode, CHUNK_MODES)
    chunk = min(chunk, hidden.shape[0])
    parts = [hidden[i : i + chunk] for i in range(0, hidden.shape[0] - chunk + 1, chunk)]
    if mode == "chunks":
        return [matrix_entropy(part, alpha) for part in parts]
    entropies = []
    gram = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for i, part in enumerate(parts):
        gram += part.double().T @ part.double()
        small = (i + 1) * chunk < hidden.shape[1]
        entropies.append(matrix_entropy(hidden[: (i + 1) * chunk], alpha) if small else _spectral_entropy(gram, alpha))
    return entropies


def _spectral_entropy(gram: Float[Tensor, "side side"], alpha: float) -> float:
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    if not float(values.sum()) > 0:
        return float("nan")
    shares = values / values.sum()
    if alpha == 1.0:
        return float(torch.special.entr(shares).sum().clamp_min(0))
    return float(((shares**alpha).sum().log() / (1 - alpha)).clamp_min(0))


def _over_heads(values: Any, layer: int, tokens: int) -> Float[Tensor, " tokens"]:
    table = torch.as_tensor(values, dtype=torch.float32).cpu()
    if table.ndim not in (1, 2) or table.shape[-1] != tokens:
        raise ArgumentError(
            f"received[{layer}]: got shape {tuple(table.shape)}, expected (heads, {tokens}) or ({tokens},). Leave "
            "padding and the batch dimension out."
        )
    return table if table.ndim == 1 else table.mean(0)
